"""Rings: every member sends to the next and receives from the one before, one block a step.

Pure: no torch.
"""

from __future__ import annotations

from hybrid.collectives.algorithms.program import Program, Step, Transfer


def all_reduce(size: int, rank: int, root: int) -> Program:
    """Return a ring's reduce-scatter, then its all-gather.

    Cost:
        2(P-1) messages a member, one after another; 2(P-1)/P * bytes on the wire a member.

    Numerics:
        Block b is summed in the order b+1, b+2, ..., b: another order a block, the same bits on every member.
        float16 and bfloat16 travel as float32 while they are summed (from the second step on).

    Source:
        Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return Program(num_blocks=size, reduce=_reduce(size, rank), finish=(rank,), share=_share(size, rank))


def reduce_scatter(size: int, rank: int, root: int) -> Program:
    """Return the first half of a ring's all-reduce.

    Cost:
        P-1 messages a member, one after another; (P-1)/P * bytes on the wire a member.

    Numerics:
        As `all_reduce`.
    """
    return Program(num_blocks=size, reduce=_reduce(size, rank), finish=(rank,))


def all_gather(size: int, rank: int, root: int) -> Program:
    """Return the second half of a ring's all-reduce.

    Cost:
        P-1 messages a member, one after another; (P-1)/P * bytes of the result on the wire a member.
    """
    return Program(num_blocks=size, share=_share(size, rank))


def _reduce(size: int, rank: int) -> tuple[Step, ...]:
    after, before = (rank + 1) % size, (rank - 1) % size
    return tuple(
        Step(
            sends=(Transfer(peer=after, blocks=((rank - 1 - k) % size,), partial=k > 0),),
            receives=(Transfer(peer=before, blocks=((rank - 2 - k) % size,), partial=k > 0),),
            combine=(before, rank),
        )
        for k in range(size - 1)
    )


def _share(size: int, rank: int) -> tuple[Step, ...]:
    after, before = (rank + 1) % size, (rank - 1) % size
    return tuple(
        Step(
            sends=(Transfer(peer=after, blocks=((rank - k) % size,)),),
            receives=(Transfer(peer=before, blocks=((rank - 1 - k) % size,)),),
        )
        for k in range(size - 1)
    )
