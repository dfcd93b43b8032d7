"""Benchmarks of several ranks: what they find together, what is wrong, and ranks that die."""

import json
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.bench import _sequence_parallel_rank as rank_module
from longtrain.bench import _stream_measure as stream_module
from longtrain.bench import parse_options, stream
from longtrain.bench._ranks import launch
from longtrain.bench._sequence_parallel_cases import Case, Plan
from longtrain.bench._sequence_parallel_problems import recurrence
from longtrain.bench._stream_plan import Plan as StreamPlan
from longtrain.bench._stream_step import Step, Workload
from longtrain.bench.sequence_parallel import Config, make_plan, run
from longtrain.comm.group import Group
from longtrain.core.errors import WorkerFailed
from longtrain.core.layout import SequenceLayout
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.scan import all_gather
from longtrain.sequence_parallel.shard import Shard
from longtrain.streaming import stream as streaming
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.waiting import Watch

STREAM = ["device=cpu", "ranks=2", "gate_tokens=24", "chunk_tokens=16", "logit_tokens=10", "vocabulary=32", "repeats=1"]
WORDS = ["device=cpu", "tokens=48", "heads=2", "width=8", "repeats=1", "seconds=0.001", "layers=[]", "attend=[]"]


def with_mistakes(rank: int, plan: Plan, port: int, connection: Connection) -> None:
    """The ring forgets what came before each rank's tokens; the pipeline raises, on one rank alone."""
    right = rank_module._algorithm

    def algorithm(verb: str, name: str, plugins: tuple[Path, ...]) -> Any:
        def fail(*arguments: Any) -> Any:
            if rank == 1:
                raise RuntimeError("no\nroom")
            return local.scan(*arguments)

        return {"ring": local.scan, "pipeline": fail}.get(name) or right(verb, name, plugins)

    rank_module._algorithm = algorithm  # this process is the rank's own
    rank_module.main(rank, plan, port, connection)


def with_a_peer(rank: int, plan: Plan, port: int, connection: Connection) -> None:
    """One peer is what it should be: our own all-gather. The others are not installed."""

    def prepare(layout: SequenceLayout, group: Group, device: torch.device) -> Any:
        sequence = ShardedSequence(Shard(layout, group, device), Algorithms(all_gather.scan, local.attend))
        return lambda x: sequence.scan(recurrence("gated", x))

    rank_module.PEERS["fla cp"] = replace(rank_module.PEERS["fla cp"], prepare=prepare)
    rank_module.main(rank, plan, port, connection)


def dying(rank: int, plan: Plan, port: int, connection: Connection) -> None:
    """Rank 1 is gone once the links have been measured; rank 0 waits for it."""

    def rows(self: Any, case: Any) -> Any:
        if rank == 1:
            os._exit(7)
        self._world.barrier()
        raise AssertionError("rank 1 cannot have come")

    rank_module.Bench.rows = rows  # type: ignore[method-assign]
    rank_module.main(rank, plan, port, connection)


def config(out: Path, *words: str) -> Config:
    return parse_options("sequence-parallel", Config, [*WORDS, f"out={out}", *words])


def test_what_is_wrong_is_not_timed_and_the_rest_is(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sp.json"
    assert run(config(out, "ops=scalar", "scan=[ring,pipeline,ulysses]", "direction=forward"), with_mistakes) == 1
    ring, pipeline, ulysses = json.loads(out.read_text())["rows"]
    assert (ring["status"], pipeline["status"], ulysses["status"]) == ("failed", "error", "ok")
    assert "bound 1e-04" in ring["detail"] and "median_ms" not in ring
    assert pipeline["detail"] == "rank 1: RuntimeError: no room"
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "ERROR rank 1: RuntimeError: no room" in printed


def test_a_peer_is_checked_and_timed_like_ours_and_may_fail(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path / "sp.json", "scan=[]", "direction=forward"))
    case = Case("scan", "gated", "fla cp", "contiguous", True, "strong", 48, 48, peer=True)
    failing = replace(case, algorithm="fla cp zigzag", layout="zigzag")
    found = list(launch(replace(plan, cases=(case, failing)), with_a_peer))
    assert [kind for kind, _ in found] == ["links", "row", "row"]
    right, absent = found[1][1], found[2][1]
    assert right["status"] == "ok" and right["speedup"] > 0 and "sent_bytes" not in right
    assert absent["status"] == "error" and "ModuleNotFoundError: No module named 'fla'" in absent["detail"]


