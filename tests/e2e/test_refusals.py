"""What a user gets wrong gets one line and exit code 2, and loses nothing."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from longtrain.checkpoint.store import CheckpointStore
from longtrain.cli import main
from tests.e2e.conftest import ALONE, Command, Refusal
from tests.harness.cli import SMALL, refuse


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resume=nver", ["resume=nver", "did you mean 'never'"]),
        ("resume=/no/such/step-00000001", ["/no/such/step-00000001 does not exist"]),
        ("cluster.address=lokal", ["cluster.address=lokal", "did you mean 'local'"]),
        ("contxt_length=1k", ["contxt_length", "did you mean 'context_length'"]),
        ("steps=many", ["steps=many", "integer"]),
        ("model=hybrid_tinny", ["hybrid_tinny", "hybrid_tiny"]),
        ("mixer.softmax.num_heads=3", ["num_heads=3"]),
        ("context_length=1.3k", ["context_length=1.3k", "tokens"]),
        ("sequence_parallel.attend=rign", ["rign", "ring"]),
    ],
)
def test_mistyped_settings(tmp_path: Path, refused: Refusal, override: str, words: list[str]) -> None:
    line = refused("train", override)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_group_that_does_not_divide_the_workers(refused: Refusal) -> None:
    line = refused("train", "sequence_parallel.size=3", "cluster.workers=4")
    assert "cluster.workers=4" in line
    assert "3 or 6" in line


def test_data_that_cannot_be_used(tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"text\x00\xff\xfe")
    for path, word in (("empty", "empty"), ("missing", "missing"), ("binary.txt", "binary.txt")):
        line = refused("train", "data=text", f"data.path={path}", *ALONE)
        assert word in line, line
    assert "data.path" in refused("train", "data=text", *ALONE)
    assert not (tmp_path / "runs").exists(), "a refused command leaves no run directory"


def test_a_damaged_token_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert main(["prepare", f"data.store={store}"]) == 0
    shard = max(store.glob("*.arrow"), key=lambda p: p.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    line = refuse(tmp_path, "train", f"data.store={store}", *SMALL, *ALONE, "steps=2")
    assert shard.name in line, line


def test_a_full_disk_during_a_checkpoint(tmp_path: Path, succeeded: Command) -> None:
    command = ("train", *SMALL, *ALONE, "checkpoint.every_steps=2")
    succeeded(*command, "steps=4")
    limit = 64 * 1024  # less than a checkpoint, more than any other file of a run
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}));"
        "from longtrain.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path.parent / "cache")}
    full = subprocess.run(
        [sys.executable, "-c", code, *command, "steps=8"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    refusal = full.stderr.splitlines()[-1]
    assert "step-00000006 could not be saved" in refusal
    assert "newest committed checkpoint is step-00000004" in refusal
    folder = tmp_path / "runs" / "run" / "checkpoints"
    assert not [p for p in folder.iterdir() if not p.name.startswith("step-")], "no temporary files stay"
    found = CheckpointStore(folder, keep=3).newest()
    assert found is not None
    assert found.step == 4
    succeeded(*command, "steps=8")
    assert main(["checkpoint", "verify", str(tmp_path / "runs" / "run")]) == 0


def test_a_corrupt_checkpoint_is_found_by_verify(
    tmp_path: Path, succeeded: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    succeeded("train", *SMALL, *ALONE, "steps=2")
    path = tmp_path / "runs" / "run"
    assert main(["checkpoint", "verify", str(path)]) == 0
    assert "ok" in capsys.readouterr().out
    shard = next((path / "checkpoints").glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert shard.name in capsys.readouterr().out
