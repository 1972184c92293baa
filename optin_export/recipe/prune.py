"""The recipe section `prune`: what is removed, how much, by which score, and how the rest is repaired."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from optin_export.recipe.budget import Budget
from optin_export.recipe.fields import Count, Positive, Section
from optin_export.recipe.removed import no_comparison, without_rounds

#: Units that may be removed by default.
EVERYTHING: tuple[Literal["heads", "neurons", "channels", "dimensions"], ...] = (
    "heads",
    "neurons",
    "channels",
    "dimensions",
)


class PruneSection(Section):
    units: tuple[Literal["heads", "neurons", "channels", "dimensions"], ...] = Field(
        EVERYTHING,
        min_length=1,
        description="what may be removed: attention heads, FFN neurons, channels of convolutions, and, together with "
        "heads, dimensions of queries and keys, where nothing but their product reads them, and not under a budget of "
        "time; by default only of image models with all targets on a CPU (fused attention of GPUs wants equal widths)",
        examples=[["heads", "neurons"]],
    )
    score: Annotated[
        Literal["auto", "optin", "optin-exact", "magnitude", "activation"], BeforeValidator(no_comparison)
    ] = Field(
        "auto",
        description="importance score of a unit: auto (optin, but magnitude for channels of convolutional networks "
        "under repair), optin, optin-exact (the same with one forward pass per unit), magnitude (squared weights), "
        "activation (contribution of the unit to the output of its layer)",
    )
    budget: Budget = Field(
        description="limit of the cost or the loss of the pruned model: exactly one of the fields below"
    )
    allocation: Literal["joint", "additive"] = Field(
        "joint",
        description="how the budget is shared among layers: joint: by measured losses of keeping k units per "
        "sub-layer; additive: by sums of scores",
    )
    compensate: bool | Literal["rescale"] = Field(
        True, description="repair by least squares on the calibration data; rescale: only one factor per kept unit"
    )
    repair: Literal["closed-form", "distill", "auto"] = Field(
        "closed-form",
        description="closed-form: no weight is trained; distill: then also AdamW steps on the unlabelled calibration "
        "rows towards the unpruned model's output (as `finetune`, which sets their number), kept if they lower the "
        "loss on held-out rows; auto: distill if the search predicts a large loss",
    )
    gauss_newton: bool | Literal["auto"] = Field(
        "auto",
        description="refit gains and biases of all layers together to the output, after the least squares and on the "
        "same data (needs prune.compensate: true); auto: for channels of convolutional networks",
    )
    coupled: bool = Field(
        False, description="also remove channels of residual streams, from all layers that share them"
    )
    align: Count | Literal["auto"] = Field(
        "auto",
        description="neurons and channels are kept in multiples of this number; auto: 8, but what int8 and fp8 kernels "
        "of the targets on a GPU want (16 or 32 features, heads times their width included), as far as a group is "
        "large enough for four steps",
        examples=["auto", 16],
    )
    probes: Count | Literal["auto"] = Field(
        "auto", description="number of random probes for the scores; auto: until they are stable"
    )
    rows: Count = Field(
        768, description="token rows compared per batch of 32 samples and block, the same number per sample"
    )
    score_samples: Count = Field(64, description="number of calibration rows for scoring")
    curve_samples: Count = Field(
        256, description="number of calibration rows for the loss curves of `allocation: joint`; at most a third of all"
    )
    temperature: Positive = Field(1.0, description="softmax temperature of the distillation loss")
    autocast: Literal["auto", "bfloat16", "float16"] | None = Field(
        "auto",
        description="torch.autocast precision of the passes whose gradients score units, predict losses and weigh the "
        "rows of the repair; null: float32; auto: bfloat16 for models of 4 million weights or more, where the "
        "processor has instructions for it and the scores of a few rows rank as in float32",
    )

    @property
    def group_kinds(self) -> tuple[Literal["heads", "neurons", "channels"], ...]:
        """The kinds of units that are whole features of layers."""
        return tuple(kind for kind in self.units if kind != "dimensions")

    @property
    def narrows(self) -> bool:
        """Whether queries and keys may lose dimensions, as far as the targets allow it.

        Their loss curves take the least squares, and no table of latencies has them.
        """
        takes = "dimensions" in self.units and self.allocation == "joint" and self.compensate is True
        return takes and self.budget.kind != "latency"

    @model_validator(mode="after")
    def _heads_with_dimensions(self) -> PruneSection:
        if "dimensions" in self.units and "heads" not in self.units:
            raise ValueError("units: dimensions are those within heads: name heads as well")
        if self.lists_dimensions and not self.narrows:
            raise ValueError(
                "units: dimensions are removed with allocation: joint and compensate: true, and not under a budget of "
                "speedup or latency_ms"
            )
        return self

    @property
    def lists_dimensions(self) -> bool:
        """Whether the recipe asks for dimensions, which are otherwise removed where nothing speaks against it."""
        return "dimensions" in self.units and self.units != EVERYTHING

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, section: Any) -> Any:
        return without_rounds(section)
