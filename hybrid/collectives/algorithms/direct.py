"""Direct: everyone sends straight to whoever needs it, in one step or two.

Reductions are made by one member in the order of positions, so an element's bits do not depend on where it stands in
the tensor. Pure: no torch.
"""

from __future__ import annotations

from hybrid.collectives.algorithms.program import Program, Step, Transfer


def exchange(size: int, rank: int, root: int) -> Program:
    """Return the all-reduce in which everyone sends everything to everyone and sums it all.

    Cost:
        P-1 messages a member, all at once; (P-1) * bytes on the wire a member.

    Numerics:
        In the order of positions, by every member alike; float16 and bfloat16 travel as they are.
    """
    peers = _peers(size, rank)
    everything = tuple(Transfer(peer=peer, blocks=(0,)) for peer in peers)
    step = Step(sends=everything, receives=everything, combine=tuple(range(size)))
    return Program(num_blocks=1, reduce=(step,) if peers else (), finish=(0,))


def all_reduce(size: int, rank: int, root: int) -> Program:
    """Return the all-reduce in which member b sums block b and sends it to all.

    Cost:
        2(P-1) messages a member in two steps; 2(P-1)/P * bytes on the wire a member, spread over all its edges.

    Numerics:
        In the order of positions; float16 and bfloat16 travel as they are.
    """
    return Program(num_blocks=size, reduce=_reduce(size, rank), finish=(rank,), share=_share(size, rank))


def reduce_scatter(size: int, rank: int, root: int) -> Program:
    """Return the first half of `all_reduce`.

    Cost:
        P-1 messages a member, all at once; (P-1)/P * bytes on the wire a member.

    Numerics:
        As `all_reduce`.
    """
    return Program(num_blocks=size, reduce=_reduce(size, rank), finish=(rank,))


def all_gather(size: int, rank: int, root: int) -> Program:
    """Return the second half of `all_reduce`.

    Cost:
        P-1 messages a member, all at once; (P-1)/P * bytes of the result on the wire a member.
    """
    return Program(num_blocks=size, share=_share(size, rank))


def broadcast(size: int, rank: int, root: int) -> Program:
    """Return the broadcast in which the root sends to each.

    Cost:
        P-1 messages and (P-1) * bytes from the root, all at once.
    """
    if rank == root:
        step = Step(sends=tuple(Transfer(peer=peer, blocks=(0,)) for peer in _peers(size, rank)))
    else:
        step = Step(receives=(Transfer(peer=root, blocks=(0,)),))
    return Program(num_blocks=1, share=(step,))


def reduce(size: int, rank: int, root: int) -> Program:
    """Return the reduction in which each sends to the root.

    Cost:
        P-1 messages and (P-1) * bytes to the root, all at once.

    Numerics:
        In the order of positions; float16 and bfloat16 travel as they are.
    """
    if rank != root:
        return Program(num_blocks=1, reduce=(Step(sends=(Transfer(peer=root, blocks=(0,)),)),))
    received = tuple(Transfer(peer=peer, blocks=(0,)) for peer in _peers(size, rank))
    steps = (Step(receives=received, combine=tuple(range(size))),) if received else ()
    return Program(num_blocks=1, reduce=steps, finish=(0,))


def gather(size: int, rank: int, root: int) -> Program:
    """Return the gather in which each sends to the root.

    Cost:
        P-1 messages to the root, all at once.
    """
    if rank == root:
        step = Step(receives=tuple(Transfer(peer=peer, blocks=(peer,)) for peer in _peers(size, rank)))
    else:
        step = Step(sends=(Transfer(peer=root, blocks=(rank,)),))
    return Program(num_blocks=size, share=(step,))


def scatter(size: int, rank: int, root: int) -> Program:
    """Return the scatter in which the root sends to each.

    Cost:
        P-1 messages from the root, all at once.
    """
    if rank == root:
        step = Step(sends=tuple(Transfer(peer=peer, blocks=(peer,)) for peer in _peers(size, rank)))
    else:
        step = Step(receives=(Transfer(peer=root, blocks=(rank,)),))
    return Program(num_blocks=size, share=(step,))


def all_to_all(size: int, rank: int, root: int) -> Program:
    """Return the exchange of a block between each two; blocks 0 to P-1 are the inputs, P to 2P-1 the outputs.

    Cost:
        P-1 messages a member, all at once.
    """
    peers = _peers(size, rank)
    step = Step(
        sends=tuple(Transfer(peer=peer, blocks=(peer,)) for peer in peers),
        receives=tuple(Transfer(peer=peer, blocks=(size + peer,)) for peer in peers),
    )
    return Program(num_blocks=2 * size, share=(step,))


def barrier(size: int, rank: int, root: int) -> Program:
    """Return the dissemination barrier: in step k a word to the member 2^k further on.

    Cost:
        ceil(log2 P) empty messages a member, one after another.

    Source:
        Hensgen, Finkel and Manber 1988, "Two algorithms for barrier synchronization".
    """
    steps = tuple(
        Step(
            sends=(Transfer(peer=(rank + (1 << k)) % size, blocks=()),),
            receives=(Transfer(peer=(rank - (1 << k)) % size, blocks=()),),
        )
        for k in range((size - 1).bit_length())
    )
    return Program(num_blocks=1, share=steps)


def _reduce(size: int, rank: int) -> tuple[Step, ...]:
    peers = _peers(size, rank)
    step = Step(
        sends=tuple(Transfer(peer=peer, blocks=(peer,)) for peer in peers),
        receives=tuple(Transfer(peer=peer, blocks=(rank,)) for peer in peers),
        combine=tuple(range(size)),
    )
    return (step,) if peers else ()


def _share(size: int, rank: int) -> tuple[Step, ...]:
    peers = _peers(size, rank)
    step = Step(
        sends=tuple(Transfer(peer=peer, blocks=(rank,)) for peer in peers),
        receives=tuple(Transfer(peer=peer, blocks=(peer,)) for peer in peers),
    )
    return (step,) if peers else ()


def _peers(size: int, rank: int) -> tuple[int, ...]:
    # Each begins with the next one, so that not all send to the same member first.
    return tuple((rank + distance) % size for distance in range(1, size))
