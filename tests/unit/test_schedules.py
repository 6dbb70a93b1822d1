import pytest

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Kind
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.held import peak_held_of_rank, peak_in_flight_of_stage
from hybrid.scheduler.schedules import SCHEDULES, build_schedule, gpipe, one_f_one_b

SIZES = [(1, 1), (1, 5), (2, 1), (3, 2), (4, 4), (4, 9), (8, 3)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_every_named_schedule_is_right(name, num_stages, num_microbatches):
    schedule = build_schedule(name, num_stages, num_microbatches)
    check_schedule(schedule)
    assert schedule.name == name
    assert (schedule.num_stages, schedule.num_microbatches) == (num_stages, num_microbatches)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_gradients_are_summed_in_the_order_of_one_process(name, num_stages, num_microbatches):
    for actions in build_schedule(name, num_stages, num_microbatches).actions_of_rank:
        for kind in (Kind.F, Kind.B):
            order = [action.microbatch for action in actions if action.kind is kind]
            assert order == list(range(num_microbatches))


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
    with pytest.raises(ScheduleError, match=r"got 'gpip'.*gpipe, 1f1b"):
        build_schedule("gpip", 2, 2)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 4)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_sizes_below_one_are_refused(name, sizes):
    with pytest.raises(ScheduleError, match="below one"):
        build_schedule(name, *sizes)
