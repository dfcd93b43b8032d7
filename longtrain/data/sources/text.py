"""Plain text files: a document per file, or per directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from longtrain.core.paths import GivenPath
from longtrain.data.config import SourceConfig
from longtrain.data.source import Document, InputFile, find_files, read_text


@dataclass(frozen=True)
class Config(SourceConfig):
    """`conf/data/text.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: GivenPath | None
    """A file, or a folder that is searched with its subfolders."""
    suffixes: tuple[Annotated[str, Field(pattern=r"^\..")], ...] | None
    """Files of a folder that are read; null reads every file."""
    documents: Literal["file", "directory"]
    """What one document is. A directory's document is its own files, not those of its subfolders."""


def inputs(config: Config) -> list[InputFile]:
    """Sorted so that the files of one directory are neighbours."""
    files = find_files(config.path, config.suffixes)
    return sorted(files, key=lambda file: (_directory(file), file.name))


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    files = inputs(config)
    if config.documents == "file":
        for file in files:
            yield Document(read_text(file.path), file.name)
        return
    for directory, members in groupby(files, key=_directory):
        texts = [text for file in members if (text := read_text(file.path))]
        # A file without a final newline must not run into the next one.
        joined = "".join(text if text.endswith("\n") else text + "\n" for text in texts)
        yield Document(joined, f"{directory}/")


def _directory(file: InputFile) -> str:
    return str(PurePosixPath(file.name).parent)
