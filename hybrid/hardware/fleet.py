"""The fleet: islands of chips and the links between them, as the planner and the runtime see them.

Pure facts made from a FleetConfig and the catalog; every default that stands in for a missing link is
marked. May import only `errors`, `config` and this folder's `catalog`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from hybrid.config import FleetConfig, IslandConfig, LinkConfig
from hybrid.errors import FleetError
from hybrid.hardware.catalog import Catalog, Chip, LinkDefault, LinkDefaults, System, load_catalog


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """Chips of one kind that share a scale-up fabric and a native collective library.

    Where `num_systems` is more than one the island is a row of identical systems at one site: chips of
    one system share the fabric, chips of different systems talk over the network (`Fleet.rank_link`).
    """

    name: str
    chip: Chip
    num_chips: int
    """Devices, one a rank: chips, or the logical cores of `num_chips / ranks_per_chip` chips."""
    site: str = "local"
    backend: str
    """What computes: `cpu`, `emulated`, `cuda` or `neuron`."""
    memory_bytes: int
    """Of one device."""
    speed: float = 1.0
    """Multiplies the catalog's speed of the chip; holds a logical core's share of it."""
    ranks_per_chip: int = 1
    """1, but for `neuron` the chip's logical cores: TorchNeuron drives one core a process."""
    system: str | None = None
    num_systems: int = 1
    pair_bytes_per_s: float | None = None
    """One chip to a neighbour of its system, one direction; None: the chip's."""
    scale_out_bytes_per_s: float | None = None
    """One chip's share of its system's network, one direction; None: unknown."""

    @property
    def chips_per_system(self) -> int:
        """Chips that share one fabric."""
        return self.num_chips // self.num_systems

    def peak_flops(self, precision: str) -> float:
        """Return one chip's dense peak in FLOP/s, `speed` included; see `Chip.peak_flops`."""
        return self.chip.peak_flops(precision) * self.speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from one chip to another, one direction."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: float
    latency_s: float
    source: Literal["given", "default"]
    basis: str = "the job's links"
    """Where the numbers come from, in words; holds `assumed` where one of them is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Every device of the job; ranks are counted over the islands in order."""

    islands: tuple[Island, ...]
    links: tuple[Link, ...] = ()
    """The links that were given; `link` answers for all."""
    link_defaults: LinkDefaults = field(default_factory=lambda: load_catalog().link_defaults)
    catalog: Path | None = None
    """The user's catalog file that the islands were looked up in."""

    @property
    def num_chips(self) -> int:
        """Chips of all islands; the number of ranks."""
        return sum(island.num_chips for island in self.islands)

    def chips(self) -> Iterator[tuple[int, Island, int]]:
        """Yield (rank, island, index of the chip in the island) for every chip."""
        rank = 0
        for island in self.islands:
            for index in range(island.num_chips):
                yield rank, island, index
                rank += 1

    def place_of_rank(self, rank: int) -> tuple[Island, int]:
        """Return the island of a rank and the chip's index in it.

        Raises:
            FleetError: no such rank.
        """
        if not 0 <= rank < self.num_chips:
            valid = f"0 to {self.num_chips - 1}"
            raise FleetError("the fleet has no such rank", value=rank, valid=valid, fix="take a rank of the fleet")
        ends = list(accumulate(island.num_chips for island in self.islands))
        place = bisect_right(ends, rank)
        return self.islands[place], rank - (ends[place] - self.islands[place].num_chips)

    def island(self, name: str) -> Island:
        """Return the island of that name.

        Raises:
            FleetError: no such island.
        """
        for island in self.islands:
            if island.name == name:
                return island
        valid = [island.name for island in self.islands]
        raise FleetError("the fleet has no such island", value=name, valid=valid, fix="take one of these")

    def link(self, a: str, b: str) -> Link:
        """Return the link between two islands, or between two neighbours inside one (`link(a, a)`).

        A link that the job gives is taken as it is. Otherwise, inside an island (a system, where the
        island is made of several): the chip's pair bandwidth. At one site: the smaller of the two
        systems' network a chip, and the assumed one where a system has none. Between sites: the
        assumed one. Latencies are assumed.

        Raises:
            FleetError: no such island.
        """
        one, other = self.island(a), self.island(b)
        given = self._given(a, b)
        if given is not None:
            return given
        return self._inside(one) if a == b else self._between(one, other)

    def rank_link(self, a: int, b: int) -> Link:
        """Return the link between two ranks; like `link`, and knows which systems the chips are in.

        Raises:
            FleetError: no such rank.
        """
        (one, i), (other, j) = self.place_of_rank(a), self.place_of_rank(b)
        inside = one is other and i // one.chips_per_system != j // one.chips_per_system
        if inside and self._given(one.name, one.name) is None:
            return self._between(one, other)
        return self.link(one.name, other.name)

    def _given(self, a: str, b: str) -> Link | None:
        return next((link for link in self.links if set(link.between) == {a, b}), None)

    def _inside(self, island: Island) -> Link:
        default = self.link_defaults.inside_island
        bandwidth = default.bandwidth_bytes_per_s
        basis = f"{default.confidence} bandwidth and latency"
        if bandwidth is None:
            bandwidth = island.pair_bytes_per_s or island.chip.pair_bytes_per_s
            basis = f"scale-up of {island.system or island.chip.name}, {default.confidence} latency"
        return _default_link(island, island, bandwidth, default, basis)

    def _between(self, one: Island, other: Island) -> Link:
        if one.site != other.site:
            default = self.link_defaults.between_sites
            basis = f"{default.confidence}: a link between the sites {one.site} and {other.site}"
            return _default_link(one, other, _bandwidth(default), default, basis)
        default = self.link_defaults.between_islands
        shares = {
            island.system: island.scale_out_bytes_per_s
            for island in (one, other)
            if island.scale_out_bytes_per_s is not None
        }
        unknown = None in (one.scale_out_bytes_per_s, other.scale_out_bytes_per_s)
        known = [share for share in shares.values() if share is not None]
        bandwidth = min([*known, _bandwidth(default)] if unknown else known)
        slowest = next((name for name, share in shares.items() if share == bandwidth), None)
        basis = f"scale-out of {slowest} a chip, {default.confidence} latency"
        if slowest is None:
            basis = f"{default.confidence}: a network link of the catalog's link_defaults"
        return _default_link(one, other, bandwidth, default, basis)


