"""What `auto` sees of a model, and what it chooses for machines that differ."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from longtrain.comm.group import Group
from longtrain.comm.links import Link, Links, fitted
from longtrain.comm.mesh import build_mesh
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.automatic import Batch, demand_of, name_algorithms
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.choice import choose
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.sequence_parallel.cost import AttendShape, Machine, ScanShape
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from tests.harness.mixers import MIXERS

CPU = torch.device("cpu")
PATTERN = ("gated_delta", "sliding_window", "softmax", "gla", "retention")
FAST = Links(gather=Link(4e-5, 3e11), exchange=Link(4e-5, 3e11), send=Link(1.5e-4, 3.5e11))
SLOW = Links(gather=Link(2e-5, 1e10), exchange=Link(2e-5, 1e10), send=Link(1e-5, 1e10))
NODE = Machine(ranks=4, node_size=4, links=FAST, attention_flops=5e14, zigzag=True)
ATTEND = AttendShape(batch=1, tokens=2**15, heads=16, key_heads=16, key=128, value=128, itemsize=2)
SCAN = ScanShape(batch=1, tokens=2**14, heads=16, state=128 * 128, transition=128 * 128, row_bytes=4 * 16 * 128 * 2)


def test_demand_is_what_the_layers_ask_for() -> None:
    config = ModelConfig(12, len(PATTERN), PATTERN, 16, False, 1e-6, 0.5)
    model = build_model(config, MIXERS, 11, seed=3, registry=Registry())
    demand = demand_of(model, Batch(sequences=3, length=41), 4, CPU, nullcontext())
    assert [(s.heads, s.state, s.transition) for s in demand.scans] == [(2, 12, 16), (2, 12, 4), (2, 12, 1)]
    assert {(s.batch, s.tokens) for s in demand.scans} == {(3, 11)}
    # float32 rows of queries and keys (4 a head), values and outputs (3), beta and the decay
    assert demand.scans[0].row_bytes == 4 * 2 * (4 + 4 + 3 + 3 + 1 + 1)
    assert demand.attends == [AttendShape(3, 11, heads=9, key_heads=3, key=4, value=4, itemsize=4)]


def test_large_blocks_hide_a_ring_and_short_ones_do_not() -> None:
    registry = Registry()
    estimates = choose("attend", [ATTEND], NODE, registry).estimates
    assert set(estimates) == set(registry.names("sequence_parallel.attend"))
    assert choose("attend", [ATTEND], NODE, registry).name == "ring"
    short = replace(ATTEND, tokens=2**10)
    assert choose("attend", [short], NODE, registry).name in ("all_gather", "ulysses", "usp")
    grouped = replace(ATTEND, heads=32, key_heads=2)  # keys and values are few, queries many
    ranked = choose("attend", [grouped], replace(NODE, links=SLOW), registry).estimates
    assert ranked["ring"] < ranked["token_ring"]
    assert ranked["ring"] < ranked["ulysses"]


def test_many_ranks_over_a_slow_link_want_a_pipeline() -> None:
    registry = Registry()
    far = replace(NODE, ranks=64, node_size=8, links=SLOW, zigzag=False)
    assert choose("scan", [SCAN], far, registry).name == "pipeline"
    assert choose("scan", [SCAN], replace(NODE, zigzag=False), registry).name == "all_gather"
    estimates = choose("scan", [SCAN, SCAN], far, registry).estimates
    assert estimates["pipeline"] < estimates["ring"]
    assert estimates["pipeline"] == pytest.approx(2 * choose("scan", [SCAN], far, registry).estimates["pipeline"])


def test_the_choice_says_why() -> None:
    choice = choose("scan", [SCAN], NODE, Registry())
    assert str(choice).startswith("all_gather (estimated ms of forward and backward, all layers: all_gather 0.")
    assert all(f"{name} " in str(choice) for name in Registry().names("sequence_parallel.scan"))


def test_a_small_transfer_that_took_longer_than_a_large_one_is_noise() -> None:
    assert fitted(little=3e-3, much=2e-3, nbytes=4e6) == Link(0.0, pytest.approx(2e9))
    assert fitted(little=1e-3, much=3e-3, nbytes=4e6) == Link(1e-3, pytest.approx(2e9))
    assert fitted(3e-3, 5e-3, 2_000_000, steps=3) == Link(pytest.approx(1e-3), pytest.approx(1e9))


def test_a_kernel_that_cannot_compute_a_layer_is_refused() -> None:
    shard = Shard(SequenceLayout(5, 1, ((0,),)), Group(0, 1), CPU)
    sequence = ShardedSequence(shard, Algorithms(local.scan, local.attend, "cudnn"))
    q = torch.zeros(1, 5, 2, 8)
    with pytest.raises(Refused, match=r"^sequence_parallel\.block_attention=cudnn is impossible here, .*; use auto$"):
        sequence.attend(q, q, q)


def test_one_rank_measures_nothing() -> None:
    config = SequenceParallelConfig(
        size=1, scan="auto", attend="ring", layout="contiguous", block_attention="auto", copy_engines=True
    )
    model_config = ModelConfig(12, 1, ("gla",), 16, False, 1e-6, 0.5)
    model = build_model(model_config, MIXERS, 11, seed=3, registry=Registry())
    named, choices = name_algorithms(config, model, Batch(1, 5), build_mesh(1), CPU, nullcontext(), Registry())
    assert (named.scan, named.attend, choices) == ("all_gather", "ring", {})
