"""Logits are made for the tokens that have a label, a few at a time."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from longtrain.core.targets import Targets
from longtrain.objectives import next_token
from longtrain.streaming.head import Head, pieces
from longtrain.streaming.sums import GradientSums


@pytest.mark.parametrize(
    ("without", "sizes"), [([], [4, 4, 4]), ([0, 5, 6, 11], [4, 4]), ([*range(11)], [1]), ([*range(12)], [0])]
)
def test_tokens_without_a_label_have_no_logits(without: list[int], sizes: list[int]) -> None:
    """A prompt may be far longer than what is predicted."""
    seen: list[int] = []

    def note(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        seen.append(len(output))

    torch.manual_seed(0)
    model = nn.Module()
    model.norm, model.head = nn.Identity(), nn.Linear(5, 7).double()
    model.head.register_forward_hook(note)
    sums = GradientSums(model.parameters())
    head = Head(model, next_token.Objective(next_token.Config("next_token")), sums, nullcontext)  # type: ignore[arg-type]
    hidden, labels = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(7, (2, 6))
    labels.view(-1)[without] = -100
    asked = pieces(Targets(labels), 4)
    assert [piece.targets.labels.numel() for piece in asked] == sizes
    found = head.log_probs(hidden, labels, asked)
    total, grad = head.backward(hidden, asked, torch.tensor(0.5, dtype=torch.float64))
    assert seen == 2 * [size for size in sizes if size]

    leaf = hidden.clone().requires_grad_()
    want = model.head(leaf).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    want = torch.where(labels == -100, 0, want)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(total, -want.sum())
    want_grad, *want_grads = torch.autograd.grad(-0.5 * want.sum(), [leaf, *model.head.parameters()])
    torch.testing.assert_close(grad, want_grad)
    sums.deliver()
    torch.testing.assert_close([p.grad for p in model.head.parameters()], want_grads)


def test_examples_of_a_piece_are_known() -> None:
    example = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3]])
    labels = torch.tensor([[5, -100, 5, 5, 5, -100, 5, 5]])
    asked = pieces(Targets(labels, {"example": example}, 4), 3)
    assert [piece.targets.examples for piece in asked] == [range(2), range(2, 4)]
