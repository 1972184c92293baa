"""What a finished run of breadth.py wrote, checked with torch, onnxruntime and the model's own library alone.

Of the package only `load_model` is used, as a user would. Nothing here is shared with the run's own parity check: other
inputs, other batch sizes, lengths and padding, graphs without optimisations, and the original model loaded by its
own library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from breadth_build import VOCABULARY, Case, Made, tokenizer

BATCHES, LENGTHS = (1, 2, 5), (7, 20, 48)
#: Largest difference of an output from its reference, relative to the largest entry of the reference.
TOLERANCE = 1e-3
#: A graph may differ more from a model that rounds more: by this many times the model's own difference from itself in
#: float64, as long as that is at most MOST_ROUNDING: beyond, a comparison says nothing.
ROUNDINGS, MOST_ROUNDING = 4.0, 2e-3
#: Of the dense model from the masked one, before the repair.
MASKED_TOLERANCE = 1e-4
#: Number of the end token.
END = 3
#: Samples of sound, a second at 16 kHz.
SAMPLES = 16_000

Inputs = dict[str, torch.Tensor]


def inputs(case: Case, made: Made) -> Iterator[tuple[str, Inputs]]:
    """Random inputs with a name for messages; in a batch of texts or sounds, every row but the first is padded."""
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        if case.modality == "image":
            shape = (batch, 3, case.size, case.size)
            yield f"batch {batch}", {"pixel_values": torch.randn(shape, generator=generator)}
        elif case.modality == "audio":
            yield f"batch {batch}", _sounds(batch, made, generator)
        else:
            for length in LENGTHS:
                yield f"batch {batch}, length {length}", padded(batch, length, generator)


def _sounds(batch: int, made: Made, generator: torch.Generator) -> Inputs:
    """Noise of a second and less, as the model's feature extractor gives it."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(made.model["source"])
    rows = [torch.randn(SAMPLES - 1000 * row, generator=generator).numpy() for row in range(batch)]
    raw = type(extractor).__name__ == "Wav2Vec2FeatureExtractor"
    length = {"padding": "max_length", "max_length": SAMPLES} if raw else {}
    found = extractor(rows, sampling_rate=extractor.sampling_rate, return_tensors="pt", **length)
    return {name: tensor.long() if name == "attention_mask" else tensor for name, tensor in found.items()}


def padded(batch: int, length: int, generator: torch.Generator) -> Inputs:
    """Random token ids [batch, length]; row i has 3 i padding tokens at its end, and at least two others; the
    last of these is an end token."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    lengths = torch.tensor([max(2, length - 3 * row) for row in range(batch)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[torch.arange(batch), lengths - 1] = END
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def difference(output: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Largest difference, relative to the largest entry of the reference; infinite for another shape or no number.

    mask: int64 [batch, tokens]; of an output per token, only the tokens that are not padding count.
    """
    if output.shape != reference.shape:
        return float("inf")
    if mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape:
        output, reference = output[mask > 0], reference[mask > 0]
    elif mask is not None and output.ndim == 3 and output.shape[2] == mask.shape[1]:  # start and end, per question
        output, reference = (np.where(mask[:, None] > 0, one, 0) for one in (output, reference))
    found = float(np.abs(output - reference).max() / max(np.abs(reference).max(), 1e-6))
    return found if np.isfinite(found) else float("inf")


def original(case: Case, made: Made, wide: bool = False) -> Callable[[Inputs], torch.Tensor]:
    """The original model as a function of named inputs, its output as the task defines it. wide: in float64."""
    model = made.load().double() if wide else made.load()
    if case.library != "transformers":
        return lambda given: _plain(model(**given) if case.modality == "text" else model(*given.values()))
    if case.task == "zero-shot-image-classification":
        prompts = [made.model["prompt"].format(name) for name in made.model["classes"]]
        texts = tokenizer()(prompts, padding=True, return_tensors="pt")
        return lambda given: model(**given, **texts).logits_per_image
    if hasattr(model, "get_image_features") and case.task.endswith("feature-extraction"):
        if case.modality == "text":
            return lambda given: _pooled(model.get_text_features(given["input_ids"], given.get("attention_mask")))
        return lambda given: _pooled(model.get_image_features(**given))
    if case.task == "automatic-speech-recognition" and model.config.is_encoder_decoder:
        model = model.get_encoder()
    return lambda given: _result(case.task, model(**given), given)


