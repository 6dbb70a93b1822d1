"""World: one process's connections to the other ranks of a torch.distributed world, shared by all of its groups.

Ranks meet in torch's store, say who and where they are, and open one transport a pair. May import only `errors`,
`transports` (its opening function) and this folder's files.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, final

import torch

from hybrid.collectives import open_group
from hybrid.collectives.base import Group
from hybrid.collectives.torch_facts import RankFacts, exchange, host_identity, own_address, shared_secret
from hybrid.collectives.torch_options import AUTO, HybridOptions
from hybrid.errors import UserError
from hybrid.transports import VARIANTS, Transport, TransportNode, open_node

WITHIN_HOST = ("shm", "zmq-ipc")
BETWEEN_HOSTS = ("tcp", "zmq-tcp")
"""Transports that `auto` takes, the fastest first."""


def transport_between(one: RankFacts, other: RankFacts) -> str:
    """Return the transport that two ranks use: the fastest that both listen on and that spans the way between them.

    Raises:
        UserError: there is none.
    """
    order = (*WITHIN_HOST, *BETWEEN_HOSTS) if one.host == other.host else BETWEEN_HOSTS
    both = [name for name in one.addresses if name in other.addresses]
    for name in (*(name for name in order if name in both), *(name for name in both if name not in WITHIN_HOST)):
        return name
    raise UserError(
        f"ranks {one.rank} and {other.rank} have no transport in common",
        value=f"{', '.join(one.addresses)} and {', '.join(other.addresses)}",
        fix="give every rank the same HybridOptions.transport, one that spans hosts if they are on several",
    )


def transports_to_listen_on(wanted: str, installed: Iterable[str]) -> tuple[str, ...]:
    """Return the transports on which a rank listens until it knows where the others are.

    Raises:
        UserError: no such transport.
    """
    known = tuple(installed)
    if wanted != AUTO:
        if wanted not in known or wanted == "inproc":
            valid = [AUTO, *(name for name in known if name != "inproc")]
            raise UserError("no such transport between processes", value=wanted, valid=valid)
        return (wanted,)
    return tuple(next(name for name in order if name in known) for order in (WITHIN_HOST, BETWEEN_HOSTS))


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
        token = shared_secret(store, self.rank, lambda: secrets.token_bytes(32), timeout_s)
        names = transports_to_listen_on(self.options.transport, VARIANTS)
        address = own_address(store) if self.options.address == AUTO else self.options.address
        nodes = {name: self._listen(name, address, token) for name in names}
        own = RankFacts(
            rank=self.rank,
            host=host_identity(),
            addresses={name: node.address for name, node in nodes.items()},
            accelerator=accelerator_kind() if self.options.native else "",
            island=self.options.island,
        )
        self.facts = exchange(store, own, self.size, timeout_s)
        # In ascending order on every rank, so that of all edges still missing, both ends of the least are opening it.
        for peer in (each for each in self.facts if each.rank != self.rank):
            name = transport_between(self.facts[min(self.rank, peer.rank)], self.facts[max(self.rank, peer.rank)])
            self._edges[peer.rank] = nodes[name].open(peer.rank, peer.addresses[name], timeout_s=timeout_s)
        used = {transport_between(own, peer) for peer in self.facts if peer.rank != self.rank}
        self.link = used.pop() if len(used) == 1 else "any"

    def _listen(self, name: str, address: str, token: bytes) -> TransportNode:
        node = open_node(name, self.rank, host=address, token=token)
        self._resources.callback(node.close)
        return node

    def open_group(self, ranks: Sequence[int], name: str, timeout_s: float) -> Group:
        """Return the group of some of the world's ranks, this one among them; waits for no one."""
        edges = {rank: self._edges[rank] for rank in ranks if rank != self.rank}
        return open_group(edges, ranks, self.rank, name=name, timeout_s=timeout_s, link=self.link)

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
