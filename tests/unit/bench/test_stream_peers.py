"""StreamBP beside our modes, where it is installed and the model is one that it streams."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from longtrain.bench import _stream_peers, parse_options, stream
from longtrain.bench._stream_measure import events
from longtrain.bench._stream_peers import STREAMBP, _assign, missing, peers
from longtrain.bench._stream_plan import Plan
from longtrain.bench._stream_step import make_workload
from longtrain.bench._world import World
from longtrain.cluster.resolve import resolve

CPU = torch.device("cpu")
WORDS = ("device=cpu", "tokens=24", "chunk_tokens=16", "vocabulary=32", "repeats=1", "modes=block1")


def plan_of(pattern: str, *words: str) -> Plan:
    plan = stream.make_plan(parse_options("stream", stream.Config, [*WORDS, *words]))
    return replace(plan, job=resolve(["model=hybrid_tiny", f"model.pattern={pattern}"]))


@pytest.fixture
def streambp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, it seems."""
    monkeypatch.setattr(_stream_peers, "installed", lambda name: "1.0" if name == "streambp" else None)


def test_why_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("[softmax]")
    monkeypatch.setattr(_stream_peers, "installed", lambda name: None)
    assert missing(plan) == "not installed"
    monkeypatch.setattr(_stream_peers, "installed", lambda name: "1.0")
    assert missing(plan) == ""
    assert "one document" in missing(plan_of("[softmax]", "document_tokens=7"))
    assert "one rank" in missing(plan_of("[softmax]", "ranks=2"))
    assert "softmax" in missing(plan_of("[simple_gla x2, softmax]"))
    assert list(peers(plan_of("[softmax]", "peers=false"), Any)) == []  # type: ignore[arg-type]


def test_what_an_installed_version_raises_is_told_and_fails_nothing(
    streambp: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ImportError("cannot import name 'LossKwargs'")

    monkeypatch.setattr(_stream_peers, "_llama", broken)
    found = list(events(plan_of("[softmax]"), World.alone(CPU)))
    [verdict] = [content for kind, content in found if kind == "verdict" and content["mode"] == STREAMBP.name]
    assert (verdict["status"], verdict["detail"]) == ("error", "ImportError: cannot import name 'LossKwargs'")
    assert [content for kind, content in found if kind == "right"] == [["block1"]]
    assert {content["mode"] for kind, content in found if kind == "row"} == {"block1"}


def test_its_parameters_are_views_of_all_of_ours() -> None:
    plan = plan_of("[softmax]")
    ours = make_workload(plan.job, 32, "float32", 0, CPU).model
    assigned: dict[str, nn.Parameter] = {}

    class Llama:
        def get_submodule(self, module: str) -> Any:
            return type("Sub", (), {"__setattr__": lambda _, leaf, p: assigned.update({f"{module}.{leaf}": p})})()

    for name, parameter in ours.named_parameters():
        views = _assign(Llama(), name, parameter, plan.job.config.mixer.options["softmax"])  # type: ignore[arg-type]
        assert torch.equal(torch.cat(list(views)), parameter)
        assert all(view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr() for view in views)
    layer = {f"self_attn.{part}_proj.weight" for part in "qkvo"} | {
        f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    want = {f"model.layers.{n}.{name}" for n in range(plan.job.config.model.num_layers) for name in layer}
    assert assigned.keys() == want | {"model.embed_tokens.weight", "model.norm.weight"}
