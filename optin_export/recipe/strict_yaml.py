"""YAML to plain values, with limits: what a configuration file written by anybody may do to the reader is bounded."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: More than any configuration needs, and small enough for one call.
MAX_NODES, MAX_DEPTH = 20_000, 50
#: Longer numbers are no value of anything: they overflow whatever is computed from them.
MAX_DIGITS = 100
#: Whole numbers beyond this no library takes.
MAX_NUMBER = 2**63 - 1
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Plain:
    """A resolver's pattern that matches nothing with a colon in it."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern

    def match(self, text: str) -> Any:
        return None if ":" in text else self.pattern.match(text)


class _Loader(yaml.SafeLoader):
    """Refuses what YAML allows and a recipe must not hold: a key given twice, of which one would silently win, and
    aliases or nesting that a few lines can blow up without bound."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        waiting, seen = [(root, 1)] if root is not None else [], 0
        while waiting:
            node, depth = waiting.pop()
            seen += 1
            if seen > MAX_NODES or depth > MAX_DEPTH:
                problem = f"more than {MAX_NODES} values or {MAX_DEPTH} levels once its aliases are written out"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
                problem = f"a number of more than {MAX_DIGITS} characters"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            if isinstance(node, yaml.ScalarNode) and node.tag == _NUMBERS[0] and (why := _unclear(node.value)):
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
            children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                keys: set[Any] = set()
                for key, value in node.value:
                    if isinstance(key, yaml.ScalarNode) and key.value in keys:
                        problem = f"the key '{key.value}' is given twice"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    keys.add(key.value if isinstance(key, yaml.ScalarNode) else key)
                    children += [key, value]
            waiting += [(child, depth + 1) for child in children]
        return root


def _unclear(text: str) -> str | None:
    """Why a whole number may be meant as another one, if so."""
    if re.fullmatch(r"[-+]?0[0-7_]+", text):
        return f"{text} would be read in base 8: write it without the leading 0, or in quotes"
    try:
        number = int(text.replace("_", ""), 0)
    except ValueError:
        return None  # the loader says what is wrong with it
    return f"the number {text[:40]} is larger than {MAX_NUMBER}" if abs(number) > MAX_NUMBER else None


#: `1:30` is no number (PyYAML reads 90: YAML 1.1 counts in base 60): it stays text, as in YAML 1.2.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _Plain(pattern) if tag in _NUMBERS else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """YAML to values that share nothing, so that an override of one place leaves the others; raises yaml.YAMLError."""
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML raises many types: endless nesting, invalid dates and numbers
        raise yaml.YAMLError(f"a value cannot be read: {type(error).__name__}: {error}") from None


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
