"""Which heads the ranks get, whatever the numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    got = HeadShares(shard, key_heads, value_heads).of_keys(keys)
    assert torch.equal(got, keys.repeat_interleave(value_heads // key_heads, dim=2))
