"""Shape of a model: a pattern of mixers and the widths around them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ConfigDict

from longtrain.core.errors import Refused


@dataclass(frozen=True)
class ModelConfig:
    """`conf/model/*.yaml`. The vocabulary size is the token store's and is not configured."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    width: int
    """Model width D."""
    num_layers: int
    """Layers in all; a multiple of the pattern's length."""
    pattern: tuple[str, ...]
    """Mixers by name, repeated over the layers: `[gated_delta x3, softmax]`."""
    mlp_width: int
    """Hidden width of the gated MLP of every layer."""
    tie_embeddings: bool
    """Whether the head uses the embedding's matrix."""
    norm_epsilon: float
    initializer_std: float
    """Standard deviation of every projection and of the embedding; residual outputs are scaled by 1/sqrt(2 layers)."""


def parse_pattern(pattern: Sequence[str]) -> list[str]:
    """`("a x3", "b")` -> `["a", "a", "a", "b"]`. Raises Refused for an entry of another form."""
    names: list[str] = []
    for entry in pattern:
        match = re.fullmatch(r"(\w+)(?: x(\d+))?", entry)
        if match is None:
            raise Refused(f"model.pattern: '{entry}' is neither `mixer` nor `mixer x3`")
        names += [match[1]] * int(match[2] or 1)
    return names