def _plain(output: Any) -> torch.Tensor:
    """What a torch module returns: a tensor, or torchvision's dictionary of a segmentation."""
    return output["out"] if isinstance(output, Mapping) else output


def _pooled(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _result(task: str, output: Any, given: Inputs) -> torch.Tensor:
    if task == "feature-extraction":
        if "last_hidden_state" not in output:
            return output.pooler_output
        states, mask = output.last_hidden_state, given["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)
    if task == "image-feature-extraction":
        pooled = output.get("pooler_output")
        return output.last_hidden_state[:, 0] if pooled is None else pooled
    if task == "automatic-speech-recognition" and "logits" not in output:
        return output.last_hidden_state
    if task == "question-answering":
        return torch.stack([output.start_logits, output.end_logits], 1)
    if task == "object-detection":
        return torch.cat([output.logits, output.pred_boxes], -1)
    if task == "depth-estimation":
        depth = output.predicted_depth
        return depth[:, None] if depth.dim() == 3 else depth
    masks = output.get("masks_queries_logits")
    if masks is None:
        return output.logits
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid()).clamp(min=1e-6).log()


def check(case: Case, made: Made, run: Path) -> dict[str, Any]:
    """Compare a run's graphs with the models that they stand for.

    Returns the largest differences of `base` (base graph and original model), `pruned` (pruned graph and
    `load_model`), `masked` (dense and masked model, as the run reports it), where a graph differs by more than
    TOLERANCE the model's own `rounding` there, and `failed`: what is wrong, one sentence each.
    """
    import optin_export

    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    worst = {"base": 0.0, "pruned": 0.0, "masked": report["pruning"]["masked_difference"]}
    failed: list[str] = []
    graphs = {name: _session(run / "onnx" / f"{name}.onnx") for name in ("base", "pruned")}
    models = {"base": original(case, made), "pruned": _called(optin_export.load_model(run / "model", True))}
    wide = {
        "base": lambda: original(case, made, wide=True),
        "pruned": lambda: _called(optin_export.load_model(run / "model", True).double()),
    }
    roundings: dict[str, float] = {}
    for label, given in inputs(case, made):
        for name, graph in graphs.items():
            try:
                found = _compare(graph, models[name], given)
            except Exception as error:  # of onnxruntime, torch or the model itself
                failed.append(f"{name} fails at {label}: {type(error).__name__}: {str(error)[:200]}")
                continue
            worst[name] = max(worst[name], found)
            if found > TOLERANCE:
                taken = {one.name: given[one.name] for one in graph.get_inputs()}
                own = rounding(models[name], wide[name], taken)
                roundings[name] = max(roundings.get(name, 0.0), own)
                if own > MOST_ROUNDING or not found <= ROUNDINGS * own:
                    failed.append(f"{name} differs by {found:.1e} at {label}")
    if not worst["masked"] <= MASKED_TOLERANCE:
        failed.append(f"masked differs by {worst['masked']:.1e}")
    result: dict[str, Any] = {name: value if np.isfinite(value) else None for name, value in worst.items()}
    return result | ({"rounding": roundings} if roundings else {}) | {"failed": failed}


def rounding(
    model: Callable[[Inputs], torch.Tensor], wide: Callable[[], Callable[[Inputs], torch.Tensor]], given: Inputs
) -> float:
    """Difference of a model from itself in float64, which `wide` makes; 0 if its code does not run in float64."""
    doubled = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    mask = given.get("attention_mask")
    try:
        with torch.no_grad():
            reference = wide()(doubled).numpy()
    except RuntimeError:  # its code mixes in tensors of float32
        return 0.0
    with torch.no_grad():
        return difference(model(given).numpy(), reference, None if mask is None else mask.numpy())


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _called(model: Any) -> Callable[[Inputs], torch.Tensor]:
    return lambda given: model(**given)


def _compare(graph: Any, model: Callable[[Inputs], torch.Tensor], given: Inputs) -> float:
    """Difference of a graph from a model on the inputs that the graph takes."""
    named = {one.name: given[one.name] for one in graph.get_inputs()}
    mask = given.get("attention_mask")
    [output] = graph.run(None, {name: tensor.numpy() for name, tensor in named.items()})
    with torch.no_grad():
        reference = model(named).numpy()
    return difference(output, reference, None if mask is None else mask.numpy())
