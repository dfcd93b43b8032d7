"""The ways of making a step's gradients that `longtrain bench stream` compares."""

import re
from dataclasses import dataclass
from typing import Literal

from longtrain.core.registry import did_you_mean
from longtrain.streaming.config import StreamConfig

_OFFLOADED = "-offload"
_BLOCK = re.compile(r"block([1-9]\d*)")


@dataclass(frozen=True)
class Mode:
    """`stream.*` but for the sizes, which all modes share."""

    name: str
    block_layers: int | Literal["recurrent", "all"]
    chunked: bool
    """Whether time is cut."""
    whole_logits: bool
    """Whether the logits of all tokens exist at once."""
    offload: Literal["none", "host"] = "none"

    def config(self, length: int, chunk_tokens: int, logit_tokens: int) -> StreamConfig:
        """For sequences of `length` tokens."""
        return StreamConfig(
            block_layers=self.block_layers,
            chunk_tokens=chunk_tokens if self.chunked else None,
            logit_tokens=length if self.whole_logits else logit_tokens,
            offload=self.offload,
        )


PLAIN = Mode("plain", "all", chunked=False, whole_logits=True)
CHECKPOINTING = Mode("checkpointing", 0, chunked=False, whole_logits=True)
MODES = {
    mode.name: mode
    for mode in (
        PLAIN,
        CHECKPOINTING,
        Mode("checkpointing-streamed-head", 0, chunked=False, whole_logits=False),
        Mode("block1", 1, chunked=True, whole_logits=False),
        Mode("block4", 4, chunked=True, whole_logits=False),
        Mode("recurrent", "recurrent", chunked=True, whole_logits=False),
        Mode("all", "all", chunked=True, whole_logits=False),
    )
}


def parse_mode(name: str) -> Mode:
    """One of MODES or `block` with another number; `-offload` behind it keeps in the host's memory what waits.

    Raises ValueError for anything else.
    """
    base = name.removesuffix(_OFFLOADED)
    block = _BLOCK.fullmatch(base)
    mode = Mode(base, int(block[1]), chunked=True, whole_logits=False) if block else MODES.get(base)
    if mode is None:  # stream.block_layers=0 has a name of its own
        near = f"; did you mean '{CHECKPOINTING.name}'?" if base == "block0" else did_you_mean(base, list(MODES))
        raise ValueError(f"there is no mode '{name}'{near}")
    if name == base:
        return mode
    if mode is PLAIN:
        raise ValueError(
            f"there is no mode '{name}': nothing waits in {PLAIN.name}; drop {_OFFLOADED}, or use another mode"
        )
    return Mode(name, mode.block_layers, mode.chunked, mode.whole_logits, "host")
