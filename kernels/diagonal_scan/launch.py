"""How the kernels of the diagonal scan are launched: plans, operands, and the passes that both families share."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrain_kernels.diagonal_scan.chunk import bound_documents, boundary_products, fold_segments
from longtrain_kernels.passes import Passes

MIN_SEGMENT_CHUNKS = 4
LOG2_E = 1.4426950408889634  # kernels take decays as exponents of two
FOLD_BLOCK = 512  # state elements that a program folds


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
    longest: int
    """Chunks of a segment at most: a decay's gradient adds up the roundings of the tokens behind it in its segment."""
    summarize: Settings
    scan: Settings
    finish: Settings
    """Of the pass that ends the gradients of a vector decay."""

    def segment_chunks(self, chunks: int, rows: int, columns: int) -> int:
        """Chunks of a segment for `rows` (batch x heads) of `chunks` chunks."""
        tiles = triton.cdiv(columns, self.scan.block)
        wanted = min(self.programs // (rows * tiles), triton.cdiv(chunks, MIN_SEGMENT_CHUNKS))
        return triton.cdiv(chunks, max(1, wanted, triton.cdiv(chunks, self.longest)))


@dataclass(frozen=True)
class Operand:
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


def addressable_empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, H, D] whose rows the copy engine can address: 16 bytes apart or a multiple."""
    *outer, width = shape
    unit = 16 // dtype.itemsize
    return like.new_empty(*outer, triton.cdiv(width, unit) * unit, dtype=dtype)[..., :width]


def addressable(x: Tensor) -> Tensor:
    """`x`, or a copy of it that the copy engine can address."""
    batch, length, head, column = x.stride()
    # A descriptor has the stride of tokens even where there is one; the others only move its start.
    strides = [length, *(stride for size, stride in ((x.shape[0], batch), (x.shape[2], head)) if size > 1)]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    if column == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return addressable_empty(tuple(x.shape), x, x.dtype).copy_(x)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the copy engine's descriptors, which kernels make themselves."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def block_of(width: int) -> int:
    """The tile that holds a head of `width` columns."""
    return max(16, triton.next_power_of_2(width))


class DiagonalPasses(Passes):
    """The passes of `DiagonalScan`, without what depends on the kind of decay."""

    decay_width: int
    """Channels of a decay: 1, or K."""
    log_decay: Tensor
    """[B, L, H] or [B, L, H, K]."""

    def __init__(
        self, queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor, plan: Plan
    ) -> None:
        batch, length, heads, width = values.shape
        group = heads // keys.shape[2]
        self.plan = plan
        self.q, self.k = (Operand(addressable(x.detach()), group) for x in (queries, keys))
        self.v = Operand(addressable(values.detach()), 1)
        self.log_decay = log_decay.detach()
        self.wants_decay_grad = log_decay.requires_grad
        self.documents = documents.to(torch.int32).contiguous()
        self.rows, self.heads, self.length = batch * heads, heads, length
        chunks = triton.cdiv(length, plan.chunk)
        segment = plan.segment_chunks(chunks, self.rows, width)
        self.segments = triton.cdiv(chunks, segment)
        self.sizes = (length, heads, chunks, segment)
        self.numerics = {
            "OPERAND": tl.bfloat16 if values.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32x3" if values.dtype == torch.float32 else "tf32",
        }
        triton.set_allocator(_scratch)
        self.bounds, self.continues = self._bound_documents()

    def summarize(self) -> tuple[Tensor, Tensor]:
        """See `Passes`."""
        self.states, self.decays = self._boundaries(self.k, self.v, reverse=False)
        return self.decays[:, :, -1].clone(), self.states[:, :, -1].clone()

    def outputs(self, state: Tensor) -> Tensor:
        """See `Passes`."""
        self.incoming = state.detach().contiguous()
        out = self.empty(self.v)
        self.run_outputs(out)
        return out

    def adjoint(self, grad: Tensor | None) -> Tensor:
        """See `Passes`."""
        triton.set_allocator(_scratch)  # kept per thread, and autograd has its own
        grad = torch.zeros_like(self.v.tensor) if grad is None else grad
        self.grad = Operand(addressable(grad), 1)
        self.prepare_backward()
        self.cotangents, self.cotangent_decays = self._boundaries(self.q, self.grad, reverse=True)
        return self.cotangents[:, :, 0].clone()

    def gradients(self, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """See `Passes`."""
        triton.set_allocator(_scratch)
        self.outgoing = grad_state.detach().contiguous()
        query_grad, key_grad, value_grad, decay_grad = self.run_gradients()
        return self._per_key_head(query_grad), self._per_key_head(key_grad), value_grad, decay_grad

    @abstractmethod
    def run_outputs(self, out: Tensor) -> None:
        """Fill `out` [B, L, H, V]."""

    def prepare_backward(self) -> None:
        """What the backward passes need and the forward ones did not keep."""

    @abstractmethod
    def run_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq and dk [B, L, H, K] by value head, dv, and that of the decays where it is wanted."""

    @abstractmethod
    def run_summaries(
        self, y: Operand, z: Operand, state: Tensor, decay: Tensor, launch: dict[str, Any], reverse: bool
    ) -> None:
        """Fill the segments' maps, state [B H, G, K, V] and decay [B H, G, 1 or K]."""

    def empty(self, like: Operand, dtype: torch.dtype | None = None) -> Tensor:
        """[B, L, H, D] with the width of `like`."""
        values = self.v.tensor
        return addressable_empty((*values.shape[:3], like.width), values, dtype or values.dtype)

    def boundary_products(self) -> Tensor:
        """See `chunk.boundary_products`."""
        width, columns = self.k.width, self.v.width
        result = self.states.new_empty(self.rows, self.segments + 1, self.decay_width)
        boundary_products[self.segments + 1, self.rows](
            *self.boundary_arguments(False), *self.boundary_arguments(True), result, width, columns,
            VECTOR=self.decay_width > 1, BLOCK_K=block_of(width), BLOCK_V=32,
        )  # fmt: skip
        return result

    def boundary_arguments(self, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """States at boundaries, decays up to them and what comes in; in reverse their cotangents."""
        if reverse:
            return self.cotangents, self.cotangent_decays, self.outgoing
        return self.states, self.decays, self.incoming

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

    def _boundaries(self, y: Operand, z: Operand, reverse: bool) -> tuple[Tensor, Tensor]:
        """States [B, H, G + 1, K, V] and decays [B, H, G + 1, K or 1] at segment boundaries."""
        settings, segments = self.plan.summarize, self.segments
        local_state = torch.empty(self.rows, segments, y.width, z.width, dtype=torch.float32, device=y.tensor.device)
        local_decay = local_state.new_empty(self.rows, segments, self.decay_width)
        launch = {
            "BLOCK_Y": block_of(y.width), "BLOCK_Z": min(settings.block, block_of(z.width)),
            "num_warps": settings.num_warps, "num_stages": settings.num_stages,
        }  # fmt: skip
        self.run_summaries(y, z, local_state, local_decay, launch, reverse)
        size = y.width * z.width
        states = local_state.new_empty(self.rows, segments + 1, y.width, z.width)
        decays = local_state.new_empty(self.rows, segments + 1, self.decay_width)
        fold_segments[triton.cdiv(size, FOLD_BLOCK), self.rows](
            local_state, local_decay, states, decays, segments, size, z.width, VECTOR=self.decay_width > 1,
            REVERSE=reverse, BLOCK=FOLD_BLOCK,
        )  # fmt: skip
        per_head = (-1, self.heads)
        return states.unflatten(0, per_head), decays.unflatten(0, per_head)
