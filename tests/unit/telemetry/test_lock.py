"""Two jobs never write one run."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from longtrain.core.errors import Refused
from longtrain.telemetry.lock import RunLock
from tests.harness import crash


def holder(directory: Path) -> int:
    """A process that holds the lock until it is killed."""
    ready, told = os.pipe()

    def hold() -> None:
        RunLock(directory).acquire(0)
        os.write(told, b"x")
        time.sleep(30)

    process = crash.fork(hold)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(told)
    return process


def test_a_second_job_is_told_who_writes(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(Refused) as refused:
        RunLock(tmp_path).acquire(0.1)
    assert f"is being written by process {process} on {socket.gethostname()!r}" in str(refused.value)
    assert "\n" not in str(refused.value)
    os.kill(process, signal.SIGKILL)
    crash.wait(process)
    with RunLock(tmp_path).acquire(0):
        pass
    RunLock(tmp_path).acquire(0).release()


def test_it_waits_for_a_dying_predecessor(tmp_path: Path) -> None:
    process = holder(tmp_path)
    timer = threading.Timer(0.3, os.kill, (process, signal.SIGKILL))
    timer.start()
    RunLock(tmp_path).acquire(20).release()
    timer.join()
    assert crash.wait(process) == -signal.SIGKILL


def test_what_the_file_says_is_not_believed_without_the_lock(tmp_path: Path) -> None:
    (tmp_path / "writer.lock").write_text('{"pid": 1, "host": "elsewhere"}' * 9)
    lock = RunLock(tmp_path).acquire(0)
    assert (tmp_path / "writer.lock").read_text().count("pid") == 1
    (tmp_path / "writer.lock").write_text("\0\0")
    with pytest.raises(Refused, match="is being written by another process"):
        RunLock(tmp_path).acquire(0)
    lock.release()


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"writer\.lock cannot be written: No such file or directory"):
        RunLock(tmp_path / "missing").acquire(0)
