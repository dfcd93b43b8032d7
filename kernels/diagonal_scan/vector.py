"""The passes of the diagonal scan with a decay per token, head and key channel."""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.diagonal_scan import far_kernels, vector_kernels
from longtrain_kernels.diagonal_scan.launch import LOG2_E, DiagonalPasses, Operand, Plan, addressable, block_of

FAR_BLOCK = 32  # columns that a program of the far kernel owns


class VectorPasses(DiagonalPasses):
    """log_decay is [B, L, H, K]."""

    def __init__(
        self, queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor, plan: Plan
    ) -> None:
        super().__init__(queries, keys, values, log_decay, documents, plan)
        self.decay_width = keys.shape[-1]
        self.log_decay = addressable(log_decay.detach())
        # float16 lacks the range of what is scaled
        self.scaled_dtype = torch.bfloat16 if values.dtype == torch.bfloat16 else torch.float32
        self._scale_chunks()

    def run_outputs(self, out: Tensor) -> None:
        """See `DiagonalPasses`."""
        self._scan(self.q, self.k, self.v, out, reverse=False, transposed=False)
        del self.scaled_q, self.scaled_k  # made again for the backward pass, which may be far away

    def prepare_backward(self) -> None:
        """See `DiagonalPasses`."""
        self._scale_chunks()

    def run_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The cotangents of q' and k', from which in place those of q and k are made, and dv."""
        query_grad, key_grad = (self.empty(x, self.scaled_dtype) for x in (self.q, self.k))
        value_grad = self.empty(self.v)
        self._scan(self.grad, self.v, self.k, query_grad, reverse=False, transposed=True)
        self._scan(self.v, self.grad, self.q, key_grad, reverse=True, transposed=True)
        self._scan(self.k, self.q, self.grad, value_grad, reverse=True, transposed=False)
        del self.scaled_q, self.scaled_k
        return query_grad, key_grad, value_grad, self._finish(query_grad, key_grad)

    def run_summaries(
        self, y: Operand, z: Operand, state: Tensor, decay: Tensor, launch: dict[str, int], reverse: bool
    ) -> None:
        """See `DiagonalPasses`."""
        self._scan_far(y, y, z, None, (state, decay, state), (state, decay), reverse, transposed=False)
        y = self._scaled(y)
        vector_kernels.summarize_segments[triton.cdiv(z.width, launch["BLOCK_Z"]), self.segments, self.rows](
            y.tensor, z.tensor, self.chunk_decays, self.bounds, self.continues, self.far, state, decay,
            *self.sizes, *y.strides, *z.strides, WIDTH_Y=y.width, WIDTH_Z=z.width, Z_GROUP=z.group,
            CHUNK=self.plan.chunk, REVERSE=reverse, **self.numerics, **launch,
        )  # fmt: skip

    def _scale_chunks(self) -> None:
        """q' and k', the decays of chunks and which segments are far; see `vector_kernels.scale_chunks`."""
        length, heads, chunks, segment = self.sizes
        width = self.k.width
        self.scaled_q, self.scaled_k = (self.empty(x, self.scaled_dtype) for x in (self.q, self.k))
        self.chunk_decays = torch.empty(self.rows, chunks, width, dtype=torch.float32, device=self.log_decay.device)
        far = self.documents.new_empty(self.rows, chunks)
        vector_kernels.scale_chunks[chunks, self.rows](
            self.q.tensor, self.k.tensor, self.log_decay, self.bounds, self.continues, self.scaled_q, self.scaled_k,
            self.chunk_decays, far, length, heads, chunks, *self.q.strides, *self.k.strides,
            *self.log_decay.stride()[:3], *self.scaled_q.stride()[:3], WIDTH=width, GROUP=self.k.group,
            BLOCK=block_of(width), CHUNK=self.plan.chunk, OPERAND=self.numerics["OPERAND"], num_warps=8,
        )  # fmt: skip
        self.far = F.pad(far, (0, self.segments * segment - chunks)).unflatten(1, (-1, segment)).amax(2)

    def _scaled(self, x: Operand) -> Operand:
        """q' for q, k' for k, and any other as it is."""
        if x is self.q:
            return Operand(self.scaled_q, 1)
        return Operand(self.scaled_k, 1) if x is self.k else x

    def _scan(self, x: Operand, y: Operand, z: Operand, out: Tensor, reverse: bool, transposed: bool) -> None:
        """Fills `out` by the roles of x, y and z in `vector_kernels`."""
        boundaries = self.boundary_arguments(reverse)
        self._scan_far(x, y, z, out, boundaries, None, reverse, transposed)
        settings = self.plan.scan
        block = min(settings.block, block_of(z.width))
        x, y, z = self._scaled(x), self._scaled(y), self._scaled(z)
        vector_kernels.scan_segments[triton.cdiv(z.width, block), self.segments, self.rows](
            x.tensor, y.tensor, z.tensor, out, self.chunk_decays, self.bounds, self.continues, self.far, *boundaries,
            *self.sizes, *x.strides, *y.strides, *z.strides, *out.stride()[:3],
            WIDTH_Y=y.width, WIDTH_Z=z.width, X_GROUP=x.group, Y_GROUP=y.group, Z_GROUP=z.group,
            BLOCK_Y=block_of(y.width), BLOCK_Z=block, CHUNK=self.plan.chunk, REVERSE=reverse, TRANSPOSED=transposed,
            **self.numerics, num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def _scan_far(
        self,
        x: Operand,
        y: Operand,
        z: Operand,
        out: Tensor | None,
        boundaries: tuple[Tensor, Tensor, Tensor],
        local: tuple[Tensor, Tensor] | None,
        reverse: bool,
        transposed: bool,
    ) -> None:
        """Far segments into `out`, or where there is none their affine maps into `local`."""
        _, _, _, segment = self.sizes
        target = z.tensor if out is None else out
        far_kernels.scan_tokens[triton.cdiv(z.width, FAR_BLOCK), self.segments, self.rows](
            x.tensor, y.tensor, z.tensor, target, self.log_decay, self.documents, self.far, *boundaries,
            *(boundaries[:2] if local is None else local), self.length, self.heads, segment * self.plan.chunk,
            *x.strides, *y.strides, *z.strides, *target.stride()[:3], *self.log_decay.stride()[:3],
            WIDTH_Y=y.width, WIDTH_Z=z.width, X_GROUP=x.group, Y_GROUP=y.group, Z_GROUP=z.group,
            BLOCK_Y=block_of(y.width), BLOCK_Z=FAR_BLOCK, REVERSE=reverse, TRANSPOSED=transposed,
            SUMMARIZE=local is not None, UNIT=LOG2_E,
        )  # fmt: skip

    def _finish(self, query_grad: Tensor, key_grad: Tensor) -> Tensor | None:
        """See `vector_kernels.finish_gradients`."""
        wanted = self.wants_decay_grad
        decay_grad = self.empty(self.k, self.log_decay.dtype) if wanted else None
        grads, ends = (query_grad, self.states) if decay_grad is None else (decay_grad, self.boundary_products())
        settings = self.plan.finish
        block = min(settings.block, block_of(self.k.width))
        vector_kernels.finish_gradients[triton.cdiv(self.k.width, block), self.segments, self.rows](
            self.q.tensor, self.k.tensor, self.log_decay, self.bounds, self.continues, self.far, query_grad, key_grad,
            grads, ends, *self.sizes, *self.q.strides, *self.k.strides, *self.log_decay.stride()[:3],
            *query_grad.stride()[:3], *grads.stride()[:3], WIDTH=self.k.width, GROUP=self.k.group, BLOCK=block,
            CHUNK=self.plan.chunk, GATE_GRADS=wanted, OPERAND=self.numerics["OPERAND"],
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        return decay_grad
