"""What each rank of `longtrain bench sequence-parallel` does: check, then time, one case after another.

Every rank walks the same list, and agrees with the others after each step; rank 0 alone computes what one rank would,
and sends what was found.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain.bench._gate import BOUNDS, relative_error
from longtrain.bench._ranks import joined_rank
from longtrain.bench._sequence_parallel_cases import Case, Plan, scaled
from longtrain.bench._sequence_parallel_groups import CountingGroup, SilentGroup
from longtrain.bench._sequence_parallel_peers import PEERS
from longtrain.bench._sequence_parallel_problems import LOCAL, PARAMETER, Part, Problem, make_problem, tokens_of
from longtrain.bench._timing import measure
from longtrain.bench._world import World, measure_links, measure_together
from longtrain.comm.group import Group
from longtrain.core.registry import Registry

Row = dict[str, Any]


def main(rank: int, plan: Plan, port: int, connection: Connection) -> None:
    """Entry point of a rank's process."""
    with joined_rank(rank, plan, port, connection) as (world, send):
        send("links", measure_links(world, plan.repeats, plan.seconds))
        bench = Bench(plan, world)
        for case in plan.cases:
            for row in bench.rows(case):
                send("row", asdict(case) | row)


class Bench:
    """Measures cases. The problem of the last one is kept with its answer, and the times of one rank alone."""

    def __init__(self, plan: Plan, world: World) -> None:
        self._plan, self._world = plan, world
        self._device, self._rank = world.device, world.group.rank
        self._made: object = None
        self._problem: Problem | None = None
        self._trouble = ""
        self._want: dict[str, Tensor] = {}
        self._like: dict[str, tuple[list[int], str]] = {}
        self._singles: dict[object, tuple[float, str]] = {}

    def rows(self, case: Case) -> Iterator[Row]:
        """One row a direction, or one that says why there is none."""
        problem = self._prepare(case)
        if problem is None:
            yield _error(f"one rank alone: {self._trouble}")
            return
        part, trouble = self._world.agreed(lambda: self._part(case, problem, self._world.group))
        verdict = _error(trouble) if trouble or part is None else self._verdict(case, part, problem)
        if part is None or verdict["status"] != "ok":
            yield verdict
            return
        for direction in ("both",) if case.kind == "layer" else self._plan.directions:
            yield verdict | {"direction": direction} | self._figures(case, direction, part, problem)

    def _prepare(self, case: Case) -> Problem | None:
        """The case's problem; None where it, or rank 0's answer to it, cannot be made."""
        if self._made != case.problem:
            self._made, self._problem, self._want = case.problem, None, {}

            def make() -> Problem:
                problem = make_problem(*case.problem, self._plan, self._device)
                self._want = problem.whole().results() if self._rank == 0 else {}
                return problem

            self._problem, self._trouble = self._world.agreed(make)
            self._like = self._world.share(
                {name: (x.shape, str(x.dtype).removeprefix("torch.")) for name, x in self._want.items()}
            )
        return None if self._trouble else self._problem

    def _part(self, case: Case, problem: Problem, group: Group) -> Part:
        layout = problem.layout(group.size, case.layout)
        if case.peer:
            peer = PEERS[case.algorithm]
            return Part(
                problem, peer.tokens(layout, group.rank, self._device), peer.prepare(layout, group, self._device)
            )
        if case.kind == "attend":
            chosen = replace(LOCAL, attend=_algorithm("attend", case.algorithm, self._plan.plugins))
        else:
            chosen = replace(LOCAL, scan=_algorithm("scan", case.algorithm, self._plan.plugins))
        return problem.part(layout, group, chosen)

    def _verdict(self, case: Case, part: Part, problem: Problem) -> Row:
        """Whether the ranks together find what rank 0 found alone."""
        layout = problem.layout(self._world.group.size, case.layout)
        cut = PEERS[case.algorithm].tokens if case.peer else tokens_of
        indices = [cut(layout, rank, self._device) for rank in range(layout.num_ranks)]
        # Apart from the comparison: a rank that fails alone would leave the others waiting for it there.
        results, trouble = self._world.agreed(part.results)
        if results is None or trouble:
            return _error(trouble)
        found, trouble = self._world.agreed(lambda: self._errors(results, indices))
        if trouble:
            return _error(trouble)
        return verdict(self._world.gather(found), BOUNDS[getattr(torch, self._plan.dtype)])

    def _errors(self, got: dict[str, Tensor], indices: list[Tensor]) -> dict[str, float]:
        """Relative errors of this rank's tokens; rank 0 answers for the sums of what parameters get from all ranks."""
        found = {}
        for name, x in got.items():
            if name.startswith(PARAMETER):
                total = self._world.group.all_reduce(x.clone())
                found[name] = relative_error(total, self._want[name].double()) if self._rank == 0 else 0.0
            else:
                found[name] = relative_error(x, self._scatter(name, indices).double())
        return found

    def _scatter(self, name: str, indices: list[Tensor]) -> Tensor:
        """Rank 0's answer at this rank's tokens."""
        shape, dtype = self._like[name]
        if self._rank == 0:
            want = self._want[name]
            others = range(1, len(indices))
            self._world.group.exchange([(r, want[:, indices[r]]) for r in others], [])
            return want[:, indices[0]]
        received = torch.empty(
            shape[0], len(indices[self._rank]), *shape[2:], dtype=getattr(torch, dtype), device=self._device
        )
        self._world.group.exchange([], [(0, received)])
        return received

    def _figures(self, case: Case, direction: str, part: Part, problem: Problem) -> Row:
        single_ms, trouble = self._single(case, direction, problem)
        if trouble:
            return _error(f"one rank alone: {trouble}")
        figures, trouble = self._world.agreed(lambda: self._times(case, direction, part, problem))
        if figures is None or trouble:
            return _error(trouble)
        return {"single_ms": single_ms} | figures | scaled(case, self._plan.ranks, single_ms, figures["median_ms"])

    def _single(self, case: Case, direction: str, problem: Problem) -> tuple[float, str]:
        """Milliseconds of rank 0 alone, and what went wrong."""
        key = (case.single, direction)
        if key not in self._singles:

            def alone() -> float:
                if self._rank:
                    return 0.0
                same = case.single == case.problem
                work = (problem if same else make_problem(*case.single, self._plan, self._device)).whole()
                return measure(_step(work, direction), self._device, self._plan.repeats, self._plan.seconds).median_ms

            milliseconds, trouble = self._world.agreed(alone)
            self._singles[key] = self._world.share(milliseconds), trouble
        return self._singles[key]

    def _times(self, case: Case, direction: str, part: Part, problem: Problem) -> Row:
        """Of all ranks together: with the wire, without it, and what it carries."""
        world, plan = self._world, self._plan
        row: Row = asdict(measure_together(_step(part, direction), world, plan.repeats, plan.seconds))
        if case.peer:  # its communication is its own
            return row
        counting = CountingGroup.like(world.group)
        _step(self._part(case, problem, counting), direction)()
        row["sent_bytes"] = world.gather(counting.sent_bytes)
        silent = self._part(case, problem, SilentGroup.like(world.group))
        row["silent_ms"] = measure_together(_step(silent, direction), world, plan.repeats, plan.seconds).median_ms
        row["exposed_ms"] = row["median_ms"] - row["silent_ms"]
        return row


def verdict(by_rank: list[dict[str, float]], bound: float) -> Row:
    """The part of a row that says whether all ranks are right, with the worst error of each result."""
    errors = {name: max((found[name] for found in by_rank), key=_badness) for name in by_rank[0]}
    worst = max(errors, key=lambda name: _badness(errors[name]))
    if errors[worst] <= bound:
        return {"status": "ok", "detail": "", "errors": errors}
    detail = f"{worst}: error {errors[worst]:.1e}, bound {bound:.0e}"
    return {"status": "failed", "detail": detail, "errors": errors}


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _step(part: Part, direction: str) -> Callable[[], object]:
    return part.forward if direction == "forward" else part.both


def _algorithm(verb: str, name: str, plugins: tuple[Path, ...]) -> Callable[..., Any]:
    return getattr(Registry(plugins).load(f"sequence_parallel.{verb}", name, (verb,)), verb)


def _error(detail: str) -> Row:
    return {"status": "error", "detail": detail, "errors": {}}