def build_fleet(config: FleetConfig, catalog: Catalog | None = None) -> Fleet:
    """Return the fleet that a job describes; a system of n chips counts n for each of its `count`.

    Args:
        config: the job's `fleet`.
        catalog: where chips are looked up; None loads the shipped one with `config.catalog` over it.

    Raises:
        FleetError: an unknown or insufficiently announced chip, a backend that can't play it, a link given
            twice; the catalog file's own errors (`load_catalog`).
    """
    rows = load_catalog(config.catalog) if catalog is None else catalog
    return Fleet(
        islands=tuple(_build_island(island, rows) for island in config.islands),
        links=_build_links(config),
        link_defaults=rows.link_defaults,
        catalog=config.catalog if catalog is None else catalog.override,
    )


def fleet_to_config(fleet: Fleet) -> FleetConfig:
    """Return the job's `fleet` that `build_fleet` turns back into this one."""
    islands = tuple(
        IslandConfig.model_validate(
            {
                "name": island.name,
                "device": island.system or island.chip.name,
                "count": island.num_systems if island.system else island.num_chips // island.ranks_per_chip,
                "site": island.site,
                "backend": "auto" if island.backend == _auto_backend(island.chip) else island.backend,
                "memory_bytes": None if _has_own_memory(island) else island.memory_bytes * island.ranks_per_chip,
                "speed": island.speed * island.ranks_per_chip,
            }
        )
        for island in fleet.islands
    )
    links = tuple(
        LinkConfig(
            between=link.between,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )
        for link in fleet.links
    )
    return FleetConfig(islands=islands, links=links, catalog=fleet.catalog)


