"""The delta scan in Triton: segments of chunks with the state on chip, and a fold over segments; see README.md."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from longtrain_kernels.delta_scan.gradients import chunk_gradients, far_gradients, pair_gradients
from longtrain_kernels.delta_scan.prepare import far_pairs, near_pairs, scalar_prepare, vector_decay
from longtrain_kernels.delta_scan.sweep import backward_sweep, fold, forward_sweep
from longtrain_kernels.passes import KernelSegment, Passes

CHUNK = 64
# One program of a sweep fills a multiprocessor of an H200, which has 132.
MULTIPROCESSORS = 132
# Shorter segments cost more in the fold than they gain; longer ones, more scratch in the gradients.
LEAST_CHUNKS = 8
MOST_CHUNKS = 128


@dataclass(frozen=True)
class _Launch:
    """How a kernel is launched: its tile, warps, and stages of the software pipeline."""

    block: int
    warps: int
    stages: int
    values: int = 32
    """Value columns that a program of the gradients treats at a time."""


def _sweep(key: int, value: int, dtype: torch.dtype, vector: bool, backward: bool) -> _Launch:
    """Value columns of a program: as many as registers hold of the state, with tiles of keys in shared memory."""
    columns = max(16, triton.next_power_of_2(value))
    if dtype.itemsize > 2:
        return _Launch(min(columns, 32), warps=8, stages=1)
    if key > 128:
        return _Launch(min(columns, 64), warps=8, stages=1 if vector else 2)
    block = min(columns, 128)
    return _Launch(block, warps=8 if block == 128 else 4, stages=2 if vector and backward else 3)


def _gradient_launch(key: int, dtype: torch.dtype, vector: bool) -> _Launch:
    """Key channels of a program of the gradients."""
    block = min(key, 64)
    if dtype.itemsize > 2:
        return _Launch(block, warps=8, stages=2)
    return _Launch(block, warps=4, stages=3) if vector else _Launch(block, warps=4, stages=2, values=64)


@dataclass(frozen=True)
class _Sizes:
    """How a scan is cut: `segments` of `per_segment` chunks; gradients treat `window` segments at a time."""

    batch: int
    length: int
    groups: int
    heads: int
    key: int
    value: int
    chunks: int
    per_segment: int
    segments: int
    window: int

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def block_key(self) -> int:
        return max(16, triton.next_power_of_2(self.key))


def _sizes(keys: Tensor, values: Tensor, block_value: int) -> _Sizes:
    batch, length, groups, key = keys.shape
    heads, value = values.shape[2:]
    chunks = max(1, triton.cdiv(length, CHUNK))
    wave = max(1, MULTIPROCESSORS // (batch * heads * triton.cdiv(value, block_value)))
    segments = min(wave * triton.cdiv(chunks, wave * MOST_CHUNKS), triton.cdiv(chunks, LEAST_CHUNKS))
    per_segment = triton.cdiv(chunks, segments)
    segments = triton.cdiv(chunks, per_segment)
    return _Sizes(batch, length, groups, heads, key, value, chunks, per_segment, segments, min(segments, wave))


def _rows(x: Tensor) -> Tensor:
    """As it is where the last dimension is contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head."""
    return x.stride(0), x.stride(1), x.stride(2)


class DeltaPasses(Passes):
    """See `Passes`; shapes as in `DeltaScan`."""

    def __init__(
        self, queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor | None, documents: Tensor
    ) -> None:
        dtype = values.dtype
        self._q, self._k, self._v = (_rows(x.detach().to(dtype)) for x in (queries, keys, values))
        self._beta = beta.detach()
        self._log_decay = None if log_decay is None else log_decay.detach()
        if documents.shape[1] == 0:  # the kernels read one column at least
            documents = documents.new_zeros(documents.shape[0], 1)
        self._documents = documents.to(torch.int32).contiguous()
        self._dtypes = tuple(None if x is None else x.dtype for x in (queries, keys, values, beta, log_decay))
        self._vector = log_decay is not None and log_decay.dim() == 4
        key, value = keys.shape[-1], values.shape[-1]
        width = max(16, triton.next_power_of_2(key))
        self._launches = {back: _sweep(width, value, dtype, self._vector, back) for back in (False, True)}
        self._gradient_launch = _gradient_launch(width, dtype, self._vector)
        self._sizes = _sizes(keys, values, self._launches[False].block)
        self._precision = "tf32x3" if dtype == torch.float32 else "tf32"

    def summarize(self) -> tuple[Tensor, Tensor]:
        """See `Passes`."""
        s = self._sizes
        self._prepare()
        self._maps = self._float(s.sequences, s.segments, s.value + s.key, s.key)
        self._forward("map", 0, s.segments, locals_=self._maps)
        _, final = self._fold(s.value + s.key, None, self._maps, s.value + s.key)
        state, transition = final.view(s.batch, s.heads, s.value + s.key, s.key).split([s.value, s.key], dim=2)
        return transition.mT.contiguous(), state.mT.contiguous()

    def outputs(self, state: Tensor) -> Tensor:
        """See `Passes`."""
        s = self._sizes
        self._starts, _ = self._fold(s.value, state.mT.contiguous(), self._maps, s.value + s.key)
        outputs = self._v.new_empty(s.batch, s.length, s.heads, s.value)
        self._forward("outputs", 0, s.segments, outputs=outputs)
        return outputs

    def adjoint(self, grad: Tensor | None) -> Tensor:
        """See `Passes`."""
        s = self._sizes
        if grad is None:
            grad = self._v.new_zeros(s.value).expand(s.batch, s.length, s.heads, s.value)
        self._grad = _rows(grad)
        self._local_grads = self._float(s.sequences, s.segments, s.value, s.key)
        self._backward("map", 0, s.segments, locals_=self._local_grads)
        zero = self._float(s.sequences, s.value, s.key).zero_()
        _, final = self._fold(s.value, zero, self._local_grads, s.value, reverse=True)
        return final.view(s.batch, s.heads, s.value, s.key).mT.contiguous()

    def gradients(self, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """See `Passes`."""
        s = self._sizes
        ends, _ = self._fold(s.value, grad_state.mT.contiguous(), self._local_grads, s.value, reverse=True)
        new = self._v.new_empty
        grad_values = new(s.batch, s.length, s.heads, s.value)
        grad_queries, grad_keys = (new(s.batch, s.length, s.heads, s.key) for _ in range(2))
        shares = triton.cdiv(s.key, self._gradient_launch.block)
        grad_beta = self._float(s.batch, s.length, s.heads, shares)
        grad_decay = torch.empty_like(grad_queries, dtype=self._dtypes[4]) if self._vector else grad_beta.clone()
        window = s.window * s.per_segment
        states, grad_states = (new(s.sequences, window, s.value, s.key) for _ in range(2))
        errors = new(s.sequences, window, CHUNK, s.value)
        for first in range(0, s.segments, s.window):
            count = min(s.window, s.segments - first)
            self._forward("states", first, count, states=states, errors=errors)
            self._backward("gradients", first, count, ends=ends, grad_values=grad_values, grad_states=grad_states)
            scratch = (states, errors, grad_states, grad_values)
            self._gradients(first, count, scratch, (grad_queries, grad_keys, grad_beta, grad_decay))
        decay = None if self._log_decay is None else grad_decay if self._vector else grad_decay.sum(-1)
        grads = (self._groups(grad_queries), self._groups(grad_keys), grad_values, grad_beta.sum(-1), decay)
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, self._dtypes, strict=True))

    def _gradients(self, first: int, window: int, scratch: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        """Gradients of queries, keys, beta and log_decay for `window` segments; see the kernels."""
        s, launch = self._sizes, self._gradient_launch
        first_chunk, chunks = first * s.per_segment, window * s.per_segment
        grid = (min(chunks, s.chunks - first_chunk), s.sequences)
        shares = triton.cdiv(s.key, launch.block)
        position = (s.length, s.chunks, first_chunk, chunks, s.heads)
        columns = triton.next_power_of_2(max(s.value, 16))
        pairs = tuple(self._v.new_empty(s.sequences, chunks, CHUNK, CHUNK) for _ in range(2))
        pair_gradients[grid](
            self._grad, self._documents, self._sums, scratch[1], scratch[3], *pairs, *_strides(self._grad), *position,
            V=s.value, BLOCK_V=min(columns, 32), C=CHUNK, VECTOR=self._vector, PRECISION=self._precision,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        arguments = (
            self._grad, self._q, self._k, self._beta, self._documents, self._sums, self._far, *scratch, *pairs, *grads,
            *_strides(self._grad), *_strides(self._q), *_strides(self._k), *_strides(self._beta),
            *position, s.heads // s.groups, shares, self._far.shape[-1],
        )  # fmt: skip
        sizes = {"K": s.key, "V": s.value, "BLOCK_K": launch.block, "C": CHUNK, "PRECISION": self._precision}
        if self._v.dtype != torch.float16 or not self._vector:
            chunk_gradients[(*grid, shares)](
                *arguments, **sizes, BLOCK_V=min(columns, launch.values), VECTOR=self._vector,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        if self._vector:
            far_gradients[(*grid, shares)](*arguments, **sizes, BLOCK_V=min(columns, 32), num_warps=8, num_stages=2)

    def _groups(self, grad: Tensor) -> Tensor:
        """[B, L, H, K] -> [B, L, G, K], summed over the value heads of a key head."""
        s = self._sizes
        if s.groups == s.heads:
            return grad
        return grad.view(s.batch, s.length, s.groups, s.heads // s.groups, s.key).sum(3, dtype=torch.float32)

    def _float(self, *shape: int) -> Tensor:
        return self._v.new_empty(shape, dtype=torch.float32)

    def _prepare(self) -> None:
        s = self._sizes
        new = self._v.new_empty
        self._inverses, self._scores = (new(s.sequences, s.chunks, CHUNK, CHUNK) for _ in range(2))
        if self._vector:
            self._prepare_vector()
            return
        self._sums, self._reads, self._writes = (self._float(s.sequences, s.chunks, CHUNK) for _ in range(3))
        self._carries = self._float(s.sequences, s.chunks)
        self._far = self._documents  # of no use
        self._operands: tuple[Tensor, ...] = (self._q, self._k, self._k)
        self._ratio = s.heads // s.groups
        gate = self._beta if self._log_decay is None else self._log_decay
        scalar_prepare[(s.chunks, s.sequences)](
            self._q, self._k, self._beta, gate, self._documents,
            self._inverses, self._scores, self._sums, self._reads, self._writes, self._carries,
            *_strides(self._q), *_strides(self._k), *_strides(self._beta), *_strides(gate),
            s.length, s.chunks, s.heads, s.heads // s.groups,
            K=s.key, BLOCK_K=s.block_key, C=CHUNK, DECAY=self._log_decay is not None, PRECISION=self._precision,
            num_warps=4 if self._v.dtype.itemsize == 2 else 8,
        )  # fmt: skip

    def _prepare_vector(self) -> None:
        s = self._sizes
        self._sums = self._float(s.sequences, s.chunks, CHUNK, s.key)
        self._carries = self._float(s.sequences, s.chunks, s.key)
        self._reads = self._writes = self._sums  # of a scalar decay
        # [B, tokens, H, K], each head's tokens in a row
        shape = (s.batch, s.heads, s.chunks * CHUNK, s.key)
        self._operands = tuple(self._v.new_empty(shape).transpose(1, 2) for _ in range(3))
        self._ratio = 1
        assert self._log_decay is not None
        gate = _rows(self._log_decay)
        block = min(s.block_key, 64)
        inputs = (*_strides(self._q), *_strides(self._k), *_strides(self._beta))
        blocks = triton.cdiv(s.key, block)
        self._far = torch.empty(s.sequences, s.chunks, blocks, dtype=torch.int32, device=self._v.device)
        vector_decay[(s.chunks, s.sequences, blocks)](
            self._q, self._k, self._beta, gate, self._documents, self._sums, self._far, *self._operands, self._carries,
            *inputs, *_strides(gate), s.length, s.chunks, s.heads, s.heads // s.groups,
            K=s.key, BLOCK_K=block, C=CHUNK, num_warps=8,
        )  # fmt: skip
        # Each returns from the chunks of the other.
        for kernel in (far_pairs,) if self._v.dtype == torch.float16 else (near_pairs, far_pairs):
            kernel[(s.chunks, s.sequences)](
                self._q, self._k, self._beta, self._documents, self._sums, self._far, self._inverses, self._scores,
                *inputs, s.length, s.chunks, s.heads, s.heads // s.groups, blocks,
                K=s.key, BLOCK_K=block, C=CHUNK, PRECISION=self._precision,
                num_warps=4 if self._v.dtype.itemsize == 2 else 8,
            )  # fmt: skip

    def _forward(self, mode: str, first: int, window: int, **results: Tensor) -> None:
        s, launch = self._sizes, self._launches[False]
        tiles = triton.cdiv(s.value, launch.block)
        if mode == "map":
            tiles += triton.cdiv(s.key, launch.block)
        unused = self._sums
        forward_sweep[(tiles, s.sequences * window)](
            *self._operands, self._v, self._inverses, self._scores, self._reads, self._writes, self._carries,
            getattr(self, "_starts", unused), results.get("locals_", unused), results.get("outputs", unused),
            results.get("states", unused), results.get("errors", unused),
            *_strides(self._operands[0]), *_strides(self._operands[1]), *_strides(self._v),
            s.length, s.chunks, s.segments, s.per_segment, first, window, s.heads, self._ratio,
            K=s.key, V=s.value, BLOCK_K=s.block_key, BLOCK_V=launch.block, C=CHUNK,
            MODE=mode, VECTOR=self._vector, PRECISION=self._precision, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def _backward(self, mode: str, first: int, window: int, **results: Tensor) -> None:
        s, launch = self._sizes, self._launches[True]
        unused = self._sums
        backward_sweep[(triton.cdiv(s.value, launch.block), s.sequences * window)](
            self._grad, *self._operands, self._inverses, self._scores,
            self._reads, self._writes, self._carries,
            results.get("ends", unused), results.get("locals_", unused),
            results.get("grad_values", unused), results.get("grad_states", unused),
            *_strides(self._grad), *_strides(self._operands[0]), *_strides(self._operands[1]),
            s.length, s.chunks, s.segments, s.per_segment, first, window, s.heads, self._ratio,
            K=s.key, V=s.value, BLOCK_K=s.block_key, BLOCK_V=launch.block, C=CHUNK,
            MODE=mode, VECTOR=self._vector, PRECISION=self._precision, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def _fold(
        self, rows: int, initial: Tensor | None, locals_: Tensor, local_rows: int, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What enters each segment, and what leaves the last (the first where `reverse`); see the kernel."""
        s = self._sizes
        edges, final = self._float(s.sequences, s.segments, rows, s.key), self._float(s.sequences, rows, s.key)
        block = 32
        fold[(triton.cdiv(rows, block), s.sequences)](
            self._maps, locals_, final if initial is None else initial.to(torch.float32), edges, final,
            s.segments, local_rows, s.value + s.key,
            ROWS=rows, V=s.value, K=s.key, BLOCK_ROWS=block, BLOCK_K=s.block_key, BLOCK_J=min(32, s.block_key),
            REVERSE=reverse, IDENTITY=initial is None, num_warps=4, num_stages=3,
        )  # fmt: skip
        return edges, final


def delta_segment_triton(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor | None, documents: Tensor
) -> KernelSegment:
    """`DeltaScan.summarize`."""
    passes = DeltaPasses(queries, keys, values, beta, log_decay, documents)
    return KernelSegment(passes, queries, keys, values, beta, log_decay)
