"""JSON Lines files: one object a line, one document an object. Blank lines are passed over."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.core.paths import GivenPath
from longtrain.data.config import SourceConfig
from longtrain.data.records import Record, as_json, json_records, listed, valid_text
from longtrain.data.source import Document, InputFile, find_files


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/jsonl.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: GivenPath | None
    """A file, or a folder whose `*.jsonl` files are read."""
    text_field: str
    """The key that holds the document."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the documents come from, for the fingerprint of the store."""
    return find_files(config.path, [".jsonl"])


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    for file in inputs(config):
        for record in json_records(file):
            yield Document(_text(record, config.text_field), record.origin)


def _text(record: Record, field: str) -> str:
    if field not in record.values:
        raise Refused(f"{record.place}: no field '{field}', only {listed(record.values)}; set data.text_field")
    text = record.values[field]
    if not isinstance(text, str):
        raise Refused(
            f"{record.place}: field '{field}' is {as_json(text)}, not text; set data.text_field or mend the line"
        )
    return valid_text(text, field, record.place)
