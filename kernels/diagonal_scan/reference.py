"""The definition of the diagonal scan: one step a token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.affine import LinearSegment, accumulator_dtype


def diagonal_scan_reference(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T with a_t = 0 at the first token of a document; o_t = S_t^T q_t.

    Shapes as in `DiagonalScan`, with as many key as value heads and log_decay [B, L, H] or [B, L, H, K]; returns
    outputs [B, L, H, V] and the final state [B, H, K, V].
    """
    length = values.shape[1]
    log_decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
    if length == 0:  # one neutral token keeps an empty segment in the graph, and so in every backward collective
        pad = (0, 0, 0, 0, 0, 1)
        queries, keys, values, log_decay = (F.pad(x, pad) for x in (queries, keys, values, log_decay))
        documents = F.pad(documents, (0, 1))
    dtype = accumulator_dtype(values.dtype)
    q, k, v = (x.to(dtype) for x in (queries, keys, values))
    continues = (documents == F.pad(documents, (1, 0))[:, :-1]).to(dtype)
    decay = log_decay.to(dtype).exp() * continues[..., None, None]
    if state is None:
        state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)[:, :length].to(values.dtype), state


def diagonal_segment_reference(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, documents: Tensor
) -> LinearSegment:
    """Run from the zero state, carrying the transition along: K further value columns that start as the identity."""
    batch, _, heads, width = keys.shape
    dtype = accumulator_dtype(values.dtype)
    identity = torch.eye(width, dtype=dtype, device=keys.device).expand(batch, heads, -1, -1)
    start, extended = F.pad(identity, (values.shape[-1], 0)), F.pad(values.to(dtype), (0, width))
    output, final = diagonal_scan_reference(queries, keys, extended, log_decay, documents, start)
    sizes = [values.shape[-1], width]
    (output, readout), (state, transition) = output.split(sizes, -1), final.split(sizes, -1)
    transition = transition.diagonal(dim1=-2, dim2=-1)
    return LinearSegment(
        output=output,
        readout=readout,
        transition=transition if log_decay.dim() == 4 else transition[..., :1],
        state=state,
        dtype=values.dtype,
    )
