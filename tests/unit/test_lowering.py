from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import COMPUTE, Action, Kind, Schedule
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.held import peak_posted_of_stage
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.schedules import SCHEDULES, build_schedule, gpipe, one_f_one_b
from hybrid.scheduler.simulate import simulate

names = st.sampled_from(sorted(SCHEDULES))
sizes = st.integers(1, 6)


def schedule_of(text: str, *, rank_of_stage=None, num_microbatches=1) -> Schedule:
    rows = tuple(tuple(map(Action.parse, row.split())) for row in text.strip().split("\n"))
    ranks = tuple(range(len(rows))) if rank_of_stage is None else rank_of_stage
    return Schedule(name="test", num_microbatches=num_microbatches, rank_of_stage=ranks, actions_of_rank=rows)


def test_sends_follow_their_producer_and_receives_are_hoisted():
    assert str(lower_communication(one_f_one_b(2, 3), receives_ahead=1)) == (
        "rank 0: 0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0B0 0RECV_B1 0F2 0SEND_F2 0RECV_B2 0B1 0B2\n"
        "rank 1: 1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1RECV_F2 1B1 1SEND_B1 1F2 1B2 1SEND_B2"
    )


@given(names, sizes, sizes, st.integers(0, 4))
def test_lowering_adds_messages_and_changes_no_compute(name, num_stages, num_microbatches, receives_ahead):
    schedule = build_schedule(name, num_stages, num_microbatches)
    lowered = lower_communication(schedule, receives_ahead=receives_ahead)
    check_schedule(lowered)
    for before, after in zip(schedule.actions_of_rank, lowered.actions_of_rank, strict=True):
        assert tuple(action for action in after if action.kind in COMPUTE) == before
    messages = sum(a.kind not in COMPUTE for actions in lowered.actions_of_rank for a in actions)
    assert messages == 4 * (num_stages - 1) * num_microbatches


@given(names, sizes, sizes, st.integers(0, 4))
def test_a_receive_stands_as_many_compute_actions_ahead_as_asked(name, num_stages, num_microbatches, ahead):
    lowered = lower_communication(build_schedule(name, num_stages, num_microbatches), receives_ahead=ahead)
    for actions in lowered.actions_of_rank:
        compute_before = 0
        posted = {}
        for action in actions:
            if action.kind in (Kind.RECV_F, Kind.RECV_B):
                posted[action.kind is Kind.RECV_F, action.microbatch] = compute_before
            elif action.kind in COMPUTE:
                at = posted.get((action.kind is Kind.F, action.microbatch))
                at = None if action.kind is Kind.W else at
                assert at is None or at == max(0, compute_before - ahead)
                compute_before += 1


@given(names, sizes, sizes, st.integers(0, 4))
def test_no_rank_posts_more_receives_than_it_was_allowed(name, num_stages, num_microbatches, ahead):
    lowered = lower_communication(build_schedule(name, num_stages, num_microbatches), receives_ahead=ahead)
    assert all(sum(peaks) <= 2 * (ahead + 1) and max(peaks) <= ahead + 1 for peaks in peak_posted_of_stage(lowered))


@given(names, sizes, sizes)
def test_a_lowered_schedule_runs_as_its_compute_actions_do(name, num_stages, num_microbatches):
    schedule = build_schedule(name, num_stages, num_microbatches)
    seconds = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.25, Kind.W: 0.75}
    timelines = [
        simulate(one, seconds_of=lambda a: seconds[a.kind] + a.stage, transfer_s=lambda a: 0.25)
        for one in (schedule, lower_communication(schedule))
    ]
    assert timelines[0].spans_of_rank == timelines[1].spans_of_rank
    assert sorted(timelines[0].transfers) == sorted(timelines[1].transfers)


def test_stages_of_one_rank_exchange_no_messages():
    schedule = schedule_of("0F0 1F0 1B0 0B0", rank_of_stage=(0, 0))
    assert lower_communication(schedule) == schedule


def test_a_split_backward_sends_after_the_input_gradient():
    lowered = lower_communication(schedule_of("0F0 0I0 0W0\n1F0 1I0 1W0"))
    assert str(lowered) == ("rank 0: 0RECV_B0 0F0 0SEND_F0 0I0 0W0\nrank 1: 1RECV_F0 1F0 1I0 1SEND_B0 1W0")


