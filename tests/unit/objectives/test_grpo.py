"""What rollouts may do to the clipped loss; its definition is compared in tests/unit/streaming."""

import pytest
import torch

from longtrain.core.targets import Targets
from longtrain.objectives import grpo


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("old", [-900.0, -0.1, 0.0])
def test_a_ratio_that_overflows_leaves_gradients_finite(advantage: float, old: float) -> None:
    objective = grpo.Objective(grpo.Config("grpo", clip=0.2, kl_coefficient=0.1, reference=None, on_policy=False))
    column = {"weight": 1.0, "advantage": advantage, "old_log_probs": old, "reference_log_probs": -900.0 - old}
    columns = {name: torch.full((1,), value, dtype=torch.float64) for name, value in column.items()}
    log_probs = torch.tensor([-0.5], requires_grad=True)
    sums = objective.sums(log_probs, Targets(torch.zeros(1, dtype=torch.int64), columns, 1))
    [grad] = torch.autograd.grad(objective.loss_sum(sums), log_probs)
    assert sums.isfinite().all() and grad.isfinite().all()
