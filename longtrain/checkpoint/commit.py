"""What rank 0 alone does to the folder of checkpoints: begin, commit or undo a save, list, retain."""

import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from longtrain.checkpoint.files import remove_folder, remove_leftovers, sync_folder, write_file
from longtrain.checkpoint.manifest import MANIFEST, SEAL, Manifest, encode
from longtrain.checkpoint.verify import folder_name, step_of, verify
from longtrain.core.errors import Refused

_SAVING = ".saving-"


def committed(directory: Path) -> list[Path]:
    """Everything named like a checkpoint, newest step first, good or not. Raises OSError."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    steps = sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)
    return [directory / folder_name(step) for step in steps]


def checkpoints_in(directory: Path) -> list[Path]:
    """`committed`. Raises Refused where the folder cannot be listed."""
    try:
        return committed(directory)
    except OSError as error:
        raise Refused(f"checkpoints in {directory} cannot be listed: {error.strerror}; make it readable") from error


def begin(target: Path) -> str | None:
    """Make the hidden folder of a save and return its name; None where a good `target` is there. Raises OSError.

    Leftovers of dead writers go; their names are never reused, so that a writer thought dead cannot reach this save.
    """
    directory = target.parent
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True)
        sync_folder(directory.parent)
    if os.path.lexists(target) and not verify(target):
        return None
    remove_leftovers(directory, _SAVING)
    name = f"{_SAVING}{target.name}-{secrets.token_hex(4)}"
    os.mkdir(directory / name, 0o700)
    return name


def commit(temporary: Path, target: Path, manifest: Manifest) -> None:
    """Give a hidden folder of synced shards its manifest and its name. Raises OSError: nothing is visible then."""
    data, seal = encode(manifest)
    write_file(temporary / MANIFEST, [data])
    write_file(temporary / SEAL, [seal])
    sync_folder(temporary)
    if os.path.lexists(target):
        remove_folder(target)  # `begin` found it corrupt
    os.rename(temporary, target)
    try:
        sync_folder(target.parent)
    except OSError:
        os.rename(target, temporary)
        raise


def undo(temporary: Path) -> None:
    """Remove a hidden folder as far as the file system lets us; the next save removes the rest."""
    shutil.rmtree(temporary, ignore_errors=True)


def retain(saved: Path, keep: int, corrupt: Collection[Path]) -> None:
    """Delete all but the newest `keep` checkpoints after `saved` was committed.

    Those known to be corrupt do not count and go too: the run went on without them, and a disk that recovers must not
    bring back a state that the ledger has left. What cannot be deleted now is deleted after the next save.
    """
    try:
        good = [path for path in committed(saved.parent) if path not in corrupt]
        spared = {saved, *good[:keep]}
        for path in committed(saved.parent):
            if path not in spared:
                remove_folder(path)
    except OSError:
        pass
