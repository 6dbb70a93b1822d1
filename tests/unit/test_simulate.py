"""The simulator against a slow, obvious one: relax every action's time until nothing changes."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.schedules import build_schedule, gpipe, one_f_one_b
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.timeline import Timeline

sizes = st.integers(1, 5)
seconds = st.floats(0.0, 10.0, allow_nan=False)


def reference_ends(schedule: Schedule, seconds_of, transfer_s) -> dict[Action, float]:
    """Return when each compute action ends; every rule of the data flow written out once."""
    end_s: dict[Action, float] = {}
    last = schedule.num_stages - 1
    for _ in range(sum(map(len, schedule.actions_of_rank)) + 1):
        for actions in schedule.actions_of_rank:
            before = None
            for action in actions:
                stage, microbatch = action.stage, action.microbatch
                starts = [0.0] if before is None else [end_s.get(before, float("inf"))]

                def arrival(source: Action, kind: Kind, to_stage: int) -> float:
                    same = schedule.rank_of_stage[source.stage] == schedule.rank_of_stage[to_stage]
                    wire_s = 0.0 if same else transfer_s(Action(source.stage, kind, source.microbatch))
                    return end_s.get(source, float("inf")) + wire_s

                if action.kind is Kind.F and stage > 0:
                    starts.append(arrival(Action(stage - 1, Kind.F, microbatch), Kind.SEND_F, stage))
                if action.kind in (Kind.B, Kind.I):
                    starts.append(end_s.get(Action(stage, Kind.F, microbatch), float("inf")))
                    if stage < last:
                        starts.append(
                            min(
                                arrival(Action(stage + 1, kind, microbatch), Kind.SEND_B, stage)
                                for kind in (Kind.B, Kind.I)
                            )
                        )
                if action.kind is Kind.W:
                    starts.append(end_s.get(Action(stage, Kind.I, microbatch), float("inf")))
                if max(starts) < float("inf"):
                    end_s[action] = max(starts) + seconds_of(action)
                before = action
    return end_s


@st.composite
def split_schedules(draw) -> Schedule:
    """Schedules in a random order that cannot deadlock: cut from one random order of all actions."""
    num_ranks, num_microbatches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rank_of_stage = tuple(draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=4)))
    num_stages = len(rank_of_stage)
    is_split = draw(st.booleans())
    pending = []
    for microbatch in range(num_microbatches):
        chain = [Action(stage, Kind.F, microbatch) for stage in range(num_stages)]
        for stage in reversed(range(num_stages)):
            chain.append(Action(stage, Kind.I if is_split else Kind.B, microbatch))
        pending.append(chain)
    rows = [[] for _ in range(num_ranks)]
    weights = []
    while pending or weights:
        if weights and (not pending or draw(st.booleans())):
            action = weights.pop(draw(st.integers(0, len(weights) - 1)))
        else:
            chain = pending[draw(st.integers(0, len(pending) - 1))]
            action = chain.pop(0)
            pending = [chain for chain in pending if chain]
            if action.kind is Kind.I:
                weights.append(Action(action.stage, Kind.W, action.microbatch))
        rows[rank_of_stage[action.stage]].append(action)
    return Schedule(
        name="random",
        num_microbatches=num_microbatches,
        rank_of_stage=rank_of_stage,
        actions_of_rank=tuple(map(tuple, rows)),
    )


@settings(deadline=None)
@given(split_schedules(), st.lists(seconds, min_size=5, max_size=5), st.floats(0.0, 3.0))
def test_times_equal_the_reference(schedule, costs, wire_s):
    def seconds_of(action):
        return costs[action.stage] + {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.25, Kind.W: 0.5}[action.kind]

    def transfer_s(send):
        return wire_s * (1 + send.stage)

    timeline = simulate(schedule, seconds_of=seconds_of, transfer_s=transfer_s)
    ends = reference_ends(schedule, seconds_of, transfer_s)
    assert {span.action: span.end_s for spans in timeline.spans_of_rank for span in spans} == ends
    for spans, actions in zip(timeline.spans_of_rank, schedule.actions_of_rank, strict=True):
        assert tuple(span.action for span in spans) == actions


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 5), (4, 4), (8, 24)])
def test_equal_stages_take_the_time_of_the_formula(name, num_stages, num_microbatches):
    timeline = simulate(
        build_schedule(name, num_stages, num_microbatches), seconds_of=lambda a: 1.0 if a.kind is Kind.F else 2.0
    )
    assert timeline.step_s == 3.0 * (num_microbatches + num_stages - 1)
    idle = (num_stages - 1) / (num_microbatches + num_stages - 1)
    assert timeline.idle_share_of_rank == pytest.approx([idle] * num_stages)
    assert timeline.idle_share == pytest.approx(idle)


def test_the_slowest_stage_sets_the_pace():
    timeline = simulate(one_f_one_b(4, 100), seconds_of=lambda a: 2.0 if a.stage == 2 else 1.0)
    # Stage 2 is never idle from its first forward to its last backward.
    assert timeline.step_s == 2 * 1.0 + 100 * 4.0 + 2 * 1.0
    assert min(range(4), key=lambda rank: timeline.idle_share_of_rank[rank]) == 2


def test_a_link_takes_one_message_at_a_time():
    timeline = simulate(gpipe(2, 3), seconds_of=lambda a: 1.0, transfer_s=lambda a: 5.0, link_busy_s=lambda a: 4.0)
    sent = [(t.start_s, t.end_s) for t in timeline.transfers if t.action.kind is Kind.SEND_F]
    assert sent == [(1.0, 6.0), (5.0, 10.0), (9.0, 14.0)]


def test_both_directions_of_a_link_run_at_once():
    timeline = simulate(
        one_f_one_b(2, 8), seconds_of=lambda a: 1.0, transfer_s=lambda a: 1.0, link_busy_s=lambda a: 1.0
    )
    free = simulate(one_f_one_b(2, 8), seconds_of=lambda a: 1.0, transfer_s=lambda a: 1.0)
    assert timeline.step_s == free.step_s


def test_stages_of_one_rank_hand_on_without_a_transfer():
    rows = "0F0 1F0 1B0 0B0"
    schedule = Schedule(
        name="one rank",
        num_microbatches=1,
        rank_of_stage=(0, 0),
        actions_of_rank=(tuple(map(Action.parse, rows.split())),),
    )
    timeline = simulate(schedule, seconds_of=lambda a: 1.0, transfer_s=lambda a: 99.0)
    assert (timeline.step_s, timeline.transfers) == (4.0, ())


def _deadlocked() -> Schedule:
    rows = ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"]
    return Schedule(
        name="crossed",
        num_microbatches=2,
        rank_of_stage=(0, 1),
        actions_of_rank=tuple(tuple(map(Action.parse, row.split())) for row in rows),
    )


def test_a_deadlock_names_each_waiting_rank_and_action():
    with pytest.raises(ScheduleError) as caught:
        simulate(_deadlocked(), seconds_of=lambda a: 1.0)
    text = str(caught.value)
    assert "rank 0 at 0B0 waits for the gradient of stage 1, microbatch 0" in text
    assert "rank 1 at 1F1 waits for the activation of stage 0, microbatch 1" in text


def test_a_rank_that_waits_for_itself_is_named():
    schedule = Schedule(
        name="backwards",
        num_microbatches=1,
        rank_of_stage=(0,),
        actions_of_rank=(tuple(map(Action.parse, ["0W0", "0I0", "0F0"])),),
    )
    with pytest.raises(ScheduleError, match="rank 0 at 0W0 waits for its own 0I0"):
        simulate(schedule, seconds_of=lambda a: 1.0)


def test_the_gantt_shows_each_action_where_it_runs():
    timeline = simulate(one_f_one_b(2, 2), seconds_of=lambda a: 1.0 if a.kind is Kind.F else 2.0)
    assert timeline.gantt(width=7 + 36) == (
        "rank 0 F0==F1==........B0######....B1######\nrank 1 ....F0==B0######F1==B1######........"
    )


def test_an_empty_timeline_is_idle_nowhere():
    timeline = simulate(gpipe(2, 1), seconds_of=lambda a: 0.0)
    assert timeline.step_s == 0.0
    assert timeline.idle_share_of_rank == (0.0, 0.0)
    assert timeline.gantt(20).count("\n") == 1


def test_a_timeline_counts_held_activations():
    timeline = simulate(one_f_one_b(4, 8), seconds_of=lambda a: 1.0)
    assert timeline.peak_activations_of_rank == (4, 3, 2, 1)


def test_the_period_is_the_longest_span_of_a_rank():
    timeline = simulate(one_f_one_b(4, 8), seconds_of=lambda a: 1.0)
    assert isinstance(timeline, Timeline)
    assert timeline.period_s == timeline.step_s  # rank 0 starts first and ends last


def test_time_grows_with_the_number_of_actions_alone():
    def cost_s(num_microbatches: int) -> float:
        schedule = one_f_one_b(8, num_microbatches)
        times = []
        for _ in range(3):
            start_s = time.perf_counter()
            simulate(schedule, seconds_of=lambda a: 1.0)
            times.append(time.perf_counter() - start_s)
        return min(times)

    # Eight times the work; a quadratic simulator would need sixty-four times as long.
    assert cost_s(512) < 30 * cost_s(64)
