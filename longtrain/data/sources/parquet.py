"""Parquet files with a column of text: one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.core.paths import GivenPath
from longtrain.data.config import SourceConfig
from longtrain.data.records import listed, parquet_records
from longtrain.data.source import Document, InputFile, find_files


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/parquet.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: GivenPath | None
    """A file, or a folder whose `*.parquet` files are read."""
    text_field: str
    """The column that holds the document."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the documents come from, for the fingerprint of the store."""
    return find_files(config.path, [".parquet"])


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    field = config.text_field
    for file in inputs(config):
        check = partial(_check_schema, field=field, path=file.path)
        for record in parquet_records(file, [field], check):
            if not record.has(field):
                raise Refused(f"{record.place} has no '{field}' (null); remove the row")
            yield Document(record.values[field], record.origin)


def _check_schema(schema: pa.Schema, field: str, path: Path) -> None:
    if field not in schema.names:
        raise Refused(f"{path}: no column '{field}', only {listed(schema.names)}; set data.text_field")
    kind = schema.field(field).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise Refused(f"{path}: column '{field}' is {kind}, not text (string); set data.text_field")
