"""`longtrain bench`: its options and refusals, what it writes, and that a wrong operation is never timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.bench import _report, kernels, parse_options, recall, summaries
from longtrain.bench._operations import OPERATIONS, Call, Layout, Shape, Tensors, packed
from longtrain.bench._timing import _timing
from longtrain.cli import main
from longtrain.core.errors import Refused
from longtrain_kernels.backend import Backend

TINY = ["shapes=1x64x2x16", "device=cpu", "repeats=2", "seconds=0.001"]


def options(*words: str) -> kernels.Config:
    return parse_options("kernels", kernels.Config, [*TINY, *words])


def test_without_a_name_the_benchmarks_are_listed(capsys: Any) -> None:
    assert main(["bench"]) == 0
    assert "kernels" in capsys.readouterr().out
    found = summaries()
    assert all(summary for summary, _ in found.values())
    assert found["kernels"][1][0] == "ops"
    assert all("out" in options for _, options in found.values())


@pytest.mark.parametrize("name", summaries())
def test_every_benchmark_tells_its_options(name: str, capsys: Any) -> None:
    assert main(["bench", name, "--help"]) == 0
    told = capsys.readouterr().out
    summary, options = summaries()[name]
    assert summary in told and all(f"\n  {option}=" in told for option in options)
    assert main(["bench", "--help"]) == 0
    assert "examples:" in capsys.readouterr().out


def test_options_are_typed() -> None:
    config = parse_options(
        "kernels", kernels.Config, ["ops=scalar", "shapes=[1x32kx16x128,4x8kx16x64]", "backends=[triton,chunked]"]
    )
    assert config.ops == ("scalar",)
    assert config.shapes == (Shape(1, 32768, 16, 128), Shape(4, 8192, 16, 64))
    assert config.backends == (Backend.TRITON, Backend.CHUNKED)
    assert config.direction == "both"
    assert parse_options("kernels", kernels.Config, []).ops == tuple(OPERATIONS)
    assert parse_options("recall", recall.Config, ["pairs=null", "mixers=gla"]).pairs is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernls"], "there is no 'kernls'; did you mean 'kernels'?"),
        (["ops=scalar"], "the benchmark's name comes first"),
        (["kernels", "op=scalar"], "has no option 'op'; did you mean 'ops'?"),
        (["kernels", "+ops=scalar"], "write key=value"),
        (["kernels", "ops=scaler"], "ops=scaler: there is no operation 'scaler'; did you mean 'scalar'?"),
        (["kernels", "backends=[tritn]"], "there is no backend 'tritn'; did you mean 'triton'?"),
        (
            ["kernels", "shapes=32k"],
            "shapes=32k: expected sequences x tokens x heads x width, each 1 or more; write 1x32kx16x128",
        ),
        (["kernels", "dtype=bfloat"], "dtype=bfloat: must be"),
        (["kernels", "repeats=0"], "repeats=0: must be greater than or equal to 1"),
        (["kernels", "out="], "out=: is empty, which would be the current folder"),
        (["kernels", "out=/nowhere/kernels.json", *TINY], "out=/nowhere/kernels.json: cannot be written"),
    ],
)
def test_mistakes_are_refused_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="no GPU here"):
        kernels.run(replace(options(), device="cuda"))


def test_a_row_says_what_was_measured_and_on_what(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "ops=[softmax,scalar]", f"out={out}", *TINY]) == 0
    content = json.loads(out.read_text())
    assert content["benchmark"] == "kernels"
    assert content["machine"]["device"] == "cpu"
    assert content["machine"]["torch"] == torch.__version__
    assert content["settings"]["ops"] == ["softmax", "scalar"]
    assert content["finished"] >= content["started"]
    assert content["ceilings"]["copy_bytes_per_second"] > 0
    assert [(row["operation"], row["direction"]) for row in content["rows"]] == [
        ("softmax", "forward"),
        ("softmax", "both"),
        ("scalar", "forward"),
        ("scalar", "both"),
    ]
    forward, both = content["rows"][2:]
    elements, decays = 64 * 2 * 16, 64 * 2
    assert forward["implementation"] == "chunked"
    assert forward["io_bytes"] == 4 * (4 * elements + decays)
    assert both["io_bytes"] == 4 * (4 * elements + decays) * 2 + 4 * (3 * elements + decays)
    assert forward["flops"] == 4 * 64 * 2 * 16 * 16
    assert both["flops"] == 3 * forward["flops"]
    assert forward["p20_ms"] <= forward["median_ms"] <= forward["p80_ms"]
    assert set(forward["errors"]) >= {"outputs", "final state", "gradient of log_decay", "gradient of state"}
    printed = capsys.readouterr().out
    assert "CPU" in printed
    assert printed.count("1x64x2x16") == 4


def broken(how: str) -> Any:
    """The scalar scan with one mistake that its shapes do not show."""

    def ours(backend: Backend) -> Call:
        right = OPERATIONS["scalar"].ours
        assert right is not None

        def call(x: Tensors, layout: Layout) -> tuple[torch.Tensor, ...]:
            if how == "documents":
                layout = replace(layout, documents=torch.zeros_like(layout.documents))
            if how == "gradient":
                x = {**x, "log_decay": x["log_decay"].detach()}
            if how == "crash":
                raise RuntimeError("no such kernel")
            outputs, state = right(backend)(x, layout)
            return (outputs * float("nan") if how == "nan" else outputs), state

        return call

    return {"scalar": replace(OPERATIONS["scalar"], ours=ours)}


@pytest.mark.parametrize(
    ("how", "status", "detail"),
    [
        ("documents", "failed", "bound"),
        ("gradient", "failed", "gradient of log_decay: error 1.0e+00, bound 1e-04"),
        ("nan", "failed", "error nan"),
        ("crash", "error", "RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_operation_fails_and_is_not_timed(
    how: str, status: str, detail: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "kernels.json"
    assert kernels.run(options("ops=scalar", f"out={out}"), broken(how)) == 1
    [row] = json.loads(out.read_text())["rows"]
    assert row["status"] == status
    assert detail in row["detail"]
    assert "median_ms" not in row
    assert status.upper() in capsys.readouterr().out


def test_finished_rows_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: _report.Report) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_report.Report, "finish", killed)
    out = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        kernels.run(options("ops=none", "direction=forward", f"out={out}"))
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 1
    assert content["finished"] is None


def test_spread_is_of_the_sorted_times() -> None:
    timing = _timing([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], 0.5, None)
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms, timing.repeats) == (3.5, 2.0, 5.0, 6)


def test_packed_layouts_count_documents_and_positions() -> None:
    layout = packed(((2, 3),), 5, torch.device("cpu"))
    assert layout.documents.tolist() == [[0, 0, 1, 2, 2]]
    assert layout.positions.tolist() == [[1000, 1001, 0, 0, 1]]
