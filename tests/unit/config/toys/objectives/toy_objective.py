"""A component without options."""

from dataclasses import dataclass

from pydantic import ConfigDict
from torch import Tensor

from longtrain.core import contracts
from longtrain.core.targets import Targets


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str


class Objective(contracts.Objective):
    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, targets: Targets) -> Tensor:
        return targets.labels.new_tensor(1.0)

    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        return log_probs.sum()
