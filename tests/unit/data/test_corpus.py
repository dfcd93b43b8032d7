"""The stream against its definition in plain Python: order, windows, labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.core.labels import IGNORED_LABEL
from longtrain.data.corpus import Corpus
from longtrain.data.order import Order
from longtrain.data.store import TokenStore

_documents = st.lists(st.lists(st.integers(0, 255), max_size=20), min_size=1, max_size=8).filter(any)


def _stream(corpus: Corpus, documents: list[list[int]], epochs: int) -> list[tuple[int, int, bool]]:
    """(token, label, whether a document begins here) of the first epochs, from the definition."""
    kept = [[*document, 256] for document in documents if document]
    stream = []
    for epoch in range(epochs):
        order = corpus._order.epoch_documents(epoch).tolist()
        assert sorted(order) == list(range(len(kept)))  # every document once
        for number in order:
            document = kept[number]
            labels = [*document[1:], IGNORED_LABEL]
            stream += [(t, label, i == 0) for i, (t, label) in enumerate(zip(document, labels, strict=True))]
    return stream


@given(documents=_documents, seed=st.integers(0, 2**63 - 1), block=st.integers(1, 9), data=st.data())
@settings(max_examples=150, deadline=None)
def test_windows_and_slices_agree_with_the_definition(documents, seed, block, data, tmp_path_factory, write_store):
    corpus = Corpus(TokenStore(write_store(tmp_path_factory.mktemp("c") / "store", documents, block)), seed)
    stream = _stream(corpus, documents, epochs=4)
    length = data.draw(st.integers(1, len(stream)))
    position = data.draw(st.integers(0, len(stream) - length))
    window = corpus.window(position, length)
    expected = stream[position : position + length]
    starts = [i for i, (_, _, begins) in enumerate(expected) if begins or i == 0]
    assert window.starts.dtype == np.int64 and window.starts.tolist() == starts
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    tokens, labels = [], []
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):  # slices of ranks, empty ones among them
        part = window.read(begin, end)
        assert all(array.dtype == np.int64 and array.shape == (end - begin,) for array in part)
        tokens += part[0].tolist()
        labels += part[1].tolist()
    assert tokens == [token for token, _, _ in expected]
    assert labels == [label for _, label, _ in expected]


@given(documents=_documents, seed=st.integers(0, 9), length=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_every_token_of_an_epoch_once_for_any_context_length(documents, seed, length, tmp_path_factory, write_store):
    corpus = Corpus(TokenStore(write_store(tmp_path_factory.mktemp("c") / "store", documents)), seed)
    total = corpus.num_tokens
    read = []
    for position in range(0, 2 * total, length):
        window = corpus.window(position, min(length, 2 * total - position))
        read += zip(*(array.tolist() for array in window.read(0, window.length)), strict=True)
    stream = [(token, label) for token, label, _ in _stream(corpus, documents, epochs=2)]
    assert read == stream
    assert sorted(read[:total]) == sorted(read[total:])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_store) -> Corpus:
    documents = [[i] * (1 + 7 * i % 90) for i in range(200)]
    return Corpus(TokenStore(write_store(tmp_path_factory.mktemp("corpus") / "store", documents, 16, 8)), seed=3)


def test_epochs_and_seeds_are_shuffled_differently(corpus):
    orders = [corpus._order.epoch_documents(epoch).tolist() for epoch in range(4)]
    other = Order(corpus.store.offsets, corpus.store.lengths, seed=4).epoch_documents(0).tolist()
    assert len({tuple(order) for order in [*orders, other, sorted(other)]}) == 6


def test_the_order_is_the_same_in_every_version():
    """Golden: a change here changes what a resumed run reads."""
    order = Order(np.arange(8) * 2, np.full(8, 2), seed=7)
    assert [order.epoch_documents(epoch).tolist() for epoch in (0, 1, 10**6)] == [
        [4, 1, 6, 3, 2, 7, 5, 0],
        [3, 1, 6, 2, 5, 4, 0, 7],
        [2, 6, 7, 3, 5, 0, 1, 4],
    ]


def test_far_positions_do_not_depend_on_what_was_read_before(corpus):
    position = 10**6 * corpus.num_tokens - 5
    fresh = Corpus(corpus.store, seed=3).window(position, 300)
    corpus.window(0, 10)
    again = corpus.window(position, 300)
    assert np.array_equal(fresh.starts, again.starts)
    assert np.array_equal(fresh.read(0, 300), again.read(0, 300))


def test_a_rank_reads_its_own_blocks_only(corpus):
    store = TokenStore(corpus.store.folder)
    window = Corpus(store, seed=3).window(0, 400)
    assert store.verified_blocks == []  # a window knows its boundaries without reading
    begin, end = 130, 200
    window.read(begin, end)
    wanted = set()
    pieces = window._pieces
    for piece, start in enumerate(window.starts.tolist()):
        stop = window.starts[piece + 1] if piece + 1 < len(window.starts) else 400
        source = pieces.begins[piece] - start
        tokens = range(max(start, begin), min(stop, end))
        wanted |= {int(source + i) // 16 for i in tokens}
        if tokens and source + tokens[-1] + 1 < pieces.document_ends[piece]:
            wanted.add(int(source + tokens[-1] + 1) // 16)  # the label of the slice's last token
    assert set(store.verified_blocks) == wanted
    assert len(wanted) < store.manifest.num_blocks / 4


def test_positions_and_slices_out_of_range(corpus):
    for position, length in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="window of"):
            corpus.window(position, length)
    window = corpus.window(0, 10)
    for begin, end in ((-1, 3), (3, 2), (0, 11)):
        with pytest.raises(ValueError, match="slice"):
            window.read(begin, end)
