"""Where a run goes on: the newest usable checkpoint, checked against what is to be trained."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtrain.checkpoint.ranks import decide
from longtrain.checkpoint.store import CheckpointStore, Found
from longtrain.core.errors import CorruptCheckpoint, Refused
from longtrain.data.corpus import Corpus
from longtrain.engine.replicated import ReplicatedEngine
from longtrain.telemetry.events import Event, Warned
from longtrain.telemetry.records import LedgerLine, RunRecords
from longtrain.training.config import RESUME_WORDS, TrainingConfig


@dataclass(frozen=True)
class Start:
    """The state that training starts from."""

    step: int
    tokens: int
    attempt: int
    """Which start of the workers this is, counted from 0."""
    path: str | None
    """The checkpoint, or None at step 0."""


def identity(config: TrainingConfig, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from: the model, its mixers, the seed and the data.

    Shapes alone do not tell: another window or rotary base fits the same tensors. Examples are packed into sequences of
    one length, whose number is where the run is.
    """
    packed = {"context_length": config.context_length} if corpus.columns else {}
    return packed | {"seed": config.seed, "data": corpus.digest} | model_identity(config)


def about(config: TrainingConfig, corpus: Corpus, automatic: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint tells of its run; `automatic` is what `auto` has chosen, by key."""
    return {
        "identity": identity(config, corpus),
        "tokenizer": corpus.tokenizer,
        "objective": _plain(asdict(config.objective)),
        "automatic": dict(automatic),
    }


def model_identity(config: TrainingConfig) -> dict[str, Any]:
    """What must be the same for weights to mean the same."""
    return {
        "model": _plain(asdict(config.model)),
        "mixer": {name: _plain(asdict(mixer)) for name, mixer in config.mixer.options.items()},
    }


def resume(
    config: TrainingConfig,
    store: CheckpointStore,
    engine: ReplicatedEngine,
    wanted: Mapping[str, Any],
    records: RunRecords | None,
    event: Callable[[Event], None] | None,
) -> Start:
    """Load what `config.resume` names into the engine, on every rank; make the records agree with it on the writer.

    Raises CorruptCheckpoint where the run has committed steps but no usable checkpoint: it never starts again by
    itself. Raises Refused where the checkpoint is of other data or of another model. `wanted` is what `about` tells of
    this start; where the objective or what `auto` chose was another when the checkpoint was made, the user is warned.
    """
    found = store.newest()
    committed = decide(lambda: records.committed_steps() if records is not None else 0, store.journal)
    if found is not None and config.resume == "never":
        raise Refused(
            f"resume=never, but {found.path} exists; choose another run.name, or resume=auto to go on from it"
        )
    if found is None and committed:
        raise CorruptCheckpoint(
            f"run {config.run.name} has {committed} committed steps in its ledger, but no checkpoint; "
            "restore one, or choose another run.name"
        )
    if found is None and config.resume == "required":
        raise Refused("there is no checkpoint to go on from; check run.name and run.dir, or train from the start")
    initial = found is None and config.resume not in RESUME_WORDS
    if initial:
        found = store.at(Path(config.resume).expanduser())
    if found is None:
        if records is not None:
            records.rewind(0, [])
        return Start(step=0, tokens=0, attempt=0, path=None)
    warnings = [*found.skipped, *_other_objective(found, wanted), *_other_choices(found, wanted["automatic"])]
    _load(found, store, engine, wanted)
    if records is not None:
        for line in found.skipped:
            records.incident("checkpoint", line)
        # Another run's steps are in that run's ledger.
        tail = [] if initial else [LedgerLine(**line) for line in found.metadata["ledger"]]
        warnings += records.rewind(found.step, tail)
    if event is not None:
        for line in warnings:
            event(Warned(line))
    attempt = found.metadata["attempt"] + 1
    return Start(step=found.step, tokens=found.metadata["tokens"], attempt=attempt, path=str(found.path))


def _load(found: Found, store: CheckpointStore, engine: ReplicatedEngine, wanted: Mapping[str, Any]) -> None:
    different = differences(found.metadata["identity"], wanted["identity"])
    if any(key == "data" for key, *_ in different):
        before, now = (told.get("objective", {}).get("name") for told in (found.metadata, wanted))
        objective = "" if before in (None, now) else f" with objective={before}, not {now}"
        raise Refused(
            f"{found.path} was trained on other data{objective}; use that data, or another run.name, which "
            f"initial_weights={found.path} would start from its weights"
        )
    for key, trained, asked in different:
        raise Refused(f"{key}={asked}, but {found.path} was trained with {trained}; use that, or another run.name")
    try:
        engine.load_state(store.load(found.path))
    except ValueError as error:
        raise Refused(f"{found.path} is of another model: {error}; use the same model, or another run.name") from error


def _other_objective(found: Found, wanted: Mapping[str, Any]) -> list[str]:
    """A line for each setting that is another: losses before and after do not compare."""
    before, now = found.metadata.get("objective", wanted["objective"]), wanted["objective"]
    return [
        f"{key}={asked} now, and was {trained} in {found.path}: losses before and after it are of different kinds"
        for key, trained, asked in differences(before, now, "objective")
    ]


def _other_choices(found: Found, automatic: Mapping[str, str]) -> list[str]:
    """A line for each `auto` that is not what it was: the numbers that follow agree up to rounding only."""
    before = found.metadata.get("automatic", {})
    return [
        f"{key}=auto is {name} now, and was {before[key]} in {found.path}; {key}={before[key]} would keep that"
        for key, name in automatic.items()
        if before.get(key, name) != name
    ]


def differences(trained: Any, asked: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves that differ, as (dotted key, trained with, asked for)."""
    if isinstance(trained, dict) and isinstance(asked, dict):
        names = sorted(trained.keys() | asked.keys())
        return [d for n in names for d in differences(trained.get(n), asked.get(n), f"{key}.{n}" if key else n)]
    return [] if trained == asked else [(key, trained, asked)]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return dict(json.loads(json.dumps(settings, default=str)))
