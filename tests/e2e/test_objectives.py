"""`longtrain train objective=dpo data=preference` as a user runs it."""

import json
from pathlib import Path

import pytest

from longtrain.cli import main
from tests.e2e.conftest import ALONE, Command, Refusal
from tests.harness.cli import SMALL, run

UNIFORM = -5.55
"""What a token's log-probability is, nearly, under a new model of 257 tokens."""


def write_pairs(path: Path) -> None:
    rows = []
    for number in range(60):
        good, bad = "a" * (1 + number % 5), "b" * (1 + number % 7)
        references = {"reference_chosen": UNIFORM * (1 + len(good)), "reference_rejected": UNIFORM * (1 + len(bad))}
        rows.append({"prompt": f"{number}: ", "chosen": good, "rejected": bad} | references)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_loss_on_preferences_falls_on_two_ranks_with_chunks_of_time(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    settings = ("objective=dpo", "data=preference", "data.path=pairs.jsonl", "steps=20", "optimizer.warmup_steps=2")
    cut = ("sequence_parallel.size=2", "stream.chunk_tokens=100", "stream.block_layers=recurrent")
    code, _, said = run(tmp_path, "train", *SMALL, *settings, *cut, "optimizer.learning_rate=1e-2")
    assert code == 0, said
    assert "nats/pair" in said and "unigram" not in said and "accuracy" in said
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["accuracy"] == 1.0 and lines[-1]["margin"] > lines[0]["margin"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objective=dpo"], ["objective=dpo needs the column", "data=python_stdlib does not have", "data=preference"]),
        (["objective=grpo", "data=preference"], ["objective=grpo", "'advantage'", "use data=rollouts"]),
        (
            ["objective=dpo", "data=preference", "objective.reference=no/where"],
            ["no/where does not exist"],
        ),
        (["initial_weights=no/where"], ["initial_weights=no/where does not exist"]),
        (["initial_weights=.", "resume=./"], ["initial_weights and resume=./ both say", "give one of them"]),
        (["objective=grpo", "data=rollouts", "objective.reference=."], ["is not read with kl_coefficient=0"]),
        (["data=preference"], ["objective=next_token does not read the column 'side' of data=preference"]),
    ],
)
def test_objectives_and_data_that_do_not_go_together(
    tmp_path: Path, refused: Refusal, settings: list[str], words: list[str]
) -> None:
    line = refused("train", *settings)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (
            "b",
            [
                "needs reference_chosen and reference_rejected, which the rows of data=preference do not give",
                "or set objective.reference to the folder of a checkpoint",
            ],
        ),
        (
            "b" * 3000,
            ["context_length=2048: example pairs.jsonl:1 has 3005 tokens, and none is cut; set context_length"],
        ),
    ],
)
def test_what_training_refuses_of_examples_is_refused_before_a_worker_starts_and_said_when_they_are_prepared(
    tmp_path: Path, refused: Refusal, capsys: pytest.CaptureFixture[str], chosen: str, words: list[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": chosen, "rejected": "c"}))
    settings = ("objective=dpo", "data=preference", "data.path=pairs.jsonl")
    line = refused("train", *settings)
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()
    assert main(["prepare", *settings]) == 0
    said = capsys.readouterr().err
    assert line.removeprefix("longtrain: ") in said and "prepared, but `longtrain train` would refuse" in said


def test_weights_are_looked_at_before_a_worker_starts_and_only_then(
    tmp_path: Path, succeeded: Command, refused: Refusal
) -> None:
    small = [setting for setting in SMALL if not setting.startswith("run.name=")]
    alone = ["train", *small, *ALONE, "steps=2"]
    succeeded(*alone, "run.name=run")
    first = "runs/run/checkpoints/step-00000002"
    tune = [*alone, "objective=dpo", "data=preference", "data.path=pairs.jsonl", "run.name=tuned"]
    for key in ("initial_weights", "objective.reference"):
        line = refused(*tune, f"{key}=runs/run")
        assert line.startswith(f"longtrain: {key}=runs/run is no good checkpoint") and f"did you mean {first}?" in line
        line = refused(*tune, f"{key}={first}", "model.norm_epsilon=1e-5")
        assert f"{key}={first} was trained with model.norm_epsilon=1e-06, not 1e-05" in line
    assert not (tmp_path / "runs" / "tuned").exists()
    (tmp_path / "runs" / "odd").mkdir()
    (tmp_path / "runs" / "odd" / "checkpoints").touch()
    odd = [word for word in tune if not word.startswith("run.name=")]
    assert "odd/checkpoints cannot be listed" in refused(*odd, "run.name=odd", f"initial_weights={first}")
    # What a run has begun with may be gone when it goes on.
    succeeded(*alone, "run.name=tuned", f"initial_weights={first}")
    succeeded(*alone[:-1], "steps=3", "run.name=tuned", "initial_weights=gone")
