"""The search's seconds and bytes: links, reductions, paces, tables."""

import math
from dataclasses import replace

import numpy as np
import pytest

from hybrid.bench.planner_oracle import random_problem
from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.actions import Kind
from hybrid.scheduler.schedules import one_f_one_b
from hybrid.scheduler.search.islands import merged
from hybrid.scheduler.search.links import LinkModel, Network, reduce_seconds
from hybrid.scheduler.search.members import split_members
from hybrid.scheduler.search.options import OptionTable
from hybrid.scheduler.search.pace import Pipelines, exact_step_seconds, step_seconds
from hybrid.scheduler.search.problem import Pool
from hybrid.scheduler.simulate import simulate


def lines(depth, seed, *, count=3):
    draw = np.random.default_rng(seed)
    edge = draw.uniform(0.0, 0.3, (count, depth - 1))
    backward_s = draw.uniform(0.5, 4.0, (count, depth))
    return Pipelines(
        forward_s=draw.uniform(0.5, 2.0, (count, depth)),
        backward_s=backward_s,
        weight_s=backward_s * draw.uniform(0.2, 0.6, (count, depth)),
        activation_s=edge,
        gradient_s=edge * 1.5,
        busy_s=edge * 0.9,
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("num_microbatches", [1, 2, 7, 12])
def test_the_vectorised_step_is_the_simulators(depth, num_microbatches):
    many = lines(depth, depth * 100 + num_microbatches)
    found = exact_step_seconds(many, num_microbatches, "simulated")
    for row in range(3):
        timeline = simulate(
            one_f_one_b(depth, num_microbatches),
            seconds_of=lambda a, r=row: (many.forward_s if a.kind is Kind.F else many.backward_s)[r, a.stage],
            transfer_s=lambda s, r=row: (
                many.activation_s[r, s.stage] if s.kind is Kind.SEND_F else many.gradient_s[r, s.stage - 1]
            ),
            link_busy_s=lambda s, r=row: many.busy_s[r, s.stage if s.kind is Kind.SEND_F else s.stage - 1],
        )
        assert found[row] == pytest.approx(timeline.step_s, rel=1e-12)


def test_a_long_step_goes_on_at_its_pace_within_a_percent():
    many = lines(4, 7, count=20)
    assert step_seconds(many, 200, "simulated") == pytest.approx(exact_step_seconds(many, 200, "simulated"), rel=0.01)


def test_a_polynomial_link_gives_sailors_bandwidth():
    link = LinkModel(polynomial=(0.5, 1.0, 2.0))
    size = 4e6  # x = 2: 0.5 * 4 + 2 + 2 = 6 GB/s
    assert link.seconds(size) == pytest.approx(size / 6e9)


def test_a_table_link_is_interpolated_and_held_beyond_its_ends():
    link = LinkModel(latency_s=1e-3, points=((1e3, 1e9), (1e5, 3e9)))
    assert link.seconds(1e4) == pytest.approx(1e-3 + 1e4 / 2e9)
    assert link.seconds(1e9) == pytest.approx(1e-3 + 1e9 / 3e9)


def test_ranks_that_share_an_interface_share_its_bandwidth():
    link = LinkModel(bytes_per_s=1e9, shared_by=4)
    assert link.seconds(1e9, sharers=8) == pytest.approx(4 * link.seconds(1e9))


def test_a_polynomial_below_zero_is_refused_with_the_size():
    with pytest.raises(FleetError, match=r"no bandwidth above zero.*1000\.0"):
        LinkModel(polynomial=(1.0, 0.0)).seconds(1000.0)


def test_a_ring_and_two_trees_cost_what_they_should():
    link = LinkModel(latency_s=1e-3, bytes_per_s=1e9)
    sizes = np.array([1e9])
    assert reduce_seconds(link, sizes, 2)[0] == pytest.approx(2 * (1e-3 + 0.5))
    many = reduce_seconds(link, sizes, 1024)[0]
    assert many == pytest.approx(2 * 1.0 + 2 * math.log2(1024) * 1e-3)


def test_a_link_stands_for_both_directions_and_for_more_lanes():
    link = LinkModel(bytes_per_s=1.0)
    network = Network(links={("a", 1, "b", 1): link})
    assert network.find(("b",), ("a",), 4, 2) is link
    assert network.find(("a",), ("a",), 1, 1) is None


def alike(network, *sites):
    pools = [
        Pool(name=name, chip="kind0", num_chips=count, node_size=2, memory_bytes=8, site=site)
        for name, count, site in zip("abc", (4, 6, 1), sites, strict=True)
    ]
    problem = replace(random_problem(0, memory_binds=False), network=network).with_pools(pools)
    return [(pool.name, pool.num_chips) for pool in merged(problem).pools]


def test_identical_pools_are_one_and_others_are_not():
    by_chip = Network(links={("kind0", 1, "kind0", 1): LinkModel(bytes_per_s=1e9)})
    assert alike(by_chip, "near", "near", "far") == [("a", 10), ("c", 1)]


def test_pools_are_one_only_if_their_links_are_alike():
    fast, slow = LinkModel(bytes_per_s=1e10), LinkModel(bytes_per_s=1e9)
    inside = {(name, 1, name, 1): fast for name in "abc"}
    between = {("a", 1, "b", 1): fast, ("a", 1, "c", 1): slow, ("b", 1, "c", 1): slow}
    assert alike(Network(links=inside | between), "x", "x", "x") == [("a", 10), ("c", 1)]
    assert alike(Network(links=inside | between | {("a", 1, "b", 1): slow}), "x", "x", "x") == [
        ("a", 4),
        ("b", 6),
        ("c", 1),
    ]


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_members_are_split_where_chips_suffice_and_not_where_they_do_not(pools):
    chips = np.ones((2, pools))
    counts = split_members(chips, [6 // pools] * pools, 3)
    assert counts is not None
    assert counts.sum(axis=1).tolist() == [3, 3]
    assert split_members(chips, [6 // pools] * pools, 4) is None


def test_recompute_holds_less_and_takes_longer():
    from dataclasses import replace

    problem = random_problem(6, memory_binds=False)
    problem = replace(problem, vocabulary=replace(problem.vocabulary, recompute=True))
    table = OptionTable(problem, 1)
    keeps = next(i for i, o in enumerate(table.options) if not o.recompute)
    again = next(i for i, o in enumerate(table.options) if o.recompute)
    assert table.held_bytes[again, 1, 3] < table.held_bytes[keeps, 1, 3]
    assert table.backward_s[again, 1, 3] == pytest.approx(table.backward_s[keeps, 1, 3] + table.forward_s[keeps, 1, 3])


def test_a_chip_without_a_profile_is_refused_by_name_and_number():
    problem = random_problem(6, memory_binds=False)
    stranger = Pool(name="new", chip="unknown", num_chips=5, node_size=1, memory_bytes=1)
    with pytest.raises(PlanError, match="no chip unknown, and pool new has 5"):
        problem.with_pools([*problem.pools, stranger])
