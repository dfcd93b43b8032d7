"""Training on preferences and rollouts: losses fall, and do not depend on ranks, chunks or where a run was stopped."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.data.prepare import prepare
from longtrain.data.sources import preference, rollouts
from longtrain.objectives import dpo, grpo
from longtrain.telemetry.events import Started, StepDone, Warned
from longtrain.training.config import TrainingConfig
from tests.harness.ranks import RankPool
from tests.harness.training import losses, tiny_config, train_rank, with_ranks

UNIFORM = -math.log(257)
"""What a token's log-probability is, nearly, under a new model."""


def preferences(folder: Path, **changes: Any) -> TrainingConfig:
    """Of two words, the one that begins like the prompt."""
    rows = []
    for number in range(40):
        word, other = ("lo" * (1 + number % 5), "hi" * (1 + number % 3))[:: 1 if number % 2 else -1]
        row = {"prompt": f"{word[0]}? ", "chosen": word, "rejected": other}
        references = {f"reference_{side}": UNIFORM * (1 + len(row[side])) for side in ("chosen", "rejected")}
        rows.append(row | references)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = preference.Config("preference", "bytes", None, folder / "pairs", folder / "pairs.jsonl")
    prepare(data, Registry())
    return tiny_config(folder, objective=dpo.Config("dpo", beta=0.2, reference=None), data=data, **changes)


