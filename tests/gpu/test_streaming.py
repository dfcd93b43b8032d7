"""Streaming on a GPU: exact in float64, as exact as plain backpropagation in bfloat16, and flat in memory."""

import warnings
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Sequence
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.core.targets import Targets
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.model.model import Model
from longtrain.objectives import next_token
from longtrain.sequence_parallel import lift as lift_module
from longtrain.sequence_parallel.handle import Handles
from longtrain.sequence_parallel.lift import Lift
from longtrain.streaming.blocks import LayerBlock
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.stream import Stream
from longtrain_kernels.backend import Backend
from tests.harness.mixers import WIDE
from tests.harness.streaming import LOCAL, TOLERANCE, StreamCase, stream_error

pytestmark = pytest.mark.gpu

VOCABULARY = 128
OBJECTIVE = next_token.Objective(next_token.Config("next_token"))
Offload = Literal["none", "host"]


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("block_layers", [1, 2, "recurrent", "all"])
def test_gradients_in_float64(block_layers: int | Literal["recurrent", "all"], offload: Offload) -> None:
    case = StreamCase(block_layers=block_layers, chunk_tokens=5, tied=True, offload=offload)
    assert stream_error(case, Group(0, 1), device="cuda") < TOLERANCE


@pytest.mark.parametrize("late", ["copies", "layers"])
@pytest.mark.parametrize("block_layers", [1, "recurrent", "all"])
def test_copies_are_waited_for(
    block_layers: int | Literal["recurrent", "all"], late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that take far longer than layers, and layers that take far longer than copies."""
    cycles = 1_000_000  # half a millisecond
    copy, forward = lift_module._copy, LayerBlock.__call__

    def slow_copy(to: Tensor, source: Tensor) -> None:
        torch.cuda._sleep(cycles)
        copy(to, source)

    def slow_forward(block: LayerBlock, x: Tensor, sequence: Sequence) -> Tensor:
        torch.cuda._sleep(cycles)
        output = forward(block, x, sequence)
        torch.cuda._sleep(cycles)
        if output.requires_grad:
            output.register_hook(lambda grad: torch.cuda._sleep(cycles))
        return output

    if late == "copies":
        monkeypatch.setattr(lift_module, "_copy", slow_copy)
    else:
        monkeypatch.setattr(LayerBlock, "__call__", slow_forward)
    monkeypatch.setattr(lift_module, "LEAVING_BYTES", 0)
    for packed in (False, True):
        case = StreamCase(block_layers=block_layers, chunk_tokens=5, packed=packed, offload="host")
        assert stream_error(case, Group(0, 1), device="cuda") < TOLERANCE


def test_the_host_waits_for_the_device_before_the_first_chunk_alone() -> None:
    """Where it looks which tokens have a label, once for each of four chunks."""
    model = wide_model(("softmax", "gated_delta", "gla", "sliding_window", "softmax"))
    tokens = torch.randint(VOCABULARY, (1, 3001), device="cuda")
    config = StreamConfig("recurrent", 1000, 700, "host")
    streamed(model, tokens, config)  # compiles kernels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        streamed(model, tokens, config)
        torch.cuda.set_sync_debug_mode("default")
    places = [Path(found.filename) for found in caught if "synchronizing" in str(found.message)]
    asked_for = (Path(__file__), Path(torch.cuda.__file__))  # by `streamed`, before and behind the step
    assert [place.name for place in places if place not in asked_for] == 4 * ["head.py"]


def streamed(model: Model, tokens: Tensor, config: StreamConfig) -> tuple[float, list[Tensor], int]:
    """Mean loss, gradients, and bytes at the peak beyond what was there before."""
    device = tokens.device
    handles = Handles(LOCAL, Group(0, 1), device, Backend.TRITON)
    stream = Stream(model, handles, OBJECTIVE, config, partial(torch.autocast, "cuda", dtype=torch.bfloat16))
    layout = SequenceLayout(tokens.shape[1], 1, ((0, tokens.shape[1] // 3),), config.chunk_tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    targets = Targets(tokens.roll(-1, 1))
    count = OBJECTIVE.count(targets)
    [loss] = stream.backward(tokens, targets, layout, count) / count
    stream.deliver()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.item(), grads, torch.cuda.max_memory_allocated() - before


def wide_model(pattern: tuple[str, ...]) -> Model:
    """Random, of heads that Triton kernels compute."""
    config = ModelConfig(192, len(pattern), pattern, 256, False, 1e-6, 0.07)
    return build_model(config, WIDE, VOCABULARY, seed=3, registry=Registry()).cuda()


@pytest.mark.parametrize("mixer", sorted(WIDE))
def test_gradients_in_bfloat16(mixer: str) -> None:
    model = wide_model((mixer, mixer))
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, 5001), device="cuda")
    want_loss, want, _ = streamed(model, tokens, StreamConfig("all", None, 4096, "none"))
    for config in (StreamConfig(1, 1000, 700, "host"), StreamConfig("all", 777, 4096, "none")):
        loss, grads, _ = streamed(model, tokens, config)
        assert loss == pytest.approx(want_loss, rel=1e-4)
        for got, exact in zip(grads, want, strict=True):
            # Both round to bfloat16 at other places; gradients of decay rates, a handful of numbers, scatter most.
            assert (got - exact).norm() < 0.1 * exact.norm()


def test_waits_for_the_host_are_seen() -> None:
    """A copy of 1 GiB takes 20 ms at least; of nothing, nothing is waited for."""
    lift = Lift(torch.device("cuda"))
    there = lift.down(torch.zeros(2**28, device="cuda"))
    lift.settle()
    assert lift.waited() > 0.005
    assert lift.waited() == 0.0
    coming = lift.up(there)
    torch.cuda.synchronize()
    coming.wait()
    assert lift.waited() < 0.001


def test_memory_of_recurrent_layers_does_not_grow_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carries wait on the host: those of 112 chunks, 24 MB, are more than what the bound has to spare."""
    monkeypatch.setattr(lift_module, "LEAVING_BYTES", 0)
    model = wide_model(("gated_delta", "gla", "simple_gla"))
    peaks = []
    for length in (2**15, 2**18):
        tokens = torch.randint(VOCABULARY, (1, length), device="cuda")
        # The first call compiles kernels and fills caches.
        for _ in range(2):
            *_, peak = streamed(model, tokens, StreamConfig("all", 2**11, 4096, "host"))
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 40 * (2**18 - 2**15) + 2**22  # tokens and labels, which are int64
