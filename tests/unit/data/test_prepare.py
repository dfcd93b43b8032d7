"""Preparing and opening: reuse, refusals, kills at every commit point, two builders at once, bounded memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longtrain.core.errors import CorruptData, Refused
from longtrain.core.registry import Registry
from longtrain.data.prepare import open_corpus, prepare

_PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.data.prepare import prepare
from longtrain.data.sources.jsonl import Config

def run(path, store):
    built = []
    config = Config("jsonl", "bytes", None, Path(store), Path(path), "text")
    prepare(config, Registry(), lambda documents, tokens: built.append(documents))
    return bool(built)

"""


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: grüße\n" * (i + 1))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longtrain" / "stores"


def _python(body: str, *arguments: object, **popen) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM + body, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def _jsonl(path: Path, megabytes: int) -> Path:
    row = json.dumps({"text": "All happy families are alike. " * 300}) + "\n"
    with path.open("w") as file:
        for _ in range(megabytes * 2**20 // len(row)):
            file.write(row)
    return path


def _left(folder: Path) -> list[str]:
    """Everything beside stores and their locks."""
    return [name for name in os.listdir(folder) if "building" in name]


def test_text_becomes_a_corpus(texts, cache, load_source, registry):
    config = load_source("text", path=texts)
    calls = []
    folder = prepare(config, registry, lambda documents, tokens: calls.append((documents, tokens)))
    assert folder.parent == cache and folder.name.startswith("text-") and len(folder.name) == len("text-") + 12
    corpus = open_corpus(config, registry, 0, 64)
    expected = sorted((texts / f"{i}.txt").read_bytes() for i in range(20))
    assert (corpus.num_documents, corpus.vocab_size) == (20, 257)
    assert corpus.num_tokens == sum(map(len, expected)) + 20
    assert calls[-1] == (20, corpus.num_tokens)
    window = corpus.window(0, corpus.num_tokens)
    tokens, _ = window.read(0, window.length)
    parts = np.split(tokens, window.starts[1:])
    assert sorted(bytes(part[:-1].astype(np.uint8)) for part in parts) == expected
    assert all(part[-1] == 256 for part in parts)


def test_a_store_is_reused_until_input_options_or_tokenizer_change(
    texts, tmp_path, load_source, registry, train_tokenizer
):
    tokenizer = train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<eos>"])
    config = load_source("text", path=texts)
    first = prepare(config, registry)
    before = (first / "manifest.json").stat()
    assert prepare(config, registry, lambda *_: pytest.fail("worked again")) == first
    assert (first / "manifest.json").stat() == before
    folders = {first, prepare(load_source("text", path=texts, documents="directory"), registry)}
    for end in ("</s>", "<eos>"):
        folders.add(prepare(load_source("text", path=texts, tokenizer=str(tokenizer), end_of_document=end), registry))
    (texts / "0.txt").write_text("rewritten")
    assert len(folders | {prepare(config, registry)}) == 5
    moved = texts.rename(tmp_path / "elsewhere")
    assert prepare(load_source("text", path=moved), registry, lambda *_: pytest.fail("worked again")) not in folders


def test_a_real_tokenizer_end_to_end(texts, tmp_path, load_source, registry, train_tokenizer):
    tokenizer = train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    config = load_source("text", path=texts, tokenizer=str(tokenizer), store=tmp_path / "store")
    prepare(config, registry)
    corpus = open_corpus(config, registry, 1, 64)
    tokens, labels = corpus.window(0, corpus.num_tokens).read(0, corpus.num_tokens)
    assert (tokens == 0).sum() == (labels == -100).sum() == 20
    assert tokens.max() < corpus.vocab_size


def test_the_seed_orders_the_same_store(texts, load_source, registry):
    config = load_source("text", path=texts)
    prepare(config, registry)
    first, second = (open_corpus(config, registry, seed, 64) for seed in (0, 1))
    assert first.digest == second.digest
    assert not np.array_equal(first.window(0, 500).read(0, 500)[0], second.window(0, 500).read(0, 500)[0])


def test_opening_what_was_not_prepared(texts, tmp_path, load_source, registry):
    for config in (load_source("text", path=texts), load_source("text", path=texts, store=tmp_path / "store")):
        with pytest.raises(Refused, match=r"no token store at .*; run `longtrain prepare`"):
            open_corpus(config, registry, 0, 64)


def test_a_named_store_serves_without_its_input(texts, tmp_path, load_source, registry):
    config = load_source("text", path=texts, store=tmp_path / "deep" / "store")
    folder = prepare(config, registry)
    digest = open_corpus(config, registry, 0, 64).digest
    shutil.rmtree(texts)
    assert open_corpus(config, registry, 0, 64).digest == digest
    assert open_corpus(load_source("text", store=folder), registry, 0, 64).digest == digest  # data.path is null
    assert prepare(config, registry) == folder


def test_a_named_store_that_holds_something_else(texts, tmp_path, load_source, registry, train_tokenizer):
    store = tmp_path / "store"
    prepare(load_source("text", path=texts, store=store), registry)
    tokenizer = str(train_tokenizer(tmp_path / "tokenizer.json", ["</s>"]))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    foreign = {
        "from data=text, not data=jsonl": load_source("jsonl", path=tmp_path / "a.jsonl", store=store),
        "with data.documents=file, not directory": load_source("text", path=texts, documents="directory", store=store),
        "with another tokenizer": load_source("text", path=texts, tokenizer=tokenizer, store=store),
    }
    for difference, config in foreign.items():
        for use in (prepare, lambda config, registry: open_corpus(config, registry, 0, 64)):
            with pytest.raises(
                Refused, match=f"was prepared {difference}.*; set data.store to another folder, or delete"
            ):
                use(config, registry)
    (texts / "new.txt").write_text("new")
    with pytest.raises(Refused, match="was prepared from other input files, or they changed since"):
        prepare(load_source("text", path=texts, store=store), registry)


def test_a_store_in_the_way_of_other_files(texts, tmp_path, load_source, registry):
    mine = tmp_path / "mine"
    mine.mkdir()
    assert prepare(load_source("text", path=texts, store=mine), registry) == mine  # an empty folder will do
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(Refused, match=r"is a folder but no token store; set data.store"):
        prepare(load_source("text", path=texts, store=other), registry)
    with pytest.raises(Refused, match="Not a directory"):
        prepare(load_source("text", path=texts, store=other / "thesis.txt"), registry)
    with pytest.raises(Refused, match="cannot write the token store"):
        prepare(load_source("text", path=texts, store=other / "thesis.txt" / "store"), registry)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_damaged_store_is_not_reused(texts, tmp_path, load_source, registry):
    config = load_source("text", path=texts, store=tmp_path / "store")
    folder = prepare(config, registry)
    os.truncate(folder / "tokens-00000.arrow", 100)
    for use in (prepare, lambda config, registry: open_corpus(config, registry, 0, 64)):
        with pytest.raises(CorruptData, match=f"delete {folder} and run `longtrain prepare`"):
            use(config, registry)


def test_bad_input_leaves_nothing_behind(texts, tmp_path, cache, load_source, registry):
    (texts / "99.txt").write_bytes(b"\0")
    with pytest.raises(Refused, match=r"99\.txt"):
        prepare(load_source("text", path=texts), registry)
    assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == []
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").touch()
    with pytest.raises(Refused, match="every document is empty"):
        prepare(load_source("text", path=empty), registry)


def test_input_that_changes_while_it_is_read(texts, tmp_path, load_source, registry):
    config = load_source("text", path=texts, store=tmp_path / "store")
    with pytest.raises(Refused, match="changed while they were read"):
        prepare(config, registry, lambda *_: (texts / "0.txt").write_text("now different"))
    assert not (tmp_path / "store").exists() and not _left(tmp_path)


def test_a_source_from_a_plugin_folder(tmp_path, load_source):
    source = tmp_path / "plugin" / "data" / "sources" / "toy.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "from dataclasses import dataclass\n"
        "from longtrain.data.config import SourceConfig\n"
        "from longtrain.data.source import Document\n"
        "@dataclass(frozen=True)\n"
        "class Config(SourceConfig):\n    words: int\n"
        "def inputs(config): return []\n"
        "def documents(config): yield Document('word ' * config.words, 'toy')\n"
    )
    registry = Registry((tmp_path / "plugin",))
    config = registry.load("data.sources", "toy").Config("toy", "bytes", None, None, words=3)
    assert prepare(config, registry) == prepare(config, registry)
    assert open_corpus(config, registry, 0, 64).num_tokens == 16


