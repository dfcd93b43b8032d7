"""A step cut over layers, time and ranks at once has the loss and the gradients of plain backpropagation."""

from collections.abc import Callable
from typing import Any, Literal

import pytest

from longtrain.comm.mesh import build_mesh
from longtrain.core.kinds import LayoutKind
from tests.distributed.test_parity import ATTENDS, LAYOUTS, SCANS, algorithms
from tests.harness.mixers import RECURRENT
from tests.harness.ranks import RankPool
from tests.harness.streaming import TOLERANCE, StreamCase, log_prob_error, stream_error

OFFLOADS: tuple[Literal["host", "none"], ...] = ("host", "none", "host")


def wrong(cases: list[StreamCase], sequence_size: int, device: str = "cpu") -> dict[StreamCase, float]:
    """The cases whose error on this rank is beyond the tolerance."""
    group = build_mesh(sequence_size).sequence
    errors = {case: stream_error(case, group, algorithms(case.scan, case.attend), device) for case in cases}
    return {case: error for case, error in errors.items() if not error < TOLERANCE}


def check(pool: RankPool, cases: list[StreamCase]) -> None:
    """On every rank; the processes run one case after another."""
    for rank, found in enumerate(pool.run(wrong, cases, pool.world_size, timeout=240)):
        assert not found, f"rank {rank}: {found}"


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_every_recurrent_mixer(rank_pool: Callable[[int], RankPool], name: str) -> None:
    check(rank_pool(2), [StreamCase((name,), 1, 11, scan=scan, layout=cut) for scan in SCANS for cut in LAYOUTS])


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_every_recurrent_mixer_in_blocks_on_four_ranks(rank_pool: Callable[[int], RankPool], name: str) -> None:
    """Also in one document, and in chunks that leave ranks empty. The scans take turns."""
    turn = sorted(RECURRENT).index(name)
    one, other = (SCANS[i % len(SCANS)] for i in (turn, turn + 1))
    cases = [
        StreamCase((name,) * 3, "all", 11, 17, packed=False, scan=one, layout="contiguous"),
        StreamCase((name,) * 3, 2, 2, 17, scan=other, layout="zigzag"),
    ]
    check(rank_pool(4), cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_one_token_and_one_document(rank_pool: Callable[[int], RankPool], layout: LayoutKind) -> None:
    cases = [
        StreamCase(block_layers="all", chunk_tokens=1, length=7, layout=layout),
        StreamCase(block_layers=2, chunk_tokens=1, length=7, packed=False, layout=layout, offload="host"),
        *(
            StreamCase(block_layers="recurrent", chunk_tokens=11, packed=False, attend=attend, layout=layout)
            for attend in ATTENDS
        ),
    ]
    check(rank_pool(2), cases)


@pytest.mark.parametrize("offload", ["none", "host"])
@pytest.mark.parametrize(
    "frozen",
    [("embedding",), ("blocks",), ("blocks.0", "blocks.1", "embedding"), ("blocks.1", "blocks.3"), ("head",)],
    ids=["embedding", "layers", "below", "between", "head"],
)
def test_frozen_parameters(
    rank_pool: Callable[[int], RankPool], frozen: tuple[str, ...], offload: Literal["none", "host"]
) -> None:
    """Also with gradients summed over batches."""
    cuts: list[tuple[Any, int]] = [(1, 2), (2, 2), ("all", 3)]
    cases = [
        StreamCase(block_layers=block, chunk_tokens=11, frozen=frozen, micro_batch_size=m, offload=offload)
        for block, m in cuts
    ]
    check(rank_pool(2), cases)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attend", ATTENDS)
def test_every_attention(rank_pool: Callable[[int], RankPool], attend: str, layout: LayoutKind, ranks: int) -> None:
    """Chunks of 2 tokens leave ranks empty; keys and values are made again for blocks that are not the last.

    The second chunk of 28 + 1 tokens has none for some ranks, whose tokens are all in the first one.
    """
    cuts: list[tuple[Any, int]] = [(1, 28), ("recurrent", 5), ("all", 28)] if ranks == 2 else [("all", 2)]
    cases = [
        StreamCase(block_layers=block, chunk_tokens=chunk, attend=attend, layout=layout, offload=offload)
        for (block, chunk), offload in zip(cuts, OFFLOADS, strict=False)
    ]
    short = StreamCase(block_layers=2, chunk_tokens=7, packed="short", attend=attend, layout=layout, offload="host")
    check(rank_pool(ranks), [*cases, short])


@pytest.mark.parametrize("scan", SCANS)
def test_every_scan_in_blocks(rank_pool: Callable[[int], RankPool], scan: str) -> None:
    cases = [
        StreamCase(block_layers=2, chunk_tokens=7, scan=scan, layout=layout, tied=True, micro_batch_size=2)
        for layout in LAYOUTS
    ]
    check(rank_pool(3), [*cases, StreamCase(block_layers=0, chunk_tokens=None, scan=scan)])


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_objectives_of_examples(rank_pool: Callable[[int], RankPool], objective: str) -> None:
    """Chunks of 2 tokens leave ranks empty, which still take part in the sums."""
    cuts = [(1, 11, "contiguous"), ("recurrent", 5, "zigzag"), ("all", 2, "contiguous"), (0, None, "zigzag")]
    cases = [
        StreamCase(block_layers=b, chunk_tokens=c, layout=layout, objective=objective, micro_batch_size=m)  # type: ignore[arg-type]
        for (b, c, layout), m in zip(cuts, (3, 1, 2, 3), strict=True)
    ]
    check(rank_pool(2), [*cases, StreamCase(length=1, chunk_tokens=None, objective=objective)])


def wrong_log_probs(cases: list[StreamCase], sequence_size: int) -> dict[StreamCase, float]:
    """The cases whose error on this rank is beyond the tolerance."""
    group = build_mesh(sequence_size).sequence
    errors = {case: log_prob_error(case, group, algorithms(case.scan, case.attend)) for case in cases}
    return {case: error for case, error in errors.items() if not error < TOLERANCE}


def test_log_probabilities_without_gradients(rank_pool: Callable[[int], RankPool]) -> None:
    cases = [StreamCase(block_layers=b, chunk_tokens=c, layout="zigzag") for b, c in ((2, 11), ("all", 2), (0, None))]  # type: ignore[arg-type]
    assert rank_pool(2).run(wrong_log_probs, cases, 2, timeout=240) == [{}, {}]
