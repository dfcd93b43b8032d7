"""The delta scan in chunks of time (the WY form), in plain PyTorch; see README.md for the derivation."""

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
    """Everything of a segment that does not depend on the incoming state; N chunks of C tokens."""

    updates: Tensor  # [B, N, H, C, V]  U: what the tokens write where the incoming state is zero
    erasures: Tensor  # [B, N, H, C, K]  W: they write U - W S
    scores: Tensor  # [B, N, H, C, C]  how a token's query reads what is written up to it
    queries_in: Tensor  # [B, N, H, C, K]  queries decayed from the chunk's start, zero outside the carry's document
    keys_out: Tensor  # [B, N, H, C, K]  keys decayed to the chunk's end, zero outside its last document
    decays: Tensor  # [B, N, H, 1 or K]  of the state over the chunk


def _chunk(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor, documents: Tensor
) -> _Chunks:
    dtype = accumulator_dtype(values.dtype)
    vector = log_decay.dim() == 4
    size = VECTOR_CHUNK if vector else SCALAR_CHUNK
    q, k, v = (split(x.to(dtype), size) for x in (queries, keys, values))
    step = split(beta.to(dtype).unsqueeze(-1), size)
    log_decay = split(bounded(log_decay if vector else log_decay.unsqueeze(-1), dtype), size)
    documents = split_documents(documents, size)
    carried = F.pad(documents[:, :-1, -1], (1, 0))  # the document that the chunk's incoming state belongs to

    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    visible = (same & torch.ones(size, size, dtype=torch.bool, device=v.device).tril()).unsqueeze(2)
    # Summed anew in each document, so that the rounding of one does not depend on those before it.
    b = visible.to(dtype) @ log_decay
    # Masked before the exponential: b_i - b_j is positive, and may overflow, where j comes after i.
    if vector:
        distance = (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(~visible.unsqueeze(-1), float("-inf")).exp()
        scores, overlap = (torch.einsum("bnhik,bnhjk,bnhijk->bnhij", x, k, distance) for x in (q, k))
    else:
        distance = (b - b.mT).masked_fill(~visible, float("-inf")).exp()
        scores, overlap = ((x @ k.mT) * distance for x in (q, k))

    head = (documents == carried.unsqueeze(-1)).to(dtype)[:, :, None, :, None]
    tail = (documents == documents[:, :, -1:])[:, :, None, :, None]
    passes = (documents[:, :, -1] == carried).to(dtype)[:, :, None, None]
    written = torch.linalg.solve_triangular(
        (step * overlap).tril(-1),
        torch.cat([step * v, step * k * b.exp() * head], dim=-1),
        upper=False,
        unitriangular=True,
    )
    updates, erasures = written.split([v.shape[-1], k.shape[-1]], dim=-1)
    total = b[..., -1:, :]
    return _Chunks(
        updates=updates,
        erasures=erasures,
        scores=scores,
        queries_in=q * b.exp() * head,
        keys_out=k * (total - b).masked_fill(~tail, float("-inf")).exp(),
        decays=total.squeeze(-2).exp() * passes,
    )


def delta_segment_chunked(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor, documents: Tensor
) -> LinearSegment:
    """`DeltaScan.summarize`, with as many key as value heads and log_decay [B, L, H] or [B, L, H, K].

    The state has K further columns that start as the identity and are written by nothing: they become the transition,
    and reading them out gives M_t^T q_t.
    """
    chunks = _chunk(queries, keys, values, beta, log_decay, documents)
    width = keys.shape[-1]
    identity = torch.eye(width, dtype=chunks.updates.dtype, device=keys.device)
    state = F.pad(identity, (values.shape[-1], 0)).expand(keys.shape[0], keys.shape[2], -1, -1)
    extended = F.pad(chunks.updates, (0, width))
    outputs = []
    for n in range(extended.shape[1]):
        written = extended[:, n] - chunks.erasures[:, n] @ state
        outputs.append(chunks.queries_in[:, n] @ state + chunks.scores[:, n] @ written)
        state = chunks.decays[:, n].unsqueeze(-1) * state + chunks.keys_out[:, n].mT @ written
    sizes = [values.shape[-1], width]
    output, readout = merge(torch.stack(outputs, dim=1), values.shape[1]).split(sizes, dim=-1)
    final, transition = state.split(sizes, dim=-1)
    return LinearSegment(output=output, readout=readout, transition=transition, state=final, dtype=values.dtype)
