"""Composes `conf/`, plug-in folders and a user's overrides into one plain tree, and says where each value came from.

Hydra composes the groups; `model.pattern` then decides which mixers are in the tree. A configuration is data: keys
that name code and interpolations that call a resolver are refused wherever they stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import OmegaConf

import longtrain_conf
from longtrain.config.overrides import (
    Tree,
    apply_override,
    flatten,
    one_line,
    parse_overrides,
    refuse_unsafe,
    spell,
    string_keys,
)
from longtrain.core.errors import Refused
from longtrain.core.registry import did_you_mean

COMMAND_LINE = "command line"

MIXER_SETTINGS = frozenset({"backend"})  # keys of `mixer` that all mixers share, and that no mixer can have as its name

_CONF = Path(longtrain_conf.__file__).parent
_ROOT = "longtrain_root"  # generated: the defaults of every mixer, then conf/train.yaml


@dataclass(frozen=True)
class Composed:
    """A composed configuration, not yet checked against types."""

    tree: Tree
    """Plain mappings, lists and scalars; interpolations resolved, lengths as they were spelled."""
    origins: dict[str, str]
    """Where each leaf's value was set, by dotted key: `conf/model/hybrid_tiny.yaml`, `command line`."""
    plugins: tuple[Path, ...]
    """Absolute plug-in folders."""
    choices: dict[str, str]
    """The option of each group: `{"model": "hybrid_tiny"}`."""


@dataclass(frozen=True)
class _Roots:
    """The folders that hold configuration groups, by the label that origins show."""

    folders: dict[str, Path]

    def is_group(self, key: str) -> bool:
        return any((folder / key).is_dir() for folder in self.folders.values())

    def options(self, group: str) -> list[str]:
        found = {
            str(file.relative_to(folder / group).with_suffix(""))
            for folder in self.folders.values()
            for file in (folder / group).rglob("*.yaml")
        }
        return sorted(found)

    def find(self, config: str) -> tuple[str, Path]:
        """Label and file of a config. Raises Refused if a plug-in hides another's file."""
        found = [
            (f"{label}/{config}.yaml", file)
            for label, folder in self.folders.items()
            if (file := folder / f"{config}.yaml").is_file()
        ]
        if len(found) > 1:
            raise Refused(f"{found[1][0]} has the name of {found[0][0]}; rename the file")
        return found[0]


def options_of(group: str) -> list[str]:
    """What `conf/` offers for a group, such as `model`."""
    return _Roots({"conf": _CONF}).options(group)


def compose(overrides: Sequence[str]) -> Composed:
    """Compose the configuration of one command.

    Raises Refused, in one line, for whatever the user or a YAML file got wrong.
    """
    parsed = parse_overrides(overrides)
    plugins = _plugin_folders(parsed)
    roots = _Roots({"conf": _CONF} | {f"{path}/conf": path / "conf" for path in plugins.values()})
    groups = [o for o in parsed if roots.is_group(o.key_or_group) and not isinstance(o.value(), dict)]
    for override in groups:
        _check_option(override, roots)
    tree, origins, choices = _compose_groups([str(o.input_line) for o in groups], roots)
    if tree.get("plugins"):
        raise Refused("plugins are given on the command line, as plugins=[FOLDER]; remove them from the YAML file")
    for override in parsed:
        if override in groups:
            continue
        if override.key_or_group in choices and override.key_or_group not in tree:
            _check_option(override, roots)  # a group that no folder offers
        record(origins, apply_override(tree, override), COMMAND_LINE)
    if plugins:
        tree["plugins"] = [str(path) for path in plugins.values()]
    tree = _resolve(_select_mixers(tree, parsed, origins, roots))
    return Composed(tree, {key: _origin(key, origins) for key in flatten(tree)}, tuple(plugins.values()), choices)


def _plugin_folders(parsed: Sequence[Override]) -> dict[str, Path]:
    """Absolute folders by the spelling on the command line; they must be known before anything is composed."""
    given = next((o for o in parsed if o.key_or_group == "plugins" and not o.is_delete()), None)
    if given is None:
        return {}
    value = given.value()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refused(f"{spell(given.input_line)}: expected a list of folders; write plugins=[FOLDER]")
    return plugin_folders(value)


def plugin_folders(given: Sequence[str]) -> dict[str, Path]:
    """The absolute folder of each. Raises Refused for one that is not there, or given twice."""
    folders = {item: Path(item).expanduser().absolute() for item in given}
    for item, folder in folders.items():
        if not folder.is_dir():
            raise Refused(f"plugins: {spell(item)} is not a folder; give one laid out like the project")
    if len(set(folders.values())) != len(given):
        raise Refused(f"plugins={spell(given)}: a folder is listed twice; list it once")
    return folders


def _check_option(override: Override, roots: _Roots) -> None:
    """Refuse a group override whose option does not exist, before Hydra says so in many lines."""
    group, line = override.key_or_group, spell(override.input_line)
    if group == "mixer" and override.package is None:
        raise Refused(f"{line}: mixers are chosen by the model's pattern; write model.pattern=[NAME x3, NAME]")
    if override.is_delete():
        return
    value = override.value()
    if value is None:
        raise Refused(f"{line}: a group needs an option; leave it out of the configuration with ~{group}")
    options = roots.options(group)
    for option in value if isinstance(value, list) else [value]:
        if option not in options:
            raise Refused(f"{line}: {group} has no option '{spell(option)}'{did_you_mean(str(option), options)}")


