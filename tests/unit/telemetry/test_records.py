"""The records of a run: whole lines, and a ledger with every committed step once, whatever was killed when."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from longtrain.core.errors import Refused
from longtrain.telemetry.events import StepDone
from longtrain.telemetry.records import LedgerLine, RunRecords, check_ledger
from tests.harness import crash

TOKENS = 16


def step_done(step: int, loss: float = 2.5, mfu: float | None = None) -> StepDone:
    return StepDone(step, step * TOKENS, loss, {}, 1.0, 1e-3, 0.5, 32.0, 1000, 0.0, mfu)


def ledger_line(step: int) -> LedgerLine:
    return LedgerLine(step, (step - 1) * TOKENS, step * TOKENS, TOKENS, 8, 2, 0, 2, 2, 1, (1 / step).hex())


def objects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_the_documented_keys(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.metrics(step_done(1))
    records.metrics(step_done(2, loss=float("nan"), mfu=0.5))
    first, second = objects(tmp_path / "metrics.jsonl")
    keys = ["step", "tokens", "loss", "grad_norm", "learning_rate"]
    keys += ["step_seconds", "tokens_per_second", "peak_memory_bytes", "host_wait_seconds"]
    assert list(first) == keys and list(second) == [*keys, "mfu"]
    assert second["loss"] is None, "JSON has no NaN"


def test_incidents_carry_the_wall_time(tmp_path: Path) -> None:
    RunRecords(tmp_path, clock=lambda: 12.5).incident("worker_died", "rank 1 was killed", rank=1)
    assert objects(tmp_path / "incidents.jsonl") == [
        {"time": 12.5, "kind": "worker_died", "message": "rank 1 was killed", "details": {"rank": 1}}
    ]


def test_a_line_is_one_write(tmp_path: Path) -> None:
    assert crash.record(lambda: RunRecords(tmp_path).metrics(step_done(1))) == ["open", "write", "close"]


def test_a_full_disk_is_one_line_and_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RunRecords(tmp_path)
    records.metrics(step_done(1))
    original, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Refused, match=r"metrics\.jsonl cannot be written: No space left on device; free space"):
        records.metrics(step_done(2))
    monkeypatch.undo()
    records.metrics(step_done(2))
    assert [line["step"] for line in objects(tmp_path / "metrics.jsonl")] == [1, 2]


def train(directory: Path, total: int = 5, every: int = 2) -> None:
    """The order of events of a run: metrics at each step; at a checkpoint commit (with its tail), then the ledger."""
    found = checkpoints(directory)
    step, tail = 0, []
    if found:
        step = int(found[-1].stem)
        tail = [LedgerLine(**line) for line in json.loads(found[-1].read_text())]
    records = RunRecords(directory)
    records.rewind(step, tail)
    pending: list[LedgerLine] = []
    for current in range(step + 1, total + 1):
        records.metrics(step_done(current))
        pending.append(ledger_line(current))
        if current % every == 0 or current == total:
            temporary = directory / "temporary"
            temporary.write_text(json.dumps([vars(line) for line in pending]))
            os.rename(temporary, directory / f"{current}.checkpoint")
            records.ledger(pending)
            pending = []


def checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.checkpoint"))


def complete(directory: Path, total: int = 5) -> bool:
    steps = [line["step"] for line in objects(directory / "metrics.jsonl")]
    lines = [LedgerLine(**line) for line in objects(directory / "ledger.jsonl")]
    assert steps == list(range(1, total + 1))
    assert lines == [ledger_line(step) for step in steps]
    return check_ledger(directory / "ledger.jsonl", last_step=total) == []


@pytest.mark.parametrize("fall_back", [False, True], ids=["newest", "older-checkpoint"])
def test_killed_at_every_point_the_ledger_has_every_step_once(tmp_path: Path, fall_back: bool) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    calls = crash.record(lambda: train(whole))
    assert complete(whole)
    for number, point in enumerate(crash.points(calls)):
        directory = tmp_path / str(point)
        directory.mkdir()
        assert crash.killed(lambda directory=directory: train(directory), point), point
        if fall_back and checkpoints(directory):
            checkpoints(directory)[-1].unlink()
        # Again in the middle of the repair, then to the end.
        crash.killed(lambda directory=directory: train(directory), crash.Point(number % 12, "half"))
        reached = int(checkpoints(directory)[-1].stem) if checkpoints(directory) else 0
        assert all(line["step"] <= reached for line in lines_of(directory)) or fall_back, "only committed steps"
        train(directory)
        assert complete(directory), point
        shutil.rmtree(directory)


def lines_of(directory: Path) -> list[dict]:
    """Whole lines of the ledger; a kill may have torn the last."""
    path = directory / "ledger.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def test_rewinding_again_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert RunRecords(tmp_path).rewind(5, [ledger_line(5)]) == []
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_torn_and_foreign_ends_are_dropped(tmp_path: Path) -> None:
    train(tmp_path)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"step": 6, "x\n[]\nnull\n{"step": "9"}\n\0\0\0')
    RunRecords(tmp_path).rewind(5, [ledger_line(5)])
    assert complete(tmp_path)


def test_a_run_from_another_runs_checkpoint_begins_where_that_ended(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    assert records.rewind(20, []) == []
    records.ledger([ledger_line(21)])
    path = tmp_path / "ledger.jsonl"
    assert check_ledger(path, first_step=21) == [] == check_ledger(path, first_step=None)
    assert check_ledger(path) == [f"{path}:1: steps 1 to 20 are missing"]


def test_a_gap_that_cannot_be_filled_is_reported_and_recorded(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.ledger([ledger_line(1), ledger_line(2)])
    assert records.rewind(6, [ledger_line(5), ledger_line(6)]) == [
        f"{tmp_path / 'ledger.jsonl'}:3: steps 3 to 4 are missing"
    ]
    assert objects(tmp_path / "incidents.jsonl")[0]["kind"] == "ledger"
    assert "steps 7 to 8 are missing at the end" in records.rewind(8, [])[-1]


def test_check_ledger_finds_faults(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = [vars(ledger_line(step)) for step in (1, 2, 2, 3)]
    lines[3] = {**lines[3], "begin": 7}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn")
    assert [problem.split(": ", 1)[1] for problem in check_ledger(path, last_step=4)] == [
        "step 2 is there again",
        "step 3 begins at token 7, but step 2 ended at 32",
        "step 3 has 16 tokens, but spans 7 to 48",
        "not a ledger line",
        "steps 4 to 4 are missing at the end",
    ]
    assert check_ledger(tmp_path / "missing") == []
