"""Transports by name: a new variant is one file, one line in the table, and one id in the conformance test.

Imports a variant only when it is opened: the contract can be read without zmq.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from hybrid.errors import ConfigError
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, Buffer, Pending, Transport, TransportNode

__all__ = ["VARIANTS", "Buffer", "OpenNode", "Pending", "Transport", "TransportNode", "open_node"]

VARIANTS: dict[str, str] = {
    "inproc": "hybrid.transports.inproc:open_inproc_node",
    "shm": "hybrid.transports.shm:open_shm_node",
    "zmq-tcp": "hybrid.transports.zmq:open_tcp_node",
    "zmq-curve": "hybrid.transports.zmq:open_curve_node",
    "zmq-ipc": "hybrid.transports.zmq:open_ipc_node",
    "tcp": "hybrid.transports.tcp:open_tcp_node",
    "tcp-sealed": "hybrid.transports.tcp:open_sealed_tcp_node",
}
"""Where each variant's `OpenNode` is, by name."""


class OpenNode(Protocol):
    """Opens a node of one variant; a medium without hosts and ports leaves them unused."""

    def __call__(
        self, rank: int, *, host: str = ..., port: int = ..., token: bytes = ..., window_bytes: int = ...
    ) -> TransportNode:
        """See `open_node`."""


def open_node(
    name: str,
    rank: int,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: bytes = b"",
    window_bytes: int = DEFAULT_WINDOW_BYTES,
) -> TransportNode:
    """Return this rank's place on a medium; close it to free everything that it holds.

    Args:
        name: a key of `VARIANTS`.
        host: address or name of the interface to listen on; must be the one that peers reach.
        port: 0 takes a free one.
        token: the job's secret; peers with another one are refused.
        window_bytes: what an edge may hold unreceived in each direction; at least 64 KiB.

    Raises:
        ConfigError: no such variant.
        MachineError: the port is taken, or the host is no address of this machine.
    """
    if name not in VARIANTS:
        raise ConfigError("no such transport", value=name, valid=VARIANTS, fix="name one of those")
    module, function = VARIANTS[name].split(":")
    opener: OpenNode = getattr(import_module(module), function)
    return opener(rank, host=host, port=port, token=token, window_bytes=window_bytes)
