import json
from itertools import pairwise

import pytest

from hybrid.observe.trace import trace_of_step
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.facts import (
    EdgeCost,
    Message,
    Pipeline,
    Reduction,
    StageCost,
    StageMemory,
    TrainingStep,
)


@pytest.fixture
def result():
    stage = StageCost(
        name="trn2",
        forward_s=1.0,
        input_gradient_s=1.0,
        weight_gradient_s=1.0,
        update_s=0.5,
        num_ranks=4,
        memory=StageMemory(state_bytes=2.0**30, held_bytes=2.0**30),
    )
    message = Message(transfer_s=0.25)
    pipeline = Pipeline(
        name="p",
        schedule=build_schedule("1f1b", 2, 3),
        stages=(stage, stage),
        edges=(EdgeCost(activation=message, gradient=message),),
        samples=1,
        count=7,
    )
    reduction = Reduction(name="layers 0-1", members=((0, 0),), seconds=0.75)
    return simulate_step(TrainingStep(pipelines=(pipeline,), reductions=(reduction,)))


def test_a_trace_is_json_whose_intervals_are_the_steps(result):
    trace = json.loads(json.dumps(trace_of_step(result)))
    work = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len([event for event in work if event["cat"] in ("forward", "backward")]) == 12
    assert {event["cat"] for event in work} == {"forward", "backward", "reduce", "update"}
    end_us = max(event["ts"] + event["dur"] for event in work)
    assert end_us == pytest.approx(result.step_s * 1e6)
    for rank in (0, 1):
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in work if e["tid"] == rank)
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(mine))


def test_names_say_how_many_there_are(result):
    names = [e["args"]["name"] for e in trace_of_step(result)["traceEvents"] if e["ph"] == "M"]
    assert names == ["p (7 of these)", "rank 0: trn2 × 4", "rank 1: trn2 × 4"]


def test_every_message_is_an_arrow_with_two_ends(result):
    events = trace_of_step(result)["traceEvents"]
    starts = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    ends = {e["id"]: e["ts"] for e in events if e["ph"] == "f"}
    assert len(starts) == 6
    assert {key: ends[key] - at for key, at in starts.items()} == {key: pytest.approx(0.25e6) for key in starts}


def test_memory_is_a_counter_and_idle_time_shows_on_request(result):
    events = trace_of_step(result, with_idle=True)["traceEvents"]
    peak = max(e["args"]["GiB"] for e in events if e["ph"] == "C")
    assert peak == result.peak_bytes / 2**30 == 3.0
    assert any(e.get("cat") == "idle" for e in events)
