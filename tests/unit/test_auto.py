import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import PlanError, ScheduleError
from hybrid.scheduler.auto import auto_schedule, fitting_by_hand
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.greedy import Policy, list_schedule
from hybrid.scheduler.interleaved import round_layout
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.pipeline_costs import PipelineCosts, equal_costs
from hybrid.scheduler.zero_bubble import v_layout

seconds = st.floats(0.1, 4.0)


@st.composite
def problems(draw) -> tuple[PipelineCosts, int]:
    num_ranks = draw(st.integers(1, 4))
    layout = draw(st.sampled_from([tuple(range(num_ranks)), v_layout(num_ranks), round_layout((2,) * num_ranks)]))
    count = len(layout)

    def row(width, values):
        return tuple(draw(st.lists(values, min_size=width, max_size=width)))

    held = row(count, st.floats(0.5, 2.0))
    kept = tuple(value * draw(st.floats(0.0, 1.0)) for value in held)
    least = [sum(held[s] for s in range(count) if layout[s] == rank) for rank in range(num_ranks)]
    costs = PipelineCosts(
        rank_of_stage=layout,
        forward_s=row(count, seconds),
        input_gradient_s=row(count, seconds),
        weight_gradient_s=row(count, seconds),
        transfer_s=row(count - 1, st.floats(0.0, 1.0)),
        held_bytes=held,
        kept_bytes=kept,
        limit_bytes=tuple(need * draw(st.floats(1.0, 4.0)) for need in least),
    )
    return costs, draw(st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans())
def test_auto_is_right_fits_and_is_never_slower_than_by_hand(problem, barrier):
    costs, num_microbatches = problem
    found = auto_schedule(costs, num_microbatches, barrier=barrier, num_tries=24)
    check_schedule(found)
    lower_communication(found)
    assert found.name == "auto"
    assert costs.fits(found)

    def judged(schedule):
        timeline = costs.simulate(schedule)
        return timeline.step_s if barrier else timeline.period_s

    for schedule in fitting_by_hand(costs, num_microbatches):
        assert judged(found) <= judged(schedule)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_walk_takes_the_time_that_the_simulator_says(problem):
    costs, num_microbatches = problem
    ranks = costs.num_ranks
    policy = Policy(
        hold=(0.5,) * ranks,
        first_hold=(1.0,) * ranks,
        overrun=(0.1,) * ranks,
        most_in_flight=(math.inf,) * ranks,
        saves_slack=True,
    )
    outcome = list_schedule(costs, num_microbatches, policy)
    assert outcome is not None
    timeline = costs.simulate(outcome.schedule("walk", costs.rank_of_stage, num_microbatches))
    assert outcome.step_s == pytest.approx(timeline.step_s)
    assert outcome.period_s == pytest.approx(timeline.period_s)
    assert list_schedule(costs, num_microbatches, policy, cutoff_s=outcome.period_s / 2) is None


def test_auto_beats_every_schedule_by_hand_where_memory_allows():
    costs = equal_costs((0, 1, 2, 3), transfer_s=0.1, weight_gradient_s=0.8, limit_bytes=8.0, kept_bytes=0.4)
    found = costs.simulate(auto_schedule(costs, 12, barrier=False)).period_s
    by_hand = [costs.simulate(schedule).period_s for schedule in fitting_by_hand(costs, 12)]
    assert found < 0.97 * min(by_hand)


def test_the_same_seed_gives_the_same_schedule():
    costs = equal_costs((0, 1, 2), forward_s=1.3, transfer_s=0.2, limit_bytes=4.0)
    assert auto_schedule(costs, 6, num_tries=80, seed=7) == auto_schedule(costs, 6, num_tries=80, seed=7)


def test_a_microbatch_that_does_not_fit_is_told_in_bytes():
    costs = replace(equal_costs((0, 1, 2)), held_bytes=(1.0, 5.0, 1.0), limit_bytes=(3.0, 3.0, 3.0))
    with pytest.raises(PlanError, match="rank 1 lacks 2 bytes"):
        auto_schedule(costs, 4)


def test_costs_of_the_wrong_length_are_refused():
    costs = equal_costs((0, 1, 2))
    for change in ({"forward_s": (1.0,)}, {"transfer_s": ()}, {"limit_bytes": (1.0,)}):
        with pytest.raises(ScheduleError, match=next(iter(change))):
            replace(costs, **change)
