"""The fine-tune: deterministic, never another architecture, and given up where it does not help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.data import Batch
from optin_export.data.readers import Examples
from optin_export.data.training import Training, split
from optin_export.errors import InputError
from optin_export.models import Inputs
from optin_export.models.tasks import TaskModel
from optin_export.pruning.rebuild import rebuild
from optin_export.recipe import FinetuneSection
from optin_export.repair import fine_tune, finetune
from optin_export.repair.finetune import mirrored
from optin_export.units import find_structure
from tests.repair.plans import halved
from tests.units.models import inputs_for, small_model

ROWS = 160


class Rows:
    """A processor for rows that are inputs already."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def order(self, examples: Examples) -> np.ndarray:
        return np.arange(len(examples))

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        return {name: tensor[np.asarray(examples.columns["row"])] for name, tensor in self.inputs.items()}


class Case:
    def __init__(self, name: str, labels: np.ndarray | None = None, size: int = 8) -> None:
        self.original, _ = small_model(name)
        inputs = inputs_for(self.original, ROWS, 3)
        self.structure = structure = find_structure(self.original)
        self.pruned, _ = rebuild(self.original, structure, halved(structure).groups, inputs)
        examples = Examples({"row": np.arange(ROWS)})
        self.training, self.held_out = split(Rows(inputs), examples, labels, size, seed=0)
        self.labels = labels

    def tune(self, **section: Any) -> tuple[TaskModel, Any]:
        rows = self.training, self.held_out
        return fine_tune(self.original, self.structure, self.pruned, *rows, FinetuneSection(**section))


def state(model: TaskModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "name", ["vit", "bert-embedding", "bert-regression", "bert-tokens", "clip-zero-shot", "segformer"]
)
def test_distillation_lowers_the_held_out_loss(name: str) -> None:
    case = Case(name)
    originals, before = state(case.original), state(case.pruned)
    tuned, outcome = case.tune(steps=40, learning_rate=1e-3)
    assert outcome.note is None and outcome.by == "distill" and outcome.after < 0.8 * outcome.before
    assert equal(state(case.original), originals) and equal(state(case.pruned), before)
    assert not equal(state(tuned), before)
    assert {n: t.shape for n, t in state(tuned).items()} == {n: t.shape for n, t in before.items()}
    assert not any(parameter.requires_grad for parameter in tuned.parameters())


def test_labels_are_learned() -> None:
    original, _ = small_model("vit")
    with torch.no_grad():  # labels that the images tell
        labels = original(**inputs_for(original, ROWS, 3)).argmax(-1).numpy().astype(float)
    _, outcome = Case("vit", labels).tune(steps=80, learning_rate=1e-3, loss="labels", data={"source": "npz:x"})
    assert outcome.by == "labels" and outcome.note is None and outcome.after < 0.8 * outcome.before


def test_the_same_seed_gives_the_same_weights() -> None:
    tuned = [state(Case("vit").tune(steps=6)[0]) for _ in range(2)]
    assert equal(*tuned)


def test_divergence_keeps_the_repaired_model() -> None:
    case = Case("vit")
    tuned, outcome = case.tune(steps=12, learning_rate=1e6)
    assert tuned is case.pruned and outcome.note is not None
    assert "held-out" in outcome.note or "not finite" in outcome.note


def test_a_loss_that_is_not_finite_keeps_the_repaired_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("vit")
    broken = {name: tensor.clone() for name, tensor in next(iter(case.training)).inputs.items()}
    broken["pixel_values"][0, 0, 0, 0] = float("nan")
    monkeypatch.setattr(Training, "__iter__", lambda self: iter([Batch(broken, np.arange(8))]))
    tuned, outcome = case.tune(steps=3)
    assert tuned is case.pruned and outcome.note == "the loss was not finite at step 1" and outcome.after is None


def test_labels_the_model_has_no_class_for() -> None:
    for wrong in (7.0, -1.0, 0.5):
        labels = np.zeros(ROWS)
        labels[11] = wrong
        with pytest.raises(InputError, match=f"label {wrong:g}"):
            Case("vit", labels).tune(loss="labels", data={"source": "npz:x"})


def test_epochs_hold_every_row_once_in_another_order() -> None:
    case = Case("vit", np.arange(float(ROWS)))
    first, second = ([float(label) for batch in case.training for label in batch.targets] for _ in range(2))
    held = [float(label) for batch in case.held_out for label in batch.targets]
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first + held) == list(map(float, range(ROWS))) and len(held) == ROWS // 5
    assert len(case.training) == ROWS * 4 // 5 // 8


