"""Reads a token store: memory-mapped, and each block's checksum verified once, when it is first touched."""

import hashlib
import os
import stat
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa

from longtrain.core.errors import CorruptData
from longtrain.data.examples import Examples, examples_schema
from longtrain.data.manifest import BLOCKS, DOCUMENTS, EXAMPLES, TOKEN_VALUES, UNREADABLE, Index, read_manifest, remedy
from longtrain.data.writer import BLOCKS_SCHEMA, DOCUMENTS_SCHEMA, tokens_schema

_CACHED_BLOCKS = 4096
"""Views of blocks that are kept: a few hundred bytes each, the tokens stay in the page cache."""


class TokenStore:
    """An open store.

    Opening reads the manifest and the index, not the tokens, and checks that every shard is there with its size.
    """

    def __init__(self, folder: Path) -> None:
        """Raises Refused where there is no store, CorruptData (naming the file) where it is damaged."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._schema = tokens_schema(self._dtype)
        self._check_shards()
        self._documents = self._read_index(DOCUMENTS, self.manifest.documents, DOCUMENTS_SCHEMA)
        blocks = self._read_index(BLOCKS, self.manifest.blocks, BLOCKS_SCHEMA)
        self.offsets: np.ndarray = self._documents["offset"].to_numpy()
        """int64 [num_documents]: the token at which each document begins."""
        self.lengths: np.ndarray = self._documents["length"].to_numpy()
        """int64 [num_documents]: tokens of each document, with its end-of-document token; at least 2."""
        self._crcs: np.ndarray = blocks["crc32"].to_numpy()
        self._check_index()
        self.examples: Examples | None = self._read_examples()
        """None where the documents are plain text."""
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._views: dict[int, np.ndarray] = {}
        self._verified = np.zeros(self.manifest.num_blocks, bool)

    @property
    def verified_blocks(self) -> list[int]:
        """The blocks that were read so far."""
        return np.flatnonzero(self._verified).tolist()

    def origin(self, document: int) -> str:
        """Where a document came from."""
        return self._documents["origin"][document].as_py()

    def read_into(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` [n] with the tokens [begin, begin + n) of the store; only their blocks are touched.

        Raises CorruptData for a block that is unreadable or does not match its checksum.
        """
        assert begin >= 0 and begin + len(out) <= self.manifest.num_tokens
        block_tokens = self.manifest.block_tokens
        at = 0
        while at < len(out):
            block, first = divmod(begin + at, block_tokens)
            count = min(len(out) - at, block_tokens - first)
            out[at : at + count] = self._view(block)[first : first + count]
            at += count

    def _view(self, block: int) -> np.ndarray:
        view = self._views.get(block)
        if view is None:
            if len(self._views) >= _CACHED_BLOCKS:
                self._views.clear()
            view = self._views[block] = self._open_block(block)
        return view

    def _open_block(self, block: int) -> np.ndarray:
        shard, index = divmod(block, self.manifest.blocks_per_shard)
        expected = min(self.manifest.block_tokens, self.manifest.num_tokens - block * self.manifest.block_tokens)
        path = self.folder / self.manifest.shards[shard].name
        try:
            if shard not in self._readers:
                self._readers[shard] = pa.ipc.open_file(pa.memory_map(str(path)))
            reader = self._readers[shard]
            if not reader.schema.equals(self._schema):
                raise ValueError("another schema")
            batch = reader.get_batch(index)
            batch.validate(full=True)
            column = batch.column(0)
            if len(column) != expected or column.null_count:
                raise ValueError("another number of tokens")
            tokens = column.to_numpy(zero_copy_only=True)
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._corrupt(path.name, f"block {index} is unreadable ({reason[:120]})")
        if not self._verified[block]:
            if zlib.crc32(tokens) != self._crcs[block]:
                self._corrupt(path.name, f"block {index} does not match its checksum")
            self._verified[block] = True
        return tokens

    def _check_shards(self) -> None:
        manifest = self.manifest
        if len(manifest.shards) != -(-manifest.num_blocks // manifest.blocks_per_shard):
            self._corrupt("manifest.json", f"{len(manifest.shards)} shards for {manifest.num_blocks} blocks")
        for shard in manifest.shards:
            self._check_size(shard.name, shard.size)

    def _check_size(self, name: str, expected: int) -> None:
        try:
            status = os.lstat(self.folder / name)
        except OSError as error:
            self._corrupt(name, f"is missing or unreadable ({error.strerror})")
        # A link could lead anywhere: a store is read below its folder only.
        if not stat.S_ISREG(status.st_mode):
            self._corrupt(name, "is not a regular file")
        if status.st_size != expected:
            self._corrupt(name, f"has {status.st_size} bytes, not {expected}")

    def _read_index(self, name: str, index: Index, schema: pa.Schema) -> pa.Table:
        self._check_size(name, index.size)
        try:
            with pa.memory_map(str(self.folder / name)) as source:
                data = source.read_buffer()
            if hashlib.sha256(data).hexdigest() != index.sha256:
                self._corrupt(name, "does not match its digest")
            table = pa.ipc.open_file(data).read_all()
            table.validate(full=True)
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._corrupt(name, f"is unreadable ({reason[:120]})")
        if not table.schema.equals(schema):
            self._corrupt(name, "has another schema")
        return table

    def _read_examples(self) -> Examples | None:
        index = self.manifest.examples
        if index is None:
            return None
        table = self._read_index(EXAMPLES, index, examples_schema(index.values))
        if index.token_values:
            self._check_size(TOKEN_VALUES, index.token_values_size)
        try:
            return Examples(self.folder, table, index.token_values, self.lengths)
        except UNREADABLE as error:
            self._corrupt(EXAMPLES, f"is unreadable ({error})")

    def _check_index(self) -> None:
        # Digests guard against accidents; these keep a forged index from leading a read astray.
        manifest = self.manifest
        if len(self._crcs) != manifest.num_blocks:
            self._corrupt(BLOCKS, f"lists {len(self._crcs)} blocks, not {manifest.num_blocks}")
        ends = np.cumsum(self.lengths)
        good = (
            len(self.lengths) == manifest.num_documents
            and bool((self.lengths >= 2).all())
            and ends[-1] == manifest.num_tokens
            and np.array_equal(ends - self.lengths, self.offsets)
        )
        if not good:
            self._corrupt(DOCUMENTS, "does not lay the documents end to end")

    def _corrupt(self, name: str, problem: str) -> NoReturn:
        raise CorruptData(f"{self.folder / name}: {problem}; {remedy(self.folder)}")
