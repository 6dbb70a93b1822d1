"""Who reduces which layer with whom, in which buckets, and who owns what: decided from the plan alone."""

from dataclasses import replace

import pytest

from hybrid.errors import PlanError
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.reduction import (
    BLOCK,
    LayerGroup,
    Piece,
    cut_layer,
    layer_groups,
    owner_shares,
    plan_buckets,
    shares_of_group,
)


def _stage(number: int, ranks: tuple[int, ...], first: int, end: int, *, seconds: float = 1.0) -> StagePlan:
    return StagePlan(
        stage=number,
        ranks=ranks,
        island="host",
        chip="cpu",
        backend="cpu",
        first_layer=first,
        end_layer=end,
        tensor_parallel=len(ranks),
        width=1,
        recompute=False,
        forward_s=seconds * (end - first),
        backward_s=2 * seconds * (end - first),
        weight_gradient_s=0.0,
        memory_bytes=100,
        memory_limit_bytes=1000,
    )


def _plan(*replicas: tuple[StagePlan, ...]) -> Plan:
    edge = EdgePlan(from_stage=0, to_stage=1, size_bytes=1, transfer_s=0.0, latency_s=0.0, codec="none")
    return Plan(
        job="job",
        model="decoder",
        num_layers=replicas[0][-1].end_layer,
        precision="fp32",
        source="made up",
        objective="time",
        global_batch=2 * len(replicas),
        gradient_codec="none",
        step_s=1.0,
        idle_share=0.0,
        replicas=tuple(
            ReplicaPlan(
                replica=number,
                schedule="1f1b",
                order=(),
                num_microbatches=2,
                microbatch=1,
                first_sample=2 * number,
                step_s=1.0,
                idle_share=0.0,
                stages=stages,
                edges=tuple(replace(edge, from_stage=s, to_stage=s + 1) for s in range(len(stages) - 1)),
            )
            for number, stages in enumerate(replicas)
        ),
    )


THREE_AND_TWO = _plan(
    (_stage(0, (0,), 0, 2), _stage(1, (1,), 2, 4), _stage(2, (2,), 4, 6)),
    (_stage(0, (3,), 0, 3, seconds=0.5), _stage(1, (4,), 3, 6, seconds=0.5)),
)


def test_a_layer_is_reduced_among_whoever_owns_it() -> None:
    assert layer_groups(THREE_AND_TWO) == (
        LayerGroup(ranks=(0, 3), layers=(0, 1)),
        LayerGroup(ranks=(1, 3), layers=(2,)),
        LayerGroup(ranks=(1, 4), layers=(3,)),
        LayerGroup(ranks=(2, 4), layers=(4, 5)),
    )


def test_each_place_of_a_stage_of_several_ranks_has_a_group_of_its_own() -> None:
    plan = _plan(
        (_stage(0, (0, 1), 0, 2), _stage(1, (2,), 2, 4)),
        (_stage(0, (3, 4), 0, 2), _stage(1, (5,), 2, 4)),
    )
    assert [group.ranks for group in layer_groups(plan)] == [(0, 3), (1, 4), (2, 5)]


def test_replicas_that_split_a_layer_over_other_numbers_of_ranks_are_refused() -> None:
    plan = _plan((_stage(0, (0, 1), 0, 4),), (_stage(0, (2,), 0, 4),))
    with pytest.raises(PlanError, match="layer 0 is split over other numbers of ranks"):
        layer_groups(plan)


def test_buckets_go_from_the_last_layer_to_the_first_and_stay_within_a_stage_and_a_size() -> None:
    plan = _plan((_stage(0, (0,), 0, 4), _stage(1, (0,), 4, 6)), (_stage(0, (1,), 0, 6),))
    (group,) = layer_groups(plan)
    sizes = dict.fromkeys(range(6), 10)
    found = [bucket.layers for bucket in plan_buckets(plan, group, sizes, tied=False, bucket_elements=30)]
    assert found == [(5, 4), (3, 2, 1), (0,)]


def test_a_layer_larger_than_a_bucket_has_one_for_itself() -> None:
    (group,) = layer_groups(_plan((_stage(0, (0,), 0, 3),), (_stage(0, (1,), 0, 3),)))
    plan = _plan((_stage(0, (0,), 0, 3),), (_stage(0, (1,), 0, 3),))
    found = [bucket.layers for bucket in plan_buckets(plan, group, {0: 5, 1: 500, 2: 5}, tied=False, bucket_elements=9)]
    assert found == [(2,), (1,), (0,)]


def test_tied_layers_leave_last_and_alone() -> None:
    plan = _plan((_stage(0, (0,), 0, 4),), (_stage(0, (1,), 0, 4),))
    (group,) = layer_groups(plan)
    buckets = plan_buckets(plan, group, dict.fromkeys(range(4), 1), tied=True)
    assert [(bucket.layers, bucket.is_tied) for bucket in buckets] == [((2, 1), False), ((3,), True), ((0,), True)]


def test_members_own_by_their_speed() -> None:
    assert owner_shares([1.0, 3.0], [1.0, 1.0]) == (0.25, 0.75)
    assert owner_shares([0.0, 0.0], [1.0, 1.0]) == (0.5, 0.5)


def test_a_member_owns_no_more_than_it_has_room_for() -> None:
    assert owner_shares([1.0, 3.0], [1.0, 0.5]) == (0.5, 0.5)
    assert owner_shares([1.0, 1.0, 2.0], [0.1, 1.0, 1.0]) == pytest.approx((0.1, 0.3, 0.6))
    assert owner_shares([1.0, 1.0], [0.2, 0.6]) == pytest.approx((0.25, 0.75))


def test_a_faster_rank_owns_more_of_a_group() -> None:
    group = layer_groups(THREE_AND_TWO)[0]
    slow, fast = shares_of_group(THREE_AND_TWO, group, state_bytes=100)
    assert fast == pytest.approx(2 * slow)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.7), (0.0, 1.0), (0.2, 0.5, 0.3)])
def test_the_pieces_of_a_layer_are_whole_blocks_each_owned_once(shares: tuple[float, ...]) -> None:
    sizes = {"norm": 64, "weight": 10 * BLOCK + 7, "bias": 3, "other": 5 * BLOCK}
    pieces = cut_layer(sizes, shares)
    total = sum(sizes.values())
    assert len(pieces) == len(shares)
    flat = [piece for mine in pieces for piece in mine]
    for name, size in sizes.items():
        parts = [piece for piece in flat if piece.name == name]
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == size
        assert all(part.start % BLOCK == 0 for part in parts)
    for mine, share in zip(pieces, shares, strict=True):
        assert abs(sum(piece.size for piece in mine) - share * total) <= BLOCK


def test_a_layer_of_one_block_has_one_owner() -> None:
    assert cut_layer({"w": 10}, (0.5, 0.5)) == ((Piece(name="w", start=0, end=10),), ())
