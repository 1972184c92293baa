"""Semantic segmentation: from images and label maps to engines, the metric, and what is wrong with the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import optin_export
from optin_export import engines
from optin_export.data import LabelMaps, load_sources
from optin_export.data.readers import load_examples
from optin_export.errors import InputError
from optin_export.export import export_onnx
from optin_export.export.sampling import sample
from optin_export.measure.metrics import METRICS
from optin_export.models import IGNORED, wrap
from optin_export.models.tasks import SegmentationModel
from optin_export.recipe import Target, validate
from optin_export.recipe.schema import Evaluation
from optin_export.units import find_structure, get_module
from tests.conftest import Make, enlarge
from tests.units.models import inputs_for, small_model

SIZE, CLASSES = (40, 48), 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/part/*.png (RGB, 40 x 48) and maps/part/*.png (classes 0..4, some pixels 255), also as scenes.npz."""
    folder, generator = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    images = generator.integers(0, 256, (24, *SIZE, 3), dtype=np.uint8)
    maps = generator.integers(0, CLASSES, (24, *SIZE), dtype=np.uint8)
    maps[:, :3] = 255
    for name, arrays in (("images", images), ("maps", maps)):
        (folder / name / "part").mkdir(parents=True)
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(folder / name / "part" / f"{index:02d}.png")
    np.savez(folder / "scenes.npz", images=images, labels=maps)
    return folder


