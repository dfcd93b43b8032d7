"""Nothing but exactly what was saved is ever loaded."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.checkpoint.store import CheckpointStore
from longtrain.checkpoint.verify import verify
from longtrain.core.errors import CorruptCheckpoint
from tests.unit.checkpoint.samples import equal, state, store_with

SHARD = "shard-00000-of-00001.safetensors"
FILES = ("manifest.json", "manifest.sha256", SHARD)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    store_with(tmp_path / "checkpoints", (10, 20))
    return tmp_path / "checkpoints" / "step-00000020"


def refused(checkpoint: Path) -> bool:
    """Neither verified nor loaded, and passed over in favour of the older one."""
    store = CheckpointStore(checkpoint.parent, keep=9)
    problems = verify(checkpoint)
    assert problems and all("\n" not in line and len(line) < 500 for line in problems)
    with pytest.raises(CorruptCheckpoint):
        store.load(checkpoint)
    return True


def falls_back(checkpoint: Path) -> bool:
    store = CheckpointStore(checkpoint.parent, keep=9)
    found = store.newest()
    assert found is not None and len(found.skipped) == 1
    return found.step == 10 and equal(store.load(found.path), state(10))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_byte(checkpoint: Path, name: str) -> None:
    original = (checkpoint / name).read_bytes()
    for offset in range(len(original)):
        changed = bytearray(original)
        changed[offset] ^= 1 << offset % 8
        (checkpoint / name).write_bytes(changed)
        assert verify(checkpoint), offset
        if offset % 16 == 0:
            assert refused(checkpoint), offset
    assert falls_back(checkpoint)
    (checkpoint / name).write_bytes(original)
    assert verify(checkpoint) == []


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_extended(checkpoint: Path, name: str) -> None:
    original = (checkpoint / name).read_bytes()
    for length in range(len(original)):
        (checkpoint / name).write_bytes(original[:length])
        assert verify(checkpoint), length
    for extended in (original + b"\0", original + b"\n", original + original):
        (checkpoint / name).write_bytes(extended)
        assert refused(checkpoint)
    assert falls_back(checkpoint)


def delete(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    """To identical bytes: even so, a checkpoint's files are its own."""
    copy = path.parent.parent / "copy"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def take_from_another_step(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-00000010" / path.name, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [delete, replace_by_folder, replace_by_pipe, replace_by_link, take_from_another_step],
    ids=lambda f: f.__name__,
)
def test_a_file_that_is_not_the_one_saved(checkpoint: Path, change: Callable[[Path], None], name: str) -> None:
    change(checkpoint / name)
    assert refused(checkpoint)
    assert falls_back(checkpoint)


def test_a_whole_manifest_or_checkpoint_of_another_step(checkpoint: Path) -> None:
    for name in ("manifest.json", "manifest.sha256"):
        take_from_another_step(checkpoint / name)
    assert refused(checkpoint)
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.parent / "step-00000010", checkpoint)
    assert verify(checkpoint) == ["manifest.json is of step 10, not 20"]
    assert falls_back(checkpoint)
    copy = shutil.copytree(checkpoint.parent / "step-00000010", checkpoint.parent / "best")
    assert verify(copy) == [], "under a name that says no step it is a good checkpoint"


def test_a_checkpoint_that_is_a_link(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parent / "elsewhere")
    checkpoint.symlink_to("elsewhere")
    assert verify(checkpoint) == ["is a symbolic link; name the folder itself"]
    assert falls_back(checkpoint)