def test_a_lowered_schedule_is_not_lowered_again():
    with pytest.raises(ScheduleError, match="already has communication"):
        lower_communication(lower_communication(gpipe(2, 2)))


def test_a_negative_distance_is_refused():
    with pytest.raises(ScheduleError, match="negative"):
        lower_communication(gpipe(2, 2), receives_ahead=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0\n1F0 1B0", "stage 0 does not compute microbatch 0 once"),
        ("0F0 0B0 0W0\n1F0 1B0", "stage 0 does not compute microbatch 0 once"),
        ("0F0 0I0\n1F0 1B0", "stage 0 does not compute microbatch 0 once"),
        ("0F0 0F0 0B0\n1F0 1B0", "stands twice"),
        ("0B0 0F0\n1F0 1B0", "0B0 stands before 0F0"),
        ("0F0 0W0 0I0\n1F0 1B0", "0W0 stands before 0I0"),
        ("0F0 0B0 1F0\n1B0", "stage 1 is on rank 1"),
        ("0F0 0B0\n1F0 1B0 2F0", "no stage 2"),
        ("0F0 0B0 0F1 0B1\n1F0 1B0", "no microbatch 1"),
        ("0F0 0SEND_F0 0B0\n1F0 1B0", "0B0 has no 0RECV_B0 posted before it"),
        ("0RECV_B0 0F0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0", "0F0 has no 0SEND_F0 after it"),
        ("0RECV_B0 0F0 0SEND_F0 0B0\n1RECV_F0 1F0 1SEND_B0 1B0", "1B0 has no 1SEND_B0 after it"),
        ("0RECV_B0 0F0 0SEND_F0 0B0\n1F0 1RECV_F0 1B0 1SEND_B0", "1F0 has no 1RECV_F0 posted before it"),
        ("0RECV_B0 0F0 0SEND_F0 0B0 0SEND_B0\n1RECV_F0 1F0 1B0 1SEND_B0", "nobody needs"),
    ],
)
def test_a_wrong_schedule_is_refused(text, message):
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule_of(text))


def test_stages_of_one_rank_must_stand_in_order():
    with pytest.raises(ScheduleError, match="1F0 stands before 0F0"):
        check_schedule(schedule_of("1F0 0F0 1B0 0B0", rank_of_stage=(0, 0)))
    with pytest.raises(ScheduleError, match="0B0 stands before 1B0 or 1I0"):
        check_schedule(schedule_of("0F0 1F0 0B0 1B0", rank_of_stage=(0, 0)))


def test_receives_posted_in_another_order_than_the_sends_are_refused():
    lowered = lower_communication(gpipe(2, 2))
    rows = [list(actions) for actions in lowered.actions_of_rank]
    first, second = rows[1].index(Action(1, Kind.RECV_F, 0)), rows[1].index(Action(1, Kind.RECV_F, 1))
    rows[1][first], rows[1][second] = rows[1][second], rows[1][first]
    with pytest.raises(ScheduleError, match="rank 0 sends 0SEND_F0 where its peer has posted 1RECV_F1"):
        check_schedule(replace(lowered, actions_of_rank=tuple(map(tuple, rows))))


@given(names, st.integers(2, 4), st.integers(1, 4), st.data())
def test_a_lowered_schedule_that_lost_any_action_is_refused(name, num_stages, num_microbatches, data):
    lowered = lower_communication(build_schedule(name, num_stages, num_microbatches))
    rank = data.draw(st.integers(0, num_stages - 1))
    row = lowered.actions_of_rank[rank]
    lost = data.draw(st.integers(0, len(row) - 1))
    rows = list(lowered.actions_of_rank)
    rows[rank] = row[:lost] + row[lost + 1 :]
    with pytest.raises(ScheduleError):
        check_schedule(replace(lowered, actions_of_rank=tuple(rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 0}, "needs a microbatch"),
        ({"rank_of_stage": ()}, "needs a stage"),
        ({"rank_of_stage": (0, 2)}, "stage 1 is on no rank"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ScheduleError, match=message):
        check_schedule(replace(gpipe(2, 1), **change))
