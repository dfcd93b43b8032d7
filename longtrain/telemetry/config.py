"""What a run records beside its run directory."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict


@dataclass(frozen=True)
class TelemetryConfig:
    """`telemetry.*` in `conf/train.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    wandb: Literal["disabled", "offline", "online"]
    """Weights & Biases mode. The API key comes from wandb's own login or environment, never from here."""
    wandb_project: str
