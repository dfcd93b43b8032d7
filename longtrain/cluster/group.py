"""The workers of one job as Ray actors in one placement group, which is kept over restarts."""

import sys
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from longtrain.cluster.controller import Done, Report
from longtrain.cluster.failure import Failure, Fault
from longtrain.cluster.mailbox import BEAT_SECONDS, Mailbox
from longtrain.cluster.pulse import Pulse
from longtrain.cluster.ranks import DOMAIN_LABEL, Place, Seat, assign_ranks
from longtrain.cluster.worker import Probe, Raised, Work, Worker
from longtrain.core.errors import Refused, WorkerFailed

_MAIL_SECONDS = 5.0
"""The mailbox is on the driver's node and only stores; one that takes longer to answer is taken for lost."""


class _Call(Enum):
    """What an answer that is still to come belongs to, with a worker's index (PREPARE) or rank."""

    OPEN = auto()
    PREPARE = auto()
    HOST_STORE = auto()
    RUN = auto()


class RayWorkerGroup:
    """A `WorkerGroup`. Needs an initialised Ray."""

    def __init__(self, work: Work, size: int, group_size: int, resources: Mapping[str, float]) -> None:
        """Raises Refused for resources that a rank cannot use."""
        self.size = size
        self._work, self._group_size = work, group_size
        self._resources = check_resources(resources)
        self._placement: PlacementGroup | None = None
        self._mailbox: Any = None
        self._attempt = 0
        self._drain: Any = None
        self._forget_attempt()

    def _forget_attempt(self) -> None:
        self._workers: list[Any] = []
        self._pending: dict[Any, tuple[_Call, int]] = {}
        self._probes: dict[int, Probe] = {}
        self._places: list[Place] = []
        self._mailbox_is_open = self._running = False

    def place(self, timeout: float) -> bool:
        if self._placement is None:
            # Ray drops bundle entries of value 0 (check_resources removes them), so the bundles stay in order.
            self._open_mailbox()
            self._placement = placement_group([dict(self._resources)] * self.size, strategy="PACK")
        try:
            return self._placement.wait(timeout)
        except Exception as error:  # Ray raises a plain one where the placement went with the node that held it
            reason = str(error).strip().splitlines()[0]
            raise WorkerFailed(
                f"the cluster lost the workers' places ({reason}); run the same command again"
            ) from error

    def shortage(self) -> str:
        asked = {name: amount * self.size for name, amount in self._resources.items()}
        have, free = ray.cluster_resources(), ray.available_resources()
        parts = [f"{name} {free.get(name, 0):g} of {have.get(name, 0):g}" for name in asked]
        total = ", ".join(f"{name} {amount:g}" for name, amount in asked.items())
        return f"{self.size} workers need {total} in all; the cluster has free: {', '.join(parts)}; use fewer workers"

    def start(self, attempt: int) -> None:
        assert self._placement is not None, "start follows place"
        self._attempt = attempt
        self._open_mailbox()
        self._pending[self._mailbox.open.remote(attempt)] = (_Call.OPEN, 0)
        self._drain = self._mailbox.drain.remote(attempt, BEAT_SECONDS)
        self._workers = [
            ray.remote(Worker)
            .options(
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
                **actor_resources(self._resources),
            )
            .remote()
            for index in range(self.size)
        ]
        threads = {"OMP_NUM_THREADS": str(max(1, int(self._resources.get("CPU", 1))))}
        for index, worker in enumerate(self._workers):
            self._pending[worker.prepare.remote(self._work, threads)] = (_Call.PREPARE, index)

    def _open_mailbox(self) -> None:
        if self._mailbox is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    def poll(self, timeout: float) -> Report:
        # An answer is waited for once: a reference that stays in the list once ready makes every wait return at once.
        waiting = [*self._pending, self._drain]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=max(timeout, 0.0))
        if ready:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        failures: list[Failure] = []
        done: dict[int, Done] = {}
        for reference in ready:
            if reference in self._pending:
                answer = self._take(reference, done)
                failures += [answer] if isinstance(answer, Failure) else []
        if len(self._probes) == self.size and self._mailbox_is_open and not self._places:
            self._seat()
        pulses, events = self._mail(ready, failures, flush=bool(done or failures))
        return Report(self._running, pulses, tuple(events), done, tuple(failures))

    def _take(self, reference: Any, done: dict[int, Done]) -> Failure | None:
        """Go on with what a worker answered: prepared -> ranks -> the store beside rank 0 -> all ranks run -> done."""
        call, index = self._pending.pop(reference)
        rank = index if self._places else None
        name = self.name(index) if self._places else f"worker {index}"
        try:
            answer = ray.get(reference)
        except RayError as error:
            # A mailbox that is lost is noticed when it is emptied.
            return None if call is _Call.OPEN else _lost(error, rank, name)
        if isinstance(answer, Raised):
            fault = Fault.REFUSED if isinstance(answer.error(), Refused) else Fault.RAISED
            return Failure(fault, rank, f"{name} raised {answer.summary}", answer.error(), answer.traceback)
        match call:
            case _Call.OPEN:
                self._mailbox_is_open = True
            case _Call.PREPARE:
                self._probes[index] = answer
            case _Call.HOST_STORE:
                self._launch(port=answer)
            case _Call.RUN:
                done[index] = answer
        return None

    def stop(self) -> None:
        self._mailbox.stop.remote()

    def kill(self) -> None:
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._forget_attempt()

    def release(self) -> None:
        if self._mailbox is not None:
            ray.kill(self._mailbox)
            self._mailbox = None
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def name(self, rank: int) -> str:
        seat = self._places[rank].seat
        return f"rank {rank} (process {self._probes[seat.index].process_id} on {seat.ip})"

    def _seat(self) -> None:
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        seats = []
        for index, probe in self._probes.items():
            node = nodes[probe.node_id]
            domain = node.get("Labels", {}).get(DOMAIN_LABEL, "")
            seats.append(Seat(index, probe.node_id, node["NodeManagerAddress"], domain, probe.gpu_ids))
        self._places = assign_ranks(seats, self._group_size)
        first = self._workers[self._places[0].seat.index]
        self._pending[first.host_store.remote(self._store_address())] = (_Call.HOST_STORE, 0)

    def _on_one_host(self) -> bool:
        return len({place.seat.ip for place in self._places}) == 1

    def _store_address(self) -> str:
        return "127.0.0.1" if self._on_one_host() else self._places[0].seat.ip

    def _launch(self, port: int) -> None:
        # Gloo otherwise looks up the host's name, which need not resolve, and listens beyond this machine.
        local = {"GLOO_SOCKET_IFNAME": "lo"} if self._on_one_host() and sys.platform == "linux" else {}
        for place in self._places:
            variables = {**local, **place.environment(self._store_address(), port)}
            worker = self._workers[place.seat.index]
            run = worker.run.remote(self._work, place, variables, self._mailbox, self._attempt)
            self._pending[run] = (_Call.RUN, place.rank)
        self._running = True

    def _mail(self, ready: list[Any], failures: list[Failure], flush: bool) -> tuple[dict[int, Pulse], list[Any]]:
        """Empty the mailbox where it answered. A worker's last events are there before its result is (`flush`)."""
        pulses: dict[int, Pulse] = {}
        events: list[Any] = []
        try:
            if self._drain in ready or flush:
                if flush:
                    self._mailbox.wake.remote()
                pulses, events = ray.get(self._drain, timeout=_MAIL_SECONDS)
                if flush:
                    newer, more = ray.get(self._mailbox.drain.remote(self._attempt, 0.0), timeout=_MAIL_SECONDS)
                    pulses, events = pulses | newer, events + more
                self._drain = self._mailbox.drain.remote(self._attempt, BEAT_SECONDS)
        except RayError:
            if self._mailbox is not None:
                ray.kill(self._mailbox)
                self._mailbox = None
            failures.append(Failure(Fault.CONTROL_LOST, None, "the actor that carries the heartbeats ended"))
        return pulses, events


