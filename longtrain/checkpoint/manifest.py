"""What `manifest.json` of a checkpoint says, and the checks before any of it is believed.

`manifest.sha256` beside it holds the digest of its bytes in the format of coreutils: they are checked before they
are parsed, no canonical form of JSON is needed, and `sha256sum -c manifest.sha256` checks it anywhere.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
MAX_MANIFEST_BYTES = 64 * 2**20
RESERVED_NAME = "__metadata__"
"""The one name that safetensors keeps for itself."""

_STRICT = ConfigDict(extra="forbid", strict=True)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types by their safetensors names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Count = Annotated[int, Field(ge=0, lt=2**63)]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5}-of-[0-9]{5}\.safetensors$")]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    __pydantic_config__ = _STRICT

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it looks like; `dtype` is a key of `DTYPES`."""

    __pydantic_config__ = _STRICT

    shard: ShardName
    shape: Annotated[tuple[Count, ...], Field(max_length=16)]
    dtype: Literal[*DTYPES]  # type: ignore[valid-type]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint. `metadata` is the caller's JSON object."""

    __pydantic_config__ = _STRICT

    format: Literal["longtrain-checkpoint"]
    version: Literal[1]
    step: Count
    world_size: Annotated[int, Field(ge=1, le=99999)]
    tensors: Annotated[dict[str, TensorEntry], Field(max_length=10**6)]
    files: dict[ShardName, FileEntry]
    metadata: dict[str, Any]

    def shard(self, name: str) -> dict[str, TensorEntry]:
        """The tensors that a shard holds."""
        return {tensor: entry for tensor, entry in self.tensors.items() if entry.shard == name}


_ADAPTER = TypeAdapter(Manifest)


def shard_name(rank: int, world_size: int) -> str:
    """File name of the share of `rank`, counted from 0."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def tensor_entry(tensor: torch.Tensor, shard: str) -> TensorEntry:
    """Describe a tensor. Raises TypeError for an element type that safetensors does not have."""
    if tensor.dtype not in _NAMES:
        raise TypeError(f"a checkpoint cannot hold {tensor.dtype} tensors")
    return TensorEntry(shard=shard, shape=tuple(tensor.shape), dtype=_NAMES[tensor.dtype])


def encode(manifest: Manifest) -> tuple[bytes, bytes]:
    """Bytes of `manifest.json` and of `manifest.sha256`.

    Raises TypeError or ValueError for metadata that a later `decode` would not take: not JSON, too big, too deep.
    """
    data = json.dumps(asdict(manifest), allow_nan=False, indent=1).encode() + b"\n"
    seal = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()
    decode(data, seal)
    return data, seal


def decode(data: bytes, seal: bytes) -> Manifest:
    """Check and parse a manifest. Raises ValueError with one line."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    if seal != f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode():
        raise ValueError(f"{MANIFEST} does not have the digest that {SEAL} says")
    try:
        manifest = _ADAPTER.validate_json(data)  # bounds the nesting itself
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{MANIFEST}: {place[:120]!r}: {first['msg'][:200].splitlines()[0]}") from None
    expected = {shard_name(rank, manifest.world_size) for rank in range(manifest.world_size)}
    if set(manifest.files) != expected:
        raise ValueError(f"{MANIFEST}: it does not list the {manifest.world_size} shards of its world size")
    if RESERVED_NAME in manifest.tensors:
        raise ValueError(f"{MANIFEST}: {RESERVED_NAME!r} is not a name that a tensor can have")
    for name, entry in manifest.tensors.items():
        if entry.shard not in expected:
            raise ValueError(f"{MANIFEST}: tensor {name[:120]!r} is in {entry.shard}, which it does not list")
    return manifest
