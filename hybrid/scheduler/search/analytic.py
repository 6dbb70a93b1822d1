"""Analytic tables and pools: what is known of a model and a fleet before anything is measured.

Pure. FLOPs and bytes against the catalog's peaks at a stated efficiency; every output prints it as uncalibrated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid.errors import PlanError
from hybrid.scheduler.cost import layer_seconds
from hybrid.scheduler.profile import ModelProfile
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import Pool
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes

if TYPE_CHECKING:
    from hybrid.hardware.catalog import Catalog, Chip
    from hybrid.hardware.fleet import Fleet, Island

_UPDATE_PASSES = 10
"""Times that Adam moves a parameter's 4 bytes: weight, gradient and two moments read, weight and moments written,
and the gradient's norm and clipping."""
_REDUCES = 2
"""All-reduces of a layer's output in its forward, and as many in its backward, where it is split (Shoeybi 2019)."""


def analytic_table(
    profiles: Sequence[ModelProfile], chips: Iterable[Chip], *, degrees: Sequence[int] = (1,), efficiency: float = 0.4
) -> ProfileTable:
    """Return a table from data sheets alone.

    A layer split over t chips takes a t-th of its time on each, and its all-reduces over the chip's links.

    Args:
        profiles: of one model, one for each microbatch; the first must be for one sample, for the sizes.
        chips: kinds to have cells for.
        degrees: tensor-parallel degrees.
        efficiency: share of the data sheet's peaks.
    """
    one = profiles[0]
    if one.microbatch != 1:
        raise PlanError("the first profile must be for one sample", value=one.microbatch, valid="1")
    cells = {}
    for chip in chips:
        for profile in profiles:
            seconds = [layer_seconds(layer, chip, profile.precision, efficiency) for layer in profile.layers]
            for degree in degrees:
                comm = [
                    2 * _REDUCES * (degree - 1) / degree * layer.output_bytes / (chip.pair_bytes_per_s * efficiency)
                    for layer in profile.layers
                ]
                backward = [b / degree + c for (_, b), c in zip(seconds, comm, strict=True)]
                held = sum(layer.num_parameters for layer in profile.layers) / len(profile.layers) / degree
                cells[chip.name, degree, profile.microbatch] = Cell(
                    forward_s=tuple(f / degree + c for (f, _), c in zip(seconds, comm, strict=True)),
                    input_gradient_s=tuple(b / 2 for b in backward),
                    weight_gradient_s=tuple(b / 2 for b in backward),
                    update_s=_UPDATE_PASSES * 4 * held / (chip.hbm_bytes_per_s * efficiency),
                )
    return ProfileTable(
        model=one.model,
        source="analytic",
        note=f"data sheets at efficiency {efficiency:g}",
        sequence_length=one.sequence_length,
        precision=one.precision,
        layers=tuple(layer.name for layer in one.layers),
        sizes={degree: _sizes(one, degree) for degree in degrees},
        cells=cells,
    )


def _sizes(profile: ModelProfile, degree: int) -> Sizes:
    return Sizes(
        num_parameters=tuple(-(-layer.num_parameters // degree) for layer in profile.layers),
        saved_bytes=tuple(-(-layer.saved_activation_bytes // degree) for layer in profile.layers),
        output_bytes=tuple(layer.output_bytes for layer in profile.layers),
    )


def pools_of_fleet(fleet: Fleet, catalog: Catalog | None = None) -> tuple[Pool, ...]:
    """Return a pool an island; prices and watts from the catalog, 0 where it has none."""
    return tuple(
        Pool(
            name=island.name,
            chip=kind_of(island),
            num_chips=island.num_chips,
            node_size=island.chips_per_system,
            memory_bytes=island.memory_bytes,
            site=island.site,
            usd_per_hour=_usd_per_hour(island, catalog) / island.ranks_per_chip,
            watts=(island.chip.power_w or 0.0) / island.ranks_per_chip,
        )
        for island in fleet.islands
    )


def _usd_per_hour(island: Island, catalog: Catalog | None) -> float:
    """Return a chip's price: its system's, or the lowest of any system with such chips; 0 where none is known."""
    if catalog is None:
        return 0.0
    offers = {
        name: system.usd_per_hour / system.num_chips
        for name, system in catalog.systems.items()
        if system.chip == island.chip.name and system.usd_per_hour is not None
    }
    own = offers.get(island.system or "")
    return own if own is not None else min(offers.values(), default=0.0)


def kind_of(island: Island) -> str:
    """Return what a profile calls the island's chips: the chip, with its speed where that is not the catalog's."""
    return island.chip.name if island.speed == 1.0 else f"{island.chip.name} x{island.speed:g}"


def with_speeds(table: ProfileTable, islands: Iterable[Island]) -> ProfileTable:
    """Return the table with cells for slower and faster specimens: the chip's seconds over its speed."""
    cells = dict(table.cells)
    for island in islands:
        for (chip, degree, size), cell in table.cells.items():
            if chip == island.chip.name and (kind_of(island), degree, size) not in cells:
                cells[kind_of(island), degree, size] = _scaled(cell, 1.0 / island.speed)
    return replace(table, cells=cells)


def _scaled(cell: Cell, factor: float) -> Cell:
    return Cell(
        forward_s=tuple(x * factor for x in cell.forward_s),
        input_gradient_s=tuple(x * factor for x in cell.input_gradient_s),
        weight_gradient_s=tuple(x * factor for x in cell.weight_gradient_s),
        update_s=cell.update_s * factor,
    )


def network_of_fleet(fleet: Fleet) -> Network:
    """Return the fleet's links between every two islands and inside each, between systems where it has several."""
    links = {}
    for index, one in enumerate(fleet.islands):
        for other in fleet.islands[index:]:
            link = fleet.link(one.name, other.name)
            if one is other and one.num_systems > 1:
                first = sum(island.num_chips for island in fleet.islands[:index])
                link = fleet.rank_link(first, first + one.chips_per_system)
            links[one.name, 1, other.name, 1] = LinkModel(
                latency_s=link.latency_s, bytes_per_s=link.bandwidth_bytes_per_s, source=link.basis
            )
    return Network(links=links)
