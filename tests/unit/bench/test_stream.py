"""`longtrain bench stream`: its rows, what it refuses, that a wrong mode is never timed, and where memory leads to."""

import json
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.bench._stream_fit import Fit, fit, slope
from longtrain.bench._stream_gate import Gate, Short, Verdict
from longtrain.bench._stream_memory import Phases, begin, highest, most
from longtrain.bench._stream_modes import MODES, parse_mode
from longtrain.bench._stream_rows import Rows, extrapolate
from longtrain.bench._stream_step import Precision, Step, Workload, is_out_of_memory, make_workload, measure
from longtrain.bench._stream_table import Table, spell_longest
from longtrain.bench._world import World
from longtrain.cli import main
from longtrain.cluster.resolve import resolve
from longtrain.model.build import build_model
from longtrain.streaming import stream as streaming
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.waiting import Waiting, Watch

TINY = ["device=cpu", "tokens=[24,48]", "chunk_tokens=16", "logit_tokens=10", "vocabulary=32", "repeats=1"]
CPU = torch.device("cpu")


@cache
def workload(precision: Precision = "float32") -> Workload:
    return make_workload(resolve(["model=hybrid_tiny"]), 32, precision, seed=0, device=CPU)


def judge(work: Workload, names: list[str], gate_mode: str = "plain") -> list[Verdict]:
    gate = Gate(work, World.alone(CPU), Short(parse_mode(gate_mode), 64, chunk_tokens=64, logit_tokens=64))
    found = (gate.verdict(work, parse_mode(name)) for name in names)
    return [gate.own, *(verdict for verdict in found if verdict is not None)]


def lose_adjoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that cross from a chunk to the one before are dropped."""
    right = streaming._gradients
    monkeypatch.setattr(streaming, "_gradients", lambda ends, leaves: right(ends[:1], leaves))


def test_a_row_for_every_mode_and_length(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "stream.json"
    assert main(["bench", "stream", f"out={out}", *TINY]) == 0
    content = json.loads(out.read_text())
    assert content["benchmark"] == "stream" and content["finished"]
    assert content["sizes"]["model"] == "hybrid_tiny" and content["sizes"]["precision"] == "float32"
    rows = content["rows"]
    assert [(row["mode"], row["tokens"]) for row in rows] == [(mode, tokens) for mode in MODES for tokens in (24, 48)]
    assert {row["status"] for row in rows} == {"ok"}
    for tokens in (24, 48):
        losses = [row["loss"] for row in rows if row["tokens"] == tokens]
        assert max(losses) - min(losses) < 1e-5  # the same batch, in float32
    plain, checkpointing = rows[1], rows[3]
    assert plain["tokens_per_second"] == pytest.approx(48 / plain["seconds"])
    assert plain["repeats"] == 1 and plain["peak_bytes"] is None and plain["of_checkpointing"] is None
    assert checkpointing["of_checkpointing"] == 1.0
    assert [verdict["mode"] for verdict in content["gate"]["verdicts"]] == list(MODES)
    assert content["gate"]["tokens"] == 24
    own, *others = content["gate"]["verdicts"]
    assert own["bound"] is None  # JSON has no NaN
    assert all(0 <= verdict["together"] <= verdict["bound"] for verdict in others)
    assert content["held"]["gradient_bytes"] == content["held"]["parameter_bytes"] > 0
    printed = capsys.readouterr().out
    assert "CPU: times alone" in printed and "gate at 24 tokens" in printed
    assert printed.count("checkpointing-streamed-head") == 3  # the gate's line and two rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16-parameters"])
def test_the_gate_lets_right_modes_pass_and_no_wrong_one(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    work, modes = workload(precision), ["checkpointing", "block2", "all"]
    types = [p.dtype for p in work.model.parameters()]
    verdicts = judge(work, ["plain", *modes])
    assert [(verdict.mode, verdict.against) for verdict in verdicts] == [
        ("plain", "float32"),
        *((mode, "plain") for mode in modes),
    ]
    assert all(verdict.status == "ok" and not verdict.error > verdict.bound for verdict in verdicts)
    assert [p.dtype for p in work.model.parameters()] == types
    assert all(p.grad is None for p in work.model.parameters())
    lose_adjoints(monkeypatch)
    # One chunk has nothing to lose.
    assert [verdict.status for verdict in judge(work, modes)] == ["ok", "ok", "failed", "failed"]


def test_modes_are_compared_on_several_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long those are that are timed."""
    seen: list[int] = []
    gradients = Workload.gradients

    def watch(work: Workload, length: int, config: StreamConfig, watched: Watch | None = None) -> Step:
        seen.append(len(work.starts(length)))
        return gradients(work, length, config, watched)

    monkeypatch.setattr(Workload, "gradients", watch)
    assert {verdict.status for verdict in judge(replace(workload(), document_tokens=4096), ["block1"])} == {"ok"}
    assert seen == [16, 16, 16]  # float32's, the gate's and block1's
    judge(workload(), [])
    assert set(seen[3:]) == {1}


