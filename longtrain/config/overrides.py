"""Reads the overrides of a command line with Hydra's grammar and applies them to a plain tree.

Hydra composes the groups; single values are set here, with the same meaning (`key=`, `+key=`, `++key=`, `~key`,
lists by index), because only this way can a mistake be answered with the nearest key instead of Hydra's paragraphs.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from longtrain.core.errors import Refused

Tree = dict[str, Any]

_PLAIN_INTERPOLATION = re.compile(r"\$\{\.*[A-Za-z_][\w.\-]*\}")
_RESERVED_KEY = re.compile(r"_\w+_")


def spell(value: Any) -> str:
    """A value as one short line for an error message: text that is not plain is quoted."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(spell, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{spell(k)}: {spell(v)}' for k, v in value.items())}}}"
    else:
        text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:100]}..."


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks, search paths and links."""
    text = re.split(r"\n\s*(?:Config search path|Search path|See https)", str(error))[0]
    if not text.strip() and error.__cause__ is not None:
        return one_line(error.__cause__)
    return spell(" ".join(text.split()).removesuffix(".") or type(error).__name__)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse with Hydra's grammar. Raises Refused for what is not an override, a sweep, a duplicate or Hydra's own."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    seen: dict[str, str] = {}
    for line in overrides:
        override = _parse_one(parser, line)
        key = override.get_key_element().lstrip("+")
        if key in seen:
            raise Refused(f"{spell(line)}: {key} was already set by {spell(seen[key])}; keep one of the two")
        seen[key] = line
        parsed.append(override)
    return parsed


def _parse_one(parser: OverridesParser, line: str) -> Override:
    if not line.startswith("~") and "=" not in line:
        raise Refused(f"{spell(line)}: an override is written key=value; add = and the value")
    key, _, path = line.partition("=")
    # Behind a key with dots a shell leaves ~ as it is, and Hydra's grammar has no word that begins with it.
    home = path.startswith("~/") and "'" not in path
    try:
        line.encode()
        override = parser.parse_override(f"{key}='{path}'" if home else line)
        value = None if override.is_sweep_override() else override.value()
    except Exception as error:  # Hydra's visitor lets ValueError, RecursionError and others through
        raise Refused(f"{spell(line)}: not an override ({one_line(error)}); put special characters in quotes") from None
    if override.is_sweep_override():
        raise Refused(f"{spell(line)}: one run has one value; write a list as key=[a,b], quote text with commas")
    key = override.key_or_group
    if not key:
        raise Refused(f"{spell(line)}: there is no key before =; write key=value")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise Refused(f"{spell(line)}: Hydra's own settings cannot be changed; leave it out")
    for part in key.split("."):
        refuse_reserved_key(part, spell(line))
    refuse_unsafe(value, spell(line))
    return override


def refuse_unsafe(value: Any, where: str) -> None:
    """Refuse instantiation keys and every interpolation but `${key}` in a value; `where` begins the message."""
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_reserved_key(key, where)
            refuse_unsafe(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_unsafe(item, where)
    elif isinstance(value, str) and "${" in _PLAIN_INTERPOLATION.sub("", value):
        raise Refused(f"{where}: {spell(value)} calls a resolver; write the value out, or a plain ${{key}}")


def refuse_reserved_key(key: Any, where: str) -> None:
    """Refuse `_target_`, `_partial_` and their like: a configuration is data and names no code."""
    if isinstance(key, str) and _RESERVED_KEY.fullmatch(key):
        raise Refused(f"{where}: {key} would run code; components are chosen by name, remove it")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key, in order. A list is one leaf, as is an empty mapping."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key that `key` probably means: the same last part elsewhere, else the most similar one."""
    keys = list(known)
    last = key.rpartition(".")[2]
    same = [k for k in keys if k.rpartition(".")[2] == last]
    if len(same) == 1:
        return same[0]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if near and difflib.SequenceMatcher(None, last, near[0].rpartition(".")[2]).ratio() >= 0.7:
        return near[0]
    by_last = {k.rpartition(".")[2]: k for k in reversed(keys)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[near[0]] if near else None


def apply_override(tree: Tree, override: Override) -> dict[str, Any]:
    """Apply one value override to `tree` in place and return the leaves that it set.

    Raises Refused for a key that does not exist (without `+`), that exists already (with `+`), or cannot be deleted.
    """
    line = spell(override.input_line)
    parts = override.key_or_group.split(".")
    value = override.value()
    if override.package is not None:
        raise Refused(f"{line}: there is no group '{override.key_or_group}'; to set a value write key=value without @")
    new_allowed = override.is_add() or override.is_force_add()
    node = _descend(tree, parts, new_allowed, line)
    exists = _has(node, parts[-1])
    if override.is_delete():
        if not exists:
            raise _unknown(tree, parts, line)
        if value is not None and value != _get(node, parts[-1]):
            raise Refused(f"{line}: the value is {spell(_get(node, parts[-1]))}; delete it with ~{'.'.join(parts)}")
        if isinstance(node, list):
            raise Refused(f"{line}: items of a list are not deleted; set the whole list, {'.'.join(parts[:-1])}=[...]")
        del node[parts[-1]]
        return {}
    if not exists and not new_allowed:
        raise _unknown(tree, parts, line)
    if exists and override.is_add() and not isinstance(value, dict | list):
        raise Refused(f"{line}: {'.'.join(parts)} exists; change it without the +")
    if isinstance(value, dict):
        value = string_keys(value)
        old = _get(node, parts[-1]) if exists else None
        if isinstance(old, dict):
            _merge(old, value, new_allowed, parts, line, tree)
            return flatten({".".join(parts): value}) if value else {}
    if isinstance(node, list):
        node[int(parts[-1])] = value
        return {".".join(parts[:-1]): node}
    node[parts[-1]] = value
    return flatten({".".join(parts): value})


def _descend(tree: Tree, parts: Sequence[str], create: bool, line: str) -> Any:
    node: Any = tree
    for part in parts[:-1]:
        if not _has(node, part):
            if not (create and isinstance(node, dict)):
                raise _unknown(tree, parts, line)
            node[part] = {}
        child = _get(node, part)
        if not isinstance(child, dict | list):
            if not (create and child is None and isinstance(node, dict)):
                raise _unknown(tree, parts, line)
            child = node[part] = {}
        node = child
    if isinstance(node, list) and not _has(node, parts[-1]):
        raise _unknown(tree, parts, line)
    return node


def _merge(old: Tree, new: Tree, create: bool, parts: list[str], line: str, tree: Tree) -> None:
    for key, value in new.items():
        if key not in old and not create:
            raise _unknown(tree, [*parts, key], line)
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value, create, [*parts, key], line, tree)
        else:
            old[key] = value


def _unknown(tree: Tree, parts: Sequence[str], line: str) -> Refused:
    key = ".".join(parts)
    leaves = [leaf.split(".") for leaf in flatten(tree)]
    known = {".".join(leaf[:depth]): None for leaf in leaves for depth in range(1, len(leaf) + 1)}
    near = nearest_key(key, known)
    remedy = f"did you mean '{near}'?" if near else "`longtrain config` lists the keys, +key=value adds one"
    return Refused(f"{line}: there is no key '{key}'; {remedy}")


def _has(node: Any, part: str) -> bool:
    if isinstance(node, list):
        return part.isdecimal() and int(part) < len(node)
    return part in node


def _get(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[part]


def string_keys(value: Any) -> Any:
    """A copy in which every mapping's keys are text, as they are in JSON."""
    if isinstance(value, dict):
        return {str(k): string_keys(v) for k, v in value.items()}
    return [string_keys(v) for v in value] if isinstance(value, list | tuple) else value
