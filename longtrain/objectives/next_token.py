"""Next-token prediction: the sum of cross-entropies over the tokens that have a label."""

from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import Tensor

from longtrain.core import contracts
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.targets import Targets


@dataclass(frozen=True)
class Config:
    """`conf/objective/next_token.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str


class Objective(contracts.Objective):
    """See `core.contracts.Objective`."""

    unit = "nats/token"

    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, targets: Targets) -> Tensor:
        """Tokens that have a label."""
        return (targets.labels != IGNORED_LABEL).sum().to(torch.float64)

    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        """Of -log p(label)."""
        return -log_probs.sum()