# The calls that make a store durable and visible, and the reading before them: a build is killed at each.
_KILL = """
count = 0
def killing(function):
    def call(*arguments):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
for name in ("mkdir", "fsync", "rename"):
    setattr(os, name, killing(getattr(os, name)))
print(run(sys.argv[1], sys.argv[2]), count)
"""


def test_a_killed_build_leaves_nothing_half_visible(tmp_path, load_source, registry):
    path = _jsonl(tmp_path / "a.jsonl", 1)
    store = tmp_path / "store"
    config = load_source("jsonl", path=path, store=store)
    whole = _python(_KILL, path, tmp_path / "whole", 0)
    calls = int(whole.communicate()[0].split()[1])
    assert calls >= 7  # mkdir twice, three files, the manifest, its folder, the rename, the parent folder
    for point in range(1, calls + 1):
        process = _python(_KILL, path, store, point)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if store.exists():  # killed behind the rename: the store must be whole
            open_corpus(config, registry, 0, 64)
            shutil.rmtree(store)
    prepare(config, registry)
    assert (
        open_corpus(config, registry, 0, 64).digest
        == open_corpus(load_source("jsonl", path=path, store=tmp_path / "whole"), registry, 0, 64).digest
    )
    assert not _left(tmp_path)


def test_two_builders_at_once(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", 8)
    both = [_python("print(run(sys.argv[1], sys.argv[2]))", path, tmp_path / "store") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(out.strip() for out, _ in outputs) == ["False", "True"]  # one built, the other reused
    assert not _left(tmp_path)


def test_a_full_disk_is_one_line(tmp_path):
    """A limit on file sizes stands in for the disk: the same OSError from the same write."""
    body = """
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: run(sys.argv[1], sys.argv[2])
except Refused as error: print(error)
"""
    process = _python(body, _jsonl(tmp_path / "a.jsonl", 1), tmp_path / "store")
    out, err = process.communicate()
    assert (
        f"cannot write the token store {tmp_path / 'store'} (File too large); free space there or set data.store" in out
    )
    assert not err and not (tmp_path / "store").exists() and not _left(tmp_path)


def test_memory_does_not_grow_with_the_text(tmp_path):
    body = """
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(sys.argv[1], sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    out, err = _python(body, _jsonl(tmp_path / "a.jsonl", 64), tmp_path / "store").communicate()
    assert not err
    # Batches of 1 Mi characters and one block: a few MiB, where the text is 64 MiB and its tokens are 128 MiB.
    assert int(out) < 32


def test_the_standard_library_is_prepared_in_seconds(load_source, registry):
    config = load_source("python_stdlib")
    prepare(config, registry)
    corpus = open_corpus(config, registry, 0, 64)
    assert corpus.num_tokens > 5_000_000 and corpus.num_documents > 300
    # English-like bytes; uniform bytes would have log(257) = 5.55 nats.
    assert 2.5 < corpus.unigram_entropy < 4.0
