"""Fixtures of the end-to-end tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.cli import main

Command = Callable[..., None]
Refusal = Callable[..., str]
ALONE = ("cluster.address=env", "sequence_parallel.size=1")
"""One rank in the command's own process."""


@pytest.fixture
def succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`harness.cli.succeed` in this process; for ALONE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))

    def command(*arguments: str) -> None:
        assert main(arguments) == 0

    return command


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