def test_spare_rows_are_the_held_out_ones() -> None:
    inputs = inputs_for(small_model("vit")[0], 9, 0)
    training, held_out = split(Rows(inputs), Examples({"row": np.arange(6)}), None, 2, 0, Examples({"row": [6, 7, 8]}))
    assert len(training) == 3 and sorted(row for batch in training for row in batch.rows) == list(range(6))
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in held_out]), inputs["pixel_values"][6:])


def test_one_row_is_not_enough() -> None:
    with pytest.raises(InputError, match="one row"):
        split(Rows({}), Examples({"row": np.arange(1)}), None, 4, 0)


# --- the user's own function ----------------------------------------------------------------------------------------

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(
            "import torch\nfrom torch import nn\n\ndef tune(dense, original, batches):\n    " + body + "\nvalue = 3\n"
        )
        return f"py:{tmp_path / 'mine.py'}:tune"

    return write


def test_the_users_function(write: Write) -> None:
    source = write(
        "optimizer = torch.optim.SGD(dense.parameters(), lr=0.01)\n"
        "    for epoch in range(3):\n"
        "        for batch in batches:\n"
        "            loss = (dense(**batch.inputs) - original(**batch.inputs).detach()).square().mean()\n"
        "            optimizer.zero_grad(); loss.backward(); optimizer.step()\n"
        "    for parameter in original.parameters():\n"
        "        parameter.data.zero_()\n"  # it is given a copy
        "    return dense"
    )
    case = Case("vit")
    originals, before = state(case.original), state(case.pruned)
    tuned, outcome = case.tune(source=source)
    assert equal(state(case.original), originals) and equal(state(case.pruned), before)
    assert outcome.by == source and outcome.steps is None and outcome.after < outcome.before
    assert not equal(state(tuned), before)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return None", "returned no model"),
        ("return dense.model", "changed the architecture"),
        ("return original", "changed the architecture"),
        ("dense.model.blocks[0].mlp.fc1 = nn.Linear(32, 8); return dense", "changed the architecture"),
        ("dense.model.blocks[0].mlp.act = nn.Identity(); return dense", "changed the architecture"),
        ("dense.model.head.bias.data.fill_(float('nan')); return dense", "not finite"),
        ("raise ValueError('mine')", "ValueError: mine"),
    ],
)
def test_what_the_users_function_may_not_do(write: Write, body: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Case("vit").tune(source=write(body))


def test_what_is_no_function(write: Write) -> None:
    source = write("return dense").removesuffix("tune") + "value"
    with pytest.raises(InputError, match="is not a function"):
        Case("vit").tune(source=source)


def test_images_are_mirrored_half_of_the_time_and_other_rows_are_not() -> None:
    images = torch.arange(200 * 3 * 4 * 4, dtype=torch.float32).view(200, 3, 4, 4)
    torch.manual_seed(0)
    seen = mirrored(Batch({"pixel_values": images}, np.arange(200))).inputs["pixel_values"]
    flipped = [bool(torch.equal(one, image.flip(-1))) for one, image in zip(seen, images, strict=True)]
    assert (
        all(turned or torch.equal(one, image) for turned, one, image in zip(flipped, seen, images, strict=True))
        and 70 < sum(flipped) < 130
    )
    text = Batch({"input_ids": torch.arange(8).view(2, 4)}, np.arange(2))
    assert mirrored(text) is text


def test_the_best_look_at_the_held_out_rows_is_kept() -> None:
    case = Case("vit")
    tuned, outcome = case.tune(steps=40, learning_rate=1e-3)
    assert outcome.steps in (10, 20, 30, 40)
    with torch.no_grad():
        total = sum(
            float(
                torch.nn.functional.kl_div(
                    tuned(**batch.inputs).log_softmax(-1),
                    case.original(**batch.inputs).log_softmax(-1),
                    reduction="sum",
                    log_target=True,
                )
            )
            for batch in case.held_out
        )
    assert outcome.after == pytest.approx(total / sum(len(batch.rows) for batch in case.held_out), rel=1e-4)


@pytest.mark.parametrize(
    ("losses", "expected", "tried"), [((3.0, 2.0, 2.5, 1.0), 1, 3), ((3.0, 2.0, 1.5, 1.0), 3, 4), ((2.0, None), 0, 2)]
)
def test_the_learning_rate_is_the_best_before_a_worse_one(
    losses: tuple[float | None, ...], expected: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[int, float]] = []

    def descend(repaired: Any, *rest: Any, checks: int = 4) -> tuple[Any, float | None, int, None]:
        rates.append(rest[-2:])
        return repaired, losses[len(rates) - 1] if checks == 1 else 0.0, rest[-2], None

    monkeypatch.setattr(finetune, "_descend", descend)
    case = Case("vit")
    case.tune(steps=200, learning_rate="auto")
    assert len(rates) == tried + 1 and {steps for steps, _ in rates[:-1]} == {20}
    assert rates[-1] == (200, finetune.RATES[expected])
