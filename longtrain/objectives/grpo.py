"""Group relative policy optimisation (Shao et al. 2024, equations 3 and 4) on rollouts with their advantages.

A token of completion i costs -(min(r A, clip(r, 1 - clip, 1 + clip) A) - kl_coefficient k): r = p / p_old, A the
completion's advantage within its group, and k = p_ref / p - log(p_ref / p) - 1, which estimates the divergence from a
reference model (Schulman 2020). Tokens are averaged over their completion, completions over the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from longtrain.core import contracts
from longtrain.core.targets import Targets


@dataclass(frozen=True)
class Config:
    """`conf/objective/grpo.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    clip: Annotated[float, Field(gt=0, lt=1)]
    """How far a token's ratio to the policy that sampled it may go before it has no gradient."""
    kl_coefficient: Annotated[float, Field(ge=0)]
    """Of the divergence from the reference model; 0 needs no reference."""
    reference: Path | None
    """The checkpoint of the reference model; null: the data have its log-probabilities, where they are needed."""
    on_policy: bool
    """Whether the weights being trained sampled the rollouts: ratios are 1, and data need not say what they were."""

    def __post_init__(self) -> None:
        if self.reference is not None and not self.kl_coefficient:
            raise ValueError("a reference does nothing with kl_coefficient=0; set one of them otherwise")


class Objective(contracts.Objective):
    """See `core.contracts.Objective`; an example is a completion."""

    unit = "of advantage"

    def __init__(self, config: Config) -> None:
        self.config, self.reference = config, config.reference
        old = () if config.on_policy else ("old_log_probs",)
        reference = ("reference_log_probs",) if config.kl_coefficient and not config.reference else ()
        self.columns = ("weight", "advantage", *old, *reference)

    def count(self, targets: Targets) -> Tensor:
        """Completions."""
        return targets.columns["weight"].sum(dtype=torch.float64)

    def sums(self, log_probs: Tensor, targets: Targets) -> Tensor:
        """The loss."""
        columns, clip = targets.columns, self.config.clip
        weight, advantage = columns["weight"], columns["advantage"]
        # Where nothing counts a column may hold any number, whose exponential is none.
        old = log_probs.detach() if self.config.on_policy else columns["old_log_probs"]
        ratio = torch.where(weight > 0, log_probs - old, 0).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        if self.config.kl_coefficient:
            gap = torch.where(weight > 0, columns["reference_log_probs"] - log_probs, 0)
            loss = loss + self.config.kl_coefficient * (gap.expm1() - gap)
        return (weight * loss).sum()
