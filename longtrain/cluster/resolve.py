"""From a command line's overrides to a checked job: the one way in for every command."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longtrain.cluster.config import JobConfig, check_job
from longtrain.config.compose import compose
from longtrain.config.identity import run_name
from longtrain.config.load import load_config
from longtrain.core.registry import Registry


@dataclass(frozen=True)
class ResolvedJob:
    """A configuration that has passed every check that needs no process, file or device."""

    config: JobConfig
    tree: dict[str, Any]
    """What `config` was loaded from, with `run.name` filled in: plain mappings, lists and scalars."""
    origins: dict[str, str]
    """Where each leaf of `tree` was set, by dotted key."""
    registry: Registry


def resolve(overrides: Sequence[str]) -> ResolvedJob:
    """Compose, load, check and name a job. Raises Refused, in one line."""
    composed = compose(overrides)
    registry = Registry(composed.plugins)
    config = load_config(JobConfig, composed.tree, registry)
    check_job(config, registry)
    if config.run.name is not None:
        return ResolvedJob(config, composed.tree, composed.origins, registry)
    name = run_name(config, composed.choices.get("model", "model"))
    tree = composed.tree | {"run": composed.tree["run"] | {"name": name}}
    origins = composed.origins | {"run.name": "derived from the settings"}
    return ResolvedJob(replace(config, run=replace(config.run, name=name)), tree, origins, registry)
