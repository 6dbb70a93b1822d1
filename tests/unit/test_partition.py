"""The dynamic programme against every split there is."""

from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybrid.errors import PlanError
from hybrid.scheduler.partition import even_out_ranks, partition_min_max

small = st.integers(0, 20).map(float)


def every_split(num_stages: int, num_layers: int):
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(range(first, end) for first, end in pairwise((0, *cuts, num_layers)))


@st.composite
def problems(draw):
    num_stages = draw(st.integers(1, 4))
    num_layers = draw(st.integers(num_stages, 8))

    def table(width):
        row = st.lists(small, min_size=width, max_size=width)
        return draw(st.lists(row, min_size=num_stages, max_size=num_stages))

    limits = draw(st.lists(st.integers(0, 80).map(float), min_size=num_stages, max_size=num_stages))
    return table(num_layers), table(num_layers), table(num_layers + 1), limits


def bottleneck(split, seconds):
    return max(sum(seconds[stage][layer] for layer in run) for stage, run in enumerate(split))


def lacks(split, layer_bytes, cut_bytes, limits):
    return [
        sum(layer_bytes[stage][layer] for layer in run)
        + cut_bytes[stage][run.start]
        + cut_bytes[stage][run.stop]
        - limits[stage]
        for stage, run in enumerate(split)
    ]


@settings(max_examples=50, deadline=None)
@given(problems())
def test_no_split_has_a_faster_slowest_stage(problem):
    seconds = problem[0]
    split = partition_min_max(seconds)
    splits = list(every_split(len(seconds), len(seconds[0])))
    assert split in splits
    best = min(bottleneck(one, seconds) for one in splits)
    assert bottleneck(split, seconds) == best

    def total(one):
        return sum(sum(seconds[stage][layer] for layer in run) for stage, run in enumerate(one))

    assert total(split) == min(total(one) for one in splits if bottleneck(one, seconds) == best)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_no_split_that_fits_is_faster(problem):
    seconds, layer_bytes, cut_bytes, limits = problem
    splits = list(every_split(len(seconds), len(seconds[0])))
    fitting = [one for one in splits if max(lacks(one, layer_bytes, cut_bytes, limits)) <= 0]
    assume(fitting)
    split = partition_min_max(
        seconds, layer_bytes_of_stage=layer_bytes, cut_bytes_of_stage=cut_bytes, limit_bytes_of_stage=limits
    )
    assert split in fitting
    assert bottleneck(split, seconds) == min(bottleneck(one, seconds) for one in fitting)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_misfit_is_told_in_the_bytes_that_would_make_it_fit(problem):
    seconds, layer_bytes, cut_bytes, limits = problem
    splits = list(every_split(len(seconds), len(seconds[0])))
    missing = min(max(lacks(one, layer_bytes, cut_bytes, limits)) for one in splits)
    assume(missing > 0)
    memory = {"layer_bytes_of_stage": layer_bytes, "cut_bytes_of_stage": cut_bytes}
    with pytest.raises(PlanError, match=rf"misses {missing:.0f} bytes"):
        partition_min_max(seconds, **memory, limit_bytes_of_stage=limits)
    partition_min_max(seconds, **memory, limit_bytes_of_stage=[limit + missing for limit in limits])


def test_a_slow_device_gets_fewer_layers():
    fast, slow = [1.0] * 9, [2.0] * 9
    assert partition_min_max([slow, fast]) == (range(3), range(3, 9))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PlanError, match=r"3 stages but only 2 layers.*1 to 2"):
        partition_min_max([[1.0, 1.0]] * 3)


def test_a_hundred_layers_on_sixty_four_stages_split_evenly():
    split = partition_min_max([[1.0] * 128] * 64)
    assert {len(run) for run in split} == {2}


def test_ranks_of_several_stages_are_evened_out():
    seconds = [[1.0] * 10] * 4
    split = (range(4), range(4, 6), range(6, 9), range(9, 10))
    found = even_out_ranks(split, seconds, (0, 1, 0, 1), fits=lambda stage, layers: True)
    assert [len(found[0]) + len(found[2]), len(found[1]) + len(found[3])] == [5, 5]
    assert [layer for run in found for layer in run] == list(range(10))


def test_evening_out_keeps_within_memory():
    split = (range(4), range(4, 6))
    found = even_out_ranks(split, [[1.0] * 6] * 2, (0, 1), fits=lambda stage, layers: stage == 0 or len(layers) < 3)
    assert found == split
