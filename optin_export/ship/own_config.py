"""`ship.config`: the user's own part of config.pbtxt (queue limits, priorities, caches ...), merged into ours.

Triton's own protobuf checks names and types. A value replaces ours, a list replaces our whole list, and a section is
merged field by field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from optin_export.errors import InputError
from optin_export.ship.protobuf import protobuf

#: Fields that follow from the run, and what to change instead.
OURS = {
    "name": "use ship.name or --name",
    "platform": "it follows from ship.backend",
    "backend": "it follows from ship.backend",
    "runtime": "it follows from ship.backend",
    "max_batch_size": "it is the largest of export.batch, which was measured",
    "input": "they are those of the graph",
    "output": "they are those of the graph",
    "default_model_filename": "it is the measured file",
    "version_policy": "use ship.layout and ship.serve",
    "ensemble_scheduling": "use ship.ensemble",
    "model_warmup": "use ship.warm_up",
}
_FIX = "correct ship.config; the fields are those of Triton's model_config.proto"
Own = Mapping[str, Any] | str


def check_own(own: Own, most: int) -> None:
    """Check `ship.config` before a run. most: the largest batch; 0 if the server forms none. Raises InputError."""
    _, proto = protobuf()
    merge(proto.ModelConfig(max_batch_size=most), own)


def merge(config: Any, own: Own) -> None:
    """Merge a mapping, or protobuf text, into a ModelConfig in place.

    Raises InputError for unknown fields (with the nearest names), wrong values, fields that follow from the run, and
    what Triton would refuse when it loads the model.
    """
    overlay = parsed(own)
    _replace_lists(config, overlay)
    config.MergeFrom(overlay)
    _check_batcher(config)


def parsed(own: Own) -> Any:
    """A ModelConfig of the given fields alone. Raises InputError as `merge`."""
    from google.protobuf import json_format

    text_format, proto = protobuf()
    overlay = proto.ModelConfig()
    try:
        if isinstance(own, str):
            text_format.Parse(own, overlay)
        else:
            json_format.ParseDict(dict(own), overlay)
    except (text_format.ParseError, json_format.ParseError, TypeError, ValueError) as error:
        raise InputError("ship.config is not a part of a config.pbtxt", _readable(str(error), overlay), _FIX) from None
    for field, _ in overlay.ListFields():
        if field.name in OURS:
            raise InputError(f"ship.config cannot set {field.name}", OURS[field.name], f"leave {field.name} out")
    return overlay


def server_arguments(own: Own | None) -> tuple[str, ...]:
    """Flags of tritonserver without which the given fields have no effect."""
    if not own:
        return ()
    overlay = parsed(own)
    flags = []
    if overlay.response_cache.enable:
        flags.append("--cache-config=local,size=104857600")
    if any(group.HasField("rate_limiter") for group in overlay.instance_group):
        flags.append("--rate-limit=execution_count")
    return tuple(flags)


def _replace_lists(config: Any, overlay: Any) -> None:
    for field, value in overlay.ListFields():
        if field.is_repeated:
            if not _is_map(field):
                config.ClearField(field.name)
        elif field.message_type is not None and config.HasField(field.name):
            _replace_lists(getattr(config, field.name), value)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _check_batcher(config: Any) -> None:
    """What Triton refuses at loading, or what would have no effect."""
    batcher, most = config.dynamic_batching, config.max_batch_size
    if not config.HasField("dynamic_batching"):
        return
    if not most:
        raise InputError(
            "ship.config sets dynamic_batching",
            "with this backend the server forms no batches (max_batch_size 0)",
            "leave it out, or set ship.backend: python",
        )
    large = [size for size in batcher.preferred_batch_size if size > most]
    if large:
        raise InputError(
            f"ship.config prefers batches of {large[0]}",
            f"the largest measured batch is {most}",
            "prefer smaller ones, or add the size to export.batch and run again",
        )
    levels, usual = batcher.priority_levels, batcher.default_priority_level
    if levels and not 1 <= usual <= levels:
        raise InputError(
            f"ship.config has {levels} priority levels and the default level {usual}",
            "requests without a priority need one of these levels",
            f"set dynamic_batching.default_priority_level to 1..{levels}",
        )
    strange = [level for level in batcher.priority_queue_policy if not 1 <= level <= levels]
    if strange:
        raise InputError(
            f"ship.config has a queue policy for priority {strange[0]}",
            f"there are {levels} priority levels",
            "correct priority_queue_policy, or priority_levels",
        )


def _readable(problem: str, overlay: Any) -> str:
    """The parser's message, with the nearest field names for an unknown one."""
    found = re.search(r'type "([\w.]+)" has no field named "(\w+)"', problem)
    if found is None:
        return problem.splitlines()[0][:300]
    kind, name = found.groups()
    known = _fields_of(overlay.DESCRIPTOR, kind, set())
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}"
    return f"{kind.rpartition('.')[2]} has no field '{name}': {hint}"


def _fields_of(descriptor: Any, kind: str, seen: set[str]) -> list[str]:
    """Names of the fields of the message type `kind`, found below `descriptor`."""
    if descriptor.full_name == kind:
        return [field.name for field in descriptor.fields]
    seen.add(descriptor.full_name)
    for field in descriptor.fields:
        below = field.message_type
        if below is not None and below.full_name not in seen and (names := _fields_of(below, kind, seen)):
            return names
    return []
