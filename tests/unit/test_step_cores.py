import pytest

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.cores import fair_paces, simulate_on_cores


def seconds_of(action):
    return {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0}[action.kind] * (1 + 0.1 * action.stage)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_with_a_core_each_it_is_the_plain_simulator(name, delay_s):
    schedule = build_schedule(name, 4, 6)
    plain = simulate(schedule, seconds_of=seconds_of, transfer_s=lambda a: delay_s)
    shared = simulate_on_cores(schedule, seconds_of=seconds_of, paces=fair_paces(4, 4), transfer_s=lambda a: delay_s)
    assert shared.step_s == pytest.approx(plain.step_s)
    for one, other in zip(shared.spans_of_rank, plain.spans_of_rank, strict=True):
        assert [span.action for span in one] == [span.action for span in other]
        assert [span.start_s for span in one] == pytest.approx([span.start_s for span in other])


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_on_one_core_a_step_takes_all_the_work(name):
    schedule = build_schedule(name, 4, 6)
    work_s = sum(seconds_of(action) for row in schedule.actions_of_rank for action in row)
    assert simulate_on_cores(schedule, seconds_of=seconds_of, paces=fair_paces(1, 4)).step_s == pytest.approx(work_s)


def test_two_cores_lie_between_one_and_four():
    schedule = build_schedule("1f1b", 4, 8)
    one, two, four = (
        simulate_on_cores(schedule, seconds_of=seconds_of, paces=fair_paces(n, 4)).step_s for n in (1, 2, 4)
    )
    assert four < two < one
    assert two >= one / 2


def test_ranks_that_wait_for_one_another_are_refused():
    stuck = Schedule(
        name="stuck",
        num_microbatches=1,
        rank_of_stage=(0, 1),
        actions_of_rank=((Action(0, Kind.B, 0), Action(0, Kind.F, 0)), (Action(1, Kind.F, 0), Action(1, Kind.B, 0))),
    )
    with pytest.raises(ScheduleError, match="0B0, 1F0"):
        simulate_on_cores(stuck, seconds_of=seconds_of, paces=fair_paces(2, 2))
