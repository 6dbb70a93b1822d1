import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule

actions = st.builds(Action, st.integers(0, 999), st.sampled_from(Kind), st.integers(0, 9999))


@given(actions)
def test_an_action_reads_back_from_its_text(action):
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "-1F0", "0F-1", "0F0 0F1", "0f0", "1SEND0", "0F٣"])
def test_a_text_that_is_no_action_is_refused(text):
    with pytest.raises(ScheduleError, match="no such action"):
        Action.parse(text)


def test_actions_print_as_stage_kind_microbatch():
    assert str(Action(2, Kind.F, 0)) == "2F0"
    assert str(Action(11, Kind.SEND_B, 3)) == "11SEND_B3"


def test_a_schedule_prints_one_line_a_rank():
    schedule = Schedule(
        name="one",
        num_microbatches=1,
        rank_of_stage=(0, 1),
        actions_of_rank=(
            (Action(0, Kind.F, 0), Action(0, Kind.B, 0)),
            (Action(1, Kind.F, 0), Action(1, Kind.B, 0)),
        ),
    )
    assert str(schedule) == "rank 0: 0F0 0B0\nrank 1: 1F0 1B0"
    assert (schedule.num_stages, schedule.num_ranks) == (2, 2)
