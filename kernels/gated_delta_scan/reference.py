"""The definition of the gated delta rule: one step a token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain_kernels.affine import Segment, accumulator_dtype


def gated_delta_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    documents: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S <- a_t S (zero at the first token of a document), then S <- S + b_t k_t (v_t - S^T k_t)^T; o_t = S^T q_t.

    Shapes as in `GatedDeltaScan`; returns outputs [B, L, H, V] and the final state [B, H, K, V].
    """
    length = values.shape[1]
    if length == 0:  # one neutral token keeps an empty segment in the graph, and so in every backward collective
        pad = (0, 0, 0, 0, 0, 1)
        queries, keys, values = (F.pad(x, pad) for x in (queries, keys, values))
        log_decay, beta, documents = F.pad(log_decay, pad[2:]), F.pad(beta, pad[2:]), F.pad(documents, (0, 1))
    dtype = accumulator_dtype(values.dtype)
    q, k, v, b = (x.to(dtype) for x in (queries, keys, values, beta))
    continues = (documents == F.pad(documents, (1, 0))[:, :-1]).to(dtype)
    decay = log_decay.to(dtype).exp() * continues.unsqueeze(-1)
    if state is None:
        state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        state = decay[:, t, :, None, None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", b[:, t].unsqueeze(-1) * k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)[:, :length].to(values.dtype), state


def gated_delta_segment_reference(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, documents: Tensor
) -> Segment:
    """Run from the zero state, carrying the transition M along.

    M obeys the recurrence of the state without input, so it travels as K further value columns that start as the
    identity; reading them out gives M_t^T q_t.
    """
    batch, _, heads, width = keys.shape
    dtype = accumulator_dtype(values.dtype)
    identity = torch.eye(width, dtype=dtype, device=keys.device).expand(batch, heads, -1, -1)
    start = F.pad(identity, (values.shape[-1], 0))
    extended = F.pad(values.to(dtype), (0, width))
    output, final = gated_delta_reference(queries, keys, extended, log_decay, beta, documents, start)
    sizes = [values.shape[-1], width]
    (output, readout), (state, transition) = output.split(sizes, -1), final.split(sizes, -1)
    return Segment(output=output, readout=readout, transition=transition, state=state, dtype=values.dtype)
