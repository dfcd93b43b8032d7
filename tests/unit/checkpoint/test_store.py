"""Saving, loading, falling back and retention in one process."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtrain.checkpoint.store import CheckpointStore
from longtrain.checkpoint.verify import verify
from longtrain.comm.journal import Journal
from longtrain.core.errors import CorruptCheckpoint
from tests.harness import crash
from tests.unit.checkpoint.samples import METADATA, damage, equal, state, store_with, visible

SHARD = "shard-00000-of-00001.safetensors"


def test_writing_checking_and_reading_are_signs_of_life(tmp_path: Path) -> None:
    journal = Journal()
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, journal=journal)

    def count() -> int:
        return journal.standing().count

    before = count()
    path = store.save(20, state(3), METADATA)
    after_saving = count()
    assert after_saving > before
    assert store.newest() is not None
    after_checking = count()
    assert after_checking > after_saving
    store.load(path)
    assert count() > after_checking


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    tensors = state(3)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    path = store.save(20, tensors, METADATA)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000020"
    assert visible(path) == ["manifest.json", "manifest.sha256", SHARD]
    assert verify(path) == []
    found = store.newest()
    assert found is not None
    assert (found.path, found.step, found.metadata, found.skipped) == (path, 20, METADATA, ())
    assert equal(store.load(path), tensors)
    assert store.at(path) == found


def test_other_programs_can_read_and_check_it(tmp_path: Path) -> None:
    path = store_with(tmp_path, (1,)).save(1, state(1), METADATA)
    assert {name: tensor.dtype for name, tensor in load_file(path / SHARD).items()} == {
        name: tensor.dtype for name, tensor in state(1).items()
    }
    loaded = load_file(path / SHARD)
    assert equal({name: loaded[name] for name in state(1)}, state(1))
    subprocess.run(["sha256sum", "--check", "manifest.sha256"], cwd=path, check=True)
    listed = json.loads((path / "manifest.json").read_text())
    assert listed["files"][SHARD]["bytes"] == (path / SHARD).stat().st_size
    assert listed["tensors"]["model.half"] == {"shard": SHARD, "shape": [6, 4], "dtype": "BF16"}


def test_files_are_private(tmp_path: Path) -> None:
    path = store_with(tmp_path / "checkpoints", (1,)).at(tmp_path / "checkpoints" / "step-00000001").path
    assert [oct(entry.stat().st_mode & 0o777) for entry in (path, *sorted(path.iterdir()))] == ["0o700"] + ["0o600"] * 3


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "missing", keep=1).newest() is None
    (tmp_path / ".saving-step-00000010-aa").mkdir()
    (tmp_path / "step-10").mkdir()
    assert CheckpointStore(tmp_path, keep=1).newest() is None


def test_leftovers_of_dead_writers_go_at_the_next_save(tmp_path: Path) -> None:
    for name in (".saving-step-00000010-aa", ".deleting-step-00000005-bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SHARD).write_bytes(b"half")
    (tmp_path / ".deleting-x").write_bytes(b"")
    store_with(tmp_path, (20,))
    assert visible(tmp_path) == ["step-00000020"]


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    store_with(tmp_path, (1, 2, 3, 4), keep=2)
    assert visible(tmp_path) == ["step-00000003", "step-00000004"]
    store_with(tmp_path, (5,), keep=1)
    assert visible(tmp_path) == ["step-00000005"]


def test_corrupt_ones_are_named_and_passed_over(tmp_path: Path) -> None:
    store = store_with(tmp_path, (10, 20, 30))
    damage(tmp_path / "step-00000030" / SHARD, 900)
    (tmp_path / "step-00000020" / SHARD).unlink()
    found = store.newest()
    assert found is not None and found.step == 10
    assert equal(store.load(found.path), state(10))
    assert [line.count("\n") for line in found.skipped] == [0, 0]
    assert "step-00000030" in found.skipped[0] and f"{SHARD} does not have its SHA-256" in found.skipped[0]
    assert "step-00000020" in found.skipped[1] and f"{SHARD} is missing" in found.skipped[1]


def test_what_was_fallen_back_to_stays_until_a_newer_good_one_exists(tmp_path: Path) -> None:
    store_with(tmp_path, (10, 20, 30))
    damage(tmp_path / "step-00000030" / SHARD, 900)
    damage(tmp_path / "step-00000020" / "manifest.json", 9)
    store = CheckpointStore(tmp_path, keep=2)
    assert store.newest().step == 10  # type: ignore[union-attr]
    with crash.failing(0, 28, ["write"]), pytest.raises(Exception, match="No space left"):
        store.save(15, state(15), METADATA)
    assert visible(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    store.save(15, state(15), METADATA)
    assert visible(tmp_path) == ["step-00000010", "step-00000015"], "the corrupt ones neither count nor stay"
    assert store.newest().step == 15  # type: ignore[union-attr]


def test_none_usable_is_refused_in_one_line(tmp_path: Path) -> None:
    store = store_with(tmp_path, (10, 20))
    for step in (10, 20):
        damage(tmp_path / f"step-000000{step}" / "manifest.sha256")
    with pytest.raises(CorruptCheckpoint) as refused:
        store.newest()
    line = str(refused.value)
    assert "\n" not in line and "step-00000010: manifest.json" in line and "step-00000020: manifest.json" in line
    with pytest.raises(CorruptCheckpoint, match=r"step-00000010: manifest\.json does not have the digest"):
        store.load(tmp_path / "step-00000010")
    with pytest.raises(CorruptCheckpoint, match="cannot be opened: No such file"):
        store.at(tmp_path / "nowhere")


def test_a_step_saved_twice_is_written_once_unless_it_is_corrupt(tmp_path: Path) -> None:
    store = store_with(tmp_path, (10,))
    before = (tmp_path / "step-00000010" / SHARD).stat().st_ino
    store.save(10, state(10), {})
    assert (tmp_path / "step-00000010" / SHARD).stat().st_ino == before
    assert store.newest().metadata == METADATA  # type: ignore[union-attr]
    damage(tmp_path / "step-00000010" / SHARD, 900)
    store.save(10, state(10), METADATA)
    assert verify(tmp_path / "step-00000010") == []
    assert visible(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "error"),
    [
        ({"x": torch.zeros(2, dtype=torch.complex64)}, {}, TypeError),
        ({"x": torch.zeros(2)}, {"loss": float("nan")}, ValueError),
        ({"x": torch.zeros(2)}, {"path": Path("x")}, TypeError),
        ({"__metadata__": torch.zeros(2)}, {}, ValueError),
    ],
    ids=["complex", "nan", "not-json", "reserved"],
)
def test_what_cannot_be_held_leaves_nothing(tmp_path: Path, tensors: dict, metadata: dict, error: type) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises((error, RuntimeError)):
        store.save(1, tensors, metadata)
    assert visible(tmp_path) == []


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []

    def spy(name: str) -> None:
        original = getattr(os, name)

        def call(first: object, *args: object, **options: object) -> object:
            events.append((name, os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)))
            return original(first, *args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "rename", "mkdir"):
        spy(name)
    path = CheckpointStore(tmp_path / "checkpoints", keep=1).save(7, state(), METADATA)
    renames = [index for index, event in enumerate(events) if event[0] == "rename"]
    assert len(renames) == 1
    hidden = events[renames[0]][1]
    before, after = events[: renames[0]], events[renames[0] + 1 :]
    for name in (SHARD, "manifest.json", "manifest.sha256"):
        written = max(i for i, event in enumerate(before) if event == ("write", f"{hidden}/{name}"))
        synced = before.index(("fsync", f"{hidden}/{name}"))
        assert written < synced < before.index(("fsync", hidden))
    assert before.index(("fsync", f"{hidden}/{SHARD}")) < before.index(("write", f"{hidden}/manifest.json"))
    assert ("fsync", str(tmp_path)) in before, "the new `checkpoints` folder itself is durable"
    assert after == [("fsync", str(path.parent))]
