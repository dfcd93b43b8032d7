"""JSON Lines files: one object a line, one document an object. Blank lines are passed over."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from longtrain.core.errors import Refused
from longtrain.data.config import SourceConfig
from longtrain.data.source import Document, InputFile, decode_text, find_files


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/jsonl.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: Path | None
    """A file, or a folder whose `*.jsonl` files are read."""
    text_field: str
    """The key that holds the document."""


def inputs(config: Config) -> list[InputFile]:
    """The files that the documents come from, for the fingerprint of the store."""
    return find_files(config.path, [".jsonl"])


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    for file in inputs(config):
        try:
            yield from _read(file, config.text_field)
        except OSError as error:
            raise Refused(f"{file.path}: cannot be read ({error.strerror}); remove it or make it readable") from None


def _read(file: InputFile, field: str) -> Iterator[Document]:
    offset = 0
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                text = _text(decode_text(line, file.path, offset), field, f"{file.path}:{number}")
                yield Document(text, f"{file.name}:{number}")
            offset += len(line)


def _text(line: str, field: str, place: str) -> str:
    try:
        value: Any = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(value, dict):
        raise Refused(f"{place}: not a JSON object; each line must be one, as in {{'{field}': '...'}}")
    if field not in value:
        known = ", ".join(list(value)[:8]) or "nothing"
        raise Refused(f"{place}: no field '{field}', only {known}; set data.text_field")
    text = value[field]
    if not isinstance(text, str):
        raise Refused(
            f"{place}: field '{field}' is {type(text).__name__}, not text; set data.text_field or mend the line"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(
            f"{place}: field '{field}' holds half a surrogate pair, which is not text; mend the line"
        ) from None
    return text
