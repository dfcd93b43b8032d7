"""The order of the documents: a pure function of (seed, epoch), the same for any number of ranks and any context.

Epoch e lays all documents end to end in the order that sorts the first 64-bit words of numpy's Philox generator with
the key (seed, e). The raw words of a numpy bit generator are the same in every version and on every machine, which
`permutation` and `shuffle` do not promise.
"""

from dataclasses import dataclass

import numpy as np


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count]: the numbers below `count` in the order of an epoch; 0 <= seed, epoch < 2^64."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Pieces:
    """The parts of documents that a window covers, in order. All int64 [num_pieces]."""

    starts: np.ndarray
    """Index in the window at which each piece begins; sorted, starts[0] == 0."""
    begins: np.ndarray
    """Token of the store at which each piece begins."""
    document_ends: np.ndarray
    """Token of the store at which each piece's document ends (exclusive)."""


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray
    ends: np.ndarray  # in tokens of the epoch, exclusive


class Order:
    """The endless stream over the documents of a store."""

    def __init__(self, offsets: np.ndarray, lengths: np.ndarray, seed: int) -> None:
        """`offsets` and `lengths` int64 [num_documents] in tokens of the store, every length > 0; 0 <= seed < 2^64."""
        self._offsets = offsets
        self._lengths = lengths
        self._seed = seed
        self._num_tokens = int(lengths.sum())
        self._epochs: dict[int, _Epoch] = {}

    def epoch_documents(self, epoch: int) -> np.ndarray:
        """int64 [num_documents]: the documents in the order of one epoch."""
        return self._epoch(epoch).documents

    def pieces(self, position: int, length: int) -> Pieces:
        """The pieces of the tokens [position, position + length) of the stream; length > 0."""
        parts = []
        end = position + length
        for epoch in range(position // self._num_tokens, (end - 1) // self._num_tokens + 1):
            origin = epoch * self._num_tokens
            parts.append(self._pieces_of_epoch(epoch, max(position, origin) - origin, end - origin, origin - position))
        starts, begins, ends = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Pieces(starts, begins, ends)

    def _pieces_of_epoch(self, epoch: int, low: int, high: int, shift: int) -> tuple[np.ndarray, ...]:
        """Pieces of the tokens [low, high) of one epoch, whose first token has index `shift` in the window."""
        order = self._epoch(epoch)
        first = int(np.searchsorted(order.ends, low, side="right"))
        last = int(np.searchsorted(order.ends, high, side="left"))
        documents = order.documents[first : last + 1]
        document_begins = order.ends[first : last + 1] - self._lengths[documents]
        piece_begins = np.maximum(document_begins, low)
        begins = self._offsets[documents] + piece_begins - document_begins
        return piece_begins + shift, begins, self._offsets[documents] + self._lengths[documents]

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            documents = shuffled(len(self._lengths), self._seed, epoch)
            found = _Epoch(documents, np.cumsum(self._lengths[documents]))
            # A window reaches into the next epoch, hence two.
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1} | {epoch: found}
        return found
