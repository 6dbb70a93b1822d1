"""A million chips on paper: one training step of five kinds of islands at several sites. No torch.

The model and the plan are made here, not measured: what is shown is that the simulator's cost doesn't grow with the
number of chips.
"""

from __future__ import annotations

import time
import tracemalloc

from hybrid.hardware.catalog import load_catalog
from hybrid.scheduler.profile import LayerProfile
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import MemoryModel, Pool
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes
from hybrid.scheduler.step.build import ReplicaSpec, StageSpec, build_step
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.facts import TrainingStep
from hybrid.scheduler.step.result import StepResult

_HIDDEN, _BLOCKS, _SEQUENCE, _VOCAB = 16_384, 126, 8_192, 128_256
_EFFICIENCY = 0.4
_DEGREE = 8
_KINDS = {"trn2": 512_000, "trn3": 256_000, "h100": 128_000, "h200": 64_000, "b200": 40_000}
"""Chips by kind, a million in all, each kind at a site of its own."""
_STAGES = 16
_MICROBATCHES = 64


def million_chip_step() -> TrainingStep:
    """Return the step: for each kind, as many pipelines of 16 stages of 8 chips as it has room for."""
    catalog = load_catalog()
    table = _table()
    pools, replicas = [], []
    for index, (name, num_chips) in enumerate(_KINDS.items()):
        chip = catalog.chip(name)
        pools.append(
            Pool(
                name=name,
                chip=name,
                num_chips=num_chips,
                node_size=16,
                memory_bytes=chip.memory_bytes,
                site=f"site {index}",
                watts=chip.power_w or 0.0,
            )
        )
        replicas.append(
            ReplicaSpec(
                name=name,
                stages=tuple(_stage(name, stage) for stage in range(_STAGES)),
                microbatch=1,
                num_microbatches=_MICROBATCHES,
                count=num_chips // (_STAGES * _DEGREE),
            )
        )
    inside = LinkModel(bytes_per_s=50e9, latency_s=15e-6, source="assumed")
    between = LinkModel(bytes_per_s=25e9, latency_s=1e-3, source="assumed")
    links = {(a, 1, b, 1): inside if a == b else between for a in _KINDS for b in _KINDS}
    return build_step(
        table,
        pools,
        Network(links=links),
        MemoryModel(bytes_per_parameter=18, margin=0.0),
        replicas,
        bucket_bytes=1e9,
    )


def measure_million() -> tuple[StepResult, float, float]:
    """Return the simulated step, and the seconds to build it and to simulate it."""
    start_s = time.perf_counter()
    step = million_chip_step()
    built_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    result = simulate_step(step)
    # What a reader of the step looks at is part of simulating it.
    _ = (result.step_s, result.idle_share, result.peak_bytes, result.usd_per_step, result.kwh_per_step)
    return result, built_s, time.perf_counter() - start_s


def measure_million_mib() -> float:
    """Return the MiB that building and simulating the step takes at its peak; slow, since each allocation is traced."""
    tracemalloc.start()
    kept = simulate_step(million_chip_step())
    peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert kept.runs, "alive until here"
    return peak_mib


def _stage(pool: str, stage: int) -> StageSpec:
    num_layers = _BLOCKS + 2
    first, end = stage * num_layers // _STAGES, (stage + 1) * num_layers // _STAGES
    return StageSpec(pool=pool, first_layer=first, end_layer=end, degree=_DEGREE, recompute=True)


def _layer(index: int) -> LayerProfile:
    tokens = _SEQUENCE
    if index in (0, _BLOCKS + 1):
        flops = 0.0 if index == 0 else 2.0 * tokens * _HIDDEN * _VOCAB
        parameters, kind = _VOCAB * _HIDDEN, "embedding" if index == 0 else "head"
    else:
        parameters, kind = 12 * _HIDDEN**2, "block"
        flops = 2.0 * tokens * parameters + 4.0 * tokens * tokens * _HIDDEN
    return LayerProfile(
        name=f"{kind}.{index}",
        kind=kind,
        num_parameters=parameters,
        forward_flops=flops,
        backward_flops=2 * flops,
        saved_activation_bytes=34 * tokens * _HIDDEN,
        output_bytes=2 * tokens * _HIDDEN,
    )


def _table() -> ProfileTable:
    from hybrid.scheduler.cost import layer_seconds

    catalog = load_catalog()
    layers = [_layer(index) for index in range(_BLOCKS + 2)]
    cells = {}
    for name in _KINDS:
        seconds = [layer_seconds(layer, catalog.chip(name), "bf16", _EFFICIENCY) for layer in layers]
        half = tuple(backward / 2 / _DEGREE for _, backward in seconds)
        cells[name, _DEGREE, 1] = Cell(
            forward_s=tuple(forward / _DEGREE for forward, _ in seconds),
            input_gradient_s=half,
            weight_gradient_s=half,
            update_s=0.01,
        )
    whole = {
        degree: Sizes(
            num_parameters=tuple(layer.num_parameters // degree for layer in layers),
            saved_bytes=tuple(layer.saved_activation_bytes // degree for layer in layers),
            output_bytes=tuple(layer.output_bytes for layer in layers),
        )
        for degree in (1, _DEGREE)
    }
    return ProfileTable(
        model=f"decoder of {_BLOCKS} blocks of {_HIDDEN}",
        source="analytic",
        note=f"catalog peaks at efficiency {_EFFICIENCY}",
        sequence_length=_SEQUENCE,
        precision="bf16",
        layers=tuple(layer.name for layer in layers),
        sizes=whole,
        cells=cells,
    )
