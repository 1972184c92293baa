"""The recipe section `model`: which model, and where it is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from optin_export.recipe.fields import ClassNames, Count, Place, Pooling, Positive, Prompts, Section, TextKeys
from optin_export.recipe.tasks import Task


class Preprocess(Section):
    """Image preprocessing; a field left out is taken from the checkpoint's own configuration."""

    size: tuple[Count, Count] | None = Field(None, description="height and width in pixels")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="mean per channel, for pixels in 0..1")
    std: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="standard deviation per channel, for pixels in 0..1"
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None = Field(
        None, description="filter that resizes an image to `size`"
    )


class ModelSection(Section):
    source: str = Field(
        description="the model: 'hf:ID', 'timm:NAME', 'py:FILE.py:FUNCTION' or a folder with a config.json",
        examples=["hf:sentence-transformers/all-MiniLM-L6-v2"],
    )
    task: Task = Field(description="what the model is for; decides the columns of a row, the output and the metrics")
    weights: str = Field(
        "pretrained",
        description="'pretrained', 'random', or a checkpoint: a file of safetensors or torch.save, an index of shards, "
        "or a folder with one; PATH#KEY selects the entry if a file holds several sets of weights",
        examples=["weights.safetensors"],
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="keyword arguments for the model's constructor",
        examples=[{"num_classes": 10}],
    )
    pooling: Pooling | None = Field(
        None,
        description="feature-extraction: how token states become one embedding; default: from modules.json, or mean",
    )
    normalize: bool | None = Field(
        None, description="L2-normalise the embedding inside the graph; default: from modules.json, or false"
    )
    classes: ClassNames | None = Field(
        None, description="zero-shot: class names, or a text file with one name per line", examples=[["cat", "dog"]]
    )
    prompt: Prompts | None = Field(
        None, description="zero-shot: template(s) with {} for the class name", examples=["a photo of a {}."]
    )
    family: str | None = Field(
        None,
        description="a Python file whose FAMILY says where the units of the model's blocks are; default: the known "
        "families, and measurement for all other models",
        examples=["my_family.py"],
    )
    tokenizer: str | None = Field(
        None, description="location of the tokenizer, if it is not with the model", examples=["bert-base-uncased"]
    )
    preprocess: Preprocess = Field(
        Preprocess(), description="how images become inputs; default: from the checkpoint's configuration"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto",
        description="where scoring, loss curves and repair compute, for a model that fits there as a whole: auto (a "
        "GPU if torch sees one), cpu, cuda or cuda:1",
        examples=["cuda:1"],
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, Place] | None = Field(
        None,
        description="device map for scoring and repair, in accelerate's format: a strategy, or {module: GPU number, "
        "'cpu' or 'disk'}; for a model that does not fit `device`; default: the whole model there",
        examples=["auto"],
    )
    max_memory: Annotated[dict[Annotated[str, Field(pattern=r"^(\d+|cpu|disk)$")], Count | str], TextKeys] = Field(
        default_factory=dict,
        description="memory limit per GPU number and 'cpu', such as '20GiB', if device_map is a strategy",
        examples=[{"0": "20GiB", "cpu": "60GiB"}],
    )

    @model_validator(mode="after")
    def _one_place(self) -> ModelSection:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("model.device is for the whole model, model.device_map for its parts; remove one of them")
        return self

    @model_validator(mode="after")
    def _memory_of_a_map(self) -> ModelSection:
        if self.max_memory and not isinstance(self.device_map, str):
            raise ValueError("model.max_memory is for a device_map that is a strategy, such as auto")
        return self

    @property
    def gpus(self) -> int:
        """Number of GPUs that the device or the device map needs; for a strategy those in max_memory, or one.

        `device: auto` needs none: a worker of a cluster sees a GPU only if it was asked for.
        """
        if self.device_map is None:
            return int(self.device.startswith("cuda"))
        if isinstance(self.device_map, str):
            return len(self.max_memory.keys() - {"cpu", "disk"}) or (0 if self.max_memory else 1)
        return len({str(one).removeprefix("cuda:") for one in self.device_map.values()} - {"cpu", "disk"})
