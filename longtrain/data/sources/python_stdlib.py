"""The `*.py` sources of the running Python's standard library: a document per file, without its tests."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longtrain.core.errors import Refused
from longtrain.data.config import SourceConfig
from longtrain.data.source import Document, InputFile, find_files, read_text

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


@dataclass(frozen=True)
class Config(SourceConfig):
    """Nothing to choose beyond what all sources have."""


def inputs(config: Config) -> list[InputFile]:
    """Raises Refused where this Python has no library sources on disk."""
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        return find_files(folder, [".py"], skip=_SKIPPED)
    except Refused:
        raise Refused(
            f"{folder}: this Python carries no *.py sources; use data=text data.path=FOLDER with text of your own"
        ) from None


def documents(config: Config) -> Iterator[Document]:
    """The documents, in a fixed order. Raises Refused naming the file that cannot be used."""
    for file in inputs(config):
        yield Document(read_text(file.path), file.name)