def check_resources(resources: Mapping[str, float]) -> dict[str, float]:
    """The resources without zeros; raises Refused for what a rank cannot use."""
    kept = {name: amount for name, amount in resources.items() if amount != 0}
    negative = [name for name, amount in kept.items() if amount < 0]
    if negative:
        raise Refused(f"cluster.resources.{negative[0]}={kept[negative[0]]:g} is negative; use 0 or more")
    if kept.get("GPU", 1) != 1:
        raise Refused(f"cluster.resources.GPU={kept['GPU']:g}: a rank uses one GPU; use 1, and more cluster.workers")
    if not kept:
        raise Refused("cluster.resources asks for nothing, so no worker could be placed; use {CPU: 1}")
    return kept


def actor_resources(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's actor options for one worker."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0}
    options |= {named[name]: amount for name, amount in resources.items() if name in named}
    return {**options, "resources": {name: amount for name, amount in resources.items() if name not in named}}


def _lost(error: RayError, rank: int | None, name: str) -> Failure:
    if isinstance(error, OutOfMemoryError):
        return Failure(Fault.OUT_OF_MEMORY, rank, f"{name} was ended because its node ran out of memory")
    if isinstance(error, NodeDiedError) or "node has died" in str(error):
        return Failure(Fault.NODE_LOST, rank, f"{name} was lost with its node")
    if "creation task" in str(error):  # such as a node on which longtrain is not installed
        return Failure(Fault.RAISED, rank, f"{name} could not start: {str(error).strip().splitlines()[-1]}")
    if isinstance(error, RayActorError):
        return Failure(Fault.DIED, rank, f"{name} died")
    return Failure(Fault.RAISED, rank, f"{name} failed: {str(error).strip().splitlines()[-1]}", None, str(error))
