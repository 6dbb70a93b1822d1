"""Every group keeps every clause of the contract. A new variant is one id here."""

from functools import partial

import pytest
import torch

from hybrid.collectives.algorithms import ALGORITHMS
from hybrid.collectives.choose import Choice, Row
from hybrid.testing.group_kit import CLAUSES, GroupKit
from hybrid.testing.group_rig import DTYPES, OpenWorld, open_island_world, open_shm_world, open_transport_world
from hybrid.transports import VARIANTS

WORLD_OF_VARIANT: dict[str, OpenWorld] = {
    variant: partial(open_transport_world, variant, link=variant) for variant in VARIANTS
} | {"shared memory": open_shm_world}
QUICK = ("inproc", "zmq-ipc", "shared memory")
FEW = (torch.float32, torch.bfloat16, torch.int32, torch.bool)
"""Formats that stand for all in the quick run: each has another way of being reduced."""


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("variant", QUICK)
def test_the_variant_keeps_the_clause(variant: str, clause: str) -> None:
    sizes = (2,) if variant == "zmq-ipc" else (1, 2, 3)
    GroupKit(WORLD_OF_VARIANT[variant], sizes=sizes, dtypes=FEW, counts=(0, 1, 1001)).check(clause)


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_group_of_islands_keeps_the_clause(clause: str) -> None:
    chunk_bytes = 30_000 if clause in ("reductions", "in place") else 1 << 20
    world = partial(open_island_world, "inproc", chunk_bytes=chunk_bytes)
    GroupKit(world, sizes=(3,), dtypes=(torch.float32, torch.bfloat16), counts=(20_001,)).check(clause)


def _table(operation: str, algorithm: str, segment_bytes: int) -> tuple[Row, ...]:
    choices = {each: next(iter(algorithms)) for each, algorithms in ALGORITHMS.items()} | {operation: algorithm}
    return tuple(
        Row(operation=each, choice=Choice(algorithm=name, segment_bytes=segment_bytes))
        for each, name in choices.items()
    )


CHOSEN = [
    (operation, name) for operation, algorithms in ALGORITHMS.items() for name in algorithms if len(algorithms) > 1
]

CLAUSES_OF_OPERATION = {
    "all_reduce": ("same bits", "numerics", "reductions"),
    "reduce_scatter": ("reductions", "uneven"),
    "reduce": ("reductions",),
    "all_gather": ("moves", "uneven"),
    "broadcast": ("moves",),
}
"""What the quick run checks of an algorithm."""


@pytest.mark.parametrize(("operation", "algorithm"), CHOSEN)
def test_each_algorithm_keeps_the_clauses_of_results(operation: str, algorithm: str) -> None:
    world = partial(open_transport_world, "inproc", table=_table(operation, algorithm, 256))
    kit = GroupKit(world, sizes=(3,), dtypes=(torch.float32, torch.bfloat16), counts=(1001,))
    for clause in CLAUSES_OF_OPERATION[operation]:
        kit.check(clause)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("variant", [*WORLD_OF_VARIANT, "islands"])
def test_the_variant_keeps_the_clause_at_every_size_and_format(variant: str, clause: str, size: int) -> None:
    world = partial(open_island_world, "inproc") if variant == "islands" else WORLD_OF_VARIANT[variant]
    sizes = (max(size, 2),) if clause in ("order", "point to point", "asynchronous") else (size,)
    GroupKit(world, sizes=sizes, counts=(0, 1, 1001, 20_001), patience_s=30.0).check(clause)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("operation", "algorithm"), CHOSEN)
def test_each_algorithm_gives_the_reference_over_each_transport(operation: str, algorithm: str, variant: str) -> None:
    world = partial(open_transport_world, variant, table=_table(operation, algorithm, 512))
    kit = GroupKit(world, sizes=(2, 3, 4, 5), dtypes=DTYPES, counts=(0, 1, 1001), patience_s=30.0)
    for clause in CLAUSES_OF_OPERATION[operation]:
        kit.check(clause)
