"""The planner's JSON goes out and comes back the same; Sailor's files become ours."""

import json

import pytest

from hybrid.bench.planner_oracle import random_problem
from hybrid.errors import PlanError
from hybrid.scheduler.search.fleet_plan import write_fleet_plan
from hybrid.scheduler.search.formats import (
    read_links,
    read_pools,
    read_profile,
    write_links,
    write_pools,
    write_profile,
)
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import Problem
from hybrid.scheduler.search.sailor import (
    SAILOR_MEMORY,
    read_sailor_network,
    read_sailor_plan,
    read_sailor_profile,
    sailor_pool,
    sailor_vocabulary,
    write_sailor_plan,
)
from hybrid.scheduler.search.search import search
from hybrid.scheduler.search.uniform import search_uniform, uniform_step_seconds


def through_json(data):
    return json.loads(json.dumps(data))


def test_a_profile_comes_back_the_same():
    table = random_problem(4, memory_binds=False).table
    assert read_profile(through_json(write_profile(table))) == table


def test_a_whole_backward_is_halved():
    raw = through_json(write_profile(random_problem(4, memory_binds=False).table))
    cell = raw["cells"][0]
    whole = [a + b for a, b in zip(cell.pop("input_gradient_s"), cell.pop("weight_gradient_s"), strict=True)]
    cell["backward_s"] = whole
    key = cell["chip"], cell["tensor_parallel"], cell["microbatch"]
    assert read_profile(raw).cells[key].backward_s == pytest.approx(whole)


def test_links_and_pools_come_back_the_same():
    network = Network(
        links={
            ("a", 1, "b", 2): LinkModel(latency_s=1e-3, points=((1e3, 1e9), (1e6, 2e9)), shared_by=4),
            ("a", 1, "a", 1): LinkModel(polynomial=(1.0, 2.0, 3.0), smallest_bytes=1e4),
        },
        usd_per_gb={("east", "west"): 0.02},
    )
    assert read_links(through_json(write_links(network))) == network
    pools = random_problem(3, memory_binds=True).pools
    assert read_pools(through_json(write_pools(pools))) == pools


def test_a_missing_key_is_named_with_its_place():
    raw = write_profile(random_problem(4, memory_binds=False).table)
    del raw["cells"][0]["forward_s"]
    with pytest.raises(PlanError, match=r"cells\[0\].*forward_s"):
        read_profile(raw)


def test_an_unknown_key_of_a_link_is_named():
    raw = {"format": "hybrid-links", "version": 1, "links": [{"from": "a", "to": "b", "bandwith": 1}]}
    with pytest.raises(PlanError, match="bandwith"):
        read_links(raw)


def test_a_written_plan_says_where_every_layer_is():
    problem = random_problem(3, memory_binds=True)
    written = through_json(write_fleet_plan(search(problem).choice))
    for group in written["groups"]:
        ends = [stage["end_layer"] for stage in group["stages"]]
        assert [0, *ends[:-1]] == [stage["first_layer"] for stage in group["stages"]]
        assert ends[-1] == problem.table.num_layers
        assert all(stage["memory_bytes"] <= stage["memory_limit_bytes"] for stage in group["stages"])


def sailor_problem():
    layers = 4
    row = {str(layer): [0.01, 0.02, 0.001] for layer in range(layers)}
    profile = {size: dict.fromkeys(("1", "2", "4"), row) for size in ("1", "2")}
    size = {"params_floats": 50_000_000, "act_output_floats": 2_000_000, "act_mem_floats": 90_000_000}
    sizes = {"m": {degree: {str(layer): size for layer in range(layers)} for degree in ("1", "2", "4")}}
    lane = [[0.0, 0.0, 2.0], 2e9]
    peers = {chip: {"1": lane, "2": lane, "4": lane} for chip in ("A100-40", "V100-16")}
    return Problem(
        table=read_sailor_profile("m", {"A100-40": profile, "V100-16": profile}, sizes),
        pools=(sailor_pool("A100-40", 8), sailor_pool("V100-16", 8)),
        network=read_sailor_network({chip: {"1": peers, "2": peers, "4": peers} for chip in peers}),
        global_batch=32,
        memory=SAILOR_MEMORY,
        vocabulary=sailor_vocabulary(),
    )


def test_a_uniform_plan_goes_to_sailors_format_and_back():
    problem = sailor_problem()
    plan = search_uniform(problem)
    assert plan is not None
    assert all(used <= 8 for used in plan.chips_of_pool(2))
    back = read_sailor_plan(through_json(write_sailor_plan(plan, problem)), problem)
    assert back == plan


def test_sailors_closed_form_is_counted_by_hand():
    problem = sailor_problem()
    raw = {
        "mbs": 1,
        "gbs": 32,
        "pipeline_list": [
            {
                "num_stages": 2,
                "layers_per_stage": [[0, 1], [2, 3]],
                "tmp_per_stage": [[[[["A100-40", 1, "z"]], 1]] * 2] * 2,
                "dp": [2, 2],
            }
        ],
    }
    send = 8e6 / 2e9
    stages = [0.06 + send, 0.06 + 2 * send]
    ring = 2 * (400e6 / 2) / 2e9
    plan = read_sailor_plan(raw, problem)
    assert plan.step_s == pytest.approx(15 * max(stages) + sum(stages) + 0.001 + ring)
    assert uniform_step_seconds(problem, plan) == plan.step_s


def documented():
    import re
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]
    return {block["format"]: block for block in blocks}


def test_the_documented_examples_go_in_and_out_unchanged():
    examples = documented()
    for name, read, write in (
        ("hybrid-profile", read_profile, write_profile),
        ("hybrid-links", read_links, write_links),
        ("hybrid-pools", read_pools, write_pools),
    ):
        raw = examples[name]
        value = read(raw)
        assert read(through_json(write(value))) == value
        assert len(through_json(write(value))[list(raw)[-1]]) == len(raw[list(raw)[-1]])


def test_the_documented_fleet_plan_is_simulated():
    from hybrid.scheduler.step.engine import simulate_step
    from hybrid.scheduler.step.fleet_plan import read_step

    step = read_step(documented()["hybrid-fleet-plan"])
    assert step.num_devices == 4
    assert step.tokens == 32 * 2048
    assert 0.27 < simulate_step(step).step_s < 0.5


def test_the_documented_files_are_one_problem_that_can_be_planned():
    from hybrid.scheduler.search.problem import MemoryModel, Vocabulary

    examples = documented()
    pools = [pool for pool in read_pools(examples["hybrid-pools"]) if pool.chip == "x1"]
    problem = Problem(
        table=read_profile(examples["hybrid-profile"]),
        pools=tuple(pools),
        network=read_links(examples["hybrid-links"]),
        global_batch=32,
        memory=MemoryModel(bytes_per_parameter=16),
        vocabulary=Vocabulary(degrees=(1,), microbatches=(1,)),
    )
    assert search(problem).choice.is_exact
