"""The smallest configuration of every mixer: odd widths, several heads, grouped values where there are any."""

from typing import Any

from longtrain.mixers import (
    delta_net,
    gated_delta,
    gla,
    hgrn2,
    kda,
    lightning,
    linear_attention,
    mamba2,
    retention,
    simple_gla,
    sliding_window,
    softmax,
)

_HEADS = {"num_heads": 2, "key_dim": 4, "value_dim": 3}
_CONVOLVED = _HEADS | {"conv_width": 4}

ATTENTION: dict[str, Any] = {
    "softmax": softmax.Config(num_heads=9, num_key_value_heads=3, head_dim=4, rope_theta=100.0),
    "sliding_window": sliding_window.Config(num_heads=3, num_key_value_heads=1, head_dim=4, rope_theta=100.0, window=7),
}
RECURRENT: dict[str, Any] = {
    "linear_attention": linear_attention.Config(**_HEADS),
    "retention": retention.Config(**_HEADS, rope_theta=100.0),
    "lightning": lightning.Config(**_HEADS),
    "mamba2": mamba2.Config(**_CONVOLVED, num_value_heads=4),
    "simple_gla": simple_gla.Config(num_heads=3, key_dim=4, value_dim=5, conv_width=4),
    "gla": gla.Config(**_HEADS, gate_rank=2),
    "hgrn2": hgrn2.Config(**_HEADS),
    "delta_net": delta_net.Config(**_CONVOLVED, allow_negative_eigenvalues=True),
    "gated_delta": gated_delta.Config(**_CONVOLVED, num_value_heads=None, allow_negative_eigenvalues=False),
    "kda": kda.Config(**_CONVOLVED, num_value_heads=4, allow_negative_eigenvalues=False),
}
MIXERS = ATTENTION | RECURRENT

_WIDE = {"num_heads": 3, "key_dim": 64, "value_dim": 64}
_WIDE_CONVOLVED = _WIDE | {"conv_width": 4}
WIDE: dict[str, Any] = {
    "softmax": softmax.Config(num_heads=6, num_key_value_heads=2, head_dim=64, rope_theta=1e4),
    "sliding_window": sliding_window.Config(
        num_heads=6, num_key_value_heads=2, head_dim=64, rope_theta=1e4, window=100
    ),
    "retention": retention.Config(**_WIDE, rope_theta=1e4),
    "gla": gla.Config(**_WIDE, gate_rank=16),
    "simple_gla": simple_gla.Config(**_WIDE_CONVOLVED),
    "delta_net": delta_net.Config(**_WIDE_CONVOLVED, allow_negative_eigenvalues=True),
    "gated_delta": gated_delta.Config(**_WIDE_CONVOLVED, num_value_heads=6, allow_negative_eigenvalues=False),
    "kda": kda.Config(**_WIDE_CONVOLVED, num_value_heads=None, allow_negative_eigenvalues=False),
}
"""Sizes that GPU kernels compute: one mixer of every scan, and both of attention."""
