"""One process of the p2p and all-reduce benchmarks: holds an edge of each transport, a group over each, and gloo's."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hybrid.bench.wire_messages import Copy, MeetAll, OpenNodes, PingPong, Reduce, ReduceBy, Stream
from hybrid.collectives import Group, open_group, open_shm_group
from hybrid.collectives.choose import DEFAULT_TABLE, Choice
from hybrid.collectives.choose import Row as Choosing
from hybrid.collectives.shm_group import ShmGroup
from hybrid.collectives.transport_group import TransportGroup
from hybrid.runtime.interpreter import host_bytes
from hybrid.transports import open_node
from hybrid.transports.base import Transport, TransportNode
from hybrid.transports.lending import lend
from hybrid.transports.zmq_memory import keep_freed_memory

WAIT_S = 60.0
_AHEAD = 2
"""Receives that are posted at a time, each into a buffer of its own, in every arm."""
_MEMCPY = ctypes.CDLL(None).memcpy
_MEMCPY.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_MEMCPY.restype = ctypes.c_void_p


@final
class WireRank:
    """See the module.

    Args:
        store: a path for gloo's rendezvous; must not exist.
        token: the job's secret, the same for all ranks.
        largest_bytes: of any message.
    """

    def __init__(self, rank: int, num_ranks: int, store: str, token: str, largest_bytes: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self._rank, self._num_ranks, self._store, self._token = rank, num_ranks, store, token.encode()
        self._nodes: dict[str, TransportNode] = {}
        self._edges: dict[str, dict[int, Transport]] = {}
        self._groups: dict[str, Group] = {}
        self._shm_group: ShmGroup | None = None
        self._bucket: Tensor | None = None
        # Filled, not only allocated: the first touch of memory costs more than any transport.
        self._source = torch.full((largest_bytes,), 1 + rank, dtype=torch.uint8)
        self._targets = [torch.zeros(largest_bytes, dtype=torch.uint8) for _ in range(_AHEAD)]

    def __call__(self, message: object) -> Any:
        """Do what the message says and return the reply."""
        match message:
            case OpenNodes(transports=transports):
                self._nodes = {name: open_node(name, self._rank, token=self._token) for name in transports}
                return {name: node.address for name, node in self._nodes.items()}
            case MeetAll(addresses_of_rank=addresses):
                return self._meet(addresses)
            case Stream(arm=arm, size_bytes=size_bytes, count=count):
                return self._stream(arm, size_bytes, count)
            case PingPong(arm=arm, size_bytes=size_bytes, count=count):
                return self._ping_pong(arm, size_bytes, count)
            case Copy(size_bytes=size_bytes, count=count):
                return self._copy(size_bytes, count)
            case Reduce(arm=arm, size_bytes=size_bytes, count=count):
                return self._reduce(arm, size_bytes, count)
            case ReduceBy() as message:
                return self._reduce_by(message)
        raise TypeError(f"a rank of this benchmark is asked for {message}")

    def _meet(self, addresses: tuple[Mapping[str, str], ...]) -> None:
        for name, node in self._nodes.items():
            self._edges[name] = {
                peer: node.open(peer, addresses[peer][name], timeout_s=WAIT_S)
                for peer in range(self._num_ranks)
                if peer != self._rank
            }
            ranks = range(self._num_ranks)
            self._groups[name] = open_group(
                self._edges[name], ranks, self._rank, name="bench", timeout_s=WAIT_S, link=name
            )
        shm = open_shm_group(
            self._edges["shm"], range(self._num_ranks), self._rank, name="shared memory", timeout_s=WAIT_S
        )
        self._groups |= {"shm-bucket": shm, "shm-plain": shm}
        self._shm_group = shm
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(self._store, self._num_ranks),  # type: ignore[attr-defined]
            rank=self._rank,
            world_size=self._num_ranks,
            timeout=timedelta(seconds=WAIT_S),
        )

    def _stream(self, arm: str, size_bytes: int, count: int) -> float | None:
        source = self._source[:size_bytes]
        if self._rank == 0:
            self._receive(arm, self._targets[0][:1], "go")()
            waits = [self._send(arm, source, "stream") for _ in range(count)]
            for wait in waits:
                wait()
            return None
        for target in self._targets:
            target[:size_bytes:4096] = 0
        posted = [self._receive(arm, self._targets[n % _AHEAD][:size_bytes], "stream") for n in range(_AHEAD)]
        start_s = time.monotonic()
        self._send(arm, source[:1], "go")()
        for number in range(count):
            posted[number % _AHEAD]()
            if number + _AHEAD < count:
                target = self._targets[number % _AHEAD][:size_bytes]
                posted[number % _AHEAD] = self._receive(arm, target, "stream")
        seconds = time.monotonic() - start_s
        last = self._targets[(count - 1) % _AHEAD][:size_bytes]
        assert bool((last[::4096] == 1).all()), f"{arm} delivered other bytes"
        assert int(last[-1]) == 1, f"{arm} cut the last byte"
        return seconds

    def _ping_pong(self, arm: str, size_bytes: int, count: int) -> float | None:
        source, target = self._source[:size_bytes], self._targets[0][:size_bytes]
        start_s = time.monotonic()
        for _ in range(count):
            receiving = self._receive(arm, target, "ping")
            if self._rank == 0:
                sending = self._send(arm, source, "ping")
                receiving()
            else:
                receiving()
                sending = self._send(arm, source, "ping")
            sending()
        return (time.monotonic() - start_s) / count / 2 if self._rank == 0 else None

    def _copy(self, size_bytes: int, count: int) -> float:
        source, targets = self._source.data_ptr(), [target.data_ptr() for target in self._targets]
        start_s = time.monotonic()
        for number in range(count):
            _MEMCPY(targets[number % _AHEAD], source, size_bytes)
        return time.monotonic() - start_s

    def _reduce(self, arm: str, size_bytes: int, count: int) -> float:
        x = self._tensor(arm, size_bytes)
        x.fill_(self._rank + 1)
        self._all_reduce(arm, x)
        expected = self._num_ranks * (self._num_ranks + 1) / 2
        assert bool((x == expected).all()), f"{arm} has reduced to {x[:4].tolist()}, not to {expected}"
        x.zero_()  # sums of what was summed would soon be infinite
        self._all_reduce(arm, x)
        start_s = time.monotonic()
        for _ in range(count):
            self._all_reduce(arm, x)
        return (time.monotonic() - start_s) / count

    def _reduce_by(self, message: ReduceBy) -> float:
        arm = f"{message.link} {message.algorithm} {message.segment_bytes}"
        if arm not in self._groups:
            choice = Choice(algorithm=message.algorithm, segment_bytes=message.segment_bytes)
            self._groups[arm] = TransportGroup(
                rank=self._rank,
                ranks=range(self._num_ranks),
                edges=self._edges[message.link],
                name=arm,
                timeout_s=WAIT_S,
                table=(Choosing(operation="all_reduce", choice=choice), *DEFAULT_TABLE),
            )
        return self._reduce(arm, message.size_bytes, message.count)

    def _tensor(self, arm: str, size_bytes: int) -> Tensor:
        if arm != "shm-bucket":
            return self._source[:size_bytes].view(torch.float32)
        if self._bucket is None:
            assert self._shm_group is not None
            self._bucket = self._shm_group.bucket(self._source.numel(), torch.uint8)
            self._bucket.zero_()
        return self._bucket[:size_bytes].view(torch.float32)

    def _all_reduce(self, arm: str, x: Tensor) -> None:
        if arm == "gloo":
            dist.all_reduce(x)
        else:
            self._groups[arm].all_reduce(x).wait()

    def _send(self, arm: str, x: Tensor, tag: str) -> Any:
        """Start a send to the other rank; return what waits for its end."""
        peer = 1 - self._rank
        if arm == "gloo":
            return dist.isend(x, peer, tag=_number(tag)).wait  # type: ignore[union-attr]
        pending = self._edges["shm" if arm == "shm-lent" else arm][peer].send(tag, [host_bytes(x)])
        return lambda: pending.wait(WAIT_S)

    def _receive(self, arm: str, x: Tensor, tag: str) -> Any:
        peer = 1 - self._rank
        if arm == "gloo":
            return dist.irecv(x, peer, tag=_number(tag)).wait  # type: ignore[union-attr]
        if arm == "shm-lent":
            return self._lent(x, tag)
        pending = self._edges[arm][peer].recv(tag, [host_bytes(x)])
        return lambda: pending.wait(WAIT_S)

    def _lent(self, x: Tensor, tag: str) -> Any:
        """Return what waits for a message that is read where it lies: a byte of each page, and the last."""
        lent = lend(self._edges["shm"][1 - self._rank], tag, [x.nbytes])

        def wait() -> None:
            lent.wait(WAIT_S)
            message, seen = np.frombuffer(lent.buffers[0], dtype=np.uint8), x.numpy()
            seen[::4096] = message[::4096]
            seen[-1] = message[-1]
            lent.release()

        return wait


def _number(tag: str) -> int:
    return ("go", "stream", "ping").index(tag)
