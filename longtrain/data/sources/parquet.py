"""Parquet files with a column of text: one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.data.config import SourceConfig
from longtrain.data.source import Document, InputFile, find_files

_ROWS_PER_READ = 64


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/parquet.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Path | None
    """A file, or a folder whose `*.parquet` files are read."""
    text_field: str
    """The column that holds the document."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the documents come from, for the fingerprint of the store."""
    return find_files(config.path, [".parquet"])


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    for file in inputs(config):
        yield from _read(file, config.text_field)


def _read(file: InputFile, field: str) -> Iterator[Document]:
    row = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            _check_schema(parquet.schema_arrow, field, file.path)
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_READ, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise Refused(f"{file.path}: row {row} has no '{field}' (null); remove the row")
                    yield Document(text, f"{file.name}:{row}")
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


def _check_schema(schema: pa.Schema, field: str, path: Path) -> None:
    if schema.names.count(field) != 1:
        raise Refused(f"{path}: no column '{field}', only {', '.join(schema.names[:8])}; set data.text_field")
    kind = schema.field(field).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise Refused(f"{path}: column '{field}' is {kind}, not text (string); set data.text_field")
