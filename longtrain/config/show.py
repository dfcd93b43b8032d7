"""Prints a resolved configuration as YAML, with the origin of each value beside it."""

import json
import re
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*( x[1-9]\d*)?", re.ASCII)
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def to_yaml(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> str:
    """Block YAML with lists in one line; with `origins` (by dotted key) as aligned trailing comments.

    Every YAML 1.1 and 1.2 reader gives the tree back.
    """
    rows = _rows(tree, "", "")
    if origins is None:
        return "".join(f"{text}\n" for text, _ in rows)
    width = max((len(text) for text, key in rows if key is not None and len(text) <= 60), default=0)
    return "".join(f"{text}\n" if key is None else f"{text:<{width}}  # {origins[key]}\n" for text, key in rows)


def _rows(tree: Mapping[str, Any], indent: str, prefix: str) -> list[tuple[str, str | None]]:
    """Lines, each with the dotted key of the leaf that it shows, or None for a section."""
    rows: list[tuple[str, str | None]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows.append((f"{indent}{_scalar(key)}:", None))
            rows += _rows(value, f"{indent}  ", f"{prefix}{key}.")
        else:
            rows.append((f"{indent}{_scalar(key)}: {_inline(value)}", f"{prefix}{key}"))
    return rows


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return _scalar(value)


def _character(char: str) -> str:
    """One character of double-quoted YAML text."""
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() else f"\\U{ord(char):08x}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        length = re.fullmatch(r"[1-9]\d*[kKMG]", value, re.ASCII)
        plain = length or (_PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT)
        return value if plain else f'"{"".join(map(_character, value))}"'
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 1e-08 as text; a number there has a point.
        return re.sub(r"^(-?\d+)e", r"\1.0e", text) if "e" in text else text
    return json.dumps(value)
