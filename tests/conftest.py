"""Fixtures of all tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.harness.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: gloo processes that live as long as the test session; see tests/harness/ranks.py."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield get
    for pool in pools.values():
        pool.kill()
