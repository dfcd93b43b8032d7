"""Writes a token store as a stream: memory does not grow with the text, only with the number of blocks."""

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from longtrain.data.manifest import (
    BLOCKS,
    DOCUMENTS,
    FORMAT,
    MANIFEST,
    ExamplesIndex,
    Index,
    Manifest,
    Recipe,
    Shard,
    encode_manifest,
)
from longtrain.data.tokenization import Tokenizer, token_dtype

BLOCK_TOKENS = 64 * 1024
"""Tokens that share a checksum: a rank reads at most this much beyond each end of its slice."""
BLOCKS_PER_SHARD = 1024
"""A shard is 128 MiB of uint16 or 256 MiB of uint32."""
_ROWS_PER_BATCH = 64 * 1024

DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
    ]
)
BLOCKS_SCHEMA = pa.schema([pa.field("crc32", pa.uint32(), nullable=False)])


def tokens_schema(dtype: np.dtype) -> pa.Schema:
    """The schema of a shard of tokens."""
    return pa.schema([pa.field("token", pa.from_numpy_dtype(dtype), nullable=False)])


class StoreWriter:
    """Fills an empty folder with a store. Nothing is a store until `finish` returns."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        block_tokens: int = BLOCK_TOKENS,
        blocks_per_shard: int = BLOCKS_PER_SHARD,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._blocks_per_shard = blocks_per_shard
        dtype = token_dtype(tokenizer.vocab_size)
        self._schema = tokens_schema(dtype)
        self._end = np.array([tokenizer.end_of_document], dtype)
        self._block = np.empty(block_tokens, dtype)
        self._filled = 0
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._crcs: list[int] = []
        self._tokens_hash = hashlib.sha256()
        self._lengths_hash = hashlib.sha256()
        self._shards: list[Shard] = []
        self._shard: ArrowFile | None = None
        self._documents = ArrowFile(folder / DOCUMENTS, DOCUMENTS_SCHEMA)
        self._rows: list[tuple[int, int, str]] = []
        self.num_tokens = 0
        self.num_documents = 0

    def add(self, tokens: np.ndarray, origin: str) -> None:
        """Append a document and its end-of-document token. A document without tokens is dropped.

        Raises OSError where the disk refuses.
        """
        if not len(tokens):
            return
        length = len(tokens) + 1
        self._rows.append((self.num_tokens, length, origin))
        if len(self._rows) == _ROWS_PER_BATCH:
            self._write_rows()
        self._append(tokens)
        self._append(self._end)
        self.num_tokens += length
        self.num_documents += 1

    def finish(self, recipe: Recipe, examples: ExamplesIndex | None = None) -> Manifest:
        """Write what is left, make all of it durable, and the manifest last. At least one document was added."""
        if self._filled:
            self._write_block()
        if self._shard is not None:
            self._close_shard()
        self._write_rows()
        documents = self._documents.close()
        blocks_file = ArrowFile(self._folder / BLOCKS, BLOCKS_SCHEMA)
        blocks_file.write([np.array(self._crcs, np.uint32)])
        blocks = blocks_file.close()
        manifest = Manifest(
            format=FORMAT,
            recipe=recipe,
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            dtype="uint16" if self._block.dtype.itemsize == 2 else "uint32",
            block_tokens=len(self._block),
            blocks_per_shard=self._blocks_per_shard,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            unigram_entropy=_entropy(self._counts),
            content=self._content(),
            shards=tuple(self._shards),
            documents=index_of(self._folder / DOCUMENTS, documents),
            blocks=index_of(self._folder / BLOCKS, blocks),
            examples=examples,
        )
        with (self._folder / MANIFEST).open("wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)
        return manifest

    def close(self) -> None:
        """Release the files of a store that was not finished; harmless after `finish`."""
        self._documents.release()
        if self._shard is not None:
            self._shard.release()

    def _append(self, tokens: np.ndarray) -> None:
        at = 0
        while at < len(tokens):
            count = min(len(tokens) - at, len(self._block) - self._filled)
            self._block[self._filled : self._filled + count] = tokens[at : at + count]
            self._filled += count
            at += count
            if self._filled == len(self._block):
                self._write_block()

    def _write_block(self) -> None:
        block = self._block[: self._filled]
        if self._shard is None:
            self._shard = ArrowFile(self._folder / f"tokens-{len(self._shards):05d}.arrow", self._schema)
        self._shard.write([block])
        self._crcs.append(zlib.crc32(block.data))
        self._tokens_hash.update(block.data)
        self._counts += np.bincount(block, minlength=len(self._counts))
        self._filled = 0
        if len(self._crcs) % self._blocks_per_shard == 0:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(Shard(self._shard.path.name, self._shard.close()))
        self._shard = None

    def _write_rows(self) -> None:
        if self._rows:
            offsets, lengths, origins = zip(*self._rows, strict=True)
            lengths_array = np.array(lengths, "<i8")
            self._lengths_hash.update(lengths_array.data)
            self._documents.write([np.array(offsets, np.int64), lengths_array, pa.array(origins, pa.string())])
            self._rows.clear()

    def _content(self) -> str:
        head = f"{FORMAT} {self._tokenizer.fingerprint} {self._block.dtype.str}".encode()
        return hashlib.sha256(head + self._tokens_hash.digest() + self._lengths_hash.digest()).hexdigest()


class ArrowFile:
    """An Arrow IPC file that is durable once it is closed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._schema = schema
        self._file = path.open("xb")
        self._writer = pa.ipc.new_file(self._file, schema, options=pa.ipc.IpcWriteOptions(compression=None))

    def write(self, columns: list[np.ndarray | pa.Array]) -> None:
        self._writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=self._schema))

    def close(self) -> int:
        """Bytes of the file."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return size

    def release(self) -> None:
        """Give the file up as it is."""
        # On a full disk, flushing raises once more.
        with contextlib.suppress(OSError):
            self._file.close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_of(path: Path, size: int) -> Index:
    """The size in bytes and the digest of a file that is read whole."""
    with path.open("rb") as file:
        return Index(size, hashlib.file_digest(file, "sha256").hexdigest())


def _entropy(counts: np.ndarray) -> float:
    """Nats per token of the distribution with these counts [vocab_size]."""
    probabilities = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(probabilities * np.log(probabilities)).sum()))
