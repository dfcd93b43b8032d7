"""`longtrain bench sequence-parallel`: its arithmetic, its stand-in groups, its options, and one run on two ranks."""

import inspect
import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import longtrain_conf
from longtrain.bench import _sequence_parallel_peers as peers
from longtrain.bench import parse_options
from longtrain.bench._sequence_parallel_cases import Candidate, Case, document_starts, operation_cases, scaled
from longtrain.bench._sequence_parallel_groups import CountingGroup, SilentGroup
from longtrain.bench._sequence_parallel_projection import (
    all_gather_seconds,
    pipeline_seconds,
    project,
    transition_bytes,
)
from longtrain.bench._sequence_parallel_rank import verdict
from longtrain.bench._world import spread
from longtrain.bench.sequence_parallel import Config, make_plan
from longtrain.cli import main
from longtrain.comm.group import Group
from longtrain.comm.links import Link
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry

CONF = Path(longtrain_conf.__file__).parent
TINY = ["device=cpu", "tokens=48", "heads=2", "width=8", "repeats=1", "seconds=0.001"]
SCAN = Case("scan", "gated", "ring", "contiguous", False, "strong", 100, 100)
COMMUNICATION = sorted(name for name, _ in inspect.getmembers(Group, inspect.isfunction) if not name.startswith("_"))


def plan_of(*words: str) -> Any:
    return make_plan(parse_options("sequence-parallel", Config, [*TINY, *words]))


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """With the scan `mine`, which is the pipeline, and the mixer `my_gla`, which is `gla`."""
    folder = tmp_path / "my plugins"
    for file, text in {
        "sequence_parallel/scan/mine.py": "from longtrain.sequence_parallel.scan.pipeline import scan\n",
        "mixers/my_gla.py": "from longtrain.mixers import gla\n\nclass Config(gla.Config): ...\n\nMixer = gla.Mixer\n",
        "conf/mixer/my_gla.yaml": (CONF / "mixer" / "gla.yaml").read_text(),
    }.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    return folder


