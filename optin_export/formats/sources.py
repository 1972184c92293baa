"""The Python file of a folder: the code of `runtime` with all that it calls, and what builds the model."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection
from typing import Any

from optin_export.formats import runtime
from optin_export.formats.changes import EQUIVALENTS
from optin_export.models.adapt import pass_position_bias, take_bias_of_heads
from optin_export.pruning import code_sizes
from optin_export.pruning.rebuild import Constant, Passthrough, set_size
from optin_export.units.outputs import map_tensors, tensors_in
from optin_export.units.selected_heads import BUFFER, HEADS, select_part, whole_arguments

_PARTS: tuple[Callable[..., Any], ...] = (
    *(Constant, Passthrough, set_size, map_tensors, tensors_in, select_part, whole_arguments),
    *(take_bias_of_heads, pass_position_bias),
)
_IMPORTS = """from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
{json}import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
{path}from typing import Any, NamedTuple

{timm}import torch
{transformers}from torch import nn
from torch.overrides import TorchFunctionMode
"""
_TRANSFORMERS = '''class {name}(transformers.{name}):
    """transformers' {name}, with the layers and sizes that the configuration records as `pruned`."""
{eager}
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        shrink(self, getattr(config, "pruned", {{}}), CLASSES)
'''
_EAGER = "\n    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False\n"
_TIMM = '''def load(folder=Path(__file__).parent):
    """The pruned model with its weights, in eval mode."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    given = {"pretrained_cfg": config["pretrained_cfg"], "pretrained_cfg_overlay": {}, **config["model_args"]}
    model = timm.create_model(config["architecture"], pretrained=False, **given)
    shrink(model, config["pruned"], CLASSES)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()
'''


def modeling_file(name: str, replaced: Collection[str] = (), eager: bool = False) -> str:
    """modeling_pruned.py: a class of transformers with the pruned sizes; it needs transformers and torch.

    It has the name of transformers' class, by which pipelines and losses choose what they do.
    replaced: names of `EQUIVALENTS` that it needs. eager: no other implementation of attention computes the same.
    """
    doc = f"A {name} of transformers, pruned: some of its layers are smaller than its configuration says."
    return _whole(
        doc,
        replaced,
        _TRANSFORMERS.format(name=name, eager=_EAGER if eager else ""),
        transformers="import transformers\n",
    )


def timm_file(replaced: Collection[str] = ()) -> str:
    """model.py: `load()` builds the pruned model with timm."""
    doc = "A model of timm, pruned: `load()` builds it and loads its weights."
    libraries = {"json": "import json\n", "path": "from pathlib import Path\n", "timm": "import timm\n"}
    return _whole(doc, replaced, _TIMM, **libraries, transformers="from safetensors.torch import load_file\n")


def _whole(doc: str, replaced: Collection[str], end: str, **libraries: str) -> str:
    imports = _IMPORTS.format(**{"json": "", "path": "", "timm": "", **libraries})
    parts = [inspect.getsource(part) for part in _PARTS]
    names = sorted(replaced)
    parts += [_body(inspect.getmodule(EQUIVALENTS[name])) for name in names]
    classes = "CLASSES = {" + ", ".join(f'"{name}": {name}' for name in names) + "}\n"
    body = [_body(code_sizes), f'BUFFER, HEADS = "{BUFFER}", {HEADS}\n', *parts, _body(runtime), classes, end]
    return f'"""{doc}"""\n\n{imports}\n\n' + "\n\n".join(body)


def _body(module: Any) -> str:
    """A module's source behind its imports."""
    source = inspect.getsource(module)
    tree = ast.parse(source)
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(source.splitlines()[last:]).strip() + "\n"
