"""Rows of JSON Lines and Parquet files, and what a source may ask of their fields."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from longtrain.core.errors import Refused
from longtrain.data.source import InputFile, decode_text, find_files

RECORD_SUFFIXES = (".jsonl", ".parquet")
_ROWS_PER_READ = 64


@dataclass(frozen=True)
class Record:
    """A row. Its methods raise Refused, naming the row, for a field that is missing or of another type."""

    values: dict[str, Any]
    """Fields without a value (null) are left out."""
    place: str
    """For messages: `/data/part-3.jsonl:17`."""
    origin: str
    """Below the input folder: `part-3.jsonl:17`."""

    def tokens(self, name: str) -> str | list[int]:
        """Text, or a list of token ids."""
        value = self._get(name)
        if isinstance(value, str):
            return valid_text(value, name, self.place)
        if isinstance(value, list) and all(type(item) is int for item in value):
            return value
        self._refuse(name, "neither text nor a list of token ids")

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name)
        if not _is_number(value):
            self._refuse(name, "no finite number")
        return float(value)

    def log_prob(self, name: str) -> float:
        """A finite number, at most 0."""
        value = self._get(name)
        if not _is_log_prob(value):
            self._refuse(name, "no log-probability, a finite number of at most 0")
        return float(value)

    def log_probs(self, name: str) -> list[float]:
        """A list of finite numbers, at most 0."""
        value = self._get(name)
        if not isinstance(value, list) or not all(map(_is_log_prob, value)):
            self._refuse(name, "no list of log-probabilities, finite numbers of at most 0")
        return [float(item) for item in value]

    def key(self, name: str) -> str | int:
        """Text or a whole number."""
        value = self._get(name)
        if type(value) not in (str, int):
            self._refuse(name, "neither text nor a whole number")
        return value

    def _get(self, name: str) -> Any:
        if name not in self.values:
            known = ", ".join(list(self.values)[:8]) or "nothing"
            raise Refused(f"{self.place}: no field '{name}', only {known}; add it or remove the row")
        return self.values[name]

    def _refuse(self, name: str, problem: str) -> NoReturn:
        raise Refused(f"{self.place}: field '{name}' is {problem}; mend the row or remove it")


def find_records(path: Path | None) -> list[InputFile]:
    """See `find_files`. Raises Refused also for a file of another format."""
    files = find_files(path, RECORD_SUFFIXES)
    for file in files:
        if file.path.suffix not in RECORD_SUFFIXES:
            raise Refused(f"data.path={file.path} is no {' or '.join(RECORD_SUFFIXES)} file; convert it")
    return files


def read_records(files: Sequence[InputFile], fields: Sequence[str]) -> Iterator[Record]:
    """The rows of JSON Lines and Parquet files, of the latter the given columns as far as there are any.

    Raises Refused naming the file that cannot be used.
    """
    for file in files:
        if file.path.suffix == ".parquet":
            rows = parquet_rows(file, lambda schema: [name for name in fields if name in schema.names])
        else:
            rows = json_rows(file)
        for row, place, origin in rows:
            yield Record({name: value for name, value in row.items() if value is not None}, place, origin)


def json_rows(file: InputFile) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The objects of a JSON Lines file, with the place and the origin of each; blank lines are passed over.

    Raises Refused naming the line that is none.
    """
    offset = 0
    try:
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    place = f"{file.path}:{number}"
                    yield _object(decode_text(line, file.path, offset), place), place, f"{file.name}:{number}"
                offset += len(line)
    except OSError as error:
        raise Refused(f"{file.path}: cannot be read ({error.strerror}); remove it or make it readable") from None


def parquet_rows(
    file: InputFile, choose: Callable[[pa.Schema], list[str]]
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The rows of a Parquet file, of the columns that `choose` names, with the place and the origin of each.

    Raises Refused naming the file that cannot be read.
    """
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            columns = choose(parquet.schema_arrow)
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=columns):
                for values in batch.to_pylist():
                    yield values, f"{file.path}: row {row}", f"{file.name}:{row}"
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
        raise Refused(f"{place}: not a JSON object; each line must be one, as in {{'text': '...'}}")
    return value


def _is_number(value: Any) -> bool:
    # An integer of hundreds of digits is no float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_log_prob(value: Any) -> bool:
    return _is_number(value) and value <= 0
