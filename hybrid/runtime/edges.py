"""A rank's edges: to which pipeline ranks it talks, opening them, and the emulated links on them.

Knows the plan and transports; no torch, no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from hybrid.runtime.emulated_link import EmulatedLink
from hybrid.scheduler.plan import ReplicaPlan
from hybrid.transports.base import Transport, TransportNode


def peer_pairs(replica: ReplicaPlan, *, tied: bool) -> tuple[tuple[int, int], ...]:
    """Return which pipeline ranks talk to each other, the lower first, in the one order in which all open them.

    Those of neighbouring stages; neighbours by number, over which norms travel; and, for tied weights, those of the
    first and the last stage. One order for all: no two ranks can wait for each other in a ring.
    """
    home = replica.rank_of_stage
    joined = {*pairwise(home), *((rank, rank + 1) for rank in range(max(home)))}
    if tied:
        joined.add((home[0], home[-1]))
    return tuple(sorted({(min(pair), max(pair)) for pair in joined if pair[0] != pair[1]}))


def open_edges(
    replica: ReplicaPlan,
    rank: int,
    node: TransportNode,
    address_of_rank: Mapping[str, str],
    *,
    tied: bool,
    timeout_s: float,
    before_each: Callable[[], None] = lambda: None,
) -> dict[int, Transport]:
    """Return an open transport to each pipeline rank that this one talks to.

    Args:
        rank: this one's number in the job.
        address_of_rank: of the job's ranks, by their number as text.
        before_each: called before each wait for a peer; may raise.

    Raises:
        CommTimeout, PeerLost: a peer did not come.
    """
    own, lane = replica.place_of_rank(rank)
    edges: dict[int, Transport] = {}
    for pair in peer_pairs(replica, tied=tied):
        if own in pair:
            before_each()
            other = pair[1 - pair.index(own)]
            peer = replica.groups[other][lane]
            edges[other] = node.open(peer, address_of_rank[str(peer)], timeout_s=timeout_s)
    return edges


def emulated_links(replica: ReplicaPlan, own: int) -> dict[int, EmulatedLink]:
    """Return the link to each pipeline rank of a neighbouring stage, where both ends are emulated chips."""
    home, links = replica.rank_of_stage, dict[int, EmulatedLink]()
    for edge in replica.edges:
        ends = (edge.from_stage, edge.to_stage)
        if any(replica.stages[stage].backend != "emulated" for stage in ends):
            continue
        for here, there in (ends, ends[::-1]):
            if home[here] == own != home[there]:
                busy_s = edge.transfer_s - edge.latency_s
                links.setdefault(home[there], EmulatedLink(transfer_s=edge.transfer_s, busy_s=busy_s))
    return links
