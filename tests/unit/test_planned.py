"""From a job to a searched plan: the problem, the plan that can be run, what is told of it, what is refused."""

import json
import re

import pytest

from hybrid.bench.planner_oracle import random_problem
from hybrid.cli import main
from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.commands.planned import as_json, search_plan
from hybrid.commands.problem import Brought, problem_of
from hybrid.config import parse_job
from hybrid.errors import ConfigError, FleetError, PlanError
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.search.analytic import network_of_fleet
from hybrid.scheduler.search.emit import places_of_pools, plan_of_choice
from hybrid.scheduler.search.formats import write_links, write_pools, write_profile
from hybrid.scheduler.search.islands import Wanted, merged, place_stages
from hybrid.scheduler.search.problem import Pool
from hybrid.scheduler.search.search import search

MODEL = {"num_blocks": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 160}
ISLANDS = [{"name": "trainium", "device": "trn2", "count": 2}, {"name": "nvidia", "device": "h100", "count": 1}]


def job_with(islands=ISLANDS, links=(), **planner):
    fleet = {"islands": islands, "links": list(links)}
    batch = {"global_batch": 16, "microbatch": 2}
    return parse_job({"name": "small", "model": MODEL, "batch": batch, "fleet": fleet, "planner": planner})


def planned(job, *, reasons=False, brought=None):
    job, fleet = fleet_of(job, None)
    return search_plan(job, fleet, brought or Brought(), reasons=reasons)


def test_a_job_is_planned_on_a_part_of_its_fleet_where_that_is_faster():
    found = planned(job_with(), reasons=True)
    assert found.plan is not None
    assert found.misfit is None
    told = as_json(found)
    assert told["trainable"]
    assert told["source"].startswith("analytic, uncalibrated")
    assert {row["plan"] for row in told["alternatives"]} >= {
        "this plan",
        "trn2 alone",
        "uniform split",
        "without nvidia",
    }
    assert all(row["worse_by"] >= 0 for row in told["alternatives"] if row["worse_by"] is not None)
    assert told["explain"]["bottlenecks"]
    assert any(effect["what"] == "one more chip of trainium" for effect in told["explain"]["effects"])
    json.dumps(told)


def test_what_the_job_pins_stays_pinned():
    job = job_with(schedules=["1f1b", "gpipe"])
    three = job.model_copy(update={"num_stages": 3, "schedule": "gpipe"})
    plan = planned(three).plan
    assert [replica.num_stages for replica in plan.replicas] == [3]
    assert plan.replica.microbatch == 2
    assert {replica.schedule for replica in planned(job_with()).plan.replicas} == {"1f1b"}


def test_train_takes_the_searched_plan_of_a_job_with_a_planner_section_alone():
    job, fleet = fleet_of(job_with(), None)
    assert plan_of(job, fleet) == planned(job).plan
    bare = job.model_copy(update={"planner": None})
    assert plan_of(bare, fleet).num_ranks == fleet.num_chips


@pytest.mark.parametrize("seed", [0, 3, 6, 9])
def test_a_found_plan_can_be_run_takes_the_batch_exactly_and_comes_back_from_yaml(seed):
    problem = random_problem(seed, memory_binds=seed % 2 == 1)
    choice = search(problem).choice
    plan = plan_of_choice(problem, choice, places_of_pools(problem), job="job")
    assert sum(replica.num_samples for replica in plan.replicas) == problem.global_batch
    assert plan.num_ranks == sum(choice.chips)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    for stage in plan.stages:
        assert stage.memory_bytes <= stage.memory_limit_bytes
    update_s = max(group.column.update_s for group in choice.groups)
    assert plan.step_s <= choice.step_s <= plan.step_s + update_s * (1 + 1e-9)


