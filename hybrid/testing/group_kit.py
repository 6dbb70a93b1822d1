"""The group kit: runs every clause of `hybrid.collectives.base` on a variant. Needs no pytest.

A variant says how a world of ranks, all in this process, is opened, and one line puts it through the kit (see
`docs/collectives.md`)::

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_my_group_keeps_the_contract(clause):
        GroupKit(open_my_world).check(clause)

The clauses themselves are in `group_clauses.py` and `group_life_clauses.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import final

import torch

from hybrid.collectives import Group
from hybrid.testing import group_clauses, group_life_clauses
from hybrid.testing.group_rig import DTYPES, Broken, OpenWorld, Rig, unwrapped

CHECK_OF_CLAUSE: dict[str, Callable[[Rig], None]] = {
    "order": group_life_clauses.order,
    "point to point": group_clauses.point_to_point,
    "asynchronous": group_life_clauses.asynchronous,
    "in place": group_clauses.in_place,
    "same bits": group_clauses.same_bits_everywhere,
    "numerics": group_clauses.numerics,
    "reductions": group_clauses.reductions,
    "moves": group_clauses.moves,
    "uneven": group_clauses.uneven,
    "large": group_life_clauses.large,
    "bounded waits": group_life_clauses.bounded_waits,
    "loss is told": group_life_clauses.loss_is_told,
    "misuse is refused": group_life_clauses.misuse_is_refused,
    "close": group_life_clauses.close,
}
CLAUSES: tuple[str, ...] = tuple(CHECK_OF_CLAUSE)
"""The names of the clauses, in the contract's order; "reductions", "moves" and "large" are its operations."""


class ClauseBroken(AssertionError):
    """A variant does not keep a clause of the contract."""

    def __init__(self, clause: str, what: str) -> None:
        self.clause, self.what = clause, what
        super().__init__(f"clause {clause!r} is broken: {what}")


@final
class GroupKit:
    """The contract's clauses, for one variant.

    Args:
        open_world: opens ranks in this process and the medium between them; see `group_rig.World`.
        sizes: how many ranks.
        dtypes: formats of "reductions" and "moves".
        counts: elements of a tensor there.
        wrap: laid around each end: a planted fault.
        patience_s: how long what must happen may take.
        loss_s: how long the loss of a member may stay unknown.
    """

    def __init__(
        self,
        open_world: OpenWorld,
        *,
        sizes: Sequence[int] = (1, 2, 3),
        dtypes: Sequence[torch.dtype] = DTYPES,
        counts: Sequence[int] = (0, 1, 1001),
        wrap: Callable[[Group], Group] = unwrapped,
        patience_s: float = 10.0,
        loss_s: float = 8.0,
    ) -> None:
        self._rig = Rig(
            open_world=open_world,
            sizes=tuple(sizes),
            dtypes=tuple(dtypes),
            counts=tuple(counts),
            wrap=wrap,
            patience_s=patience_s,
            loss_s=loss_s,
        )

    def check(self, clause: str) -> None:
        """Run one of `CLAUSES`, in a thread of its own so that a hang is found too.

        Raises:
            ClauseBroken: the variant does not keep it; says how.
        """
        found: list[str] = []

        def run() -> None:
            try:
                CHECK_OF_CLAUSE[clause](self._rig)
            except Broken as what:
                found.append(str(what))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=run, name=f"kit: {clause}", daemon=True)
        thread.start()
        limit_s = 10 * self._rig.patience_s + 2 * self._rig.loss_s
        thread.join(limit_s)
        if thread.is_alive():
            raise ClauseBroken(clause, f"something still blocks after {limit_s} s")
        if found:
            raise ClauseBroken(clause, found[0])
