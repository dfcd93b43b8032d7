"""File operations that survive a crash: new files are synced, folders are synced, a folder disappears in one rename."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from longtrain.checkpoint.manifest import FileEntry

_BLOCK = 16 * 2**20
_DELETING = ".deleting-"


OnBlock = Callable[[], None]
"""Called after every block that was read or written, some tens of MiB: a sign of life."""


def untold() -> None:
    """For callers whom nobody waits for."""


class Unusable(Exception):
    """A stored file is missing, of the wrong size or kind, or unreadable; the message is one line."""


def write_file(path: Path, blocks: Iterable[bytes | memoryview], on_block: OnBlock = untold) -> FileEntry:
    """Write a new file, sync it to the disk and return its size and digest. Raises OSError, naming `path`."""
    digest = hashlib.sha256()
    size = 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            for block in blocks:
                view = memoryview(block)
                for begin in range(0, len(view), _BLOCK):
                    piece = view[begin : begin + _BLOCK]
                    digest.update(piece)
                    _write_all(descriptor, piece)
                    on_block()
                size += len(view)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Rename a folder out of sight, then delete it, so that nobody ever sees half of it. Raises OSError."""
    doomed = path.parent / f"{_DELETING}{path.name.lstrip('.')}-{secrets.token_hex(4)}"
    os.rename(path, doomed)
    _delete(doomed)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Delete what dead writers left below `folder`: half-deleted folders and those whose name begins with `prefix`."""
    with os.scandir(folder) as entries:
        leftovers = [Path(entry) for entry in entries if entry.name.startswith((_DELETING, prefix))]
    for path in leftovers:
        _delete(path)


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """A descriptor of a real folder. Raises Unusable for anything else, a symbolic link included."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if path.is_symlink():
            raise Unusable("is a symbolic link; name the folder itself") from error
        raise Unusable(f"cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_file(folder: int, name: str) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a regular file directly in `folder`; nothing is followed or waited for."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError as error:
        raise Unusable(f"{name} is missing") from error
    except OSError as error:
        raise Unusable(f"{name} cannot be opened as a plain file: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(f"{name} is not a plain file")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_into(descriptor: int, name: str, buffer: memoryview) -> None:
    """Fill `buffer` from the file. Raises Unusable where the file ends first or cannot be read."""
    done = 0
    while done < len(buffer):
        try:
            count = os.readv(descriptor, [buffer[done : done + _BLOCK]])
        except OSError as error:
            raise Unusable(f"{name} cannot be read: {error.strerror}") from error
        if count == 0:
            raise Unusable(f"{name} ends early")
        done += count


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]
