"""`longtrain bench NAME --help`: every option, the values that it takes, and what it is where it is left out."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from longtrain.config.overrides import spell

_WIDTH = 100


def describe(name: str, summary: str, config_type: type, choices: Mapping[str, Sequence[str]]) -> str:
    """What `--help` prints; `choices` has, by option, the names from which it chooses."""
    schema = TypeAdapter(config_type).json_schema()
    parts = schema.get("$defs", {})
    meanings = _meanings(config_type)
    lines = [f"usage: longtrain bench {name} [KEY=VALUE ...]", "", summary, "", "options:"]
    for option in fields(config_type):
        values = _values(schema["properties"][option.name], parts, choices.get(option.name, ()))
        default = "" if option.default in (None, ()) else f"; default {spell(option.default)}"
        lines += _wrapped(f"{option.name}={values}{default}", "  ", "      ")
        lines += _wrapped(meanings.get(option.name, ""), "      ", "      ")
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _values(schema: Mapping[str, Any], parts: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """In words, from a JSON schema whose references name `parts`."""
    [schema] = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    schema = parts[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "description" in schema:
        return str(schema["description"])
    if names and schema.get("type") == "string":
        return " | ".join(names)
    if schema.get("type") == "array" or names:
        return f"{' | '.join(names) or _values(schema['items'], parts)}, one or a list"
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    kinds = {"boolean": "true | false", "integer": "a whole number", "number": "a number", "string": "a path"}
    bounds = {"minimum": "at least {:g}", "exclusiveMinimum": "above {:g}"}
    limits = [words.format(schema[key]) for key, words in bounds.items() if key in schema]
    return ", ".join([kinds.get(schema.get("type", ""), "text"), *limits])


def _meanings(config_type: type) -> dict[str, str]:
    """The text behind each field of a dataclass and of those that it derives from."""
    found = {}
    for owner in config_type.__mro__[:-1]:
        [body] = [node.body for node in ast.parse(inspect.getsource(owner)).body if isinstance(node, ast.ClassDef)]
        for field, behind in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match behind:
                    case ast.Expr(value=ast.Constant(value=str(words))):
                        # What a field says of None is about leaving its option out.
                        text = re.sub(r"(^|\. )None:", r"\1Left out:", " ".join(words.split()))
                        found[field.target.id] = text.replace("None:", "left out:")
    return found
