"""Next-token prediction: the sum of cross-entropies over the tokens that have a label."""

from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional as F

from longtrain.core.labels import IGNORED_LABEL


@dataclass(frozen=True)
class Config:
    """`conf/objective/next_token.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str


class Objective:
    """See `core.contracts.Objective`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, labels: Tensor) -> Tensor:
        """How many tokens of [B, L] count in the loss, as a float64 scalar."""
        return (labels != IGNORED_LABEL).sum().to(torch.float64)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over tokens, [n, vocabulary] and [n], of -log p(label), in nats, float32 at least.

        Tokens labelled `IGNORED_LABEL` add nothing.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, labels, ignore_index=IGNORED_LABEL, reduction="sum")
