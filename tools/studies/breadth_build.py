"""Build the architectures of breadth.py: tiny, with random weights, saved as a user would have them.

A `Case` is an architecture; its `make` writes the model into a folder and returns a `Made`: the recipe's section
`model`, and how its own library loads it again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
#: Width, blocks, heads and neurons of the transformers, and the size of their vocabulary.
WIDTH, BLOCKS, HEADS, NEURONS, VOCABULARY = 64, 3, 4, 128, 1000
#: Longest text in tokens, and the length that is exported.
POSITIONS, SEQUENCE = 128, 48
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Class of transformers that finds a model's class, by task.
AUTO = {
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "depth-estimation": "AutoModelForDepthEstimation",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-image-classification": "AutoModel",
}
_TEXT_TASKS = ("text", "token", "fill", "feature", "question")


@dataclass(frozen=True)
class Made:
    """model: the section `model` of a recipe, without its task. load: the original, loaded by its own library."""

    model: dict[str, Any]
    load: Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One architecture. attention: whether it has attention heads. size: pixels per side of its images."""

    library: str
    task: str
    attention: bool
    make: Callable[[Path], Made] = field(repr=False)
    size: int = 64

    @property
    def modality(self) -> str:
        """What the model reads: "text", "audio" or "image"."""
        if self.task.startswith(_TEXT_TASKS):
            return "text"
        return "audio" if self.task.startswith("au") else "image"


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw weights so that every layer matters, and return the model in eval mode.

    Libraries initialise weights near zero, residual branches at zero, and batch norms with trivial statistics: the
    output would then hardly depend on what is removed.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, deviation: float) -> None:
        tensor.copy_(deviation * torch.randn(tensor.shape, generator=generator))

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            transposed = type(module).__name__ == "Conv1D"  # the linear layer of GPT-2
            if transposed or isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                weight = module.weight
                deviation = 0.9 / max(weight.shape[0] if transposed else weight[0].numel(), 1) ** 0.5
                if weight.std() < deviation:
                    normal(weight, deviation)
                if module.bias is not None:
                    normal(module.bias, 0.1)
            elif isinstance(module, nn.Embedding):
                normal(module.weight, 0.5)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                normal(module.running_mean, 0.1)
                uniform(module.running_var, 0.5, 1.5)
                if module.affine:
                    uniform(module.weight, 0.7, 1.3)
                    normal(module.bias, 0.1)
        for name, parameter in model.named_parameters():
            scales = parameter.numel() > 1 and not name.endswith("bias") and 0 < parameter.abs().max() < 0.01
            if scales and max(parameter.shape) == parameter.numel():  # layer scale
                uniform(parameter, 0.5, 1.0)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.float().eval()


def words() -> list[str]:
    """The vocabulary: special tokens, then made-up words."""
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    made_up = [one + other for one in syllables for other in syllables]
    return [*SPECIAL, *made_up[: VOCABULARY - len(SPECIAL)]]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random texts of 3 to 40 words."""
    generator, vocabulary = random.Random(seed), words()[len(SPECIAL) :]
    return [" ".join(generator.choices(vocabulary, k=generator.randint(3, 40))) for _ in range(count)]


def tokenizer() -> Any:
    """A tokenizer of whole words, usable with every text model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: index for index, word in enumerate(words())}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    names |= {"bos": "[CLS]", "eos": "[SEP]"}
    special = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=POSITIONS, **special)


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers.

    kind: its `model_type`. model_class: its class; None: that of the task's auto class. own_sizes: the configuration
    gets only `fields`, not the usual sizes. edit: changes the configuration, for nested ones. sentence: save it as
    sentence-transformers does, with mean pooling. fields: fields of the configuration.
    """

    kind: str
    model_class: str | None = None
    own_sizes: bool = False
    edit: Callable[[Any], None] | None = None
    sentence: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def transformers_case(
    architecture: Architecture,
    task: str,
    attention: bool = True,
    size: int = 64,
    model: dict[str, Any] | None = None,
) -> Case:
    """An architecture of transformers, saved with `save_pretrained`. model: more of the recipe's section `model`."""

    def make(folder: Path) -> Made:
        torch.manual_seed(0)
        built = enliven(_configured(architecture, case))
        built.save_pretrained(folder)
        _save_readers(case, folder, built.config)
        if architecture.sentence:
            _save_sentence_folder(folder)
        loader = type(built).from_pretrained
        return Made({"source": str(folder), **(model or {})}, lambda: loader(folder).float().eval())

    case = Case("transformers", task, attention, make, size)
    return case


