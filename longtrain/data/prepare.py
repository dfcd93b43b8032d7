"""Turns a source into a token store, once, and opens it: `longtrain prepare`, and the start of every training run.

A store is built in a hidden folder beside its final place and renamed when all of it is on disk, under a lock on
`.<name>.lock`: a killed build leaves nothing that looks like a store, and of two processes that prepare the same one,
the second waits and then reuses it. The next build removes what dead ones left.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pydantic import TypeAdapter

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.data.config import SourceConfig
from longtrain.data.corpus import Corpus
from longtrain.data.examples import ExamplesWriter
from longtrain.data.manifest import Recipe
from longtrain.data.packing import PackedCorpus
from longtrain.data.source import Example, InputFile
from longtrain.data.store import TokenStore
from longtrain.data.tokenization import Tokenizer, load_tokenizer
from longtrain.data.writer import StoreWriter, sync_folder

Progress = Callable[[int, int], None]
"""Called now and then with the documents and tokens written so far; never when a store is reused."""

Item = TypeVar("Item")

_BATCH_CHARACTERS = 2**20
_BATCH_ITEMS = 256


def prepare(config: SourceConfig, registry: Registry, progress: Progress = lambda documents, tokens: None) -> Path:
    """The folder of the store for `config`: built, or found there already.

    A store that `data.store` names is also reused when its input is gone; its options and tokenizer must still agree.

    Raises Refused for input that cannot be used, for a `data.store` that holds something else, and for a full disk;
    CorruptData for a damaged store.
    """
    source = _source(config, registry)
    tokenizer = load_tokenizer(config)
    explicit = _explicit_store(config)
    try:
        files = source.inputs(config)
    except Refused:
        if explicit is None or not _exists(explicit):
            raise
        _check_recipe(TokenStore(explicit), _recipe(config, tokenizer, None))
        return explicit
    recipe = _recipe(config, tokenizer, files)
    folder = explicit or _default_store(recipe)
    if not _exists(folder):
        with _locked(folder):
            if not _exists(folder):
                _build(folder, config, source, tokenizer, recipe, progress)
    _check_recipe(TokenStore(folder), recipe)
    return folder


def open_corpus(config: SourceConfig, registry: Registry, seed: int, context_length: int) -> Corpus:
    """Open the prepared store for `config`, in the order of `seed` (0 <= seed < 2^63).

    Examples are packed into sequences of `context_length` tokens; windows of plain text may have any length.

    A store that `data.store` names needs no input files: its options and tokenizer are checked, not whether the files
    changed since (`prepare` does that). Else the input files tell which store of the user's cache it is.

    Raises Refused where nothing was prepared, the store holds something else or an example does not fit the context,
    CorruptData where it is damaged.
    """
    tokenizer = load_tokenizer(config)
    folder = _explicit_store(config)
    if folder is None:
        recipe = _recipe(config, tokenizer, _source(config, registry).inputs(config))
        folder = _default_store(recipe)
    else:
        recipe = _recipe(config, tokenizer, None)
    store = TokenStore(folder)
    _check_recipe(store, recipe)
    return Corpus(store, seed) if store.examples is None else PackedCorpus(store, seed, context_length)


def _build(
    folder: Path, config: SourceConfig, source: ModuleType, tokenizer: Tokenizer, recipe: Recipe, progress: Progress
) -> None:
    """Write the store and put it in place; the lock on `folder` is held."""
    prefix = f".{folder.name}.building-"
    for dead in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(dead, ignore_errors=True)
    building = folder.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    try:
        with _writing(folder):
            building.mkdir()
            writer = StoreWriter(building, tokenizer)
            examples = ExamplesWriter(building, tokenizer, writer, getattr(source, "FIELDS", None))
        with contextlib.closing(writer), contextlib.closing(examples):
            if hasattr(source, "examples"):
                for some in _batches(source.examples(config), _characters):
                    with _writing(folder):
                        examples.add(some)
                    progress(writer.num_documents, writer.num_tokens)
            else:
                for batch in _batches(source.documents(config), lambda document: len(document.text)):
                    tokens = tokenizer.encode([document.text for document in batch])
                    with _writing(folder):
                        for document, ids in zip(batch, tokens, strict=True):
                            writer.add(ids, document.origin)
                    progress(writer.num_documents, writer.num_tokens)
            if not writer.num_documents:
                empty = (
                    "there are no rows; give one"
                    if hasattr(source, "examples")
                    else "every document is empty; give text"
                )
                path = getattr(config, "path", None)
                where = f"data={config.name}" if path is None else f"data.path={path}"
                raise Refused(f"{where}: {empty} with at least one token")
            if _recipe(config, tokenizer, source.inputs(config)) != recipe:
                raise Refused("the input files changed while they were read; run `longtrain prepare` again")
            with _writing(folder):
                writer.finish(recipe, examples.finish())
                os.rename(building, folder)
                sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _batches(items: Iterator[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Groups that are worth a tokenizer's threads and bounded in memory by the longest item; `size` in characters."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_ITEMS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(example: Example) -> int:
    return sum(len(part) for completion in example.completions for part in (completion.prompt, completion.completion))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares `folder`. The lock goes with the process that holds it."""
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder.parent / f".{folder.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            f"cannot write the token store {folder} ({error.strerror or error}); free space there or set data.store"
        ) from None


