"""The diagonal scan in chunks of time, in plain PyTorch: matrix products inside a chunk, one state step a chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.affine import LinearSegment, accumulator_dtype
from longtrain_kernels.chunks import bounded, merge, split, split_documents

SCALAR_CHUNK = 64
# A vector decay needs exp(b_i - b_j) per key channel, [C, C, K] numbers a chunk, so its chunks are shorter.
VECTOR_CHUNK = 16


@dataclass(frozen=True)
class _Chunks:
    """Everything of a segment that does not depend on the incoming state; N chunks of C tokens.

    The last dimension of decays is 1 for a scalar and K for a vector decay.
    """

    intra: Tensor  # [B, N, H, C, V]  outputs from keys of the same chunk
    queries_in: Tensor  # [B, N, H, C, K]  queries decayed from the chunk's start, zero outside the carry's document
    updates: Tensor  # [B, N, H, K, V]  what the chunk adds to the state
    transitions: Tensor  # [B, N, H, 1 or K]  what the chunk multiplies the state with


def _chunk(queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor) -> _Chunks:
    dtype = accumulator_dtype(values.dtype)
    vector = log_decay.dim() == 4
    size = VECTOR_CHUNK if vector else SCALAR_CHUNK
    q, k, v = (split(x.to(dtype), size) for x in (queries, keys, values))
    log_decay = split(bounded(log_decay if vector else log_decay.unsqueeze(-1), dtype), size)
    documents = split_documents(documents, size)
    carried = F.pad(documents[:, :-1, -1], (1, 0))  # the document that the chunk's incoming state belongs to

    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    visible = (same & torch.ones(size, size, dtype=torch.bool, device=v.device).tril()).unsqueeze(2)
    # A cumulative sum that starts anew in each document: one sum over the chunk would let the rounding of a document
    # depend on the documents before it.
    b = visible.to(dtype) @ log_decay
    # Masked before the exponential: b_i - b_j is positive, and may overflow, where j comes after i.
    if vector:
        distance = (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(~visible.unsqueeze(-1), float("-inf"))
        scores = torch.einsum("bnhik,bnhjk,bnhijk->bnhij", q, k, distance.exp())
    else:
        distance = (b - b.mT).masked_fill(~visible, float("-inf"))
        scores = (q @ k.mT) * distance.exp()

    head = (documents == carried.unsqueeze(-1)).to(dtype)[:, :, None, :, None]
    tail = (documents == documents[:, :, -1:])[:, :, None, :, None]
    passes = (documents[:, :, -1] == carried).to(dtype)[:, :, None, None]
    total = b[..., -1:, :]
    return _Chunks(
        intra=scores @ v,
        queries_in=q * b.exp() * head,
        updates=(k * (total - b).masked_fill(~tail, float("-inf")).exp()).mT @ v,
        transitions=total.squeeze(-2).exp() * passes,
    )


def _states(chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """States before each chunk [B, N, H, K, V] and the final state, from the zero state."""
    state = torch.zeros_like(chunks.updates[:, 0])
    before = []
    for update, transition in zip(chunks.updates.unbind(1), chunks.transitions.unbind(1), strict=True):
        before.append(state)
        state = transition.unsqueeze(-1) * state + update
    return torch.stack(before, dim=1), state


def diagonal_segment_chunked(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor
) -> LinearSegment:
    """`DiagonalScan.summarize`."""
    chunks = _chunk(queries, keys, values, log_decay, documents)
    before, final = _states(chunks)
    output = merge(chunks.intra + chunks.queries_in @ before, values.shape[1])
    products = torch.cumprod(chunks.transitions, dim=1)
    entering = torch.cat([torch.ones_like(products[:, :1]), products[:, :-1]], dim=1)
    readout = merge(chunks.queries_in * entering.unsqueeze(-2), values.shape[1])
    return LinearSegment(output=output, readout=readout, transition=products[:, -1], state=final, dtype=values.dtype)
