"""A rank's part of the batch of a step: a function of the data position and the rank alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.comm.mesh import Mesh
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout
from longtrain.data.corpus import Corpus


@dataclass(frozen=True)
class Batch:
    """What this rank holds of its data group's sequences."""

    tokens: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64, -100 where nothing is to be predicted."""
    layout: SequenceLayout


class BatchReader:
    """Reads the batch at a position of the token stream.

    Sequence i of a step at position p is the window [p + i T, p + (i + 1) T) of the stream; data rank d holds the
    sequences d B, ..., d B + B - 1. So the tokens of a step do not depend on the number of ranks.
    """

    def __init__(
        self, corpus: Corpus, context_length: int, batch_size: int, layout: LayoutKind, mesh: Mesh, device: torch.device
    ) -> None:
        if batch_size % mesh.data.size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of {mesh.data.size} data-parallel groups")
        self._corpus, self._length, self._mesh, self._device = corpus, context_length, mesh, device
        self._kind: LayoutKind = layout
        self._num_sequences = batch_size // mesh.data.size
        self.tokens_per_step = batch_size * context_length

    def read(self, position: int) -> Batch:
        """The batch of the step that starts at `position` tokens; only this rank's slice of it is read."""
        first = position + self._mesh.data.rank * self._num_sequences * self._length
        windows = [self._corpus.window(first + i * self._length, self._length) for i in range(self._num_sequences)]
        starts = tuple(tuple(int(s) for s in window.starts) for window in windows)
        layout = SequenceLayout(self._length, self._mesh.sequence.size, starts, kind=self._kind)
        spans = layout.spans(self._mesh.sequence.rank, 0)
        rows = [[np.concatenate(x) for x in zip(*(w.read(*span) for span in spans), strict=True)] for w in windows]
        tokens, labels = (torch.from_numpy(np.stack(column)).to(self._device) for column in zip(*rows, strict=True))
        return Batch(tokens=tokens, labels=labels, layout=layout)
