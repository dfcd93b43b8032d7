"""The definition of the delta rule with decay: one step a token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.affine import LinearSegment, accumulator_dtype


def delta_scan_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    documents: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S <- a_t S (zero at the first token of a document), then S <- S + b_t k_t (v_t - S^T k_t)^T; o_t = S^T q_t.

    Shapes as in `DeltaScan`, with as many key as value heads and log_decay [B, L, H] or [B, L, H, K]; returns outputs
    [B, L, H, V] and the final state [B, H, K, V].
    """
    length = values.shape[1]
    log_decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
    if length == 0:  # one neutral token keeps an empty segment in the graph, and so in every backward collective
        pad = (0, 0, 0, 0, 0, 1)
        queries, keys, values, log_decay = (F.pad(x, pad) for x in (queries, keys, values, log_decay))
        beta, documents = F.pad(beta, pad[2:]), F.pad(documents, (0, 1))
    dtype = accumulator_dtype(values.dtype)
    q, k, v, b = (x.to(dtype) for x in (queries, keys, values, beta))
    continues = (documents == F.pad(documents, (1, 0))[:, :-1]).to(dtype)
    decay = log_decay.to(dtype).exp() * continues[..., None, None]
    if state is None:
        state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", b[:, t].unsqueeze(-1) * k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)[:, :length].to(values.dtype), state


def delta_segment_reference(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor, documents: Tensor
) -> LinearSegment:
    """Run from the zero state, carrying the transition M along.

    M obeys the recurrence of the state without input, so it travels as K further value columns that start as the
    identity; reading them out gives M_t^T q_t.
    """
    batch, _, heads, width = keys.shape
    dtype = accumulator_dtype(values.dtype)
    identity = torch.eye(width, dtype=dtype, device=keys.device).expand(batch, heads, -1, -1)
    start = F.pad(identity, (values.shape[-1], 0))
    extended = F.pad(values.to(dtype), (0, width))
    output, final = delta_scan_reference(queries, keys, extended, beta, log_decay, documents, start)
    sizes = [values.shape[-1], width]
    (output, readout), (state, transition) = output.split(sizes, -1), final.split(sizes, -1)
    return LinearSegment(output=output, readout=readout, transition=transition, state=state, dtype=values.dtype)
