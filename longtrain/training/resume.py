"""Where a run goes on: the newest usable checkpoint, checked against what is to be trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.checkpoint.store import CheckpointStore, Found
from longtrain.core.errors import Refused
from longtrain.data.corpus import Corpus
from longtrain.engine.replicated import ReplicatedEngine
from longtrain.telemetry.events import Event, Warned
from longtrain.telemetry.records import LedgerLine, RunRecords
from longtrain.training.config import TrainingConfig


@dataclass(frozen=True)
class Start:
    """The state that training starts from."""

    step: int
    tokens: int
    attempt: int
    """Which start of the workers this is, counted from 0."""
    path: str | None
    """The checkpoint, or None at step 0."""


def resume(
    config: TrainingConfig,
    store: CheckpointStore,
    engine: ReplicatedEngine,
    corpus: Corpus,
    records: RunRecords | None,
    event: Callable[[Event], None] | None,
) -> Start:
    """Load what `config.resume` names into the engine, on every rank; make the records agree with it on the writer.

    Raises CorruptCheckpoint where checkpoints exist but none is usable: a run never starts again by itself. Raises
    Refused where the checkpoint is of other data or of another model.
    """
    found = store.newest()
    if found is not None and config.resume == "never":
        raise Refused(
            f"resume=never, but {found.path} exists; choose another run.name, or resume=auto to go on from it"
        )
    if found is None and config.resume == "required":
        raise Refused("there is no checkpoint to go on from; check run.name and run.dir, or train from the start")
    initial = found is None and config.resume not in ("auto", "never", "required")
    if initial:
        found = store.at(Path(config.resume))
    if found is None:
        if records is not None:
            records.rewind(0, [])
        return Start(step=0, tokens=0, attempt=0, path=None)
    warnings = list(found.skipped)
    _load(found, store, engine, corpus, config.seed)
    if records is not None:
        # Another run's steps are in that run's ledger.
        tail = [] if initial else [LedgerLine(**line) for line in found.metadata["ledger"]]
        warnings += records.rewind(found.step, tail)
    if event is not None:
        for line in warnings:
            event(Warned(line))
    attempt = found.metadata["attempt"] + 1
    return Start(step=found.step, tokens=found.metadata["tokens"], attempt=attempt, path=str(found.path))


def _load(found: Found, store: CheckpointStore, engine: ReplicatedEngine, corpus: Corpus, seed: int) -> None:
    metadata: dict[str, Any] = found.metadata
    if metadata["corpus"] != corpus.digest:
        raise Refused(f"{found.path} was trained on other data; use the data it was trained on, or another run.name")
    if metadata["seed"] != seed:
        raise Refused(f"seed={seed}, but {found.path} was trained with seed={metadata['seed']}; use that seed")
    try:
        engine.load_state(store.load(found.path))
    except ValueError as error:
        raise Refused(f"{found.path} is of another model: {error}; use the same model, or another run.name") from error
