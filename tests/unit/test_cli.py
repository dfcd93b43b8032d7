"""The command line's dispatch, its one-line errors and exit codes. What commands run is replaced; resolving is not."""

import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from longtrain.cli import main
from longtrain.core.errors import Preempted, Refused, WorkerFailed

TOYS = [f"plugins=['{Path(__file__).parent / 'config' / 'toys'}']", "experiment=toys"]
COMMANDS = ["train", "resume", "config", "prepare", "submit", "jobs", "logs", "stop", "checkpoint", "bench"]


class Recorder:
    """Stands for one function of another part: notes its arguments, returns or raises what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any) -> None:
        self.calls: list[tuple] = []
        self.result = result
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, self)
        monkeypatch.setitem(sys.modules, module, stand_in)

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def test_train_runs_the_resolved_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    run_job = Recorder(monkeypatch, "longtrain.cluster.run", "run_job", 75)
    assert main(["train", *TOYS, "steps=3"]) == 75
    [(tree, plugins)] = run_job.calls
    assert tree["steps"] == 3
    assert tree["run"]["name"].startswith("toy_model-4k-")
    assert [str(p) for p in plugins] == tree["plugins"]


def test_resume_needs_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    run_job = Recorder(monkeypatch, "longtrain.cluster.run", "run_job", 0)
    command = ["resume", *TOYS, f"run.dir={tmp_path}", "run.name=mine"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"longtrain: {tmp_path}/mine holds no checkpoint to go on from; start it with `longtrain train`\n"
    )
    (tmp_path / "mine" / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert main([*command, "resume=never"]) == 2
    assert run_job.calls == []
    assert main(command) == 0
    assert [tree["resume"] for tree, _ in run_job.calls] == ["required"]


def test_config_prints_values_and_origins(capsys: Any) -> None:
    assert main(["config", *TOYS, "--yaml", "steps=3"]) == 0
    plain = capsys.readouterr().out
    assert "steps: 3\n" in plain
    assert "#" not in plain
    assert main(["config", *TOYS, "steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("steps")] == [["steps:", "3", "#", "command", "line"]]


def test_prepare_passes_the_data_section(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prepare = Recorder(monkeypatch, "longtrain.data.prepare", "prepare", Path("store"))
    monkeypatch.setattr("longtrain.training.objective.check_data", lambda config, registry: None)
    assert main(["prepare", *TOYS]) == 0
    [(config, registry, progress)] = prepare.calls
    assert config.name == "toy_text"
    assert len(registry.plugins) == 1
    assert callable(progress)
    assert capsys.readouterr().out == "store\n"


def test_submit_validates_first_and_sends_the_same_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Recorder(monkeypatch, "longtrain.cluster.jobs", "submit", 0)
    assert main(["submit", *TOYS, "stesp=3"]) == 2
    assert submit.calls == []
    assert main(["submit", *TOYS, "--address", "http://there:8265", "steps=3"]) == 0
    assert main(["submit", "--no-follow", *TOYS]) == 0
    first, second = submit.calls
    assert first[:3] == ([*TOYS, "steps=3"], "http://there:8265", True)
    assert second[:3] == (TOYS, None, False)
    # The job gets the name that the run has here, so that the same command is the same run.
    assert all(re.fullmatch(r"toy_model-\w+-[0-9a-f]{6}", name) for *_, name, _ in (first, second))
    # And the folder: a job has a working directory of its own.
    assert first[-1] == Path("runs").absolute()


@pytest.mark.parametrize(
    ("arguments", "name", "call"),
    [
        (["jobs"], "jobs", (None,)),
        (["jobs", "--address", "http://there:8265"], "jobs", ("http://there:8265",)),
        (["logs", "job-1", "--follow"], "logs", ("job-1", None, True)),
        (["logs", "--address", "http://there:8265", "job-1"], "logs", ("job-1", "http://there:8265", False)),
        (["stop", "job-1"], "stop", ("job-1", None)),
    ],
)
def test_job_commands(monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str, call: tuple) -> None:
    recorder = Recorder(monkeypatch, "longtrain.cluster.jobs", name, 0)
    assert main(arguments) == 0
    assert recorder.calls == [call]


def test_checkpoint_verify_names_every_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    verify = Recorder(monkeypatch, "longtrain.checkpoint.verify", "verify", [])
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    good, new = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (20, 40))
    for folder in (good, new):
        folder.mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000060.partial").mkdir()
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"ok       {good}\nok       {new}\n"
    verify.result = ["a.safetensors: digest differs", "b.safetensors: missing"]
    assert main(["checkpoint", "verify", str(new)]) == 1
    assert capsys.readouterr().out == f"corrupt  {new}: a.safetensors: digest differs; b.safetensors: missing\n"
    assert [str(path) for (path,) in verify.calls] == [str(good), str(new), str(new)]


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (Refused("x=1 is bad;\n use 2"), 2, "longtrain: x=1 is bad; use 2\n"),
        (WorkerFailed("rank 1"), 1, "longtrain: rank 1\n"),
        (Preempted("saved"), 75, "longtrain: saved\n"),
        (KeyboardInterrupt(), 130, "longtrain: interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: Any, raised: Any, code: int, printed: str) -> None:
    Recorder(monkeypatch, "longtrain.cluster.jobs", "jobs", raised)
    assert main(["jobs"]) == code
    assert capsys.readouterr().err == printed


def test_an_unexpected_error_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    Recorder(monkeypatch, "longtrain.cluster.jobs", "jobs", RuntimeError("a bug"))
    assert main(["jobs"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["steps=5"], "'steps=5' is not a command; did you mean 'longtrain train steps=5'?"),
        (["train", "--steps=5"], "unknown flag --steps; settings have no dashes: steps=5"),
        (["train", "--context-length=1M"], "settings have no dashes: context_length=1M"),
        (["submit", "--adress", "x"], "unknown flag --adress; did you mean '--address'?"),
        (["submit", "--no-foll"], "unknown flag --no-foll; did you mean '--no-follow'?"),
        (["checkpoint", "verfy", "x"], "there is no 'verfy'; did you mean 'verify'?"),
        (["checkpoint", "verify", "/no/such"], "/no/such is not a folder"),
        (["logs"], "the following arguments are required: job; `longtrain logs --help` shows"),
        (["jobs", "extra"], "'extra' is one argument too many"),
        (["--nothing"], "`longtrain --help` shows how it is used"),
    ],
)
def test_mistyped_commands_get_one_line(capsys: Any, arguments: list[str], expected: str) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.startswith("longtrain: ") and printed.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples(command: str, capsys: Any) -> None:
    assert main([command, "--help"]) == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert len(examples) in (2, 3)
    assert all(line.startswith(f"  longtrain {command}") for line in examples)


def test_help_names_every_command(capsys: Any) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"\n    {command}" in printed for command in COMMANDS)


def test_a_mistyped_key_is_answered_without_waiting_for_torch_or_ray() -> None:
    script = "import sys; from longtrain.cli import main; code = main(['config', 'steeps=1']); "
    script += "assert not {'torch', 'ray'} & set(sys.modules); sys.exit(code)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "longtrain: steeps=1: there is no key 'steeps'; did you mean 'steps'?\n"
    # about one second on an idle core; the bound leaves room for a loaded one
    assert time.monotonic() - start < 10


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "longtrain", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "longtrain 0.1.0\n")
