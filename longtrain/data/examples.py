"""Examples in a token store: their completions as documents, and what else is known of each in two files.

A row of `examples.arrow` is a document: the number of its example, the tokens of its prompt, how many tokens behind
them are predicted, and its values. The file is read whole when the store is opened. A row of `token_values.arrow` holds
lists with a number for each predicted token of a document, in batches of the same rows; they are read, and compared
with the CRC-32 in `examples.arrow`, when they are first touched.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtrain.core.errors import CorruptData, Refused
from longtrain.data.manifest import EXAMPLES, TOKEN_VALUES, UNREADABLE, ExamplesIndex, remedy
from longtrain.data.records import shown
from longtrain.data.source import LEAST_LOG_PROB, Completion, Example
from longtrain.data.tokenization import Tokenizer, token_dtype
from longtrain.data.writer import ArrowFile, StoreWriter, index_of

_OPEN_BATCHES = 4096
"""A few hundred bytes each: the numbers stay in the page cache."""
_FIXED = ("example", "prompt", "predicted", "crc32")


def examples_schema(values: Iterable[str]) -> pa.Schema:
    """Of `examples.arrow`."""
    fixed = [pa.field(name, pa.int64(), nullable=False) for name in _FIXED]
    return pa.schema([*fixed, *(pa.field(name, pa.float64(), nullable=False) for name in values)])


def token_values_schema(names: Iterable[str]) -> pa.Schema:
    """Of `token_values.arrow`."""
    return pa.schema([pa.field(name, pa.large_list(pa.float32()), nullable=False) for name in names])


class Examples:
    """What is known of documents beside their tokens; int64 [num_documents]."""

    def __init__(self, folder: Path, table: pa.Table, token_values: Sequence[str], lengths: np.ndarray) -> None:
        """`table` is `examples.arrow` of the store `folder`; `lengths` are tokens of the documents.

        Raises ValueError where they differ.
        """
        self.example, self.prompt, self.predicted, crcs = (table[name].to_numpy() for name in _FIXED)
        self.values: dict[str, np.ndarray] = {
            name: table[name].to_numpy() for name in table.schema.names if name not in _FIXED
        }
        """float64 [num_documents] by name."""
        self.columns: tuple[str, ...] = (*self.values, *token_values)
        """Names of all values."""
        self._check(lengths)
        ends = np.cumsum([len(batch) for batch in table["example"].chunks])
        self._token_values = _TokenValues(folder, token_values, ends, self.predicted, crcs)

    def token_values(self, document: int) -> dict[str, np.ndarray]:
        """float32 [predicted] of a document, by name. Raises CorruptData where they are unreadable or damaged."""
        return self._token_values.read(document)

    def _check(self, lengths: np.ndarray) -> None:
        # Digests guard against accidents; this keeps a forged file from leading a read astray.
        steps = np.diff(self.example, prepend=0)
        good = (
            len(self.example) == len(lengths)
            and bool(((steps == 0) | (steps == 1)).all())
            and self.example[0] == 0
            and bool((self.prompt >= 1).all() and (self.predicted >= 1).all())
            and bool((self.prompt + self.predicted <= lengths).all())
        )
        if not good:
            raise ValueError("it does not fit the documents")


class _TokenValues:
    """`token_values.arrow`, memory-mapped: its record batches are opened, and its rows verified, when first touched."""

    def __init__(
        self, folder: Path, names: Sequence[str], ends: np.ndarray, predicted: np.ndarray, crcs: np.ndarray
    ) -> None:
        """Batch n holds the documents [ends[n - 1], ends[n]), as that of `examples.arrow` does."""
        self._folder, self._schema = folder, token_values_schema(names)
        self._bounds, self._predicted, self._crcs = [0, *ends.tolist()], predicted, crcs
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._batches: dict[int, pa.RecordBatch] = {}
        self._verified = np.zeros(len(crcs), bool)

    def read(self, document: int) -> dict[str, np.ndarray]:
        if not self._schema.names:
            return {}
        number = bisect_right(self._bounds, document) - 1
        row = document - self._bounds[number]
        try:
            batch = self._batch(number)
            found = {name: batch[name][row].values.to_numpy() for name in self._schema.names}
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._corrupt(f"batch {number} is unreadable ({reason[:120]})")
        if not self._verified[document]:
            if _checksum(found.values()) != self._crcs[document]:
                self._corrupt(f"row {row} of batch {number} does not match its checksum")
            self._verified[document] = True
        return found

    def _batch(self, number: int) -> pa.RecordBatch:
        if number not in self._batches:
            if self._reader is None:
                self._reader = pa.ipc.open_file(pa.memory_map(str(self._folder / TOKEN_VALUES)))
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
            predicted = self._predicted[self._bounds[number] : self._bounds[number + 1]]
            if not batch.schema.equals(self._schema) or not all(
                np.array_equal(pc.list_value_length(column).to_numpy(), predicted) for column in batch.columns
            ):
                raise ValueError("it does not fit the documents")
            if len(self._batches) >= _OPEN_BATCHES:
                self._batches.clear()
            self._batches[number] = batch
        return self._batches[number]

    def _corrupt(self, problem: str) -> NoReturn:
        raise CorruptData(f"{self._folder / TOKEN_VALUES}: {problem}; {remedy(self._folder)}")


class ExamplesWriter:
    """Adds examples to a store that is being written."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, documents: StoreWriter, fields: Mapping[str, str] | None = None
    ) -> None:
        """`fields` has what a value is called in the rows, where that is not its name."""
        self._folder, self._tokenizer, self._documents, self._fields = folder, tokenizer, documents, fields or {}
        self._file: ArrowFile | None = None
        self._lists: ArrowFile | None = None
        self._columns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._content = hashlib.sha256()
        self._count = 0

    def add(self, batch: list[Example]) -> None:
        """Append examples. Raises Refused, naming the row, for one that cannot be used, OSError for a full disk."""
        given = [part for e in batch for c in e.completions for part in (c.prompt, c.completion)]
        texts = dict.fromkeys(part for part in given if isinstance(part, str))
        ids = dict(zip(texts, self._tokenizer.encode(list(texts)), strict=True))
        rows, lists = [], []
        for example in batch:
            for completion in example.completions:
                row, own = self._add(completion, example, ids)
                rows.append(row)
                lists.append(own)
                # By row: how examples are batched says nothing about them.
                self._content.update(b"".join(part.tobytes() for part in (*row, *own)))
            self._count += 1
        assert self._file is not None
        self._file.write([np.concatenate(parts) for parts in zip(*rows, strict=True)])
        if self._lists is not None:
            self._lists.write([_large_list(parts) for parts in zip(*lists, strict=True)])

    def finish(self) -> ExamplesIndex | None:
        """Make the file durable; None where nothing was added."""
        if self._file is None:
            return None
        index = index_of(self._folder / EXAMPLES, self._file.close())
        size = self._lists.close() if self._lists is not None else 0
        return ExamplesIndex(index.size, index.sha256, self._content.hexdigest(), *self._columns, size)

    def close(self) -> None:
        """Release files that were not finished; harmless after `finish`."""
        for file in (self._file, self._lists):
            if file is not None:
                file.release()

    def _add(
        self, completion: Completion, example: Example, ids: Mapping[str, np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Its row of either file, an array for each column."""
        prompt, answer = (self._tokens(t, ids, example.place) for t in (completion.prompt, completion.completion))
        predicted = len(answer) + isinstance(completion.completion, str)
        if not len(prompt) or not predicted:
            part = "completion" if len(prompt) else "prompt"
            raise Refused(f"{example.place}: the {part} has no token; give it at least one, or remove the row")
        values = {**completion.values}
        for name, total in completion.totals.items():
            values[name] = total / predicted
            if values[name] <= LEAST_LOG_PROB:
                raise Refused(
                    f"{example.place}: {total:g} in {self._fields.get(name, name)} is no log-probability of "
                    f"{predicted} tokens, which is above {LEAST_LOG_PROB:g} for each; mend the row or remove it"
                )
        columns = tuple(values), tuple(completion.token_values)
        if self._file is None:
            self._columns = columns
            self._content.update(repr(columns).encode())
            self._file = ArrowFile(self._folder / EXAMPLES, examples_schema(columns[0]))
            if columns[1]:
                self._lists = ArrowFile(self._folder / TOKEN_VALUES, token_values_schema(columns[1]))
        if columns != self._columns:
            has, first = (
                ", ".join(self._fields.get(name, name) for name in sum(names, ())) or "none"
                for names in (columns, self._columns)
            )
            raise Refused(
                f"{example.place}: has the values {has}, but earlier rows have {first}; give all rows the same"
            )
        for name, numbers in completion.token_values.items():
            if len(numbers) != predicted:
                ending = " and its end of document" if isinstance(completion.completion, str) else ""
                raise Refused(
                    f"{example.place}: {len(numbers)} numbers in '{name}', where {predicted} are needed; give one for "
                    f"each token of the completion{ending}"
                )
        self._documents.add(np.concatenate([prompt, answer]), example.origin)
        lists = [np.array(numbers, np.float32) for numbers in completion.token_values.values()]
        fixed = [np.array([n], np.int64) for n in (self._count, len(prompt), predicted, _checksum(lists))]
        return [*fixed, *(np.array([value], np.float64) for value in values.values())], lists

    def _tokens(self, given: str | list[int], ids: Mapping[str, np.ndarray], place: str) -> np.ndarray:
        if isinstance(given, str):
            return ids[given]
        bound = self._tokenizer.vocab_size
        wrong = next((token for token in given if not 0 <= token < bound), None)
        if wrong is not None:
            raise Refused(f"{place}: {shown(wrong)} is no token id of data.tokenizer, which has {bound}; mend the row")
        return np.array(given, token_dtype(bound))


def _checksum(lists: Iterable[np.ndarray]) -> int:
    crc = 0
    for numbers in lists:
        crc = zlib.crc32(numbers.data, crc)
    return crc


def _large_list(parts: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, parts)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(parts)))
