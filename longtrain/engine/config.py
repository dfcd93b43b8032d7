"""Optimizer, schedule and parameter sharding."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """`conf/optimizer/adamw.yaml`: AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["adamw"]
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)]
    """Learning rate of the last step as a fraction of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)]
    betas: tuple[Fraction, Fraction]
    epsilon: Annotated[float, Field(gt=0)]
    weight_decay: NonNegative
    """Applied to matrices only, not to norms, biases and decay parameters."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are clipped to this global norm."""


@dataclass(frozen=True)
class EngineConfig:
    """`conf/engine/replicated.yaml`: every rank holds all parameters."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Literal["replicated"]
    precision: Literal["float32", "bfloat16", "float64"]
    """Type of activations; parameters, optimizer state and gradients stay float32 (float64 for `float64`)."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` is CUDA where there is one."""
