"""Place a model on a device, or its parts on several GPUs, in memory or on disk, while it is scored and repaired.

A whole model is moved, and its inputs follow it. Parts are placed by accelerate's hooks, which move inputs to the
device of a module, and fetch offloaded weights while the module runs. With offloaded weights, blocks are recomputed in
the backward pass: otherwise the graph would hold all weights.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from optin_export.errors import EnvironmentLacks, InputError, OptinError, missing_package
from optin_export.models.tasks import Inputs, TaskModel
from optin_export.models.work_device import working_on
from optin_export.workdir.files import Scratch

#: Relative difference between outputs here and on the devices that is float rounding.
ROUNDING = 1e-2
Places = dict[str, int | str]
_UNFIT = "model.device_map does not fit the model"


@dataclass(frozen=True)
class Placement:
    """Places a model as the recipe says, within `with placement(model):`.

    device_map, max_memory: as in the recipe; None: the whole model is on `device`. blocks: paths in the task model that
    are never divided. device: as in the recipe. The model itself is changed within the context, and restored
    afterwards.
    """

    device_map: str | Mapping[str, int | str] | None = None
    max_memory: Mapping[str, int | str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    device: str = "cpu"

    @contextlib.contextmanager
    def __call__(self, model: TaskModel) -> Iterator[None]:
        """Raises InputError for a map that does not fit the model, or a full disk; EnvironmentLacks without accelerate,
        for a GPU that does not exist, or one with too little memory."""
        if self.device_map is None:
            with self.also(model):
                yield
            return
        places = self.places(model)
        try:
            with _dispatched(model.model, places, self._inner()):
                yield
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(
                "the model does not fit on the devices of model.device_map",
                str(error).splitlines()[0][:200],
                "keep more of it on 'cpu' or 'disk' (model.max_memory), or lower prune.score_samples",
            ) from error

    @contextlib.contextmanager
    def also(self, model: TaskModel) -> Iterator[None]:
        """Move another, smaller model to `device`, where the placed one is; with a device map it stays on the CPU."""
        device = device_of(self.device) if self.device_map is None else torch.device("cpu")
        if device.type == "cpu" or next(iter(model.state_dict().values())).device == device:
            yield
            return
        try:
            with _moved(model, device):
                yield
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacks(
                f"there is too little memory on {device}",
                str(error).splitlines()[0][:200],
                "lower prune.score_samples, set model.device_map: auto, or model.device: cpu",
            ) from error

    def places(self, model: TaskModel) -> Places:
        """Module of the recipe's model -> GPU number, "cpu" or "disk"."""
        try:
            import accelerate  # noqa: F401
        except ImportError:
            raise missing_package("accelerate", "model.device_map", "large") from None
        if isinstance(self.device_map, str):
            places = self._inferred(model, self.device_map)
        else:
            assert self.device_map is not None
            places = {path: _number(place) for path, place in self.device_map.items()}
        self._check_map(model, places)
        return _spelt_out(model.model, places)

    def check(self, model: TaskModel, inputs: Inputs) -> None:
        """Run these rows with the placed model; raises what `with` raises, and InputError if the pass fails."""
        if self.device_map is None and device_of(self.device).type == "cpu":
            return
        if self.device_map is None:
            what, fix = f"the model does not compute on {device_of(self.device)}", "set model.device: cpu"
        else:
            what, fix = _UNFIT, "keep parts that belong together on one device, or remove model.device_map"
        with torch.no_grad():
            expected = model(**inputs)
            try:
                with self(model):
                    found = model(**inputs).cpu()
            except OptinError:
                raise
            except Exception as error:  # a model that reads a module's weights without calling it, for one
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                raise InputError(what, why[:300], fix) from error
        difference, scale = (float(one.abs().max()) for one in (found - expected, expected))
        if not difference <= ROUNDING * max(scale, 1e-12):
            raise InputError(what, f"its output differs by {difference:.1e} there", fix)

    def _inner(self) -> tuple[str, ...]:
        return tuple(path.removeprefix("model.") for path in self.blocks)

    def _inferred(self, model: TaskModel, name: str) -> Places:
        from accelerate.utils import get_balanced_memory, infer_auto_device_map

        _check_gpus({int(key) for key in self.max_memory if key.isdigit()})
        memory: Any = {int(key) if key.isdigit() else key: most for key, most in self.max_memory.items()} or None
        whole = sorted({type(model.model.get_submodule(path)).__name__ for path in self._inner()})
        try:
            if name != "sequential":
                low = name == "balanced_low_0"
                memory = get_balanced_memory(model.model, memory, no_split_module_classes=whole, low_zero=low)
            return dict(infer_auto_device_map(model.model, max_memory=memory, no_split_module_classes=whole))
        except (ValueError, TypeError, KeyError) as error:
            raise _wrong(str(error)[:300], "correct model.max_memory, such as {0: 20GiB, cpu: 60GiB}") from error

    def _check_map(self, model: TaskModel, places: Places) -> None:
        names = {name for name, _ in model.model.named_modules()} | set(model.model.state_dict())
        unknown = next((path for path in places if path not in names), None)
        if unknown is not None:
            first = ", ".join(name for name, _ in model.model.named_children())
            raise _wrong(f"the model has no '{unknown}'", f"name its modules: {first}, or parts of them")
        for block in self._inner():
            inside = {place for path, place in places.items() if path.startswith(f"{block}.")}
            if inside and len(inside | {_place_of(block, places)}) > 1:
                raise _wrong(f"'{block}' is a block and lies in several places", "keep each block in one place")
        bare = next((name for name in model.model.state_dict() if _place_of(name, places) is None), None)
        if bare is not None:
            raise _wrong(f"'{bare}' has no place", "name one for every part, or one for '' that holds for the rest")
        _check_gpus({place for place in places.values() if isinstance(place, int)})