@pytest.fixture(scope="module")
def segformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SegFormer with its image processor."""
    import transformers

    from tests.units.models_segmentation import SEGFORMER

    folder = tmp_path_factory.mktemp("segformer")
    config = transformers.SegformerConfig(**{**SEGFORMER, "num_channels": 3}, num_labels=CLASSES)
    enlarge(transformers.SegformerForSemanticSegmentation(config)).save_pretrained(folder)
    processor = {
        "image_processor_type": "SegformerImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def segmentation_recipe(segformer_folder: Path, scenes: Path) -> Make:
    def make(**sections: Any) -> dict[str, Any]:
        source = {"source": f"images:{scenes / 'images'}"}
        evaluation = {**source, "label_folder": str(scenes / "maps"), "metric": "mean_iou"}
        return {
            "recipe": 1,
            "name": "tiny-segformer",
            "model": {"source": str(segformer_folder), "task": "image-segmentation"},
            "data": {"calibration": source, "evaluation": evaluation},
            "prune": {"budget": {"macs": 0.8}, "probes": 8, "rows": 64, "score_samples": 8, "curve_samples": 8},
            "export": {"batch": [1, 3]},
            **sections,
        }

    return make


@pytest.mark.usefixtures("short_measurement")
def test_a_run_from_scenes_to_a_served_model(tmp_path: Path, segmentation_recipe: Make) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tritonclient")
    recipe = segmentation_recipe(gates={"accuracy_drop": 100.0, "speedup": 0.01}, ship={"triton": True})
    report = optin_export.run(recipe, out=tmp_path / "run")
    assert report is not None and report.verdict.passed
    assert report.macs.ratio <= 0.8
    assert report.accuracy is not None and report.accuracy.metric == "mean_iou" and report.accuracy.rows == 24
    assert 0 < report.accuracy.base < 100
    assert len(report.parity.cases) == 8
    config = (tmp_path / "run" / "triton" / "tiny-segformer" / "config.pbtxt").read_text()
    assert (
        config.split("output {")[1].split("}")[0].count("dims") == 3
    )  # classes and two dimensions of pixels, besides the batch
    # The engine's accuracy is the torch model's.
    sources = load_sources(validate(recipe, Path.cwd()))
    dataset = sources.evaluation()
    assert dataset is not None
    points = optin_export.measure.accuracy_of(optin_export.models.as_function(sources.model), dataset)
    assert points == pytest.approx(report.accuracy.base, abs=0.1)


def test_the_size_and_statistics_are_the_image_processors_own(segmentation_recipe: Make) -> None:
    sources = load_sources(validate(segmentation_recipe(), Path.cwd()))
    pixels = sources.fixed(2)["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    image = np.asarray(Image.open(sources.calibration_examples.columns["image"][0]), dtype=np.float32) / 255
    mean = (image.mean((0, 1)) - np.array([0.4, 0.5, 0.6])) / 0.25
    # The whole image is shrunk, nothing is cut off.
    np.testing.assert_allclose(pixels[0].mean((1, 2)).numpy(), mean, atol=0.05)
    assert sources.classes == CLASSES


def test_maps_of_a_folder_are_those_of_an_array(scenes: Path) -> None:
    fields = {"metric": "mean_iou", "source": f"images:{scenes / 'images'}", "label_folder": str(scenes / "maps")}
    folder = load_examples(Evaluation.model_validate(fields), ("image", "label"), 0)
    arrays = load_examples(
        Evaluation.model_validate({"metric": "mean_iou", "source": f"npz:{scenes / 'scenes.npz'}"}),
        ("image", "label"),
        0,
    )
    read, given = (LabelMaps(one.columns["label"], 255) for one in (folder, arrays))
    assert len(read) == len(given) == 24
    for one, other in zip(read, given, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (read[3][:3] == IGNORED).all() and read[3][3:].min() == 0


def test_mean_iou_is_that_of_the_definition() -> None:
    generator = np.random.default_rng(1)
    outputs = generator.normal(size=(3, 4, 5, 6)).astype(np.float32)
    labels = [generator.integers(0, 3, (10, 12)) for _ in range(3)]
    for label in labels:
        label[:2] = IGNORED
    metric = METRICS["mean_iou"]
    points = metric.value(metric.statistic(outputs, labels, {}))
    scaled = F.interpolate(torch.from_numpy(outputs), (10, 12), mode="bilinear", align_corners=False).argmax(1).numpy()
    wanted = np.stack(labels)
    counted = wanted != IGNORED
    ious = []
    for one in range(4):  # class 3 is never a label, but is predicted: it counts, as 0
        both = (scaled == one) & (wanted == one) & counted
        either = ((scaled == one) | (wanted == one)) & counted
        ious.append(both.sum() / either.sum())
    assert ious[3] == 0
    assert points == pytest.approx(100 * np.mean(ious))
    perfect = np.eye(4, dtype=np.float32)[labels[0].clip(0)].transpose(2, 0, 1)[None]
    assert metric.value(metric.statistic(perfect, labels[:1], {})) == 100.0
    with pytest.raises(InputError, match="not defined"):
        metric.value(metric.statistic(outputs[:1], [np.full((4, 4), IGNORED)], {}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda evaluation: evaluation.pop("label_folder"), "is not a label map"),
        (lambda evaluation: evaluation.update(ignore=4), "holds class 255"),
        (lambda evaluation: evaluation.update(label_folder="missing"), "no label map for"),
        (lambda evaluation: evaluation.update(metric="accuracy"), "mean_iou"),
    ],
)
def test_unusable_labels_are_refused(
    change: Callable[[dict[str, Any]], Any], expected: str, segmentation_recipe: Make
) -> None:
    recipe = segmentation_recipe()
    change(recipe["data"]["evaluation"])
    with pytest.raises(InputError) as caught:
        load_sources(validate(recipe, Path.cwd()))
    assert expected in str(caught.value)


def test_damaged_and_coloured_label_maps_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for value, expected in ((tmp_path / "broken.png", "cannot read"), (np.zeros((4, 4, 3), np.uint8), "not a label")):
        with pytest.raises(InputError, match=expected):
            LabelMaps([value], 255)[0]
    with pytest.raises(InputError, match="holds -1"):
        LabelMaps([np.full((2, 2), -1)], 255)[0]


def test_mask2former_puts_out_its_own_semantic_scores() -> None:
    """The largest class at every pixel is that of transformers' post-processing at the masks' resolution."""
    model = small_model("mask2former")[0]
    inputs = inputs_for(model, 3, 0)
    with torch.no_grad():
        got, raw = model(**inputs), model.model(**inputs)
        classes = raw.class_queries_logits.softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", classes, raw.masks_queries_logits.sigmoid())
    assert isinstance(model, SegmentationModel) and got.shape == scores.shape
    torch.testing.assert_close(got, scores.log(), atol=1e-5, rtol=1e-5)


class _Queries(torch.nn.Module):
    """Mask2Former's output with masks and classes from sure to hopeless, out of one layer."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.masks, self.classes = torch.nn.Conv2d(3, queries, 1), torch.nn.Linear(3, queries * (CLASSES + 1))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        classes = self.classes(pixel_values.mean((2, 3))).unflatten(1, (self.queries, CLASSES + 1))
        return _Output(masks_queries_logits=20 * self.masks(pixel_values), class_queries_logits=3 * classes)