def test_a_stage_never_leaves_its_node():
    pool = Pool(name="a", chip="x", num_chips=8, node_size=4, memory_bytes=1)
    wanted = [
        Wanted(degree=1, width=1),
        Wanted(degree=2, width=2),
        Wanted(degree=2, width=1),
        Wanted(degree=1, width=1),
    ]
    found = place_stages([pool], wanted)
    taken = [chip for _, chips in found for chip in chips]
    assert sorted(taken) == list(range(8))
    for stage, (_, chips) in zip(wanted, found, strict=True):
        for first in range(0, len(chips), stage.degree):
            assert len({chip // 4 for chip in chips[first : first + stage.degree]}) == 1


def test_stages_that_do_not_pack_are_refused_with_the_chips_that_miss():
    pool = Pool(name="a", chip="x", num_chips=6, node_size=3, memory_bytes=1)
    with pytest.raises(PlanError, match=r"2 chips finds no nodes in a.*add 2 chips"):
        place_stages([pool], [Wanted(degree=2, width=1)] * 3)


def test_like_islands_are_planned_as_one_and_placed_as_several():
    islands = [{"name": f"node{index}", "device": "trn2", "count": 1} for index in range(3)]
    found = planned(job_with(islands))
    names = [pool.name for pool in merged(found.problem).pools]
    assert len(names) <= 3
    assert {stage.island for stage in found.plan.stages} <= {"node0", "node1", "node2"}
    assert len({(stage.island, stage.ranks) for stage in found.plan.stages}) == len(found.plan.stages)


def test_a_slower_specimen_is_a_kind_of_its_own():
    islands = [
        {"name": "fast", "device": "h100", "count": 1},
        {"name": "slow", "device": "h100", "count": 1, "speed": 0.25},
    ]
    job, fleet = fleet_of(job_with(islands), None)
    problem = problem_of(job, fleet)
    assert [pool.chip for pool in problem.pools] == ["h100", "h100 x0.25"]
    fast, slow = (problem.table.cells[pool.chip, 1, 2] for pool in problem.pools)
    assert slow.forward_s == pytest.approx([4 * x for x in fast.forward_s])


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, words)])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    job = {"name": "small", "model": MODEL, "batch": {"global_batch": 16, "microbatch": 2}}
    path.write_text(json.dumps(job | {"fleet": {"islands": ISLANDS}}))
    return path


def test_the_command_prints_the_whole_answer(capsys, job_file, tmp_path):
    out = tmp_path / "plan.yaml"
    code, text, _ = run(capsys, job_file, "--objective", "usd_per_token", "--explain", "--out", out)
    assert code == 0
    for words in (
        "predicted: step",
        "analytic, uncalibrated",
        "is the mix worth it?",
        "why this plan",
        "million tokens",
    ):
        assert words in text
    plan = Plan.from_yaml(out.read_text())
    assert plan.objective == "usd_per_token"
    assert sum(replica.num_samples for replica in plan.replicas) == 16


