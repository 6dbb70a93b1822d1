"""What a collective algorithm decides: for one member, which blocks go to whom, step by step, as frozen data.

Pure: no torch, no clock, no network. `hybrid.collectives.execute` acts on it; `hybrid.collectives.algorithms.check`
proves it on paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One message to or from a peer."""

    peer: int
    """Position in the group."""
    blocks: tuple[int, ...]
    partial: bool = False
    """The blocks hold reductions of several members that are not finished: they travel in the accumulation's format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Sends and receives that depend only on the steps before."""

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    combine: tuple[int, ...] = ()
    """In which order what was received and this member's own are reduced, by position; all receives are then of the
    same blocks. Empty: what was received replaces the blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What one member does. The same number of steps on every member; a message is in the same step at both ends."""

    num_blocks: int
    """Into how many parts the operation's elements are cut."""
    reduce: tuple[Step, ...] = ()
    finish: tuple[int, ...] = ()
    """Blocks that this member completes after `reduce`: divided if the mean is asked for, and rounded once."""
    share: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order."""
        return self.reduce + self.share


Algorithm: TypeAlias = Callable[[int, int, int], Program]
"""Returns the program of the member at a position: (size of the group, position, root)."""
