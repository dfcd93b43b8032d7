"""A mixer, a scan algorithm and an objective from a folder outside the project train without a change to it."""

import json
from pathlib import Path
from textwrap import dedent

import pytest

from tests.e2e.conftest import ALONE, Command, Refusal
from tests.harness.cli import SMALL, succeed

FILES = {
    "mixers/running_sum.py": '''
        """A toy: every token adds a projection of itself to a sum that runs along its document."""

        from dataclasses import dataclass

        import torch
        from longtrain_kernels.diagonal_scan import DiagonalScan
        from pydantic import ConfigDict
        from torch import nn

        from longtrain.core.contracts import SequenceMixer


        @dataclass(frozen=True)
        class Config:
            __pydantic_config__ = ConfigDict(extra="forbid")

            value_dim: int


        class Mixer(SequenceMixer):
            def __init__(self, config, width):
                super().__init__()
                self.value = nn.Linear(width, config.value_dim)
                self.output = nn.Linear(config.value_dim, width)

            def forward(self, x, sequence):
                v = self.value(x).unsqueeze(2)
                ones = torch.ones_like(v[..., :1])
                return self.output(sequence.scan(DiagonalScan(ones, ones, v, torch.zeros_like(v[..., 0]))).squeeze(2))

            def flops_per_token(self, context):
                return 0.0
    ''',
    "sequence_parallel/scan/one_by_one.py": '''
        """A toy: rank after rank, each from the state that the one before sent (LASP-1), by repeating the pass."""

        import torch


        def scan(op, shard, carry):
            group = shard.group
            (documents,) = shard.segment_documents  # of a contiguous layout
            segment = op.summarize(documents)
            state = torch.zeros_like(segment.state) if carry is None else carry
            before, after = Pass.apply(segment.transition, segment.state, state, group)
            return segment.correct(before), after


        class Pass(torch.autograd.Function):
            @staticmethod
            def forward(ctx, transition, addition, carry, group):
                before = carry
                if group.rank > 0:
                    before = torch.empty_like(carry)
                    group.exchange([], [(group.rank - 1, before)])
                after = transition.unsqueeze(-1) * before + addition
                if group.rank + 1 < group.size:
                    group.exchange([(group.rank + 1, after.contiguous())], [])
                ctx.save_for_backward(transition, before)
                ctx.group = group
                return before.clone(), after

            @staticmethod
            def backward(ctx, grad_before, grad_after):
                transition, before = ctx.saved_tensors
                group = ctx.group
                if group.rank + 1 < group.size:
                    from_next = torch.empty_like(grad_after)
                    group.exchange([], [(group.rank + 1, from_next)])
                    grad_after = grad_after + from_next
                into = transition.unsqueeze(-1) * grad_after + grad_before
                if group.rank > 0:
                    group.exchange([(group.rank - 1, into.contiguous())], [])
                return (grad_after * before).sum(-1).sum_to_size(transition.shape), grad_after, into, None
    ''',
    "objectives/half.py": '''
        """A toy: next-token prediction, halved."""

        from dataclasses import dataclass

        from pydantic import ConfigDict

        from longtrain.objectives import next_token


        @dataclass(frozen=True)
        class Config:
            __pydantic_config__ = ConfigDict(extra="forbid")

            name: str
            factor: float


        class Objective(next_token.Objective):
            def sums(self, log_probs, targets):
                return self.config.factor * super().sums(log_probs, targets)
    ''',
    "conf/mixer/running_sum.yaml": "value_dim: 16\n",
    "conf/objective/half.yaml": "name: half\nfactor: 0.5\n",
}


def write_plugin(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text).lstrip())


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_components_from_a_folder(tmp_path: Path, succeeded: Command, refused: Refusal) -> None:
    write_plugin(tmp_path / "plugin")
    settings = [
        s for s in SMALL if not s.startswith(("model.pattern", "mixer.sliding_window", "mixer.softmax", "run."))
    ]
    command = ("train", *settings, "plugins=[plugin]", "model.pattern=[simple_gla x2, running_sum]", "steps=4")
    succeeded(*command, "run.name=own", *ALONE)
    succeed(tmp_path, *command, "run.name=toy", "sequence_parallel.scan=one_by_one", "objective=half")
    own, toy = losses(tmp_path, "own"), losses(tmp_path, "toy")
    assert len(own) == 4
    # The first loss comes before any update and is half exactly; AdamW then hardly feels the factor.
    assert toy[0] == pytest.approx(own[0] / 2, rel=1e-6)
    assert toy == pytest.approx([loss / 2 for loss in own], rel=0.02)
    assert toy[1:] != toy[:-1], "parameters are updated"
    line = refused("train", "plugins=[plugin]", "model.pattern=[running_sun]", "model.num_layers=1")
    assert "running_sum" in line
