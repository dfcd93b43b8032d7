"""Which worker gets which rank: sequence-parallel groups stay inside a node."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

DOMAIN_LABEL = "longtrain.io/domain"
"""Ray node label; nodes with the same value (a rack, an NVLink domain) get neighbouring ranks."""


@dataclass(frozen=True)
class Seat:
    """Where Ray put one worker."""

    index: int
    """Number of the worker's bundle in the placement group."""
    node_id: str
    ip: str
    domain: str
    gpu_ids: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """One rank of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    visible_gpus: tuple[str, ...]
    """GPUs of all ranks of the node, so that entry `local_rank` is this rank's own."""
    seat: Seat

    def environment(self, master_address: str, master_port: int) -> dict[str, str]:
        """The variables that `init_method="env://"` and `run_rank` read."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": master_address,
            "MASTER_PORT": str(master_port),
            # The store is served beside rank 0 before any rank starts (see comm/rendezvous.py).
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            # Empty where none was asked for: Ray leaves GPUs in sight that it has lent to others.
            "CUDA_VISIBLE_DEVICES": ",".join(self.visible_gpus),
        }
        return variables


def assign_ranks(seats: Sequence[Seat], group_size: int) -> list[Place]:
    """Order workers by (domain, numeric IP, node, GPU) and number them.

    A node that holds more workers than a multiple of `group_size` gives its surplus ranks after all complete groups,
    so that no other group is shifted across a node's edge. The result is in rank order and does not depend on the
    order of `seats`.
    """
    complete: list[Seat] = []
    surplus: list[Seat] = []
    for _, members in groupby(sorted(seats, key=_position), key=lambda seat: seat.node_id):
        node = list(members)
        cut = len(node) - len(node) % group_size
        complete += node[:cut]
        surplus += node[cut:]
    ordered = complete + surplus
    local = {node_id: [s for s in ordered if s.node_id == node_id] for node_id in {s.node_id for s in ordered}}
    return [
        Place(
            rank=rank,
            world_size=len(ordered),
            local_rank=local[seat.node_id].index(seat),
            local_world_size=len(local[seat.node_id]),
            visible_gpus=tuple(gpu for neighbour in local[seat.node_id] for gpu in neighbour.gpu_ids),
            seat=seat,
        )
        for rank, seat in enumerate(ordered)
    ]


def _position(seat: Seat) -> tuple[object, ...]:
    address = ipaddress.ip_address(seat.ip)
    gpus = tuple((0, int(gpu), "") if gpu.isdigit() else (1, 0, gpu) for gpu in seat.gpu_ids)
    return (seat.domain, address.version, int(address), seat.node_id, gpus, seat.index)
