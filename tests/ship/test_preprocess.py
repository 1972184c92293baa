"""What the server prepares is what the evaluation prepares: the same pixels, the same tokens."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import optin_export
from optin_export.data import Examples
from optin_export.data.batches import ImageProcessor, TextProcessor
from optin_export.errors import InputError
from optin_export.models.class_names import ClassNames
from optin_export.recipe import validate
from optin_export.ship.preprocess import check_served_image, write_preprocess
from tests.conftest import Make, sentences


@pytest.fixture
def served_image(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that runs in the server; the module it gets from there is not used by what is tested here."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    return importlib.import_module("optin_export.ship.served.image_model")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (32, 32), (20, 90), (33, 31)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("target", [(32, 32), (32, 48)])
@pytest.mark.parametrize(
    ("mode", "share", "how"),
    [
        ("center", 0.875, "bicubic"),
        ("center", 1.0, "lanczos"),
        ("squash", 1.0, "nearest"),
        ("squash", 0.9, "box"),
        ("border", 1.0, "bicubic"),
        ("border", 0.8, "hamming"),
    ],
)
def test_pixels_are_those_of_the_evaluation(
    served_image: Any,
    size: tuple[int, int],
    channels: int,
    target: tuple[int, int],
    mode: str,
    share: float,
    how: str,
) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
    config = {
        "input_size": (channels, *target),
        "interpolation": how,
        "crop_mode": mode,
        "crop_pct": share,
        "mean": (0.4, 0.5, 0.6)[:channels],
        "std": (0.2, 0.3, 0.4)[:channels],
    }
    check_served_image(config)
    expected = ImageProcessor(config).encode(Examples({"image": [image]}))["pixel_values"].numpy()[0]
    found = served_image.prepare(png(image), json.loads(json.dumps(config)))
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5


def test_an_image_of_too_many_pixels_is_not_decoded(served_image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_image, "MOST_PIXELS", 99)
    with pytest.raises(ValueError, match="too many"):
        served_image.prepare(png(Image.new("L", (10, 10))), {"input_size": [1, 8, 8]})


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_long_narrow_image_is_refused_before_it_is_resized(served_image: Any, size: tuple[int, int]) -> None:
    """Its shorter edge at 256 would make the longer one 15 million pixels."""
    config = {"input_size": [3, 224, 224], "mean": [0.5], "std": [0.5], "crop_pct": 0.875}
    data = png(Image.new("RGB", size))
    tracemalloc.start()
    with pytest.raises(ValueError, match="too long and narrow"):
        served_image.prepare(data, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "EPS"])
def test_other_formats_are_refused(served_image: Any, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, kind)
    with pytest.raises(OSError, match="cannot identify"):
        served_image.prepare(buffer.getvalue(), {"input_size": [3, 8, 8], "mean": [0.5], "std": [0.5]})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"crop_mode": "spiral"}, "crop_mode spiral is not known"),
        ({"interpolation": "random"}, "interpolation random is not known"),
        ({"refused": "nobody knows how"}, "nobody knows how"),
    ],
)
def test_preprocessing_that_the_server_does_not_do(served_image: Any, config: dict[str, Any], why: str) -> None:
    whole = {"input_size": (3, 32, 32), "mean": [0.5], "std": [0.5], "interpolation": "bilinear", **config}
    with pytest.raises(InputError, match=r"ship\.ensemble cannot preprocess") as caught:
        check_served_image(whole)
    assert why in caught.value.why
    with pytest.raises(ValueError, match=why):
        served_image.prepare(png(Image.new("RGB", (40, 40))), whole)


def test_the_server_needs_numpy_and_pillow_only(tmp_path: Path) -> None:
    """The two files of a model repository, in a Python that finds nothing else."""
    served = Path(optin_export.__file__).parent
    shutil.copyfile(served / "ship" / "served" / "image_model.py", tmp_path / "model.py")
    shutil.copyfile(served / "data" / "pixels.py", tmp_path / "image_pixels.py")
    (tmp_path / "image.png").write_bytes(png(Image.new("RGB", (40, 30), (255, 0, 0))))
    script = """
import importlib.util, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
spec = importlib.util.spec_from_file_location("model", "model.py")
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
config = {"input_size": [3, 8, 8], "mean": [0.0], "std": [1.0]}
print(model.prepare(open("image.png", "rb").read(), config).mean((1, 2)).tolist())
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "timm", "transformers", "optin_export"}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1.0, 0.0, 0.0]", "[]"]


