"""The registry is the folder: a component's name is its module's name.

A kind is a dotted folder below `longtrain/` ("mixers", "objectives", "sequence_parallel.scan", "data.sources").
Each plug-in folder is laid out like the project itself: `<plugin>/mixers/toy.py` adds the mixer `toy`,
`<plugin>/conf/mixer/toy.yaml` its defaults. Modules whose name starts with an underscore are not components.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from longtrain.core.errors import Refused

_PACKAGE_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Registry:
    """Finds components in the project and in plug-in folders. Holds no state: modules are cached by Python."""

    plugins: tuple[Path, ...] = ()

    def names(self, kind: str) -> list[str]:
        """All component names of a kind, sorted."""
        folders = [root.joinpath(*kind.split(".")) for root in (_PACKAGE_ROOT, *self.plugins)]
        return sorted({f.stem for folder in folders for f in folder.glob("*.py") if not f.stem.startswith("_")})

    def load(self, kind: str, name: str, attributes: Sequence[str] = ()) -> ModuleType:
        """Import a component and check that it defines `attributes`.

        Raises Refused for an unknown name (with the nearest one), for a plug-in that hides another component or
        cannot be imported, and for a module that lacks an attribute of its kind's contract.
        """
        if name not in self.names(kind):
            raise Refused(f"{kind}: there is no '{name}'{did_you_mean(name, self.names(kind))}")
        relative = Path(*kind.split("."), f"{name}.py")
        found = [root / relative for root in self.plugins if (root / relative).is_file()]
        own = (_PACKAGE_ROOT / relative).is_file()
        if len(found) + own > 1:
            hidden = "a component of longtrain" if own else str(found[1])
            raise Refused(f"{found[0]} has the name of {hidden}; rename the file")
        plugin_name = f"longtrain_plugin_{kind.replace('.', '_')}_{name}"
        module = importlib.import_module(f"longtrain.{kind}.{name}") if own else _import_file(found[0], plugin_name)
        for attribute in attributes:
            if not hasattr(module, attribute):
                raise Refused(f"{module.__file__} defines no `{attribute}`, which every one of {kind} needs")
        return module


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else `; known: a, b, c`."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"


def _import_file(path: Path, module_name: str) -> ModuleType:
    cached = sys.modules.get(module_name)
    if cached is not None and cached.__file__ == str(path):
        return cached
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it is being executed
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise Refused(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
