"""`longtrain bench recall`: the data are the task, every mixer has the same size, and a small one learns it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.bench import recall
from longtrain.bench._associations import BLANK, associations
from longtrain.cli import main

TINY = ["device=cpu", "pairs=2", "vocabulary=12", "key_dim=8", "batch=16", "learning_rates=[1e-2]"]


def test_every_key_is_asked_for_once_after_all_pairs() -> None:
    batch = associations(5, 20, 64, torch.Generator().manual_seed(3))
    assert batch.tokens.shape == (64, 20)
    keys, values = batch.tokens[:, 0:10:2], batch.tokens[:, 1:10:2]
    assert keys.min() > BLANK and keys.max() < 10 <= values.min() and values.max() < 20
    assert torch.equal(values, batch.answers)
    for row, at, stored in zip(batch.tokens, batch.queries, keys, strict=True):
        assert len(set(stored.tolist())) == 5
        assert torch.equal(row[at], stored) and at.min() >= 10
        rest = set(range(10, 20)) - set(at.tolist())
        assert len(rest) == 5 and not row[sorted(rest)].any()


def test_a_seed_is_its_data() -> None:
    first, again, other = (associations(3, 20, 8, torch.Generator().manual_seed(s)).tokens for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_recurrent_mixers_are_compared_at_the_same_state() -> None:
    task = recall.GPU
    sizes = {}
    for name in ("softmax", "retention", "mamba2", "gla", "kda"):  # their own defaults differ in size
        job = recall.resolve_model(name, task)
        sizes[name] = getattr(job.config.mixer.options[name], "state_size", None)
    assert sizes.pop("softmax") is None
    assert set(sizes.values()) == {task.num_heads * task.key_dim**2}


def test_a_small_delta_net_learns_two_pairs(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "recall.json"
    assert main(["bench", "recall", "mixers=delta_net", "steps=120", f"out={out}", *TINY]) == 0
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert (row["mixer"], row["status"], row["state"], row["learning_rate"]) == ("delta_net", "ok", 128, 1e-2)
    assert row["accuracy"]["2"] > 0.8  # chance is a sixth
    assert content["finished"] and content["task"]["steps"] == 120
    assert "delta_net" in capsys.readouterr().out


def test_a_mixer_that_cannot_run_leaves_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of\nmemory")

    real = recall.train
    monkeypatch.setattr(
        recall, "train", lambda job, *rest: (fail if "kda" in job.config.mixer.options else real)(job, *rest)
    )
    out = tmp_path / "recall.json"
    assert main(["bench", "recall", "mixers=[kda,simple_gla]", "steps=2", f"out={out}", *TINY]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mixer"], row["status"]) for row in rows] == [("kda", "error"), ("simple_gla", "ok")]
    assert "kda FAILED RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixers=[softmx]"], "there is no 'softmx'; did you mean 'softmax'?"),
        (["pairs=[2,6]", "vocabulary=12"], "vocabulary=12 has too few keys for 6 pairs; use 14 or more"),
        (["device=cpu", "backend=triton"], "backend=triton runs on GPUs, not on device=cpu; leave it out"),
        (["backend=fast"], "backend=fast: must be 'reference', 'chunked' or 'triton'"),
        (["pairs=[]"], "pairs=[]"),
        (["learning_rates=[1e-3,0]"], "learning_rates.1=0: must be greater than 0"),
    ],
)
def test_mistakes_are_refused_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "recall", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
