"""What the group kit's clauses stand on: worlds of ranks that are threads of this process, and calls made at once.

No clause is here. May import only torch, `errors`, `collectives` and `transports`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, final

import torch

from hybrid.collectives import Group, Work, open_edges, open_group, open_island_group
from hybrid.collectives.choose import DEFAULT_TABLE, Row
from hybrid.collectives.shm_group import ShmGroup
from hybrid.collectives.transport_group import TransportGroup
from hybrid.errors import CommTimeout, HybridError
from hybrid.transports import open_node
from hybrid.transports.base import Transport

T = TypeVar("T")

DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""What training uses."""


class World(ABC):
    """Some ranks, numbered from 0, and the medium between them. All are in this process."""

    @abstractmethod
    def open(self, ranks: Sequence[int]) -> list[Group]:
        """Return a new group of these ranks: one end for each, in their order. May be called any number of times."""

    @abstractmethod
    def lose(self, rank: int) -> None:
        """Let a rank vanish without a word, as if it had been killed."""


class MakeGroup(Protocol):
    """Makes one end of a group over edges; see `TransportGroup`."""

    def __call__(
        self, *, rank: int, ranks: Sequence[int], edges: Mapping[int, Transport], name: str, timeout_s: float
    ) -> Group:
        """Return the end of the member at position `rank`."""


class OpenWorld(Protocol):
    """What the kit needs of a variant."""

    def __call__(self, size: int, *, timeout_s: float) -> AbstractContextManager[World]:
        """Return a world of ranks 0 to `size - 1` whose groups wait for `timeout_s` where a wait names no time."""


def unwrapped(group: Group) -> Group:
    """Return the group as it is."""
    return group


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """One variant, what it is asked for, and how long things may take."""

    open_world: OpenWorld
    sizes: tuple[int, ...] = (1, 2, 3)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    counts: tuple[int, ...] = (0, 1, 1001)
    """Elements of a tensor."""
    wrap: Callable[[Group], Group] = unwrapped
    """Laid around each end: a planted fault."""
    patience_s: float = 10.0
    """How long what must happen may take."""
    loss_s: float = 8.0
    """How long the loss of a member may stay unknown."""

    @contextmanager
    def world(self, size: int) -> Iterator[Members]:
        """Yield a world whose groups are wrapped; close them after."""
        with self.open_world(size, timeout_s=self.patience_s) as world:
            members = Members(self, world)
            try:
                yield members
            finally:
                members.close()

    @contextmanager
    def groups(self, size: int) -> Iterator[list[Group]]:
        """Yield every end of one group of `size` members."""
        with self.world(size) as members:
            yield members.open(range(size))


@final
@dataclass(slots=True)
class Members:
    """A world and the groups that were opened in it."""

    rig: Rig
    world: World
    opened: list[Group] = field(default_factory=list)

    def open(self, ranks: Sequence[int]) -> list[Group]:
        """Return a new group of some ranks, wrapped."""
        groups = [self.rig.wrap(group) for group in self.world.open(ranks)]
        self.opened += groups
        return groups

    def close(self) -> None:
        """Close all groups."""
        for group in self.opened:
            with suppress(OSError):
                group.close()


class Broken(Exception):
    """Raised inside a clause; the kit adds the clause's name."""


def demand(kept: bool, otherwise: str) -> None:
    """Go on only if `kept`."""
    if not kept:
        raise Broken(otherwise)


