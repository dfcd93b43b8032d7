"""Loads a composed tree into the typed dataclass of its root, and turns every mismatch into one line."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from longtrain.config.overrides import flatten, spell
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry, did_you_mean

T = TypeVar("T")

_UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}
_REMEDIES = {
    "bool_type": "write true or false",
    "float_type": "write a number such as 0.1",
    "string_type": "put it in quotes, twice on a shell: {key}='\"text\"'",
    "tuple_type": "write a list: {key}=[a,b]",
    "dict_type": "set its keys one by one: {key}.name=value",
    "dataclass_type": "set its keys one by one: {key}.name=value",
}


def load_config(cls: type[T], tree: Mapping[str, Any], registry: Registry) -> T:
    """Check `tree` (JSON-like) against the dataclass `cls` and build it; components are found through `registry`.

    Types are strict: only lengths are read from text such as `128k`. Raises Refused with one line, the dotted key
    first: `key=value: constraint; remedy`.
    """
    for key, value in flatten(tree).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise Refused(f"{key}={spell(value)}: must be finite; write a number such as 0.1")
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True, context=registry)
    except ValidationError as error:
        raise Refused(_describe(error, tree)) from None


def _describe(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """The most telling problem: an unknown key explains a missing one, and is named first."""
    found = error.errors(include_url=False)
    # A refused item is not counted, so that a list of it looks too short.
    parents = {d["loc"][:-1] for d in found}
    found = [d for d in found if d["type"] != "too_short" or d["loc"] not in parents]
    details = sorted(found, key=lambda d: (d["type"] not in _UNKNOWN, d["type"] == "missing"))
    more = len(details) - 1
    suffix = "" if more == 0 else f" (and {more} more problem{'s' if more > 1 else ''})"
    return _spell_problem(details[0], details, tree) + suffix


def _spell_problem(detail: ErrorDetails, details: Sequence[ErrorDetails], tree: Mapping[str, Any]) -> str:
    """One validation error as `key=value: constraint; remedy`."""
    location = _in_tree(detail["loc"], tree)
    key = spell(".".join(map(str, location))) or "configuration"
    kind = detail["type"]
    if kind == "missing" and isinstance(location[-1], int):
        key = ".".join(map(str, location[:-1]))
        return f"{key}={spell(detail['input'])}: has too few items; give {location[-1] + 1} or more"
    if kind == "missing":
        return f"{key} is missing; add it with +{key}=VALUE"
    if kind in _UNKNOWN:
        return f"{key}: unknown key{did_you_mean(str(location[-1]), _siblings(location, details, tree))}"
    if kind == "too_short":
        return f"{key}={spell(detail['input'])}: has too few items; give {detail['ctx']['min_length']} or more"
    value = detail["input"]
    shown = key if isinstance(value, dict) else f"{key}={spell(value)}"
    constraint = _constraint(detail)
    remedy = _remedy(detail, key)
    return f"{shown}: {constraint}{remedy}"


def _in_tree(location: Sequence[Any], tree: Mapping[str, Any]) -> Sequence[Any]:
    """Without the number of an item that stands for a list of its own."""
    if not location or not isinstance(location[-1], int):
        return location
    node: Any = tree
    for part in location[:-1]:
        node = node[part]
    return location if isinstance(node, list) else location[:-1]


def _siblings(location: Sequence[Any], details: Sequence[ErrorDetails], tree: Mapping[str, Any]) -> list[str]:
    """Keys that are understood beside an unknown one: those given and not refused, and those missing."""
    node: Any = tree
    for part in location[:-1]:
        node = node[part]
    parent = location[:-1]
    unknown = {d["loc"][-1] for d in details if d["type"] in _UNKNOWN and d["loc"][:-1] == parent}
    missing = {d["loc"][-1] for d in details if d["type"] == "missing" and d["loc"][:-1] == parent}
    return sorted(map(str, (set(node) - unknown) | missing))


def _constraint(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return " ".join(str(detail["ctx"]["error"]).split())
    message = detail["msg"].replace("Input should", "must").replace("String should", "must")
    return " ".join(message.split())


def _remedy(detail: ErrorDetails, key: str) -> str:
    kind, value = detail["type"], detail["input"]
    if kind in ("string_type", "literal_error") and isinstance(value, list):
        return f"; write one: {key}={spell(value[0]) if value else 'VALUE'}"
    if kind == "literal_error":
        near = did_you_mean(str(value), re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
        return near if "did you mean" in near else "; use one of them"
    if kind in ("int_type", "int_from_float"):
        whole = isinstance(value, float) and value.is_integer()
        return f"; write {key}={int(value)}" if whole else "; write a whole number such as 8"
    return f"; {_REMEDIES[kind].format(key=key)}" if kind in _REMEDIES else ""