def test_a_run_on_two_ranks_says_what_it_measured(tmp_path: Path, plugin: Path, capsys: Any) -> None:
    out = tmp_path / "sp.json"
    words = ["ops=gated", "scan=[all_gather,mine]", "attend=ring", "layers=my_gla", "packed=true"]
    words.append(f"plugins='{plugin}'")
    assert main(["bench", "sequence-parallel", *words, f"out={out}", *TINY]) == 0
    content = json.loads(out.read_text())
    assert content["benchmark"] == "sequence-parallel" and content["finished"]
    rows = content["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    seen = [(row["kind"], row["algorithm"], row["layout"], row["direction"], row["tokens"]) for row in rows]
    assert seen == [
        *(("scan", name, "contiguous", d, 48) for name in ("all_gather", "mine") for d in ("forward", "both")),
        *(("attend", "ring", layout, d, 48) for layout in ("contiguous", "zigzag") for d in ("forward", "both")),
        *(("layer", name, "contiguous", "both", 96) for name in ("all_gather", "mine")),
    ]
    state = 2 * 8 * 8 * 4  # bytes of H K V; transitions of the delta rule are as large
    gather, gather_both, chain, chain_both = (row["sent_bytes"] for row in rows[:4])
    assert gather == [2 * state] * 2 and gather_both == [3 * state] * 2
    assert chain == [state, 0] and chain_both == [state, state]
    assert rows[4]["sent_bytes"] == [2 * 24 * 2 * 8 * 4] * 2  # keys and values of half the tokens
    assert set(rows[1]["errors"]) >= {"outputs", "gradient of log_decay", "gradient of beta"}
    assert any(name.startswith("gradient of parameter") for name in rows[-1]["errors"])
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["exposed_ms"] == pytest.approx(row["median_ms"] - row["silent_ms"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / 2)
    assert content["links"]["all_gather"]["bandwidth"] > 0 and content["projection"]
    printed = capsys.readouterr().out
    assert "yunchang: " in printed and "projected" in printed and printed.count("my_gla layer") == 2


@pytest.mark.parametrize("stand_in", [CountingGroup, SilentGroup])
def test_stand_ins_inherit_no_way_to_communicate(stand_in: type) -> None:
    assert COMMUNICATION
    assert set(COMMUNICATION) <= set(vars(stand_in)), "a method of Group is new: say here what it sends, or leaves out"
    assert {name for name in vars(stand_in) if inspect.isfunction(vars(stand_in)[name])} - {"like"} <= {
        *COMMUNICATION,
        *(name for name in vars(stand_in) if name.startswith("_")),
    }


class Deaf:
    """What the counting group delegates to here: two ranks that need no partner."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None

    def split(self, inner: int) -> tuple[Group, Group]:
        silent = SilentGroup(0, 2)
        return silent, replace(silent, rank=1)


def test_sent_bytes_are_what_leaves_this_rank() -> None:
    deaf: Any = Deaf()
    counting = CountingGroup(1, 4, _real=deaf)
    x = torch.zeros(2, 5, 3)  # 120 bytes, 24 a row
    sent = []
    for call in (
        lambda: counting.all_gather(x),
        lambda: counting.all_gather_rows(x, [5, 5, 6, 2]),
        lambda: counting.reduce_scatter_rows([x, x, x[:, :2], x]),
        lambda: counting.all_to_all([x, x, x[:, :0], x[:, :1]], [(2, 5, 3)] * 4),
        lambda: counting.all_reduce(x),
        lambda: counting.exchange([(0, x), (1, x), (2, x[:, :1])], [(3, x)]),
        lambda: counting.begin([(0, x), (1, x), (2, x)], [(3, x)], None),
        lambda: counting.split(2)[1].exchange([(0, x)], []),
    ):
        before = counting.sent_bytes
        call()
        sent.append(counting.sent_bytes - before)
    assert sent == [360, 432, 360, 144, 180, 144, 240, 120]


def test_a_silent_group_answers_in_the_right_shapes_with_finite_numbers() -> None:
    silent = SilentGroup.like(Group(1, 3))
    x = torch.randn(2, 4, 3)
    assert [part.shape for part in silent.all_gather(x)] == [x.shape] * 3
    assert [part.shape[1] for part in silent.all_gather_rows(x, [5, 4, 0])] == [5, 4, 0]
    assert torch.equal(silent.reduce_scatter_rows([x, x[:, :3], x]), x[:, :3])
    shapes = [(2, 7), (1, 2), (0, 3)]
    found = silent.all_to_all([x, x[:, :1], x[:, :0]], shapes)
    assert [tuple(part.shape) for part in found] == shapes
    buffers = [torch.full((2, 2), math.nan), torch.full((2, 2), math.nan), torch.full_like(x, math.nan)]
    assert [(part.rank, part.size) for part in SilentGroup(5, 6).split(2)] == [(1, 2), (2, 3)]
    silent.exchange([(0, x)], [(0, buffers[0])])
    assert silent.begin([(0, x)], [(2, buffers[1]), (2, buffers[2])], "result").wait() == "result"
    assert torch.equal(buffers[2], x)
    assert all(torch.isfinite(part).all() for part in (*buffers, *found))


def test_efficiency_counts_the_work_of_attention_as_a_square() -> None:
    assert scaled(SCAN, 4, 8.0, 4.0) == {"speedup": 2.0, "efficiency": 0.5}
    weak = replace(SCAN, scaling="weak", tokens=400)
    assert scaled(weak, 4, 8.0, 8.0) == {"speedup": 4.0, "efficiency": 1.0}
    assert scaled(replace(weak, kind="attend"), 4, 8.0, 64.0)["efficiency"] == 0.5
    assert scaled(replace(weak, kind="layer"), 4, 8.0, 16.0)["efficiency"] == 0.5


def test_a_repetition_takes_as_long_as_its_slowest_rank() -> None:
    found = spread([[1.0, 9.0, 3.0], [2.0, 4.0, 8.0]], None)
    assert (found.median_ms, found.p20_ms, found.p80_ms, found.repeats) == (8.0, 2.0, 9.0, 3)


def test_the_worst_rank_decides() -> None:
    assert verdict([{"outputs": 1e-6, "x": 0.0}, {"outputs": 5e-5, "x": 1e-7}], 1e-4)["status"] == "ok"
    found = verdict([{"outputs": 1e-6, "x": 0.1}, {"outputs": 5e-5, "x": 0.2}], 1e-4)
    assert found["status"] == "failed" and found["detail"] == "x: error 2.0e-01, bound 1e-04"
    assert verdict([{"x": math.nan}, {"x": 0.0}], 1.0)["status"] == "failed"


def test_documents_are_the_same_fractions_of_any_sequence() -> None:
    assert document_starts(1000, False) == (0,)
    short, long = document_starts(1000, True), document_starts(4000, True)
    assert len(short) == 6 and short[0] == 0 and list(short) == sorted(set(short))
    assert [start // 4 for start in long] == list(short)
    assert document_starts(1, True) == (0,)
    for edge in range(125, 1000, 125):  # of a rank, where there are 2, 4 or 8
        assert not any(edge <= start < edge + 50 for start in short)


def test_cases_share_problems_and_leave_out_what_a_peer_cannot_do() -> None:
    own, peer = Candidate("ring", ("contiguous", "zigzag")), Candidate("usp", ("zigzag",), peer=True, documents=False)
    cases = list(operation_cases("attend", {"softmax": [own, peer]}, 64, 2, (False, True), ("strong", "weak")))
    assert [(case.algorithm, case.packed, case.tokens) for case in cases if case.layout == "zigzag"] == [
        ("ring", False, 64),
        ("usp", False, 64),
        ("ring", True, 64),
        ("ring", False, 128),
        ("usp", False, 128),
        ("ring", True, 128),
    ]
    problems = [case.problem for case in cases]
    assert sum(a != b for a, b in pairwise(problems)) == len(set(problems)) - 1


def test_projections_follow_their_formulas() -> None:
    link = Link(10e-6, 25e9)
    assert all_gather_seconds(8, 25e6, link) == pytest.approx(7e-3 + 30e-6)
    assert pipeline_seconds(8, 25e6, 8, link) == pytest.approx(14 * (10e-6 + 0.125e-3))
    assert transition_bytes("gated", 16, 128) == 16 * 128 * 128 * 4
    assert transition_bytes("vector", 16, 128) == 16 * 128 * 4
    assert transition_bytes("scalar", 16, 128) == 16 * 4
    rows = project(["gated"], 16, 128, 8, {"slow": (link, Link(0.0, 1e9))})
    assert [row["algorithm"] for row in rows] == ["all_gather", "pipeline"]
    state = 16 * 128 * 128 * 4
    assert [row["bytes"] for row in rows] == [2 * state, state]
    assert rows[0]["milliseconds"][64] == pytest.approx(all_gather_seconds(64, 2 * state, link) * 1e3)
    assert rows[1]["milliseconds"][256] == pytest.approx((255 + 7) * state / 8 / 1e9 * 1e3)


def test_a_usp_rank_holds_its_share_of_a_ring_rank() -> None:
    device = torch.device("cpu")
    layout = SequenceLayout(16, 4, ((0,),), kind="zigzag")
    held = [peers.usp_tokens(layout, rank, device).tolist() for rank in range(4)]
    assert held == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
    pair = SequenceLayout(8, 2, ((0,),), kind="zigzag")
    assert [peers.usp_tokens(pair, rank, device).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_peers_are_asked_for_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(peers.candidates("softmax", ("contiguous", "zigzag"), "cpu"))
    monkeypatch.setattr(peers, "missing", lambda peer, device: "")
    names = {
        operation: [c.name for c in peers.candidates(operation, ("contiguous",), "cuda")]
        for operation in ("softmax", "gated", "scalar")
    }
    assert names == {"softmax": ["ring-flash-attn"], "gated": ["fla cp"], "scalar": []}
    assert {c.name: c.documents for c in peers.candidates("softmax", ("zigzag",), "cuda")} == {
        "ring-flash zigzag": False,
        "yunchang usp": False,
    }


def test_every_algorithm_is_measured_unless_some_are_named() -> None:
    plan = plan_of()
    found = {kind: {case.algorithm for case in plan.cases if case.kind == kind} for kind in ("scan", "attend")}
    assert found["scan"] == set(Registry().names("sequence_parallel.scan"))
    assert found["attend"] == set(Registry().names("sequence_parallel.attend"))
    assert {case.layout for case in plan.cases if case.kind != "attend"} == {"contiguous"}
    both = plan_of("layouts=[contiguous,zigzag]", "scaling=[strong,weak]", "packed=false", "attend=[]")
    assert {(c.layout, c.scaling) for c in both.cases if c.kind == "scan"} == {
        (layout, scaling) for layout in ("contiguous", "zigzag") for scaling in ("strong", "weak")
    }
    assert not any(case.kind == "attend" or case.packed for case in both.cases)
    assert not plan_of("scan=[]", "attend=[]", "layers=[]").cases


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scan=[rign]"], "scan=rign: there is no 'rign'; did you mean 'ring'?"),
        (["attend=halo"], "attend=halo: there is no 'halo'"),
        (["ops=constant"], "ops=constant: there is no 'constant'"),
        (["layers=[softmax]"], "layers: 'softmax' is no recurrence; `attend` measures softmax attention"),
        (["layers=[glaa]"], "layers: there is no 'glaa'; did you mean 'gla'?"),
        (["ranks=1"], "ranks=1: must be greater than or equal to 2"),
        (["layouts=[]"], "layouts=[]"),
        (["tokens=0"], "tokens=0: must be greater than 0"),
        (["plugins=nowhere"], "plugins: nowhere is not a folder; give one laid out like the project"),
    ],
)
def test_mistakes_are_refused_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "sequence-parallel", "device=cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_broken_plug_in_is_refused_before_any_rank_starts(plugin: Path, capsys: Any) -> None:
    algorithm = plugin / "sequence_parallel" / "scan" / "broken.py"
    algorithm.write_text("def scam(op, shard, carry): ...\n")
    assert main(["bench", "sequence-parallel", "device=cpu", f"plugins='{plugin}'"]) == 2
    assert f"{algorithm} defines no `scan`" in capsys.readouterr().err


def test_help_shows_what_each_option_takes(plugin: Path, capsys: Any) -> None:
    assert main(["bench", "sequence-parallel", f"plugins='{plugin}'", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {option.name}=" in text for option in fields(Config))
    told = " ".join(text.split())
    for kind in ("scan", "attend"):
        names = Registry((plugin,)).names(f"sequence_parallel.{kind}")
        assert f" {kind}={' | '.join(names)}, one or a list " in told
    assert "ops=none | scalar | vector | delta | gated | kda, one or a list; default [scalar, vector, gated]" in told
    assert "| my_gla | retention | simple_gla, one or a list" in told and "sliding_window" not in told
    assert "layouts=contiguous | zigzag, one or a list" in told
    assert "ranks=a whole number, at least 2 Left out: as many as there are GPUs" in told


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "sequence-parallel", "device=cuda", "ranks=4"]) == 2
    assert "4 ranks need a GPU each, and there are 0; write device=cpu, or fewer ranks" in capsys.readouterr().err
