"""Checkpoints shared by two gloo ranks: one commit, one outcome, nobody left waiting."""

import errno
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtrain.checkpoint.store import CheckpointStore, Found
from longtrain.checkpoint.verify import verify
from longtrain.core.errors import CorruptCheckpoint
from tests.harness import crash
from tests.harness.ranks import RankPool
from tests.unit.checkpoint.samples import METADATA, damage, equal, state, store_with, visible

Pools = Callable[[int], RankPool]


def save(directory: Path, step: int) -> Path:
    return CheckpointStore(directory, keep=2).save(step, state(step), METADATA)


def newest_and_load(directory: Path) -> tuple[Found | None, dict[str, torch.Tensor]]:
    store = CheckpointStore(directory, keep=2)
    found = store.newest()
    assert found is not None
    return found, store.load(found.path)


def load_and_save(source: Path, target: Path, step: int) -> None:
    CheckpointStore(target, keep=2).save(step, CheckpointStore(source, keep=2).load(source / "step-00000010"), METADATA)


def outcome(action: Callable[..., Any], *args: Any) -> str:
    """The error of `action` as text, so that ranks can be compared."""
    try:
        action(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_writing_and_any_number_loads_it(tmp_path: Path, rank_pool: Pools, world_size: int) -> None:
    store_with(tmp_path / "one", (10,))
    rank_pool(world_size).run(load_and_save, tmp_path / "one", tmp_path / "many", 10)
    shards = sorted((tmp_path / "many" / "step-00000010").glob("shard-*"))
    assert [shard.name[6:] for shard in shards] == [
        f"{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)
    ]
    for found, tensors in rank_pool(world_size).run(newest_and_load, tmp_path / "many"):
        assert found.metadata == METADATA and equal(tensors, state(10))
    load_and_save(tmp_path / "many", tmp_path / "back", 10)
    for name in ("manifest.json", "manifest.sha256", "shard-00000-of-00001.safetensors"):
        first, last = (tmp_path / run / "step-00000010" / name for run in ("one", "back"))
        assert first.read_bytes() == last.read_bytes(), "1 -> many -> 1 rank is bit-identical"


def test_more_ranks_than_tensors(tmp_path: Path, rank_pool: Pools) -> None:
    rank_pool(3).run(save_one_tensor, tmp_path)
    assert verify(tmp_path / "step-00000001") == []
    assert CheckpointStore(tmp_path, keep=1).load(tmp_path / "step-00000001")["x"].tolist() == [1.0]


def save_one_tensor(directory: Path) -> None:
    CheckpointStore(directory, keep=1).save(1, {"x": torch.ones(1)}, {})


def test_rank_0_decides_which_checkpoint_is_used(tmp_path: Path, rank_pool: Pools) -> None:
    for step in (10, 20):
        rank_pool(2).run(save, tmp_path, step)
    damage(tmp_path / "step-00000020" / "shard-00001-of-00002.safetensors", 300)
    first, second = rank_pool(2).run(newest_and_load, tmp_path)
    assert first[0] == second[0] and first[0].step == 10 and len(first[0].skipped) == 1
    damage(tmp_path / "step-00000010" / "manifest.json")
    lines = rank_pool(2).run(outcome, newest_and_load, tmp_path)
    assert lines[0] == lines[1] and lines[0].startswith("CorruptCheckpoint: no usable checkpoint is left")


def test_ranks_that_disagree_are_told(tmp_path: Path, rank_pool: Pools) -> None:
    lines = rank_pool(2).run(outcome, save_different, tmp_path)
    assert all(line.startswith("RuntimeError") and "rank 1 has another step or tensors" in line for line in lines)
    lines = rank_pool(2).run(outcome, save_impossible, tmp_path)
    assert "rank 1: TypeError: a checkpoint cannot hold torch.complex64" in lines[0], "the rank that fails is named"
    assert visible(tmp_path) == []


def save_different(directory: Path) -> None:
    CheckpointStore(directory, keep=1).save(1, {"x": torch.ones(1 + dist.get_rank())}, {})


def save_impossible(directory: Path) -> None:
    dtype = torch.complex64 if dist.get_rank() == 1 else torch.float32
    CheckpointStore(directory, keep=1).save(1, {name: torch.ones(4, dtype=dtype) for name in "xy"}, {})


def save_with_a_full_disk(directory: Path, full_rank: int, index: int, number: int) -> str:
    """Save 30, the disk of one rank failing from its `index`-th call on; then, with space again, save 40."""
    store = CheckpointStore(directory, keep=9)
    if dist.get_rank() == full_rank:
        with crash.failing(index, number, ["write", "fsync"]):
            line = outcome(store.save, 30, state(30), METADATA)
    else:
        line = outcome(store.save, 30, state(30), METADATA)
    assert not any(path.name.startswith("step-00000030") for path in directory.iterdir())
    assert verify(directory / "step-00000020") == []
    dist.barrier()  # both have looked before the next save begins
    store.save(40, state(40), METADATA)
    return line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_full_disk_of_one_rank_at_any_write_refuses_all_alike(tmp_path: Path, rank_pool: Pools, number: int) -> None:
    rank_pool(2).run(save, tmp_path / "base", 20)
    for rank, calls in ((0, 9), (1, 5)):
        for index in range(calls):
            directory = tmp_path / f"{rank}-{index}"
            shutil.copytree(tmp_path / "base", directory)
            lines = rank_pool(2).run(save_with_a_full_disk, directory, rank, index, number)
            assert lines[0] == lines[1]
            assert f"rank {rank}: " in lines[0] and errno.errorcode[number] in lines[0] and "\n" not in lines[0]
            assert "step-00000020" in lines[0] and "run the same command again" in lines[0]
            assert visible(directory) == ["step-00000020", "step-00000040"]


def save_beyond_the_limit(directory: Path) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    line = outcome(save, directory, 30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return line


def test_a_real_limit_on_the_file_size_of_one_rank(tmp_path: Path, rank_pool: Pools) -> None:
    rank_pool(2).run(save, tmp_path, 20)
    lines = rank_pool(2).run(save_beyond_the_limit, tmp_path)
    assert lines[0] == lines[1] and lines[0].startswith("Refused")
    assert "rank 1: File too large (EFBIG) at shard-00001-of-00002.safetensors" in lines[0]
    assert visible(tmp_path) == ["step-00000020"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_point(tmp_path: Path, victim: int) -> None:
    """The other rank ends too (its connection breaks, or its wait ends), and what is there is complete."""
    seen = set()
    for index in range(100):
        point = crash.Point(index, "before")
        directory = tmp_path / str(point)
        store_with(directory, (20,))
        actions = [lambda directory=directory: save(directory, 30)] * 2
        actions[victim] = crash.until(actions[victim], point)
        begin = time.monotonic()
        codes = crash.fork_ranks(actions)
        assert time.monotonic() - begin < 20, "nobody hangs"
        found = CheckpointStore(directory, keep=2).newest()
        assert found is not None and found.step in (20, 30) and not found.skipped
        assert equal(CheckpointStore(directory, keep=2).load(found.path), state(found.step))
        seen.add(found.step)
        if codes == [0, 0]:
            break
    assert codes == [0, 0] and found.step == 30 and index > 5
    assert seen == {20, 30}


def test_load_fails_on_all_ranks_when_it_fails_on_one(tmp_path: Path, rank_pool: Pools) -> None:
    store_with(tmp_path, (10,))
    lines = rank_pool(2).run(outcome, load_elsewhere, tmp_path)
    assert lines[0] == lines[1] and lines[0].startswith(f"{CorruptCheckpoint.__name__}: ")


def load_elsewhere(directory: Path) -> None:
    CheckpointStore(directory, keep=1).load(directory / f"step-000000{10 + dist.get_rank()}")