def test_a_rank_that_dies_ends_the_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "sp.json"
    with pytest.raises(WorkerFailed, match=r"rank [01] of 2 failed"):
        run(config(out, "ops=scalar", "scan=ring"), dying)
    assert json.loads(out.read_text())["finished"] is None


def without_adjoints(rank: int, plan: StreamPlan, port: int, connection: Connection) -> None:
    """Gradients that cross from a chunk to the one before are dropped; rank 1 has no room for 49 tokens."""
    right, gradients = streaming._gradients, Workload.gradients

    def cramped(self: Workload, length: int, config: StreamConfig, watch: Watch | None = None) -> Step:
        if rank == 1 and length == 49:
            raise torch.OutOfMemoryError("no room")
        return gradients(self, length, config, watch)

    # This process is the rank's own.
    streaming._gradients = lambda ends, leaves: right(ends[:1], leaves)
    Workload.gradients = cramped  # type: ignore[method-assign]
    stream_module.main(rank, plan, port, connection)


def test_ranks_that_share_a_sequence_find_what_one_finds(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "stream.json"
    words = [*STREAM, "tokens=49", "modes=[plain,all]", "precision=bfloat16-parameters", f"out={out}"]
    assert stream.run(parse_options("stream", stream.Config, words)) == 0
    content = json.loads(out.read_text())
    assert [(found["mode"], found["ranks"], found["status"]) for found in content["gate"]["verdicts"]] == [
        ("plain", 1, "ok"),
        ("plain", 2, "ok"),
        ("all", 2, "ok"),
    ]
    rows = content["rows"]
    assert [(row["mode"], row["ranks"], row["tokens"]) for row in rows] == [
        (mode, *size) for mode in ("plain", "all") for size in ((1, 25), (2, 49))
    ]
    for single, shared in zip(rows[::2], rows[1::2], strict=True):
        assert single["of_one_rank"] is None
        assert shared["of_one_rank"] == pytest.approx(shared["seconds"] / single["seconds"])
        assert shared["flops_of_one_rank"] == pytest.approx(shared["model_tflops"] / single["model_tflops"])
    assert rows[1]["loss"] == pytest.approx(rows[3]["loss"], abs=1e-2)  # the same batch, in bfloat16
    printed = capsys.readouterr().out
    assert "2 ranks on " in printed and "layout=zigzag" in printed and "FLOP/s / 1" in printed


def test_a_rank_without_room_ends_a_stream_of_several(tmp_path: Path) -> None:
    out = tmp_path / "stream.json"
    words = [*STREAM, "tokens=[24,49]", "modes=[checkpointing,all]", "layout=contiguous"]
    words.append("gate_mode=checkpointing-streamed-head")
    with pytest.raises(WorkerFailed, match=r"rank [01] of 2 failed"):
        stream.run(parse_options("stream", stream.Config, [*words, f"out={out}"]), without_adjoints)
    content = json.loads(out.read_text())
    assert content["finished"] is None
    verdicts = content["gate"]["verdicts"]
    # One chunk has nothing to lose.
    assert [(found["mode"], found["status"]) for found in verdicts] == [
        ("checkpointing-streamed-head", "ok"),
        ("checkpointing", "ok"),
        ("all", "failed"),
    ]
    assert [(row["ranks"], row["tokens"]) for row in content["rows"]] == [(1, 12), (2, 24), (1, 25)]