class _Output(dict[str, torch.Tensor]):
    @property
    def class_queries_logits(self) -> torch.Tensor:
        return self["class_queries_logits"]


def test_shares_of_hopeless_masks_are_the_same_in_an_engine(tmp_path: Path) -> None:
    """Their logarithms count: onnxruntime's Sigmoid is off by some per cent of what is nearly nothing."""
    torch.manual_seed(0)
    model = SegmentationModel(_Queries(2)).eval().requires_grad_(False)
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16)}
    export_onnx(model, inputs, tmp_path / "model.onnx", max_batch=4, sequence=None)
    target = Target(engine="onnxruntime", device="cpu", threads=1)
    engines.build(tmp_path / "model.onnx", target, tmp_path / "engine")
    engine = engines.load(tmp_path / "engine", target)
    expected = model(**inputs)
    assert expected.min() < -10
    found = engine.run({name: tensor.numpy() for name, tensor in inputs.items()})[engine.outputs[0]]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=1e-5)


def test_models_that_put_out_a_dictionary_or_a_tensor() -> None:
    class Plain(torch.nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            self.layer, self.named = torch.nn.Conv2d(3, 5, 1), named

        def forward(self, x: torch.Tensor) -> Any:
            return {"out": self.layer(x), "aux": x} if self.named else self.layer(x)

    x = torch.randn(2, 3, 4, 4)
    for named in (True, False):
        assert SegmentationModel(Plain(named))(x).shape == (2, 5, 4, 4)


@pytest.mark.parametrize("align_corners", [False, True])
def test_sampling_by_gather_is_grid_sample(align_corners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    image, grid = torch.randn(3, 5, 7, 9, generator=generator), 1.5 * torch.randn(3, 4, 6, 2, generator=generator)
    expected = F.grid_sample(image, grid, align_corners=align_corners)
    torch.testing.assert_close(sample(image, grid, align_corners=align_corners), expected, atol=1e-5, rtol=1e-5)


def test_a_sampling_that_gathers_do_not_know_is_refused() -> None:
    image, grid = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 2, 2)
    for options in ({"mode": "nearest"}, {"padding_mode": "border"}):
        with pytest.raises(NotImplementedError, match=next(iter(options.values()))):
            sample(image, grid, **options)


def test_no_grid_sample_reaches_an_engine(tmp_path: Path) -> None:
    import onnx

    class Sampled(torch.nn.Module):
        """What Mask2Former does to its feature maps; its whole graph is looked at in the family tests."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            grid = images[:, 0, :, :, None].expand(-1, -1, -1, 2).tanh()
            return F.grid_sample(images, grid, align_corners=False).mean((2, 3))

    model, before = wrap(Sampled(), "image-classification"), F.grid_sample
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    export_onnx(model, inputs, tmp_path / "model.onnx", max_batch=4, sequence=None)
    assert F.grid_sample is before
    assert "GridSample" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


@pytest.mark.parametrize("name", ["swin", "swin-padded", "swin-transformers", "mask2former"])
def test_windows_are_those_that_the_attention_puts_out(name: str) -> None:
    """The block undoes the arrangement of the stream: as its attention's output it doubles the stream, row for row."""
    model = small_model(name)[0]
    structure = find_structure(model)
    inputs = inputs_for(model, 2, 0)
    groups = [group for group in structure.groups if group.arrange is not None]
    assert len(groups) >= 3
    for group in groups:
        assert group.residual is not None and group.residual[1] == "call" and group.arrange is not None
        block = get_module(model, group.residual[0])
        calls: list[Any] = []
        hook = block.register_forward_pre_hook(
            lambda _, args, kwargs, to=calls: to.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        stream = calls[0][0][0]
        windows = group.arrange(model, calls[0])
        assert windows.dim() == 3 and windows.shape[-1] == stream.shape[-1]
        attention = get_module(model, group.consumer.rpartition(".")[0])
        after: list[torch.Tensor] = []
        norm = block.norm2 if hasattr(block, "norm2") else block.layernorm_after
        output = (windows, None) if group.returns_tuple else windows
        attention.forward = lambda *args, to=output, **kwargs: to
        hook = norm.register_forward_pre_hook(lambda _, args, to=after: to.append(args[0]))
        with torch.no_grad():
            block(*calls[0][0], **calls[0][1])
        hook.remove()
        del attention.forward
        torch.testing.assert_close(after[0].reshape(stream.shape), 2 * stream)
