"""`optin-export check-family`: test a family that you declare, on a model with random or its own weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optin_export.cli._group import PATH, command
from optin_export.errors import InputError

if TYPE_CHECKING:
    from optin_export.models import Inputs, TaskModel
    from optin_export.recipe import ModelSection


@command
@click.argument("file", type=PATH)
@click.option("--model", required=True, metavar="SOURCE", help="A folder, hf:ID, timm:NAME or py:FILE.py:FUNCTION.")
@click.option("--task", metavar="TASK", help="Task of the model (default: as its configuration says).")
@click.option("--weights", metavar="WEIGHTS", default="random", help="random (default), pretrained, or a checkpoint.")
@click.option("--args", metavar="JSON", default="{}", help="Arguments of the model, e.g. '{\"img_size\": 64}'.")
@click.option("--image", metavar="C,H,W", default="3,224,224", help="Shape of an image (default: 3,224,224).")
@click.option("--tokens", type=click.IntRange(2), default=16, help="Tokens of a text (default: 16).")
def check_family(
    file: Path, model: str, task: str | None, weights: str, args: str, image: str, tokens: int, as_json: bool
) -> int:
    """Test the FAMILY that the Python file FILE declares. FILE is executed.

    For each group of units that it declares in the model: whether measurement finds the same rows and residual stream,
    whether the rebuilt model without half of the units (and without the whole sub-layer) equals the masked one, and
    whether the predicted costs are those counted on it.

    Exit code 0: all are right; 2: one is wrong, or no units are found.
    """
    from optin_export.models import load_model
    from optin_export.pruning import check_family as checked
    from optin_export.units import load_own_family

    (family,) = load_own_family(file)
    loaded = load_model(_section(model, task, weights, args)).model
    rows, further = checked(family, loaded, _inputs(loaded, image, tokens))
    right = all(row.passed for row in rows)
    if as_json:
        document = {"family": family.name, "passed": right, "groups": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(document | {"not_declared": further}))
        return 0 if right else InputError.exit_code
    wide = max(len(row.key) for row in rows)
    print(f"{'group':<{wide}}  units  measured  exact  costs")
    for row in rows:
        print(f"{row.key:<{wide}}  {row.count:>5}  {row.measured}  {row.exact}  {row.costs}")
    print("\n".join(f"not declared: {one}" for one in further), end="\n" if further else "")
    wrong = sum(not row.passed for row in rows)
    print(f"family {family.name}: " + (f"{wrong} of {len(rows)} groups are wrong" if wrong else "all groups are right"))
    return 0 if right else InputError.exit_code


def _section(model: str, task: str | None, weights: str, args: str) -> ModelSection:
    from optin_export.cli._guess import task_of
    from optin_export.recipe import validate

    task = task or task_of(model)
    if task is None:
        raise InputError("cannot check the family", "the model does not say what its task is", "give --task")
    try:
        given = json.loads(args)
    except ValueError as error:
        raise InputError(f"cannot read --args {args}", str(error), "write --args '{\"img_size\": 64}'") from None
    section = {"source": model, "task": task, "weights": weights, "args": given}
    data = {"calibration": {"source": "py:memory:given"}}
    budget = {"budget": {"macs": 0.5}}
    return validate({"recipe": 1, "name": "check", "model": section, "data": data, "prune": budget}, Path.cwd()).model


def _inputs(model: TaskModel, image: str, tokens: int) -> Inputs:
    """Two random rows. Raises InputError if the model does not take them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    try:
        shape = tuple(int(one) for one in image.split(","))
        inputs = {"pixel_values": torch.randn(2, *shape, generator=generator)}
    except (ValueError, RuntimeError):
        raise InputError(f"cannot read --image {image}", "it is not C,H,W", "write --image 3,224,224") from None
    if hasattr(model, "reads_mask"):
        embedding = next(one for one in model.modules() if isinstance(one, torch.nn.Embedding))
        ids = torch.randint(0, embedding.num_embeddings, (2, tokens), generator=generator)
        inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if model.reads_mask else {})
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # a library's or the user's own code
        raise InputError(
            "the model does not take random inputs", f"{type(error).__name__}: {error}"[:300], "set --image or --tokens"
        ) from None
    return inputs
