"""The command as a process of its own, with Ray embedded: what a terminal, an operator and the kernel do to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

SETTINGS = ["run.name=driver", "context_length=256", "steps=1000000", "checkpoint.every_steps=1000000"]


class Command:
    """`longtrain train` in its own session, and every process below it."""

    def __init__(self, folder: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.run = folder / "runs" / "driver"
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longtrain", "train", *SETTINGS],
                cwd=folder,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.output = folder / "output"
        self.below: list[psutil.Process] = []

    def until_training(self) -> None:
        """Wait for the third step."""
        metrics = self.run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        self.below = psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.below if "ray::Worker" in " ".join(p.cmdline())]

    def left(self, seconds: float) -> list[str]:
        """Command lines of the processes that still live after so long."""
        _, alive = psutil.wait_procs(self.below, timeout=seconds)
        return [" ".join(p.cmdline())[:80] for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    with _ended(Command(tmp_path)) as command:
        command.until_training()
        yield command


@contextmanager
def _ended(command: Command) -> Iterator[Command]:
    try:
        yield command
    finally:
        for process in [*command.below, command.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        command.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_leaves(command: Command, number: signal.Signals) -> None:
    # A terminal sends Ctrl-C to every process of the foreground group; `timeout` and batch systems send SIGTERM so.
    os.killpg(command.process.pid, number)
    assert command.process.wait(timeout=60) == 75
    assert len(list((command.run / "checkpoints").glob("step-*"))) == 1
    text = command.output.read_text()
    assert "Traceback" not in text and "stopped; the same command goes on" in text
    assert command.left(seconds=5) == []


def test_a_second_interrupt_quits_at_once(command: Command) -> None:
    assert len(command.workers()) == 2
    for worker in command.workers():
        worker.suspend()  # so that the first interrupt cannot be answered
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(timeout=10) == 130
    assert time.monotonic() - begun < 1.0
    assert command.left(seconds=5) == []


def test_nothing_outlives_a_killed_command_not_even_a_frozen_worker(command: Command) -> None:
    command.workers()[1].suspend()
    command.process.kill()
    command.process.wait()
    assert command.left(seconds=5) == []
