"""A component is a module and a YAML file of one name, and every default is in YAML."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtrain.cluster.config import JobConfig
from longtrain.core.registry import Registry
from tests.architecture.sources import CONF, ROOT, place

# Group of conf/ -> kind of component. The other groups configure one fixed dataclass.
GROUPS = {
    "cluster/failure_policy": "cluster.policies",
    "data": "data.sources",
    "mixer": "mixers",
    "objective": "objectives",
}
# (group, key) whose value names a component inside another group's YAML.
CHOICES = {
    ("sequence_parallel", "attend"): "sequence_parallel.attend",
    ("sequence_parallel", "scan"): "sequence_parallel.scan",
}
COMPOSED_BY_HYDRA = {"defaults", "experiment"}


def load(path: Path) -> dict[str, Any]:
    """What a YAML file sets in its own group, on top of the files of the group that its defaults list names."""
    text = path.read_text()
    tree = yaml.safe_load(text) or {}
    defaults = tree.pop("defaults", [])
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    groups = {key: value for entry in defaults if isinstance(entry, dict) for key, value in entry.items()}
    if "@package _global_" in text:
        tree = tree.get(path.parent.name, {})
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= load(path.with_name(f"{base}.yaml"))
    for group, option in groups.items():
        merged[group] = load(path.parent / group / f"{option}.yaml")
    return merged | tree


def group_files(group: str) -> list[Path]:
    """The options of a configuration group."""
    return sorted((CONF / group).glob("*.yaml"))


def differences(config: type, tree: dict[str, Any], where: str) -> list[str]:
    """Fields of a dataclass without a value in a YAML tree, values without a field, fields with a default in code."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    found = [f"{where}: no value for {name}" for name in fields.keys() - tree.keys()]
    found += [f"{where}: {name} is no field of {config.__name__}" for name in tree.keys() - fields.keys()]
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            found.append(f"{config.__module__}.{config.__name__}.{name} has a default; it belongs into {where}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(tree.get(name), dict):
            found += differences(typing.cast(type, hints[name]), tree[name], f"{where}: {name}")
    return found


@pytest.mark.parametrize(("group", "kind"), GROUPS.items())
def test_every_component_has_a_yaml_file_and_every_yaml_file_a_component(group: str, kind: str) -> None:
    components = set(Registry().names(kind))
    assert components, f"no component in longtrain/{kind.replace('.', '/')}"
    assert components - {path.stem for path in group_files(group)} == set()
    assert {load(path).get("name", path.stem) for path in group_files(group)} - components == set()


@pytest.mark.parametrize(("group", "key"), CHOICES)
def test_every_choice_in_yaml_is_a_component(group: str, key: str) -> None:
    chosen = [load(path)[key] for path in group_files(group)]
    names = {value["name"] if isinstance(value, dict) else value for value in chosen}
    assert names and names - set(Registry().names(CHOICES[group, key])) == set()


@pytest.mark.parametrize(("group", "kind"), GROUPS.items())
def test_yaml_of_a_component_has_every_field_of_its_config(group: str, kind: str) -> None:
    found = []
    for path in group_files(group):
        tree = load(path)
        config = Registry().load(kind, tree.get("name", path.stem), ("Config",)).Config
        found += differences(config, tree, place(path))
    assert not found


def test_yaml_of_the_rest_has_every_field_of_the_root() -> None:
    root = yaml.safe_load((CONF / "train.yaml").read_text())
    tree = {key: value for key, value in root.items() if key not in COMPOSED_BY_HYDRA}
    groups = {entry for default in root["defaults"] if isinstance(default, dict) for entry in default}
    hints = typing.get_type_hints(JobConfig)
    found = []
    for name in (groups | set(GROUPS)) & hints.keys():
        tree[name] = None  # a group's values are checked file by file, here and above
        if name not in GROUPS:
            for path in group_files(name):
                found += differences(hints[name], load(path), place(path))
    assert not found + differences(JobConfig, tree, "conf/train.yaml")


def test_no_yaml_file_is_outside_a_group_that_something_reads() -> None:
    known = {field.name for field in dataclasses.fields(JobConfig)} | {"experiment"}
    assert {path.relative_to(CONF).parts[0] for path in CONF.glob("*/**/*.yaml")} <= known
    assert [path.name for path in CONF.glob("*.yaml")] == ["train.yaml"]
    assert (ROOT / "conf" / "__init__.py").is_file()
