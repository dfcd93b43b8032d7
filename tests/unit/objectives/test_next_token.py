"""The loss of next-token prediction."""

from contextlib import nullcontext

import torch
from torch import nn

from longtrain.core.targets import Targets
from longtrain.objectives import next_token
from longtrain.streaming.head import Head, pieces
from longtrain.streaming.sums import GradientSums

OBJECTIVE = next_token.Objective(next_token.Config("next_token"))


def test_tokens_without_a_label_do_not_count() -> None:
    labels = torch.randint(50, (37,))
    labels[3:9] = -100
    assert OBJECTIVE.count(Targets(labels)).item() == 31


def test_logits_in_halves_are_scored_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.norm, model.head = nn.Identity(), nn.Linear(8, 50).bfloat16()
    head = Head(model, OBJECTIVE, GradientSums([]), nullcontext)  # type: ignore[arg-type]
    hidden, labels = torch.randn(1, 5, 8).bfloat16(), torch.arange(5)[None]
    logits = model.head(hidden)[0].double()
    want = -logits.log_softmax(-1)[labels[0], labels[0]].sum()
    # Rounding of float32; log-probabilities in halves are wrong by 1e-2.
    torch.testing.assert_close(head.sums(hidden, pieces(Targets(labels), 3)), want, rtol=1e-6, atol=0)
