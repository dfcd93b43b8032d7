"""The loss of next-token prediction."""

import torch

from longtrain.objectives import next_token


def test_masked_tokens_neither_count_nor_cost() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 50, dtype=torch.float64), torch.randint(50, (37,))
    labels[3:9] = -100
    objective = next_token.Objective(next_token.Config("next_token"))
    kept = labels != -100
    want = -logits.log_softmax(-1)[kept].gather(1, labels[kept, None]).sum()
    torch.testing.assert_close(objective.loss_sum(logits, labels), want)
    assert objective.count(labels).item() == 31


def test_logits_in_halves_are_scored_in_float32() -> None:
    logits = torch.randn(5, 50).bfloat16()
    objective = next_token.Objective(next_token.Config("next_token"))
    loss = objective.loss_sum(logits, torch.arange(5))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective.loss_sum(logits.float(), torch.arange(5)))
