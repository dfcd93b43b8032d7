"""Which heads the ranks get, whatever the numbers."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout
from longtrain.sequence_parallel.heads import HeadShares, split_evenly
from longtrain.sequence_parallel.shard import Shard


@given(count=st.integers(0, 40), parts=st.integers(1, 9))
def test_ranges_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    ranges = split_evenly(count, parts)
    assert [i for part in ranges for i in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("key_heads", "value_heads"), [(3, 9), (1, 2), (4, 4)])
def test_every_value_head_comes_with_its_key_head(key_heads: int, value_heads: int) -> None:
    # One rank, whose exchange moves nothing: it reads what the others would.
    shard = Shard(SequenceLayout(5, 1, ((0,),)), Group(0, 1), torch.device("cpu"))
    keys = torch.randn(1, 5, key_heads, 2)
    got = HeadShares(shard.team, key_heads, value_heads).of_keys(keys)
    assert torch.equal(got, keys)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_key_heads_come_once_where_they_serve_equally(rank: int) -> None:
    class Gathering(Group):
        """Every rank has the same rows."""

        def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
            return [parts[self.rank]] * self.size

    # Of 9 value heads three read a key head: shares of 3 read one each, shares of 4 and 5 read two unequally.
    shard = Shard(SequenceLayout(3, 3, ((0,),)), Gathering(rank, 3), torch.device("cpu"))
    keys = torch.arange(3.0).view(1, 1, 3, 1)
    assert HeadShares(shard.team, 3, 9).of_keys(keys)[0, 0, :, 0].tolist() == [float(rank)]
    uneven = Shard(SequenceLayout(2, 2, ((0,),)), Gathering(min(rank, 1), 2), torch.device("cpu"))
    got = HeadShares(uneven.team, 3, 9).of_keys(keys)[0, 0, :, 0].tolist()
    assert got == ([0, 0, 0, 1] if rank == 0 else [1, 1, 2, 2, 2])
