"""Resharding: which part of an activation each rank of a stage holds, and what goes where between two stages.

A stage of `width` copies and `tensor_parallel` ranks a copy cuts a microbatch's (samples, tokens) into boxes, one a
rank: the copies share out the samples, the ranks of a copy the tokens. The boxes of a stage neither overlap nor leave
anything out. So each byte has one holder on either side of an edge, goes over it once, forward and backward, and no
gradient need be summed there. A stage that computes on whole sequences cuts its output and joins its input inside, over
its island's own fabric; the edge, which may be slow, never carries a copy.

Pure: no torch, no clock, no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Samples [first_sample, end_sample) by tokens [first_token, end_token) of a microbatch's activation."""

    first_sample: int
    end_sample: int
    first_token: int
    end_token: int

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        return max(0, self.end_sample - self.first_sample)

    @property
    def num_tokens(self) -> int:
        """Tokens of each of its samples."""
        return max(0, self.end_token - self.first_token)

    @property
    def size(self) -> int:
        """Tokens of all its samples."""
        return self.num_samples * self.num_tokens

    def meet(self, other: Box) -> Box:
        """Return what both hold; of size 0 where that is nothing."""
        return Box(
            first_sample=max(self.first_sample, other.first_sample),
            end_sample=min(self.end_sample, other.end_sample),
            first_token=max(self.first_token, other.first_token),
            end_token=min(self.end_token, other.end_token),
        )

    def within(self, outer: Box) -> Box:
        """Return the same box counted from the corner of `outer`, which holds it."""
        return Box(
            first_sample=self.first_sample - outer.first_sample,
            end_sample=self.end_sample - outer.first_sample,
            first_token=self.first_token - outer.first_token,
            end_token=self.end_token - outer.first_token,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How a stage's ranks share its work: copy after copy, in each the tensor-parallel ranks in order."""

    width: int
    tensor_parallel: int

    @property
    def size(self) -> int:
        """How many ranks."""
        return self.width * self.tensor_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One message: `box` from the sending stage's rank at `sender` to the receiving stage's at `receiver`."""

    sender: int
    """Place in the sending stage's ranks."""
    receiver: int
    """Place in the receiving stage's ranks."""
    box: Box


def cut(length: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Return `parts` ranges that cover [0, length) in order; their lengths differ by one at most, longer ones first."""
    least, longer = divmod(length, parts)
    ends = [index * least + min(index, longer) for index in range(parts + 1)]
    return tuple(pairwise(ends))


def boxes_of(degrees: Degrees, *, num_samples: int, num_tokens: int) -> tuple[Box, ...]:
    """Return each rank's box of a microbatch, by its place in the stage; a box may be empty."""
    return tuple(
        Box(first_sample=samples[0], end_sample=samples[1], first_token=tokens[0], end_token=tokens[1])
        for samples in cut(num_samples, degrees.width)
        for tokens in cut(num_tokens, degrees.tensor_parallel)
    )


@lru_cache(maxsize=256)
def plan_transfers(sending: Degrees, receiving: Degrees, *, num_samples: int, num_tokens: int) -> tuple[Transfer, ...]:
    """Return the messages of one microbatch's activation between two stages, by sender, then by receiver.

    Its gradient takes the same boxes the other way.

    Cost:
        every byte once. A rank sends what it computed and receives what it needs: nothing is passed on.
    """
    size = {"num_samples": num_samples, "num_tokens": num_tokens}
    return tuple(
        Transfer(sender=sender, receiver=receiver, box=shared)
        for sender, held in enumerate(boxes_of(sending, **size))
        for receiver, needed in enumerate(boxes_of(receiving, **size))
        if (shared := held.meet(needed)).size
    )


def peers_of(sending: Degrees, receiving: Degrees, place: int, *, num_samples: int, num_tokens: int) -> tuple[int, ...]:
    """Return the places in the receiving stage to which the sending stage's rank at `place` sends, ascending."""
    transfers = plan_transfers(sending, receiving, num_samples=num_samples, num_tokens=num_tokens)
    return tuple(one.receiver for one in transfers if one.sender == place)
