"""World: one process's connections to the other ranks of a torch.distributed world, shared by all of its groups.

Ranks meet in torch's store, say who and where they are, and open one transport a pair. May import only `errors`,
`transports` (its opening function) and this folder's files.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, final

import torch

from hybrid.collectives import open_group, open_island_group
from hybrid.collectives.base import Group
from hybrid.collectives.shm_group import ShmGroup
from hybrid.collectives.torch_facts import (
    RankFacts,
    exchange,
    exchange_addresses,
    host_identity,
    own_address,
    shared_secret,
)
from hybrid.collectives.torch_options import AUTO, HybridOptions
from hybrid.errors import UserError
from hybrid.transports import VARIANTS, Transport, TransportNode, open_node

WITHIN_HOST, BETWEEN_HOSTS = "shm", "tcp"
"""What `auto` takes: one copy through shared memory; sockets whose ends prove the token, sealed where they leave."""
_STAY_ON_HOST = ("shm", "zmq-ipc")


def transport_between(one: RankFacts, other: RankFacts) -> str:
    """Return the transport that two ranks use.

    Raises:
        UserError: they were told different ones, or one that does not span the way between them.
    """
    same_host = one.host == other.host
    if one.transport != other.transport:
        raise UserError(
            f"ranks {one.rank} and {other.rank} were given different transports",
            value=f"{one.transport} and {other.transport}",
            fix="give every rank the same HybridOptions.transport",
        )
    if one.transport == AUTO:
        return WITHIN_HOST if same_host else BETWEEN_HOSTS
    if one.transport in _STAY_ON_HOST and not same_host:
        raise UserError(
            f"ranks {one.rank} and {other.rank} are on two hosts, and this transport stays on one",
            value=one.transport,
            valid=[AUTO, *(name for name in transports() if name not in _STAY_ON_HOST)],
        )
    return one.transport


def hosts_of(members: Sequence[RankFacts]) -> list[list[int]]:
    """Return the ranks of each host, hosts in order of their first rank."""
    ranks_of_host: dict[str, list[int]] = {}
    for member in members:
        ranks_of_host.setdefault(member.host, []).append(member.rank)
    return list(ranks_of_host.values())


def transports() -> tuple[str, ...]:
    """Return the transports between processes that may be asked for."""
    return tuple(name for name in VARIANTS if name != "inproc")


@final
class World:
    """Every rank's facts, and an edge to each.

    Args:
        store: torch's, for this world alone: its keys are new.
        rank: this process's rank among them.
        timeout_s: for the others to come.
    """

    def __init__(self, store: Any, rank: int, size: int, options: HybridOptions, timeout_s: float) -> None:
        self.rank, self.size, self.options = rank, size, options
        self._resources = ExitStack()
        self._lock = threading.Lock()
        self._num_users = 0
        self._edges: dict[int, Transport] = {}
        try:
            self._connect(store, timeout_s)
        except BaseException:
            self.close()
            raise

    def _connect(self, store: Any, timeout_s: float) -> None:
        self.facts = exchange(store, self._own_facts(), self.size, timeout_s)
        token = shared_secret(store, self.rank, lambda: secrets.token_bytes(32), timeout_s)
        peers = [peer for peer in self.facts if peer.rank != self.rank]
        name_of_rank = {peer.rank: transport_between(self.facts[self.rank], peer) for peer in peers}
        names = sorted(set(name_of_rank.values()))
        address = own_address(store) if self.options.address == AUTO else self.options.address
        nodes = {name: self._listen(name, address, token) for name in names}
        mine = {name: node.address for name, node in nodes.items()}
        address_of_rank = exchange_addresses(store, self.rank, mine, self.size, timeout_s)
        # In ascending order on every rank, so that of all edges still missing, both ends of the least are opening it.
        for rank, name in name_of_rank.items():
            self._edges[rank] = nodes[name].open(rank, address_of_rank[rank][name], timeout_s=timeout_s)
        self._link = names[0] if len(names) == 1 else "any"

    def _own_facts(self) -> RankFacts:
        if self.options.transport not in (AUTO, *transports()):
            raise UserError(
                "no such transport between processes", value=self.options.transport, valid=(AUTO, *transports())
            )
        return RankFacts(
            rank=self.rank,
            host=host_identity(),
            transport=self.options.transport,
            accelerator=accelerator_kind() if self.options.native else "",
            island=self.options.island,
        )

    def _listen(self, name: str, address: str, token: bytes) -> TransportNode:
        node = open_node(name, self.rank, host=address, token=token)
        self._resources.callback(node.close)
        return node

    def open_group(self, ranks: Sequence[int], name: str, timeout_s: float) -> Group:
        """Return the group of some of the world's ranks, this one among them; waits for no one."""
        if self._link == WITHIN_HOST:
            return self._shm_group(ranks, name, timeout_s)
        hosts = hosts_of([self.facts[rank] for rank in ranks])
        if len(hosts) == 1 or len(hosts) == len(ranks) or [rank for host in hosts for rank in host] != list(ranks):
            return open_group(self._edges, ranks, self.rank, name=name, timeout_s=timeout_s, link=self._link)
        own = next(host for host in hosts if self.rank in host)
        inner = self._inner_group(own, f"{name}:inner", timeout_s)
        return open_island_group(self._edges, hosts, self.rank, inner, name=name, timeout_s=timeout_s)

    def _inner_group(self, ranks: Sequence[int], name: str, timeout_s: float) -> Group:
        if self.facts[self.rank].transport == AUTO:
            return self._shm_group(ranks, name, timeout_s)
        return open_group(self._edges, ranks, self.rank, name=name, timeout_s=timeout_s, link=self._link)

    def _shm_group(self, ranks: Sequence[int], name: str, timeout_s: float) -> Group:
        edges = {position: self._edges[rank] for position, rank in enumerate(ranks) if rank != self.rank}
        position = list(ranks).index(self.rank)
        return ShmGroup(rank=position, ranks=ranks, edges=edges, name=name, timeout_s=timeout_s)

    @property
    def closed(self) -> bool:
        """Whether its last group has gone."""
        return self._num_users < 0

    def enter(self) -> None:
        """Count one more group."""
        with self._lock:
            self._num_users += 1

    def leave(self) -> None:
        """Count one group less; the last closes the world."""
        with self._lock:
            self._num_users -= 1
            last = self._num_users == 0
        if last:
            self.close()

    def close_if_unused(self) -> None:
        """Close a world that no group has entered."""
        if self._num_users == 0:
            self.close()

    def close(self) -> None:
        """Close every edge and node; idempotent. Groups must be closed before."""
        self._num_users = -1
        with self._lock:
            resources = self._resources.pop_all()
        resources.close()


def accelerator_kind() -> str:
    """Return torch's name of this host's device type, or nothing where it has the CPU alone."""
    if not torch.accelerator.is_available():
        return ""
    device = torch.accelerator.current_accelerator()
    return "" if device is None else device.type
