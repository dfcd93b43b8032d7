"""Examples in a token store: their completions as documents, and what else is known of each in `examples.arrow`.

A row of that file is a document: the number of its example, the tokens of its prompt, how many tokens behind them are
predicted, and its values: a number for the document, or one for each predicted token. The file is read whole when the
store is opened, which maps it into memory.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtrain.core.errors import Refused
from longtrain.data.manifest import EXAMPLES, ExamplesIndex
from longtrain.data.records import shown
from longtrain.data.source import LEAST_LOG_PROB, Completion, Example
from longtrain.data.tokenization import Tokenizer, token_dtype
from longtrain.data.writer import ArrowFile, StoreWriter, index_of

_FIXED = ("example", "prompt", "predicted")


def examples_schema(values: Iterable[str], token_values: Iterable[str]) -> pa.Schema:
    """Of `examples.arrow`."""
    fixed = [pa.field(name, pa.int64(), nullable=False) for name in _FIXED]
    of_documents = [pa.field(name, pa.float64(), nullable=False) for name in values]
    of_tokens = [pa.field(name, pa.large_list(pa.float32()), nullable=False) for name in token_values]
    return pa.schema([*fixed, *of_documents, *of_tokens])


class Examples:
    """The rows of `examples.arrow`, by document; int64 [num_documents]."""

    def __init__(self, table: pa.Table, lengths: np.ndarray) -> None:
        """`table` has the schema above; `lengths` are tokens of the documents. Raises ValueError where they differ."""
        self.example, self.prompt, self.predicted = (table[name].to_numpy() for name in _FIXED)
        kinds = {field.name: field.type for field in table.schema if field.name not in _FIXED}
        lists = {name for name, kind in kinds.items() if pa.types.is_large_list(kind)}
        self.values: dict[str, np.ndarray] = {name: table[name].to_numpy() for name in kinds if name not in lists}
        """float64 [num_documents] by name."""
        self._lists = {name: table[name] for name in kinds if name in lists}
        self._check(lengths)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all values."""
        return (*self.values, *self._lists)

    def token_values(self, document: int) -> dict[str, np.ndarray]:
        """float32 [predicted] of a document, by name."""
        return {name: column[document].values.to_numpy() for name, column in self._lists.items()}

    def _check(self, lengths: np.ndarray) -> None:
        # Digests guard against accidents; this keeps a forged file from leading a read astray.
        steps = np.diff(self.example, prepend=0)
        good = (
            len(self.example) == len(lengths)
            and bool(((steps == 0) | (steps == 1)).all())
            and self.example[0] == 0
            and bool((self.prompt >= 1).all() and (self.predicted >= 1).all())
            and bool((self.prompt + self.predicted <= lengths).all())
            and all(np.array_equal(pc.list_value_length(x).to_numpy(), self.predicted) for x in self._lists.values())
        )
        if not good:
            raise ValueError("it does not fit the documents")


class ExamplesWriter:
    """Adds examples to a store that is being written."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, documents: StoreWriter) -> None:
        self._path, self._tokenizer, self._documents = folder / EXAMPLES, tokenizer, documents
        self._file: ArrowFile | None = None
        self._columns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._content = hashlib.sha256()
        self._count = 0

    def add(self, batch: list[Example]) -> None:
        """Append examples. Raises Refused, naming the row, for one that cannot be used, OSError for a full disk."""
        given = [part for e in batch for c in e.completions for part in (c.prompt, c.completion)]
        texts = dict.fromkeys(part for part in given if isinstance(part, str))
        ids = dict(zip(texts, self._tokenizer.encode(list(texts)), strict=True))
        rows = []
        for example in batch:
            for completion in example.completions:
                rows.append(self._add(completion, example, ids))
            self._count += 1
        self._write(rows)

    def finish(self) -> ExamplesIndex | None:
        """Make the file durable; None where nothing was added."""
        if self._file is None:
            return None
        index = index_of(self._path, self._file.close())
        return ExamplesIndex(index.size, index.sha256, self._content.hexdigest(), *self._columns)

    def close(self) -> None:
        """Release a file that was not finished; harmless after `finish`."""
        if self._file is not None:
            self._file.release()

    def _add(self, completion: Completion, example: Example, ids: Mapping[str, np.ndarray]) -> list[np.ndarray]:
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
                    f"{example.place}: {total:g} in '{name}' is no log-probability of {predicted} tokens, "
                    f"which is above {LEAST_LOG_PROB:g} for each; mend the row or remove it"
                )
        columns = tuple(values), tuple(completion.token_values)
        if self._file is None:
            self._columns = columns
            self._content.update(repr(columns).encode())
            self._file = ArrowFile(self._path, examples_schema(*columns))
        if columns != self._columns:
            has, first = (", ".join(sum(names, ())) or "none" for names in (columns, self._columns))
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
        fixed = [np.array([n], np.int64) for n in (self._count, len(prompt), predicted)]
        lists = [np.array(numbers, np.float32) for numbers in completion.token_values.values()]
        return [*fixed, *(np.array([value], np.float64) for value in values.values()), *lists]

    def _tokens(self, given: str | list[int], ids: Mapping[str, np.ndarray], place: str) -> np.ndarray:
        if isinstance(given, str):
            return ids[given]
        bound = self._tokenizer.vocab_size
        wrong = next((token for token in given if not 0 <= token < bound), None)
        if wrong is not None:
            raise Refused(f"{place}: {shown(wrong)} is no token id of data.tokenizer, which has {bound}; mend the row")
        return np.array(given, token_dtype(bound))

    def _write(self, rows: list[list[np.ndarray]]) -> None:
        """As one record batch."""
        assert self._file is not None
        for row in rows:  # and not by column: batches are cut by characters
            self._content.update(b"".join(part.tobytes() for part in row))
        columns: list[np.ndarray | pa.Array] = []
        for number, parts in enumerate(zip(*rows, strict=True)):
            flat = np.concatenate(parts)
            if number < len(rows[0]) - len(self._columns[1]):
                columns.append(flat)
            else:
                offsets = np.cumsum([0, *map(len, parts)])
                columns.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat)))
        self._file.write(columns)
