"""The search's plans: optimal where small, within memory, refused with a number where there is none."""

from dataclasses import replace

import pytest

from hybrid.bench.planner_oracle import least_step_s, random_problem
from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.search.confirm import confirm
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import Limits
from hybrid.scheduler.search.search import search
from hybrid.scheduler.search.worth import is_the_mix_worth_it


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 6, 7, 8])
def test_a_small_plan_is_as_fast_as_the_best_of_all_plans(seed):
    problem = random_problem(seed, memory_binds=seed % 2 == 1)
    assert confirm(search(problem).choice).step_s == pytest.approx(least_step_s(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_takes_the_batch_on_chips_that_are_there_and_in_memory_that_is_there(seed):
    problem = random_problem(seed, memory_binds=seed % 2 == 1)
    choice = search(problem).choice
    assert sum(group.num_samples for group in choice.groups) >= problem.global_batch
    assert all(used <= pool.num_chips for used, pool in zip(choice.chips, problem.pools, strict=True))
    for group in choice.groups:
        column, table = group.column, group.column.table
        for stage, option in enumerate(column.chosen):
            run = column.bounds[stage], column.bounds[stage + 1]
            held = min(len(column.chosen) - stage, group.num_microbatches)
            peak = table.base_bytes[(option, *run)] + held * table.held_bytes[(option, *run)]
            assert peak <= table.limit_bytes[option]


def grown(problem, factor):
    return replace(
        problem,
        pools=tuple(replace(pool, num_chips=pool.num_chips * factor) for pool in problem.pools),
        global_batch=problem.global_batch * factor,
    )


@pytest.mark.parametrize("seed", [0, 3, 4, 12])
def test_a_large_fleet_is_not_slower_than_copies_of_the_small_ones_plan_without_reduction(seed):
    problem = random_problem(seed, memory_binds=False)
    free = Network(links={key: LinkModel(bytes_per_s=1e15) for key in problem.network.links})
    # On other schedules than 1F1B it prices too roughly for so few microbatches to be held to this.
    words = replace(problem.vocabulary, schedules=("1f1b",))
    problem = replace(problem, network=free, vocabulary=words)
    small = search(problem).choice.step_s
    large = search(grown(problem, 64), method="column generation").choice
    # Column generation prices stages of like length: where few microbatches meet very unlike chips it loses some.
    assert large.step_s <= small * 1.06


def test_a_schedule_with_split_backward_is_taken_where_it_is_faster():
    problem = random_problem(6, memory_binds=False)
    choice = search(problem).choice
    more = replace(problem, vocabulary=replace(problem.vocabulary, schedules=("1f1b", "zb-h1", "zb-h2")))
    assert confirm(search(more).choice).step_s <= confirm(choice).step_s


def test_a_model_that_fits_nowhere_is_refused_with_the_bytes_that_miss():
    problem = random_problem(1, memory_binds=True)
    small = problem.with_pools(replace(pool, memory_bytes=1_000_000) for pool in problem.pools)
    with pytest.raises(PlanError, match=r"fits nowhere.*misses [\d,]+ bytes.*Give its chips [\d,]+ bytes more"):
        search(small)


def test_a_throughput_out_of_reach_is_refused_with_the_one_in_reach():
    problem = plain(random_problem(0, memory_binds=False))
    rate = search(problem).choice.tokens_per_s
    wished = replace(problem, limits=Limits(min_tokens_per_s=10 * rate))
    for method in ("exact", "column generation"):
        with pytest.raises(PlanError, match=r"no plan meets min_tokens_per_s.*Lower min_tokens_per_s by [\d,]+"):
            search(wished, method=method)


def test_a_deadline_out_of_reach_is_refused_with_the_one_in_reach():
    problem = random_problem(0, memory_binds=False)
    rate = search(problem).choice.tokens_per_s
    wished = replace(problem, limits=Limits(deadline_s=1.0, total_tokens=100 * rate))
    with pytest.raises(PlanError, match=r"Move deadline_s by 99 s to 100 s"):
        search(wished)


def test_a_budget_below_the_smallest_plan_is_refused_with_what_that_costs():
    problem = random_problem(6, memory_binds=False)
    priced = problem.with_pools(replace(pool, usd_per_hour=2.0) for pool in problem.pools)
    with pytest.raises(PlanError, match=r"Raise max_usd_per_hour by 1\.00"):
        search(replace(priced, limits=Limits(max_usd_per_hour=1.0)))


def test_a_missing_link_between_two_islands_that_need_it_is_named():
    problem = random_problem(11, memory_binds=True)
    assert len(problem.pools) == 3
    one_each = problem.with_pools(replace(pool, num_chips=1) for pool in problem.pools)
    inside = {key: link for key, link in problem.network.links.items() if key[0] == key[2]}
    for method in ("exact", "column generation"):
        with pytest.raises(FleetError, match="no link between pool0 and pool1"):
            search(replace(one_each, network=Network(links=inside)), method=method)


def test_the_cheapest_plan_costs_no_more_than_the_fastest():
    problem = plain(random_problem(5, memory_binds=False))
    priced = problem.with_pools(
        replace(pool, usd_per_hour=1.0 + 3 * index, watts=100.0) for index, pool in enumerate(problem.pools)
    )
    fastest = search(priced).choice
    cheapest = search(replace(priced, objective="usd_per_token")).choice
    frugal = search(replace(priced, objective="joules_per_token")).choice
    assert cheapest.usd_per_token <= fastest.usd_per_token
    assert frugal.joules_per_token <= fastest.joules_per_token
    capped = replace(priced, limits=Limits(max_usd_per_hour=0.6 * fastest.usd_per_hour))
    assert search(capped).choice.usd_per_hour <= 0.6 * fastest.usd_per_hour


def test_a_pool_that_does_not_help_is_recommended_to_be_left_out():
    problem = random_problem(5, memory_binds=False)
    slow = replace(problem.pools[1], chip="slow")
    cells = dict(problem.table.cells)
    for (chip, degree, size), cell in problem.table.cells.items():
        if chip == problem.pools[1].chip:
            cells["slow", degree, size] = replace(cell, forward_s=tuple(1000 * x for x in cell.forward_s))
    links = {**problem.network.links, ("slow", 1, "slow", 1): LinkModel(bytes_per_s=1e6)}
    links["slow", 1, "kind0", 1] = LinkModel(bytes_per_s=1e6)
    worth = is_the_mix_worth_it(
        replace(
            problem,
            table=replace(problem.table, cells=cells),
            pools=(problem.pools[0], slow),
            network=Network(links=links),
        )
    )
    assert worth.leave_out == (slow.name,)
    assert "leave out" in worth.recommendation


def plain(problem):
    """The problem on 1F1B alone, without recompute: few shapes."""
    return replace(problem, vocabulary=replace(problem.vocabulary, schedules=("1f1b",), recompute=False))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 8])
