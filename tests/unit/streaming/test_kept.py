"""What a step is said to hold is what it must hold, by the formulas of `longtrain/streaming/README.md`."""

import pytest
import torch

from longtrain.comm.group import Group
from longtrain.streaming.kept import Held
from tests.harness.streaming import LOCAL, SEQUENCES, StreamCase, problem_of, stream_gradients

BYTES, TOKENS, CHUNK = 8, 29, 5
HIDDEN = SEQUENCES * 12 * BYTES  # of the hidden states of a token
KEYS_AND_VALUES = SEQUENCES * 2 * 3 * 4 * BYTES  # of three heads
CARRY = SEQUENCES * (3 * 4 * 5 + 3 * 3 * (4 + 4 + 5)) * BYTES  # states of three heads, and the rows of a convolution


def watched(case: StreamCase) -> list[tuple[str, Held]]:
    seen: list[tuple[str, Held]] = []
    device = torch.device("cpu")
    stream_gradients(case, problem_of(case), Group(0, 1), LOCAL, device, lambda *found: seen.append(found))
    return seen


def test_what_waits_between_chunks() -> None:
    case = StreamCase(("simple_gla", "softmax"), 1, CHUNK, TOKENS)
    seen = watched(case)
    assert [phase for phase, _ in seen] == ["forward"] + ["layers 1-1"] * 6 + ["layers 0-0"] * 6
    parameters = sum(p.nbytes for p in problem_of(case).model.parameters())
    tokens, hidden = SEQUENCES * TOKENS * BYTES, TOKENS * HIDDEN
    # Keys and values of the last chunk are the backward pass's own; their room is there.
    # Every chunk but the first has carries.
    assert seen[0][1] == Held(tokens + hidden, 5 * CARRY, TOKENS * KEYS_AND_VALUES, 0, 0)
    for _, held in seen[1:7]:
        assert held.block_inputs == tokens + hidden  # gradients are where inputs were
        assert held.key_and_value_gradients == held.keys_and_values == TOKENS * KEYS_AND_VALUES
        assert held.carries == 5 * CARRY
        assert 0 < held.parameter_gradients < parameters
    for chunk, (_, held) in zip(reversed(range(6)), seen[7:], strict=True):
        assert held.block_inputs == (tokens + hidden) * chunk * CHUNK // TOKENS
        assert held.carries == max(chunk - 1, 0) * CARRY
        assert held.keys_and_values == held.key_and_value_gradients == 0
    assert seen[-1][1] == Held(0, 0, 0, 0, parameters)


@pytest.mark.parametrize(("block_layers", "waits"), [(1, 1), ("all", 0)])
def test_blocks_keep_their_inputs(block_layers: int, waits: int) -> None:
    [(_, held), *_] = watched(StreamCase(("simple_gla", "softmax"), block_layers, CHUNK, TOKENS))
    assert held.block_inputs == TOKENS * (SEQUENCES * BYTES + waits * HIDDEN)


def test_nothing_waits_on_the_device_that_is_at_the_host() -> None:
    for _, held in watched(StreamCase(("simple_gla", "softmax"), 1, CHUNK, TOKENS, offload="host")):
        ahead = CHUNK * (HIDDEN + 2 * SEQUENCES * BYTES)  # tokens stay
        assert held.block_inputs <= TOKENS * SEQUENCES * BYTES + ahead