def _source(config: SourceConfig, registry: Registry) -> ModuleType:
    source = registry.load("data.sources", config.name, ("Config", "inputs"))
    if not hasattr(source, "examples"):
        registry.load("data.sources", config.name, ("documents",))
    return source


def _explicit_store(config: SourceConfig) -> Path | None:
    return None if config.store is None else Path(os.path.abspath(config.store.expanduser()))


def _default_store(recipe: Recipe) -> Path:
    # The only environment variables that the data part reads: where a user's cache is.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "longtrain" / "stores" / f"{recipe.source}-{recipe.fingerprint[:12]}"


def _exists(folder: Path) -> bool:
    """Whether something is at `folder`. An empty folder is as good as none: a rename replaces it."""
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _recipe(config: SourceConfig, tokenizer: Tokenizer, files: list[InputFile] | None) -> Recipe:
    """What the store is made from; `files=None` leaves the inputs unknown (an empty digest)."""
    common = {field.name for field in dataclasses.fields(SourceConfig)}
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    options = {
        key: value
        for key, value in values.items()
        if key not in common and value is not None and not isinstance(getattr(config, key), Path)
    }
    inputs = ""
    if files is not None:
        rows = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [_status(file)]]
        inputs = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Recipe(config.name, options, tokenizer.name, tokenizer.fingerprint, inputs)


def _status(file: InputFile) -> os.stat_result:
    try:
        return file.path.stat()
    except OSError as error:
        raise Refused(f"{file.path}: cannot be read ({error.strerror}); restore it or run again") from None


def _check_recipe(store: TokenStore, wanted: Recipe) -> None:
    """Raises Refused where the store was made from something else than `wanted`."""
    made = store.manifest.recipe
    if made.source != wanted.source:
        difference = f"from data={made.source}, not data={wanted.source}"
    elif made.options != wanted.options:
        key = next(k for k in sorted({*made.options, *wanted.options}) if made.options.get(k) != wanted.options.get(k))
        difference = f"with data.{key}={made.options.get(key)}, not {wanted.options.get(key)}"
    elif made.tokenizer_fingerprint != wanted.tokenizer_fingerprint:
        difference = f"with another tokenizer ({made.tokenizer}, not {wanted.tokenizer})"
    elif wanted.inputs and made.inputs != wanted.inputs:
        difference = "from other input files, or they changed since"
    else:
        return
    raise Refused(
        f"{store.folder} was prepared {difference}; set data.store to another folder, "
        "or delete this one and run `longtrain prepare`"
    )
