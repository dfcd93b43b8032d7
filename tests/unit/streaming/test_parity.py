"""A streamed step has the loss and the gradients of plain backpropagation, however layers and time are cut."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from longtrain.comm.group import Group
from longtrain.streaming.blocks import cut
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.sums import GradientSums
from tests.harness.mixers import MIXERS
from tests.harness.streaming import (
    LOCAL,
    TOLERANCE,
    StreamCase,
    problem_of,
    stream_error,
    stream_gradients,
)

ALONE = Group(0, 1)
Blocks = int | Literal["recurrent", "all"]
BLOCKS: list[Blocks] = [1, 2, 3, "recurrent", "all"]


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("block_layers", [1, "all"])
def test_every_mixer(name: str, block_layers: Blocks) -> None:
    for length, chunk in ((13, 1), (13, 2), (29, 11), (29, 29), (29, 64), (1, 1)):
        case = StreamCase((name, name), block_layers, chunk, length)
        assert stream_error(case, ALONE) < TOLERANCE, case


@pytest.mark.parametrize("block_layers", BLOCKS)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 28, None])
@pytest.mark.parametrize("packed", [False, True, "short"], ids=["whole", "packed", "short"])
def test_a_hybrid_in_every_cut(block_layers: Blocks, chunk_tokens: int | None, packed: bool | Literal["short"]) -> None:
    case = StreamCase(block_layers=block_layers, chunk_tokens=chunk_tokens, packed=packed)
    assert stream_error(case, ALONE) < TOLERANCE


@pytest.mark.parametrize("block_layers", [*BLOCKS, 0])
def test_tied_embeddings_and_gradients_summed_over_batches(block_layers: Blocks) -> None:
    chunk = None if block_layers == 0 else 7
    for micro_batch_size in (1, 2):
        case = StreamCase(block_layers=block_layers, chunk_tokens=chunk, tied=True, micro_batch_size=micro_batch_size)
        assert stream_error(case, ALONE) < TOLERANCE


@pytest.mark.parametrize("block_layers", BLOCKS)
def test_what_waits_on_the_host_comes_back(block_layers: Blocks) -> None:
    for chunk_tokens in (1, 5, 28):
        case = StreamCase(block_layers=block_layers, chunk_tokens=chunk_tokens, offload="host", tied=True)
        assert stream_error(case, ALONE) < TOLERANCE
        assert stream_error(replace(case, packed="short"), ALONE) < TOLERANCE


def test_sums_do_not_change_what_they_are_given() -> None:
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    sums = GradientSums([first, second])
    for _ in range(2):
        sums.add([first, second], [*torch.autograd.grad((first + second).sum(), [first, second])])
    sums.deliver()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.tolist() == second.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("block_layers", BLOCKS)
@pytest.mark.parametrize(
    "frozen",
    [("embedding",), ("blocks",), ("blocks.0", "blocks.1", "embedding"), ("embedding", "blocks", "norm"), ("head",)],
    ids=["embedding", "layers", "below", "all-but-head", "head"],
)
def test_frozen_parameters(block_layers: Blocks, frozen: tuple[str, ...]) -> None:
    assert stream_error(StreamCase(block_layers=block_layers, frozen=frozen), ALONE) < TOLERANCE


def test_logits_of_the_whole_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    case, largest = StreamCase(chunk_tokens=None), 0
    exact = problem_of(case)
    linear = nn.Linear.forward

    def watch(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        if module is exact.model.head:
            largest = max(largest, len(x))
        return linear(module, x)

    monkeypatch.setattr(nn.Linear, "forward", watch)
    stream_gradients(case, exact, ALONE, LOCAL, torch.device("cpu"))
    assert largest == 7


@pytest.mark.parametrize(
    ("block_layers", "want"),
    [
        (0, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (2, [(0, 2), (2, 4), (4, 5)]),
        (9, [(0, 5)]),
        ("all", [(0, 5)]),
        ("recurrent", [(0, 2), (2, 3), (3, 5)]),
    ],
)
def test_blocks(block_layers: Blocks, want: list[tuple[int, int]]) -> None:
    found = cut(StreamConfig(block_layers, None, 1, "none"), [False, False, True, True, False])
    assert [(layers.start, layers.stop) for layers in found] == want
