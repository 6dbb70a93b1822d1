"""Which algorithm an operation takes, by size, group, link and format: rows of a table, decided without a clock.

The shipped table is `choices.json`, with the date and the machine that it was measured on; `measure_table` makes
another. Every member must hold the same table: the algorithm is part of each operation's header, and another one is
refused. May import only `errors` and this folder's algorithms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid.collectives.algorithms import ALGORITHMS
from hybrid.errors import ConfigError

ANY = "any"
BETWEEN_ISLANDS = "between islands"
"""The link of the groups that carry pieces between islands: slow, so no step may wait for another in vain."""


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
    narrow: bool | None = None
    """True: for reductions of float16 and bfloat16, whose partial sums weigh twice on the wire; None: for all."""

    def fits(self, operation: str, size_bytes: int, size: int, link: str, *, narrow: bool) -> bool:
        """Return whether the row speaks of this operation."""
        return (
            self.operation == operation
            and self.link in (ANY, link)
            and (self.max_bytes is None or size_bytes <= self.max_bytes)
            and (self.max_size is None or size <= self.max_size)
            and (self.narrow is None or self.narrow == narrow)
        )


def choose(
    table: Sequence[Row], operation: str, size_bytes: int, size: int, link: str, *, narrow: bool = False
) -> Choice:
    """Return the choice of the first row that fits."""
    return next(row.choice for row in table if row.fits(operation, size_bytes, size, link, narrow=narrow))


def load_table(path: str | Path) -> tuple[Row, ...]:
    """Return the rows of a file; operations that it does not speak of for all cases fall back to the shipped ones.

    Raises:
        ConfigError: not such a file, or an algorithm that there is not.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = tuple(_row(each) for each in data["rows"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "not a table of collectives", value=str(path), fix="write one with `save_table`", where=str(error)
        ) from None
    for row in rows:
        known = ALGORITHMS.get(row.operation, {})
        if row.choice.algorithm not in known:
            raise ConfigError(
                f"no such algorithm for {row.operation}", value=row.choice.algorithm, valid=known, where=str(path)
            )
    return rows if Path(path) == _SHIPPED else (*rows, *DEFAULT_TABLE)


def save_table(path: str | Path, rows: Sequence[Row], *, measured: Mapping[str, str]) -> None:
    """Write rows as a file that people can read and change.

    Args:
        measured: when, on what machine and how.
    """
    lines = ",\n  ".join(
        json.dumps({key: value for key, value in asdict(row).items() if value is not None}) for row in rows
    )
    text = f'{{"measured": {json.dumps(dict(measured))},\n "rows": [\n  {lines}\n]}}\n'
    Path(path).write_text(text, encoding="utf-8")


def _row(data: Mapping[str, Any]) -> Row:
    return Row(**{**data, "choice": Choice(**data["choice"])})


_SHIPPED = Path(__file__).with_name("choices.json")
DEFAULT_TABLE: tuple[Row, ...] = ()
DEFAULT_TABLE = load_table(_SHIPPED)
"""The shipped rows: some fits every operation."""
