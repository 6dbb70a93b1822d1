import pytest

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Kind
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.held import peak_held_of_rank, peak_in_flight_of_stage
from hybrid.scheduler.interleaved import interleaved, round_layout
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.pipeline_costs import equal_costs
from hybrid.scheduler.schedules import SCHEDULES, build_schedule, gpipe, one_f_one_b
from hybrid.scheduler.zero_bubble import v_layout, zb_h1, zb_h2, zb_v

SIZES = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (8, 3)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_every_named_schedule_is_right(name, num_stages, num_microbatches):
    schedule = build_schedule(name, num_stages, num_microbatches)
    check_schedule(schedule)
    assert schedule.name == name
    assert (schedule.num_stages, schedule.num_microbatches) == (num_stages, num_microbatches)


@pytest.mark.parametrize("build", [*SCHEDULES.values(), zb_v, lambda p, m: interleaved((2,) * p, m)])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), SIZES)
def test_gradients_are_summed_in_the_order_of_one_process(build, num_ranks, num_microbatches):
    schedule = build(num_ranks, num_microbatches)
    for stage, rank in enumerate(schedule.rank_of_stage):
        for kinds in ({Kind.F}, {Kind.B, Kind.I}, {Kind.B, Kind.W}):
            mine = [a for a in schedule.actions_of_rank[rank] if a.stage == stage and a.kind in kinds]
            assert [action.microbatch for action in mine] == list(range(num_microbatches))


def test_1f1b_is_the_schedule_of_the_paper():
    assert str(one_f_one_b(3, 4)) == (
        "rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3\n"
        "rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3\n"
        "rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"
    )


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_1f1b_holds_no_more_than_its_distance_from_the_end(num_stages, num_microbatches):
    peaks = peak_in_flight_of_stage(one_f_one_b(num_stages, num_microbatches))
    assert peaks == tuple(min(num_stages - stage, num_microbatches) for stage in range(num_stages))


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_gpipe_holds_every_microbatch(num_stages, num_microbatches):
    assert peak_held_of_rank(gpipe(num_stages, num_microbatches)) == (num_microbatches,) * num_stages


def test_an_unknown_schedule_is_refused_with_the_valid_names():
    with pytest.raises(ScheduleError, match=r"got 'gpip'.*gpipe, 1f1b, zb-h1, zb-h2"):
        build_schedule("gpip", 2, 2)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sizes_below_one_are_refused(name, sizes):
    with pytest.raises(ScheduleError, match="below one"):
        build_schedule(name, *sizes)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 8), (4, 12), (8, 24)])
def test_the_bubbles_of_equal_stages_are_those_of_the_papers(num_ranks, num_microbatches):
    cost = {"forward_s": 10.0, "input_gradient_s": 9.0, "weight_gradient_s": 6.0}
    work_s = 25.0 * num_microbatches

    def idle_s(schedule):
        return equal_costs(schedule.rank_of_stage, **cost).simulate(schedule).period_s - work_s

    assert idle_s(one_f_one_b(num_ranks, num_microbatches)) == (num_ranks - 1) * 25.0
    assert idle_s(zb_h1(num_ranks, num_microbatches)) == (num_ranks - 1) * (10.0 + 9.0 - 6.0)
    assert idle_s(zb_h2(num_ranks, num_microbatches)) == (num_ranks - 1) * (10.0 + 9.0 - 2 * 6.0)
    in_three = interleaved((3,) * num_ranks, num_microbatches)
    costs = equal_costs(in_three.rank_of_stage, **{name: value / 3 for name, value in cost.items()})
    assert costs.simulate(in_three).period_s - work_s == pytest.approx((num_ranks - 1) * 25.0 / 3)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 2), (2, 4), (3, 7), (4, 8), (8, 24)])
def test_zb_v_has_no_bubble_where_all_actions_take_the_same_time(num_ranks, num_microbatches):
    schedule = zb_v(num_ranks, num_microbatches)
    assert equal_costs(schedule.rank_of_stage).simulate(schedule).period_s == 6 * num_microbatches
    assert max(peak_held_of_rank(schedule)) <= 2 * num_ranks


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_the_zero_bubble_schedules_hold_what_they_say(num_stages, num_microbatches):
    assert max(peak_held_of_rank(zb_h1(num_stages, num_microbatches))) <= num_stages
    assert max(peak_held_of_rank(zb_h2(num_stages, num_microbatches))) <= 2 * num_stages - 1
    assert max(peak_held_of_rank(zb_v(num_stages, num_microbatches))) <= 2 * num_stages


@pytest.mark.parametrize("num_microbatches", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("stages_of_rank", [(2, 2), (2, 1), (1, 2), (2, 1, 2), (3, 1, 1, 2), (1, 1, 4), (1,)])
def test_interleaved_ranks_may_hold_different_numbers_of_stages(stages_of_rank, num_microbatches):
    schedule = interleaved(stages_of_rank, num_microbatches)
    lower_communication(schedule)
    costs = equal_costs(schedule.rank_of_stage)
    assert costs.simulate(schedule).step_s >= max(costs.work_s_of_rank) * num_microbatches
    assert [schedule.rank_of_stage.count(rank) for rank in range(len(stages_of_rank))] == list(stages_of_rank)


def test_stages_are_dealt_out_in_rounds_or_down_and_up():
    assert round_layout((2, 1, 2)) == (0, 1, 2, 0, 2)
    assert v_layout(3) == (0, 1, 2, 2, 1, 0)


def test_a_rank_without_a_stage_is_refused():
    with pytest.raises(ScheduleError, match="a rank needs a stage"):
        interleaved((2, 0), 4)
