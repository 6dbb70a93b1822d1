"""Collectives: operations among several ranks, of one vendor or of several, over transports or shared memory.

`open_edges` and `open_group` make a group out of a rank's `TransportNode`, `open_shm_group` one that shares memory, and
`open_island_group` one that goes by islands. Imports a variant only when it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.transports.base import Transport, TransportNode

if TYPE_CHECKING:
    from hybrid.collectives.codecs import Codec
    from hybrid.collectives.shm_group import ShmGroup
    from hybrid.collectives.transport_group import TransportGroup

__all__ = [
    "Group",
    "PointToPoint",
    "ReduceOp",
    "Work",
    "open_edges",
    "open_group",
    "open_island_group",
    "open_shm_group",
]


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
    timeout_s: float | None = None,
    link: str = "any",
    table: str | None = None,
) -> Group:
    """Return a group of some ranks over their edges; close it before the edges. Sends nothing yet.

    Args:
        edges: an open transport to each other rank of `ranks`, by rank (others are not used).
        ranks: the members' ranks, in the order of their positions; the same on every member.
        rank: this process's own rank, one of them.
        name: the same on every member, and of no other group that was ever opened over these edges; at most
            128 bytes of UTF-8, no slash.
        timeout_s: of waits that name none; None derives it from how long they took before.
        link: the edges' variant (`zmq-tcp`, `shm`, ...), by which algorithms are chosen.
        table: a file of rows (see `choose`), the same on every member; None: the shipped one.

    Example:
        >>> node = open_node("zmq-tcp", rank)                            # doctest: +SKIP
        >>> addresses = ...  # every rank's node.address, handed round   # doctest: +SKIP
        >>> edges = open_edges(node, addresses, timeout_s=30.0)          # doctest: +SKIP
        >>> group = open_group(edges, range(4), rank, name="world")      # doctest: +SKIP
        >>> group.all_reduce(gradient).wait()                            # doctest: +SKIP
    """
    return _transport_group(edges, ranks, rank, name=name, timeout_s=timeout_s, link=link, table=table)


def _transport_group(
    edges: Mapping[int, Transport],
    ranks: Sequence[int],
    rank: int,
    *,
    name: str,
    timeout_s: float | None,
    link: str,
    table: str | None = None,
) -> TransportGroup:
    from hybrid.collectives.choose import DEFAULT_TABLE, load_table
    from hybrid.collectives.transport_group import TransportGroup

    position, edge_of_position = _positions(edges, ranks, rank)
    return TransportGroup(
        rank=position,
        ranks=tuple(ranks),
        edges=edge_of_position,
        name=name,
        timeout_s=timeout_s,
        link=link,
        table=DEFAULT_TABLE if table is None else load_table(table),
    )


def _positions(edges: Mapping[int, Transport], ranks: Sequence[int], rank: int) -> tuple[int, dict[int, Transport]]:
    """Return this rank's position among `ranks`, and the edges to the others by theirs."""
    position_of_rank = {member: position for position, member in enumerate(ranks)}
    edge_of_position = {position_of_rank[peer]: edge for peer, edge in edges.items() if peer in position_of_rank}
    return position_of_rank[rank], edge_of_position


def open_shm_group(
    edges: Mapping[int, Transport],
    ranks: Sequence[int],
    rank: int,
    *,
    name: str,
    timeout_s: float | None = None,
) -> ShmGroup:
    """Return a group of ranks of one host that share memory; its `bucket` makes tensors that are reduced in place.

    Args as for `open_group`; it is at its best with edges of the variant `shm`.
    """
    from hybrid.collectives.shm_group import ShmGroup

    position, edge_of_position = _positions(edges, ranks, rank)
    return ShmGroup(rank=position, ranks=tuple(ranks), edges=edge_of_position, name=name, timeout_s=timeout_s)


def open_island_group(
    edges: Mapping[int, Transport],
    islands: Sequence[Sequence[int]],
    rank: int,
    inner: Group,
    *,
    name: str,
    timeout_s: float | None = None,
    link: str = "any",
    bandwidth_of_rank: Mapping[int, float] | None = None,
    codec: Codec | None = None,
    num_lanes: int = 3,
    chunk_bytes: int = 4 << 20,
) -> Group:
    """Return a group whose all-reduce sums inside each island first, then across over every rank's own link.

    Closing it closes `inner` too. Its positions follow the islands' order: `[rank for island in islands for rank in
    island]`.

    Args:
        edges: an open transport to every other rank, by rank.
        islands: the ranks of each island; may be of unequal size.
        rank: this process's own.
        inner: a group of this rank's island, in its order: shared memory, or the vendor's (`NativeGroup`).
        name, timeout_s, link: as for `open_group`.
        bandwidth_of_rank: each rank's own link to the other islands, in whatever unit; None: all alike. The same on
            every member.
        codec: how float sums travel between islands; None: as they are.
        num_lanes: chunks that are between the islands at once, so that the links are busy while one is added up.
        chunk_bytes: how much of a tensor is in one phase at a time.
    """
    from hybrid.collectives.choose import BETWEEN_ISLANDS
    from hybrid.collectives.hierarchical import HierarchicalGroup
    from hybrid.collectives.striping import stripe

    ranks = [member for island in islands for member in island]
    places = [[ranks.index(member) for member in island] for island in islands]
    weights = [1.0 if bandwidth_of_rank is None else bandwidth_of_rank[member] for member in ranks]
    position = ranks.index(rank)

    owners_of_mine = {piece.owners for piece in stripe(places, weights) if position in piece.owners}
    return HierarchicalGroup(
        flat=_transport_group(edges, ranks, rank, name=name, timeout_s=timeout_s, link=link),
        islands=places,
        inner=inner,
        cross={
            owners: [
                _transport_group(
                    edges,
                    [ranks[owner] for owner in owners],
                    rank,
                    name=f"{name}:{'-'.join(map(str, owners))}:{lane}",
                    timeout_s=timeout_s,
                    link=BETWEEN_ISLANDS,
                )
                for lane in range(num_lanes)
            ]
            for owners in sorted(owners_of_mine)
        },
        weight_of_position=weights,
        chunk_bytes=chunk_bytes,
        codec=codec,
    )
