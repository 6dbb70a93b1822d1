from dataclasses import replace

import pytest

from hybrid.bench.here import CPU_WORKLOADS, predict_on_cpu, stage_seconds
from hybrid.scheduler.step.cores import fair_paces

KINDS = {"embedding": (1.0, 2.0), "block": (10.0, 20.0), "head": (4.0, 8.0)}


def test_the_workloads_are_pipelines_of_one_two_and_four_stages():
    assert [workload.num_stages for workload in CPU_WORKLOADS] == [1, 2, 4]
    for workload in CPU_WORKLOADS:
        covered = [layer for stage in range(workload.num_stages) for layer in workload.layers(stage)]
        assert covered == list(range(workload.model.num_layers))


def test_a_stage_costs_the_sum_of_its_layers_in_its_own_process():
    workload = CPU_WORKLOADS[1]
    faster = {kind: (f / 2, b / 2) for kind, (f, b) in KINDS.items()}
    assert stage_seconds(workload, [KINDS, faster]) == [{"F": 21.0, "B": 42.0}, {"F": 12.0, "B": 24.0}]


def test_one_stage_takes_all_its_microbatches_and_a_crowded_core_takes_longer():
    workload = CPU_WORKLOADS[0]
    seconds = stage_seconds(workload, [KINDS])
    alone = predict_on_cpu(workload, seconds, fair_paces(2, 1))
    assert alone == pytest.approx(workload.num_microbatches * 3 * 45)
    assert predict_on_cpu(workload, seconds, (0.5,)) == pytest.approx(2 * alone)


def test_more_stages_than_cores_are_no_faster_than_the_cores():
    workload = replace(CPU_WORKLOADS[2], schedule="gpipe")
    seconds = stage_seconds(workload, [KINDS] * 4)
    work = workload.num_microbatches * sum(row["F"] + row["B"] for row in seconds)
    step = predict_on_cpu(workload, seconds, fair_paces(2, 4))
    assert work / 2 < step < work
