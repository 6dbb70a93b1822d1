"""The kit of a torch.distributed backend: each clause is run by every rank of a world, with gloo beside it.

    from hybrid.testing.c10d_kit import CLAUSES, run_clauses
    with RankProcesses(2) as ranks:
        failures = ranks.run(run_clauses, ranks.new_store(), None, timeout_s=100.0)[0]

A clause compares the backend with a plain reference, and, bit for bit where the order of summation is the same, with
gloo. May import only torch, `hybrid.distributed` and the clauses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

import hybrid.distributed
from hybrid.testing.c10d_clauses import COLLECTIVE_CLAUSES
from hybrid.testing.c10d_life_clauses import LIFE_CLAUSES
from hybrid.testing.c10d_seat import Clause, Seat
from hybrid.testing.c10d_training_clauses import TRAINING_CLAUSES

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

CLAUSES: dict[str, Clause] = {
    clause.__name__: clause for clause in (*COLLECTIVE_CLAUSES, *LIFE_CLAUSES, *TRAINING_CLAUSES)
}
"""By name."""

_TIMEOUT = timedelta(seconds=30)


@contextmanager
def world(backend: str, rank: int, size: int, store: str, options: Any = None) -> Iterator[None]:
    """Be in a torch.distributed world; out of it at the end."""
    hybrid.distributed.register()
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=size, timeout=_TIMEOUT, pg_options=options
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_clauses(
    rank: int, size: int, store: str, options: Any, names: Sequence[str] = tuple(CLAUSES)
) -> dict[str, str]:
    """Return what each clause found wrong, by its name; nothing, if all is well."""
    found: dict[str, str] = {}
    with world("hybrid", rank, size, store, options):
        seat = Seat(rank=rank, size=size, gloo=dist.new_group(backend="gloo", timeout=_TIMEOUT))
        for name in names:
            error = _told(CLAUSES[name], seat)
            # Every rank must know, or they would be at different clauses from here.
            told: list[Any] = [None] * size
            dist.all_gather_object(told, error, group=seat.gloo)
            wrong = [f"rank {at}: {each}" for at, each in enumerate(told) if each is not None]
            found |= {name: "\n".join(wrong)} if wrong else {}
    return found


def _told(clause: Callable[[Seat], None], seat: Seat) -> str | None:
    try:
        clause(seat)
    except Exception:
        return traceback.format_exc()
    return None
