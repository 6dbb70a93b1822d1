"""Which algorithm an operation takes, by size, group and link: rows of a table, read and decided without a clock.

Every member must hold the same table: the algorithm is part of each operation's header, so other ones are refused.
May import only `errors` and this folder's algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How to run an operation."""

    algorithm: str
    segment_bytes: int = 1 << 20
    """Messages are cut to about this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """For an operation of at most `max_bytes` among at most `max_size` members over a link."""

    operation: str
    choice: Choice
    link: str = ANY
    max_bytes: int | None = None
    max_size: int | None = None

    def fits(self, operation: str, size_bytes: int, size: int, link: str) -> bool:
        """Return whether the row speaks of this operation."""
        return (
            self.operation == operation
            and self.link in (ANY, link)
            and (self.max_bytes is None or size_bytes <= self.max_bytes)
            and (self.max_size is None or size <= self.max_size)
        )


def choose(table: Sequence[Row], operation: str, size_bytes: int, size: int, link: str) -> Choice:
    """Return the choice of the first row that fits."""
    return next(row.choice for row in table if row.fits(operation, size_bytes, size, link))


DEFAULT_TABLE: tuple[Row, ...] = (
    Row(operation="all_reduce", max_bytes=16 << 10, choice=Choice(algorithm="exchange")),
    Row(operation="all_reduce", choice=Choice(algorithm="direct")),
    Row(operation="reduce_scatter", choice=Choice(algorithm="direct")),
    Row(operation="all_gather", choice=Choice(algorithm="direct")),
    Row(operation="broadcast", max_bytes=64 << 10, choice=Choice(algorithm="tree")),
    Row(operation="broadcast", choice=Choice(algorithm="chain")),
    Row(operation="reduce", choice=Choice(algorithm="direct")),
    Row(operation="gather", choice=Choice(algorithm="direct")),
    Row(operation="scatter", choice=Choice(algorithm="direct")),
    Row(operation="all_to_all", choice=Choice(algorithm="direct")),
    Row(operation="barrier", choice=Choice(algorithm="dissemination")),
)
