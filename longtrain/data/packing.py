"""Whole examples in sequences of the context length: a function of (seed, position), whatever the number of ranks.

The examples, in an order drawn from the seed, go each into the first of a few open sequences that has room for it;
where none has, the oldest is closed and a new one opened. Sequences are laid end to end in another order every epoch.
What an example leaves free at the end of its sequence is padding, which is a document of its own and has no label.
"""

import numpy as np

from longtrain.core.errors import Refused
from longtrain.core.labels import IGNORED_LABEL
from longtrain.data.corpus import Corpus, Window
from longtrain.data.examples import Examples
from longtrain.data.order import Pieces, shuffled
from longtrain.data.store import TokenStore

_OPEN_SEQUENCES = 16


class PackedCorpus(Corpus):
    """An open store of examples; positions count tokens of sequences, padding included."""

    def __init__(self, store: TokenStore, seed: int, context_length: int) -> None:
        """0 <= seed < 2^64. Raises Refused for an example that is longer than the context."""
        super().__init__(store, seed)
        assert store.examples is not None and store.manifest.examples is not None
        self._examples, self._seed, self._length = store.examples, seed, context_length
        self.digest = f"{self.digest}-{store.manifest.examples.content}"
        self.columns = ("example", "weight", *store.examples.columns)
        firsts = np.flatnonzero(np.diff(store.examples.example, prepend=-1))
        self._bounds = np.append(firsts, len(store.lengths))
        lengths = np.add.reduceat(store.lengths, firsts)
        longest = int(lengths.argmax())
        if lengths[longest] > context_length:
            origin = store.origin(int(firsts[longest]))
            raise Refused(
                f"context_length={context_length}: example {origin} has {lengths[longest]} tokens, and none is cut; "
                f"set context_length={lengths[longest]} or more, or remove it"
            )
        self._packed, self._offsets = pack(lengths, shuffled(len(lengths), seed, 0), context_length)
        self._num_sequences = len(self._offsets) - 1
        self.num_tokens = self._num_sequences * context_length
        self._orders: dict[int, np.ndarray] = {}

    def window(self, position: int, length: int) -> Window:
        """The sequence at `position`, a multiple of `length`, which is the context length."""
        if position < 0 or length != self._length or position % length:
            raise ValueError(f"window of {length} tokens at position {position}: sequences have {self._length}")
        epoch, number = divmod(position // length, self._num_sequences)
        if epoch not in self._orders:
            self._orders = {epoch: shuffled(self._num_sequences, self._seed, epoch)}
        sequence = self._orders[epoch][number]
        numbers = self._packed[self._offsets[sequence] : self._offsets[sequence + 1]]
        documents = np.concatenate([np.arange(self._bounds[n], self._bounds[n + 1]) for n in numbers])
        return PackedWindow(self.store, self._examples, documents, length)


class PackedWindow(Window):
    """A sequence of whole examples."""

    def __init__(self, store: TokenStore, examples: Examples, documents: np.ndarray, length: int) -> None:
        """`documents` int64, of which those of an example are neighbours."""
        begins, lengths = store.offsets[documents], store.lengths[documents]
        starts = np.cumsum(lengths) - lengths
        filled = int(lengths.sum())
        padding = [0] if filled < length else []  # a piece of no document
        parts = (starts, [filled][: len(padding)]), (begins, padding), (begins + lengths, padding)
        super().__init__(store, Pieces(*(np.concatenate(part).astype(np.int64) for part in parts)), length)
        self._documents, self._document_starts, self._of = documents, starts, examples
        self._example = np.cumsum(np.diff(examples.example[documents], prepend=-1) != 0) - 1
        self.num_examples = int(self._example[-1]) + 1
        predicted = np.bincount(self._example, weights=examples.predicted[documents])
        self._weights = 1 / predicted[self._example]

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Window.read`; labels are those of completions."""
        tokens, labels = super().read(begin, end)
        return tokens, np.where(self._place(begin, end)[1] >= 0, labels, IGNORED_LABEL)

    def columns(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """See `Window.columns`; float64, 0 where there is no label."""
        piece, place = self._place(begin, end)
        labelled = place >= 0
        found = {"example": self._example[piece], "weight": np.where(labelled, self._weights[piece], 0.0)}
        for name, values in self._of.values.items():
            found[name] = np.where(labelled, values[self._documents[piece]], 0.0)
        found |= {name: np.zeros(end - begin) for name in self._of.columns if name not in found}
        predicting = np.flatnonzero(labelled)
        for own in np.split(predicting, np.flatnonzero(np.diff(piece[predicting])) + 1):
            if len(own):  # of one document
                for name, values in self._of.token_values(int(self._documents[piece[own[0]]])).items():
                    found[name][own] = values[place[own]]
        return found

    def _place(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each token, which of the documents it is in, and which of its completion's tokens is its label, or -1."""
        index = np.arange(begin, end)
        piece = np.searchsorted(self._document_starts, index, side="right") - 1
        document = self._documents[piece]
        place = index - self._document_starts[piece] - (self._of.prompt[document] - 1)
        return piece, np.where((place >= 0) & (place < self._of.predicted[document]), place, -1)


def pack(lengths: np.ndarray, order: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples come into each sequence of `room` tokens; every length fits, and there is at least one.

    Int64 [num_examples], the examples by sequence, and [num_sequences + 1], where each sequence begins among them.
    """
    smallest = int(lengths.min())
    count = 0
    open_numbers: list[int] = []  # those of the last sequences that may still have room
    free: list[int] = []
    chosen = []
    for need in lengths[order].tolist():
        for at, left in enumerate(free):
            if left >= need:
                chosen.append(open_numbers[at])
                free[at] = left - need
                if free[at] < smallest:
                    del open_numbers[at], free[at]
                break
        else:
            if free and open_numbers[0] <= count - _OPEN_SEQUENCES:
                del open_numbers[0], free[0]
            chosen.append(count)
            if room - need >= smallest:
                open_numbers.append(count)
                free.append(room - need)
            count += 1
    sequence = np.array(chosen)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence))])
    return order[np.argsort(sequence, kind="stable")], offsets
