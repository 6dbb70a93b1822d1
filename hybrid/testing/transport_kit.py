"""The transport kit: runs every clause of `hybrid.transports.base` on a variant. Needs no pytest.

One line puts a new variant through it (see `docs/transports.md`)::

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_shm_keeps_the_contract(clause):
        TransportKit(partial(open_node, "shm")).check(clause)

The clauses themselves are in `transport_clauses.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import final

from hybrid.testing.transport_clauses import CHECK_OF_CLAUSE
from hybrid.testing.transport_rig import Broken, OpenKitNode, Rig, unwrapped
from hybrid.transports.base import Transport

CLAUSES: tuple[str, ...] = tuple(CHECK_OF_CLAUSE)
"""The names of the clauses, in the contract's order."""


class ClauseBroken(AssertionError):
    """A variant does not keep a clause of the contract."""

    def __init__(self, clause: str, what: str) -> None:
        self.clause, self.what = clause, what
        super().__init__(f"clause {clause!r} is broken: {what}")


@final
class TransportKit:
    """The contract's clauses, for one variant.

    Args:
        open_node: opens a node; can be pickled where `processes` is true.
        processes: whether the medium joins processes; then one is killed to see that its loss is told.
        wrap: laid around both ends: a wrapper under test, or a planted fault.
        patience_s: how long what must happen may take.
        loss_s: how long the loss of a peer may stay unknown.
    """

    def __init__(
        self,
        open_node: OpenKitNode,
        *,
        processes: bool = True,
        wrap: Callable[[Transport], Transport] = unwrapped,
        patience_s: float = 5.0,
        loss_s: float = 8.0,
    ) -> None:
        self._rig = Rig(open_node=open_node, processes=processes, wrap=wrap, patience_s=patience_s, loss_s=loss_s)

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

        thread = threading.Thread(target=run, name=f"clause {clause}", daemon=True)
        thread.start()
        limit_s = 10 * self._rig.patience_s + 2 * self._rig.loss_s
        thread.join(limit_s)
        if thread.is_alive():
            raise ClauseBroken(clause, f"something still blocks after {limit_s} s")
        if found:
            raise ClauseBroken(clause, found[0])
