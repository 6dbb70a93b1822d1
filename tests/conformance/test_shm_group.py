"""What a group on one host has beyond the contract: buckets that are reduced where they lie."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hybrid.collectives.base import Group, ReduceOp
from hybrid.collectives.shm_group import SMALL_BYTES, ShmGroup
from hybrid.errors import ProtocolError
from hybrid.testing.group_rig import Rig, at_once, open_shm_world

RIG = Rig(open_world=open_shm_world)
LONG = SMALL_BYTES // 4 * 3 + 5


def _everywhere(groups: list[Group], work: Callable[[ShmGroup], None]) -> None:
    for group in groups:
        assert isinstance(group, ShmGroup)
    at_once(RIG, [partial(work, group) for group in groups if isinstance(group, ShmGroup)])


def _values(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank), dtype=torch.float32).to(dtype)


def _summed(size: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return the contract's sum: in the order of ranks, narrow formats in float32, rounded once."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = _values(0, count, dtype).to(wide)
    for rank in range(1, size):
        total += _values(rank, count, dtype).to(wide)
    return total.to(dtype)


@pytest.mark.parametrize("count", [1, 1000, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_bucket_and_a_part_of_one_are_reduced_to_the_bits_of_a_sum_in_the_order_of_ranks(
    size: int, dtype: torch.dtype, count: int
) -> None:
    def work(group: ShmGroup) -> None:
        buckets = [group.bucket(count + 64, dtype) for _ in range(2)]
        for bucket in buckets:
            part = bucket[64:]
            part.copy_(_values(group.rank, count, dtype))
            group.all_reduce(part).wait(10.0)
            assert torch.equal(part, _summed(size, count, dtype))
            assert not bucket[:64].any()

    with RIG.groups(size) as groups:
        _everywhere(groups, work)


@pytest.mark.parametrize("op", [ReduceOp.AVG, ReduceOp.MAX])
def test_a_bucket_knows_the_other_reductions(op: ReduceOp) -> None:
    def work(group: ShmGroup) -> None:
        bucket = group.bucket(LONG, torch.float32)
        bucket.fill_(float(group.rank))
        group.all_reduce(bucket, op).wait(10.0)
        assert torch.equal(bucket, torch.full((LONG,), 0.5 if op is ReduceOp.AVG else 1.0))

    with RIG.groups(2) as groups:
        _everywhere(groups, work)


def test_one_members_bucket_may_be_anothers_ordinary_tensor() -> None:
    def work(group: ShmGroup) -> None:
        bucket = group.bucket(LONG, torch.float32)
        x = bucket if group.rank == 0 else torch.empty(LONG)
        x.copy_(_values(group.rank, LONG, torch.float32))
        group.all_reduce(x).wait(10.0)
        assert torch.equal(x, _summed(2, LONG, torch.float32))

    with RIG.groups(2) as groups:
        _everywhere(groups, work)


def test_buckets_of_different_sizes_are_refused() -> None:
    refused: list[str] = []

    def work(group: ShmGroup) -> None:
        try:
            group.bucket(100 + group.rank, torch.float32)
        except ProtocolError as error:
            refused.append(str(error))

    with RIG.groups(2) as groups:
        _everywhere(groups, work)
    assert len(refused) == 2
    assert "another collective" in refused[0]


def test_a_bucket_can_be_read_after_its_group_was_closed() -> None:
    kept: list[Tensor] = []

    def work(group: ShmGroup) -> None:
        bucket = group.bucket(1000, torch.float32)
        bucket.fill_(float(group.rank))
        group.barrier().wait(10.0)
        group.close()
        kept.append(bucket)

    with RIG.groups(2) as groups:
        _everywhere(groups, work)
    assert sorted(float(bucket.sum()) for bucket in kept) == [0.0, 1000.0]
