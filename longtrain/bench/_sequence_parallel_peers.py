"""Other implementations of sequence parallelism, measured beside ours where they are installed.

All of them need GPUs. A peer is imported when it is called, and what it raises is its result.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.bench._operations import Tensors
from longtrain.bench._report import installed
from longtrain.bench._sequence_parallel_cases import Candidate
from longtrain.bench._sequence_parallel_problems import tokens_of
from longtrain.comm.group import Group
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout

Call = Callable[[Tensors], Tensor]
"""Outputs of this rank's tokens; softmax queries come scaled."""


@dataclass(frozen=True)
class Peer:
    """One function of a peer."""

    distribution: str
    modules: tuple[str, ...]
    """That it must be able to import."""
    operations: tuple[str, ...]
    layout: LayoutKind
    documents: bool
    """Whether it takes packed documents."""
    prepare: Callable[[SequenceLayout, Group, torch.device], Call]
    """Bind it to a cut of the sequence; all ranks call it together."""
    tokens: Callable[[SequenceLayout, int, torch.device], Tensor] = tokens_of
    """Which tokens it wants a rank to hold."""


def _fla(layout: SequenceLayout, group: Group, device: torch.device) -> Call:
    """Context parallelism of flash-linear-attention: documents are given once, for the whole sequence."""
    cp = importlib.import_module("fla.ops.cp")
    bounds = torch.tensor([*layout.starts[0], layout.length])
    context = cp.build_cp_context(
        bounds.to(device, torch.int32), group=group.handle, cu_seqlens_cpu=bounds, layout=layout.kind
    )
    delta = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    kda = importlib.import_module("fla.ops.kda").chunk_kda

    def call(x: Tensors) -> Tensor:
        function = delta if x["log_decay"].dim() == 3 else kda
        tensors = (x["queries"], x["keys"], x["values"])
        return function(*tensors, g=x["log_decay"], beta=x["beta"], scale=1.0, cp_context=context)[0]

    return call


def _ring_flash(function: str) -> Callable[[SequenceLayout, Group, torch.device], Call]:
    def prepare(layout: SequenceLayout, group: Group, device: torch.device) -> Call:
        attend = getattr(importlib.import_module("ring_flash_attn"), function)

        def call(x: Tensors) -> Tensor:
            tensors = (x["queries"], x["keys"], x["values"])
            return attend(*tensors, softmax_scale=1.0, causal=True, group=group.handle)

        return call

    return prepare


def _ulysses_degree(ranks: int) -> int:
    """Of USP's two degrees: the least that is not 1; what remains is a ring."""
    return 2 if ranks % 2 == 0 else 1


def _usp(layout: SequenceLayout, group: Group, device: torch.device) -> Call:
    """Ulysses among neighbours and a zigzag ring among the rest."""
    yunchang = importlib.import_module("yunchang")
    ulysses = _ulysses_degree(group.size)
    yunchang.set_seq_parallel_pg(ulysses, group.size // ulysses, group.rank, group.size)
    attend: Any = yunchang.LongContextAttention(ring_impl_type="zigzag")

    def call(x: Tensors) -> Tensor:
        return attend(x["queries"], x["keys"], x["values"], softmax_scale=1.0, causal=True)

    return call


def usp_tokens(layout: SequenceLayout, rank: int, device: torch.device) -> Tensor:
    """A zigzag cut over rings, and each ring rank's tokens cut evenly over its Ulysses neighbours."""
    ulysses = _ulysses_degree(layout.num_ranks)
    rings = SequenceLayout(layout.length, layout.num_ranks // ulysses, layout.starts, kind="zigzag")
    ring, part = divmod(rank, ulysses)
    return tokens_of(rings, ring, device).chunk(ulysses)[part]


_DELTA, _SOFTMAX = ("gated", "kda"), ("softmax",)
_FLA_CORE, _RING, _USP = ("fla", "triton"), ("ring_flash_attn", "flash_attn"), ("yunchang", "flash_attn")

PEERS: dict[str, Peer] = {
    "fla cp": Peer("flash-linear-attention", _FLA_CORE, _DELTA, "contiguous", True, _fla),
    "fla cp zigzag": Peer("flash-linear-attention", _FLA_CORE, _DELTA, "zigzag", True, _fla),
    "ring-flash-attn": Peer(
        "ring-flash-attn", _RING, _SOFTMAX, "contiguous", False, _ring_flash("ring_flash_attn_func")
    ),
    "ring-flash zigzag": Peer(
        "ring-flash-attn", _RING, _SOFTMAX, "zigzag", False, _ring_flash("zigzag_ring_flash_attn_func")
    ),
    "yunchang usp": Peer("yunchang", _USP, _SOFTMAX, "zigzag", False, _usp, usp_tokens),
}


def candidates(operation: str, layouts: tuple[LayoutKind, ...], device: str) -> Iterator[Candidate]:
    """The peers of an operation that can run here, for the layouts that are asked for."""
    for name, peer in PEERS.items():
        if operation in peer.operations and peer.layout in layouts and not missing(peer, device):
            yield Candidate(name, (peer.layout,), peer=True, documents=peer.documents)


def missing(peer: Peer, device: str) -> str:
    """Why a peer cannot run here; "" where it can."""
    absent = [module for module in peer.modules if importlib.util.find_spec(module) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if device == "cuda" else "needs GPUs"


def inventory(device: str) -> dict[str, dict[str, str | None]]:
    """By distribution: its version, and why it is not measured."""
    found = {}
    for peer in PEERS.values():
        version = installed(peer.distribution) or (installed("fla-core") if "fla" in peer.modules else None)
        found[peer.distribution] = {"version": version, "missing": missing(peer, device)}
    return found
