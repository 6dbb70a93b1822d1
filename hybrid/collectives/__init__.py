"""Collectives: operations among several ranks, of one vendor or of several, over transports or shared memory.

`open_edges` and `open_group` make a group out of a rank's `TransportNode`. Imports a variant only when it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.transports.base import Transport, TransportNode

__all__ = ["Group", "PointToPoint", "ReduceOp", "Work", "open_edges", "open_group"]

DEFAULT_TIMEOUT_S = 300.0


def open_edges(node: TransportNode, address_of_rank: Mapping[int, str], *, timeout_s: float) -> dict[int, Transport]:
    """Return this rank's edge to every other one, by rank; every rank must call it.

    Closing the node closes them. One set of edges serves any number of groups.

    Args:
        node: this rank's place on a medium.
        address_of_rank: each rank's `TransportNode.address`; this rank's own may be among them.
        timeout_s: for each edge.

    Raises:
        CommTimeout: a rank did not come.
        ProtocolError: a rank refuses: another token, protocol version or rank.
    """
    # In ascending order on every rank, so that of all edges still missing, both ends of the least are opening it.
    peers = sorted(set(address_of_rank) - {node.rank})
    return {peer: node.open(peer, address_of_rank[peer], timeout_s=timeout_s) for peer in peers}


def open_group(
    edges: Mapping[int, Transport],
    ranks: Sequence[int],
    rank: int,
    *,
    name: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    link: str = "any",
) -> Group:
    """Return a group of some ranks over their edges; close it before the edges. Sends nothing yet.

    Args:
        edges: an open transport to each other rank of `ranks`, by rank (others are not used).
        ranks: the members' ranks, in the order of their positions; the same on every member.
        rank: this process's own rank, one of them.
        name: the same on every member, and of no other group that was ever opened over these edges; at most
            128 bytes of UTF-8, no slash.
        timeout_s: of waits that name none.
        link: the edges' variant (`zmq-tcp`, `shm`, ...), by which algorithms are chosen.

    Example:
        >>> node = open_node("zmq-tcp", rank)                            # doctest: +SKIP
        >>> addresses = ...  # every rank's node.address, handed round   # doctest: +SKIP
        >>> edges = open_edges(node, addresses, timeout_s=30.0)          # doctest: +SKIP
        >>> group = open_group(edges, range(4), rank, name="world")      # doctest: +SKIP
        >>> group.all_reduce(gradient).wait()                            # doctest: +SKIP
    """
    from hybrid.collectives.transport_group import TransportGroup

    position_of_rank = {member: position for position, member in enumerate(ranks)}
    return TransportGroup(
        rank=position_of_rank[rank],
        ranks=tuple(ranks),
        edges={position_of_rank[peer]: edge for peer, edge in edges.items() if peer in position_of_rank},
        name=name,
        timeout_s=timeout_s,
        link=link,
    )
