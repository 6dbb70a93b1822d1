"""What a run keeps: a line of JSON an event, and the figures of the closing summary."""

import json
import math
from dataclasses import replace

import pytest

from hybrid.observe.events import CheckpointEvent, EvalEvent, PhaseEvent, StepEvent
from hybrid.observe.metrics import MetricsFile, Tally, all_of

STEP = StepEvent(
    step=0,
    loss=2.5,
    grad_norm=1.0,
    learning_rate=0.1,
    seconds=0.5,
    tokens_per_s=100.0,
    idle_share_of_rank=(0.25, 0.5),
    overrun_s=0.0,
    since_start_s=3.0,
)


def _lines(path):
    # Strict JSON: `NaN` and `Infinity`, which Python would write, are refused here.
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_every_event_is_one_line_with_its_name_and_fields(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    for event in (
        PhaseEvent(name="data ready", since_start_s=1.5),
        STEP,
        EvalEvent(steps_done=1, loss=2.0),
        CheckpointEvent(steps_done=1, num_bytes=10),
    ):
        sink(event)
    sink.close()
    phase, step, held_out, checkpoint = _lines(tmp_path / "metrics.jsonl")
    assert phase == {"event": "phase", "name": "data ready", "since_start_s": 1.5}
    assert step == {
        "event": "step",
        "step": 0,
        "loss": 2.5,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "seconds": 0.5,
        "tokens_per_s": 100.0,
        "idle_share_of_rank": [0.25, 0.5],
        "overrun_s": 0.0,
        "since_start_s": 3.0,
    }
    assert held_out == {"event": "eval", "steps_done": 1, "loss": 2.0}
    assert checkpoint == {"event": "checkpoint", "steps_done": 1, "num_bytes": 10}


def test_a_line_is_there_before_the_next_event(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(STEP)
    assert len(_lines(tmp_path / "metrics.jsonl")) == 1
    sink.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_becomes_null(tmp_path, value):
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(replace(STEP, loss=value, idle_share_of_rank=(value, 0.5)))
    sink.close()
    (line,) = _lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["idle_share_of_rank"] == [None, 0.5]


def test_a_second_run_appends(tmp_path):
    for _ in range(2):
        sink = MetricsFile(tmp_path / "metrics.jsonl")
        sink(STEP)
        sink.close()
        sink.close()
    assert len(_lines(tmp_path / "metrics.jsonl")) == 2


def test_the_tally_sorts_events_and_leaves_the_first_step_out_of_the_median():
    tally = Tally()
    assert tally.step_s is None
    tally(replace(STEP, seconds=9.0))
    assert tally.step_s == 9.0
    for seconds in (1.0, 3.0, 2.0):
        tally(replace(STEP, seconds=seconds))
    tally(EvalEvent(steps_done=1, loss=2.0))
    tally(CheckpointEvent(steps_done=1, num_bytes=10))
    tally(PhaseEvent(name="x", since_start_s=1.0))
    assert tally.step_s == 2.0
    assert [len(kept) for kept in (tally.steps, tally.evals, tally.checkpoints, tally.phases)] == [4, 1, 1, 1]


def test_every_sink_gets_every_event_in_order():
    seen = []
    sink = all_of(lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event)))
    sink(STEP)
    assert seen == [("a", STEP), ("b", STEP)]
