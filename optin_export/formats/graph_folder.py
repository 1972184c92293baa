"""`--format optimum`: the ONNX graph with the original configuration, for `ORTModel` classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from optin_export.export import export_onnx
from optin_export.formats.original_files import copy_processors
from optin_export.formats.run import FinishedRun, unfit
from optin_export.models.tasks import TextModel
from optin_export.workdir.files import write_json

#: Task -> the class of optimum.onnxruntime that takes its graph.
CLASSES = {
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "fill-mask": "ORTModelForMaskedLM",
    "text-generation": "ORTModelForCausalLM",
    "feature-extraction": "ORTModelForFeatureExtraction",
    "image-classification": "ORTModelForImageClassification",
    "image-segmentation": "ORTModelForSemanticSegmentation",
    "audio-classification": "ORTModelForAudioClassification",
}


class _TokenStates(TextModel):
    """The last hidden states of a text model: what a library pools itself."""

    def __init__(self, model: TextModel) -> None:
        super().__init__(model.model, "feature-extraction", None, False)
        self.output_name = "last_hidden_state"

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        segments: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **segments
        ).last_hidden_state
        return states


def write_optimum(run: FinishedRun, folder: Path, name: str) -> None:
    """Write config.json, onnx/model.onnx, tokenizer and processor. name: of the format, for errors.

    Raises InputError for a task whose graph has other outputs than optimum's classes read.
    """
    graph = "onnx/ of the run with onnxruntime"
    if run.task not in CLASSES or "tower" in run.base or "encoder" in run.base:
        raise unfit(run, name, f"optimum has no class that takes the graph of this {run.task} model", f"use {graph}")
    if run.task != "feature-extraction" and run.model.output_name != "logits":
        why = f"its graph returns {run.model.output_name}, and optimum's class reads logits"
        raise unfit(run, name, why, f"use {graph}")
    config = {key: value for key, value in run.base["config"].items() if key != "auto_map"}
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))
    if run.task == "feature-extraction":
        write_token_states(run, folder, name)
    else:
        run.copy_onnx(folder)
    copy_processors(run, folder)


def write_token_states(run: FinishedRun, folder: Path, name: str) -> None:
    """Write onnx/model.onnx with the tokens' last hidden states, in fp32: optimum and sentence-transformers pool them.

    Raises InputError for a model that pools them itself, or merges tokens.
    """
    assert isinstance(run.model, TextModel)
    inputs, _ = run.rows
    with torch.no_grad():
        output = run.model.model(**inputs)
    if any(run.architecture.merged) or not hasattr(output, "last_hidden_state"):
        why = "it does not return a state of every token, which the library pools"
        raise unfit(run, name, why, "use onnx/ of the run with onnxruntime: its output is the embedding")
    section, two = run.recipe.export, {key: rows[:2] for key, rows in inputs.items()}
    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    export_onnx(_TokenStates(run.model), two, path, max_batch=max(section.batch), sequence=section.sequence)
