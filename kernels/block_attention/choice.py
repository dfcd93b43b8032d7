"""Which kernel computes block attention: the one that was asked for, or the fastest that this machine has."""

import importlib.util
import logging
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor
from torch.nn import attention

from longtrain_kernels.block_attention.fused import Cudnn, Flash, FlashOnCpu
from longtrain_kernels.block_attention.kernel import Kernel, Mask, Unsupported
from longtrain_kernels.block_attention.plain import Plain

AUTO = "auto"
NAMES = (AUTO, "cudnn", "flash", "plain")
_PLAIN, _CUDNN, _FLASH, _FLASH_ON_CPU = Plain(), Cudnn(), Flash(), FlashOnCpu()
# What is timed: large enough to fill a GPU, as small as that allows.
_TOKENS, _HEADS, _REPEATS = 4096, 16, 5

logger = logging.getLogger(__name__)


def choose_kernel(asked: str, q: Tensor, k: Tensor, v: Tensor, window: int | None, recurring: bool) -> Kernel:
    """The kernel for these operands; `recurring` says that blocks of these shapes come back step after step.

    What was asked for need not have windows: layers with one then get what they would without asking.

    Raises Unsupported where the one that was asked for cannot compute them.
    """
    if q.device.type == "cuda":
        _activate_newest_flash()
    flash: Kernel = _FLASH if q.device.type == "cuda" else _FLASH_ON_CPU
    kernel = {"cudnn": _CUDNN, "flash": flash, "plain": _PLAIN}.get(asked)
    if kernel is None and asked != AUTO:
        raise Unsupported(f"{asked!r} is no kernel of block attention: choose {', '.join(NAMES)}")
    if kernel is None or (window is not None and not kernel.windows):
        return _automatic(q, k, v, window, recurring)
    problem = kernel.refusal(q, k, v)
    if problem is not None:
        raise Unsupported(f"{asked} is impossible here, for {problem}; use auto")
    return kernel


def _automatic(q: Tensor, k: Tensor, v: Tensor, window: int | None, recurring: bool) -> Kernel:
    if q.device.type != "cuda":
        return _PLAIN if window is not None or _FLASH_ON_CPU.refusal(q, k, v) else _FLASH_ON_CPU
    able: list[Kernel] = [kernel for kernel in (_CUDNN, _FLASH) if kernel.refusal(q, k, v) is None]
    if window is not None or not recurring:
        able = [kernel for kernel in able if kernel.packs]
    if len(able) == 2:
        return _fastest(q.device, q.dtype, q.shape[-1], q.shape[2] // k.shape[2])
    kernel = able[0] if able else _PLAIN
    _tell(f"{kernel.name} for {_kind(q)}, {'packed or with a window' if able else 'which no other computes'}")
    return kernel


@lru_cache
def _fastest(device: torch.device, dtype: torch.dtype, width: int, group: int) -> Kernel:
    """Measured once: forward and backward of a causal square. One that fails is not considered."""
    heads = max(1, _HEADS // group)
    generator = torch.Generator(device).manual_seed(0)  # training's own random numbers go on as if nothing had been
    q, k = (
        torch.randn(1, _TOKENS, n, width, device=device, dtype=dtype, generator=generator)
        for n in (heads * group, heads)
    )

    def step(kernel: Kernel) -> None:
        output, lse = kernel.forward(q, k, k, Mask(True), width**-0.5)
        kernel.backward(output, q, k, k, output, lse, Mask(True), width**-0.5)

    times: dict[Kernel, float] = {}
    for kernel in (_CUDNN, _FLASH):
        try:
            times[kernel] = _seconds(partial(step, kernel), device)
        except RuntimeError as error:
            logger.warning("block attention: %s fails: %s", kernel.name, str(error).strip().splitlines()[0])
    best: Kernel = min(times, key=times.__getitem__, default=_PLAIN)
    measured = ", ".join(f"{kernel.name} {seconds * 1e3:.2f} ms" for kernel, seconds in times.items())
    _tell(f"{best.name} for {_kind(q)}: {_TOKENS} tokens forward and backward took {measured}")
    return best


def _kind(q: Tensor) -> str:
    return f"{str(q.dtype).removeprefix('torch.')} heads of {q.shape[-1]}"


@lru_cache
def _tell(choice: str) -> None:
    """Once."""
    logger.info("block attention: %s", choice)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The least of some repetitions, after one that plans."""
    times = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


@cache
def _activate_newest_flash() -> None:
    """FlashAttention 4 or 3 under PyTorch's operation, where it is installed and nobody has chosen another."""
    if attention.current_flash_attention_impl() is not None:
        return
    for version, module in (("FA4", "flash_attn.cute"), ("FA3", "flash_attn_interface")):
        package = module.partition(".")[0]
        if version in attention.list_flash_attention_impls() and importlib.util.find_spec(package):
            try:
                attention.activate_flash_attention_impl(version)
            except (ImportError, RuntimeError) as error:
                logger.info("%s is installed, but PyTorch cannot use it: %s", version, error)
                continue
            return