def test_documents_share_a_sequence() -> None:
    packed, config = replace(workload(), document_tokens=7), parse_mode("all").config(64, 16, 64)
    assert packed.starts(16) == (0, 7, 14)
    assert {verdict.status for verdict in judge(packed, ["block1", "all"])} == {"ok"}
    losses = [work.gradients(64, config).loss for work in (packed, workload())]
    workload().clear()
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("gate_mode", ["checkpointing-streamed-head", "block1"])
def test_any_mode_may_be_the_gates(gate_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["plain", "checkpointing-streamed-head", "block1", "all"]
    # One that cuts time is compared with itself, with other chunks; one that does not has nothing to be compared with.
    asked = [name for name in names if name != gate_mode or name == "block1"]
    chunks: list[int | None] = []
    right = Workload.gradients

    def gradients(self: Workload, length: int, config: StreamConfig, watch: Watch | None = None) -> Step:
        chunks.append(config.chunk_tokens)
        return right(self, length, config, watch)

    monkeypatch.setattr(Workload, "gradients", gradients)
    verdicts = judge(workload("bfloat16"), names, gate_mode)
    assert [(verdict.mode, verdict.against) for verdict in verdicts] == [
        (gate_mode, "float32"),
        *((name, gate_mode) for name in asked),
    ]
    assert all(verdict.status == "ok" for verdict in verdicts)
    cut = {"plain": None, "checkpointing-streamed-head": None, "block1": 13, "all": 13}
    gates = None if cut[gate_mode] is None else 7
    assert chunks == [gates, gates, *(cut[name] for name in asked)]  # 64 tokens in five chunks, or in ten
    lose_adjoints(monkeypatch)
    wrong = {verdict.mode for verdict in judge(workload("bfloat16"), names, gate_mode)[1:] if verdict.status != "ok"}
    # Where the gate's mode itself is wrong, the others differ from it, and it from itself with other chunks.
    assert wrong == (set(names) if gate_mode == "block1" else {"block1", "all"})


def test_a_wrong_mode_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lose_adjoints(monkeypatch)
    out = tmp_path / "stream.json"
    assert main(["bench", "stream", "modes=[plain,all]", f"out={out}", *TINY]) == 1
    content = json.loads(out.read_text())
    assert {row["mode"] for row in content["rows"]} == {"plain"}
    assert content["gate"]["verdicts"][1]["status"] == "failed"
    assert "all FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0), (RuntimeError("broken\nshape"), "error", 1)],
)
def test_what_ends_a_mode_is_a_row(
    error: Exception, status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    right = Workload.gradients

    def gradients(self: Workload, length: int, config: StreamConfig, watch: Watch | None = None) -> Step:
        if config.block_layers == 1 and length > 24:
            raise error
        return right(self, length, config, watch)

    monkeypatch.setattr(Workload, "gradients", gradients)
    out = tmp_path / "stream.json"
    assert (
        main(["bench", "stream", f"out={out}", *TINY[:1], "tokens=[24,36,48]", *TINY[2:], "modes=[block1,all]"]) == code
    )
    content = json.loads(out.read_text())
    found = [(row["mode"], row["tokens"], row["status"]) for row in content["rows"]]
    assert found == [("block1", 24, "ok"), ("block1", 36, status), *(("all", n, "ok") for n in (24, 36, 48))]
    assert content["finished"]
    assert status.upper() in capsys.readouterr().out


def test_a_long_first_step_is_the_measurement() -> None:
    work, losses = workload(), iter(range(9))
    figures = measure(lambda watch: Step(next(losses)), work, World.alone(CPU), repeats=2, seconds=60)
    assert (figures.repeats, figures.loss) == (2, 2.0)
    figures = measure(lambda watch: Step(next(losses)), work, World.alone(CPU), repeats=2, seconds=1e-12)
    assert (figures.repeats, figures.loss) == (1, 3.0)
    assert figures.seconds == figures.first_seconds > 0


def test_memory_errors_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("any"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_bytes_a_token_and_the_longest_context() -> None:
    assert slope(None, (8, 100)) is None
    assert slope((8, 100), (16, 180)) == 10
    assert fit([(8, 100)]) is None
    # The shorter half, which does not follow the line, does not count.
    found = fit([(8, 999), (16, 999), (32, 420), (64, 740)])
    assert found is not None
    assert (found.bytes_per_token, found.fixed_bytes) == pytest.approx((10, 100))
    assert found.longest(1100) == pytest.approx(100) and found.at(100) == pytest.approx(1100)
    assert found.longest(50) == 0
    assert Fit(0.0, 100.0).longest(1000) == math.inf
    assert [spell_longest(n) for n in (None, 1536.0, 2.5 * 2**20)] == ["any", "1.5k", "2.5M"]


def test_rows_lead_to_an_extrapolation(capsys: Any) -> None:
    def phases(**peaks: int) -> list[dict[str, Any]]:
        waiting = asdict(Waiting(2**30, 0, 0, 2**29, 2**28))
        return [{"phase": phase, "peak_bytes": peak, "waiting": waiting} for phase, peak in peaks.items()]

    rows = [
        {"status": "ok", "tokens": n, "peak_bytes": 2**30 + 1024 * n, "host_bytes": 2048 * n}
        | {"phases": phases(late=2**28 + 1024 * n, early=2**29 + 512 * n)}
        for n in (2**13, 2**14)
    ]
    # The phase that needs more at these lengths is not the one that fills the memory.
    found = extrapolate(parse_mode("block4-offload"), rows, 2**31)
    assert found is not None
    assert (found["phase"], found["bytes_per_token"]) == ("late", 1024)
    assert found["longest_tokens"] == pytest.approx(1.75 * 2**20)
    assert found["host_bytes_then"] == pytest.approx(3.5 * 2**30)
    assert extrapolate(MODES["all"], rows[:1], 2**31) is None
    flat = extrapolate(
        MODES["all"], [row | {"peak_bytes": 5, "phases": phases(late=4, early=5)} for row in rows], 2**31
    )
    assert flat is not None and flat["longest_tokens"] is None and flat["phase"] == "early"
    table = Table(cuda=True, ranks=1)
    figures = {
        "seconds": 1.0,
        "tokens_per_second": 8192.0,
        "model_tflops": 1.0,
        "of_checkpointing": None,
        "host_wait_seconds": 0.0,
    }
    table.rows()
    table.row(rows[0] | figures | {"mode": "block4", "rest_bytes": 2**29, "bytes_per_token": 1024.0})
    table.fits([found, flat], 2**31)
    table.classes([rows[0] | {"mode": "block4", "phases": phases(late=3 * 2**30, early=5)}], 2**30)
    printed = capsys.readouterr().out
    assert "an extrapolation" in printed and "1.7M" in printed and "any" in printed and "1,024" in printed
    # Parameters, what waits, and what is left of the three.
    assert printed.splitlines()[-1].split() == ["block4", "8k", "late", "1", "1", "0", "0", "0.5", "0.25", "0.25"]


def test_phases_have_their_own_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([7, 9, 8, 5, 3])  # since the last question
    for name in ("synchronize", "reset_peak_memory_stats", "reset_peak_host_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    phases = Phases(torch.device("cuda"))
    first, second, third = (Waiting(n, 0, 0, 0, 0) for n in range(3))
    for phase, waiting in (("forward", first), ("layer 0", second), ("layer 0", third)):
        phases(phase, waiting)
    found = phases.end(beside=100)
    assert [(phase["phase"], phase["peak_bytes"]) for phase in found] == [
        ("forward", 107),
        ("layer 0", 109),  # and what waited there
        ("delivery", 105),
    ]
    assert found[1]["waiting"] == asdict(second) and found[2]["waiting"] is None
    assert highest(found) == found[1] and highest([]) is None
    assert [phase["phase"] for phase in Phases(torch.device("cuda")).end(beside=0)] == ["step"]
    other = [phase | {"peak_bytes": 108} for phase in reversed(found)]
    assert {phase["phase"]: phase["peak_bytes"] for phase in most([found, other])} == {
        "forward": 108,
        "layer 0": 109,
        "delivery": 108,
    }
    assert begin(CPU) is None and most([[], []]) == []


def test_rows_of_several_ranks_are_compared_with_one_that_has_its_share(capsys: Any) -> None:
    def row(mode: str, ranks: int, tokens: int, seconds: float, **more: Any) -> dict[str, Any]:
        peak = 100 + 2 * tokens // ranks
        phases = [{"phase": "forward", "peak_bytes": peak, "waiting": None}]
        usual = {"status": "ok", "peak_bytes": peak, "phases": phases, "host_bytes": None, "model_tflops": 9.0}
        usual["host_wait_seconds"] = 0.0
        return usual | {"mode": mode, "ranks": ranks, "tokens": tokens, "seconds": seconds} | more

    rows = Rows(ranks=4)
    for size, tokens, seconds in ((1, 3, 1.0), (4, 10, 3.0)):
        rows.add(row("checkpointing", size, tokens, seconds))
    single = rows.add(row("all", 1, 3, 2.0))
    assert (single["of_checkpointing"], single["of_one_rank"], single["bytes_per_token"]) == (2.0, None, None)
    shared = rows.add(row("all", 4, 10, 6.0, model_tflops=6.0))
    assert (shared["of_checkpointing"], shared["of_one_rank"]) == (2.0, 3.0)
    assert shared["flops_of_one_rank"] == pytest.approx(2 / 3)
    failed = {"mode": "all", "ranks": 1, "tokens": 5, "status": "out of memory", "detail": ""}
    assert rows.add(failed) == failed
    longer = rows.add(row("all", 4, 20, 9.0))
    assert longer["bytes_per_token"] == 0.5 and longer["of_one_rank"] is None
    [fitted] = rows.fits([parse_mode("checkpointing"), parse_mode("all")], 1000)
    assert fitted["mode"] == "all" and fitted["bytes_per_token"] == pytest.approx(0.5)
    table = Table(cuda=True, ranks=4)
    table.rows()
    table.row(shared | {"tokens_per_second": 1.0, "rest_bytes": 2**30})
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["mode", "tokens", "ranks"] and "FLOP/s / 1" in head
    assert line.split()[:3] == ["all", "10", "4"] and "3.00" in line and "0.67" in line


def test_modes_by_name() -> None:
    assert parse_mode("block3").config(100, 10, 7).block_layers == 3
    offloaded = parse_mode("checkpointing-offload").config(100, 10, 7)
    assert (offloaded.offload, offloaded.chunk_tokens, offloaded.logit_tokens) == ("host", None, 100)
    config = parse_mode("all").config(100, 10, 7)
    assert (config.block_layers, config.chunk_tokens, config.logit_tokens, config.offload) == ("all", 10, 7, "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modes=[blok2]"], "modes=[blok2]: there is no mode 'blok2'; did you mean 'block"),
        (["modes=block0"], "modes=block0: there is no mode 'block0'; did you mean 'checkpointing'?"),
        (["modes=[all,block1,all]"], "modes=[all, block1, all]: all is listed twice; list it once"),
        (["modes=block5"], "modes=block5: the model has 3 layers; use all, or fewer in a block"),
        (["modes=[plain-offload]"], "there is no mode 'plain-offload': nothing waits in plain; drop -offload, or"),
        (["modes=[]"], "the list of modes is empty"),
        (
            ["modes=[all,block1-offload]"],
            "modes=block1-offload: device=cpu has all in the host's memory; drop -offload",
        ),
        (["model=lama_1b"], "did you mean 'llama_1b'?"),
        (["tokens=[]"], "tokens=[]: has too few items; give 1 or more"),
        (["tokens=0"], ": tokens=0: must be greater than 0\n"),
        (["tokens=abc"], ": tokens=abc: expected a number of tokens such as 4096, 128k, 1M or 1e6\n"),
        (["tokens=[16,0]"], ": tokens.1=0: must be greater than 0\n"),
        (["tokens=[1,16]"], "tokens=1: a sequence needs 2 tokens, as does a rank's share; use 2 or more"),
        (["tokens=3", "ranks=3"], "tokens=3: a sequence needs 2 tokens, as does a rank's share; use 4 or more"),
        (["gate_tokens=1"], "gate_tokens=1: a sequence needs 2 tokens, as does a rank's share; use 2 or more"),
        (["vocabulary=1"], "vocabulary=1: must be greater than or equal to 2"),
        (["precision=float16"], "precision=float16: must be"),
        (["gate_mode=blok1"], "gate_mode=blok1: there is no mode 'blok1'; did you mean 'block1'?"),
        (["gate_mode=block1-offload"], "gate_mode=block1-offload: device=cpu has all in the host's memory; drop -off"),
        (["ranks=0"], "ranks=0: must be greater than or equal to 1"),
        (["ranks=2", "scan=rign"], "scan=rign: there is no 'rign'; did you mean 'ring'?"),
        (["ranks=2", "attend=auto"], "attend=auto: there is no 'auto'"),
        (["layout=striped"], "layout=striped: must be"),
    ],
)
def test_mistakes_are_refused_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "stream", "device=cpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_gate_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Workload, "gradients", fail)
    assert main(["bench", "stream", *TINY, "gate_tokens=20"]) == 2
    assert "gate_tokens=20: a step of gate_mode=plain does not fit; use fewer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama_1b", 1_235_814_400), ("llama_8b", 8_030_261_248)],  # as the authors' own have
)
def test_models_have_the_sizes_of_those_they_are_named_after(model: str, parameters: int) -> None:
    job = resolve([f"model={model}"])
    with torch.device("meta"):
        made = build_model(job.config.model, job.config.mixer.options, 128_256, 0, job.registry)
    assert sum(p.numel() for p in made.parameters()) == parameters


@pytest.mark.parametrize(
    ("model", "kinds"), [("llama_hybrid_1b", ["gated_delta"] * 3 + ["softmax"]), ("recurrent_1b", ["gated_delta"])]
)
def test_recurrent_models_differ_from_llama_1b_in_their_mixers(model: str, kinds: list[str]) -> None:
    ours, llama = (resolve([f"model={name}"]).config for name in (model, "llama_1b"))
    assert replace(ours.model, pattern=llama.model.pattern) == llama.model
    with torch.device("meta"):
        made = build_model(ours.model, ours.mixer.options, 8, 0, resolve([]).registry)
    assert [type(layer.mixer).__module__.rpartition(".")[2] for layer in made.layers] == kinds * (16 // len(kinds))
