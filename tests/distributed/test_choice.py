"""`auto` on several ranks: all choose alike, and a model trains with what they chose."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.comm.mesh import build_mesh
from longtrain.core.registry import Registry
from longtrain.model.automatic import Batch, name_algorithms
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.telemetry.events import Started
from tests.harness.mixers import MIXERS
from tests.harness.ranks import RankPool
from tests.harness.training import losses, tiny_config, train_rank, with_ranks

AUTO = SequenceParallelConfig(
    size=3, scan="auto", attend="auto", layout="zigzag", block_attention="auto", copy_engines=True
)


def named(sequence_size: int) -> tuple[str, str, dict[str, str]]:
    model = build_model(ModelConfig(12, 2, ("gla", "softmax"), 16, False, 1e-6, 0.5), MIXERS, 11, 3, Registry())
    mesh = build_mesh(sequence_size)
    config, choices = name_algorithms(AUTO, model, Batch(1, 99), mesh, torch.device("cpu"), nullcontext(), Registry())
    return config.scan, config.attend, {key: choice.name for key, choice in choices.items()}


@pytest.mark.parametrize(("world_size", "sequence_size"), [(3, 3), (4, 2)])
def test_all_ranks_choose_alike(rank_pool: Callable[[int], RankPool], world_size: int, sequence_size: int) -> None:
    # two groups of two measure apart, and go by the slowest of the job
    first, *others = rank_pool(world_size).run(named, sequence_size)
    scan, attend, choices = first
    assert others == [first] * (world_size - 1)
    assert choices == {
        "sequence_parallel.scan": scan,
        "sequence_parallel.attend": attend,
        "sequence_parallel.block_attention": "flash",
    }


def test_training_tells_its_choice(tmp_path: Path, rank_pool: Callable[[int], RankPool]) -> None:
    config = tiny_config(tmp_path, steps=2)
    want = losses(train_rank(with_ranks(config, 1)))
    config = with_ranks(config, 2)
    cut = replace(config.sequence_parallel, scan="auto", attend="auto")
    events = rank_pool(2).run(train_rank, replace(config, sequence_parallel=cut))[0]
    started = next(e for e in events if isinstance(e, Started))
    assert [line.partition("=")[0] for line in started.choices] == [
        "sequence_parallel.scan",
        "sequence_parallel.attend",
    ]
    torch.testing.assert_close(losses(events), want, rtol=1e-5, atol=0)
    found = CheckpointStore(config.run.dir / "ranks-2" / "checkpoints", keep=2).newest()
    assert found is not None
    assert found.metadata["automatic"] == {
        **dict(line.split(" ")[0].split("=") for line in started.choices),
        "sequence_parallel.block_attention": "flash",
        "mixer.backend": "chunked",
    }
