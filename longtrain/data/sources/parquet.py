"""Parquet files with a column of text: one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.data.config import SourceConfig
from longtrain.data.records import parquet_rows
from longtrain.data.source import Document, InputFile, find_files


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
    field = config.text_field

    def choose(schema: pa.Schema, path: Path) -> list[str]:
        _check_schema(schema, field, path)
        return [field]

    for file in inputs(config):
        for row, place, origin in parquet_rows(file, partial(choose, path=file.path)):
            if row[field] is None:
                raise Refused(f"{place} has no '{field}' (null); remove the row")
            yield Document(row[field], origin)


def _check_schema(schema: pa.Schema, field: str, path: Path) -> None:
    if schema.names.count(field) != 1:
        raise Refused(f"{path}: no column '{field}', only {', '.join(schema.names[:8])}; set data.text_field")
    kind = schema.field(field).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise Refused(f"{path}: column '{field}' is {kind}, not text (string); set data.text_field")
