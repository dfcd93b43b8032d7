"""What `longtrain bench sequence-parallel` measures, and what its times are compared with."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from longtrain.core.kinds import LayoutKind

Kind = Literal["scan", "attend", "layer"]
Scaling = Literal["strong", "weak"]

DOCUMENTS, DOCUMENT_SEED = 6, 172
"""With this seed no document ends just behind an eighth of the sequence: on 2, 4 or 8 ranks every cut goes through one,
far from its end, so that a rank which ignored what came before it would be found out."""


@dataclass(frozen=True)
class Case:
    """One thing to be measured."""

    kind: Kind
    operation: str
    """Of a scan, `softmax`, or the mixer of a layer."""
    algorithm: str
    """Of ours, or a peer."""
    layout: LayoutKind
    packed: bool
    """Several documents instead of one."""
    scaling: Scaling
    tokens: int
    """On all ranks together."""
    single_tokens: int
    """On the one rank that the time is compared with."""
    peer: bool = False

    @property
    def problem(self) -> tuple[str, str, int, bool]:
        """What is computed, whoever computes it and on how many ranks."""
        return self.kind, self.operation, self.tokens, self.packed

    @property
    def single(self) -> tuple[str, str, int, bool]:
        """What the one rank computes."""
        return self.kind, self.operation, self.single_tokens, self.packed


@dataclass(frozen=True)
class Candidate:
    """An algorithm or a peer, for what it can be asked."""

    name: str
    layouts: tuple[LayoutKind, ...]
    peer: bool = False
    documents: bool = True
    """Whether it keeps packed documents apart."""


@dataclass(frozen=True)
class Plan:
    """All that a rank must know; made once, by the process that starts the ranks."""

    ranks: int
    device: Literal["cuda", "cpu"]
    dtype: str
    heads: int
    width: int
    """Of one head."""
    directions: tuple[str, ...]
    repeats: int
    seconds: float
    threads: int
    """Of torch on a CPU, of each rank."""
    plugins: tuple[Path, ...]
    """Folders of components beside the project's own."""
    cases: tuple[Case, ...]


def operation_cases(
    kind: Kind,
    candidates: Mapping[str, Sequence[Candidate]],
    tokens: int,
    ranks: int,
    packed: Sequence[bool],
    scaling: Sequence[Scaling],
) -> Iterator[Case]:
    """Cases by operation; those of one problem follow each other, since they share its inputs and its answer."""
    for operation, how, documents in product(candidates, scaling, packed):
        total = tokens * ranks if how == "weak" else tokens
        for candidate in candidates[operation]:
            if documents and not candidate.documents:
                continue
            for layout in candidate.layouts:
                yield Case(kind, operation, candidate.name, layout, documents, how, total, tokens, candidate.peer)


def document_starts(tokens: int, packed: bool) -> tuple[int, ...]:
    """Where documents begin: always at the same fractions of the sequence, six documents if it is long enough."""
    if not packed:
        return (0,)
    generator = random.Random(DOCUMENT_SEED)
    return tuple(sorted({0, *(int(generator.random() * tokens) for _ in range(DOCUMENTS - 1))}))


def scaled(case: Case, ranks: int, single_ms: float, together_ms: float) -> dict[str, float]:
    """Speed-up over one rank for the same work, and that divided by the number of ranks.

    The work of softmax attention grows with the square of the tokens, that of a recurrence with the tokens. Under weak
    scaling an efficiency of 1 means that P ranks take the time of one, and P times as long for softmax.
    """
    work = (case.tokens / case.single_tokens) ** (2 if case.kind == "attend" else 1)
    speedup = work * single_ms / together_ms
    return {"speedup": speedup, "efficiency": speedup / ranks}
