"""What a step is said to hold is what it must hold, by the formulas of `longtrain/streaming/README.md`."""

import gc
import weakref
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.sequence_parallel.prefix import Prefixes
from longtrain.streaming.waiting import Waiting
from longtrain_kernels.block_attention import BlockAttention
from tests.harness.streaming import LOCAL, SEQUENCES, StreamCase, problem_of, stream_gradients

BYTES, TOKENS, CHUNK = 8, 29, 5
HIDDEN = SEQUENCES * 12 * BYTES  # of the hidden states of a token
KEYS_AND_VALUES = SEQUENCES * 2 * 3 * 4 * BYTES  # of three heads
CARRY = SEQUENCES * (3 * 4 * 5 + 3 * 3 * (4 + 4 + 5)) * BYTES  # states of three heads, and the rows of a convolution


def watched(case: StreamCase) -> list[tuple[str, Waiting]]:
    seen: list[tuple[str, Waiting]] = []
    device = torch.device("cpu")
    stream_gradients(case, problem_of(case), Group(0, 1), LOCAL, device, lambda *found: seen.append(found))
    return seen


def test_what_waits_between_chunks() -> None:
    case = StreamCase(("simple_gla", "softmax"), 1, CHUNK, TOKENS)
    seen = watched(case)
    assert [phase for phase, _ in seen] == ["forward"] + ["layer 1"] * 6 + ["layer 0"] * 6
    parameters = sum(p.nbytes for p in problem_of(case).model.parameters())
    tokens, hidden = SEQUENCES * TOKENS * BYTES, TOKENS * HIDDEN
    # Keys and values of the last chunk are the backward pass's own; their room is there.
    # Every chunk but the first has carries.
    assert seen[0][1] == Waiting(tokens + hidden, 5 * CARRY, TOKENS * KEYS_AND_VALUES, 0, 0)
    for _, found in seen[1:7]:
        assert found.block_inputs == tokens + hidden  # gradients are where inputs were
        assert found.key_and_value_gradients == found.keys_and_values == TOKENS * KEYS_AND_VALUES
        assert found.carries == 5 * CARRY
        assert 0 < found.parameter_gradients < parameters
    for chunk, (_, found) in zip(reversed(range(6)), seen[7:], strict=True):
        assert found.block_inputs == (tokens + hidden) * chunk * CHUNK // TOKENS
        assert found.carries == max(chunk - 1, 0) * CARRY
        assert found.keys_and_values == found.key_and_value_gradients == 0
    assert seen[-1][1] == Waiting(0, 0, 0, 0, parameters)


@pytest.mark.parametrize(("block_layers", "waits"), [(1, 1), ("all", 0)])
def test_blocks_keep_their_inputs(block_layers: int | Literal["all"], waits: int) -> None:
    [(_, found), *_] = watched(StreamCase(("simple_gla", "softmax"), block_layers, CHUNK, TOKENS))
    assert found.block_inputs == TOKENS * (SEQUENCES * BYTES + waits * HIDDEN)


def test_one_chunk_is_on_its_way_from_the_host() -> None:
    """Tokens stay on the device; keys and values of the next chunk come while this one is computed."""
    seen = watched(StreamCase(("simple_gla", "softmax"), 1, CHUNK, TOKENS, offload="host"))
    tokens, ahead = SEQUENCES * BYTES, CHUNK * HIDDEN
    # The backward pass begins with the last chunk, of the tokens that are left.
    inputs = [TOKENS * tokens + TOKENS % CHUNK * HIDDEN]
    inputs += [TOKENS * tokens + (ahead if chunk else 0) for chunk in (5, 4, 3, 2, 1, 0)]
    inputs += [chunk * CHUNK * tokens + (ahead if chunk else 0) for chunk in (5, 4, 3, 2, 1, 0)]
    assert [found.block_inputs for _, found in seen] == inputs
    assert [found.carries for _, found in seen] == 7 * [0] + 4 * [CARRY] + 2 * [0]
    # Those of the last chunk, with all before it, and then those before the chunk that has been differentiated.
    assert [found.keys_and_values for _, found in seen] == [
        rows * KEYS_AND_VALUES for rows in (TOKENS, 25, 20, 15, 10, 0, 0, *6 * [0])
    ]
    assert {found.key_and_value_gradients for _, found in seen} == {0}


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("pattern", [("simple_gla", "softmax"), ("gated_delta", "softmax", "softmax")])
def test_nothing_waits_any_more_after_a_step(
    pattern: tuple[str, ...], offload: Literal["none", "host"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor until garbage is collected, which leaves out cycles through autograd's graph."""
    cuts: tuple[Literal[1, "all"], ...] = (1, "all")
    alive: weakref.WeakSet[Prefixes] = weakref.WeakSet()
    made_in_all: list[int] = []
    made = Prefixes.__init__

    def watch(prefixes: Prefixes, *arguments: Any, **named: Any) -> None:
        made(prefixes, *arguments, **named)
        made_in_all.append(id(prefixes))
        alive.add(prefixes)

    monkeypatch.setattr(Prefixes, "__init__", watch)
    gc.disable()
    try:
        for chunk_tokens in (CHUNK, 2 * CHUNK):
            for block_layers in cuts:
                watched(StreamCase(pattern, block_layers, chunk_tokens, TOKENS, offload=offload))
        left = len(alive)
    finally:
        gc.enable()
    assert made_in_all
    assert left == 0


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize("pattern", [("simple_gla", "softmax"), ("gla", "softmax", "softmax")])
def test_nothing_waits_after_a_step_that_fails(
    pattern: tuple[str, ...], offload: Literal["none", "host"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As memory ends: in attention, where a graph is there already."""
    case, attend = StreamCase(pattern, "all", CHUNK, TOKENS, offload=offload), BlockAttention.__call__
    problem_of(case)

    def fail(attention: BlockAttention, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise MemoryError
        return attend(attention, *arguments)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    before = tensors()
    monkeypatch.setattr(BlockAttention, "__call__", fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            watched(case)
    assert tensors() == before
