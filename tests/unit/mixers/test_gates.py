"""Facts of each paper: ranges of decays and steps at initialisation and at the extremes, heads, options, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.cluster.resolve import resolve
from longtrain.core.errors import Refused
from longtrain.mixers import delta_net, gated_delta, hgrn2, kda, lightning, mamba2, retention
from longtrain.mixers._decay import DiscretizedDecay
from longtrain.mixers._projection import GroupNorm, unit
from longtrain_kernels.short_convolution.triton import MOST_TAPS
from tests.harness.mixers import RECURRENT
from tests.unit.mixers.test_layers import Recorder, mixer, rows, sequence

HEADS = {"num_heads": 4, "key_dim": 4, "value_dim": 3}
CONVOLVED = HEADS | {"conv_width": 4}


def recurrence(layer: Any, scale: float = 1.0) -> Any:
    """The operation that a layer builds for the same random rows."""
    handle: Recorder = sequence()
    layer(scale * rows(), handle)
    return handle.ops[0]


@pytest.mark.parametrize("name", sorted(set(RECURRENT) - {"linear_attention", "delta_net"}))
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_log_decays_are_finite_and_not_positive(name: str, scale: float) -> None:
    for layer in range(3):
        log_decay: Tensor = recurrence(mixer(name, layer, torch.float32).double(), scale).log_decay
        assert log_decay.isfinite().all() and (log_decay <= 0).all()


@pytest.mark.parametrize("name", ["linear_attention", "delta_net"])
def test_these_forget_nothing(name: str) -> None:
    assert recurrence(mixer(name)).log_decay is None


def test_retention_decays_by_one_minus_powers_of_two() -> None:
    config = retention.Config(**HEADS, rope_theta=1e4)
    decay = recurrence(retention.Mixer(config, 12).double()).log_decay.exp()
    torch.testing.assert_close(decay, 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64))


def test_lightning_decays_less_in_later_heads_and_layers() -> None:
    layer = lightning.Mixer(lightning.Config(**HEADS), 12).double()
    layer.num_layers, slopes = 5, []
    for layer.layer in range(5):
        slopes.append(-recurrence(layer).log_decay)
    first = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(slopes), first * torch.tensor([[1], [0.75], [0.5], [0.25], [0]]).double())


def test_the_builder_tells_each_mixer_its_depth() -> None:
    assert [(mixer("lightning", i).layer, mixer("lightning", i).num_layers) for i in range(3)] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_hgrn2_ties_keys_to_forget_gates_with_a_bound_that_grows_with_depth() -> None:
    layer = hgrn2.Mixer(hgrn2.Config(**HEADS), 12)
    layer.num_layers = 4
    logits = torch.tensor([-50.0, -3.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    for layer.layer in range(4):
        keys, log_decay = layer.gates(logits)
        bound = layer.layer / 4
        torch.testing.assert_close(log_decay.exp(), bound + (1 - bound) * logits.sigmoid())
        torch.testing.assert_close(keys, 1 - log_decay.exp())
        assert log_decay.isfinite().all() and (log_decay <= 0).all()


@pytest.mark.parametrize("rates", [(1.0, 16.0), (0.0, 16.0)])
def test_discretized_decays_start_in_mambas_ranges(rates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    decay = DiscretizedDecay(2000, rates=rates)
    rate, step = decay.log_rate.exp(), decay.step(torch.zeros(2000))
    assert rates[0] <= rate.min() < rates[0] + 0.2 and rates[1] - 0.2 < rate.max() <= rates[1] * (1 + 1e-6)
    assert 0.999e-3 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.1001
    assert step.log().mean().item() == pytest.approx((math.log(1e-3) + math.log(1e-1)) / 2, abs=0.1)
    torch.testing.assert_close(decay(torch.zeros(2000)), -rate * step)


def test_several_steps_share_their_heads_rate() -> None:
    decay = DiscretizedDecay(3, channels=5)
    logits = torch.randn(2, 7, 15)
    log_decay = decay(logits)
    assert log_decay.shape == (2, 7, 3, 5)
    torch.testing.assert_close(log_decay[:, :, 1, 2], -decay.log_rate[1].exp() * decay.step(logits)[:, :, 7])


def test_gla_divides_the_log_of_its_gate() -> None:
    layer = mixer("gla")
    decay: Any = layer.decay
    decay.up.weight.data.zero_()
    torch.testing.assert_close(recurrence(layer).log_decay, torch.full((1, 23, 2, 4), math.log(0.5) / 16).double())


@pytest.mark.parametrize(
    ("module", "options"),
    [(delta_net, {}), (gated_delta, {"num_value_heads": None}), (kda, {"num_value_heads": None})],
)
def test_negative_eigenvalues_double_the_step(module: Any, options: dict[str, Any]) -> None:
    betas = []
    for negative in (False, True):
        torch.manual_seed(0)
        config = module.Config(**CONVOLVED, **options, allow_negative_eigenvalues=negative)
        betas.append(recurrence(module.Mixer(config, 12).double(), scale=9.0).beta)
    assert betas[0].min() > 0 and betas[0].max() < 1 < betas[1].max() < 2
    torch.testing.assert_close(betas[1], 2 * betas[0])


@pytest.mark.parametrize("name", ["delta_net", "gated_delta", "kda"])
def test_keys_of_the_delta_rule_have_unit_length(name: str) -> None:
    op = recurrence(mixer(name))
    # 1e-6 beside the squared length: keys here are about 0.1 long
    torch.testing.assert_close(op.keys.norm(dim=-1), torch.ones(1, 23, 2).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(op.queries.norm(dim=-1), torch.full((1, 23, 2), 0.5).double(), rtol=1e-2, atol=0)
    assert not unit(torch.zeros(3)).any()


@pytest.mark.parametrize("name", ["mamba2", "kda"])
def test_a_key_head_serves_several_value_heads(name: str) -> None:
    op = recurrence(mixer(name))
    assert op.queries.shape == op.keys.shape == (1, 23, 2, 4)
    assert op.values.shape == (1, 23, 4, 3)
    assert op.log_decay.shape[:3] == (1, 23, 4)


def test_mamba2_discretizes_its_input_and_adds_a_skip() -> None:
    layer = mixer("mamba2", dtype=torch.float32)
    assert isinstance(layer, mamba2.Mixer)
    handle, x = sequence(), rows(dtype=torch.float32)
    _, _, v = layer.qkv(x, sequence())
    layer(x, handle)
    step = layer.decay.step(layer.step(x))
    torch.testing.assert_close(handle.ops[0].values, v * step.unsqueeze(-1))
    torch.testing.assert_close(handle.ops[0].log_decay, -layer.decay.log_rate.exp() * step)
    assert layer.skip.tolist() == [1, 1, 1, 1]
    assert layer.out.norm.weight.numel() == 6  # 4 heads of 3 channels, in the 2 groups that share B and C


def test_groups_are_normalised_each_by_itself() -> None:
    x = torch.randn(2, 5, 4, 3)
    normed = GroupNorm(6)(x)
    assert normed.shape == (2, 5, 12)
    torch.testing.assert_close(normed.unflatten(-1, (2, 6)).square().mean(-1), torch.ones(2, 5, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("pattern", "override", "expected"),
    [
        ("retention", "key_dim=31", "mixer.retention: key_dim=31 is odd; rotary positions need pairs, use 32"),
        ("mamba2", "num_heads=3", "mixer.mamba2: num_value_heads=8 is not a multiple of num_heads=3 key heads"),
        ("kda", "num_value_heads=6", "mixer.kda: num_value_heads=6 is not a multiple of num_heads=4 key heads"),
        ("gated_delta", "num_value_heads=0", "mixer.gated_delta.num_value_heads=0: must be greater than or equal to 1"),
        ("simple_gla", "conv_width=9", f"mixer.simple_gla.conv_width=9: must be less than or equal to {MOST_TAPS}"),
        ("gla", "gate_rank=0", "mixer.gla.gate_rank=0: must be greater than or equal to 1"),
        ("delta_net", "allow_negative_eigenvalues=2", "mixer.delta_net.allow_negative_eigenvalues=2: must be a valid"),
    ],
)
def test_mistakes_get_one_line(pattern: str, override: str, expected: str) -> None:
    with pytest.raises(Refused) as refused:
        resolve([f"model.pattern=[{pattern}]", f"mixer.{pattern}.{override}"])
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)