def _build_island(config: IslandConfig, catalog: Catalog) -> Island:
    try:
        device = catalog.device(config.device)
        chip = catalog.chip(device.chip) if isinstance(device, System) else device
    except FleetError as error:
        where = f"fleet.islands.{config.name}.device"
        raise FleetError(error.fact, value=error.value, valid=error.valid, fix=error.fix, where=where) from None
    backend = _auto_backend(chip) if config.backend == "auto" else config.backend
    if backend not in ("emulated", real_backend(chip)):
        own = real_backend(chip)
        raise FleetError(
            f"the backend {backend} cannot play the chip {chip.name}",
            value=config.backend,
            valid=("auto", "emulated") if own is None else ("auto", "emulated", own),
            where=f"fleet.islands.{config.name}.backend",
            fix="take `emulated`, or a `device` that the backend drives",
        )
    facts = _system_facts(device, chip) if isinstance(device, System) else _SystemFacts(chip.memory_bytes)
    parts = chip.ray_units_per_chip if backend == "neuron" else 1
    network = facts.scale_out_bytes_per_s
    return Island(
        name=config.name,
        chip=chip,
        num_chips=config.count * facts.num_chips * parts,
        site=config.site,
        backend=backend,
        memory_bytes=(facts.memory_bytes if config.memory_bytes is None else config.memory_bytes) // parts,
        speed=config.speed / parts,
        ranks_per_chip=parts,
        system=device.name if isinstance(device, System) else None,
        num_systems=config.count if isinstance(device, System) else 1,
        pair_bytes_per_s=facts.pair_bytes_per_s,
        scale_out_bytes_per_s=None if network is None else network / parts,
    )


def real_backend(chip: Chip) -> str | None:
    """Return the backend that drives the chip itself; None where there is none, as for Trainium1.

    TorchNeuron serves Trainium2 and later.
    """
    if chip.ray_resource == "CPU":
        return "cpu"
    if chip.vendor == "nvidia":
        return "cuda"
    return "neuron" if chip.generation in _TORCH_NEURON_GENERATIONS else None


@dataclass(frozen=True, slots=True)
class _SystemFacts:
    """What a system adds to its chips, for one chip."""

    memory_bytes: int
    num_chips: int = 1
    pair_bytes_per_s: float | None = None
    scale_out_bytes_per_s: float | None = None


def _system_facts(system: System, chip: Chip) -> _SystemFacts:
    # A chip's data sheet may promise more memory than the systems that are sold with it have.
    share = chip.memory_bytes if system.memory_bytes is None else system.memory_bytes // system.num_chips
    links = system.scale_up_bytes_per_s or chip.scale_up_bytes_per_s
    pair_share = system.scale_up_pair_share or chip.scale_up_pair_share
    network = system.scale_out_bytes_per_s
    return _SystemFacts(
        memory_bytes=min(share, chip.memory_bytes),
        num_chips=system.num_chips,
        pair_bytes_per_s=links * pair_share / 2,
        scale_out_bytes_per_s=None if network is None else network / system.num_chips,
    )


def _build_links(config: FleetConfig) -> tuple[Link, ...]:
    seen: set[frozenset[str]] = set()
    for link in config.links:
        if frozenset(link.between) in seen:
            between = " and ".join(link.between)
            raise FleetError(f"the link between {between} is given twice", where="fleet.links", fix="keep one")
        seen.add(frozenset(link.between))
    return tuple(
        Link(
            between=link.between,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
            source="given",
        )
        for link in config.links
    )


def _has_own_memory(island: Island) -> bool:
    """Return whether the chip's row alone gives the island's memory."""
    return island.system is None and island.memory_bytes == island.chip.memory_bytes // island.ranks_per_chip


_TORCH_NEURON_GENERATIONS = frozenset({"trn2", "trn3"})


def _auto_backend(chip: Chip) -> str:
    return "cpu" if chip.ray_resource == "CPU" else "emulated"


def _bandwidth(default: LinkDefault) -> float:
    if default.bandwidth_bytes_per_s is None:
        fix = "give link_defaults its gb_per_s in the catalog file"
        raise FleetError("the catalog has no default bandwidth between islands", fix=fix)
    return default.bandwidth_bytes_per_s


def _default_link(one: Island, other: Island, bandwidth: float, default: LinkDefault, basis: str) -> Link:
    return Link(
        between=(one.name, other.name),
        bandwidth_bytes_per_s=bandwidth,
        latency_s=default.latency_s,
        source="default",
        basis=basis,
    )
