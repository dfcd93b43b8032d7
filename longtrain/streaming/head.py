"""The end of the model: logits of a few tokens are made, scored, differentiated and dropped."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from longtrain.core.contracts import Objective
from longtrain.model.model import Model
from longtrain.streaming.blocks import trainable
from longtrain.streaming.sums import GradientSums


class Head:
    """Final norm, head and objective of a model."""

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

    def backward(self, hidden: Tensor, labels: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Score [B, L, D] hidden states against labels [B, L]; `tokens` at a time, all of them where there are fewer.

        Adds the gradients of loss_sum / count to the sums.

        Returns:
            The sum of losses (a float64 scalar) and the gradient of loss_sum / count by the hidden states.
        """
        rows = hidden.detach().flatten(0, 1)
        grad = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        parts = zip(*(x.split(self._tokens) for x in (rows, labels.flatten(), grad)), strict=True)
        for some, some_labels, some_grad in parts:
            if len(some):  # a rank may have no tokens
                total += self._score(some, some_labels, some_grad, count)
        return total, grad.view_as(hidden)

    def _score(self, hidden: Tensor, labels: Tensor, grad: Tensor, count: Tensor) -> Tensor:
        """The sum of losses of [n, D] hidden states, whose gradients are written to `grad`."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), self._autocast():
            loss = self._objective.loss_sum(self._model.head(self._model.norm(leaf)), labels)
            share = loss / count.to(loss.dtype)
        own, *grads = torch.autograd.grad(share, [leaf, *self._parameters])
        grad.copy_(own)
        self._sums.add(self._parameters, grads)
        return loss.detach()
