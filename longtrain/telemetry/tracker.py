"""Weights & Biases for those who ask for it (`telemetry.wandb=offline|online`). Training never fails for it."""

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longtrain.telemetry.config import TelemetryConfig
from longtrain.telemetry.events import Event, Started, StepDone, Warned

_LOGIN_SECONDS = 30.0
_FINISH_SECONDS = 60.0
_SECRET_WORDS = {"apikey", "token", "secret", "password", "passwd", "credential", "credentials", "auth"}
_SECRET_KEY = re.compile(r"(^|_)(api|access|private|secret|auth|ssh)_?key($|_)")  # `key_dim` is none
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_HIDDEN = "***"


class Tracker:
    """Sends every step to wandb. The first failure is told by one Warned and ends the tracking, not the training."""

    def __init__(
        self,
        config: TelemetryConfig,
        directory: Path,
        name: str,
        settings: Mapping[str, Any],
        warn: Callable[[Warned], None],
    ) -> None:
        """`directory` is the run directory, `settings` the resolved configuration; values that look secret are hidden.

        A run that is resumed goes on under its old identity, kept in `<run>/wandb.id`. It begins with the first
        `Started`, where online mode may wait for the service for up to half a minute.
        """
        self._run: Any = None
        self._warn = warn
        self._begin: Callable[[], None] | None = None
        if config.wandb != "disabled":
            self._begin = lambda: self._start(config, directory, name, settings)

    def event(self, event: Event) -> None:
        """Record a step; other events are not sent."""
        if isinstance(event, Started) and self._begin is not None:
            # Only now: the ranks hold the run's lock, so the identity in its directory is this job's to use.
            begin, self._begin = self._begin, None
            self._guarded("start", begin)
        if isinstance(event, StepDone) and self._run is not None:
            values = {key: value for key, value in event.values().items() if key != "step"}
            self._guarded("log", lambda: self._run.log(values, step=event.step))

    def close(self) -> None:
        """Flush; waits up to a minute for the service in online mode."""
        if self._run is not None:
            self._guarded("finish", lambda: self._run.finish())
            self._run = None

    def _start(self, config: TelemetryConfig, directory: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb  # takes 0.7 s, which a run without tracking need not spend

        options: dict[str, Any] = {
            "silent": True,
            "console": "off",  # the progress line owns the terminal
            "init_timeout": _LOGIN_SECONDS,
            "login_timeout": _LOGIN_SECONDS,
            # Arguments, host and installed packages are nobody's business unless they are in the settings.
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "disable_git": True,
        }
        if "finish_timeout" in wandb.Settings.model_fields:
            options["finish_timeout"] = _FINISH_SECONDS
        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=_identity(directory),
            resume="allow",
            dir=str(directory),
            mode=config.wandb,
            config=hide_secrets(settings),
            settings=wandb.Settings(**options),
        )

    def _guarded(self, doing: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service and its client come up with
            self._run = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._warn(Warned(f"wandb is off for the rest of this run: {doing} failed: {reason}"))


def hide_secrets(value: Any, name: str = "") -> Any:
    """A copy of a configuration tree with `***` for values whose name says secret and for credentials in URLs."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    if value is not None and (_SECRET_WORDS & set(plain.split("_")) or _SECRET_KEY.search(plain)):
        return _HIDDEN
    if isinstance(value, list | tuple):
        return [hide_secrets(item, name) for item in value]
    return _URL_USER.sub(_HIDDEN, value) if isinstance(value, str) else value


def _identity(directory: Path) -> str:
    path = directory / "wandb.id"
    if path.exists():
        return path.read_text().strip()
    identity = secrets.token_hex(4)
    path.write_text(identity + "\n")
    return identity
