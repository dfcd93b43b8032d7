"""`longtrain bench stream`: its rows, what it refuses, that a wrong mode is never timed, and where memory leads to."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.bench import parse_options, stream
from longtrain.bench._stream_fit import Fit, fit, slope
from longtrain.bench._stream_gate import judge
from longtrain.bench._stream_modes import MODES, Mode, parse_mode
from longtrain.bench._stream_step import Precision, Workload, is_out_of_memory, make_workload, measure
from longtrain.bench._stream_table import Table, spell_longest
from longtrain.cli import main
from longtrain.cluster.resolve import resolve
from longtrain.model.build import build_model
from longtrain.streaming import stream as streaming

TINY = ["device=cpu", "tokens=[24,48]", "chunk_tokens=16", "logit_tokens=10", "vocabulary=32", "repeats=1"]
CPU = torch.device("cpu")


@cache
def workload(precision: Precision = "float32") -> Workload:
    return make_workload(resolve(["model=hybrid_tiny"]), 32, precision, seed=0, device=CPU)


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
    assert content["held"]["gradient_bytes"] == content["held"]["parameter_bytes"] > 0
    printed = capsys.readouterr().out
    assert "CPU: times alone" in printed and "gate at 24 tokens" in printed
    assert printed.count("checkpointing-streamed-head") == 3  # the gate's line and two rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16-parameters"])
def test_the_gate_lets_right_modes_pass_and_no_wrong_one(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    work, modes = workload(precision), [parse_mode(name) for name in ("checkpointing", "block2", "all")]
    types = [p.dtype for p in work.model.parameters()]
    verdicts = list(judge(work, modes, 64, chunk_tokens=64, logit_tokens=64))
    assert [verdict.mode for verdict in verdicts] == ["plain", *(mode.name for mode in modes)]
    assert all(verdict.status == "ok" and not verdict.error > verdict.bound for verdict in verdicts)
    assert [p.dtype for p in work.model.parameters()] == types
    assert all(p.grad is None for p in work.model.parameters())
    lose_adjoints(monkeypatch)
    verdicts = list(judge(work, modes, 64, chunk_tokens=64, logit_tokens=64))
    # One chunk has nothing to lose.
    assert [verdict.status for verdict in verdicts] == ["ok", "ok", "failed", "failed"]


def test_a_wrong_mode_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lose_adjoints(monkeypatch)
    out = tmp_path / "stream.json"
    assert main(["bench", "stream", "modes=[plain,all]", f"out={out}", *TINY]) == 1
    content = json.loads(out.read_text())
    assert {row["mode"] for row in content["rows"]} == {"plain"}
    assert content["gate"]["verdicts"][1]["status"] == "failed"
    assert "all FAILED" in capsys.readouterr().out


def options(*words: str) -> stream.Config:
    return parse_options("stream", stream.Config, [*TINY, *words])


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0), (RuntimeError("broken\nshape"), "error", 1)],
)
def test_what_ends_a_mode_is_a_row(error: Exception, status: str, code: int, tmp_path: Path, capsys: Any) -> None:
    def step(work: Workload, mode: Mode, tokens: int, *sizes: int) -> float:
        if mode.name == "block1" and tokens > 24:
            raise error
        return stream.step(work, mode, tokens, *sizes)

    out = tmp_path / "stream.json"
    config = replace(options("modes=[block1,all]"), tokens=(24, 36, 48), out=out)
    assert stream.run(config, step) == code
    content = json.loads(out.read_text())
    found = [(row["mode"], row["tokens"], row["status"]) for row in content["rows"]]
    assert found == [("block1", 24, "ok"), ("block1", 36, status), *(("all", n, "ok") for n in (24, 36, 48))]
    assert content["finished"]
    assert status.upper() in capsys.readouterr().out


def test_a_long_first_step_is_the_measurement() -> None:
    work, losses = workload(), iter(range(9))
    figures = measure(lambda: next(losses), work, repeats=2, seconds=60)
    assert (figures.repeats, figures.loss) == (2, 2.0)
    figures = measure(lambda: next(losses), work, repeats=2, seconds=1e-12)
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
    rows = [
        {"status": "ok", "tokens": n, "peak_bytes": 2**30 + 1024 * n, "host_bytes": 2048 * n} for n in (2**13, 2**14)
    ]
    rows.append({"status": "out of memory", "tokens": 2**15})
    (found,) = stream.extrapolate(parse_mode("block4-offload"), rows, 2**31)
    assert found["longest_tokens"] == pytest.approx(2**20)
    assert found["host_bytes_then"] == pytest.approx(2**31)
    assert stream.extrapolate(MODES["all"], rows[:1], 2**31) == []
    (flat,) = stream.extrapolate(MODES["all"], [row | {"peak_bytes": 5} for row in rows[:2]], 2**31)
    assert flat["longest_tokens"] is None
    table = Table(cuda=True)
    figures = {"seconds": 1.0, "tokens_per_second": 8192.0, "model_tflops": 1.0, "of_checkpointing": None}
    table.rows()
    table.row(rows[0] | figures | {"mode": "block4", "rest_bytes": 2**29, "bytes_per_token": 1024.0})
    table.fits([found, flat], 2**31)
    printed = capsys.readouterr().out
    assert "an extrapolation" in printed and "1.0M" in printed and "any" in printed and "1,024" in printed


def test_modes_by_name() -> None:
    assert parse_mode("block3").config(100, 10, 7).block_layers == 3
    offloaded = parse_mode("checkpointing-offload").config(100, 10, 7)
    assert (offloaded.offload, offloaded.chunk_tokens, offloaded.logit_tokens) == ("host", None, 100)
    config = parse_mode("all").config(100, 10, 7)
    assert (config.block_layers, config.chunk_tokens, config.logit_tokens, config.offload) == ("all", 10, 7, "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modes=[block0]"], "modes=[block0]: there is no mode 'block0'; did you mean 'block"),
        (["modes=[plain-offload]"], "there is no mode 'plain-offload': nothing waits in plain"),
        (["modes=[]"], "the list of modes is empty"),
        (["modes=block1-offload"], "modes: on a CPU everything is in the host's memory; leave -offload out"),
        (["model=lama_1b"], "did you mean 'llama_1b'?"),
        (["tokens=[]"], "tokens=[]"),
        (["precision=float16"], "precision=float16: must be"),
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
    assert "gate_tokens=20: plain backpropagation does not fit; use fewer" in capsys.readouterr().err


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
