"""The command line as a user runs it: a process of its own in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SMALL = (
    "model.width=32",
    "model.num_layers=3",
    "model.pattern=[simple_gla, softmax, sliding_window]",
    "model.mlp_width=64",
    "mixer.simple_gla.num_heads=2",
    "mixer.simple_gla.key_dim=8",
    "mixer.simple_gla.value_dim=8",
    "mixer.softmax.num_heads=2",
    "mixer.softmax.num_key_value_heads=1",
    "mixer.softmax.head_dim=8",
    "mixer.sliding_window.num_heads=2",
    "mixer.sliding_window.num_key_value_heads=1",
    "mixer.sliding_window.head_dim=8",
    "mixer.sliding_window.window=40",
    "context_length=256",
    "run.name=run",
)
"""A model and a context small enough for a test; the rest is what every user gets."""


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `longtrain ARGUMENTS` in `folder`; its output can be read from the pipes."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "longtrain", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str, timeout: float = 150, **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(folder, *arguments, **variables)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"{arguments} did not end in {timeout} s:\n{output}\n{errors}") from None
    return process.returncode, output, errors


def succeed(folder: Path, *arguments: str, **variables: str) -> str:
    """Standard output of a command that must end with 0."""
    code, output, errors = run(folder, *arguments, **variables)
    assert code == 0, f"{arguments} ended with {code}:\n{output}\n{errors}"
    return output


def refuse(folder: Path, *arguments: str, **variables: str) -> str:
    """The one line of a command that must refuse with exit code 2."""
    code, output, errors = run(folder, *arguments, **variables)
    lines: Sequence[str] = errors.strip().splitlines()
    assert code == 2, f"{arguments} ended with {code}:\n{output}\n{errors}"
    assert len(lines) == 1, f"{arguments} printed more than a line:\n{errors}"
    return lines[0]