def at_once(rig: Rig, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return what the calls return, each run in a thread of its own; the first error is raised."""
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def run(index: int, call: Callable[[], T]) -> None:
        try:
            results[index] = call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True, name=f"kit {item[0]}") for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * rig.patience_s)
    if errors:
        raise errors[0]
    demand(len(results) == len(calls), f"a call still blocks after {4 * rig.patience_s} s")
    return [results[index] for index in range(len(calls))]


def everywhere(rig: Rig, groups: Sequence[Group], call: Callable[[Group], Work]) -> None:
    """Call on every member, and go on only when all have ended."""
    at_once(rig, [partial(_call_and_wait, rig, group, call) for group in groups])


def _call_and_wait(rig: Rig, group: Group, call: Callable[[Group], Work]) -> None:
    try:
        call(group).wait(rig.patience_s)
    except CommTimeout:
        raise Broken(f"an operation that every member called did not end within {rig.patience_s} s") from None


@contextmanager
def expect(*errors: type[HybridError], otherwise: str) -> Iterator[None]:
    """Go on only if the block raises one of `errors`."""
    with suppress(*errors):
        yield
        raise Broken(otherwise)


@final
class TransportWorld(World):
    """Ranks whose groups go over the transports of one variant."""

    def __init__(self, variant: str, size: int, *, timeout_s: float, make_group: MakeGroup) -> None:
        self.timeout_s, self._make_group = timeout_s, make_group
        self._num_groups = 0
        self.nodes = [open_node(variant, rank) for rank in range(size)]
        addresses = {node.rank: node.address for node in self.nodes}
        rig = Rig(open_world=partial(open_transport_world, variant))
        joins = [partial(open_edges, node, addresses, timeout_s=timeout_s) for node in self.nodes]
        self.edges = at_once(rig, joins)

    def open(self, ranks: Sequence[int]) -> list[Group]:
        self._num_groups += 1
        return [
            self._make_group(
                rank=position,
                ranks=ranks,
                edges={at: self.edges[rank][peer] for at, peer in enumerate(ranks) if peer != rank},
                name=f"group {self._num_groups}",
                timeout_s=self.timeout_s,
            )
            for position, rank in enumerate(ranks)
        ]

    def lose(self, rank: int) -> None:
        # The edges of the others end as they do when a process is killed; its own group says nothing any more.
        self.nodes[rank].close()


@contextmanager
def open_transport_world(
    variant: str, size: int, *, timeout_s: float, table: Sequence[Row] = DEFAULT_TABLE, link: str = "any"
) -> Iterator[World]:
    """Yield a world over one variant of `hybrid.transports`, for example `partial(open_transport_world, "inproc")`."""
    with ExitStack() as stack:
        make_group = partial(TransportGroup, table=table, link=link)
        world = TransportWorld(variant, size, timeout_s=timeout_s, make_group=make_group)
        for node in world.nodes:
            stack.callback(node.close)
        yield world


@contextmanager
def open_shm_world(size: int, *, timeout_s: float) -> Iterator[World]:
    """Yield a world of ranks that share memory."""
    with ExitStack() as stack:
        world = TransportWorld("shm", size, timeout_s=timeout_s, make_group=ShmGroup)
        for node in world.nodes:
            stack.callback(node.close)
        yield world


@final
class IslandWorld(World):
    """Ranks in two islands, the first of one more than the second; the groups inside go over transports too."""

    def __init__(self, flat: TransportWorld, chunk_bytes: int) -> None:
        self._flat, self._chunk_bytes = flat, chunk_bytes
        self._num_groups = 0

    def open(self, ranks: Sequence[int]) -> list[Group]:
        self._num_groups += 1
        half = (len(ranks) + 1) // 2
        islands = [list(island) for island in (ranks[:half], ranks[half:]) if island]
        weights = {rank: 1.0 + rank % 3 for rank in ranks}
        groups: list[Group] = []
        for island in islands:
            for rank in island:
                name = f"islands {self._num_groups}"
                edges, timeout_s = self._flat.edges[rank], self._flat.timeout_s
                inner = open_group(edges, island, rank, name=f"{name} inside", timeout_s=timeout_s)
                groups.append(
                    open_island_group(
                        edges,
                        islands,
                        rank,
                        inner,
                        name=name,
                        timeout_s=timeout_s,
                        bandwidth_of_rank=weights,
                        chunk_bytes=self._chunk_bytes,
                    )
                )
        return groups

    def lose(self, rank: int) -> None:
        self._flat.lose(rank)


@contextmanager
def open_island_world(variant: str, size: int, *, timeout_s: float, chunk_bytes: int = 1 << 20) -> Iterator[World]:
    """Yield a world of two islands over one variant of `hybrid.transports`."""
    with open_transport_world(variant, size, timeout_s=timeout_s) as flat:
        assert isinstance(flat, TransportWorld)
        yield IslandWorld(flat, chunk_bytes)
