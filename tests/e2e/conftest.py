"""Fixtures of the end-to-end tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.cli import main

Refusal = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """`harness.cli.refuse` in this process, which has loaded what a new one takes seconds to load."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))

    def line_of(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    return line_of
