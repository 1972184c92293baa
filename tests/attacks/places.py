"""Every file that a command reads, with the commands that read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """kind: what the attempts on it are counted as. of: the folder that is copied (see `folders` in conftest.py), with
    name: the file in it. commands: words, of which IN, RUN, TO and NEW are paths. spared: the command may do without
    the file, or name it as its answer, as long as it does no harm."""

    kind: str
    of: str
    name: str
    commands: tuple[str, ...]
    spared: bool = False

    def __str__(self) -> str:
        return f"{self.of}/{self.name}"


def _inputs(kind: str, recipe: str, *names: str, spared: bool = False) -> list[Place]:
    commands = (f"IN/{recipe}.yaml --dry-run", f"IN/{recipe}.yaml --out NEW --stop-after sources --quiet")
    return [Place(kind, "inputs", name, commands, spared) for name in names]


_SHIP, _MEASURE = "ship RUN --to TO", "measure RUN --quiet --machine here"
_AGAIN = "ship RUN --to IN/models --replace --set ship.instances=2"

PLACES = [
    Place("recipes", "inputs", "npz.yaml", ("IN/npz.yaml --dry-run", "doctor IN/npz.yaml", "IN/npz.yaml --out NEW")),
    Place("gates", "inputs", "gates.yaml", ("check RUN --gates IN/gates.yaml",)),
    Place(
        "tables of perf_analyzer",
        "inputs",
        "a.csv",
        ("client 127.0.0.1:9 --model a --model b --run RUN --import-perf-analyzer IN/a.csv IN/a.csv",),
    ),
    Place("reference rows", "inputs", "vit.safetensors", ("client 127.0.0.1:9 --model a --model b --reference FILE",)),
    *_inputs("data", "npz", "images.npz"),
    *_inputs("data", "csv", "pairs.csv"),
    *_inputs("data", "tsv", "classes.tsv"),
    *_inputs("data", "images", "images/1/4.png", spared=True),  # a folder of any name may lie among images
    *_inputs("data", "images", "images"),
    *_inputs("data", "clip", "classes.txt"),
    *_inputs("checkpoints", "npz", "vit.safetensors"),
    *_inputs("checkpoints", "pt", "vit.pt"),
    *_inputs("python files", "python", "model.py", "rows.py"),
    *_inputs("model folders", "csv", "bert/config.json", "bert/model.safetensors", "bert/tokenizer.json", "bert"),
    *_inputs("model folders", "csv", "bert/tokenizer_config.json", spared=True),
    *_inputs("model folders", "tsv", "classifier/config.json", "classifier/model.safetensors"),
    *_inputs("model folders", "sentence", "sentence/modules.json", "sentence/1_Pooling/config.json"),
    *_inputs("model folders", "sentence", "sentence/sentence_bert_config.json", spared=True),
    *_inputs("model folders", "clip", "clip/config.json", "clip/model.safetensors", "clip/preprocessor_config.json"),
    *(
        Place("finished runs", "run", name, commands)
        for name, commands in {
            "recipe.yaml": (_SHIP,),
            "report.json": ("check RUN", _SHIP, _MEASURE, "compare RUN RUN --out IN/x.html"),
            "manifest.json": ("verify RUN", "check RUN", _SHIP),
            "measure/parity.json": (_SHIP, "check RUN"),
            "measure/latency.json": (_SHIP,),
            "measure/reference.safetensors": (_SHIP, _MEASURE),
            "onnx/pruned.onnx": (_SHIP, _MEASURE),
            "onnx": (_SHIP, _MEASURE),
            "measure": (_SHIP, _MEASURE),
        }.items()
    ),
    *(
        Place("verify", "run", name, ("verify RUN",), spared=True)
        for name in ("scores/scores.safetensors", "plan/plan.json", "report.html", "new", "onnx/.new", "recipe.yaml")
    ),
    *(
        Place("repositories", "models", f"models/tiny/{name}", ("verify IN/models", _AGAIN, "rollback IN/models tiny"))
        for name in ("config.pbtxt", "1/model.onnx", "manifest.json", "1")
    ),
    *(
        Place("repositories", "models", f".models.optin-export/{name}", ("rollback IN/models tiny", _AGAIN))
        for name in ("lock", "previous", "previous/tiny", "previous/tiny/manifest.json")
    ),
    *(
        Place("resumed runs", "half", f"run/{name}", ("IN/recipe.yaml --out IN/run --stop-after surgery --quiet",))
        for name in (
            "recipe.yaml",
            "plan/plan.json",
            "plan",
            "model/architecture.json",
            "model/model.safetensors",
            "scores/scores.safetensors",
            "scores/curves.safetensors",
            ".stages/scoring.json",
            ".stages/search.json",
            ".stages/seconds.json",
            ".stages/lock",
            ".stages",
        )
    ),
]
#: What a resumed run finds damaged it makes again; a repository that was changed is told, replaced or put back.
DONE_WITHOUT = ("resumed runs", "repositories")
