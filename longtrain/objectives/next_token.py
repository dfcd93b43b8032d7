"""Next-token prediction: the sum of cross-entropies over the tokens that have a label."""

from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longtrain.core.labels import IGNORED_LABEL

CHUNK_TOKENS = 4096  # logits of so many tokens exist at once: 2 GiB in float32 at a vocabulary of 128k


@dataclass(frozen=True)
class Config:
    """`conf/objective/next_token.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str


class Objective:
    """Scores hidden states against labels, a chunk of tokens at a time; logits are recomputed in the backward pass."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, labels: Tensor) -> Tensor:
        """How many tokens of [B, L] count in the loss, as a float64 scalar."""
        return (labels != IGNORED_LABEL).sum().to(torch.float64)

    def loss_sum(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        """Sum over [B, L, D] hidden states of -log p(label), in nats, float32 at least.

        `head` maps [..., D] to logits. Tokens labelled `IGNORED_LABEL` add nothing.
        """
        parts = zip(hidden.flatten(0, 1).split(CHUNK_TOKENS), labels.flatten().split(CHUNK_TOKENS), strict=True)
        sums = [
            checkpoint(_cross_entropy_sum, h, head, y, use_reentrant=False, preserve_rng_state=False) for h, y in parts
        ]
        return torch.stack(sums).sum()


def _cross_entropy_sum(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    logits = head(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORED_LABEL, reduction="sum")
