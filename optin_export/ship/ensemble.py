"""NAME-ensemble: text or an encoded image in, the pruned model's output out, with the preparation in the server."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from optin_export.data import pixels
from optin_export.errors import InputError
from optin_export.ship.config import ModelSpec, Step, config_text, ensemble_text
from optin_export.ship.guide import columns
from optin_export.ship.labels import write_labels
from optin_export.ship.origin import Origin
from optin_export.ship.preprocess import IMAGE, PROMPT, TOKENIZER, check_served_image
from optin_export.ship.repository import Writer
from optin_export.ship.signature import Signature, Tensor
from optin_export.workdir.files import read_json

SERVED = Path(__file__).parent / "served"
#: Tasks whose answer is one row per text, so that a client needs no tokenizer to read it.
_BY_DEFAULT = ("text-classification", "feature-extraction")


def is_shipped(origin: Origin, batched: bool) -> bool:
    """Whether NAME-ensemble is part of a shipment. batched: whether the server forms batches of the pruned model."""
    wanted = origin.recipe.ship.ensemble
    if wanted is None:
        tokenizer = origin.folder / "preprocess" / TOKENIZER
        return batched and origin.recipe.model.task in _BY_DEFAULT and tokenizer.is_file()
    return wanted


def packages(origin: Origin) -> tuple[str, ...]:
    """What NAME-prepare imports in the server's Python, as pip takes it."""
    name = "tokenizers" if origin.recipe.is_text else "pillow"
    try:
        return (f"{name}=={metadata.version(name)}",)
    except metadata.PackageNotFoundError:
        return (name,)


def writers(origin: Origin, name: str, signature: Signature) -> dict[str, Writer]:
    """The models NAME-prepare and NAME-ensemble. Raises InputError if the server cannot preprocess inputs."""
    recipe = origin.recipe
    preprocess = origin.folder / "preprocess"
    if recipe.is_text:
        source, code = preprocess / TOKENIZER, "text_model.py"
        given = [Tensor(column, "TYPE_STRING", (-1, 1)) for column in columns(recipe)]
    else:
        source, code = preprocess / IMAGE, "image_model.py"
        given = [Tensor("IMAGE", "TYPE_STRING", (-1, 1))]
    if not source.is_file():
        raise InputError(
            "ship.ensemble cannot preprocess inputs",
            f"{source} is missing: this task takes no plain text, its tokenizer is not a fast one, or the run is old",
            "run the recipe again, or set ship.ensemble: false",
        )
    if not recipe.is_text:
        try:
            config = dict(read_json(source))
            check_served_image(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot use {source}", f"{type(error).__name__}: {error}", "run the recipe again"
            ) from None
    inputs = tuple(given)
    prepare, whole = f"{name}-prepare", f"{name}-ensemble"
    batch = max(recipe.export.batch)

    def write_prepare(folder: Path) -> None:
        (folder / "1").mkdir()
        for file in (source, preprocess / PROMPT):
            if file.is_file():
                shutil.copyfile(file, folder / "1" / file.name)
        shutil.copyfile(SERVED / code, folder / "1" / "model.py")
        if not recipe.is_text:  # the same arithmetic as in the evaluation
            shutil.copyfile(str(pixels.__file__), folder / "1" / "image_pixels.py")
        # Requests are prepared one by one, and batched before the model, which needs equal shapes.
        parameters = {"padding": recipe.ship.padding} if recipe.is_text else {}
        spec = ModelSpec(
            prepare,
            "python",
            Signature(inputs, signature.inputs),
            (batch,),
            dynamic_batching=False,
            instances=recipe.ship.instances,
            parameters=parameters,
        )
        (folder / "config.pbtxt").write_text(config_text(spec), encoding="utf-8")

    def write_ensemble(folder: Path) -> None:
        (folder / "1").mkdir()
        (folder / "1" / "README.txt").write_text("An ensemble has no model file.\n", encoding="utf-8")
        same = {tensor.name: tensor.name for tensor in signature.inputs}
        steps = (
            Step(prepare, {tensor.name: tensor.name for tensor in inputs}, same),
            Step(name, same, {tensor.name: tensor.name for tensor in signature.outputs}),
        )
        labelled = write_labels(folder, origin, signature)
        text = ensemble_text(whole, Signature(inputs, signature.outputs), steps, batch, labels=labelled)
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")

    return {prepare: write_prepare, whole: write_ensemble}
