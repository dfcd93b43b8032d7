"""A rank's part of the batches of a step: a function of the data position and the rank alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.comm.mesh import Mesh
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout
from longtrain.core.targets import Targets
from longtrain.data.corpus import Corpus, Window
from longtrain_kernels.spans import Span


@dataclass(frozen=True)
class Batch:
    """What this rank holds of some of its data group's sequences."""

    tokens: Tensor
    """[B, L] int64, by chunk of time, and in a chunk by slot."""
    targets: Targets
    """[B, L]."""
    layout: SequenceLayout


@dataclass(frozen=True)
class BatchSizes:
    """Of a step."""

    context_length: int
    batch_size: int
    """Sequences over all ranks."""
    micro_batch_size: int | None = None
    """Sequences of a data group in one `Batch`; None: all of them."""


@dataclass(frozen=True)
class Cut:
    """Of a sequence; see `core.layout`."""

    layout: LayoutKind
    chunk_tokens: int | None = None


class BatchReader:
    """Reads the batches at a position of the token stream.

    Sequence i of a step at position p is the window [p + i T, p + (i + 1) T) of the stream; data rank d holds the
    sequences d B, ..., d B + B - 1. So the tokens of a step do not depend on the number of ranks.
    """

    def __init__(self, corpus: Corpus, sizes: BatchSizes, cut: Cut, mesh: Mesh, device: torch.device) -> None:
        if sizes.batch_size % mesh.data.size:
            raise ValueError(
                f"batch_size={sizes.batch_size} is not a multiple of {mesh.data.size} data-parallel groups"
            )
        self._corpus, self._sizes, self._cut, self._mesh, self._device = corpus, sizes, cut, mesh, device
        self._num_sequences = sizes.batch_size // mesh.data.size
        self.tokens_per_step = sizes.batch_size * sizes.context_length

    def read(self, position: int) -> list[Batch]:
        """Of the step that starts at `position` tokens; only this rank's slice of it is read."""
        first = self._mesh.data.rank * self._num_sequences
        together = self._sizes.micro_batch_size or self._num_sequences
        sequences = range(first, first + self._num_sequences)
        return [self._read(position, sequences[i : i + together]) for i in range(0, len(sequences), together)]

    def _read(self, position: int, sequences: range) -> Batch:
        length = self._sizes.context_length
        windows = [self._corpus.window(position + i * length, length) for i in sequences]
        starts = tuple(tuple(int(s) for s in window.starts) for window in windows)
        layout = SequenceLayout(length, self._mesh.sequence.size, starts, self._cut.chunk_tokens, self._cut.layout)
        chunks = range(layout.num_chunks)
        spans = [span for chunk in chunks for span in layout.spans(self._mesh.sequence.rank, chunk)]
        read = [_read_window(window, spans) for window in windows]
        # Examples are numbered through the batch.
        firsts = np.cumsum([0, *(window.num_examples for window in windows)])
        for columns, first in zip(read, firsts, strict=False):
            if "example" in columns:
                columns["example"] = columns["example"] + first
        stacked = {n: torch.from_numpy(np.stack([x[n] for x in read])).to(self._device) for n in read[0]}
        tokens, labels = stacked.pop("tokens"), stacked.pop("labels")
        return Batch(tokens=tokens, targets=Targets(labels, stacked, int(firsts[-1])), layout=layout)


def _read_window(window: Window, spans: list[Span]) -> dict[str, np.ndarray]:
    """Tokens, labels and other columns of some spans, one after another."""
    parts = []
    for begin, end in spans:
        tokens, labels = window.read(begin, end)
        parts.append({"tokens": tokens, "labels": labels} | window.columns(begin, end))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
