"""Training as a whole: the same losses on any number of ranks, and the same bits after a stop and a resume."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.core.errors import CorruptCheckpoint, Refused
from longtrain.core.kinds import LayoutKind
from longtrain.core.registry import Registry
from longtrain.data.prepare import prepare
from longtrain.streaming.config import StreamConfig
from longtrain.telemetry.events import Started, StepDone, Warned
from longtrain.telemetry.records import check_ledger
from longtrain.training import rank
from longtrain_kernels.backend import Backend
from tests.harness.ranks import RankPool
from tests.harness.training import losses, tiny_config, train_rank, with_ranks


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = CheckpointStore(run / "checkpoints", keep=2).newest()
    assert found is not None
    return CheckpointStore(run / "checkpoints", keep=2).load(found.path)


def assert_same_bits(run: Path, other: Path) -> None:
    got, want = weights(run), weights(other)
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


def test_losses_do_not_depend_on_the_number_of_ranks(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    # 203 tokens: no multiple of anything; 4 ranks of 2 sequences; and 2 x 2 ranks, two sequences side by side
    config = tiny_config(tmp_path, context_length=203, steps=12)
    want = losses(train_rank(with_ranks(config, 1)))
    assert want[-1] < want[0] - 0.5
    cuts: list[tuple[int, int, str, LayoutKind]] = [
        (2, 2, "all_gather", "contiguous"),
        (4, 4, "pipeline", "contiguous"),
        (4, 2, "all_gather", "zigzag"),
    ]
    for world_size, sequence_size, scan, layout in cuts:
        same = with_ranks(config, sequence_size)
        cut = replace(same.sequence_parallel, scan=scan, layout=layout)
        name = f"world-{world_size}-{sequence_size}-{layout}"
        same = replace(same, run=replace(same.run, name=name), sequence_parallel=cut)
        got = losses(rank_pool(world_size).run(train_rank, same)[0])
        # float32 sums in another order, over 12 steps of a model that amplifies them; the project's bound
        assert got == pytest.approx(want, rel=1e-5), name


def test_streaming_changes_neither_losses_nor_counters(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = tiny_config(tmp_path, context_length=203, steps=4)
    whole = train_rank(with_ranks(config, 1))
    stream = StreamConfig(block_layers=1, chunk_tokens=29, logit_tokens=7, offload="host")
    for ranks, micro_batch_size in ((1, 1), (2, 2)):
        cut = with_ranks(config, ranks, micro_batch_size=micro_batch_size, stream=stream)
        cut = replace(cut, run=replace(cut.run, name=f"streamed-{ranks}"))
        events = rank_pool(ranks).run(train_rank, cut)[0] if ranks > 1 else train_rank(cut)
        assert losses(events) == pytest.approx(losses(whole), rel=1e-5)  # float32 sums in another order
        assert [(e.step, e.tokens) for e in events if isinstance(e, StepDone)] == [(n, n * 406) for n in range(1, 5)]
        assert check_ledger(config.run.dir / cut.run.name / "ledger.jsonl", last_step=4) == []


def test_another_context_length_needs_no_other_change(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = with_ranks(tiny_config(tmp_path, context_length=8 * 128, steps=2), 2)
    got = losses(rank_pool(2).run(train_rank, config)[0])
    assert len(got) == 2


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = with_ranks(tiny_config(tmp_path), 2)
    straight = replace(config, run=replace(config.run, name="straight"))
    want = losses(rank_pool(2).run(train_rank, straight)[0])
    first = rank_pool(2).run(train_rank, config, 3)[0]
    assert [e.step for e in first if isinstance(e, StepDone)] == [1, 2, 3]
    second = rank_pool(2).run(train_rank, config)[0]
    started = next(e for e in second if isinstance(e, Started))
    assert started.step == 3
    assert started.resumed_from == str(config.run.dir / "ranks-2" / "checkpoints" / "step-00000003")
    assert_same_bits(config.run.dir / "ranks-2", config.run.dir / "straight")
    assert check_ledger(config.run.dir / "ranks-2" / "ledger.jsonl", last_step=6) == []
    assert losses(first) + losses(second) == want


def test_resume_on_another_number_of_ranks_reads_the_same_tokens(
    tmp_path: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    config = with_ranks(tiny_config(tmp_path), 1)
    want = losses(train_rank(replace(config, run=replace(config.run, name="straight"))))
    train_rank(config, 3)
    wider = replace(config, sequence_parallel=replace(config.sequence_parallel, size=2))
    events = rank_pool(2).run(train_rank, wider)[0]
    assert losses(events) == pytest.approx(want[3:], rel=1e-5)  # as above
    assert check_ledger(config.run.dir / "ranks-1" / "ledger.jsonl", last_step=6) == []


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    train_rank(config)
    events = train_rank(config)
    assert losses(events) == []
    assert next(e for e in events if isinstance(e, Started)).step == 2


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    train_rank(replace(config, run=replace(config.run, name="straight")))
    train_rank(config, 4)
    run = config.run.dir / "run"
    shard = next((run / "checkpoints" / "step-00000004").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    events = train_rank(config)
    warnings = [e.message for e in events if isinstance(e, Warned)]
    assert len(warnings) == 1
    assert "step-00000004" in warnings[0]
    assert "step-00000004" in (run / "incidents.jsonl").read_text()
    assert [e.step for e in events if isinstance(e, StepDone)] == [3, 4, 5, 6]
    assert_same_bits(run, config.run.dir / "straight")
    assert check_ledger(run / "ledger.jsonl", last_step=6) == []


def test_a_resumed_run_says_where_auto_is_something_else_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    train_rank(config, 2)
    assert not [e for e in train_rank(config, 2) if isinstance(e, Warned)]
    monkeypatch.setattr(rank, "default_backend", lambda device: Backend.REFERENCE)
    warnings = [e.message for e in train_rank(config) if isinstance(e, Warned)]
    path = config.run.dir / "run" / "checkpoints" / "step-00000004"
    assert warnings == [
        f"mixer.backend=auto is reference now, and was chunked in {path}; mixer.backend=chunked would keep that"
    ]


def test_training_never_starts_again_when_all_checkpoints_are_corrupt(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    train_rank(config)
    for manifest in (config.run.dir / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CorruptCheckpoint, match="no usable checkpoint"):
        train_rank(config)


def test_training_never_starts_again_when_the_checkpoints_are_gone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    train_rank(config)
    ledger = (config.run.dir / "run" / "ledger.jsonl").read_bytes()
    shutil.rmtree(config.run.dir / "run" / "checkpoints")
    with pytest.raises(CorruptCheckpoint, match="2 committed steps in its ledger, but no checkpoint"):
        train_rank(config)
    assert (config.run.dir / "run" / "ledger.jsonl").read_bytes() == ledger


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume": "never"}, "resume=never, but"),
        ({"seed": 1}, "seed=1, but"),
        ({"model": "wider"}, r"model\.mlp_width=96, but .* was trained with 64"),
        ({"mixer": "window"}, r"mixer\.sliding_window\.window=3, but .* was trained with 40"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = tiny_config(tmp_path, steps=2)
    train_rank(config)
    if "model" in change:
        change = {"model": replace(config.model, mlp_width=96)}
    if "mixer" in change:  # the same shapes
        options = config.mixer.options
        options = options | {"sliding_window": replace(options["sliding_window"], window=3)}
        change = {"mixer": replace(config.mixer, options=options)}
    with pytest.raises(Refused, match=message):
        train_rank(replace(config, **change))


def test_resume_from_a_named_checkpoint_starts_a_run_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=4)
    train_rank(config)
    source = config.run.dir / "run" / "checkpoints" / "step-00000004"
    branch = replace(config, run=replace(config.run, name="branch"), resume=str(source), steps=6)
    events = train_rank(branch)
    assert [e.step for e in events if isinstance(e, StepDone)] == [5, 6]


def test_required_resume_is_refused_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no checkpoint to go on from"):
        train_rank(tiny_config(tmp_path, resume="required"))


def test_other_data_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=2)
    train_rank(config)
    (tmp_path / "source" / "this.py").write_text("something else\n")
    other = replace(config.data, store=tmp_path / "other")
    prepare(other, Registry())
    with pytest.raises(Refused, match="trained on other data"):
        train_rank(replace(config, data=other))
