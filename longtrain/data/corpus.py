"""The stream of tokens that training consumes, and windows into it.

Epoch after epoch, the documents are laid end to end in the order of `longtrain.data.order`, each with its
end-of-document token. A position counts tokens consumed since the start of training. It says everything: the stream
does not depend on the context length, the number of ranks, or on what was read before.
"""

import numpy as np

from longtrain.core.labels import IGNORED_LABEL
from longtrain.data.order import Order, Pieces
from longtrain.data.store import TokenStore


class Window:
    """A stretch of the stream that knows its document boundaries and reads its tokens on demand."""

    def __init__(self, store: TokenStore, pieces: Pieces, length: int) -> None:
        self._store = store
        self._pieces = pieces
        self.length = length
        self.starts: np.ndarray = pieces.starts
        """int64, sorted, starts[0] == 0: index in the window at which each document, or piece of one, begins."""
        self.num_examples = 0
        """Examples of which it knows more than tokens."""

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 [end - begin], of the window's slice [begin, end); it may be empty.

        A label is the next token of the same document, also where that token lies behind the slice or the window;
        else IGNORED_LABEL. Only the slice and one more token are read.

        Raises CorruptData where the store is damaged there.
        """
        if not 0 <= begin <= end <= self.length:
            raise ValueError(f"slice [{begin}, {end}) of a window of {self.length} tokens")
        tokens = np.full(end - begin, self._store.manifest.end_of_document, np.int64)
        labels = np.full(end - begin, IGNORED_LABEL, np.int64)
        if begin == end:
            return tokens, labels
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts, end, side="left"))
        for piece in range(first, last):
            start = int(self.starts[piece])
            shift = int(self._pieces.begins[piece]) - start
            document_end = int(self._pieces.document_ends[piece])
            low, high = max(start, begin), min(document_end - shift, end)
            if high <= low:  # padding
                continue
            source = low + shift
            labelled = min(high - low, document_end - source - 1)
            read = np.empty(max(high - low, labelled + 1), np.int64)
            self._store.read_into(source, read)
            tokens[low - begin : high - begin] = read[: high - low]
            labels[low - begin : low - begin + labelled] = read[1 : labelled + 1]
        return tokens, labels

    def columns(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """What else is known of the window's slice [begin, end), by name; see `core.targets.Targets`."""
        return {}


class Corpus:
    """An open token store in a deterministic order."""

    def __init__(self, store: TokenStore, seed: int) -> None:
        """0 <= seed < 2^64."""
        manifest = store.manifest
        self.store = store
        self.vocab_size: int = manifest.vocab_size
        self.end_of_document: int = manifest.end_of_document
        self.tokenizer: str = manifest.recipe.tokenizer_fingerprint
        """Hexadecimal digest of what gave the tokens their numbers."""
        self.digest: str = manifest.content
        """Hexadecimal digest of all tokens and document boundaries; the seed is not in it."""
        self.num_tokens: int = manifest.num_tokens
        """Positions of an epoch: its tokens, with an end-of-document token for each document, and padding."""
        self.num_documents: int = manifest.num_documents
        self.unigram_entropy: float = manifest.unigram_entropy
        """Nats per token over the whole store."""
        self.columns: tuple[str, ...] = ()
        """Of every window."""
        self._order = Order(store.offsets, store.lengths, seed)

    def window(self, position: int, length: int) -> Window:
        """The tokens [position, position + length) of the endless stream; reads none of them yet."""
        if position < 0 or length < 1:
            raise ValueError(f"window of {length} tokens at position {position}")
        return Window(self.store, self._order.pieces(position, length), length)
