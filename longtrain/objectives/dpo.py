"""Direct preference optimisation (Rafailov et al. 2023, equation 7): of two completions of a prompt, prefer one.

The loss of a pair is -log sigmoid(beta m), with m the chosen completion's log-probability less that under the reference
model, less the same of the rejected one: a function of sums over tokens.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from longtrain.core import contracts
from longtrain.core.paths import GivenPath
from longtrain.core.targets import Targets
from longtrain.objectives._examples import per_example


@dataclass(frozen=True)
class Config:
    """`conf/objective/dpo.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    beta: Annotated[float, Field(gt=0)]
    """How dearly departing from the reference model is bought."""
    reference: GivenPath | None
    """The checkpoint of the reference model; null: the data have its log-probabilities."""


class Objective(contracts.Objective):
    """See `core.contracts.Objective`; an example is a pair."""

    linear = False
    metrics = ("accuracy", "margin")
    unit = "nats/pair"
    instead = MappingProxyType({"reference_log_probs": "set objective.reference to the folder of a checkpoint"})

    def __init__(self, config: Config) -> None:
        self.config, self.reference = config, config.reference
        self.columns = ("example", "weight", "side", *(() if config.reference else ("reference_log_probs",)))

    def count(self, targets: Targets) -> Tensor:
        """Pairs."""
        return targets.columns["weight"].sum(dtype=torch.float64)

    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        """The margin m of every pair, as [num_examples]; `side` is 1 for tokens of the chosen completion, -1 else."""
        margins = targets.columns["side"] * (log_probs - targets.columns["reference_log_probs"])
        return per_example(margins, targets)

    def loss_sum(self, sums: Tensor) -> Tensor:
        """Of all pairs."""
        return -F.logsigmoid(self.config.beta * sums).sum()

    def metric_sums(self, sums: Tensor) -> Tensor:
        """Pairs whose chosen completion is preferred, and beta m, the difference of the implied rewards."""
        return torch.stack([(sums > 0).sum(dtype=sums.dtype), self.config.beta * sums.sum()])
