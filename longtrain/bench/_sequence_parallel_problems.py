"""A sequence with its operation, the same on every rank; and the part of it that one rank computes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtrain.bench._operations import OPERATIONS, Shape, Tensors
from longtrain.bench._sequence_parallel_cases import Plan, document_starts
from longtrain.cluster.resolve import resolve
from longtrain.comm.group import Group
from longtrain.core.contracts import Recurrence
from longtrain.core.errors import Refused
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout, span_index
from longtrain.core.registry import Registry, did_you_mean
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.model.model import Block
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.diagonal_scan import DiagonalScan

SCANS = ("none", "scalar", "vector", "delta", "gated", "kda")
"""Operations whose inputs all have tokens; a constant decay has none to be cut."""
PARAMETER = "gradient of parameter "
LOCAL = Algorithms(local.scan, local.attend)


@dataclass(frozen=True)
class Problem:
    """Inputs of a whole sequence, and how its outputs are found."""

    tensors: dict[str, Tensor]
    """[1, T, ...] each."""
    cotangent: Tensor
    """[1, T, ...], of the outputs."""
    starts: tuple[int, ...]
    """Of documents."""
    parameters: dict[str, Tensor]
    call: Callable[[Tensors, ShardedSequence], Tensor]
    """Outputs [1, L, ...] of L tokens."""

    def layout(self, ranks: int, kind: LayoutKind) -> SequenceLayout:
        """How the sequence is cut."""
        return SequenceLayout(self.cotangent.shape[1], ranks, (self.starts,), kind=kind)

    def part(self, layout: SequenceLayout, group: Group, algorithms: Algorithms) -> "Part":
        """What the group's rank computes with these algorithms."""
        shard = Shard(layout, group, self.cotangent.device)

        def forward(x: Tensors) -> Tensor:
            return self.call(x, ShardedSequence(shard, algorithms))

        return Part(self, tokens_of(layout, group.rank, self.cotangent.device), forward)

    def whole(self) -> "Part":
        """All of it, on one rank."""
        return self.part(self.layout(1, "contiguous"), Group(0, 1), LOCAL)


class Part:
    """Some tokens of a problem, with gradients."""

    def __init__(self, problem: Problem, index: Tensor, forward: Callable[[Tensors], Tensor]) -> None:
        self._inputs = {name: x[:, index].requires_grad_() for name, x in problem.tensors.items()}
        self._cotangent = problem.cotangent[:, index]
        self._parameters = problem.parameters
        self._forward = forward

    def forward(self) -> Tensor:
        """Outputs, from inputs that need gradients, as in training."""
        return self._forward(self._inputs)

    def both(self) -> tuple[Tensor, ...]:
        """Outputs, and the gradients of every input and parameter."""
        output = self.forward()
        if self._cotangent.dtype != output.dtype:  # known only now; later calls need not
            self._cotangent = self._cotangent.to(output.dtype)
        leaves = [*self._inputs.values(), *self._parameters.values()]
        return output, *torch.autograd.grad(output, leaves, self._cotangent, materialize_grads=True)

    def results(self) -> dict[str, Tensor]:
        """What `both` returns, by name."""
        names = ["outputs", *(f"gradient of {name}" for name in self._inputs)]
        names += [PARAMETER + name for name in self._parameters]
        return {name: x.detach() for name, x in zip(names, self.both(), strict=True)}


def tokens_of(layout: SequenceLayout, rank: int, device: torch.device) -> Tensor:
    """[L] int64: the tokens that a rank holds, in its order."""
    return span_index(layout.spans(rank, 0), device)


def make_problem(kind: str, operation: str, tokens: int, packed: bool, plan: Plan, device: torch.device) -> Problem:
    """The same numbers on every rank."""
    starts, dtype = document_starts(tokens, packed), getattr(torch, plan.dtype)
    torch.manual_seed(0)
    if kind == "layer":
        return _layer(operation, tokens, starts, plan, device)
    shape = Shape(1, tokens, plan.heads, plan.width)
    tensors = OPERATIONS[operation].inputs(shape, dtype, device)
    cotangent = torch.randn_like(tensors["values"])

    def scan(x: Tensors, sequence: ShardedSequence) -> Tensor:
        return sequence.scan(recurrence(operation, x))

    def attend(x: Tensors, sequence: ShardedSequence) -> Tensor:
        return sequence.attend(x["queries"], x["keys"], x["values"], scale=1.0)  # the queries are scaled

    return Problem(tensors, cotangent, starts, {}, scan if kind == "scan" else attend)


def recurrence(operation: str, x: Tensors) -> Recurrence:
    """One of `SCANS`, bound to its inputs."""
    if "beta" in x:
        return DeltaScan(x["queries"], x["keys"], x["values"], x["beta"], x.get("log_decay"))
    return DiagonalScan(x["queries"], x["keys"], x["values"], x.get("log_decay"))


def is_recurrent(mixer_config: type) -> bool:
    """Whether a mixer with this `Config` has a state, not tokens, to hand on."""
    return "key_dim" in _options(mixer_config)


def _options(mixer_config: type) -> set[str]:
    return {field.name for field in fields(mixer_config)}


def layer_of(mixer: str, heads: int, width: int, plugins: Sequence[Path]) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The configurations of a model of one layer of it, and of its mixer by name.

    Raises Refused for a mixer that does not exist, or that keeps tokens.
    """
    registry = Registry(tuple(plugins))
    if mixer not in registry.names("mixers"):
        raise Refused(f"layers: there is no '{mixer}'{did_you_mean(mixer, registry.names('mixers'))}")
    config = registry.load("mixers", mixer, ("Config",)).Config
    if not is_recurrent(config):
        raise Refused(f"layers: '{mixer}' is no recurrence; `attend` measures softmax attention")
    sizes = {"num_heads": heads, "num_value_heads": heads, "key_dim": width, "value_dim": width}
    job = resolve(
        [
            f"plugins={json.dumps([str(folder) for folder in plugins])}",
            f"model.pattern=[{mixer}]",
            "model.num_layers=1",
            f"model.width={heads * width}",
            f"model.initializer_std={(heads * width) ** -0.5}",
            *(f"mixer.{mixer}.{key}={value}" for key, value in sizes.items() if key in _options(config)),
        ]
    )
    return job.config.model, job.config.mixer.options


def _layer(mixer: str, tokens: int, starts: tuple[int, ...], plan: Plan, device: torch.device) -> Problem:
    """A mixer under autocast, as a model calls it: float32 parameters and residuals."""
    model_config, mixer_configs = layer_of(mixer, plan.heads, plan.width, plan.plugins)
    block = build_model(model_config, mixer_configs, 2, 0, Registry(plan.plugins)).blocks[0]
    assert isinstance(block, Block)
    module = block.mixer.to(device)
    x = torch.randn(1, tokens, model_config.width, device=device)
    dtype = getattr(torch, plan.dtype)

    def call(x: Tensors, sequence: ShardedSequence) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return module(x["x"], sequence)

    return Problem({"x": x}, torch.randn_like(x), starts, dict(module.named_parameters()), call)
