"""The passes of the diagonal scan with at most one decay per token and head."""

import torch
import triton
from torch import Tensor

from longtrain_kernels.diagonal_scan import scalar_kernels
from longtrain_kernels.diagonal_scan.launch import LOG2_E, DiagonalPasses, Operand, Plan, block_of

BLOCK = 1024  # tokens that a program weighs, or sums the decay gradients of


class ScalarPasses(DiagonalPasses):
    """log_decay is [B, L, H]."""

    decay_width = 1

    def __init__(
        self, queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor, plan: Plan
    ) -> None:
        super().__init__(queries, keys, values, log_decay, documents, plan)
        self.weights, self.factors = self._weigh_chunks()

    def run_outputs(self, out: Tensor) -> None:
        """See `DiagonalPasses`."""
        self._scan(self.q, self.k, self.v, out, reverse=False)

    def run_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `DiagonalPasses`."""
        query_grad, key_grad, value_grad = (self.empty(x) for x in (self.q, self.k, self.v))
        wanted = self.wants_decay_grad
        products_q = self._scan(
            self.grad, self.v, self.k, query_grad, reverse=False, transposed=True, partner=self.q if wanted else None
        )
        products_k = self._scan(
            self.v, self.grad, self.q, key_grad, reverse=True, transposed=True, partner=self.k if wanted else None
        )
        self._scan(self.k, self.q, self.grad, value_grad, reverse=True)
        if products_q is None or products_k is None:
            return query_grad, key_grad, value_grad, None
        return query_grad, key_grad, value_grad, self._decay_gradient(products_q, products_k)

    def run_summaries(
        self, y: Operand, z: Operand, state: Tensor, decay: Tensor, launch: dict[str, int], reverse: bool
    ) -> None:
        """See `DiagonalPasses`."""
        scalar_kernels.summarize_segments[triton.cdiv(z.width, launch["BLOCK_Z"]), self.segments, self.rows](
            y.tensor, z.tensor, self.weights, self.factors, state, decay, *self.sizes, *y.strides, *z.strides,
            z.width, 1, WIDTH_Y=y.width, WIDTH_Z=z.width, Y_GROUP=y.group, Z_GROUP=z.group, CHUNK=self.plan.chunk,
            REVERSE=reverse, **self.numerics, **launch,
        )  # fmt: skip

    def _weigh_chunks(self) -> tuple[Tensor, Tensor]:
        """Weights of rows and decays of chunks; see `scalar_kernels.weigh_chunks`."""
        length, heads, chunks, _ = self.sizes
        weights = torch.empty(self.rows, chunks, 3, self.plan.chunk, dtype=torch.float32, device=self.log_decay.device)
        factors = weights.new_empty(self.rows, chunks)
        scalar_kernels.weigh_chunks[triton.cdiv(chunks * self.plan.chunk, BLOCK), self.rows](
            self.log_decay, self.documents, weights, factors, length, heads, chunks, *self.log_decay.stride(),
            UNIT=LOG2_E, CHUNK=self.plan.chunk, BLOCK=BLOCK,
        )  # fmt: skip
        return weights, factors

    def _decay_gradient(self, products_q: Tensor, products_k: Tensor) -> Tensor:
        """See `scalar_kernels.decay_gradients`."""
        _, _, chunks, segment = self.sizes
        padded = chunks * self.plan.chunk
        grad = products_q.new_empty(self.rows, padded)
        scalar_kernels.decay_gradients[self.segments, self.rows](
            products_q, products_k, self.boundary_products(), self.documents, grad, self.length, self.heads, padded,
            segment * self.plan.chunk, products_q.shape[0], products_k.shape[0], BLOCK=BLOCK,
        )  # fmt: skip
        per_head = grad.view(-1, self.heads, padded)[..., : self.length]
        return per_head.transpose(1, 2).to(self.log_decay.dtype)

    def _scan(
        self,
        x: Operand,
        y: Operand,
        z: Operand,
        out: Tensor,
        reverse: bool,
        transposed: bool = False,
        partner: Operand | None = None,
    ) -> Tensor | None:
        """One run of the recurrence into `out`; its dot products with a partner [tiles, B H, chunks CHUNK]."""
        settings = self.plan.scan
        block = min(settings.block, block_of(z.width))
        tiles = triton.cdiv(z.width, block)
        _, _, chunks, _ = self.sizes
        products = None if partner is None else self.states.new_empty(tiles, self.rows, chunks * self.plan.chunk)
        other = x if partner is None else partner
        scalar_kernels.scan_segments[tiles, self.segments, self.rows](
            x.tensor, y.tensor, z.tensor, out, other.tensor, self.weights, self.bounds, self.factors,
            *self.boundary_arguments(reverse), self.states if products is None else products, *self.sizes,
            *x.strides, *y.strides, *z.strides, *out.stride()[:3], *other.strides,
            WIDTH_Y=y.width, WIDTH_Z=z.width, X_GROUP=x.group, Y_GROUP=y.group, Z_GROUP=z.group,
            PARTNER_GROUP=other.group, BLOCK_Y=block_of(y.width), BLOCK_Z=block, CHUNK=self.plan.chunk,
            REVERSE=reverse, TRANSPOSED=transposed, HAS_PARTNER=partner is not None, **self.numerics,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        return products
