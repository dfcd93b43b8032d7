"""The end of the model: logits of a few tokens are made, scored, differentiated and dropped.

Tokens without a label have none.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.core.contracts import Objective
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.targets import Targets
from longtrain.model.model import Model
from longtrain.streaming.blocks import trainable
from longtrain.streaming.sums import GradientSums


@dataclass(frozen=True)
class Piece:
    """A few tokens of a chunk that have a label; there may be none."""

    rows: slice | Tensor
    """Which of the chunk's B L tokens they are."""
    targets: Targets
    """[n]."""


def pieces(targets: Targets, size: int) -> list[Piece]:
    """The tokens of [B, L] that have a label, at most `size` in each; one piece at least.

    The host waits for the device: before the first batch of a step nothing is queued there, and a further batch begins
    when the one before it has been computed.
    """
    flat = targets.flatten()
    index = (flat.labels != IGNORED_LABEL).nonzero()[:, 0]
    count = len(flat.labels)
    if len(index) == count:
        rows: list[slice | Tensor] = [slice(begin, begin + size) for begin in range(0, max(count, 1), size)]
    else:
        rows = list(index.split(size))
    return [Piece(some, _with_examples(flat.at(some))) for some in rows]


def _with_examples(targets: Targets) -> Targets:
    if "example" not in targets.columns or not targets.labels.numel():
        return targets
    first, last = torch.stack(torch.aminmax(targets.columns["example"])).tolist()
    return replace(targets, examples=range(first, last + 1))


class Head:
    """Final norm, head and objective of a model."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        sums: GradientSums,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._model, self._objective, self._sums, self._autocast = model, objective, sums, autocast
        self._parameters = trainable([model.norm, model.head])

    @torch.no_grad()
    def sums(self, hidden: Tensor, asked: list[Piece]) -> Tensor:
        """What the objective sums over the pieces of [B, L, D] hidden states, in float64."""
        rows = hidden.flatten(0, 1)
        return _total([self._objective.sums(self._log_probs(rows[p.rows], p.targets), p.targets) for p in asked])

    def backward(self, hidden: Tensor, asked: list[Piece], cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Add gradients of the parameters to the sums, given that of the loss by what the objective sums.

        Returns:
            The objective's sums in float64, and the gradient of the loss by the hidden states [B, L, D].
        """
        rows = hidden.detach().flatten(0, 1)
        grad = torch.zeros_like(rows)
        found = []
        for piece in asked:
            sums, grad[piece.rows] = self._score(rows[piece.rows], piece.targets, cotangent)
            found.append(sums)
        return _total(found), grad.view_as(hidden)

    @torch.no_grad()
    def log_probs(self, hidden: Tensor, labels: Tensor, asked: list[Piece]) -> Tensor:
        """Of [B, L, D] hidden states and labels [B, L]: log p(label) as [B, L], 0 where there is no label."""
        rows = hidden.flatten(0, 1)
        found = rows.new_zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
        for piece in asked:
            found[piece.rows] = self._log_probs(rows[piece.rows], piece.targets)
        return found.view_as(labels)

    def _score(self, rows: Tensor, targets: Targets, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of [n, D] hidden states and the gradient by these."""
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            sums = self._objective.sums(self._log_probs(leaf, targets), targets)
        if not len(rows):  # nothing leads from the sums to the head
            return sums.detach(), rows
        own, *grads = torch.autograd.grad([sums], [leaf, *self._parameters], [cotangent.to(sums.dtype)])
        self._sums.add(self._parameters, grads)
        return sums.detach(), own

    def _log_probs(self, rows: Tensor, targets: Targets) -> Tensor:
        """Of [n, D]: log p(label) as [n], in float32 at least."""
        if not len(rows):
            return rows.new_zeros(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        with self._autocast():
            logits = self._model.head(self._model.norm(rows))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(wide, targets.labels, reduction="none")


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(torch.float64) for part in parts]).sum(0)
