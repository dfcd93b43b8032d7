"""A save stopped at every call to the file system, by SIGKILL or by an error, leaves the newest complete checkpoint."""

import errno
import resource
import shutil
from pathlib import Path

import pytest

from longtrain.checkpoint.store import CheckpointStore
from longtrain.core.errors import Refused
from tests.harness import crash
from tests.unit.checkpoint.samples import METADATA, damage, equal, state, store_with, visible


def save(directory: Path) -> None:
    CheckpointStore(directory, keep=2).save(30, state(30), METADATA)


def prepare(directory: Path, corrupt: bool = False) -> Path:
    """Two checkpoints, the older about to be retired; a dead writer's leftover; a corrupt one of the step to save."""
    store_with(directory, (10, 20))
    shutil.copytree(directory / "step-00000010", directory / ".saving-step-00000030-dead")
    if corrupt:
        store_with(directory, (30,))
        damage(directory / "step-00000030" / "manifest.json")
    return directory


@pytest.mark.parametrize("corrupt", [False, True], ids=["new", "replacing-a-corrupt-one"])
def test_killed_at_every_point_the_newest_complete_checkpoint_loads(tmp_path: Path, corrupt: bool) -> None:
    directory = prepare(tmp_path / "count", corrupt)
    calls = crash.record(lambda: save(directory))
    seen = set()
    for point in crash.points(calls):
        directory = prepare(tmp_path / str(point), corrupt)
        assert crash.killed(lambda directory=directory: save(directory), point), point
        store = CheckpointStore(directory, keep=2)
        found = store.newest()
        assert found is not None and found.step in (20, 30), point
        assert equal(store.load(found.path), state(found.step)), point
        assert corrupt or not found.skipped, point
        seen.add(found.step)
        store.save(30, state(30), METADATA)
        store.save(40, state(40), METADATA)
        assert visible(directory) == ["step-00000030", "step-00000040"], point
        shutil.rmtree(directory)
    assert seen == {20, 30}
    assert set(calls) == set(crash.CALLS) - {"ftruncate"}, (
        "leftovers, writes, syncs, renames and retirement are covered"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_an_error_at_any_point_is_one_line_and_nothing_partial_is_visible(tmp_path: Path, number: int) -> None:
    names = ["mkdir", "write", "fsync", "rename"]
    directory = prepare(tmp_path / "count")
    count = sum(name in names for name in crash.record(lambda: save(directory)))
    refusals = 0
    for index in range(count):
        directory = prepare(tmp_path / str(index))
        try:
            with crash.failing(index, number, names):
                save(directory)
        except Refused as error:
            refusals += 1
            line = str(error)
            assert "\n" not in line
            for part in (str(directory / "step-00000030"), "rank 0", errno.errorcode[number], "MiB", "step-00000020"):
                assert part in line
            assert "run the same command again" in line
            # Where the folder's sync and then the rename back fail, step 30 stays visible: it is complete.
            assert [name for name in visible(directory) if name.startswith("step")][:2] == [
                "step-00000010",
                "step-00000020",
            ]
        store = CheckpointStore(directory, keep=2)
        assert store.newest() is not None and not store.newest().skipped  # type: ignore[union-attr]
        store.save(30, state(30), METADATA)
        assert equal(store.load(directory / "step-00000030"), state(30))
        store.save(40, state(40), METADATA)
        assert visible(directory) == ["step-00000030", "step-00000040"]
    assert refusals == count - 1, "only the rename of the retired checkpoint may fail unseen: the next save repeats it"


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    directory = prepare(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        with pytest.raises(Refused, match=r"File too large \(EFBIG\) at shard-00000-of-00001.*ulimit -f"):
            save(directory)
        assert visible(directory) == ["step-00000010", "step-00000020"]

    assert crash.wait(crash.fork(limited)) == 0


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run directory should be")
    with pytest.raises(Refused, match=r"could not be saved: rank 0: .*no checkpoint is committed yet"):
        CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).save(1, state(), {})
    with pytest.raises(Refused, match=r"cannot be listed: Not a directory"):
        CheckpointStore(tmp_path / "run", keep=1).newest()
