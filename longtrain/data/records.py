"""Rows of JSON Lines and Parquet files, and what a source may ask of their fields."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtrain.core.errors import Refused
from longtrain.data.source import LEAST_LOG_PROB, InputFile, decode_text, find_files

RECORD_SUFFIXES = (".jsonl", ".parquet")
_ROWS_PER_READ = 32
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Record:
    """A row. Its methods raise Refused, naming the row, for a field that is missing (or null) or of another type."""

    values: dict[str, Any]
    place: str
    """For messages: `/data/part-3.jsonl:17`."""
    origin: str
    """Below the input folder: `part-3.jsonl:17`."""
    unread: Sequence[str] = ()
    """Names of columns that nobody asked for."""

    def has(self, name: str) -> bool:
        """Whether the field has a value."""
        return self.values.get(name) is not None

    def tokens(self, name: str) -> str | list[int]:
        """Text, or a list of token ids."""
        value = self._get(name)
        if isinstance(value, str):
            return valid_text(value, name, self.place)
        if isinstance(value, list) and all(type(item) is int for item in value):
            return value
        self._refuse(name, "neither text nor a list of token ids", lambda item: type(item) is int)

    def number(self, name: str) -> float:
        """A number that float32 holds."""
        value = self._get(name)
        if not _is_number(value):
            self._refuse(name, "no finite number of float32")
        return float(value)

    def log_prob(self, name: str) -> float:
        """A number of float32, at most 0."""
        value = self._get(name)
        if not _is_number(value) or value > 0:
            self._refuse(name, "no log-probability, a finite number of float32 that is at most 0")
        return float(value)

    def log_probs(self, name: str) -> list[float]:
        """A list of numbers above LEAST_LOG_PROB, at most 0."""
        value = self._get(name)
        if not isinstance(value, list) or not all(map(_is_log_prob, value)):
            bounds = f"at most 0 and above {LEAST_LOG_PROB:g}"
            problem = f"no list of log-probabilities, numbers {bounds}, as those of all sampled tokens are"
            self._refuse(name, problem, _is_log_prob)
        return [float(item) for item in value]

    def key(self, name: str) -> str | int:
        """Text or a whole number."""
        value = self._get(name)
        if type(value) not in (str, int):
            self._refuse(name, "neither text nor a whole number")
        return value

    def refuse_missing(self, name: str, remedy: str | None = None) -> NoReturn:
        """Raise Refused for a field without a value; for one that is not there, with the fields that have one."""
        if name in self.values:
            raise Refused(f"{self.place}: field '{name}' is null; {remedy or 'give it a value or remove the row'}")
        known = listed([*filter(self.has, self.values), *self.unread])
        raise Refused(f"{self.place}: no field '{name}', only {known}; {remedy or 'add it or remove the row'}")

    def _get(self, name: str) -> Any:
        if not self.has(name):
            self.refuse_missing(name)
        return self.values[name]

    def _refuse(self, name: str, problem: str, item_is_good: Callable[[Any], bool] | None = None) -> NoReturn:
        value, verb = self.values[name], "is"
        if isinstance(value, list) and item_is_good is not None:
            value, verb = next(item for item in value if not item_is_good(item)), "holds"
        raise Refused(f"{self.place}: field '{name}' {verb} {as_json(value)}, {problem}; mend the row or remove it")


def find_records(path: Path | None) -> list[InputFile]:
    """See `find_files`. Raises Refused also for a file of another format."""
    files = find_files(path, RECORD_SUFFIXES)
    for file in files:
        if file.path.suffix not in RECORD_SUFFIXES:
            raise Refused(f"data.path={file.path} is no {' or '.join(RECORD_SUFFIXES)} file; convert it")
    return files


def read_records(files: Iterable[InputFile], fields: Sequence[str]) -> Iterator[Record]:
    """The rows of JSON Lines and Parquet files, of the latter the given columns as far as there are any.

    Raises Refused naming the file that cannot be used.
    """
    for file in files:
        yield from parquet_records(file, fields) if file.path.suffix == ".parquet" else json_records(file)


def json_records(file: InputFile) -> Iterator[Record]:
    """The objects of a JSON Lines file; blank lines are passed over. Raises Refused naming the line that is none."""
    offset = 0
    try:
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    place = f"{file.path}:{number}"
                    yield Record(_object(decode_text(line, file.path, offset), place), place, f"{file.name}:{number}")
                offset += len(line)
    except OSError as error:
        raise Refused(f"{file.path}: cannot be read ({error.strerror}); remove it or make it readable") from None


def parquet_records(
    file: InputFile, fields: Sequence[str], check: Callable[[pa.Schema], None] = lambda schema: None
) -> Iterator[Record]:
    """The rows of a Parquet file, of the columns `fields` as far as there are any; `check` may refuse its schema.

    Raises Refused naming the file that cannot be read, or that has a column twice.
    """
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in fields if name in names]
            twice = next((name for name in columns if names.count(name) > 1), None)
            if twice is not None:
                raise Refused(f"{file.path}: {names.count(twice)} columns '{shown(twice)}'; leave one of them")
            check(parquet.schema_arrow)
            unread = [name for name in names if name not in columns]
            # A list is ten times as large as Python objects: those of one row are enough.
            lists = any(pa.types.is_nested(parquet.schema_arrow.field(name).type) for name in columns)
            together = 1 if lists else _ROWS_PER_READ
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
                pieces = (batch.slice(first, together) for first in range(0, len(batch), together))
                for values in (row for piece in pieces for row in piece.to_pylist()):
                    yield Record(values, f"{file.path}: row {row}", f"{file.name}:{row}", unread)
                    row += 1
            # Neither page headers nor the footer have checksums: damage there can look like fewer rows.
            groups = range(parquet.num_row_groups)
            expected = {parquet.metadata.num_rows, sum(parquet.metadata.row_group(g).num_rows for g in groups)}
            if expected != {row}:
                raise ValueError(f"{row} rows read, where the footer counts {max(expected)}")
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = f"row {row} or later" if row else "not a readable Parquet file"
        raise Refused(f"{file.path}: {place} ({reason}); replace the file or remove it from data.path") from None


def shown(value: str | int) -> str:
    """For messages: the beginning of what a file says, in one line."""
    text = repr(str(value)[:41])[1:-1]
    return text if len(text) <= 40 else f"{text[:37]}..."


def as_json(value: Any) -> str:
    """For messages: the beginning of a field's value."""
    return shown(json.dumps(value, ensure_ascii=False, default=str))


def listed(names: Iterable[str]) -> str:
    """For messages: the first of the fields of a row or a file."""
    return ", ".join(map(shown, islice(names, 8))) or "nothing"


def valid_text(text: str, name: str, place: str) -> str:
    """The text itself. Raises Refused for what has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(
            f"{place}: field '{name}' holds half a surrogate pair, which is not text; mend the line"
        ) from None
    return text


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(value, dict):
        raise Refused(f"{place}: not a JSON object; each line must be one")
    return value


def _is_log_prob(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_LOG_PROB < value <= 0  # NaN compares false


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST
