"""Softmax attention to the last `window` tokens of the document (Beltagy et al. 2020, "Longformer")."""

from dataclasses import dataclass

from longtrain.mixers import softmax
from longtrain.mixers._config import Positive


@dataclass(frozen=True)
class Config(softmax.Config):
    """`conf/mixer/sliding_window.yaml`."""

    window: Positive
    """Tokens that a token sees, itself included."""


class Mixer(softmax.Mixer):
    """[B, L, D] -> [B, L, D]."""

    keeps_prefix = False

    def __init__(self, config: Config, width: int) -> None:
        super().__init__(config, width)
        self.window = config.window

    def flops_per_token(self, context: float) -> float:
        """See `SequenceMixer`."""
        assert self.window is not None
        return super().flops_per_token(min(context, self.window))
