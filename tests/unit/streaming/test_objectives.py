"""Every objective, streamed, has the loss and the gradients of its definition on logits of the whole batch."""

import pytest
import torch

from longtrain.comm.group import Group
from tests.harness.objectives import OBJECTIVES
from tests.harness.streaming import (
    LOCAL,
    TOLERANCE,
    StreamCase,
    count_deliveries,
    log_prob_error,
    problem_of,
    stream_error,
    stream_gradients,
)
from tests.unit.streaming.test_parity import Blocks

ALONE = Group(0, 1)
EXAMPLES = sorted(OBJECTIVES.keys() - {"next_token"})


@pytest.mark.parametrize("objective", EXAMPLES)
@pytest.mark.parametrize(("block_layers", "chunk_tokens"), [(1, 11), (2, None), ("all", 2), (0, None)])
def test_in_cuts_over_layers_and_time(objective: str, block_layers: Blocks, chunk_tokens: int | None) -> None:
    """What is cut below the head is the same for all objectives: see `test_parity`."""
    case = StreamCase(block_layers=block_layers, chunk_tokens=chunk_tokens, objective=objective)
    assert stream_error(case, ALONE) < TOLERANCE


@pytest.mark.parametrize("objective", EXAMPLES)
def test_batches_ties_and_frozen_parameters(objective: str) -> None:
    for micro_batch_size in (1, 2):
        case = StreamCase(chunk_tokens=7, tied=True, micro_batch_size=micro_batch_size, objective=objective)
        assert stream_error(case, ALONE) < TOLERANCE, case
    for frozen in (("blocks.0", "blocks.1", "embedding"), ("head",)):
        case = StreamCase(block_layers=2, frozen=frozen, objective=objective)
        assert stream_error(case, ALONE) < TOLERANCE, case


@pytest.mark.parametrize("objective", EXAMPLES)
def test_a_sequence_of_one_token(objective: str) -> None:
    assert stream_error(StreamCase(length=1, objective=objective), ALONE) < TOLERANCE


@pytest.mark.parametrize("objective", EXAMPLES)
def test_every_parameter_is_handed_over_once_a_step(objective: str) -> None:
    case = StreamCase(block_layers=2, chunk_tokens=3, tied=True, micro_batch_size=1, objective=objective)
    exact = problem_of(case)
    with count_deliveries(exact) as counts:
        stream_gradients(case, exact, ALONE, LOCAL, torch.device("cpu"))
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(("block_layers", "chunk_tokens"), [(1, 11), (2, None), ("all", 2), (0, None)])
def test_log_probabilities_without_gradients(block_layers: Blocks, chunk_tokens: int | None) -> None:
    assert log_prob_error(StreamCase(block_layers=block_layers, chunk_tokens=chunk_tokens), ALONE) < TOLERANCE
