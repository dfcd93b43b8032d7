"""Who follows a run: the progress line, the tracker, `incidents.jsonl` and `config.yaml`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtrain.config.show import to_yaml
from longtrain.core.errors import Refused
from longtrain.telemetry.events import CheckpointDone, Event, Started, Warned
from longtrain.telemetry.progress import Progress
from longtrain.telemetry.records import RunRecords
from longtrain.telemetry.tracker import Tracker, hide_secrets


class RunObserver:
    """The `Observer` of a training run."""

    def __init__(self, directory: Path, tree: Mapping[str, Any], progress: Progress, tracker: Tracker) -> None:
        """`directory` is the run directory and exists."""
        self._directory, self._tree = directory, tree
        self._progress, self._tracker = progress, tracker
        self._records = RunRecords(directory)
        self._committed: int | None = None

    def event(self, event: Event) -> None:
        match event:
            case Started():
                # Only now: the ranks hold the run's lock, so this is the run that the directory belongs to.
                write_config(self._directory, self._tree)
                self._committed = event.step if event.resumed_from else None
            case CheckpointDone():
                self._committed = event.step
        self._progress.event(event)
        self._tracker.event(event)

    def incident(self, kind: str, message: str, **details: Any) -> None:
        if kind == "refused":  # a mistake, which the command tells when it ends; the run may be another job's
            return
        self._records.incident(kind, message, **details)
        decision = details.get("decision")
        self._progress.event(Warned(f"{message}; {decision}" if decision else message))

    def committed_step(self) -> int | None:
        return self._committed


def write_config(directory: Path, tree: Mapping[str, Any]) -> None:
    """Write the resolved configuration without secrets to `<run>/config.yaml`. Raises Refused, one line."""
    path, unfinished = directory / "config.yaml", directory / f".config.yaml.{os.getpid()}"
    try:
        unfinished.write_text(to_yaml(hide_secrets(tree)), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise Refused(f"{path} cannot be written ({error.strerror}); free space or set run.dir") from error
