"""Fixtures of all tests."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.harness.ranks import RankPool
from tests.harness.ray_head import RayHead, start_ray_head

os.environ["RAY_AUTH_MODE"] = "token"  # read by Ray when it is first imported, which collecting tests does
if not torch.cuda.is_available():  # likewise; kernels are then run by Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(world_size)`: gloo processes that live as long as the test session; see tests/harness/ranks.py."""
    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield get
    for pool in pools.values():
        pool.kill()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The one Ray cluster of the test session; the session is let in by its token."""
    head = start_ray_head()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in head.environment.items():
            patch.setenv(name, value)
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        try:
            yield head
        finally:
            head.stop()
