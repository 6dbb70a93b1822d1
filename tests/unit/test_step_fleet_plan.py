import json

import pytest

from hybrid.bench.planner_oracle import random_problem
from hybrid.errors import PlanError
from hybrid.scheduler.search.fleet_plan import write_fleet_plan
from hybrid.scheduler.search.search import search
from hybrid.scheduler.step.build import build_step
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.fleet_plan import read_replicas, read_step


def searched(seed):
    problem = random_problem(seed, memory_binds=False)
    return problem, json.loads(json.dumps(write_fleet_plan(search(problem).choice)))


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_of_the_search_simulates_to_what_the_search_predicted(seed):
    problem, raw = searched(seed)
    replicas = read_replicas(raw)
    step = build_step(problem.table, problem.pools, problem.network, problem.memory, replicas)
    result = simulate_step(step)
    for group, run in zip(raw["groups"], result.runs, strict=True):
        updates = [stage.update_s for stage in run.pipeline.stages]
        assert run.timeline.step_s + max(updates) == pytest.approx(group["step_s"], rel=0.01)
    assert step.num_devices == sum(raw["chips"].values())


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_a_fleet_plan_is_simulated_from_its_file_alone(seed):
    _, raw = searched(seed)
    result = simulate_step(read_step(raw))
    # The search adds each group's own update; here the longest one follows the reduction.
    assert result.step_s == pytest.approx(raw["predicted"]["step_s"], rel=0.02)
    assert result.step.tokens == 128 * raw["global_batch"]
    assert result.step.num_devices == sum(raw["chips"].values())


def test_another_format_is_refused():
    with pytest.raises(PlanError, match="not a fleet's plan"):
        read_replicas({"format": "yaml"})
    with pytest.raises(PlanError, match="key of the plan is missing"):
        read_replicas({"format": "hybrid-fleet-plan", "version": 1})
