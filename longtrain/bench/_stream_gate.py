"""Whether every way of streaming finds the gradients that one run finds: nothing is timed that does not.

That run, the gate's, is plain backpropagation unless another mode is asked for, of one rank alone. All compute in the
same precision, but cut into other parts they round otherwise. How much of a gradient is rounding depends on the
parameter: those of decays are differences of sums and keep few digits. So the gate's mode is run in float32 as well, by
plain PyTorch, and a gradient may differ from the gate's one twice as much as rounding changes that: two independent
roundings differ by the root of two times their errors, and the rest is for small tensors, whose error norms scatter.
Modes share most roundings and stay far below; a carry that is lost, or no gradient through it, changes some gradients
by tenths. Where rounding changes less than a kernel may, `_gate.BOUNDS` holds. All gradients as one vector are held to
the same: there the large ones count, which keep their digits.

A gate's mode that cuts time has chunks half as long as the modes that are compared with it: what is wrong at the end of
a chunk is wrong at other tokens.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from longtrain.bench._gate import BOUNDS, relative_error
from longtrain.bench._report import one_line
from longtrain.bench._stream_modes import Mode
from longtrain.bench._stream_step import Workload, free, is_out_of_memory, make_handles
from longtrain.bench._world import World
from longtrain.core.errors import Refused
from longtrain.streaming.config import StreamConfig
from longtrain_kernels.backend import Backend

ROUNDINGS = 2.0
LOSS_SHARE = 0.05
"""Of the bound on gradients, for the loss: roundings cancel in a mean over thousands of tokens."""
CHUNKS, DOCUMENTS, LOGIT_PARTS = 5, 16, 3  # at least, of the short sequence; documents where there are any
LOSS, TOGETHER = "loss", "all gradients"

Found = dict[str, Tensor]
"""Gradients by parameter, and the loss as LOSS."""


@dataclass(frozen=True)
class Verdict:
    """Of one mode."""

    mode: str
    against: str
    """What it was compared with: the gate's mode, or float32 for that itself."""
    ranks: int
    """That computed it together."""
    status: str
    """ok, failed, or error where it could not be computed."""
    detail: str
    worst: str = ""
    """What is nearest to its bound: a parameter, LOSS or TOGETHER."""
    error: float = math.nan
    bound: float = math.nan
    together: float = math.nan
    """The error of all gradients as one vector."""