def test_a_plan_is_written_as_groups_of_replicas_where_the_file_is_json(capsys, job_file, tmp_path):
    out = tmp_path / "plan.json"
    code, _, _ = run(capsys, job_file, "--objective", "throughput", "--out", out)
    assert code == 0
    assert json.loads(out.read_text())["format"] == "hybrid-fleet-plan"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--min-tokens-per-s", "1e15"], r"no plan meets min_tokens_per_s.*[Ll]ower min_tokens_per_s by"),
        (["--deadline", "1e-9"], r"no plan meets deadline_s.*[Mm]ove deadline_s by"),
        (["--max-usd-per-hour", "0.01"], r"no plan keeps to max_usd_per_hour.*[Rr]aise max_usd_per_hour by"),
        (["--set", "planner.fixed_bytes=200000000000"], r"fits nowhere.*misses .* bytes more"),
        (["--objective", "speed"], r"no such choice.*valid: throughput"),
        (["--objective", "deadline"], r"objective deadline needs deadline_s"),
        (["--set", "planner.microbatches=[3]"], r"a microbatch does not divide the global batch.*valid: 1, 2, 4"),
        (["--objective", "throughput", "--set", "stages_per_rank=2"], r"stages_per_rank: the search puts one stage"),
        (["--pools", "nowhere.json"], r"the pools file cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line_with_the_number_that_must_change(capsys, job_file, words, told):
    code, out, error = run(capsys, job_file, *words)
    assert code == 2
    assert out == ""
    assert len(error.strip().splitlines()) == 1
    assert re.search(told, error), error


def test_a_profile_without_a_chip_of_the_fleet_is_refused_by_name(capsys, job_file, tmp_path):
    table = problem_of(*fleet_of(read_job(job_file, ["planner.objective=throughput"]), None)).table
    raw = write_profile(table)
    raw["cells"] = [cell for cell in raw["cells"] if cell["chip"] != "h100"]
    (tmp_path / "profile.json").write_text(json.dumps(raw))
    code, _, error = run(capsys, job_file, "--profile", tmp_path / "profile.json")
    assert code == 2
    assert "the profile has no chip h100, and pool nvidia has 1 of them" in error


def test_a_missing_link_that_every_plan_needs_is_refused_by_name(capsys, job_file, tmp_path):
    _, fleet = fleet_of(read_job(job_file, ["planner.objective=throughput"]), None)
    raw = write_links(network_of_fleet(fleet))
    raw["links"] = [link for link in raw["links"] if {link["from"], link["to"]} != {"trainium", "nvidia"}]
    (tmp_path / "links.json").write_text(json.dumps(raw))
    words = [job_file, "--links", tmp_path / "links.json", "--set", "num_stages=3"]
    code, _, error = run(capsys, *words)
    assert code == 2
    assert "no link between trainium and nvidia" in error


def test_another_tools_chips_and_model_are_planned_from_three_files(capsys, job_file, tmp_path):
    problem = random_problem(3, memory_binds=True)
    for name, data in (
        ("profile", write_profile(problem.table)),
        ("links", write_links(problem.network)),
        ("pools", write_pools(problem.pools)),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    files = [word for name in ("profile", "links", "pools") for word in (f"--{name}", tmp_path / f"{name}.json")]
    words = ["--set", "planner.microbatches=any", "--set", "planner.bytes_per_parameter=16", "--json"]
    code, out, error = run(capsys, job_file, *files, *words)
    assert code == 0, error
    told = json.loads(out)
    assert told["source"] == "imported: made up"
    assert not told["trainable"]
    assert "of another model" in told["not_trainable_because"]


def test_pools_need_a_profile_and_links(capsys, job_file, tmp_path):
    (tmp_path / "pools.json").write_text(json.dumps(write_pools(random_problem(3, memory_binds=True).pools)))
    code, _, error = run(capsys, job_file, "--pools", tmp_path / "pools.json")
    assert code == 2
    assert "--profile FILE" in error


def test_the_wrong_key_of_the_section_is_named():
    with pytest.raises(ConfigError, match=r"planner.*goal"):
        job_with(goal="fast")


def test_dollars_need_a_price():
    islands = [{"name": "here", "device": "cpu", "count": 1}]
    with pytest.raises(FleetError, match="pool here has no usd_per_hour"):
        planned(job_with(islands, objective="usd_per_token"))


def test_a_lossy_codec_is_taken_only_where_it_is_permitted_and_pays():
    slow = [{"between": ["trainium", "nvidia"], "bandwidth_bytes_per_s": 1e8, "latency_s": 1e-6}]
    islands = [{"name": "trainium", "device": "trn2", "count": 1}, {"name": "nvidia", "device": "h100", "count": 1}]

    def codecs(links, **planner):
        job = job_with(islands, links, **planner).model_copy(update={"num_stages": 2})
        plan = planned(job).plan
        return plan.step_s, [edge.codec for replica in plan.replicas for edge in replica.edges]

    plain_s, plain = codecs(slow)
    coded_s, coded = codecs(slow, codecs=["bf16", "fp8"])
    assert plain == ["none"]
    assert coded == ["fp8"]
    assert coded_s < plain_s
    fast = [{"between": ["trainium", "nvidia"], "bandwidth_bytes_per_s": 1e15}]
    assert codecs(fast, codecs=["bf16", "fp8"])[1] == ["none"]
