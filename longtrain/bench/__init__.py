"""`longtrain bench NAME [key=value ...]`: measures this machine and what of ours, and of others, runs on it.

A benchmark is a module of this folder (its name does not start with an underscore). Its docstring's first line is its
summary; it defines `Config`, a frozen dataclass with defaults derived from `_report.Options`,
`run(config: Config) -> int`, which returns the exit code, and `choices(registry: Registry) -> dict[str, list[str]]`,
which has the names that an option takes, for each that takes names. Underscores of its name are dashes on the command
line.
"""

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from longtrain.bench._help import describe
from longtrain.config.compose import plugin_folders
from longtrain.config.load import load_config
from longtrain.config.overrides import parse_overrides, spell, string_keys
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry, did_you_mean

T = TypeVar("T")


def summaries() -> dict[str, tuple[str, list[str]]]:
    """Every benchmark's name, its one line and the names of its options, without importing it."""
    folder = Path(__file__).parent
    common = _options(ast.parse((folder / "_report.py").read_text(encoding="utf-8")), "Options")
    found = {}
    for name in Registry().names("bench"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        found[name.replace("_", "-")] = summary, [*_options(tree, "Config"), *common]
    return found


def _options(tree: ast.Module, name: str) -> list[str]:
    """The fields of a dataclass in a module's source."""
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), [])
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def run_benchmark(name: str, overrides: Sequence[str]) -> int:
    """Run one benchmark and return its exit code. Raises Refused for an unknown name, key or value."""
    module = _benchmark(name)
    return module.run(parse_options(name, module.Config, overrides))


def help_text(name: str, overrides: Sequence[str]) -> str:
    """What each option of a benchmark takes; with the components of the `plugins` among `overrides`. Raises Refused."""
    module = _benchmark(name)
    config = parse_options(name, module.Config, overrides)
    registry = Registry(tuple(plugin_folders(getattr(config, "plugins", ())).values()))
    return describe(name, summaries()[name.replace("_", "-")][0], module.Config, module.choices(registry))


def _benchmark(name: str) -> ModuleType:
    return Registry().load("bench", name.replace("-", "_"), ("Config", "run", "choices"))


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
