"""Trees: a binomial tree for little, a chain for much. Positions are counted from the root.

Pure: no torch.
"""

from __future__ import annotations

from hybrid.collectives.algorithms.program import Program, Step, Transfer


def broadcast(size: int, rank: int, root: int) -> Program:
    """Return a binomial tree from the root: in step k, who has it sends it 2^k further on.

    Cost:
        ceil(log2 P) messages one after another; up to ceil(log2 P) * bytes from the root.
    """
    return Program(num_blocks=1, share=_down(size, rank, root))


def reduce(size: int, rank: int, root: int) -> Program:
    """Return a binomial tree to the root.

    Cost:
        ceil(log2 P) messages one after another; bytes from each member but the root (twice that in float16 and
        bfloat16 for those who have summed).

    Numerics:
        Pairwise, nearer to the root first: an error that grows with log2 P. Partial sums of float16 and bfloat16
        travel as float32.
    """
    return Program(num_blocks=1, reduce=_up(size, rank, root), finish=(0,) if rank == root else ())


def all_reduce(size: int, rank: int, root: int) -> Program:
    """Return a reduction to member 0, then a broadcast from it.

    Cost:
        2 ceil(log2 P) messages one after another; up to 2 ceil(log2 P) * bytes through member 0.

    Numerics:
        As `reduce`.
    """
    return Program(
        num_blocks=1, reduce=_up(size, rank, 0), finish=(0,) if rank == 0 else (), share=_down(size, rank, 0)
    )


def chain_broadcast(size: int, rank: int, root: int) -> Program:
    """Return a chain from the root: each passes on what it gets; cut into many parts, all edges work at once.

    Cost:
        P-1 messages one after another; bytes from each member but the last.
    """
    place = (rank - root) % size
    steps = [Step() for _ in range(size - 1)]
    if place > 0:
        steps[place - 1] = Step(receives=(Transfer(peer=(rank - 1) % size, blocks=(0,)),))
    if place < size - 1:
        steps[place] = Step(sends=(Transfer(peer=(rank + 1) % size, blocks=(0,)),))
    return Program(num_blocks=1, share=tuple(steps))


def _down(size: int, rank: int, root: int) -> tuple[Step, ...]:
    place = (rank - root) % size
    steps = []
    for reach in (1 << k for k in range((size - 1).bit_length())):
        step = Step()
        if place < reach and place + reach < size:
            step = Step(sends=(Transfer(peer=(rank + reach) % size, blocks=(0,)),))
        elif reach <= place < 2 * reach:
            step = Step(receives=(Transfer(peer=(rank - reach) % size, blocks=(0,)),))
        steps.append(step)
    return tuple(steps)


def _up(size: int, rank: int, root: int) -> tuple[Step, ...]:
    place = (rank - root) % size
    steps = []
    for reach in (1 << k for k in reversed(range((size - 1).bit_length()))):
        step = Step()
        if place < reach and place + reach < size:
            peer = (rank + reach) % size
            partial = place + 3 * reach < size
            step = Step(receives=(Transfer(peer=peer, blocks=(0,), partial=partial),), combine=(rank, peer))
        elif reach <= place < 2 * reach:
            partial = place + 2 * reach < size
            step = Step(sends=(Transfer(peer=(rank - reach) % size, blocks=(0,), partial=partial),))
        steps.append(step)
    return tuple(steps)
