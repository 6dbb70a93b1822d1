"""Which layers' outer steps fall on which inner steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import PlanError
from hybrid.scheduler.fragments import build_outer_schedule


def build(num_layers=6, every_steps=20, num_fragments=1, overlap_steps=0, tied=False):
    return build_outer_schedule(
        num_layers, every_steps=every_steps, num_fragments=num_fragments, overlap_steps=overlap_steps, tied=tied
    )


def test_one_fragment_meets_every_so_many_steps():
    schedule = build(every_steps=5)
    assert [step for step in range(21) if schedule.starts_after(step)] == [5, 10, 15, 20]
    assert all(schedule.starts_after(step) == schedule.ends_after(step) for step in range(21))


def test_fragments_meet_one_after_the_other_and_end_as_much_later_as_they_overlap():
    schedule = build(every_steps=6, num_fragments=3, overlap_steps=2)
    assert {step: schedule.starts_after(step) for step in range(1, 9)} == {
        1: (), 2: (1,), 3: (), 4: (2,), 5: (), 6: (0,), 7: (), 8: (1,)
    }  # fmt: skip
    assert schedule.ends_after(2) == ()
    assert schedule.ends_after(4) == (1,)
    assert schedule.ends_after(8) == (0,)


def test_neighbouring_layers_are_in_different_fragments():
    assert [fragment.layers for fragment in build(num_fragments=3).fragments] == [(0, 3), (1, 4), (2, 5)]


def test_a_tied_head_meets_with_its_embedding():
    assert [fragment.layers for fragment in build(num_fragments=3, tied=True).fragments] == [(0, 3, 5), (1, 4), (2,)]


@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(1, 8), st.integers(0, 29), st.booleans(), st.integers(100, 200)
)
def test_every_layer_meets_exactly_once_in_a_period_and_never_leaves_before_it_is_back(
    num_layers, every_steps, num_fragments, overlap_steps, tied, start
):
    if num_fragments > min(num_layers, every_steps) or overlap_steps >= every_steps:
        return
    schedule = build(num_layers, every_steps, num_fragments, overlap_steps, tied)
    met = [layer for fragment in schedule.fragments for layer in fragment.layers]
    assert sorted(met) == list(range(num_layers))
    period = [index for step in range(start, start + every_steps) for index in schedule.starts_after(step)]
    assert sorted(period) == list(range(num_fragments))
    away: set[int] = set()
    for step in range(start):
        if overlap_steps:
            away -= set(schedule.ends_after(step))
        assert away.isdisjoint(schedule.starts_after(step))
        away |= set(schedule.starts_after(step))
        if not overlap_steps:
            away.clear()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_fragments": 7}, "valid: 1 to 6"),
        ({"num_fragments": 0}, "valid: 1 to 6"),
        ({"num_fragments": 4, "every_steps": 3}, "valid: 1 to 3"),
        ({"overlap_steps": 20}, "valid: 0 to 19"),
    ],
)
def test_impossible_fragments_are_refused_with_the_possible_ones(change, match):
    with pytest.raises(PlanError, match=match):
        build(**change)