@pytest.mark.parametrize("full", [False, True])
def test_tokens_are_those_of_the_evaluation(bert_folder: Path, bert_recipe: Make, tmp_path: Path, full: bool) -> None:
    import transformers
    from tokenizers import Tokenizer

    own = transformers.AutoTokenizer.from_pretrained(bert_folder)
    processor = TextProcessor(own, 16, pairs=False, full=full)
    write_preprocess(tmp_path, processor, ClassNames(), validate(bert_recipe(), tmp_path))
    texts = [*sentences(5), " ".join(sentences(6, 3))]
    expected = processor.encode(Examples({"text": texts}))
    encoded = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)
    assert np.array_equal([one.ids for one in encoded], expected["input_ids"].numpy())
    assert np.array_equal([one.attention_mask for one in encoded], expected["attention_mask"].numpy())
    # The tokenizer of the evaluation is not changed by it.
    assert np.array_equal(processor.encode(Examples({"text": texts}))["input_ids"], expected["input_ids"])


def test_labels_are_the_models_names_unless_they_are_numbers(classifier_recipe: Make, tmp_path: Path) -> None:
    recipe = validate(classifier_recipe(), tmp_path)

    write_preprocess(tmp_path / "a", None, ClassNames(("good", "bad\nnews")), recipe)  # type: ignore[arg-type]
    assert (tmp_path / "a" / "labels.txt").read_text() == "good\nbad news\n"
    write_preprocess(tmp_path / "b", None, ClassNames(("LABEL_0", "LABEL_1")), recipe)  # type: ignore[arg-type]
    assert not (tmp_path / "b" / "labels.txt").exists()
    write_preprocess(tmp_path / "a", None, ClassNames(), recipe)  # type: ignore[arg-type]
    assert not (tmp_path / "a" / "labels.txt").exists()  # of the model before


@pytest.fixture
def served_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that runs in the server, with as much of the module that it gets from there as it uses."""
    server: Any = types.ModuleType("triton_python_backend_utils")
    server.Tensor = lambda name, array: (name, array)
    server.InferenceResponse = lambda tensors: dict(tensors)
    server.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    sys.modules.pop("optin_export.ship.served.text_model", None)
    return importlib.import_module("optin_export.ship.served.text_model")


def answer_of(served: Any, folder: Path, texts: list[str], config: dict[str, Any]) -> Any:
    """What the file answers to one request of some texts. folder: holds its folder "1"."""
    model = served.TritonPythonModel()
    whole = {"input": [{"name": "TEXT"}], **config}
    model.initialize({"model_config": json.dumps(whole), "model_repository": str(folder), "model_version": "1"})
    column = np.array([[text.encode()] for text in texts], dtype=object)
    (answer,) = model.execute([{"TEXT": types.SimpleNamespace(as_numpy=lambda: column)}])
    return answer


def test_the_prompt_is_put_before_every_text_in_the_server(
    served_text: Any, bert_folder: Path, bert_recipe: Make, tmp_path: Path
) -> None:
    import transformers

    own, texts = transformers.AutoTokenizer.from_pretrained(bert_folder), sentences(5, 9)
    recipe = validate(bert_recipe(), tmp_path)
    # It ends with a blank, which has to stay; texts are cut before the longest sequence.
    for prompt, longest in (("old house: ", 9), ("", None)):
        processor = TextProcessor(own, 16, pairs=False, longest=longest, prompt=prompt)
        write_preprocess(tmp_path / "1", processor, ClassNames(), recipe)
        assert (tmp_path / "1" / "prompt.txt").is_file() == bool(prompt)
        outputs = [{"name": "input_ids", "dims": ["-1"]}, {"name": "attention_mask", "dims": ["-1"]}]
        answer = answer_of(served_text, tmp_path, texts, {"output": outputs})
        wanted = processor.encode(Examples({"text": texts}))
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(answer[name], tensor.numpy())


@pytest.mark.parametrize(
    ("masked", "fixed", "longest", "length"),
    [(True, "-1", None, 16), (True, "-1", 9, 9), (True, "16", 9, 16), (False, "-1", None, None)],
    ids=["to-the-sequence", "to-where-texts-are-cut", "to-a-fixed-graph", "no-mask"],
)
def test_texts_are_padded_so_that_requests_can_be_batched(
    served_text: Any,
    bert_folder: Path,
    bert_recipe: Make,
    tmp_path: Path,
    masked: bool,
    fixed: str,
    longest: int | None,
    length: int | None,
) -> None:
    import transformers

    own, texts = transformers.AutoTokenizer.from_pretrained(bert_folder), sentences(2, 9)
    processor = TextProcessor(own, 16, pairs=False, longest=longest, mask=masked)
    write_preprocess(tmp_path / "1", processor, ClassNames(), validate(bert_recipe(), tmp_path))
    outputs = [{"name": name, "dims": [fixed]} for name in ("input_ids", "attention_mask")[: 1 + masked]]
    config = {"output": outputs, "parameters": {"padding": {"string_value": "sequence"}}}
    answer = answer_of(served_text, tmp_path, texts, config)
    plain = processor.encode(Examples({"text": texts}))
    for name, tensor in plain.items():
        wanted = tensor.numpy()
        if length is not None:  # [PAD] is 0, and so is the mask there
            wanted = np.pad(wanted, ((0, 0), (0, length - wanted.shape[1])))
        np.testing.assert_array_equal(answer[name], wanted)
