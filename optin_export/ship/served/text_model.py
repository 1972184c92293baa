"""Triton python backend: text to token ids. Needs numpy and the package `tokenizers` in the server's Python.

tokenizer.json next to this file has the vocabulary, truncation and padding; prompt.txt (if it exists) is the prefix of
every text. The names of this model's inputs define the columns of a row (TEXT, and TEXT_PAIR for pairs), the
names of its outputs are the inputs of the next model.

Triton batches only requests of equal shape. With the parameter padding: sequence, every text is therefore padded to the
length at which texts are cut; the attention mask keeps the answers what they were. A model that reads no attention mask
gets texts padded to the longest of the request, as in the evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

#: Output name -> attribute of an encoding.
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        from tokenizers import Tokenizer

        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompt = folder / "prompt.txt"
        self.prompt = prompt.read_bytes().decode("utf-8") if prompt.is_file() else ""
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        if parameters.get("padding") == "sequence" and "attention_mask" in self.outputs:
            self.pad_to_sequence(config["output"][0]["dims"][-1])

    def pad_to_sequence(self, fixed: object) -> None:
        """Pad every text to the length that the next model fixes, else to the length at which texts are cut."""
        padding, cut = self.tokenizer.padding, self.tokenizer.truncation
        if padding is not None and cut is not None and padding.get("length") is None:
            length = int(str(fixed))  # JSON writes 64-bit numbers as text
            self.tokenizer.enable_padding(**{**padding, "length": length if length > 0 else cut["max_length"]})

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        columns = [pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1) for name in self.inputs]
        try:
            texts = [[value.decode("utf-8") for value in column] for column in columns]
        except UnicodeDecodeError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"text is not UTF-8: {error}"))
        texts[0] = [self.prompt + text for text in texts[0]]
        encoded = self.tokenizer.encode_batch(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.array([getattr(one, FIELDS[name]) for one in encoded], np.int64))
                for name in self.outputs
            ]
        )
