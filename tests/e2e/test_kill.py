"""kill -9, of a worker or of the whole command, and workers that hang: the end is the bits of an undisturbed run."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.telemetry.records import check_ledger
from tests.harness.cli import SMALL, start, succeed

STEPS = 24
COMMAND = ("train", *SMALL, f"steps={STEPS}", "checkpoint.every_steps=3", "checkpoint.keep=2")
TIMEOUT = 120
SLEEPER = '''
    """Next-token prediction, but rank 1 falls asleep in the middle of its fifth step, once."""

    import os
    import time
    from dataclasses import dataclass
    from pathlib import Path

    from longtrain.objectives import next_token


    @dataclass(frozen=True)
    class Config:
        name: str


    class Objective(next_token.Objective):
        steps = 0

        def count(self, targets):
            self.steps += 1
            return super().count(targets)

        def sums(self, log_probs, targets):
            if self.steps == 5 and os.environ["RANK"] == "1" and not Path("has-slept").exists():
                Path("has-slept").touch()
                time.sleep(3600)
            return super().sums(log_probs, targets)
'''


def weights(folder: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(folder / "runs" / "run" / "checkpoints", keep=2)
    found = store.newest()
    assert found is not None
    assert found.step == STEPS
    return store.load(found.path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(folder, *COMMAND)
    assert_records(folder)
    return weights(folder)


def assert_records(folder: Path) -> None:
    run = folder / "runs" / "run"
    assert check_ledger(run / "ledger.jsonl", last_step=STEPS) == []
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def assert_same_bits(folder: Path, want: dict[str, torch.Tensor]) -> None:
    got = weights(folder)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def wait_for_step(folder: Path, step: int) -> None:
    """Until the run has recorded a step."""
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline, f"step {step} was not reached in {TIMEOUT} s"
        time.sleep(0.01)


def writer(folder: Path) -> int:
    """Process id of the rank that writes the run."""
    return json.loads((folder / "runs" / "run" / "writer.lock").read_text())["pid"]


def worker_processes(pid: int) -> Iterator[psutil.Process]:
    """The workers of the job whose rank 0 is process `pid`."""
    for process in psutil.Process(pid).parent().children():
        if "Worker" in process.name() or "Worker" in " ".join(process.cmdline()):
            yield process


def test_killed_workers_cost_nothing(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    process = start(folder, *COMMAND)
    wait_for_step(folder, 1)  # before the first checkpoint
    first = writer(folder)
    os.kill(first, signal.SIGKILL)
    wait_for_step(folder, 5)  # of the second attempt, behind a checkpoint
    second = writer(folder)
    assert second != first
    other = next(p.pid for p in worker_processes(second) if p.pid != second)
    os.kill(other, signal.SIGKILL)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"{output}\n{errors}"
    incidents = [json.loads(line) for line in (folder / "runs" / "run" / "incidents.jsonl").read_text().splitlines()]
    assert [incident["kind"] for incident in incidents] == ["died", "recovered", "died", "recovered"]
    assert_same_bits(folder, undisturbed)
    assert_records(folder)


def test_workers_that_hang_or_are_stopped_cost_nothing_and_are_named(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "job"
    for name, text in {"objectives/sleeper.py": SLEEPER, "conf/objective/sleeper.yaml": "name: sleeper"}.items():
        (folder / "plugin" / name).parent.mkdir(parents=True)
        (folder / "plugin" / name).write_text(dedent(text).lstrip())
    hang = ("plugins=[plugin]", "objective=sleeper", "cluster.hang_timeout_seconds=5")
    process = start(folder, *COMMAND, *hang)
    wait_for_step(folder, 5)  # only the second attempt gets there
    os.kill(writer(folder), signal.SIGSTOP)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, f"{output}\n{errors}"
    lines = (folder / "runs" / "run" / "incidents.jsonl").read_text().splitlines()
    slept, _, stopped, _ = incidents = [json.loads(line) for line in lines]
    assert [incident["kind"] for incident in incidents] == ["hang", "recovered", "silent", "recovered"]
    assert (slept["details"]["ranks"], slept["details"]["step"]) == ([1], 4)
    assert "holds up rank 0 in " in slept["message"]
    assert "in sums" in slept["details"]["traceback"]
    assert stopped["details"]["ranks"] == [0]
    assert "not heard of" in stopped["message"]
    assert_same_bits(folder, undisturbed)
    assert_records(folder)


def test_the_whole_command_killed_and_stopped_goes_on_when_run_again(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    process = start(folder, *COMMAND)
    wait_for_step(folder, 5)  # behind the first checkpoint
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    process = start(folder, *COMMAND)
    wait_for_step(folder, 8)
    process.terminate()
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, f"{output}\n{errors}"
    saved = CheckpointStore(folder / "runs" / "run" / "checkpoints", keep=2).newest()
    assert saved is not None
    assert saved.step >= 8
    succeed(folder, *COMMAND)
    assert_same_bits(folder, undisturbed)
    assert_records(folder)
