"""A rank's edges: to which pipeline ranks it talks, opening them, and the emulated links on them.

Knows the plan and transports; no torch, no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from hybrid.config import ModelConfig
from hybrid.runtime.emulated_link import EmulatedLink
from hybrid.runtime.sharded_edge import ShardedEdge
from hybrid.scheduler.plan import ReplicaPlan
from hybrid.scheduler.reshard import Degrees, Transfer, plan_transfers
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedRows:
    """Rows of a tied weight that this rank and one that holds the other copy both have."""

    edge: Transport
    first: int
    """Of this rank's rows."""
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """A rank's open transports to ranks of other stages of its replica."""

    of_rank: Mapping[int, Transport]
    """By the job's rank."""
    activations: Mapping[int, Transport]
    """By pipeline rank: what takes activations there and brings them from there, whoever shares it out."""
    leads: Mapping[int, Transport]
    """By pipeline rank, of a rank that is the first of its own: the edge to the first there."""


def degrees_of(replica: ReplicaPlan, group: int) -> Degrees:
    """Return how the ranks of a pipeline rank share their stages' work."""
    stage = next(one for one in replica.stages if one.ranks == replica.groups[group])
    return Degrees(width=stage.width, tensor_parallel=stage.tensor_parallel)


def tied_rows(replica: ReplicaPlan, vocab_size: int) -> tuple[Transfer, ...]:
    """Return which rows of a tied weight's gradient the first copies of the first and the last stage exchange.

    Each is (place in the first stage, place in the last one, rows as the box's tokens).
    """
    home = replica.rank_of_stage
    ends = [
        Degrees(width=1, tensor_parallel=degrees_of(replica, group).tensor_parallel) for group in (home[0], home[-1])
    ]
    return plan_transfers(*ends, num_samples=1, num_tokens=vocab_size)


def tied_ends(replica: ReplicaPlan, rank: int, edges: Edges, model: ModelConfig) -> tuple[TiedRows, ...]:
    """Return with whom a rank exchanges which of its rows of a tied weight; none where one rank holds both copies.

    Only the first copies of the two stages do; their other copies get the sum from them.
    """
    own, place = replica.place_of_rank(rank)
    home = replica.rank_of_stage
    if not model.tied_embeddings or own not in (home[0], home[-1]) or home[0] == home[-1]:
        return ()
    there = replica.groups[home[-1] if own == home[0] else home[0]]
    rows = [(one.sender, one.receiver, one.box) for one in tied_rows(replica, model.vocab_size)]
    mine = [(b if own == home[0] else a, box) for a, b, box in rows if place == (a if own == home[0] else b)]
    corner = min((box.first_token for _, box in mine), default=0)
    return tuple(
        TiedRows(edge=edges.of_rank[there[peer]], first=box.first_token - corner, end=box.end_token - corner)
        for peer, box in mine
    )


def rank_pairs(replica: ReplicaPlan, pair: tuple[int, int], model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return which of the job's ranks of two pipeline ranks talk to each other: a rank of `pair[0]`, one of `pair[1]`.

    The first ones of both; who share a box of an activation; and who share rows of a tied weight.
    """
    here, there = (degrees_of(replica, group) for group in pair)
    size = {"num_samples": replica.microbatch, "num_tokens": model.sequence_length}
    places = {(0, 0), *((one.sender, one.receiver) for one in plan_transfers(here, there, **size))}
    home = replica.rank_of_stage
    if model.tied_embeddings and {home[0], home[-1]} == set(pair):
        rows = [(one.sender, one.receiver) for one in tied_rows(replica, model.vocab_size)]
        places |= set(rows if pair[0] == home[0] else [(b, a) for a, b in rows])
    return tuple(sorted((replica.groups[pair[0]][a], replica.groups[pair[1]][b]) for a, b in places))


def open_edges(
    replica: ReplicaPlan,
    rank: int,
    node: TransportNode,
    address_of_rank: Mapping[str, str],
    *,
    model: ModelConfig,
    token_bytes: int,
    timeout_s: float,
    before_each: Callable[[], None] = lambda: None,
    coded: Callable[[Transport], Transport] = lambda edge: edge,
) -> Edges:
    """Return the open transports to each rank of other stages that this one talks to.

    Args:
        rank: this one's number in the job.
        address_of_rank: of the job's ranks, by their number as text.
        token_bytes: of one token's activation.
        before_each: called before each wait for a peer; may raise.
        coded: laid around each transport that takes activations, where the plan's edges name codecs.

    Raises:
        CommTimeout, PeerLost: a peer did not come.
    """
    own, place = replica.place_of_rank(rank)
    of_rank: dict[int, Transport] = {}
    pairs = [pair for pair in peer_pairs(replica, tied=model.tied_embeddings) if own in pair]
    # By both numbers, on every rank: of all edges still missing, both ends of the first are opening it.
    joined = sorted({tuple(sorted(ranks)) for pair in pairs for ranks in rank_pairs(replica, pair, model)})
    for low, high in joined:
        if rank in (low, high):
            before_each()
            peer = high if rank == low else low
            of_rank[peer] = node.open(peer, address_of_rank[str(peer)], timeout_s=timeout_s)
    others = [pair[1 - pair.index(own)] for pair in pairs]
    coded_of_rank = {peer: coded(edge) for peer, edge in of_rank.items()}
    return Edges(
        of_rank=of_rank,
        activations={
            other: _activation_edge(replica, own, other, place, coded_of_rank, model.sequence_length, token_bytes)
            for other in others
        },
        leads={other: of_rank[replica.groups[other][0]] for other in others if place == 0},
    )


def _activation_edge(
    replica: ReplicaPlan,
    own: int,
    other: int,
    place: int,
    of_rank: Mapping[int, Transport],
    num_tokens: int,
    token_bytes: int,
) -> Transport:
    there = replica.groups[other]
    here_degrees, there_degrees = degrees_of(replica, own), degrees_of(replica, other)
    if here_degrees.size == there_degrees.size == 1:
        return of_rank[there[0]]
    return ShardedEdge(
        {index: of_rank[peer] for index, peer in enumerate(there) if peer in of_rank},
        own=here_degrees,
        other=there_degrees,
        place=place,
        num_tokens=num_tokens,
        token_bytes=token_bytes,
    )


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
