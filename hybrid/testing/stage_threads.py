"""Ranks of one stage as threads: an axis over inproc transports for each, and what each returned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hybrid.collectives.transport_group import TransportGroup
from hybrid.models.axis import Axis
from hybrid.runtime.axes import GroupAxis
from hybrid.transports import open_node

TIMEOUT_S = 30.0


def run_on_axis(size: int, work: Callable[[Axis], Any]) -> list[Any]:
    """Return what `work` returned on each rank of an axis; raises the first failure."""
    nodes = [open_node("inproc", rank, token=b"t") for rank in range(size)]
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            edges = {
                peer: nodes[rank].open(peer, nodes[peer].address, timeout_s=TIMEOUT_S)
                for peer in range(size)
                if peer != rank
            }
            group = TransportGroup(rank=rank, ranks=range(size), edges=edges, name="axis", timeout_s=TIMEOUT_S)
            results[rank] = work(GroupAxis(group))
            group.barrier().wait()
            group.close()
        except BaseException as error:
            failures.append(error)
            nodes[rank].close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    for node in nodes:
        node.close()
    if failures:
        raise failures[0]
    return results
