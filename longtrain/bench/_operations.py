"""The operations that `longtrain bench kernels` measures: their inputs, float64 definitions and operation counts.

A call takes the inputs by name and the layout of documents, and returns the outputs and, for a scan, the final state.
An incoming state is the input `state`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.backend import Backend
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.delta_scan.reference import delta_scan_reference
from longtrain_kernels.diagonal_scan import DiagonalScan
from longtrain_kernels.diagonal_scan.reference import diagonal_scan_reference
from longtrain_kernels.short_convolution import short_convolution

CONVOLUTION_TAPS = 4

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where documents start."""

    documents: Tensor
    """[B, L], see `DiagonalScan.apply`."""
    positions: Tensor
    """[B, L], see `short_convolution`."""


def whole(batch: int, length: int, device: torch.device) -> Layout:
    """One document from its first token."""
    at = torch.arange(length, device=device).expand(batch, -1)
    return Layout(torch.zeros(batch, length, dtype=torch.int64, device=device), at)


def packed(starts: Sequence[Sequence[int]], length: int, device: torch.device) -> Layout:
    """Each sequence goes on with a document of which there were many tokens before, and starts others at `starts`."""
    before = 1000
    rows, at = [], []
    for row in starts:
        bounds = [-before, *row, length]
        spans = [range(max(begin, 0), end) for begin, end in pairwise(bounds)]
        rows.append([number for number, span in enumerate(spans) for _ in span])
        at.append([t - begin for begin, span in zip(bounds, spans, strict=False) for t in span])
    return Layout(torch.tensor(rows, device=device), torch.tensor(at, device=device))


