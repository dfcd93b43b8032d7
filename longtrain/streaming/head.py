"""The end of the model: logits of a few tokens are made, scored, differentiated and dropped."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.core.contracts import Objective
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.targets import Targets
from longtrain.model.model import Model
from longtrain.streaming.blocks import trainable
from longtrain.streaming.sums import GradientSums


class Head:
    """Final norm, head and objective of a model; `tokens` of a rank at a time, all of them where there are fewer."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        tokens: int,
        sums: GradientSums,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._model, self._objective, self._tokens, self._sums = model, objective, tokens, sums
        self._autocast = autocast
        self._parameters = trainable([model.norm, model.head])

    @torch.no_grad()
    def sums(self, hidden: Tensor, targets: Targets) -> Tensor:
        """What the objective sums over [B, L, D] hidden states with targets [B, L], in float64."""
        pieces = self._pieces(hidden.flatten(0, 1), targets)
        return _total([self._objective.sums(self._log_probs(rows, some.labels), some) for rows, some in pieces])

    def backward(self, hidden: Tensor, targets: Targets, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Add gradients of the parameters to the sums, given that of the loss by what the objective sums.

        Returns:
            The objective's sums in float64, and the gradient of the loss by the hidden states [B, L, D].
        """
        rows = hidden.detach().flatten(0, 1)
        grad = torch.empty_like(rows)
        pieces = zip(self._pieces(rows, targets), grad.split(self._tokens), strict=True)
        found = [self._score(some, some_targets, cotangent, some_grad) for (some, some_targets), some_grad in pieces]
        return _total(found), grad.view_as(hidden)

    def _score(self, hidden: Tensor, targets: Targets, cotangent: Tensor, grad: Tensor) -> Tensor:
        """The sums of [n, D] hidden states, whose gradients are written to `grad`."""
        if not len(hidden):
            return self.sums(hidden[None], targets)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            sums = self._objective.sums(self._log_probs(leaf, targets.labels), targets)
        own, *grads = torch.autograd.grad([sums], [leaf, *self._parameters], [cotangent.to(sums.dtype)])
        grad.copy_(own)
        self._sums.add(self._parameters, grads)
        return sums.detach()

    @torch.no_grad()
    def log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of [B, L, D] hidden states and labels [B, L]: log p(label) as [B, L], 0 where there is no label."""
        pieces = self._pieces(hidden.flatten(0, 1), Targets(labels))
        return torch.cat([self._log_probs(rows, some.labels) for rows, some in pieces]).view_as(labels)

    def _pieces(self, rows: Tensor, targets: Targets) -> list[tuple[Tensor, Targets]]:
        """A rank without tokens has one piece, an empty one: its sums have a shape, too."""
        return list(zip(rows.split(self._tokens), targets.split(self._tokens), strict=True))

    def _log_probs(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Of [n, D] and [n]: log p(label) as [n], in float32 at least; 0 where there is no label."""
        if not len(rows):
            return rows.new_zeros(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        with self._autocast():
            logits = self._model.head(self._model.norm(rows))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(wide, labels, ignore_index=IGNORED_LABEL, reduction="none")


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(torch.float64) for part in parts]).sum(0)
