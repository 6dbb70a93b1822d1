"""One process of the benchmark of two islands: lives in its island's namespace, reduces over its own link."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from hybrid.bench.netns import enter
from hybrid.bench.wire_messages import MeetAll, OpenNodes, Reduce, Stream
from hybrid.collectives import Group, open_edges, open_group, open_island_group
from hybrid.collectives.codecs import open_codec
from hybrid.collectives.shm_group import ShmGroup
from hybrid.runtime.interpreter import host_bytes
from hybrid.transports import open_node
from hybrid.transports.base import Transport, TransportNode

WAIT_S = 60.0
CODEC_OF_ARM = {"islands": "none", "islands-bf16": "bf16", "islands-fp8": "fp8"}
_EXACT = 1e-6
_ROUNDED = 0.05
"""By how much a sum in a codec's form may be off."""


@final
class IslandRank:
    """See the module.

    Args:
        namespace, host: where this rank lives, and the address of its own link there.
        islands: the ranks of each island.
        store: a path for gloo's rendezvous; must not exist.
        token: the job's secret, the same for all ranks.
        size_bytes: of what is reduced.
    """

    def __init__(
        self,
        rank: int,
        namespace: str,
        host: str,
        islands: tuple[tuple[int, ...], ...],
        store: str,
        token: str,
        size_bytes: int,
    ) -> None:
        enter(namespace)  # before anything opens a socket or starts a thread
        torch.set_num_threads(1)
        self._rank, self._host, self._islands, self._store = rank, host, islands, store
        self._token = token.encode()
        self._nodes: dict[str, TransportNode] = {}
        self._edges: dict[int, Transport] = {}
        self._groups: dict[str, Group] = {}
        # Filled, not only allocated: the first touch of memory costs more than the link.
        self._x = torch.ones(size_bytes // 4, dtype=torch.float32)

    def __call__(self, message: object) -> Any:
        """Do what the message says and return the reply."""
        match message:
            case OpenNodes(transports=transports):
                self._nodes = {
                    name: open_node(name, self._rank, host=self._host, token=self._token) for name in transports
                }
                return {name: node.address for name, node in self._nodes.items()}
            case MeetAll(addresses_of_rank=addresses):
                return self._meet(addresses)
            case Stream(size_bytes=size_bytes, count=count):
                return self._stream(size_bytes, count)
            case Reduce(arm=arm, count=count):
                return self._reduce(arm, count)
        raise TypeError(f"a rank of this benchmark is asked for {message}")

    def _meet(self, addresses: tuple[Mapping[str, str], ...]) -> None:
        island = next(island for island in self._islands if self._rank in island)
        self._edges = self._join("tcp", addresses, range(len(addresses)))
        inside = self._join("shm", addresses, island)
        self._groups["flat"] = open_group(
            self._edges, range(len(addresses)), self._rank, name="flat", timeout_s=WAIT_S, link="tcp"
        )
        for arm, codec in CODEC_OF_ARM.items():
            inner = ShmGroup(
                rank=island.index(self._rank),
                ranks=island,
                edges={island.index(peer): edge for peer, edge in inside.items()},
                name=f"{arm} inside",
                timeout_s=WAIT_S,
            )
            self._groups[arm] = open_island_group(
                self._edges,
                self._islands,
                self._rank,
                inner,
                name=arm,
                timeout_s=WAIT_S,
                link="tcp",
                codec=None if codec == "none" else open_codec(codec),
            )
        self._gloo = self._open_gloo(len(addresses))

    def _join(
        self, medium: str, addresses: tuple[Mapping[str, str], ...], ranks: Sequence[int]
    ) -> dict[int, Transport]:
        address_of_rank = {rank: addresses[rank][medium] for rank in ranks}
        return open_edges(self._nodes[medium], address_of_rank, timeout_s=WAIT_S)

    def _open_gloo(self, num_ranks: int) -> Any:
        """Return gloo's group over this rank's own link; by itself gloo would look for the machine's name."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=WAIT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        store = dist.FileStore(self._store, num_ranks)  # type: ignore[attr-defined]
        return dist.ProcessGroupGloo(store, self._rank, num_ranks, options)

    def _stream(self, size_bytes: int, count: int) -> float | None:
        """Send from the first rank of the first island to the first of the second; the receiver's reply: seconds."""
        source, target = self._islands[0][0], self._islands[1][0]
        x = host_bytes(self._x)[:size_bytes]
        if self._rank == source:
            self._edges[target].recv("go", []).wait(WAIT_S)
            for pending in [self._edges[target].send("stream", [x]) for _ in range(count)]:
                pending.wait(WAIT_S)
        elif self._rank == target:
            posted = [self._edges[source].recv("stream", [x]) for _ in range(count)]
            start_s = time.monotonic()
            self._edges[source].send("go", []).wait(WAIT_S)
            for pending in posted:
                pending.wait(WAIT_S)
            return time.monotonic() - start_s
        return None

    def _reduce(self, arm: str, count: int) -> float:
        self._x.fill_(self._rank + 1)
        self._all_reduce(arm)
        expected = sum(rank + 1 for island in self._islands for rank in island)
        within = _EXACT if CODEC_OF_ARM.get(arm, "none") == "none" else _ROUNDED
        error = float((self._x - expected).abs().max()) / expected
        assert error <= within, f"{arm} is {error} off {expected}"
        self._x.zero_()
        # Four processes check their sums on fewer cores: whoever was done first would time the others' checks.
        self._groups["flat"].barrier().wait()
        start_s = time.monotonic()
        for _ in range(count):
            self._all_reduce(arm)
        return (time.monotonic() - start_s) / count

    def _all_reduce(self, arm: str) -> None:
        if arm == "gloo":
            self._gloo.allreduce([self._x]).wait()
        else:
            self._groups[arm].all_reduce(self._x).wait()
