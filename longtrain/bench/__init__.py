"""`longtrain bench NAME [key=value ...]`: measures this machine and what of ours, and of others, runs on it.

A benchmark is a module of this folder (its name does not start with an underscore). Its docstring's first line is its
summary; it defines `Config`, a frozen dataclass with defaults derived from `_report.Options`, and
`run(config: Config) -> int`, which returns the exit code.
"""

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from longtrain.config.load import load_config
from longtrain.config.overrides import parse_overrides, spell, string_keys
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry, did_you_mean

T = TypeVar("T")


def summaries() -> dict[str, str]:
    """Every benchmark's name and its one line, without importing it."""
    folder = Path(__file__).parent
    found = {}
    for name in Registry().names("bench"):
        docstring = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
        found[name] = docstring.partition("\n")[0]
    return found


def run_benchmark(name: str, overrides: Sequence[str]) -> int:
    """Run one benchmark and return its exit code. Raises Refused for an unknown name, key or value."""
    module = Registry().load("bench", name, ("Config", "run"))
    return module.run(parse_options(name, module.Config, overrides))


def parse_options(name: str, config_type: type[T], overrides: Sequence[str]) -> T:
    """The options of benchmark `name` from `key=value` words; those left out keep the defaults of `config_type`."""
    known = [field.name for field in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    tree = {}
    for override in parse_overrides(overrides):
        line, key = spell(override.input_line), override.key_or_group
        if override.is_delete() or override.is_add() or override.is_force_add() or override.package is not None:
            raise Refused(f"{line}: the options of `longtrain bench {name}` are set only; write key=value")
        if key not in known:
            raise Refused(f"{line}: `longtrain bench {name}` has no option '{key}'{did_you_mean(key, known)}")
        tree[key] = string_keys(override.value())
    return load_config(config_type, tree, Registry())
