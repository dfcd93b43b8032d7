"""One shard: a safetensors file whose every byte before the tensors follows from the manifest.

safetensors is a length, a JSON header and little-endian elements. The file is written and read here and not by the
library, for three reasons: errors of the disk keep their number, digests are computed while the bytes pass, with no
second copy of the tensors in memory, and a reader knows the header beforehand, so that it compares instead of parsing.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from longtrain.checkpoint.files import OnBlock, Unusable, open_file, read_into, untold, write_file
from longtrain.checkpoint.manifest import DTYPES, FileEntry, TensorEntry, tensor_entry

_BLOCK = 16 * 2**20


def partition(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Share tensors of `sizes` bytes over `parts`, biggest first, each to the part that has least.

    A pure function of names and sizes, so that ranks need not talk. The fullest part exceeds the mean by at most one
    tensor.
    """
    shares: list[list[str]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        part = loads.index(min(loads))
        shares[part].append(name)
        loads[part] += sizes[name]
    return shares


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], on_block: OnBlock = untold) -> FileEntry:
    """Write tensors (any device, any strides) to a new synced file. Raises OSError, naming `path`."""
    entries = {name: tensor_entry(tensor, path.name) for name, tensor in tensors.items()}

    def blocks() -> Iterator[bytes | memoryview]:
        yield _header(entries)
        for name in _order(entries):
            if tensors[name].numel():
                yield _bytes_of(tensors[name].detach().cpu().contiguous())

    return write_file(path, blocks(), on_block)


def read_shard(
    folder: int, name: str, file: FileEntry, entries: Mapping[str, TensorEntry], on_block: OnBlock = untold
) -> dict[str, torch.Tensor]:
    """Read the tensors of one shard to the CPU and check all its bytes. Raises Unusable: nothing may be used then."""
    with _checked(folder, name, file, entries) as (descriptor, digest):
        tensors = {}
        for tensor in _order(entries):
            entry = entries[tensor]
            tensors[tensor] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            if entry.nbytes:
                view = _bytes_of(tensors[tensor])
                read_into(descriptor, name, view)
                digest.update(view)
                on_block()
        return tensors


def check_shard(
    folder: int, name: str, file: FileEntry, entries: Mapping[str, TensorEntry], on_block: OnBlock = untold
) -> None:
    """Check all bytes of one shard without keeping them. Raises Unusable."""
    with _checked(folder, name, file, entries) as (descriptor, digest):
        remaining = sum(entry.nbytes for entry in entries.values())
        buffer = memoryview(bytearray(min(_BLOCK, remaining)))
        while remaining:
            view = buffer[: min(_BLOCK, remaining)]
            read_into(descriptor, name, view)
            digest.update(view)
            remaining -= len(view)
            on_block()


@contextlib.contextmanager
def _checked(
    folder: int, name: str, file: FileEntry, entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[int, "hashlib._Hash"]]:
    """Open a shard, sizes and header checked; the digest is checked when the caller has read and hashed the rest."""
    header = _header(entries)
    needed = len(header) + sum(entry.nbytes for entry in entries.values())
    with open_file(folder, name) as (descriptor, size):
        if size != file.bytes:
            raise Unusable(f"{name} has {size} bytes, not {file.bytes}")
        if size != needed:
            raise Unusable(f"{name} has {size} bytes, but its tensors need {needed}")
        stored = bytearray(len(header))
        read_into(descriptor, name, memoryview(stored))
        if stored != header:
            raise Unusable(f"{name} has another header than its tensors need")
        digest = hashlib.sha256(stored)
        yield descriptor, digest
        if digest.hexdigest() != file.sha256:
            raise Unusable(f"{name} does not have its SHA-256 digest; its bytes were changed")


def _order(entries: Mapping[str, TensorEntry]) -> list[str]:
    """Order in the file: wide elements first, so that each tensor is aligned to its element size."""
    return sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype].itemsize, name))


def _header(entries: Mapping[str, TensorEntry]) -> bytes:
    fields: dict[str, dict[str, object]] = {}
    begin = 0
    for name in _order(entries):
        entry = entries[name]
        end = begin + entry.nbytes
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
