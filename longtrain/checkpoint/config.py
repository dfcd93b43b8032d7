"""When checkpoints are taken and how many are kept."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint.*` in `conf/train.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    every_steps: Annotated[int, Field(ge=1)]
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=1)]
    """Newest committed checkpoints that are kept."""