def device_of(name: str) -> torch.device:
    """The device of `model.device`; auto: the first GPU if torch sees one, else the CPU.

    Raises EnvironmentLacks for a GPU that does not exist.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type != "cuda":
        return device
    number, present = device.index or 0, torch.cuda.device_count()
    if number >= present:
        raise EnvironmentLacks(
            f"model.device: {name} needs GPU {number}",
            f"torch sees {present} here",
            "set model.device: auto, which takes a GPU if there is one",
        )
    return torch.device("cuda", number)


@contextlib.contextmanager
def _moved(model: TaskModel, device: torch.device) -> Iterator[None]:
    forward = model.forward

    def there(**inputs: Any) -> torch.Tensor:
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        found: torch.Tensor = forward(**moved)
        return found

    vars(model)["forward"] = there
    try:
        model.to(device)
        with working_on(device):
            yield
    finally:
        vars(model).pop("forward", None)
        model.to("cpu")


def _check_gpus(wanted: set[int]) -> None:
    present = torch.cuda.device_count()
    if wanted and max(wanted) >= present:
        raise EnvironmentLacks(
            f"model.device_map needs GPU {max(wanted)}",
            f"torch sees {present} here",
            "name GPUs of this machine, or 'cpu' and 'disk'",
        )


def _wrong(why: str, fix: str) -> InputError:
    return InputError(_UNFIT, why, fix)


def _number(place: int | str) -> int | str:
    """A GPU by its number."""
    if isinstance(place, str) and place.startswith("cuda"):
        return int(place.partition(":")[2] or 0)
    return place


def _place_of(path: str, places: Places) -> int | str | None:
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places.get(path)


def _spelt_out(module: torch.nn.Module, places: Places) -> Places:
    """The same map without nested names: accelerate would first move the outer module to its own device."""
    state, found = module.state_dict().keys(), dict[str, int | str]()

    def walk(part: torch.nn.Module, path: str, above: int | str | None) -> None:
        place, start = places.get(path, above), f"{path}." if path else ""
        if path and place is not None and all(places[key] == place for key in places if key.startswith(start)):
            found[path] = place
            return
        for name in (f"{start}{name}" for name in (*part._parameters, *part._buffers)):
            if name in state:
                own = places.get(name, place)
                assert own is not None  # see _check_map
                found[name] = own
        for name, child in part.named_children():
            walk(child, f"{start}{name}", place)

    walk(module, "", None)
    return found


@contextlib.contextmanager
def _dispatched(module: torch.nn.Module, places: Places, blocks: tuple[str, ...]) -> Iterator[None]:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import find_tied_parameters, retie_parameters

    gpus = sorted(place for place in places.values() if isinstance(place, int))
    away = "disk" in places.values() or (bool(gpus) and "cpu" in places.values())
    tied, shadowed = find_tied_parameters(module), {part for part in module.modules() if "forward" in vars(part)}
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns about the requested placement
    scratch = Scratch() if "disk" in places.values() else None
    try:
        if scratch is not None:
            _check_disk(module, places, scratch)
        main: Any = torch.device(gpus[0]) if gpus else "cpu"
        folder = None if scratch is None else str(scratch.path / "weights")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that belong to no layer: they are where the model begins
            dispatch_model(module, places, main_device=main, offload_dir=folder, force_hooks=True)
        for path in blocks if away else ():
            block = module.get_submodule(path)
            vars(block)["forward"] = _recomputed(block.forward)
        yield
    finally:
        remove_hook_from_module(module, recurse=True)
        for part in set(module.modules()) - shadowed:
            vars(part).pop("forward", None)
        vars(module).pop("hf_device_map", None)
        module.to("cpu")
        retie_parameters(module, tied)
        if scratch is not None:
            scratch.close()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Run to the end each time: an interrupted hook would leave its weights on the device.
        with set_checkpoint_early_stop(False):
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call


def _check_disk(module: torch.nn.Module, places: Places, scratch: Scratch) -> None:
    """Check the disk first: writing memory-mapped files to a full disk ends the process."""
    state = module.state_dict().items()
    needed = sum(tensor.nbytes for name, tensor in state if _place_of(name, places) == "disk")
    free = shutil.disk_usage(scratch.path).free
    if needed > free:
        raise InputError(
            "there is no space for the weights that model.device_map keeps on disk",
            f"{needed >> 20} MiB are needed in {scratch.path.parent}, {free >> 20} MiB are free",
            "free disk space, set TMPDIR to another disk, or keep more on 'cpu'",
        )
