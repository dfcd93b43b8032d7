"""The model's parameters are a function of the seed alone."""

import pytest
import torch

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.mixers import gated_delta, simple_gla, softmax
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig, parse_pattern
from longtrain.model.model import Model

MIXERS = {
    "softmax": softmax.Config(num_heads=2, num_key_value_heads=1, head_dim=8, rope_theta=1e4),
    "simple_gla": simple_gla.Config(num_heads=2, key_dim=8, value_dim=8, conv_width=4),
    "gated_delta": gated_delta.Config(
        num_heads=2, key_dim=8, value_dim=8, conv_width=4, num_value_heads=None, allow_negative_eigenvalues=False
    ),
}


def build(seed: int, *, tied: bool = False) -> Model:
    config = ModelConfig(16, 4, ("simple_gla", "gated_delta", "softmax x2"), 32, tied, 1e-6, 0.02)
    return build_model(config, MIXERS, 50, seed, Registry())


def test_the_seed_alone_decides_the_parameters() -> None:
    torch.manual_seed(1)
    first = build(0).state_dict()
    torch.manual_seed(2)
    again, other = build(0).state_dict(), build(1).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    build(0)
    assert torch.equal(torch.rand(3), want)


def test_tied_embeddings_are_one_parameter() -> None:
    tied = build(0, tied=True)
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())


def test_residual_outputs_start_smaller_with_depth() -> None:
    model = build(0)
    stds = {n: p.std().item() for n, p in model.named_parameters() if n.endswith(("output.weight", "input.weight"))}
    for name, std in stds.items():
        assert std == pytest.approx(0.02 / (8**0.5 if "output" in name else 1), rel=0.2), name


@pytest.mark.parametrize("entry", ["softmax x", "softmax*3", "", "soft max"])
def test_a_pattern_that_cannot_be_read_is_refused(entry: str) -> None:
    with pytest.raises(Refused, match=r"model\.pattern"):
        parse_pattern([entry])
