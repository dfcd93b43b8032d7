"""Where a run executes and what it survives."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from longtrain.core.component import component
from longtrain.training.config import TrainingConfig

Seconds = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ClusterConfig:
    """`conf/cluster/*.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str
    """`local` starts Ray in this process; `auto` or `HOST:PORT` joins a cluster; `env`: this process is already one
    rank of a job (torchrun) and reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    workers: Annotated[int, Field(ge=1)] | None
    """Ranks in all, a multiple of `sequence_parallel.size`; null: one sequence-parallel group."""
    resources: dict[str, float]
    """Ray resources of one worker, such as `{CPU: 1, GPU: 1}`."""
    failure_policy: Annotated[Any, component("cluster.policies")]
    """What to do when a worker fails: a module of `cluster/policies/`."""
    max_failures: Annotated[int, Field(ge=0)]
    """Restarts from the last committed checkpoint before the run is given up."""
    start_timeout_seconds: Seconds
    """How long to wait for the cluster to provide the workers."""
    heartbeat_timeout_seconds: Seconds
    """A worker that has not been heard of for so long is treated as failed."""


@dataclass(frozen=True)
class JobConfig(TrainingConfig):
    """Root of the resolved configuration: what is trained, and where."""

    cluster: ClusterConfig
