"""The diagonal scan by Triton kernels: segments of some thousand tokens run side by side, their maps folded between.

Forward: `summarize` finds every segment's affine map from keys and values and folds them to the states at segment
boundaries; `outputs` runs every segment from its own. Backward mirrors it with the cotangents of the states. Only
boundary states are kept; the states of chunks are made again by each pass, on chip.
"""

from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.diagonal_scan import far_kernels, scalar_kernels, vector_kernels
from longtrain_kernels.diagonal_scan.chunk import bound_documents, boundary_products, fold_segments
from longtrain_kernels.passes import KernelSegment, Passes

LOG2_E = log2(e)


@dataclass(frozen=True)
class Settings:
    """How one kernel is launched."""

    block: int
    """Columns of the result, and of the state, that a program owns."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """How a scan is cut and launched; a fixed table, so that every pass of every step does the same."""

    chunk: int
    programs: int
    """Programs aimed at, over all heads, segments and columns."""
    summarize: Settings
    scan: Settings
    finish: Settings
    """Of the pass that ends the gradients of a vector decay."""

    def segment_chunks(self, chunks: int, rows: int, columns: int) -> int:
        """Chunks of a segment for `rows` (batch x heads) of `chunks` chunks."""
        tiles = triton.cdiv(columns, self.scan.block)
        segments = max(1, min(self.programs // (rows * tiles), triton.cdiv(chunks, MIN_SEGMENT_CHUNKS)))
        return triton.cdiv(chunks, segments)


MIN_SEGMENT_CHUNKS = 4
_SMALL = Settings(32, 4, 1)
HALF_PLANS = {
    "scalar": Plan(64, 528, Settings(64, 4, 2), Settings(64, 4, 2), _SMALL),
    "vector": Plan(64, 528, Settings(64, 4, 2), Settings(64, 4, 2), Settings(64, 8, 1)),
}
# float32 and float16 operands, or heads wider than 128: tiles of half the size
WIDE_PLANS = {name: Plan(32, 528, _SMALL, _SMALL, _SMALL) for name in HALF_PLANS}


def plan_for(vector: bool, dtype: torch.dtype, key_width: int, value_width: int) -> Plan:
    """The plan of a scan by its decay, element type and head widths."""
    small = dtype == torch.bfloat16 and max(key_width, value_width) <= 128
    return (HALF_PLANS if small else WIDE_PLANS)["vector" if vector else "scalar"]


@dataclass(frozen=True)
class _Operand:
    """An input [B, L, G or H, D] in one role of a kernel."""

    tensor: Tensor
    group: int
    """Value heads that share one of its heads."""

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]

    @property
    def strides(self) -> tuple[int, int, int]:
        batch, length, head, _ = self.tensor.stride()
        return batch, length, head


def _empty(batch: int, length: int, heads: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, H, D] whose rows the copy engine can address: 16 bytes apart or a multiple."""
    unit = 16 // dtype.itemsize
    return like.new_empty(batch, length, heads, triton.cdiv(width, unit) * unit, dtype=dtype)[..., :width]


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy of it that the copy engine can address."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides[:-1])
    if x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return _empty(*x.shape, like=x, dtype=x.dtype).copy_(x)  # type: ignore[misc]


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the copy engine's descriptors, which kernels make themselves."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class DiagonalPasses(Passes):
    """The passes of `DiagonalScan`; log_decay is [B, L, H] or [B, L, H, K]."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        log_decay: Tensor,
        documents: Tensor,
        plan: Plan | None = None,
    ) -> None:
        batch, length, heads, width = values.shape
        group = heads // keys.shape[2]
        self.vector = log_decay.dim() == 4
        self.plan = plan or plan_for(self.vector, values.dtype, keys.shape[-1], width)
        self.q, self.k = (_Operand(_addressable(x), group) for x in (queries, keys))
        self.v = _Operand(_addressable(values), 1)
        self.log_decay = _addressable(log_decay.detach()) if self.vector else log_decay.detach()
        self.wants_decay_grad = log_decay.requires_grad
        self.documents = documents.to(torch.int32).contiguous()
        self.rows, self.heads, self.length = batch * heads, heads, length
        chunks = triton.cdiv(length, self.plan.chunk)
        segment = self.plan.segment_chunks(chunks, self.rows, width)
        self.segments = triton.cdiv(chunks, segment)
        self.sizes = (length, heads, chunks, segment)
        bf16 = values.dtype == torch.bfloat16
        self.scaled_dtype = torch.bfloat16 if bf16 else torch.float32  # float16 lacks their range
        self.numerics = {
            "OPERAND": tl.bfloat16 if bf16 else tl.float32,
            "PRECISION": "tf32x3" if values.dtype == torch.float32 else "tf32",
        }
        triton.set_allocator(_scratch)
        self.bounds, self.continues = self._bound_documents()
        self.weights, self.factors = (None, None) if self.vector else self._weigh_chunks()
        if self.vector:
            self._scale_chunks()

    def summarize(self) -> tuple[Tensor, Tensor]:
        """See `Passes`."""
        self.states, self.decays = self._boundaries(self.k, self.v, reverse=False)
        return self.decays[:, :, -1].clone(), self.states[:, :, -1].clone()

    def outputs(self, state: Tensor) -> Tensor:
        """See `Passes`."""
        self.incoming = state.contiguous()
        out = self._empty(self.v)
        if self.vector:
            self._contract(self.q, self.k, self.v, out, reverse=False)
            self.scaled_q = self.scaled_k = None  # made again for the backward pass, which may be far away
        else:
            self._scan(self.q, self.k, self.v, out, reverse=False)
        return out

    def adjoint(self, grad: Tensor | None) -> Tensor:
        """See `Passes`."""
        triton.set_allocator(_scratch)  # kept per thread, and autograd has its own
        if self.vector:
            self._scale_chunks()
        grad = torch.zeros_like(self.v.tensor) if grad is None else grad
        self.grad = _Operand(_addressable(grad), 1)
        self.cotangents, self.cotangent_decays = self._boundaries(self.q, self.grad, reverse=True)
        return self.cotangents[:, :, 0].clone()

    def gradients(self, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """See `Passes`."""
        triton.set_allocator(_scratch)  # kept per thread, and autograd has its own
        self.outgoing = grad_state.contiguous()
        query_grad, key_grad = (self._empty(x, self.scaled_dtype if self.vector else None) for x in (self.q, self.k))
        value_grad = self._empty(self.v)
        gradients = self._vector_gradients if self.vector else self._scalar_gradients
        decay_grad = gradients(query_grad, key_grad, value_grad)
        return self._per_key_head(query_grad), self._per_key_head(key_grad), value_grad, decay_grad

    def _scalar_gradients(self, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor) -> Tensor | None:
        partner = (self.q, self.k) if self.wants_decay_grad else (None, None)
        products_q = self._scan(
            self.grad, self.v, self.k, query_grad, reverse=False, transposed=True, partner=partner[0]
        )
        products_k = self._scan(self.v, self.grad, self.q, key_grad, reverse=True, transposed=True, partner=partner[1])
        self._scan(self.k, self.q, self.grad, value_grad, reverse=True)
        if products_q is None or products_k is None:
            return None
        _, _, chunks, segment = self.sizes
        padded = chunks * self.plan.chunk
        grad = products_q.new_empty(self.rows, padded)
        scalar_kernels.decay_gradients[self.segments, self.rows](
            products_q, products_k, self._boundary_products(), self.documents, grad, self.length, self.heads, padded,
            segment * self.plan.chunk, products_q.shape[0], products_k.shape[0], BLOCK=1024,
        )  # fmt: skip
        per_head = grad.view(-1, self.heads, padded)[..., : self.length]
        return per_head.transpose(1, 2).to(self.log_decay.dtype)

    def _vector_gradients(self, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor) -> Tensor | None:
        """Fills the cotangents of q' and k', then makes those of q and k of them."""
        self._expand(self.grad, self.v, self.k, query_grad, reverse=False)
        self._expand(self.v, self.grad, self.q, key_grad, reverse=True)
        self._contract(self.k, self.q, self.grad, value_grad, reverse=True)
        decay_grad = self._empty(self.k, self.log_decay.dtype) if self.wants_decay_grad else None
        ends = self._boundary_products() if self.wants_decay_grad else self.states
        grads, settings = query_grad if decay_grad is None else decay_grad, self.plan.finish
        block = min(settings.block, _block(self.k.width))
        vector_kernels.finish_gradients[triton.cdiv(self.k.width, block), self.segments, self.rows](
            self.q.tensor, self.k.tensor, self.log_decay, *self._vector_arguments(), query_grad, key_grad,
            grads, ends, *self.sizes, *self.q.strides, *self.k.strides, *self.log_decay.stride()[:3],
            *query_grad.stride()[:3], *grads.stride()[:3], WIDTH=self.k.width, GROUP=self.k.group, BLOCK=block,
            CHUNK=self.plan.chunk, GATE_GRADS=decay_grad is not None, HALF=self.scaled_dtype == torch.bfloat16,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        return decay_grad

    def _empty(self, like: _Operand, dtype: torch.dtype | None = None) -> Tensor:
        """[B, L, H, D] with the width of `like`."""
        values = self.v.tensor
        return _empty(*values.shape[:3], like.width, like=values, dtype=dtype or values.dtype)  # type: ignore[misc]

    def _per_key_head(self, grad: Tensor) -> Tensor:
        """Sums [B, L, H, K] over the value heads of each key head, in the inputs' type."""
        group, dtype = self.k.group, self.v.tensor.dtype
        return (grad if group == 1 else grad.unflatten(2, (-1, group)).sum(3, dtype=torch.float32)).to(dtype)

    def _bound_documents(self) -> tuple[Tensor, Tensor]:
        """See `chunk.bound_documents`."""
        length, heads, chunks, _ = self.sizes
        batch = self.rows // heads
        bounds = self.documents.new_empty(batch, chunks, 2, self.plan.chunk)
        continues = self.documents.new_empty(batch, chunks)
        bound_documents[chunks, batch](self.documents, bounds, continues, length, chunks, CHUNK=self.plan.chunk)
        return bounds, continues

    def _weigh_chunks(self) -> tuple[Tensor, Tensor]:
        """Weights of rows and decays of chunks; see `scalar_kernels.weigh_chunks`."""
        length, heads, chunks, _ = self.sizes
        weights = torch.empty(self.rows, chunks, 3, self.plan.chunk, dtype=torch.float32, device=self.log_decay.device)
        factors = weights.new_empty(self.rows, chunks)
        block = max(1024, self.plan.chunk)
        scalar_kernels.weigh_chunks[triton.cdiv(chunks * self.plan.chunk, block), self.rows](
            self.log_decay, self.documents, weights, factors, length, heads, chunks, *self.log_decay.stride(),
            UNIT=LOG2_E, CHUNK=self.plan.chunk, BLOCK=block,
        )  # fmt: skip
        return weights, factors

    def _scale_chunks(self) -> None:
        """q' and k', the decays of chunks and which segments are far; see `vector_kernels.scale_chunks`."""
        length, heads, chunks, segment = self.sizes
        width = self.k.width
        self.scaled_q, self.scaled_k = (self._empty(x, self.scaled_dtype) for x in (self.q, self.k))
        self.chunk_decays = torch.empty(self.rows, chunks, width, dtype=torch.float32, device=self.log_decay.device)
        far = self.documents.new_empty(self.rows, chunks)
        vector_kernels.scale_chunks[chunks, self.rows](
            self.q.tensor, self.k.tensor, self.log_decay, self.bounds, self.continues, self.scaled_q, self.scaled_k,
            self.chunk_decays, far, length, heads, chunks, *self.q.strides, *self.k.strides,
            *self.log_decay.stride()[:3], *self.scaled_q.stride()[:3], WIDTH=width, GROUP=self.k.group,
            BLOCK=_block(width), CHUNK=self.plan.chunk, num_warps=8,
        )  # fmt: skip
        self.far = F.pad(far, (0, self.segments * segment - chunks)).unflatten(1, (-1, segment)).amax(2)

    def _boundaries(self, y: _Operand, z: _Operand, reverse: bool) -> tuple[Tensor, Tensor]:
        """States [B, H, G + 1, K, V] and decays [B, H, G + 1, K or 1] at segment boundaries."""
        settings, segments = self.plan.summarize, self.segments
        width = y.width if self.vector else 1
        local_state = torch.empty(self.rows, segments, y.width, z.width, dtype=torch.float32, device=y.tensor.device)
        local_decay = local_state.new_empty(self.rows, segments, width)
        grid = (triton.cdiv(z.width, settings.block), segments, self.rows)
        common = {
            "WIDTH_Y": y.width, "WIDTH_Z": z.width, "Y_GROUP": y.group, "Z_GROUP": z.group, "BLOCK_Y": _block(y.width),
            "BLOCK_Z": min(settings.block, _block(z.width)), "CHUNK": self.plan.chunk, "REVERSE": reverse,
            **self.numerics, "num_warps": settings.num_warps, "num_stages": settings.num_stages,
        }  # fmt: skip
        if self.vector:
            self._scan_far(y, y, z, None, reverse, transposed=False, local=(local_state, local_decay))
            del common["Y_GROUP"]
            scaled = self._scaled(y)
            vector_kernels.summarize_segments[grid](
                scaled.tensor, z.tensor, self.chunk_decays, *self._vector_arguments(), local_state, local_decay,
                *self.sizes, *scaled.strides, *z.strides, **common,
            )  # fmt: skip
        else:
            scalar_kernels.summarize_segments[grid](
                y.tensor, z.tensor, self.weights, self.factors, local_state, local_decay, *self.sizes, *y.strides,
                *z.strides, z.width, 1, **common,
            )  # fmt: skip
        size, block = y.width * z.width, 512
        states = local_state.new_empty(self.rows, segments + 1, y.width, z.width)
        decays = local_state.new_empty(self.rows, segments + 1, width)
        fold_segments[triton.cdiv(size, block), self.rows](
            local_state, local_decay, states, decays, segments, size, z.width, VECTOR=self.vector, REVERSE=reverse,
            BLOCK=block,
        )  # fmt: skip
        per_head = (-1, self.heads)
        return states.unflatten(0, per_head), decays.unflatten(0, per_head)

    def _boundary_products(self) -> Tensor:
        width, columns = self.k.width, self.v.width
        shape = (self.rows, self.segments + 1, width) if self.vector else (self.rows, self.segments + 1)
        result = torch.empty(shape, dtype=torch.float32, device=self.states.device)
        boundary_products[self.segments + 1, self.rows](
            *self._boundary_arguments(False), *self._boundary_arguments(True), result, width, columns,
            VECTOR=self.vector, BLOCK_K=_block(width), BLOCK_V=32,
        )  # fmt: skip
        return result

    def _boundary_arguments(self, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        if reverse:
            return self.cotangents, self.cotangent_decays, self.outgoing
        return self.states, self.decays, self.incoming

    def _scan(
        self,
        x: _Operand,
        y: _Operand,
        z: _Operand,
        out: Tensor,
        reverse: bool,
        transposed: bool = False,
        partner: _Operand | None = None,
    ) -> Tensor | None:
        """One run of the recurrence into `out`; its dot products with a partner [tiles, B H, chunks CHUNK]."""
        settings = self.plan.scan
        block = min(settings.block, _block(z.width))
        grid = (triton.cdiv(z.width, block), self.segments, self.rows)
        arguments: tuple[Any, ...] = (*x.strides, *y.strides, *z.strides, *out.stride()[:3])
        widths = {"WIDTH_Y": y.width, "WIDTH_Z": z.width, "BLOCK_Y": _block(y.width), "BLOCK_Z": block}
        groups = {"X_GROUP": x.group, "Y_GROUP": y.group, "Z_GROUP": z.group}
        launch = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
        common = {"CHUNK": self.plan.chunk, "REVERSE": reverse, **widths, **groups, **self.numerics, **launch}
        products = None
        if partner is not None:
            _, _, chunks, _ = self.sizes
            products = self.states.new_empty(grid[0], self.rows, chunks * self.plan.chunk)
        other = x if partner is None else partner
        scalar_kernels.scan_segments[grid](
            x.tensor, y.tensor, z.tensor, out, other.tensor, self.weights, self.bounds, self.factors,
            *self._boundary_arguments(reverse),
            self.states if products is None else products, *self.sizes, *arguments, *other.strides,
            PARTNER_GROUP=other.group, TRANSPOSED=transposed, HAS_PARTNER=partner is not None, **common,
        )  # fmt: skip
        return products

    def _scaled(self, x: _Operand) -> _Operand:
        """q' for q, k' for k, and any other as it is."""
        if x is self.q:
            return _Operand(self.scaled_q, 1)
        return _Operand(self.scaled_k, 1) if x is self.k else x

    def _scan_near(self, x: _Operand, y: _Operand, z: _Operand, out: Tensor, reverse: bool, transposed: bool) -> None:
        settings = self.plan.scan
        block = min(settings.block, _block(z.width))
        x, y, z = self._scaled(x), self._scaled(y), self._scaled(z)
        vector_kernels.scan_segments[triton.cdiv(z.width, block), self.segments, self.rows](
            x.tensor, y.tensor, z.tensor, out, self.chunk_decays, *self._vector_arguments(),
            *self._boundary_arguments(reverse), *self.sizes, *x.strides, *y.strides, *z.strides, *out.stride()[:3],
            WIDTH_Y=y.width, WIDTH_Z=z.width, X_GROUP=x.group, Y_GROUP=y.group, Z_GROUP=z.group,
            BLOCK_Y=_block(y.width), BLOCK_Z=block, CHUNK=self.plan.chunk, REVERSE=reverse, TRANSPOSED=transposed,
            **self.numerics, num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def _scan_far(
        self,
        x: _Operand,
        y: _Operand,
        z: _Operand,
        out: Tensor | None,
        reverse: bool,
        transposed: bool,
        local: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Far segments into `out`, or where there is none their affine maps into `local`."""
        _, _, _, segment = self.sizes
        block = 32
        target = z.tensor if out is None else out
        maps = self.chunk_decays, self.chunk_decays
        boundaries = (*maps, maps[0]) if local is not None else self._boundary_arguments(reverse)
        far_kernels.scan_tokens[triton.cdiv(z.width, block), self.segments, self.rows](
            x.tensor, y.tensor, z.tensor, target, self.log_decay, self.documents, self.far, *boundaries,
            *(maps if local is None else local), self.length, self.heads, segment * self.plan.chunk,
            *x.strides, *y.strides, *z.strides, *target.stride()[:3], *self.log_decay.stride()[:3],
            WIDTH_Y=y.width, WIDTH_Z=z.width, X_GROUP=x.group, Y_GROUP=y.group, Z_GROUP=z.group,
            BLOCK_Y=_block(y.width), BLOCK_Z=block, REVERSE=reverse, TRANSPOSED=transposed,
            SUMMARIZE=local is not None, UNIT=LOG2_E,
        )  # fmt: skip

    def _contract(self, x: _Operand, y: _Operand, z: _Operand, out: Tensor, reverse: bool) -> None:
        """The outputs, or in reverse dv."""
        self._scan_near(x, y, z, out, reverse, transposed=False)
        self._scan_far(x, y, z, out, reverse, transposed=False)

    def _expand(self, x: _Operand, y: _Operand, z: _Operand, out: Tensor, reverse: bool) -> None:
        """The cotangent of q', or in reverse that of k'; of q and k themselves in far segments."""
        self._scan_near(x, y, z, out, reverse, transposed=True)
        self._scan_far(x, y, z, out, reverse, transposed=True)

    def _vector_arguments(self) -> tuple[Tensor, ...]:
        return (self.bounds, self.continues, self.far)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def diagonal_segment_triton(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor
) -> KernelSegment:
    """`DiagonalScan.summarize`; log_decay is [B, L, H] or [B, L, H, K]."""
    passes = DiagonalPasses(queries, keys, values, log_decay, documents)
    return KernelSegment(passes, queries, keys, values, log_decay)
