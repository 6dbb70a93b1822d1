import pytest

from hybrid.errors import ScheduleError
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.facts import (
    EdgeCost,
    Message,
    Pipeline,
    Reduction,
    StageCost,
    StageMemory,
    TrainingStep,
    chain,
)
from hybrid.scheduler.step.share import Load, shared_seconds


def stage(forward_s=1.0, backward_s=2.0, **more):
    return StageCost(
        name="s", forward_s=forward_s, input_gradient_s=backward_s / 2, weight_gradient_s=backward_s / 2, **more
    )


def pipeline(num_stages=2, num_microbatches=4, *, message=None, schedule="1f1b", stages=None, **more):
    stages = stages or tuple(stage() for _ in range(num_stages))
    edges = (
        chain(stages) if message is None else tuple(EdgeCost(activation=message, gradient=message) for _ in stages[1:])
    )
    return Pipeline(
        name="p",
        schedule=build_schedule(schedule, len(stages), num_microbatches),
        stages=stages,
        edges=edges,
        samples=1,
        **more,
    )


def test_a_step_of_one_pipeline_is_the_simulated_schedule():
    for name in ("gpipe", "1f1b", "zb-h1"):
        one = pipeline(3, 5, schedule=name)
        wanted = simulate(one.schedule, seconds_of=lambda a, p=one: p.stages[a.stage].seconds_of(a.kind)).step_s
        assert simulate_step(TrainingStep(pipelines=(one,))).step_s == pytest.approx(wanted)


def test_a_stage_alone_takes_its_microbatches_and_its_update():
    one = pipeline(stages=(stage(update_s=0.5),), num_microbatches=4)
    result = simulate_step(TrainingStep(pipelines=(one,)))
    assert result.step_s == pytest.approx(4 * 3 + 0.5)
    assert result.idle_share == pytest.approx(0.0)


def test_a_message_that_overlaps_delays_the_receiver_only():
    free = simulate_step(TrainingStep(pipelines=(pipeline(2, 1),))).step_s
    late = simulate_step(TrainingStep(pipelines=(pipeline(2, 1, message=Message(transfer_s=0.25)),))).step_s
    assert late == pytest.approx(free + 2 * 0.25)


def test_a_blocking_message_keeps_both_ends_busy_for_every_microbatch():
    message = Message(sender_s=0.1, receiver_s=0.1)
    result = simulate_step(TrainingStep(pipelines=(pipeline(2, 8, message=message),)))
    # The last stage is the one that never waits: each microbatch receives once and sends once.
    assert result.step_s == pytest.approx(1 + 8 * (3 + 0.2) + 2)
    row = result.rows()[1]
    assert row["receive_s"] == pytest.approx(0.8)
    assert row["send_s"] == pytest.approx(0.8)


def test_intervals_of_every_rank_cover_the_step_without_overlap():
    step = TrainingStep(
        pipelines=(pipeline(3, 4, message=Message(transfer_s=0.3, sender_s=0.1, receiver_s=0.05)),),
        reductions=(Reduction(name="r", members=((0, 1),), seconds=0.7),),
    )
    result = simulate_step(step)
    for rank in range(3):
        intervals = result.intervals(0, rank)
        now = 0.0
        for interval in intervals:
            assert interval.start_s == pytest.approx(now)
            now = interval.end_s
        assert now == pytest.approx(result.span_s)
        assert sum(i.seconds for i in intervals) == pytest.approx(result.span_s)


def test_a_reduction_waits_for_the_slowest_of_its_members_and_holds_back_their_updates():
    fast, slow = pipeline(stages=(stage(1, 1, update_s=1),)), pipeline(stages=(stage(2, 2, update_s=1),))
    step = TrainingStep(
        pipelines=(fast, slow), reductions=(Reduction(name="r", members=((0, 0), (1, 0)), seconds=3.0),)
    )
    result = simulate_step(step)
    assert result.reductions[0].start_s == pytest.approx(16)
    assert [run.end_s for run in result.runs] == [(20.0,), (20.0,)]
    assert result.intervals(0, 0)[-2].what == "reduce"


def test_reductions_of_one_rank_follow_one_another():
    step = TrainingStep(
        pipelines=(pipeline(stages=(stage(),)),),
        reductions=tuple(Reduction(name=n, members=((0, 0),), seconds=2.0) for n in "ab"),
    )
    assert simulate_step(step).step_s == pytest.approx(12 + 4)


def test_buckets_hide_behind_the_last_backward_but_never_before_it_starts():
    def step_s(num_buckets, seconds):
        one = Reduction(name="r", members=((0, 0),), seconds=seconds, num_buckets=num_buckets)
        return simulate_step(TrainingStep(pipelines=(pipeline(stages=(stage(),)),), reductions=(one,))).step_s

    assert step_s(1, 1.0) == pytest.approx(13)
    assert 12 < step_s(4, 1.0) < 13
    assert step_s(4, 1.0) == pytest.approx(12 + 0.25)
    assert step_s(4, 100.0) >= 10 + 100