@dataclass(frozen=True)
class Short:
    """The sequence at which modes are compared."""

    mode: Mode
    """The gate's."""
    tokens: int
    chunk_tokens: int
    logit_tokens: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk here: there are several."""
        return min(self.chunk_tokens, -(-self.tokens // CHUNKS))

    def shorten(self, workload: Workload) -> Workload:
        """Its documents: several begin in a chunk."""
        if workload.document_tokens is None:
            return workload
        return replace(workload, document_tokens=min(workload.document_tokens, -(-self.tokens // DOCUMENTS)))

    def config(self, mode: Mode, chunk_tokens: int) -> StreamConfig:
        """Of a mode."""
        return mode.config(self.tokens, chunk_tokens, min(self.logit_tokens, -(-self.tokens // LOGIT_PARTS)))


class Gate:
    """The gate's run, of this rank alone; its gradients wait in the host's memory."""

    def __init__(self, alone: Workload, world: World, short: Short) -> None:
        """Raises Refused on every rank where a step does not fit on one of them."""
        self._world, self._short = world, short
        self._want, noise = self._run(short.shorten(alone))
        worst = max(noise, key=lambda name: math.inf if math.isnan(noise[name]) else noise[name])
        finite = math.isfinite(noise[worst])
        own = Verdict(
            mode=short.mode.name,
            against="float32",
            ranks=1,
            status="ok" if finite else "failed",
            detail="" if finite else f"{worst}: NaN",
            worst=worst,
            error=noise[worst],
            together=noise[TOGETHER],
        )
        self.own = _worst(world, own)
        """Its distance from float32."""
        floor = BOUNDS[torch.float32 if alone.precision == "float32" else torch.bfloat16]
        self._bounds = {
            name: max(floor * (LOSS_SHARE if name == LOSS else 1.0), ROUNDINGS * value) for name, value in noise.items()
        }

    def verdict(self, workload: Workload, mode: Mode) -> Verdict | None:
        """Compare what the ranks find together in a mode. None for the gate's own run, which is not made again."""
        if mode == self._short.mode and not mode.chunked and self._world.group.size == 1:
            return None
        return _worst(self._world, self._verdict(self._short.shorten(workload), mode))

    def _run(self, alone: Workload) -> tuple[Found, dict[str, float]]:
        """Gradients and loss, and how far each is from float32."""
        short, fits = self._short, True
        config = short.config(short.mode, -(-short.chunk // 2))
        want: Found = {}
        noise: dict[str, float] = {}
        try:
            exact = _on_host(_in_float32(alone, short.tokens, config))
            want = _found(alone, short.tokens, config)
            noise = _errors(want, exact)
            del exact
            want = _on_host(want)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        free()
        if not all(self._world.gather(fits)):
            raise Refused(
                f"gate_tokens={short.tokens}: a step of gate_mode={short.mode.name} does not fit; use fewer tokens, or "
                "a mode that keeps less, such as checkpointing-streamed-head or block1"
            )
        return want, noise

    def _verdict(self, workload: Workload, mode: Mode) -> Verdict:
        short, ranks, trouble = self._short, self._world.group.size, ""
        errors: dict[str, float] = {}
        try:
            errors = _errors(_found(workload, short.tokens, short.config(mode, short.chunk)), self._want)
        except Exception as error:  # whatever it raises is a result, and leaves the others theirs
            if ranks > 1:  # which wait for this rank
                raise
            trouble = one_line(error)
        finally:
            workload.clear()
        free()
        if trouble:
            return Verdict(mode.name, short.mode.name, ranks, "error", trouble)
        bounds = self._bounds
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / bounds[name])
        most, bound = errors[worst], bounds[worst]
        right = most <= bound
        detail = "" if right else f"{worst}: error {most:.1e}, bound {bound:.1e}"
        status, together = "ok" if right else "failed", errors[TOGETHER]
        return Verdict(mode.name, short.mode.name, ranks, status, detail, worst, most, bound, together)


def _worst(world: World, verdict: Verdict) -> Verdict:
    """Of all ranks', so that they go on alike."""
    found = [Verdict(**content) for content in world.gather(asdict(verdict))]
    return max(found, key=lambda verdict: (verdict.status != "ok", verdict.error))


def _in_float32(workload: Workload, tokens: int, config: StreamConfig) -> Found:
    """The same of the parameters, exactly widened, without kernels of ours."""
    types = {name: p.dtype for name, p in workload.model.named_parameters()}
    handles = make_handles(workload.device, Backend.CHUNKED)
    try:
        workload.model.float()
        return _found(replace(workload, handles=handles, precision="float32"), tokens, config)
    finally:
        for name, parameter in workload.model.named_parameters():
            parameter.data = parameter.data.to(types[name])
        free()


def _found(workload: Workload, tokens: int, config: StreamConfig) -> Found:
    workload.clear()
    loss = workload.gradients(tokens, config).loss
    found = workload.grads(tokens)
    workload.clear()
    return found | {LOSS: torch.tensor(loss, dtype=torch.float64, device=workload.device)}


def _on_host(found: Found) -> Found:
    """Takes one after another."""
    return {name: found.pop(name).cpu() for name in list(found)}


def _errors(got: Found, want: Found) -> dict[str, float]:
    """By name, and of all gradients TOGETHER; `want` may wait elsewhere."""
    errors, missed, whole = dict[str, float](), 0.0, 0.0
    for name, x in want.items():
        exact = x.to(got[name].device).double()
        errors[name] = relative_error(got[name], exact)
        if name != LOSS:
            size = float(exact.norm())
            missed, whole = missed + (errors[name] * size) ** 2, whole + size**2
    return errors | {TOGETHER: math.sqrt(missed / whole) if whole else 0.0}