def _compose_groups(groups: list[str], roots: _Roots) -> tuple[Tree, dict[str, str], dict[str, str]]:
    """Let Hydra compose the chosen groups: the tree before resolution, the origin of each leaf, the choices.

    The defaults of every available mixer come first, so that a model or an experiment can change them.
    """
    conf, *plugin_confs = roots.folders.values()
    mixers = [name for name in roots.options("mixer") if name.isidentifier()]
    for name in MIXER_SETTINGS.intersection(mixers):
        label, _ = roots.find(f"mixer/{name}")
        raise Refused(f"{label}: mixer.{name} is a setting of all mixers, and no mixer's name; rename the file")
    defaults = [*({f"mixer@mixer.{name}": name} for name in mixers), "train", "_self_"]
    search = [f"file://{folder}" for folder in plugin_confs if folder.is_dir()]
    ConfigStore.instance().store(name=_ROOT, node={"defaults": defaults, "hydra": {"searchpath": search}})
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            composed = hydra_compose(_ROOT, groups, return_hydra_config=True)
            used = GlobalHydra.instance().config_loader().compute_defaults_list(_ROOT, groups, RunMode.RUN).defaults
        choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
        whole = OmegaConf.to_container(composed, resolve=False)
    except Exception as error:  # Hydra lets ValueError, AssertionError and YAML errors through, all about the input
        raise Refused(f"the configuration cannot be composed: {one_line(error)}") from None
    assert isinstance(whole, dict)
    origins: dict[str, str] = {}
    for default in used:
        config = str(default.config_path)
        if config == _ROOT or config.startswith("hydra/"):
            continue
        label, file = roots.find(config)
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        refuse_unsafe(content, label)
        values = {key: value for key, value in string_keys(content).items() if key != "defaults"}
        record(origins, flatten(values, f"{default.package}." if default.package else ""), label)
    return string_keys({key: value for key, value in whole.items() if key != "hydra"}), origins, choices


def record(origins: dict[str, str], leaves: Tree, label: str) -> None:
    """Note in place that `label` was the last to set `leaves`."""
    for key, value in leaves.items():
        below = [known for known in origins if known.startswith(f"{key}.")]
        if value == {} and below:
            continue  # merging an empty mapping changes nothing
        for known in [*below, *(known for known in origins if key.startswith(f"{known}."))]:
            del origins[known]
        origins[key] = label


def _origin(key: str, origins: dict[str, str]) -> str:
    """The origin of a leaf; below an interpolated mapping, that of the mapping."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key, COMMAND_LINE)


def _select_mixers(tree: Tree, parsed: Sequence[Override], origins: dict[str, str], roots: _Roots) -> Tree:
    """The tree with exactly the mixers that the pattern names, behind the model; refuses options of any other."""
    mixers, pattern = tree.get("mixer"), _pattern(tree)
    if not isinstance(mixers, dict) or pattern is None:
        return tree  # the type check names the section that is missing or malformed
    available = roots.options("mixer")
    named = list(dict.fromkeys(entry.split()[0] for entry in pattern if entry.split()))
    shown = f"model.pattern={spell(pattern)}"
    for name in named:
        if name not in available:
            raise Refused(f"{shown}: there is no mixer '{spell(name)}'{did_you_mean(name, available)}")
        if name not in mixers:
            raise Refused(f"{shown} needs the options of {name}; do not delete mixer.{name}")
    for override in parsed:
        section, _, rest = override.key_or_group.partition(".")
        value = override.value()
        below = [rest] if rest else list(value) if isinstance(value, dict) else []
        if section == "mixer" and not override.is_delete():
            for name in (str(key).partition(".")[0] for key in below):
                if name not in MIXER_SETTINGS and name not in named:
                    line = spell(override.input_line)
                    raise Refused(f"{line}: {shown} has no {spell(name)}; add it to the pattern or leave this out")
    for name in mixers:
        if name not in MIXER_SETTINGS and name not in available:
            where = _origin(next(iter(flatten({"mixer": {name: mixers[name]}}))), origins)
            raise Refused(f"mixer.{name} ({where}): there is no such mixer{did_you_mean(name, available)}")
    ordered: Tree = {}
    for key, value in tree.items():
        if key != "mixer":
            ordered[key] = value
        if key == "model":
            ordered["mixer"] = {k: v for k, v in mixers.items() if k in MIXER_SETTINGS} | {n: mixers[n] for n in named}
    return ordered


def _pattern(tree: Tree) -> list[str] | None:
    model = tree.get("model")
    if not isinstance(model, dict) or "pattern" not in model:
        return None
    pattern = _resolve(tree, "model.pattern")
    if not isinstance(pattern, list) or not all(isinstance(entry, str) for entry in pattern):
        raise Refused(f"model.pattern={spell(pattern)}: expected a list of mixers; write model.pattern=[NAME x3, NAME]")
    return pattern


def _resolve(tree: Tree, key: str | None = None) -> Any:
    """The tree, or the value of one key, with `${key}` interpolations replaced, as plain mappings and scalars."""
    try:
        node = OmegaConf.create(tree)
        if key is not None:
            node = OmegaConf.select(node, key)
            return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        resolved = OmegaConf.to_container(node, resolve=True)
    except Exception as error:  # OmegaConf lets RecursionError through
        raise Refused(f"the configuration cannot be resolved: {one_line(error)}") from None
    for leaf, value in flatten(string_keys(resolved)).items():
        for item in value if isinstance(value, list) else [value]:
            if item == "???":
                raise Refused(f"{leaf} has no value yet; give one with {leaf}=VALUE")
            if not isinstance(item, str | int | float | list | dict | None):
                raise Refused(f"{leaf}: {type(item).__name__} is not a number or text; write it as text in quotes")
    return string_keys(resolved)
