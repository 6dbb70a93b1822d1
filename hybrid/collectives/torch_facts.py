"""What each rank of a torch.distributed world tells the others before they connect, through torch's own store.

The store is the only means: a rank sets its key and reads everyone else's. May import only `errors`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from hybrid.errors import CommTimeout, ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank, as the others see it."""

    rank: int
    host: str
    """Ranks of one host share memory and loopback; see `host_identity`."""
    transport: str
    """The one that it was told to use, or `auto`."""
    accelerator: str = ""
    """torch's name of its device type: `cuda`, `neuron`; empty on a host without."""
    island: str = ""
    """Ranks of one island and one accelerator may use the vendor's own library among them."""


def host_identity() -> str:
    """Return what two processes have in common exactly if they can share memory and loopback sockets.

    Containers of one machine have its boot id, and other /dev/shm mounts or other network namespaces.
    """
    parts = []
    for read in (_boot_id, _network_namespace, _shared_memory_mount):
        try:
            parts.append(read())
        except OSError:
            parts.append(socket.gethostname())
    return "/".join(parts)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _network_namespace() -> str:
    return str(os.stat("/proc/self/ns/net").st_ino)


def _shared_memory_mount() -> str:
    return f"{os.stat('/dev/shm').st_dev}:{os.getuid()}"


def own_address(store: Any) -> str:
    """Return the address of the interface by which this host reaches the store's; loopback for a store without one."""
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    host, port = getattr(inner, "host", None), getattr(inner, "port", None)
    if not host or not port:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of datagrams: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def exchange(store: Any, own: RankFacts, size: int, timeout_s: float) -> tuple[RankFacts, ...]:
    """Return every rank's facts, in order of rank.

    Raises:
        CommTimeout: not all came in time; names those that did not.
        ProtocolError: a rank's word cannot be read.

    Cost:
        One set and `size` reads a rank.
    """
    store.set(f"facts/{own.rank}", json.dumps(asdict(own)))
    words = _read_all(store, "facts", size, timeout_s)
    return tuple(_parse(rank, word) for rank, word in enumerate(words))


def exchange_addresses(
    store: Any, rank: int, own: dict[str, str], size: int, timeout_s: float
) -> tuple[dict[str, str], ...]:
    """Return where every rank listens, by transport, in order of rank; as `exchange`."""
    store.set(f"addresses/{rank}", json.dumps(own))
    return tuple(json.loads(word) for word in _read_all(store, "addresses", size, timeout_s))


def shared_secret(store: Any, rank: int, make: Callable[[], bytes], timeout_s: float) -> bytes:
    """Return rank 0's secret; as safe as the store is."""
    if rank == 0:
        store.set("token", make().hex())
    _wait(store, ["token"], timeout_s, lambda: "rank 0 has not started the world")
    return bytes.fromhex(bytes(store.get("token")).decode())


def _read_all(store: Any, name: str, size: int, timeout_s: float) -> list[bytes]:
    keys = [f"{name}/{rank}" for rank in range(size)]
    _wait(store, keys, timeout_s, lambda: f"ranks {_listed(_missing(store, keys))} of {size} did not come")
    return [bytes(word) for word in store.multi_get(keys)] if store.has_extended_api() else list(_each(store, keys))


def _each(store: Any, keys: Sequence[str]) -> Iterator[bytes]:
    for key in keys:
        yield bytes(store.get(key))


def _wait(store: Any, keys: list[str], timeout_s: float, fact: Callable[[], str]) -> None:
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except Exception as error:
        if "imeout" not in f"{type(error).__name__}{error}" and "imed out" not in str(error):
            raise
        raise CommTimeout(
            f"{fact()} within {timeout_s:g} s", fix="see whether every rank has started, and reaches the store"
        ) from None


def _missing(store: Any, keys: Sequence[str]) -> list[int]:
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (" and more" if len(ranks) > 16 else "")


def _parse(rank: int, word: bytes) -> RankFacts:
    try:
        facts = RankFacts(**json.loads(word))
    except (ValueError, TypeError) as error:
        raise ProtocolError(
            f"rank {rank} says of itself what cannot be read: {error}", fix="run one version of hybrid on every rank"
        ) from None
    if facts.rank != rank:
        raise ProtocolError(f"rank {rank} calls itself rank {facts.rank}", fix="give every process its own rank")
    return facts
