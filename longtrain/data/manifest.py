"""The manifest of a token store: what it holds, what it was made from, and the digests of its index.

A store is a folder:

* `tokens-00000.arrow`, ...: Arrow IPC files, uncompressed, one column of uint16 or uint32; a record batch is a block
  of `block_tokens` tokens, the last block of all may be shorter. Documents lie end to end, each with its
  end-of-document token, and may cross blocks and shards.
* `documents.arrow`: offset (in tokens), length (with the end-of-document token) and origin of each document.
* `blocks.arrow`: the CRC-32 of each block.
* `examples.arrow` and `token_values.arrow`, where the documents are completions of prompts: see
  `longtrain.data.examples`.
* `manifest.json`: written last, so that a folder without it is no store.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longtrain.core.errors import CorruptData, Refused

MANIFEST = "manifest.json"
DOCUMENTS = "documents.arrow"
BLOCKS = "blocks.arrow"
EXAMPLES = "examples.arrow"
TOKEN_VALUES = "token_values.arrow"
FORMAT: Literal["longtrain-tokens-1"] = "longtrain-tokens-1"
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)
"""What pyarrow raises for files that are not what they should be."""

_PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[int, Field(gt=0, lt=2**62)]


@dataclass(frozen=True)
class Recipe:
    """What a store is made from. Two equal recipes give the same tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: str
    options: dict[str, Any]
    """The source's own options; paths are left out, the files that they lead to are in `inputs`."""
    tokenizer: str
    """As the configuration spells it; for messages alone."""
    tokenizer_fingerprint: _Digest
    inputs: _Digest
    """Over the names, sizes and modification times of the input files."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything but the tokenizer's spelling."""
        return _sha256_json({key: value for key, value in asdict(self).items() if key != "tokenizer"})


@dataclass(frozen=True)
class Shard:
    """A file of tokens. `name` is a plain file name: no folder, no `..`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _PlainName
    size: _Positive


@dataclass(frozen=True)
class Index:
    """A file that is read whole when the store is opened."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    size: _Positive
    sha256: _Digest


@dataclass(frozen=True)
class ExamplesIndex(Index):
    """What is known of examples beside their tokens."""

    content: _Digest
    """Over all of it: equal examples have equal digests, whoever prepared them."""
    values: tuple[_PlainName, ...]
    """Columns with a number for each document."""
    token_values: tuple[_PlainName, ...]
    """Columns with a number for each predicted token."""
    token_values_size: Annotated[int, Field(ge=0)]
    """Of the file that holds them; 0 where there are none."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Counts include the end-of-document tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal["longtrain-tokens-1"]
    recipe: Recipe
    vocab_size: _Positive
    end_of_document: Annotated[int, Field(ge=0)]
    dtype: Literal["uint16", "uint32"]
    block_tokens: _Positive
    blocks_per_shard: _Positive
    num_tokens: _Positive
    num_documents: _Positive
    unigram_entropy: Annotated[float, Field(ge=0)]
    """Nats per token."""
    content: _Digest
    """Over all tokens and document lengths: equal stores have equal digests, whoever prepared them."""
    shards: tuple[Shard, ...]
    documents: Index
    blocks: Index
    examples: ExamplesIndex | None = None
    """None where the documents are plain text."""

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_tokens)


_ADAPTER = TypeAdapter(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The text of `manifest.json`, with a digest over itself."""
    body = asdict(manifest)
    return json.dumps({"manifest": body, "sha256": _sha256_json(body)}, indent=1, ensure_ascii=True).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of the store `folder`.

    Raises Refused where there is no store, and CorruptData where the manifest is missing, damaged or of another
    format.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise Refused(f"no token store at {folder}; run `longtrain prepare` with the same settings") from None
        if any(folder.glob("tokens-*.arrow")):
            raise CorruptData(f"{path} is missing; {remedy(folder)}") from None
        raise Refused(f"data.store={folder} is a folder but no token store; set data.store to a new folder") from None
    except OSError as error:
        raise Refused(
            f"{path}: cannot be read ({error.strerror}); make it readable or choose another data.store"
        ) from None
    try:
        outer = json.loads(data)
        body = outer["manifest"]
        if _sha256_json(body) != outer["sha256"]:
            raise CorruptData(f"{path} does not match its digest; {remedy(folder)}")
        if body["format"] != FORMAT:
            raise CorruptData(f"{path} has format {str(body['format'])[:40]}, not {FORMAT}; {remedy(folder)}")
        return _ADAPTER.validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptData(f"{path}: {where}: {first['msg']}; {remedy(folder)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptData(f"{path} is not a manifest; {remedy(folder)}") from None


def remedy(folder: Path) -> str:
    """What to do about a damaged store."""
    return f"delete {folder} and run `longtrain prepare`"


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