def _configured(architecture: Architecture, case: Case) -> Any:
    import transformers

    sizes = {} if architecture.own_sizes else _sizes(case)
    config = transformers.CONFIG_MAPPING[architecture.kind](**sizes | architecture.fields)
    if architecture.edit is not None:
        architecture.edit(config)
    classes = {"text-classification": 3, "image-classification": 5, "audio-classification": 5}.get(case.task)
    if classes is not None and "num_labels" not in architecture.fields:
        config.num_labels = classes
    if architecture.model_class is not None:
        return getattr(transformers, architecture.model_class)(config)
    return getattr(transformers, AUTO[case.task]).from_config(config)


def _save_sentence_folder(folder: Path) -> None:
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{part}"}
        for index, (path, part) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def _sizes(case: Case) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": NEURONS}
    if case.modality == "image":
        return sizes | {"image_size": case.size, "patch_size": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": VOCABULARY}
    return sizes | tokens | ({"max_position_embeddings": POSITIONS} if case.modality == "text" else {})


def _save_readers(case: Case, folder: Path, config: Any) -> None:
    """The tokenizer, image processor or feature extractor that a checkpoint comes with."""
    import transformers

    if case.modality == "text" or hasattr(config, "text_config"):
        tokenizer().save_pretrained(folder)
    if case.modality == "image":
        size = {"height": case.size, "width": case.size}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    if case.modality == "audio":
        _feature_extractor(config).save_pretrained(folder)


def _feature_extractor(config: Any) -> Any:
    """That of its kind of checkpoint, of a second of sound."""
    import transformers

    if config.model_type == "whisper":
        return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=1)
    if config.model_type == "audio-spectrogram-transformer":
        return transformers.ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    masked = getattr(config, "feat_extract_norm", "group") == "layer"
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked)


def timm_case(name: str, attention: bool, size: int = 64, **arguments: Any) -> Case:
    """An architecture of timm, with five classes by default: a name, arguments, and a file of weights."""

    def make(folder: Path) -> Made:
        import timm
        from safetensors.torch import load_file, save_file

        folder.mkdir(parents=True)
        given, weights = {"num_classes": 5, **arguments}, folder / "weights.safetensors"
        torch.manual_seed(0)
        state = enliven(timm.create_model(name, **given)).state_dict()
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, weights)

        def load() -> nn.Module:
            model: nn.Module = timm.create_model(name, **given)
            model.load_state_dict(load_file(weights))
            return model.eval()

        preprocess = {"size": [size, size]}
        return Made({"source": f"timm:{name}", "weights": str(weights), "args": given, "preprocess": preprocess}, load)

    embeds = arguments.get("num_classes") == 0
    return Case("timm", "image-feature-extraction" if embeds else "image-classification", attention, make, size)


def python_case(file: str, function: str, task: str, attention: bool, size: int = 64, library: str = "own") -> Case:
    """A model that a function in a user's Python file returns; `file` lies next to this one."""

    def make(folder: Path) -> Made:
        import importlib

        folder.mkdir(parents=True)
        model: dict[str, Any] = {"source": f"py:{HERE / file}:{function}"}
        if case.modality == "text":
            tokenizer().save_pretrained(folder)
            model["tokenizer"] = str(folder)
        elif case.modality == "image":
            model["preprocess"] = {"size": [size, size]}
        return Made(model, getattr(importlib.import_module(Path(file).stem), function))

    case = Case(library, task, attention, make, size)
    return case
