"""One run directory, one writing job."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from longtrain.core.errors import Refused

_POLL_SECONDS = 0.05


class RunLock:
    """An exclusive lock on `<run>/writer.lock`, held by the process that writes the run, released when that dies.

    It belongs to the open file: a process forked from the holder (not one it starts by exec) shares it.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is the run directory and exists."""
        self._path = directory / "writer.lock"
        self._descriptor: int | None = None

    def acquire(self, wait_seconds: float) -> Self:
        """Take the lock, waiting so long for a predecessor that is dying. Usable as a context manager.

        Raises Refused, naming the holder's process and host, if it is still held then.
        """
        deadline = time.monotonic() + wait_seconds
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Refused(f"{self._path} cannot be written: {error.strerror}; make it writable") from error
        try:
            while not _lock(descriptor):
                if time.monotonic() >= deadline:
                    raise Refused(
                        f"{self._path.parent} is being written by {_holder(descriptor)}; "
                        "stop that job first, or choose another run.name"
                    )
                time.sleep(_POLL_SECONDS)
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Let go; the file stays, since removing it would let two jobs lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
