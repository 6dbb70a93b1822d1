"""The group kit is worth its name: it refuses every planted fault, by its own clause and for its own reason."""

from functools import partial

import pytest
import torch

from hybrid.collectives import Group
from hybrid.testing.faulty_group import CLAUSE_OF_FAULT, LEAKED, Fault, FaultyGroup
from hybrid.testing.group_kit import CLAUSES, ClauseBroken, GroupKit
from hybrid.testing.group_rig import open_transport_world

REASON_OF_FAULT = {
    Fault.WRONG_ELEMENT: "element 0 of 1 is 0.0 and not",
    Fault.DROPPED: r"all_reduce of 2 ranks, rank \d, sum of torch.float32: element 0",
    Fault.WRONG_BLOCK: "all_gather of .* is not what was given",
    Fault.OTHER_BITS: "hold other bits",
    Fault.NARROW: "accumulated in the format itself",
    Fault.INTEGER_AVERAGE: "the average of integers was not refused",
    Fault.COPY: "leaves its result elsewhere",
    Fault.WRITE_INPUT: "it is no root",
    Fault.BLOCK: "a call does not return before",
    Fault.DONE_EARLY: "is done before the other members have called",
    Fault.NO_WAIT: "a wait has returned before the result was there|that was waited for is not done",
    Fault.REORDER: "not run in the order of their calls",
    Fault.MIX_TAGS: "took a message of another tag",
    Fault.IN_TURN: "did not end within|Timeout",
    Fault.EVEN_ONLY: "reduce_scatter of .* element",
    Fault.READ_LATE: "all_gather is wrong on rank",
    Fault.SWALLOW_TIMEOUT: "a wait for an operation that others have not called returned",
    Fault.OVERSTAY: r"a wait of 0.0 s took",
    Fault.ONE_WAIT: "this operation was given up",
    Fault.DEAF: "was not told so within",
    Fault.SWALLOW_LOSS: "ended well",
    Fault.SWALLOW_MISUSE: "than the peer's was not refused",
    Fault.TAKE_ANYTHING: "not contiguous was not refused",
    Fault.CLOSE_ONCE: "closed before",
    Fault.CLOSE_LATE: "pending when the group was closed was not told",
    Fault.LEAK: "close left behind: .*thread leaked",
}


def _kit(fault: Fault | None, *, patience_s: float = 1.0) -> GroupKit:
    def wrap(group: Group) -> Group:
        return FaultyGroup(group, fault)

    return GroupKit(
        partial(open_transport_world, "inproc"),
        sizes=(1, 2),
        dtypes=(torch.float32, torch.int32),
        wrap=wrap,
        patience_s=patience_s,
        loss_s=patience_s,
    )


@pytest.mark.parametrize("fault", Fault)
def test_a_planted_fault_is_refused_by_its_clause(fault: Fault) -> None:
    try:
        with pytest.raises(ClauseBroken, match=REASON_OF_FAULT[fault]) as refusal:
            _kit(fault).check(CLAUSE_OF_FAULT[fault])
    finally:
        while LEAKED:
            LEAKED.pop().set()
    assert refusal.value.clause == CLAUSE_OF_FAULT[fault]


@pytest.mark.parametrize("clause", CLAUSES)
def test_the_same_wrapper_without_a_fault_keeps_every_clause(clause: str) -> None:
    _kit(None, patience_s=10.0).check(clause)


def test_every_clause_has_a_planted_fault() -> None:
    assert set(CLAUSES) == set(CLAUSE_OF_FAULT.values())
