"""Whether one stored checkpoint is good: every byte of every file against the manifest, and the manifest itself."""

import re
from pathlib import Path
from typing import Any

import torch

from longtrain.checkpoint.files import OnBlock, Unusable, open_file, open_folder, read_into, untold
from longtrain.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, SEAL, Manifest, decode
from longtrain.checkpoint.shard import check_shard, read_shard
from longtrain.core.errors import CorruptCheckpoint

_FOLDER = re.compile(r"step-(\d{8,})")
_MAX_SEAL_BYTES = 4096


def folder_name(step: int) -> str:
    """`step-00000020`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name says, None for any other name."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def verify(path: Path) -> list[str]:
    """Problems of the checkpoint in `path`, one line each, none when it is good. Reads every byte; raises nothing."""
    return inspect(path)[1]


def inspect(path: Path, on_block: OnBlock = untold) -> tuple[Manifest | None, list[str]]:
    """The manifest, if it can be believed, and the problems that `verify` reports."""
    problems = []
    try:
        with open_folder(path) as folder:
            manifest = _read_manifest(folder, path.name)
            for name, file in manifest.files.items():
                try:
                    check_shard(folder, name, file, manifest.shard(name), on_block)
                except Unusable as problem:
                    problems.append(str(problem))
            return manifest, problems
    except Unusable as problem:
        return None, [str(problem)]


def read_metadata(path: Path) -> dict[str, Any]:
    """What was stored beside the tensors; of these nothing is read. Raises CorruptCheckpoint."""
    try:
        with open_folder(path) as folder:
            return _read_manifest(folder, path.name).metadata
    except Unusable as problem:
        raise CorruptCheckpoint(f"checkpoint {path}: {problem}") from problem


def read(path: Path, on_block: OnBlock = untold, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, on the CPU.

    Raises CorruptCheckpoint, before any tensor is handed out, for anything that is not as saved, of any tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with open_folder(path) as folder:
            manifest = _read_manifest(folder, path.name)
            for name, file in manifest.files.items():
                shard = read_shard(folder, name, file, manifest.shard(name), on_block)
                tensors |= {key: tensor for key, tensor in shard.items() if key.startswith(prefix)}
    except Unusable as problem:
        raise CorruptCheckpoint(f"checkpoint {path}: {problem}") from problem
    return {name: tensors[name] for name in manifest.tensors if name.startswith(prefix)}


def _read_manifest(folder: int, folder_named: str) -> Manifest:
    seal = _read_small(folder, SEAL, _MAX_SEAL_BYTES)
    data = _read_small(folder, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = decode(data, seal)
    except ValueError as error:
        raise Unusable(str(error)) from error
    named = step_of(folder_named)
    if named is not None and named != manifest.step:
        raise Unusable(f"{MANIFEST} is of step {manifest.step}, not {named}")
    return manifest


def _read_small(folder: int, name: str, limit: int) -> bytes:
    with open_file(folder, name) as (descriptor, size):
        if size > limit:
            raise Unusable(f"{name} has {size} bytes, more than {limit}")
        buffer = bytearray(size)
        read_into(descriptor, name, memoryview(buffer))
        return bytes(buffer)
