"""The contract between mixers and the rest of the sequence: N mixers + M algorithms, never N x M.

A mixer is single-device mathematics. What it needs from tokens that this rank does not hold, it asks of the `Sequence`
handle that the model passes down: `scan` for a linear recurrence, `attend` for softmax attention, `halo` for the rows
just before its own. It never learns how many ranks there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from torch import Tensor, nn

from longtrain.core.targets import Targets
from longtrain_kernels.affine import Segment
from longtrain_kernels.backend import Backend
from longtrain_kernels.scan import OnHeads


class Recurrence(Protocol):
    """A linear recurrence bound to the inputs of one segment, such as `longtrain_kernels.diagonal_scan.DiagonalScan`.

    S_t = A_t S_{t-1} + B_t, o_t = S_t^T q_t. In both methods `documents` [B, L] counts the document starts of the
    segment up to and including each token, so that 0 is the document which the incoming state belongs to; the state
    restarts from zero at each start. An empty segment (L = 0) is the identity, and its results still depend on the
    inputs: every rank must take part in the collectives of the backward pass.
    """

    def rows(self, part: slice) -> Self:
        """The recurrence of some of the segment's tokens, as a segment of its own."""
        ...

    def mapped(self, on_key_heads: OnHeads, on_value_heads: OnHeads) -> Self:
        """The recurrence of what the functions make of its tensors [B, L, heads, ...]: of those with key heads, and
        with value heads."""
        ...

    @property
    def num_heads(self) -> tuple[int, int]:
        """Key heads G and value heads H."""
        ...

    def apply(self, documents: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, H, V] and final state [B, H, K, V] from the incoming state (None: zero)."""
        ...

    def summarize(self, documents: Tensor) -> Segment:
        """Outputs from the zero state, the affine map of the segment, and what `Segment.correct` needs."""
        ...


class Stretch(NamedTuple):
    """Tokens of a rank that follow each other in the sequence, with the rows before them."""

    part: slice
    """Which of the rank's L tokens they are."""
    rows: Tensor
    """[B, width + len, D]: the `width` rows before the first of them, then their own."""


class Sequence(Protocol):
    """One rank's part of a batch of sequences, as a mixer sees it."""

    @property
    def positions(self) -> Tensor:
        """[B, L] int64: position of each token in its document."""
        ...

    @property
    def backend(self) -> Backend | None:
        """What runs the operations; a mixer hands it to each that it builds. None: by the device."""
        ...

    def scan(self, op: Recurrence) -> Tensor:
        """Run the recurrence over the whole sequence; returns this rank's outputs [B, L, H, V]."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """Causal softmax attention inside documents.

        Args:
            q: [B, L, H, K]. k: [B, L, G, K]. v: [B, L, G, V]; G divides H.
            window: a token sees itself and the `window - 1` tokens before it; None: all before it.
            scale: of the scores; None: K^-1/2.

        Returns:
            [B, L, H, V].
        """
        ...

    def halo(self, x: Tensor, width: int) -> list[Stretch]:
        """[B, L, D] -> the stretches of the sequence that this rank holds, each with the `width` rows before it.

        They cover the rank's tokens in order. Rows before the start of the sequence are zero. Rows of an earlier
        document are passed on as they are: `positions` tells which of them a token may read.
        """
        ...


class SequenceMixer(nn.Module, ABC):
    """Base of the `Mixer` that every `mixers/<name>.py` defines; built as `Mixer(config, width)`.

    A mixer that differs by depth reads `layer` and `num_layers` when it runs; the builder sets them.
    Draws its random numbers from torch's global generator, which the caller seeds. A projection named `output` ends
    the residual branch and is initialised smaller with depth.
    """

    layer: int = 0
    """Which layer of the model this is, counted from 0."""
    num_layers: int = 1
    """Of the model."""
    keeps_prefix: bool = False
    """Whether it attends to the whole sequence so far, whose keys and values grow with the context."""

    @abstractmethod
    def forward(self, x: Tensor, sequence: Sequence) -> Tensor:
        """[B, L, D] -> [B, L, D]."""

    @abstractmethod
    def flops_per_token(self, context: float) -> float:
        """Operations of a forward pass beyond the projections, for a token that sees `context` tokens."""


class Objective(ABC):
    """Base of the `Objective` that every `objectives/<name>.py` defines; built as `Objective(config)`.

    A loss is a function of sums over the tokens that have a label: `loss_sum` of the total of `sums`. Sums of parts are
    added, over chunks of time and over the ranks of a sequence, so that no part needs logits or log-probabilities of
    another one. Where `loss_sum` is linear its gradient is known beforehand. Else a forward pass finds the total first;
    a token's gradient is then that of `sums` with the cotangent that `loss_sum` has there, by the chain rule.
    """

    linear: bool = True
    """Whether `loss_sum` is linear in the sums."""
    metrics: tuple[str, ...] = ()
    """Names of what `metric_sums` finds: means over `count` that are told beside the loss."""
    columns: tuple[str, ...] = ()
    """Of `Targets`, those that it reads."""
    instead: Mapping[str, str] = {}
    """By column, what a user may do whose data do not have it."""
    reference: Path | None = None
    """The checkpoint of a frozen model, whose log-probabilities of the labels become the column
    `reference_log_probs`."""
    unit: str
    """Of the loss, for people: `nats/token`."""

    @abstractmethod
    def count(self, targets: Targets) -> Tensor:
        """What the loss is divided by, a float64 scalar; summed over all batches and ranks of a step."""

    @abstractmethod
    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        """Sums over some tokens.

        Args:
            log_probs: [n] log p(label), in nats, float32 at least.
            targets: of the same tokens, [n], which all have a label. There may be no token.

        Returns:
            float32 at least, of any shape that depends on `targets.num_examples` alone.
        """

    def loss_sum(self, sums: Tensor) -> Tensor:
        """The loss of all examples, a scalar, from the sums over all their tokens."""
        return sums

    def metric_sums(self, sums: Tensor) -> Tensor:
        """[len(metrics)] likewise; linear where the loss is."""
        return sums.new_zeros(0)