Call = Callable[[Tensors, Layout], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """B sequences of L tokens, H heads of width D = K = V; a convolution has H D channels."""

    batch: int
    length: int
    heads: int
    width: int


@dataclass(frozen=True)
class Operation:
    """One recurrence, or what stands beside them for orientation."""

    inputs: Callable[[Shape, torch.dtype, torch.device], dict[str, Tensor]]
    """Random inputs, as a model would have them."""
    definition: Call
    """In plain PyTorch, for float64 inputs."""
    ours: Callable[[Backend], Call] | None
    """The operation through its public class; None where there is none."""
    flops: Callable[[Shape], tuple[float, float]]
    """Floating-point operations of the definition: forward, and forward with backward. Recomputation is not counted."""
    constants: tuple[str, ...] = ()
    """Inputs without a gradient."""
    stateful: bool = True
    """Whether it takes and returns a state."""


def leaves(operation: Operation, tensors: Tensors) -> dict[str, Tensor]:
    """The inputs that have gradients."""
    return {name: x for name, x in tensors.items() if name not in operation.constants}


def _normal(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = (shape.batch, shape.length, shape.heads, shape.width)
    return torch.randn(size, device=device).to(dtype)


def _log_decay(logits: Tensor) -> Tensor:
    """Log-decays of [B, L, H, ...] logits: from a long memory in the first head to a short one in the last."""
    rates = torch.logspace(-4, 0, logits.shape[2], base=2, device=logits.device)
    return F.logsigmoid(logits) * rates.reshape(-1, *[1] * (logits.dim() - 3))


def _attention_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    names = ("queries", "keys", "values")
    tensors = {name: _normal(shape, dtype, device) for name in names}
    return tensors | {"queries": tensors["queries"] * shape.width**-0.5}


def _gate_inputs(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A vector decay is as large as the keys and has their dtype; a scalar one is float32."""
    if kind == "constant":  # Lightning attention's slopes in the first layer; the first head does not decay
        return {"log_decay": -8 / shape.heads * torch.arange(shape.heads, device=device, dtype=torch.float32)}
    if kind == "scalar":
        return {"log_decay": _log_decay(torch.randn(shape.batch, shape.length, shape.heads, device=device))}
    return {"log_decay": _log_decay(_normal(shape, dtype, device)).to(dtype)} if kind == "vector" else {}


def _diagonal(kind: str) -> Operation:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return _attention_inputs(shape, dtype, device) | _gate_inputs(kind, shape, dtype, device)

    def ours(backend: Backend) -> Call:
        def call(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
            op = DiagonalScan(x["queries"], x["keys"], x["values"], x.get("log_decay"), backend=backend)
            return op.apply(layout.documents, x.get("state"))

        return call

    def definition(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        log_decay = _token_decay(x)
        return diagonal_scan_reference(
            x["queries"], x["keys"], x["values"], log_decay, layout.documents, x.get("state")
        )

    def flops(shape: Shape) -> tuple[float, float]:
        """Update and read-out, 2 K V each; backward has four such products (dq, dk, dv and the state's cotangent)."""
        product = 2.0 * shape.batch * shape.length * shape.heads * shape.width**2
        return 2 * product, 6 * product

    constants = ("log_decay",) if kind == "constant" else ()
    return Operation(inputs, definition, ours, flops, constants)


def _delta(kind: str) -> Operation:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = _attention_inputs(shape, dtype, device)
        keys = F.normalize(tensors["keys"].float(), dim=-1).to(dtype)
        queries = (F.normalize(tensors["queries"].float(), dim=-1) * shape.width**-0.5).to(dtype)
        beta = torch.randn(shape.batch, shape.length, shape.heads, device=device).sigmoid().to(dtype)
        return tensors | {"queries": queries, "keys": keys, "beta": beta} | _gate_inputs(kind, shape, dtype, device)

    def ours(backend: Backend) -> Call:
        def call(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
            op = DeltaScan(x["queries"], x["keys"], x["values"], x["beta"], x.get("log_decay"), backend=backend)
            return op.apply(layout.documents, x.get("state"))

        return call

    def definition(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        log_decay = _token_decay(x)
        return delta_scan_reference(
            x["queries"], x["keys"], x["values"], x["beta"], log_decay, layout.documents, x.get("state")
        )

    def flops(shape: Shape) -> tuple[float, float]:
        """Correction, update and read-out, 2 K V each, and twice that backward."""
        product = 2.0 * shape.batch * shape.length * shape.heads * shape.width**2
        return 3 * product, 9 * product

    return Operation(inputs, definition, ours, flops)


def _token_decay(x: Tensors) -> Tensor:
    """Log-decays as the definitions take them, [B, L, H] or [B, L, H, K]."""
    shape = x["values"].shape[:3]
    log_decay = x.get("log_decay")
    if log_decay is None:
        return x["values"].new_zeros(shape)
    return log_decay.expand(shape) if log_decay.dim() == 1 else log_decay


def _convolution() -> Operation:
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        channels = shape.heads * shape.width
        rows = torch.randn(shape.batch, shape.length + CONVOLUTION_TAPS - 1, channels, device=device)
        weight = torch.randn(channels, CONVOLUTION_TAPS, device=device) * CONVOLUTION_TAPS**-0.5
        return {"rows": rows.to(dtype), "weight": weight.to(dtype)}

    def ours(backend: Backend) -> Call:
        return definition

    def definition(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        return (F.silu(short_convolution(x["rows"], x["weight"], layout.positions)),)

    def flops(shape: Shape) -> tuple[float, float]:
        """A multiplication and an addition a tap; backward the same for rows and for weights."""
        product = 2.0 * CONVOLUTION_TAPS * shape.batch * shape.length * shape.heads * shape.width
        return product, 3 * product

    return Operation(inputs, definition, ours, flops, stateful=False)


def _softmax() -> Operation:
    def definition(x: Tensors, layout: Layout) -> tuple[Tensor, ...]:
        scores = torch.einsum("bihk,bjhk->bhij", x["queries"], x["keys"])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (torch.einsum("bhij,bjhv->bihv", weights, x["values"]),)

    def flops(shape: Shape) -> tuple[float, float]:
        """Scores and weighted values below the diagonal; five such products backward where these are two."""
        product = float(shape.batch * shape.heads * shape.length**2 * shape.width)
        return 2 * product, 7 * product

    return Operation(_attention_inputs, definition, None, flops, stateful=False)


OPERATIONS: dict[str, Operation] = {
    "softmax": _softmax(),
    "none": _diagonal("none"),
    "constant": _diagonal("constant"),
    "scalar": _diagonal("scalar"),
    "vector": _diagonal("vector"),
    "delta": _delta("none"),
    "gated": _delta("scalar"),
    "kda": _delta("vector"),
    "convolution": _convolution(),
}
"""By the name that `ops=` takes: linear attention, constant, scalar and vector decay; DeltaNet, Gated DeltaNet, KDA."""
