"""The token store: what is written is read, damage is named, and a slice touches its own blocks only."""

import json
import math
import random
import re
import shutil
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.core.errors import CorruptData, Refused
from longtrain.data.manifest import encode_manifest, read_manifest
from longtrain.data.store import TokenStore

DOCUMENTS = [list(range(start, start + length)) for start, length in ((0, 5), (10, 17), (40, 1), (50, 60), (120, 3))]


def _stored(documents: list[list[int]]) -> list[int]:
    return [token for document in documents if document for token in [*document, 256]]


def _read(store: TokenStore, begin: int, end: int) -> list[int]:
    out = np.empty(end - begin, np.int64)
    store.read_into(begin, out)
    return out.tolist()


def _damage(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def _assert_corrupt(folder: Path, name: str) -> None:
    """Opening and reading everything names the file and the remedy in one line."""
    with pytest.raises(CorruptData) as caught:
        store = TokenStore(folder)
        _read(store, 0, store.manifest.num_tokens)
    message = str(caught.value)
    assert str(folder / name) in message and "\n" not in message
    assert message.endswith(f"; delete {folder} and run `longtrain prepare`")


@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=12).filter(any),
    block_tokens=st.integers(1, 9),
    blocks_per_shard=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(documents, block_tokens, blocks_per_shard, data, tmp_path_factory, write_store):
    folder = write_store(tmp_path_factory.mktemp("s") / "store", documents, block_tokens, blocks_per_shard)
    store = TokenStore(folder)
    expected = _stored(documents)
    lengths = [len(document) + 1 for document in documents if document]
    assert store.manifest.num_tokens == len(expected)
    assert store.lengths.tolist() == lengths
    assert store.offsets.tolist() == [0, *accumulate(lengths)][:-1]
    kept = [number for number, document in enumerate(documents) if document]
    assert [store.origin(i) for i in range(len(kept))] == [f"document {number}" for number in kept]
    counts = Counter(expected)
    entropy = -sum(n / len(expected) * math.log(n / len(expected)) for n in counts.values())
    # The two sums differ in order only.
    assert store.manifest.unigram_entropy == pytest.approx(entropy, abs=1e-12)
    begin = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(begin, len(expected)))
    assert _read(store, begin, end) == expected[begin:end]
    blocks = range(begin // block_tokens, -(-end // block_tokens)) if end > begin else ()
    assert store.verified_blocks == list(blocks)
    assert _read(store, 0, len(expected)) == expected


def test_shards_are_bounded_and_memory_mapped(tmp_path, write_store):
    store = TokenStore(write_store(tmp_path / "store", DOCUMENTS, block_tokens=8, blocks_per_shard=3))
    assert [shard.name for shard in store.manifest.shards] == [f"tokens-{i:05d}.arrow" for i in range(4)]
    _read(store, 30, 31)
    assert str(tmp_path / "store" / "tokens-00001.arrow") in Path("/proc/self/maps").read_text()
    assert "tokens-00000.arrow" not in Path("/proc/self/maps").read_text()


def test_content_digest_depends_on_tokens_and_boundaries_alone(tmp_path, write_store):
    first = read_manifest(write_store(tmp_path / "a", DOCUMENTS)).content
    assert read_manifest(write_store(tmp_path / "b", DOCUMENTS, 16, 2)).content == first
    assert read_manifest(write_store(tmp_path / "c", DOCUMENTS[1:])).content != first
    moved = [[1, 2, 3], [4]], [[1, 2], [3, 4]]
    assert len({read_manifest(write_store(tmp_path / f"d{i}", d)).content for i, d in enumerate(moved)}) == 2


def test_damage_elsewhere_does_not_hinder_a_slice(tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    for name in ("tokens-00000.arrow", "tokens-00002.arrow", "tokens-00003.arrow"):
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    store = TokenStore(folder)
    assert _read(store, 24, 48) == _stored(DOCUMENTS)[24:48]
    assert store.verified_blocks == [3, 4, 5]
    with pytest.raises(CorruptData, match=re.escape(str(folder / "tokens-00002.arrow"))):
        _read(store, 47, 49)


def test_a_flipped_token_names_shard_and_block(tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    shard = folder / "tokens-00001.arrow"
    needle = np.array(_stored(DOCUMENTS)[32:40], "<u2").tobytes()
    _damage(shard, shard.read_bytes().index(needle) + 3)
    store = TokenStore(folder)
    assert _read(store, 24, 32) == _stored(DOCUMENTS)[24:32]
    with pytest.raises(CorruptData, match=r"tokens-00001\.arrow: block 1 does not match its checksum"):
        _read(store, 39, 40)


@pytest.mark.parametrize("name", ["tokens-00000.arrow", "documents.arrow", "blocks.arrow", "manifest.json"])
def test_damage_is_never_read_silently(name, tmp_path, write_store):
    """A bit in every seventh byte, Arrow's own metadata included: the tokens are right, or the file is named."""
    folder = write_store(tmp_path / "store", DOCUMENTS)
    expected = _stored(DOCUMENTS)
    good = (folder / name).read_bytes()
    refused = 0
    for at in range(0, len(good), 7):
        _damage(folder / name, at, 1 << (at % 8))
        try:
            store = TokenStore(folder)
            assert _read(store, 0, len(expected)) == expected
            assert store.lengths.tolist() == [len(document) + 1 for document in DOCUMENTS]
        except CorruptData as error:
            assert str(folder / name) in str(error)
            refused += 1
        (folder / name).write_bytes(good)
    # Arrow pads generously, and flips of padding are harmless.
    assert refused > len(good) / 7 / 4


@pytest.mark.parametrize("name", ["tokens-00000.arrow", "tokens-00003.arrow", "documents.arrow", "blocks.arrow"])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing", "link", "folder"])
def test_a_file_of_another_size_or_kind_is_noticed_at_once(change, name, tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    path = folder / name
    data = path.read_bytes()
    if change in ("shorter", "longer", "empty"):
        path.write_bytes({"shorter": data[:-1], "longer": data + b"\0", "empty": b""}[change])
    else:
        path.rename(tmp_path / "moved")
    if change == "link":
        path.symlink_to(tmp_path / "moved")
    elif change == "folder":
        path.mkdir()
    with pytest.raises(CorruptData, match=re.escape(str(path))):
        TokenStore(folder)


def test_swapped_and_foreign_shards(tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    first, second = folder / "tokens-00000.arrow", folder / "tokens-00001.arrow"
    first.rename(folder / "x"), second.rename(first), (folder / "x").rename(second)
    _assert_corrupt(folder, "tokens-00000.arrow")
    other = write_store(tmp_path / "other", [[(t + 1) % 256 for t in d] for d in DOCUMENTS])
    for name in ("tokens-00000.arrow", "tokens-00001.arrow"):
        shutil.copy(other / name, folder / name)
    _assert_corrupt(folder, "tokens-00000.arrow")
    shutil.copy(other / "documents.arrow", folder / "documents.arrow")
    shutil.copy(other / "blocks.arrow", folder / "blocks.arrow")
    _assert_corrupt(folder, "blocks.arrow")


def test_random_bytes_instead_of_arrow(tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    shard = folder / "tokens-00000.arrow"
    good = shard.read_bytes()
    noise = random.Random(0)
    for _ in range(50):
        middle = noise.randbytes(len(good) - 16)
        shard.write_bytes(good[:8] + middle + good[-8:])
        _assert_corrupt(folder, shard.name)


def test_manifest_missing_cut_or_foreign(tmp_path, write_store):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    path = folder / "manifest.json"
    good = path.read_text()
    for content in ("", good[:-20], "[]", "{}", "null", "[" * 100_000, good.replace("tokens-1", "tokens-2")):
        path.write_text(content)
        _assert_corrupt(folder, "manifest.json")
    path.unlink()
    _assert_corrupt(folder, "manifest.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shards", [{"name": "../tokens-00000.arrow", "size": 1}]),
        ("shards", [{"name": "/etc/passwd", "size": 1}]),
        ("shards", []),
        ("num_tokens", 10**9),
        ("num_documents", 4),
        ("dtype", "uint32"),
        ("dtype", "object"),
        ("block_tokens", 0),
        ("vocab_size", "257"),
        ("format", "longtrain-tokens-2"),
        ("surprise", 1),
    ],
)
def test_forged_manifests_with_a_good_digest(field, value, tmp_path, write_store, monkeypatch):
    folder = write_store(tmp_path / "store", DOCUMENTS)
    body = json.loads((folder / "manifest.json").read_text())["manifest"] | {field: value}
    # encode_manifest signs whatever mapping it is given in place of the dataclass.
    monkeypatch.setattr("longtrain.data.manifest.asdict", lambda manifest: manifest)
    (folder / "manifest.json").write_bytes(encode_manifest(body))
    monkeypatch.undo()
    with pytest.raises(CorruptData):
        store = TokenStore(folder)
        _read(store, 0, store.manifest.num_tokens)


def test_no_store_and_a_folder_of_other_things(tmp_path):
    with pytest.raises(Refused, match=r"no token store at .*; run `longtrain prepare`"):
        TokenStore(tmp_path / "missing")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(Refused, match=r"no token store; set data.store") as caught:
        TokenStore(tmp_path)
    assert "delete" not in str(caught.value)
