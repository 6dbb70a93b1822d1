"""Who carries what between islands: every rank's own link takes its share, whatever the islands' sizes.

Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hybrid.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a vector, as a share of its length, and who carries it between the islands."""

    start: float
    stop: float
    owners: tuple[int, ...]
    """One member of each island, by position in the group."""


def stripe(islands: Sequence[Sequence[int]], weight_of_position: Sequence[float]) -> tuple[Piece, ...]:
    """Return the pieces of a vector, in order: each member of an island owns one run, as long as its weight.

    Args:
        islands: positions, all of them, each in one island.
        weight_of_position: each member's bandwidth to the other islands, in whatever unit.

    Raises:
        UserError: a position is missing or doubled, or a weight is not above 0.
    """
    positions = sorted(position for island in islands for position in island)
    if positions != list(range(len(weight_of_position))) or not all(islands):
        valid = f"each of 0 to {len(weight_of_position) - 1} once, no island empty"
        raise UserError("the islands are not a partition of the group", value=list(map(list, islands)), valid=valid)
    if min(weight_of_position) <= 0:
        raise UserError("a link's weight is not above 0", value=min(weight_of_position), valid="bandwidths in one unit")
    runs = [_runs(island, weight_of_position) for island in islands]
    borders = sorted({border for run in runs for border, _ in run} | {0.0})
    pieces = []
    for start, stop in pairwise(borders):
        owners = tuple(next(owner for border, owner in run if border >= stop) for run in runs)
        pieces.append(Piece(start=start, stop=stop, owners=owners))
    return tuple(pieces)


def _runs(island: Sequence[int], weight_of_position: Sequence[float]) -> list[tuple[float, int]]:
    """Return where each member's run ends, and whose it is."""
    total = sum(weight_of_position[position] for position in island)
    runs, reached = [], 0.0
    for position in island:
        reached += weight_of_position[position] / total
        # Borders that are the same but for rounding would make a piece of nothing.
        runs.append((round(reached, 12), position))
    runs[-1] = (1.0, island[-1])
    return runs


def borders_of(pieces: Sequence[Piece], num_elements: int) -> list[int]:
    """Return where each piece ends in a vector of `num_elements`, the same on every member."""
    return [round(piece.stop * num_elements) for piece in pieces]
