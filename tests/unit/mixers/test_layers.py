"""What holds for every mixer: shapes, documents, time, precision, and what it hands to its operations."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.bench._sequence_parallel_groups import SilentGroup
from longtrain.comm.group import Group
from longtrain.core.contracts import Recurrence, SequenceMixer
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.backend import Backend
from tests.harness.mixers import MIXERS, RECURRENT

WIDTH, LENGTH = 12, 23


@dataclass
class Recorder(ShardedSequence):
    """A sequence on one rank that keeps the recurrences which it was given."""

    ops: list[Any] = field(default_factory=list)

    def scan(self, op: Recurrence) -> Tensor:
        """Keep it and run it."""
        self.ops.append(op)
        return super().scan(op)


def sequence(*starts: int, length: int = LENGTH, backend: Backend | None = None) -> Recorder:
    shard = Shard(SequenceLayout(length, 1, ((0, *starts),)), Group(0, 1), torch.device("cpu"))
    return Recorder(shard, Algorithms(local.scan, local.attend), backend=backend)


def mixer(name: str, layer: int = 1, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """One of three layers, as the builder makes it, with weights large enough to see every path."""
    config = ModelConfig(WIDTH, 3, (name,), 16, False, 1e-6, 0.5)
    block: Any = build_model(config, MIXERS, 7, seed=3, registry=Registry()).blocks[layer]
    return block.mixer.to(dtype)


def rows(length: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length)).to(dtype)


def test_every_mixer_is_tested() -> None:
    assert set(MIXERS) == set(Registry().names("mixers"))


@pytest.mark.parametrize("name", MIXERS)
def test_rows_keep_their_shape_and_every_parameter_gets_a_gradient(name: str) -> None:
    layer = mixer(name)
    output = layer(rows(), sequence(9))
    assert output.shape == (1, LENGTH, WIDTH)
    for parameter, grad in zip(
        layer.parameters(), torch.autograd.grad(output.square().sum(), list(layer.parameters())), strict=True
    ):
        assert grad.shape == parameter.shape
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("name", MIXERS)
def test_an_empty_shard_has_no_rows_and_stays_in_the_graph(name: str) -> None:
    shard = Shard(SequenceLayout(1, 2, ((0,),)), SilentGroup(1, 2), torch.device("cpu"))
    layer, x = mixer(name), rows(0).requires_grad_()
    output = layer(x, Recorder(shard, Algorithms(local.scan, local.attend)))
    assert output.shape == (1, 0, WIDTH)
    assert torch.autograd.grad(output.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_are_separate_documents(name: str) -> None:
    layer, x, cuts = mixer(name), rows(), (0, 1, 3, 9, LENGTH)
    packed = layer(x, sequence(*cuts[1:-1]))
    alone = [layer(x[:, a:b], sequence(length=b - a)) for a, b in itertools.pairwise(cuts)]
    # float64 rounding of sums over at most 23 tokens, in another order
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_another_document_changes_nothing_to_the_bit(name: str) -> None:
    layer, results = mixer(name, dtype=torch.float32), []
    for other in (0.0, 1.0):
        x = rows(dtype=torch.float32)
        x[:, :9] += other
        x.requires_grad_()
        output = layer(x, sequence(9))[:, 9:]
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][:, :9].any()


@pytest.mark.parametrize("name", MIXERS)
def test_a_token_sees_no_later_one(name: str) -> None:
    layer, x, other = mixer(name), rows(), rows()
    other[:, 15:] += 1
    before, after = (layer(part, sequence()) for part in (x, other))
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("name", RECURRENT)
def test_the_operation_runs_on_the_sequences_backend(name: str) -> None:
    layer, outputs = mixer(name), []
    for backend in (Backend.REFERENCE, Backend.CHUNKED):
        handle = sequence(9, backend=backend)
        outputs.append(layer(rows(), handle))
        assert [op.backend for op in handle.ops] == [backend]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)  # float64 rounding of 23 steps


@pytest.mark.parametrize("name", RECURRENT)
def test_decays_stay_float32_where_activations_are_bfloat16(name: str) -> None:
    layer, handle = mixer(name, dtype=torch.float32), sequence(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(rows(dtype=torch.float32), handle)
    (op,) = handle.ops
    assert op.log_decay is None or op.log_decay.dtype == torch.float32
    assert output.dtype == op.queries.dtype == op.keys.dtype == op.values.dtype == torch.bfloat16
    exact = mixer(name)(rows(), sequence(9))
    # bfloat16 rounds to 2^-9, a dozen times in a row; in the median, since a norm enlarges the errors of small rows
    error = (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 12 * 2**-9


@pytest.mark.parametrize("name", RECURRENT)
def test_operations_count_the_state_and_the_convolution(name: str) -> None:
    layer, config = mixer(name), RECURRENT[name]
    state = (6 if "delta" in name or name == "kda" else 4) * config.state_size
    channels = 2 * config.num_heads * config.key_dim + config.channels
    convolution = 2 * channels * config.conv_width if hasattr(config, "conv_width") else 0
    assert layer.flops_per_token(1e6) == state + convolution
