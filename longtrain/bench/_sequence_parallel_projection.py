"""What the exchange of a scan would cost on more ranks than are here: arithmetic from latency and bandwidth.

Both exchanges move the states of one scan forward, H K V float32 numbers a sequence. They are taken to stand alone: no
computation hides any of them, and no other traffic shares the link.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longtrain.comm.links import Link

FLOAT32_BYTES = 4
RANKS = (8, 64, 256)


def all_gather_seconds(ranks: int, count: float, link: Link) -> float:
    """A ring's traffic after a tree's latency: (P - 1) n / b + l ceil(log2 P) for n bytes of every rank."""
    return (ranks - 1) * count / link.bandwidth + link.latency * math.ceil(math.log2(ranks))


def pipeline_seconds(ranks: int, count: float, blocks: int, link: Link) -> float:
    """Until the last rank has the last of `blocks` blocks: (P - 1 + blocks - 1) (l + n / (blocks b)) for n bytes."""
    return (ranks - 1 + blocks - 1) * (link.latency + count / (blocks * link.bandwidth))


def transition_bytes(operation: str, heads: int, keys: int) -> int:
    """Of what an all-gather sends beside the states: of a head K x K numbers under the delta rule, else K or 1."""
    numbers = {"delta": keys**2, "gated": keys**2, "kda": keys**2, "vector": keys}
    return heads * numbers.get(operation, 1) * FLOAT32_BYTES


def project(
    operations: Sequence[str], heads: int, width: int, blocks: int, links: Mapping[str, tuple[Link, Link]]
) -> list[dict[str, Any]]:
    """Milliseconds by operation, link and algorithm; of each link, what an all-gather sees of it and what two ranks."""
    rows = []
    state = heads * width**2 * FLOAT32_BYTES
    for operation in operations:
        gathered = state + transition_bytes(operation, heads, width)
        for name, (collective, pair) in links.items():
            base = {"operation": operation, "link": name}
            gather = {p: all_gather_seconds(p, gathered, collective) * 1e3 for p in RANKS}
            rows.append(base | {"algorithm": "all_gather", "bytes": gathered, "milliseconds": gather})
            chain = {p: pipeline_seconds(p, state, blocks, pair) * 1e3 for p in RANKS}
            rows.append(base | {"algorithm": "pipeline", "bytes": state, "milliseconds": chain})
    return rows