def test_between_nine_and_sixty_four_chips_every_shape_is_looked_at_where_they_are_few(seed):
    problem = plain(grown(random_problem(seed, memory_binds=seed % 2 == 1), 4))
    found = search(problem)
    assert found.method == "exact"
    assert found.choice.step_s <= search(problem, method="column generation").choice.step_s * (1 + 1e-9)


@pytest.mark.slow
def test_a_coarse_enumeration_ends_within_a_few_percent_of_the_whole_one(monkeypatch):
    problem = plain(grown(random_problem(5, memory_binds=True), 2))
    best = search(problem).choice.step_s
    monkeypatch.setattr("hybrid.scheduler.search.search._SMALL_SHAPES", 0)
    monkeypatch.setattr("hybrid.scheduler.search.search._COARSE_SHAPES", 2000)
    found = search(problem)
    assert found.method != "exact"
    assert found.choice.step_s <= best * 1.05


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto"])
def test_a_plan_on_any_schedule_is_what_the_simulator_says(schedule):
    problem = random_problem(6, memory_binds=False)
    alone = replace(problem, vocabulary=replace(problem.vocabulary, schedules=(schedule,), num_stages=4))
    choice = search(alone).choice
    assert confirm(choice).step_s == pytest.approx(choice.step_s, rel=1e-9)
    allowed = {schedule, "1f1b"} if schedule == "auto" else {schedule}
    assert {group.schedule_name for group in choice.groups} <= allowed


def test_more_schedules_never_make_a_plan_slower():
    for seed in (1, 4, 6):
        problem = random_problem(seed, memory_binds=False)
        alone = replace(problem, vocabulary=replace(problem.vocabulary, schedules=("1f1b",)))
        names = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto")
        every = replace(problem, vocabulary=replace(problem.vocabulary, schedules=names))
        assert search(every).choice.step_s <= search(alone).choice.step_s * (1 + 1e-9)


def test_shares_add_up_to_the_batch_whatever_the_microbatches():
    problem = random_problem(0, memory_binds=False)
    for batch in (5, 7, 12):
        choice = search(replace(problem, global_batch=batch)).choice
        assert choice.is_exact


@pytest.mark.slow
def test_a_plan_on_a_part_of_the_pools_names_them_as_the_whole_does():
    problem = plain(grown(random_problem(11, memory_binds=True), 12))
    slow = LinkModel(latency_s=10.0, bytes_per_s=1e3)
    links = {key: link if key[0] == key[2] else slow for key, link in problem.network.links.items()}
    choice = search(replace(problem, network=Network(links=links))).choice
    assert len(choice.problem.pools) == len(choice.chips) == 3
    used = [index for index, count in enumerate(choice.chips) if count]
    assert len(used) == 1
    options = {option.pool for group in choice.groups for option in map(group.column.option_of_rank, [0])}
    assert options == set(used)
