"""Opening the axes of a stage that several ranks hold.

A rank with a process of its own joins its stage's native group through its backend: torch's default group, of which
there is one a process; the axes are parts of it. Its first rank keeps the door, a store of torch's, whose address comes
to the others by the coordinator's Welcome. The ranks of one process, which share one torch, use the job's own
collectives over the transports of its node.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, final

from hybrid.backends.base import Backend
from hybrid.collectives import open_group
from hybrid.config import JobConfig
from hybrid.models.axis import Axis
from hybrid.runtime.axes import SINGLE, GroupAxis, NativeAxis, StageAxes
from hybrid.runtime.placement import WorkerSpec
from hybrid.scheduler.plan import ReplicaPlan
from hybrid.scheduler.reshard import Degrees
from hybrid.transports.base import TransportNode

_LONGEST_WAIT_S = 600.0


@final
class Door:
    """What the first rank of a stage keeps open until all of its ranks have joined its native group, and longer.

    Args:
        host: at which the stage's other ranks reach this one.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        dist: Any = importlib.import_module("torch.distributed")
        # A free port of the system's choice; the group that is opened there later shares this process's store.
        self._store = dist.TCPStore(
            host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True
        )
        self.address = f"{host}:{self._store.port}"

    def close(self) -> None:
        """Close it; idempotent."""
        self._store = None


def open_door(spec: WorkerSpec) -> Door | None:
    """Return the door of a rank's native group, where it is the first of several processes in it."""
    replica = spec.plan.replica_of_rank(spec.rank)
    own, place = replica.place_of_rank(spec.rank)
    if not spec.owns_process or place > 0 or len(replica.groups[own]) == 1:
        return None
    return Door(spec.host, axes_timeout_s(spec.job))


def axes_timeout_s(job: JobConfig) -> float:
    """Return the limit of a wait within a stage.

    A native group has one for its life. A lost rank is told at once, by its connections and by the coordinator; so this
    is long enough for one rank to write a layer while the others wait for it.
    """
    return job.runtime.fixed_timeout_s or _LONGEST_WAIT_S


def members_of_axes(degrees: Degrees) -> tuple[tuple[int, ...], ...]:
    """Return the places of every axis's ranks in a stage, in the one order in which all of its ranks open them.

    First each copy's tensor-parallel ranks, then the ranks of each place across the copies; axes of one rank left out.
    """
    degree, size = degrees.tensor_parallel, degrees.size
    copies = [tuple(range(first, first + degree)) for first in range(0, size, degree)] if degree > 1 else []
    lanes = [tuple(range(lane, size, degree)) for lane in range(degree)] if degrees.width > 1 else []
    return (*copies, *lanes)


def open_native_axes(
    ranks: tuple[int, ...], place: int, degrees: Degrees, backend: Backend, address: str, *, timeout_s: float
) -> StageAxes:
    """Join the stage's native group at `address`, and the axes that are parts of it.

    Raises:
        CommTimeout: not every rank came.
    """
    dist: Any = importlib.import_module("torch.distributed")
    order = sorted(ranks)
    whole = backend.native_group(order, rank=ranks[place], address=address, timeout_s=timeout_s)
    own: list[Axis] = []
    for members in members_of_axes(degrees):
        positions = [order.index(ranks[member]) for member in members]
        # Every rank of the stage takes part in making every group, also of those that it is not in.
        part = whole if len(positions) == len(ranks) else dist.new_group(positions)
        if place in members:
            own.append(NativeAxis(part))
    return _stage_axes(own, degrees, dist.destroy_process_group)


def open_transport_axes(
    ranks: tuple[int, ...],
    place: int,
    degrees: Degrees,
    node: TransportNode,
    address_of_rank: Mapping[str, str],
    *,
    timeout_s: float,
    before_each: Callable[[], None],
) -> StageAxes:
    """Open transports to the stage's other ranks, and a group of our own for each axis.

    Raises:
        CommTimeout, PeerLost: a rank did not come.
    """
    edges = {}
    needed = {ranks[member] for members in members_of_axes(degrees) if place in members for member in members}
    for peer in sorted(needed - {ranks[place]}):
        before_each()
        edges[peer] = node.open(peer, address_of_rank[str(peer)], timeout_s=timeout_s)
    own: list[Axis] = []
    groups = []
    for number, members in enumerate(members_of_axes(degrees)):
        if place in members:
            name = f"stage-{min(ranks)}-{number}"
            members_ranks = [ranks[member] for member in members]
            group = open_group(edges, members_ranks, ranks[place], name=name, timeout_s=timeout_s)
            groups.append(group)
            own.append(GroupAxis(group))

    def close() -> None:
        for group in groups:
            group.close()

    return _stage_axes(own, degrees, close)


def open_axes(
    replica: ReplicaPlan,
    rank: int,
    degrees: Degrees,
    *,
    node: TransportNode,
    backend: Backend,
    native_address: str,
    address_of_rank: Mapping[str, str],
    timeout_s: float,
    before_each: Callable[[], None],
) -> StageAxes:
    """Return the axes of a rank's stages: native where their first rank keeps a door, else our own.

    Args:
        native_address: the first rank's door; empty where it keeps none.

    Raises:
        CommTimeout, PeerLost: a rank did not come.
    """
    own, place = replica.place_of_rank(rank)
    ranks = replica.groups[own]
    if len(ranks) == 1:
        return SINGLE
    before_each()
    if native_address:
        return open_native_axes(ranks, place, degrees, backend, native_address, timeout_s=timeout_s)
    return open_transport_axes(
        ranks, place, degrees, node, address_of_rank, timeout_s=timeout_s, before_each=before_each
    )


def _stage_axes(own: list[Axis], degrees: Degrees, close: Callable[[], None]) -> StageAxes:
    return StageAxes(
        tensor=own[0] if degrees.tensor_parallel > 1 else None,
        width=own[-1] if degrees.width > 1 else None,
        close=close,
    )
