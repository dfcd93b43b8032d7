"""A frozen model beside the one that is trained, for objectives that compare the two."""

from dataclasses import replace
from pathlib import Path

import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.core.registry import Registry
from longtrain.data.corpus import Corpus
from longtrain.model.build import build_model
from longtrain.model.model import Model
from longtrain.streaming.stream import Stream
from longtrain.training.batch import Batch, BatchReader
from longtrain.training.config import TrainingConfig
from longtrain.training.weights import load_weights


class ReferencedReader:
    """Reads batches and adds the column `reference_log_probs`, streamed through a frozen model."""

    def __init__(self, reader: BatchReader, stream: Stream) -> None:
        self._reader, self._stream = reader, stream
        self.tokens_per_step = reader.tokens_per_step

    def read(self, position: int) -> list[Batch]:
        """See `BatchReader.read`; here a collective of the ranks of a sequence."""
        return [self._referenced(batch) for batch in self._reader.read(position)]

    def _referenced(self, batch: Batch) -> Batch:
        found = self._stream.log_probs(batch.tokens, batch.targets.labels, batch.layout)
        columns = {**batch.targets.columns, "reference_log_probs": found}
        return replace(batch, targets=replace(batch.targets, columns=columns))


def load_reference(
    path: Path, config: TrainingConfig, corpus: Corpus, store: CheckpointStore, registry: Registry, device: torch.device
) -> Model:
    """The frozen model of a checkpoint, whose settings must be those of the model that is trained.

    A collective of all ranks. Raises CorruptCheckpoint where it is damaged, Refused where it is of another model.
    """
    model = build_model(config.model, config.mixer.options, corpus.vocab_size, config.seed, registry)
    model.to(device, torch.float64 if config.engine.precision == "float64" else None)
    load_weights(path, "objective.reference", model, config, corpus, store)
    return model.requires_grad_(False)