def sampled(folder: Path, given: str, **changes: Any) -> TrainingConfig:
    """Of two completions of a prompt, one was right. All of them fit into one sequence."""
    rows: list[dict[str, Any]] = [
        {"prompt": [65 + n // 2], "completion": [66 + n % 2] * (1 + n % 4), "group": n // 2, "reward": n % 2}
        for n in range(40)
    ]
    if "old" in given:
        lengths = [len(row["completion"]) for row in rows]
        # Not the same anywhere, so that one at another token would be seen.
        old = [[UNIFORM + 0.03 * ((n + i) % 7) for i in range(length)] for n, length in enumerate(lengths)]
        rows = [row | {"old_log_probs": numbers} for row, numbers in zip(rows, old, strict=True)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = rollouts.Config("rollouts", "bytes", None, folder / "sampled", folder / "rollouts.jsonl")
    prepare(data, Registry())
    objective = grpo.Config("grpo", clip=0.2, kl_coefficient=0.0, reference=None, on_policy=False)
    return tiny_config(folder, objective=objective, data=data, context_length=256, **changes)


def test_preferences_are_learnt_on_any_number_of_ranks(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = preferences(tmp_path, steps=12)
    want = losses(train_rank(with_ranks(config, 1)))
    assert want[0] == pytest.approx(0.693, abs=0.15), "a new model has no preference"
    assert want[-1] < want[0] - 0.2
    cut = replace(config.sequence_parallel, layout="zigzag")
    stream = replace(config.stream, chunk_tokens=29, block_layers=2)
    streamed = replace(with_ranks(replace(config, sequence_parallel=cut), 2), stream=stream, micro_batch_size=1)
    # float32 sums in another order, over 12 steps of a model that amplifies them; the project's bound
    assert losses(rank_pool(2).run(train_rank, streamed)[0]) == pytest.approx(want, rel=1e-5)


def test_a_run_on_examples_goes_on_to_the_bit_and_with_its_context_alone(tmp_path: Path) -> None:
    config = preferences(tmp_path)
    text = tiny_config(tmp_path, steps=1, run=replace(config.run, name="text"))
    train_rank(text)
    with pytest.raises(
        Refused, match=r"other data with objective=next_token, not dpo; .* initial_weights=\S*step-0+1 "
    ):
        train_rank(replace(config, run=text.run))
    want = losses(train_rank(replace(config, run=replace(config.run, name="straight"))))
    first = losses(train_rank(config, 2))
    with pytest.raises(Refused, match=r"context_length=256, but .* was trained with 128"):
        train_rank(replace(config, context_length=256))
    assert first + losses(train_rank(config)) == want
    dearer = replace(config, objective=replace(config.objective, beta=0.3), steps=config.steps + 1)
    said = [event.message for event in train_rank(dearer) if isinstance(event, Warned)]
    assert [line for line in said if line.startswith("objective.beta=0.3 now, and was 0.2 in ")]


def test_completions_with_an_advantage_become_likelier(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = sampled(tmp_path, "old", steps=10)
    want = losses(train_rank(with_ranks(config, 1)))
    # Half of the advantages are 1 and half -1, and a clipped ratio gains at most 1.2 and 0.8 of them: never below -0.2.
    assert -0.2 <= want[-1] < min(-0.1, want[0])
    zigzag = replace(config.sequence_parallel, layout="zigzag")
    cut = with_ranks(replace(config, sequence_parallel=zigzag, stream=replace(config.stream, chunk_tokens=60)), 2)
    assert losses(rank_pool(2).run(train_rank, cut)[0]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_divergence_from_a_frozen_model_is_told_and_grows(tmp_path: Path) -> None:
    text = tiny_config(tmp_path, steps=1, context_length=256)
    train_rank(replace(text, run=replace(text.run, name="pretrained")))
    path = text.run.dir / "pretrained" / "checkpoints" / "step-00000001"
    config = replace(sampled(tmp_path, "nothing", steps=5), initial_weights=path)
    held = replace(config.objective, on_policy=True, kl_coefficient=0.1, reference=path)
    told = [event.metrics for event in train_rank(replace(config, objective=held)) if isinstance(event, StepDone)]
    assert [set(metrics) for metrics in told] == [{"clip_fraction", "kl"}] * 5
    assert told[0]["kl"] == pytest.approx(0, abs=1e-9) and told[-1]["kl"] > 1e-4
    assert {metrics["clip_fraction"] for metrics in told} == {0.0}, "the ratio to itself is 1"


def test_data_without_what_the_objective_needs_are_refused(tmp_path: Path) -> None:
    config = sampled(tmp_path, "nothing", steps=1)
    with pytest.raises(
        Refused, match=r"objective=grpo needs old_log_probs, .* data=rollouts .* or set objective.on_policy=true"
    ):
        train_rank(config)
    [loss] = losses(train_rank(replace(config, objective=replace(config.objective, on_policy=True))))
    assert loss == pytest.approx(0, abs=1e-6), "ratios are 1"


def test_the_weights_of_a_run_on_text_learn_preferences(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """They are the reference at first, so that no pair is preferred; the data and the optimizer are new."""
    text = tiny_config(tmp_path, steps=2)
    train_rank(replace(text, run=replace(text.run, name="pretrained")))
    path = text.run.dir / "pretrained" / "checkpoints" / "step-00000002"
    config = replace(preferences(tmp_path, steps=4), initial_weights=path)
    frozen = replace(config, objective=replace(config.objective, reference=path))
    want = losses(train_rank(with_ranks(frozen, 1)))
    assert want[0] == pytest.approx(math.log(2), abs=1e-6)
    assert want[-1] < want[0] - 0.03
    first = losses(rank_pool(2).run(train_rank, with_ranks(frozen, 2), 2)[0])
    away = replace(with_ranks(frozen, 2), initial_weights=tmp_path / "nowhere")  # no longer looked at
    events = rank_pool(2).run(train_rank, away)[0]
    assert first + losses(events) == pytest.approx(want, rel=1e-5)
    [started] = [event for event in events if isinstance(event, Started)]
    assert started.resumed_from and started.initial_weights == str(away.initial_weights)
    other = replace(config.model, norm_epsilon=1e-5)
    with pytest.raises(Refused, match=r"initial_weights=.* was trained with model\.norm_epsilon=1e-06, not 1e-05"):
        train_rank(replace(config, model=other, run=replace(config.run, name="other")))


def test_a_frozen_model_is_what_the_data_would_have_said(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """A new model's first checkpoint, after a step at no learning rate, is that model: no pair is preferred to it."""
    config = preferences(tmp_path, steps=4)
    still = replace(config.optimizer, learning_rate=0.0, weight_decay=0.0)
    train_rank(replace(config, steps=1, optimizer=still, run=replace(config.run, name="reference")))
    path = config.run.dir / "reference" / "checkpoints" / "step-00000001"
    frozen = replace(config, objective=replace(config.objective, reference=path))
    want = losses(train_rank(with_ranks(frozen, 1)))
    assert want[0] == pytest.approx(math.log(2), abs=1e-6)
    assert want[-1] < want[0] - 0.05
    streamed = replace(with_ranks(frozen, 2), stream=replace(config.stream, chunk_tokens=29, block_layers=2))
    assert losses(rank_pool(2).run(train_rank, streamed)[0]) == pytest.approx(want, rel=1e-5)
    with pytest.raises(Refused, match=r"objective\.reference=.* was trained with model\.mlp_width=64, not 32"):
        train_rank(replace(frozen, model=replace(config.model, mlp_width=32), run=replace(config.run, name="other")))
