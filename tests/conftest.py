"""Small random models and data, made once a session in a temporary folder; nothing is read from outside the clone."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exported_once import exported_once
from tests.shortly import measure_shortly
from tests.tiers import LEFT_OUT, UNTIL, mark_tiers, too_late

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers share the cores: each computes on one, as do the processes that its tests start. Several threads each would
# wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

ROOT = Path(__file__).parent.parent
WORDS = "a man is playing the guitar while two dogs run over green grass near some old red house by night"
# A shell starts what it puts into the background with SIGINT ignored, and processes that tests start inherit that.
with contextlib.suppress(ValueError):  # not in the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
VIT_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "num_classes": 5,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
}


def shared_folder() -> Path | None:
    """The folder of real data and weights, if this machine has it."""
    folder = Path(os.environ.get("OPTIN_EXPORT_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "data").is_dir() else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks, and xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_tiers(config, items)
    for item in items:
        # One worker takes all tests of a file, or of one model of the family tests: what they share is made once.
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{case if isinstance(case, str) else ''}"))
    if shared_folder() is None:
        skip = pytest.mark.skip(reason="no shared data: set OPTIN_EXPORT_SHARED to the folder that holds data/")
        for item in items:
            if "shared_data" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)  # before fixtures, which are most of the work
def pytest_runtest_setup(item: pytest.Item) -> None:
    if too_late((mark.name for mark in item.iter_markers()), os.environ.get(UNTIL), time.time()):
        pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many inputs the fuzzing made: a count that has shrunk would say nothing by itself."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [
        dict(getattr(report, "user_properties", ())) for report in reports if getattr(report, "when", "") == "teardown"
    ]
    told += [dict(report.user_properties) for report in reports if getattr(report, "when", "") == "call"]
    cases = sum(properties.get("fuzz_cases", 0) for properties in told)
    if cases:
        terminalreporter.write_line(f"{cases} fuzz cases")
    late = sum(LEFT_OUT in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if late:
        terminalreporter.write_line(f"{late} tests {LEFT_OUT}")


def enlarge(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights large enough that every unit matters: the libraries' initialisation leaves them near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif name.endswith(("bias", "class_embedding")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS.split(), generator.integers(3, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three small blocks with random weights and its tokenizer, as `from_pretrained` finds it."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS.split()))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    model = enlarge(transformers.BertForSequenceClassification(config))
    model.save_pretrained(folder)
    return folder


def two_tower_folder(folder: Path, kind: str) -> Path:
    """A tiny CLIP or SigLIP (`kind`) with its tokenizer and image processor, as `from_pretrained` finds it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[BOS]", *sorted(set(WORDS.split())), "[EOS]"]
    last = len(words) - 1
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "[BOS] $A [EOS]" if kind == "CLIP" else "$A [EOS]"
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("[BOS]", 2), ("[EOS]", last)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(
        folder
    )
    small = {"num_attention_heads": 4, "intermediate_size": 64}
    text = {**small, "hidden_size": 24, "num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 16}
    image = {**small, "hidden_size": 32, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text |= {"bos_token_id": 2, "eos_token_id": last} | ({} if kind == "CLIP" else {"projection_size": 32})
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=image)
    model = enlarge(getattr(transformers, f"{kind}Model")(config), 3)
    if kind == "Siglip":
        model.logit_scale.data.fill_(1.2)
        model.logit_bias.data.fill_(-0.7)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    processor = (
        transformers.CLIPImageProcessor(**sizes)
        if kind == "CLIP"
        else transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_tower_folder(tmp_path_factory.mktemp("clip"), "CLIP")


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_tower_folder(tmp_path_factory.mktemp("siglip"), "Siglip")


@pytest.fixture(scope="session")
def colour_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.npz: 60 random colour images of 32x32 with labels 0..4."""
    folder = tmp_path_factory.mktemp("colour")
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=generator.integers(0, 5, 60))
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.csv (no header: text, text, score 0..5) and classes.tsv (header: sentence, label 0..2)."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = zip(sentences(60, 1), sentences(60, 2), generator.uniform(0, 5, 60).round(2), strict=True)
        csv.writer(file).writerows(rows)
    lines = [f"{text}\t{label}" for text, label in zip(sentences(60, 3), generator.integers(0, 3, 60), strict=True)]
    (folder / "classes.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.npz: 80 random grey 32x32 images with labels 0..4."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 32, 32), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=generator.integers(0, 5, 80))
    return folder


@pytest.fixture(scope="session")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a timm ViT of three small blocks (arguments: VIT_ARGS)."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    model = enlarge(timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT_ARGS))
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_export_a_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See `tests.exported_once`; the workers of a session share what they exported."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)
    with exported_once(folder):
        yield


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size ("64k"), where this machine may."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        except OSError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("mounting a small file system is not allowed here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def measured_shortly() -> Iterator[None]:
    """For tests of what is measured, not of how precisely; a fixture of a whole module or session uses this itself."""
    with pytest.MonkeyPatch.context() as patch:
        measure_shortly(patch.setattr)
        yield


@pytest.fixture
def short_measurement() -> Iterator[None]:
    with measured_shortly():
        yield


@pytest.fixture(scope="session")
def vit_recipe(vit_checkpoint: Path, image_data: Path) -> Make:
    """A recipe for the small ViT as a dictionary; keyword arguments replace top-level sections."""

    def make(**sections: Any) -> dict[str, Any]:
        source = {"source": f"npz:{image_data / 'images.npz'}"}
        return {
            "recipe": 1,
            "name": "tiny-vit",
            "model": {
                "source": "timm:vit_tiny_patch16_224",
                "task": "image-classification",
                "weights": str(vit_checkpoint),
                "args": VIT_ARGS,
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
            },
            "data": {"calibration": {**source, "samples": 48}, "evaluation": {**source, "metric": "accuracy"}},
            "prune": {"budget": {"macs": 0.6}, "probes": 12, "rows": 64, "score_samples": 16},
            "tokens": {"keep": 1.0},  # random weights would lose too much without their tokens
            "export": {"batch": [1, 3]},
            **sections,
        }

    return make


@pytest.fixture(scope="session")
def finished_vit(vit_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `vit_recipe()`. Read it, or take a copy: `shutil.copytree`."""
    import optin_export

    folder = tmp_path_factory.mktemp("finished") / "run"
    with measured_shortly():
        optin_export.run(vit_recipe(), folder)
    return folder


@pytest.fixture(scope="session")
def bert_recipe(bert_folder: Path, text_data: Path) -> Make:
    """A recipe for the small BERT as a sentence encoder; keyword arguments replace top-level sections."""

    def make(**sections: Any) -> dict[str, Any]:
        source = f"csv:{text_data / 'pairs.csv'}"
        return {
            "recipe": 1,
            "name": "tiny-bert",
            "model": {"source": str(bert_folder), "task": "feature-extraction", "pooling": "mean"},
            "data": {
                "calibration": {"source": source, "columns": {"text": 0}, "samples": 48},
                "evaluation": {
                    "source": source,
                    "columns": {"text": 0, "text_pair": 1, "label": 2},
                    "metric": "spearman",
                },
            },
            "prune": {"budget": {"macs": 0.6}, "probes": 12, "rows": 64, "score_samples": 16},
            "export": {"batch": [1, 3], "sequence": 16},
            **sections,
        }

    return make


@pytest.fixture
def zero_shot_recipe(vit_recipe: Make, clip_folder: Path, colour_data: Path) -> Make:
    """The small CLIP on colour images; keyword arguments replace top-level sections."""

    def make(**sections: Any) -> dict[str, Any]:
        source = {"source": f"npz:{colour_data / 'images.npz'}"}
        task = "zero-shot-image-classification"
        model = {"source": str(clip_folder), "task": task, "classes": ["man", "dogs", "grass", "house", "guitar"]}
        data = {"calibration": {**source, "samples": 40}, "evaluation": {**source, "metric": "accuracy"}}
        return vit_recipe(**{"name": "tiny-clip", "model": model, "data": data, **sections})

    return make


@pytest.fixture(scope="session")
def classifier_recipe(bert_recipe: Make, bert_folder: Path, text_data: Path) -> Make:
    """The small BERT as a text classifier on a table with a header."""

    def make(**sections: Any) -> dict[str, Any]:
        source = {"source": f"tsv:{text_data / 'classes.tsv'}"}
        columns = {"text": "sentence", "label": "label"}
        data = {
            "calibration": {**source, "columns": {"text": "sentence"}, "samples": 48},
            "evaluation": {**source, "columns": columns, "metric": "accuracy"},
        }
        model = {"source": str(bert_folder), "task": "text-classification"}
        return bert_recipe(**{"name": "tiny-classifier", "model": model, "data": data, **sections})

    return make
