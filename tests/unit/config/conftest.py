"""A plug-in folder of toy components, and a faster `compose` for tests that only vary values."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.config import compose as compose_module

TOYS = Path(__file__).parent / "toys"


@pytest.fixture
def toys() -> list[str]:
    """Overrides under which every component is a toy."""
    return [f"plugins=['{TOYS}']", "experiment=toys"]


@pytest.fixture
def compose_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Hydra compose each choice of groups once: it takes a third of a second."""
    monkeypatch.setattr(compose_module, "_compose_groups", _once(compose_module._compose_groups))


@functools.cache
def _once(compose_groups: Callable) -> Callable:
    known: dict = {}

    def once(groups: list[str], roots: compose_module._Roots):
        key = (*groups, "|", *roots.folders)
        if key not in known:
            known[key] = compose_groups(groups, roots)
        return copy.deepcopy(known[key])

    return once
