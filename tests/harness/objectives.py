"""Objectives by their definitions, on logits of the whole batch, and targets for them."""

import torch
from torch import Tensor

from longtrain.core.contracts import Objective
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.targets import Targets
from longtrain.objectives import dpo, grpo, next_token

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token.Objective(next_token.Config("next_token")),
    "dpo": dpo.Objective(dpo.Config("dpo", beta=0.7, reference=None)),
    "grpo": grpo.Objective(grpo.Config("grpo", clip=0.3, kl_coefficient=0.2, reference=None, on_policy=False)),
    "grpo-on-policy": grpo.Objective(grpo.Config("grpo", clip=0.3, kl_coefficient=0.0, reference=None, on_policy=True)),
}


def make_targets(name: str, labels: Tensor) -> list[Targets]:
    """Of each sequence [1, T] of [B, T] labels. Examples lie anywhere: a token's is drawn, as are its columns."""
    if name == "next_token":
        return [Targets(row[None]) for row in labels]
    found = []
    for number, row in enumerate(labels.cpu()):
        draw = torch.Generator().manual_seed(number)
        labelled = row != IGNORED_LABEL
        # No more examples than labels; each has at least one.
        count = min(1 + 2 * number, int(labelled.sum()))
        example = torch.randint(count, row.shape, generator=draw) if count else torch.zeros_like(row)
        example[labelled.nonzero()[:count, 0]] = torch.arange(count)
        sizes = torch.bincount(example[labelled], minlength=max(count, 1)).double()
        weight = torch.where(labelled, 1 / sizes[example], 0.0)
        reference, old = -3 * torch.rand(2, len(row), generator=draw, dtype=torch.float64)
        advantage = torch.randn(max(count, 1), generator=draw, dtype=torch.float64)[example]
        side = 2.0 * torch.randint(2, row.shape, generator=draw).double() - 1
        columns = {"example": example, "weight": weight, "reference_log_probs": reference, "old_log_probs": old}
        columns |= {"advantage": advantage, "side": side}
        on_device = {key: column[None].to(labels.device) for key, column in columns.items()}
        found.append(Targets(row[None].to(labels.device), on_device, count))
    return found


def together(rows: list[Targets]) -> Targets:
    """A batch of sequences; examples are numbered through."""
    first, numbered = 0, []
    for row in rows:
        numbered.append({k: v + first if k == "example" else v for k, v in row.columns.items()})
        first += row.num_examples
    columns = {name: torch.cat([row[name] for row in numbered]) for name in numbered[0]}
    return Targets(torch.cat([row.labels for row in rows]), columns, first)


def plain_figures(name: str, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Sums of the loss and the metrics, and what they are divided by, from [B, T, V] logits, example by example."""
    labelled = targets.labels != IGNORED_LABEL
    chosen = logits.log_softmax(-1).gather(-1, targets.labels.clamp(min=0)[..., None])[..., 0]
    if name == "next_token":
        return -chosen[labelled].sum()[None], labelled.sum().double()
    found = []
    for number in range(targets.num_examples):
        own = labelled & (targets.columns["example"] == number)
        column = {key: value[own] for key, value in targets.columns.items()}
        found.append(_FIGURES[name](chosen[own], column))
    return torch.stack(found).sum(0), torch.tensor(float(len(found)), dtype=torch.float64, device=logits.device)


def _dpo(log_probs: Tensor, column: dict[str, Tensor]) -> Tensor:
    ratios = log_probs - column["reference_log_probs"]
    margin = ratios[column["side"] > 0].sum() - ratios[column["side"] < 0].sum()
    return torch.stack([-torch.sigmoid(0.7 * margin).log(), (margin > 0).double(), 0.7 * margin])


def _grpo(log_probs: Tensor, column: dict[str, Tensor]) -> Tensor:
    ratio, advantage = log_probs.exp() / column["old_log_probs"].exp(), column["advantage"]
    clipped = ratio.clamp(0.7, 1.3)
    of_reference = column["reference_log_probs"].exp() / log_probs.exp()
    divergence = of_reference - of_reference.log() - 1
    loss = -(torch.minimum(ratio * advantage, clipped * advantage) - 0.2 * divergence)
    no_gradient = ((ratio > 1.3) & (advantage > 0)) | ((ratio < 0.7) & (advantage < 0))
    return torch.stack([loss, no_gradient.double(), divergence]).mean(1)


def _on_policy(log_probs: Tensor, column: dict[str, Tensor]) -> Tensor:
    loss = -(log_probs.exp() / log_probs.exp().detach() * column["advantage"]).mean()
    return torch.stack([loss, torch.zeros_like(loss)])


_FIGURES = {"dpo": _dpo, "grpo": _grpo, "grpo-on-policy": _on_policy}
