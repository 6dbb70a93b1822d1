from dataclasses import replace

import pytest

from hybrid.bench.here import predict_on_cpu, stage_seconds
from hybrid.bench.here_workloads import chip_workloads, cpu_workloads, with_order
from hybrid.bench.workload import EVEN, UNEVEN
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.schedules import SCHEDULE_NAMES
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.cores import fair_paces

KINDS = {
    "embedding": {"F": 1.0, "B": 2.0, "I": 0.0, "W": 2.0},
    "block": {"F": 10.0, "B": 20.0, "I": 11.0, "W": 10.0},
    "head": {"F": 4.0, "B": 8.0, "I": 4.0, "W": 5.0},
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_schedule_runs_on_each_number_of_ranks(num_ranks):
    found = list(cpu_workloads(num_ranks))
    if num_ranks > 1:
        assert sorted(one.schedule for one in found) == sorted(SCHEDULE_NAMES)
    for one in found:
        assert one.num_ranks == num_ranks
        covered = [layer for stage in range(one.num_stages) for layer in one.layers(stage)]
        assert covered == list(range(one.model.num_layers))
        if one.schedule == "auto":
            one = with_order(one, stage_seconds(one, [KINDS] * num_ranks))
        check_schedule(one.build_schedule())


@pytest.mark.parametrize("given", [EVEN, UNEVEN])
def test_the_chips_of_every_schedule_do_the_same_work(given):
    found = list(chip_workloads(given))
    assert sorted(one.schedule for one, _ in found) == sorted(SCHEDULE_NAMES)
    for one, pace in found:
        timeline = simulate(one.build_schedule(), seconds_of=pace.seconds_of)
        busy_s = [sum(span.end_s - span.start_s for span in spans) for spans in timeline.spans_of_rank]
        wanted = [12 * (f + b) for f, b in zip(given.forward_s, given.backward_s, strict=True)]
        assert busy_s == pytest.approx(wanted)


def test_a_stage_costs_the_sum_of_its_layers_in_its_own_process():
    _, workload = (next(cpu_workloads(n)) for n in (1, 2))
    faster = {kind: {action: seconds / 2 for action, seconds in row.items()} for kind, row in KINDS.items()}
    assert stage_seconds(workload, [KINDS, faster]) == [
        {"F": 31.0, "B": 62.0, "I": 33.0, "W": 32.0},
        {"F": 17.0, "B": 34.0, "I": 18.5, "W": 17.5},
    ]


def test_one_stage_takes_all_its_microbatches_and_a_crowded_core_takes_longer():
    workload, split = cpu_workloads(1)
    seconds = stage_seconds(workload, [KINDS])
    alone = predict_on_cpu(workload, seconds, fair_paces(2, 1))
    assert alone == pytest.approx(workload.num_microbatches * 3 * 65)
    assert predict_on_cpu(workload, seconds, (0.5,)) == pytest.approx(2 * alone)
    assert predict_on_cpu(split, seconds, (1.0,)) == pytest.approx(workload.num_microbatches * (65 + 70 + 67))


def test_more_stages_than_cores_are_no_faster_than_the_cores():
    workload = replace(next(cpu_workloads(4)), schedule="gpipe")
    seconds = stage_seconds(workload, [KINDS] * 4)
    work = workload.num_microbatches * sum(row["F"] + row["B"] for row in seconds)
    step = predict_on_cpu(workload, seconds, fair_paces(2, 4))
    assert work / 2 < step < work
