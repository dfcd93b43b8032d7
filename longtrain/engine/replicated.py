"""The replicated engine: every rank holds all parameters; gradients are summed over all ranks, AdamW runs on each.

Gradients at `step` are of this rank's share of the global mean, so the sum of the ranks' gradients is the gradient of
the mean, whatever part of which sequence a rank holds.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtrain.comm.group import Group
from longtrain.engine.config import EngineConfig, OptimizerConfig
from longtrain_kernels.affine import accumulator_dtype

BUCKET_ELEMENTS = 2**24  # gradients travel in messages of 64 MiB: large enough for the links, small against the model


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Of step 0, 1, ...: linear warm-up to the peak, then half a cosine down to the final fraction of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    final = config.final_learning_rate_fraction
    return config.learning_rate * (final + (1 - final) * cosine)


class ReplicatedEngine:
    """Owns the parameters, their gradients and the optimizer state of one rank."""

    def __init__(
        self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, total_steps: int, world: Group
    ) -> None:
        self.model, self._optimizer_config, self._total_steps, self._world = model, optimizer, total_steps, world
        self._precision = config.precision
        if config.precision == "float64":
            model.double()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            _decay_groups(model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
        )

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context for forward passes: bfloat16 activations where the configuration asks for them."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._precision == "bfloat16")

    def step(self, step: int) -> StepResult:
        """Sum gradients over ranks, clip, and update the parameters; every one of them has a gradient.

        `step` counts from 0. The parameters stay the same bit for bit on all ranks.
        """
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        sum_over_ranks(grads, self._world)
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._optimizer_config.max_grad_norm)
        rate = learning_rate(self._optimizer_config, step, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=norm.item(), learning_rate=rate)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, by canonical name: `model.<parameter>` and `optimizer.<moment>.<parameter>`."""
        tensors = {f"model.{name}": p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for moment, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{moment}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises ValueError naming the first parameter that does not fit the model."""
        for name, parameter in self._parameters.items():
            saved = tensors.get(f"model.{name}")
            if saved is None or saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                found = "nothing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
                raise ValueError(f"{name}: model has {parameter.dtype} {list(parameter.shape)}, checkpoint has {found}")
        moments = ("step", "exp_avg", "exp_avg_sq")
        known = {f"optimizer.{m}.{name}" for m in moments for name in self._parameters}
        unknown = tensors.keys() - known - {f"model.{name}" for name in self._parameters}
        if unknown:
            raise ValueError(f"{min(unknown)}: the checkpoint has it, the model does not")
        missing = known - tensors.keys()
        if missing:
            raise ValueError(f"{min(missing)}: the optimizer needs it, the checkpoint does not have it")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                state = {m: tensors[f"optimizer.{m}.{name}"] for m in moments}
                self._optimizer.state[parameter] = {
                    m: t.clone() if m == "step" else t.to(parameter.device, copy=True) for m, t in state.items()
                }


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for the matrices of projections and embeddings; none for norms, biases and other parameters."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


def sum_over_ranks(grads: Sequence[Tensor], group: Group) -> None:
    """Sum gradients over ranks in place, in float32 at least, several small ones a message."""
    if group.size == 1:
        return
    bucket: list[Tensor] = []
    for i, grad in enumerate(grads):
        bucket.append(grad)
        if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS or i + 1 == len(grads):
            flat = group.all_reduce(torch.cat([g.flatten().to(accumulator_dtype(g.dtype)) for g in bucket]))
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