def test_bucketed_reductions_of_one_rank_follow_one_another_too():
    both = tuple(Reduction(name=n, members=((0, 0),), seconds=50.0, num_buckets=5) for n in "ab")
    result = simulate_step(TrainingStep(pipelines=(pipeline(stages=(stage(),)),), reductions=both))
    one, other = result.reductions
    assert other.start_s == pytest.approx(one.end_s)
    assert result.step_s == pytest.approx(other.end_s)


def test_the_global_norm_makes_everyone_wait_for_the_last():
    fast, slow = pipeline(stages=(stage(1, 1, update_s=1),)), pipeline(stages=(stage(2, 2, update_s=1),))
    result = simulate_step(TrainingStep(pipelines=(fast, slow), norm_s=0.5))
    assert [run.end_s for run in result.runs] == [(17.5,), (17.5,)]


def test_without_a_barrier_the_step_is_the_longest_rank_of_its_own():
    with_barrier = simulate_step(TrainingStep(pipelines=(pipeline(4, 8, schedule="zb-h2"),)))
    without = simulate_step(TrainingStep(pipelines=(pipeline(4, 8, schedule="zb-h2"),), barrier=False))
    assert without.step_s < with_barrier.step_s
    assert without.step_s == pytest.approx(with_barrier.runs[0].timeline.period_s)


def test_tokens_dollars_and_energy_count_every_replica_and_device():
    one = pipeline(stages=(stage(num_ranks=4, usd_per_hour=2.0, watts=500.0),) * 2, count=10)
    result = simulate_step(TrainingStep(pipelines=(one,), tokens_per_sample=100))
    assert result.step.num_devices == 80
    assert result.step.tokens == 10 * 4 * 100
    assert result.tokens_per_s == pytest.approx(4000 / result.step_s)
    assert result.usd_per_hour == pytest.approx(160)
    assert result.usd_per_step == pytest.approx(160 * result.step_s / 3600)
    assert result.kwh_per_step == pytest.approx(80 * 500 * result.step_s / 3.6e6)


def test_memory_grows_with_forwards_and_shrinks_with_backwards():
    memory = StageMemory(fixed_bytes=5, state_bytes=10, held_bytes=3, forward_bytes=1, backward_bytes=2, reduce_bytes=4)
    stages = tuple(stage(memory=memory) for _ in range(4))
    run = simulate_step(TrainingStep(pipelines=(pipeline(stages=stages, num_microbatches=8),))).runs[0]
    assert run.peak_bytes_of_rank == (15 + 4 * 3 + 2, 15 + 3 * 3 + 2, 15 + 2 * 3 + 2, 15 + 3 + 2)
    for rank in range(4):
        points = run.memory(rank)
        assert points[0][1] == 15
        assert points[-2][1] == 15  # all activations are gone when the reduction begins
        assert [t for t, _ in points] == sorted(t for t, _ in points)


def test_a_split_backward_frees_in_two_parts():
    memory = StageMemory(held_bytes=10, kept_bytes=4)
    stages = tuple(stage(memory=memory) for _ in range(2))
    run = simulate_step(TrainingStep(pipelines=(pipeline(stages=stages, num_microbatches=4, schedule="zb-h1"),))).runs[
        0
    ]
    levels = {held for _, held in run.memory(0)}
    assert 4.0 in {a - b for a in levels for b in levels}
    assert min(levels) == 0


def test_messages_that_meet_on_an_interface_share_it():
    assert shared_seconds([Load(0, 2, ("nic",)), Load(0, 2, ("nic",))]) == pytest.approx([4, 4])
    assert shared_seconds([Load(0, 2, ("nic",)), Load(1, 2, ("nic",))]) == pytest.approx([3, 3])
    assert shared_seconds([Load(0, 2, ("nic",)), Load(0, 2, ("other",))]) == pytest.approx([2, 2])
    assert shared_seconds([Load(0, 2, ("nic",)), Load(5, 2, ("nic",))]) == pytest.approx([2, 2])
    assert shared_seconds([]) == []


def test_a_shared_interface_slows_a_pipeline_that_is_bound_by_its_messages():
    alone = Message(transfer_s=2.0)
    shared = Message(transfer_s=2.0, interfaces=("nic",))
    free = simulate_step(TrainingStep(pipelines=(pipeline(3, 6, message=alone),))).step_s
    slow = simulate_step(TrainingStep(pipelines=(pipeline(3, 6, message=shared),))).step_s
    assert slow > free * 1.05


def test_identical_pipelines_are_simulated_once():
    one = pipeline(2, 4)
    result = simulate_step(TrainingStep(pipelines=(one, one)))
    assert result.runs[0].timeline is result.runs[1].timeline


def test_a_pipeline_whose_parts_do_not_fit_is_refused():
    with pytest.raises(ScheduleError, match="2 stages, 0 edges"):
        Pipeline(name="p", schedule=build_schedule("1f1b", 2, 1), stages=(stage(), stage()), edges=(), samples=1)
    with pytest.raises(ScheduleError, match="no such member"):
        TrainingStep(pipelines=(pipeline(),), reductions=(Reduction(name="r", members=((0, 7),), seconds=1.0),))
