"""The handle keeps sums in full precision whatever precision surrounds it."""

import torch

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.diagonal_scan import DiagonalScan


def handle(length: int) -> ShardedSequence:
    shard = Shard(SequenceLayout(length, 1, ((0, 50),)), Group(0, 1), torch.device("cpu"))
    return ShardedSequence(shard, Algorithms(local.scan, local.attend))


def test_autocast_does_not_reach_states_and_partial_outputs() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 16).bfloat16() for _ in range(3))
    op = DiagonalScan(q, k, v, -torch.rand(1, 200, 2))
    plain = handle(200)
    want = (plain.scan(op), plain.attend(q, k, v))
    cast = handle(200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (cast.scan(op), cast.attend(q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(cast.carries_out[0], plain.carries_out[0])
    assert cast.carries_out[0].dtype == torch.float32
