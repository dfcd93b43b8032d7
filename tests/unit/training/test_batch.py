"""Every token of a step is read by one rank, whatever the cut."""

from pathlib import Path

import pytest
import torch

from longtrain.comm.group import Group
from longtrain.comm.journal import Journal
from longtrain.comm.mesh import Mesh
from longtrain.core.kinds import LayoutKind
from longtrain.core.registry import Registry
from longtrain.data.prepare import open_corpus
from longtrain.training.batch import BatchReader, BatchSizes, Cut
from tests.harness.training import tiny_config

CPU = torch.device("cpu")


def read(folder: Path, sizes: BatchSizes, cut: Cut, rank: int, ranks: int) -> list[torch.Tensor]:
    """Tokens of this rank's batches."""
    corpus = open_corpus(tiny_config(folder).data, Registry(), 0, sizes.context_length)
    sequence = Group(rank, ranks)
    mesh = Mesh(world=sequence, data=Group(0, 1), sequence=sequence, journal=Journal())
    return [batch.tokens for batch in BatchReader(corpus, sizes, cut, mesh, CPU).read(0)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7])
def test_ranks_share_the_tokens(tmp_path: Path, layout: LayoutKind, chunk_tokens: int | None) -> None:
    [whole] = read(tmp_path, BatchSizes(29, 2), Cut("contiguous"), 0, 1)
    parts = [read(tmp_path, BatchSizes(29, 2), Cut(layout, chunk_tokens), rank, 3)[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts, dim=1).sort().values, whole.sort().values)


def test_a_rank_may_have_no_tokens(tmp_path: Path) -> None:
    [tokens] = read(tmp_path, BatchSizes(3, 2), Cut("contiguous"), 3, 4)
    assert tokens.shape == (2, 0)


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    [whole] = read(tmp_path, BatchSizes(16, 5), Cut("contiguous"), 0, 1)
    parts = read(tmp_path, BatchSizes(16, 5, micro_batch_size=2), Cut("contiguous"), 0, 1)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), whole)
