"""Group relative policy optimisation (Shao et al. 2024, equations 3 and 4) on rollouts with their advantages.

A token of completion i costs -(min(r A, clip(r, 1 - clip, 1 + clip) A) - kl_coefficient k): r = p / p_old, A the
completion's advantage within its group, and k = p_ref / p - log(p_ref / p) - 1, which estimates the divergence from a
reference model (Schulman 2020). Tokens are averaged over their completion, completions over the step.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from longtrain.core import contracts
from longtrain.core.paths import GivenPath
from longtrain.core.targets import Targets

MOST_LOG_RATIO = 20.0
"""Beyond e^20 two policies have nothing to do with each other, and such tokens have no gradient."""


@dataclass(frozen=True)
class Config:
    """`conf/objective/grpo.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    clip: Annotated[float, Field(gt=0, lt=1)]
    """How far a token's ratio to the policy that sampled it may go before it has no gradient."""
    kl_coefficient: Annotated[float, Field(ge=0)]
    """Of the divergence from the reference model; 0 needs no reference."""
    reference: GivenPath | None
    """The checkpoint of the reference model; null: the data have its log-probabilities, where they are needed."""
    on_policy: bool
    """Whether the weights being trained sampled the rollouts: ratios are 1, and data need not say what they were. True
    for the first step on fresh rollouts; after it the weights are others."""

    def __post_init__(self) -> None:
        if self.reference is not None and not self.kl_coefficient:
            raise ValueError("reference is not read with kl_coefficient=0; set the one to null or the other above 0")


class Objective(contracts.Objective):
    """See `core.contracts.Objective`; an example is a completion."""

    unit = "advantage/completion"
    instead = MappingProxyType(
        {
            "old_log_probs": "set objective.on_policy=true if they are fresh from the weights that are trained",
            "reference_log_probs": "set objective.reference to the folder of a checkpoint, or kl_coefficient=0",
        }
    )

    def __init__(self, config: Config) -> None:
        self.config, self.reference = config, config.reference
        old = () if config.on_policy else ("old_log_probs",)
        reference = ("reference_log_probs",) if config.kl_coefficient and not config.reference else ()
        self.columns = ("weight", "advantage", *old, *reference)
        self.metrics = ("clip_fraction", "kl") if config.kl_coefficient else ("clip_fraction",)

    def count(self, targets: Targets) -> Tensor:
        """Completions."""
        return targets.columns["weight"].sum(dtype=torch.float64)

    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        """Of the loss, of the tokens whose gradient is clipped, and of k where it has a part in the loss."""
        columns, clip = targets.columns, self.config.clip
        weight, advantage = columns["weight"], columns["advantage"]
        old = log_probs.detach() if self.config.on_policy else columns["old_log_probs"]
        ratio = _exponent(log_probs - old).exp()
        gain, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
        loss, figures = -torch.minimum(gain, clipped), [clipped < gain]
        if self.config.kl_coefficient:
            gap = _exponent(columns["reference_log_probs"] - log_probs)
            divergence = gap.expm1() - gap
            loss = loss + self.config.kl_coefficient * divergence
            figures.append(divergence.detach())
        return torch.stack([(weight * term).sum() for term in (loss, *figures)])

    def loss_sum(self, sums: Tensor) -> Tensor:
        """Of all completions."""
        return sums[0]

    def metric_sums(self, sums: Tensor) -> Tensor:
        """See `sums`."""
        return sums[1:]


def _exponent(log_ratio: Tensor) -> Tensor:
    """Up to where float32 has exponentials with room for what they are multiplied by; constant beyond."""
    return log_ratio.clamp(max=MOST_LOG_RATIO)
