"""The contract of a data source, and the reading of files that sources share.

A source is a module of `data/sources/` that defines

* `Config(SourceConfig)`: a frozen dataclass with the source's options;
* `inputs(config) -> list[InputFile]`: the files that it would read, in reading order, without reading them;
* `documents(config) -> Iterator[Document]`: their text, one document after the other, in the same order every time.

A source of examples, for objectives that ask for more than the next token, defines instead of `documents`

* `examples(config) -> Iterator[Example]`, and
* `COLUMNS`, `OPTIONAL_COLUMNS`: names of values that every example has, and that may be left out of all of them. An
  objective that does not read `COLUMNS` is refused: it would learn from what is there to be avoided;
* `FIELDS`, a mapping, where rows call a value otherwise: what messages call it.

All of them raise Refused, in one line that names the file, for input that cannot be used.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longtrain.core.errors import Refused

LEAST_LOG_PROB = -1000.0
"""Nats; the log-probability of every token is above. No token that was sampled has a probability of e^-1000, but where
one is unknown, some servers write -9999."""


@dataclass(frozen=True)
class Document:
    """One text; `origin` says where it came from (`novels/emma.txt`, `part-3.jsonl:17`)."""

    text: str
    origin: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it: a document, in which the tokens of the completion are predicted.

    Each is text, which ends with an end-of-document token that is predicted too, or token ids, to which nothing is
    added. The two are tokenised apart.
    """

    prompt: str | list[int]
    completion: str | list[int]
    values: Mapping[str, float] = field(default_factory=dict)
    """Of every predicted token."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Log-probabilities of the completion as a whole, in nats: spread evenly over its tokens."""
    token_values: Mapping[str, list[float]] = field(default_factory=dict)
    """One for each predicted token."""


@dataclass(frozen=True)
class Example:
    """Completions that belong together: all of them come into one sequence."""

    completions: tuple[Completion, ...]
    place: str
    """For messages: `/data/part-3.jsonl:17`."""
    origin: str
    """As of a document."""


@dataclass(frozen=True)
class InputFile:
    """A file of the input; `name` is its path below the input folder, with `/`."""

    name: str
    path: Path


def find_files(path: Path | None, suffixes: Sequence[str] | None, skip: Collection[str] = ()) -> list[InputFile]:
    """The file `path`, or all files below the folder `path` that end in one of `suffixes`, sorted by name.

    Hidden files and folders, and folders named in `skip`, are passed over; links to folders are not followed.
    `suffixes=None` takes every file.

    Raises Refused where the path is not set, is missing or cannot be listed, or where no file is left.
    """
    if path is None:
        raise Refused("data.path is not set; give a file or a folder")
    path = path.expanduser()
    if path.is_file():
        return [_input_file(path.parent, path)]
    if not path.is_dir():
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise Refused(f"data.path={path} {problem}; give a file or a folder")
    found = []
    for folder, subfolders, names in os.walk(path, onerror=_refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        for name in names:
            file = Path(folder, name)
            wanted = not name.startswith(".") and (suffixes is None or name.endswith(tuple(suffixes)))
            if wanted and file.is_file():
                found.append(_input_file(path, file))
    if not found:
        kind = "no file" if suffixes is None else f"no file ending in {', '.join(suffixes)}"
        raise Refused(f"data.path={path}: {kind} in this folder or below; give a folder that holds text")
    return sorted(found, key=lambda file: file.name)


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark.

    Raises Refused with the byte offset for what is not UTF-8 text, and for a file that cannot be read.
    """
    try:
        return decode_text(path.read_bytes(), path).removeprefix("\ufeff")
    except OSError as error:
        raise Refused(
            f"{path}: cannot be read ({error.strerror}); remove it from data.path or make it readable"
        ) from None


def decode_text(data: bytes, path: Path, offset: int = 0) -> str:
    """`data` as text; `offset` is where it begins in the file. Raises Refused for NUL bytes and invalid UTF-8."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise Refused(f"{path}: NUL byte at offset {offset + nul}: a binary file, not text; remove it from data.path")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise Refused(f"{path}: no valid UTF-8 at byte offset {at}; convert it or remove it from data.path") from None


def _input_file(root: Path, path: Path) -> InputFile:
    # A file name may hold any bytes; origins are stored as UTF-8.
    return InputFile(os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace"), path)


def _refuse_unreadable(error: OSError) -> None:
    raise Refused(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable or choose another data.path"
    )
