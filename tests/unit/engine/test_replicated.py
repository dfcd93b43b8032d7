"""The schedule, the update, and a state that restores to the bit."""

import pytest
import torch
from torch import nn

from longtrain.comm.group import Group
from longtrain.engine.config import EngineConfig, OptimizerConfig
from longtrain.engine.replicated import ReplicatedEngine, learning_rate

OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=0.1,
    final_learning_rate_fraction=0.1,
    warmup_steps=4,
    betas=(0.9, 0.95),
    epsilon=1e-8,
    weight_decay=0.1,
    max_grad_norm=1.0,
)
ENGINE = EngineConfig(name="replicated", precision="float32", device="cpu")


def make_engine(seed: int) -> ReplicatedEngine:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 1))
    return ReplicatedEngine(model, ENGINE, OPTIMIZER, total_steps=20, world=Group(0, 1))


def step(engine: ReplicatedEngine, number: int) -> float:
    torch.manual_seed(number)
    engine.model(torch.randn(16, 4)).square().mean().backward()
    return engine.step(number).grad_norm


def test_the_schedule_warms_up_and_decays_to_its_final_fraction() -> None:
    rates = [learning_rate(OPTIMIZER, s, 20) for s in range(20)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


def test_restored_training_goes_on_to_the_bit() -> None:
    straight, stopped = make_engine(0), make_engine(0)
    for n in range(6):
        step(straight, n)
    for n in range(3):
        step(stopped, n)
    saved = {name: t.clone() for name, t in stopped.state().items()}
    restored = make_engine(1)
    restored.load_state(saved)
    for n in range(3, 6):
        step(restored, n)
    got, want = restored.state(), straight.state()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_only_matrices_decay() -> None:
    engine = make_engine(0)
    before = {name: t.clone() for name, t in engine.state().items()}
    (0.0 * torch.stack([p.sum() for p in engine.model.parameters()]).sum()).backward()
    engine.step(3)
    after = engine.state()
    shrunk = {n for n in before if n.startswith("model.") and not torch.equal(before[n], after[n])}
    assert shrunk == {"model.0.weight", "model.2.weight"}
    torch.testing.assert_close(after["model.0.weight"], before["model.0.weight"] * (1 - 0.1 * 0.1))


def test_the_gradient_is_clipped_to_its_norm() -> None:
    torch.manual_seed(0)
    engine = make_engine(0)
    (1e6 * engine.model(torch.randn(16, 4)).square().mean()).backward()
    result = engine.step(0)
    assert result.grad_norm > 1e3
    norms = [m.norm() for n, m in engine.state().items() if ".exp_avg." in n]
    # the first moment after one step is (1 - beta1) times the clipped gradient
    assert torch.stack(norms).norm().item() == pytest.approx(0.1 * OPTIMIZER.max_grad_norm, rel=1e-4)


def test_another_model_is_refused_by_the_name_of_a_parameter() -> None:
    engine = make_engine(0)
    step(engine, 0)
    saved = engine.state()
    with pytest.raises(ValueError, match=r"0\.weight.*nothing"):
        engine.load_state({n: t for n, t in saved.items() if n != "model.0.weight"})
    with pytest.raises(ValueError, match=r"extra.*the model does not"):
        engine.load_state({**saved, "model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"optimizer\.exp_avg\.0\.weight: the optimizer needs it"):
        engine.load_state({n: t for n, t in saved.items() if n != "optimizer.exp_avg.0.weight"})
    with pytest.raises(ValueError, match=r"2\.bias: model has .*\[1\], checkpoint has .*\[2\]"):
        engine.load_state({**saved, "model.2.bias": torch.zeros(2)})
