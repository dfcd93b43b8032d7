"""Whether every way of streaming finds the gradients of plain backpropagation: nothing is timed that does not.

All compute in the same precision, but cut into other parts they round otherwise. How much of a gradient is rounding
depends on the parameter: those of decays are differences of sums and keep few digits. So plain backpropagation is run
in float32 as well, by plain PyTorch, and a gradient may differ from the plain one twice as much as rounding changes
that: two independent roundings differ by the root of two times their errors, and the rest is for small tensors, whose
error norms scatter. Modes share most roundings and stay far below; a carry that is lost, or no gradient through it,
changes some gradients by tenths. Where rounding changes less than a kernel may, `_gate.BOUNDS` holds.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtrain.bench._gate import BOUNDS, relative_error
from longtrain.bench._report import one_line
from longtrain.bench._stream_modes import PLAIN, Mode
from longtrain.bench._stream_step import Workload, free, is_out_of_memory, make_handles
from longtrain.core.errors import Refused
from longtrain_kernels.backend import Backend

ROUNDINGS = 2.0
LOSS_SHARE = 0.05
"""Of the bound on gradients, for the loss: roundings cancel in a mean over thousands of tokens."""
CHUNKS, LOGIT_PARTS = 5, 3  # at least, of the short sequence

Found = dict[str, Tensor]
"""Gradients by parameter, and the loss as `loss`."""


@dataclass(frozen=True)
class Verdict:
    """Of one mode."""

    mode: str
    status: str
    """ok, failed, or error where it could not be computed."""
    detail: str
    worst: str = ""
    """What is nearest to its bound."""
    error: float = math.nan
    bound: float = math.nan


def judge(
    workload: Workload, modes: Sequence[Mode], tokens: int, chunk_tokens: int, logit_tokens: int
) -> Iterator[Verdict]:
    """Compare each mode with plain backpropagation; the verdict on `plain` is its distance from float32.

    Raises Refused where plain backpropagation of so many tokens does not fit.
    """
    chunk, logits = min(chunk_tokens, -(-tokens // CHUNKS)), min(logit_tokens, -(-tokens // LOGIT_PARTS))
    try:
        exact = _in_float32(workload, tokens)
        plain = _found(workload, PLAIN, tokens, chunk, logits)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Refused(f"gate_tokens={tokens}: plain backpropagation does not fit; use fewer") from None
    noise = {name: relative_error(plain[name], exact[name].double()) for name in plain}
    del exact
    worst = max(noise, key=lambda name: math.inf if math.isnan(noise[name]) else noise[name])
    finite = math.isfinite(noise[worst])
    yield Verdict(PLAIN.name, "ok" if finite else "failed", "" if finite else f"{worst}: NaN", worst, noise[worst])
    floor = BOUNDS[torch.float32 if workload.precision == "float32" else torch.bfloat16]
    bounds = {
        name: max(floor * (LOSS_SHARE if name == "loss" else 1.0), ROUNDINGS * value) for name, value in noise.items()
    }
    for mode in modes:
        if mode is not PLAIN:
            yield _verdict(workload, mode, (tokens, chunk, logits), plain, bounds)


def _verdict(
    workload: Workload, mode: Mode, sizes: tuple[int, int, int], plain: Found, bounds: dict[str, float]
) -> Verdict:
    try:
        got = _found(workload, mode, *sizes)
    except Exception as error:  # whatever it raises is a result, and leaves the others theirs
        return Verdict(mode.name, "error", one_line(error))
    finally:
        workload.model.zero_grad(set_to_none=True)
        free()
    errors = {name: relative_error(got[name], want.double()) for name, want in plain.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / bounds[name])
    most, bound = errors[worst], bounds[worst]
    right = most <= bound
    detail = "" if right else f"{worst}: error {most:.1e}, bound {bound:.1e}"
    return Verdict(mode.name, "ok" if right else "failed", detail, worst, most, bound)


def _in_float32(workload: Workload, tokens: int) -> Found:
    """Plain backpropagation of the same parameters, exactly widened, without kernels of ours."""
    types = {name: p.dtype for name, p in workload.model.named_parameters()}
    handles = make_handles(workload.device, Backend.CHUNKED)
    try:
        workload.model.float()
        return _found(replace(workload, handles=handles, precision="float32"), PLAIN, tokens, tokens, tokens)
    finally:
        for name, parameter in workload.model.named_parameters():
            parameter.data = parameter.data.to(types[name])
        free()


def _found(workload: Workload, mode: Mode, tokens: int, chunk_tokens: int, logit_tokens: int) -> Found:
    model = workload.model
    model.zero_grad(set_to_none=True)
    loss = workload.gradients(workload.batch(tokens), mode.config(tokens, chunk_tokens, logit_tokens))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {"loss": torch.tensor(loss, dtype=torch.float64, device=workload.device)}
