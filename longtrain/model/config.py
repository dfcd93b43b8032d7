"""Shape of a model: a pattern of mixers and the widths around them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from longtrain.core.errors import Refused

Positive = Annotated[int, Field(ge=1)]

_ENTRY = re.compile(r"([A-Za-z]\w*)(?:\s+x([1-9]\d{0,3}))?", re.ASCII)


def parse_pattern(pattern: Sequence[str]) -> tuple[str, ...]:
    """Mixer names one by one: `("gated_delta x3", "softmax")` -> three times `gated_delta`, then `softmax`.

    Raises Refused, in one line, for an empty pattern and for an entry that is not `NAME` or `NAME xN`.
    """
    if not pattern:
        raise Refused("model.pattern=[]: names no mixer; write [NAME x3, NAME]")
    names: list[str] = []
    for entry in pattern:
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise Refused(f"model.pattern: {entry!a} is not a mixer; write NAME, or NAME x3 for three in a row")
        names += [match[1]] * int(match[2] or 1)
    return tuple(names)


def _readable(pattern: tuple[str, ...]) -> tuple[str, ...]:
    parse_pattern(pattern)
    return pattern


@dataclass(frozen=True)
class ModelConfig:
    """`conf/model/*.yaml`. The vocabulary size is the token store's and is not configured."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    width: Positive
    """Model width D."""
    num_layers: Positive
    """Layers in all; a multiple of the pattern's length."""
    pattern: Annotated[tuple[str, ...], AfterValidator(_readable)]
    """Mixers by name, repeated over the layers: `[gated_delta x3, softmax]`."""
    mlp_width: Positive
    """Hidden width of the gated MLP of every layer."""
    tie_embeddings: bool
    """Whether the head uses the embedding's matrix."""
    norm_epsilon: Annotated[float, Field(gt=0)]
    initializer_std: Annotated[float, Field(gt=0)]
    """Standard deviation of every projection and of the embedding; residual outputs are scaled by 1/sqrt(2 layers)."""


@dataclass(frozen=True)
class MixerConfig:
    """`mixer.*`: what all mixers share, and beside it the options of every mixer that the pattern names."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    backend: Literal["auto", "reference", "chunked", "triton"]
    """What runs the recurrent operations (`longtrain_kernels.backend.Backend`); `auto`: by the device."""
    options: dict[str, Any]
    """The `Config` of each mixer by its name; in the configuration the names stand beside `backend`."""
