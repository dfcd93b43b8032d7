"""What a user reads when a checkpoint cannot be written: one line with place, cause, bytes and remedy."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from longtrain.core.errors import Refused

_SPACE = "free space and run the same command again"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free space or raise the quota, and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`) and run the same command again",
    errno.EROFS: "mount it writable and run the same command again",
    errno.EACCES: "make it writable and run the same command again",
    errno.ENOENT: "put the run directory on a file system that all ranks share, and run the same command again",
}


@dataclass(frozen=True)
class Failure:
    """Why one rank could not write its part; travels between ranks as JSON."""

    cause: str
    number: int | None
    """errno; None for an error that is not the file system's."""


def failure_of(error: Exception) -> Failure:
    """Describe an error met while writing."""
    if not isinstance(error, OSError) or error.errno is None:
        return Failure(cause=f"{type(error).__name__}: {error}", number=None)
    name = errno.errorcode.get(error.errno, str(error.errno))
    place = f" at {os.path.basename(str(error.filename))}" if error.filename else ""
    return Failure(cause=f"{error.strerror} ({name}){place}", number=error.errno)


def refusal(rank: int, failure: Failure, target: Path, needed: int, newest: Path | None) -> Exception:
    """The error that every rank raises: Refused for the file system's failures, RuntimeError for a defect.

    To be made when what was written is removed again, so that the bytes free are those of the next attempt.
    """
    if failure.number is None:
        return RuntimeError(f"checkpoint {target}: rank {rank}: {failure.cause}")
    kept = f"the newest committed checkpoint is {newest.name}" if newest else "no checkpoint is committed yet"
    remedy = _REMEDIES.get(failure.number, "check that file system and run the same command again")
    return Refused(
        f"checkpoint {target} could not be saved: rank {rank}: {failure.cause}; it needs {_mib(needed)}, "
        f"{_free(target)} free; {kept}; {remedy}"
    )


def _free(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    try:
        return f"{_mib(shutil.disk_usage(folder).free)} are"
    except OSError:
        return "an unknown number of bytes is"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
