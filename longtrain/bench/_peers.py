"""Other implementations of the same operations, measured beside ours where they are installed.

A peer is called from the zero state without documents, the one case that all of them share.
"""

import importlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtrain.bench._operations import Call, Layout, Tensors

# Module and function of flash-linear-attention for each operation, the input that our log_decay is there, and options.
_FLA: dict[str, tuple[tuple[str, str, str | None, dict[str, object]], ...]] = {
    "none": (("fla.ops.simple_gla", "chunk_simple_gla", None, {}),),
    "constant": (
        ("fla.ops.simple_gla", "chunk_simple_gla", "g_gamma", {}),
        ("fla.ops.lightning_attn", "chunk_lightning_attn", None, {"layer_idx": 0, "num_layers": 1}),
    ),
    "scalar": (("fla.ops.simple_gla", "chunk_simple_gla", "g", {}),),
    "vector": (("fla.ops.gla", "chunk_gla", "g", {}),),
    "delta": (("fla.ops.delta_rule", "chunk_delta_rule", None, {}),),
    "gated": (("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "g", {}),),
    "kda": (("fla.ops.kda", "chunk_kda", "g", {}),),
}


def peers(operation: str, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Name and call of each peer of an operation. A call raises whatever its version of the peer raises."""
    if operation == "softmax":
        yield ("cudnn", _attention(SDPBackend.CUDNN_ATTENTION)) if device.type == "cuda" else ("sdpa", _attention())
    if device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return
    for module, function, decay, options in _FLA.get(operation, ()):
        yield f"fla {function.removeprefix('chunk_')}", _fla_scan(module, function, decay, options)


def _attention(backend: SDPBackend | None = None) -> Call:
    def call(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        q, k, v = (x[name].transpose(1, 2) for name in ("queries", "keys", "values"))
        if backend is None:
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2),)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2),)

    return call


def _fla_scan(module: str, function: str, decay: str | None, options: dict[str, object]) -> Call:
    def call(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        given = {"q": x["queries"], "k": x["keys"], "v": x["values"]}
        if "beta" in x:
            given["beta"] = x["beta"]
        if decay is not None:
            given[decay] = x["log_decay"]
        found = getattr(importlib.import_module(module), function)
        return (found(**given, scale=1.0, **options)[0],)

    return call
