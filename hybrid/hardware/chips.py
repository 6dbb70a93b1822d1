"""Chips, systems and prices: one row of the catalog each, as frozen facts with source, date and confidence.

Pure: no file, no network. `catalog.py` reads the rows. May import only `errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid.errors import UnsupportedFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One kind of accelerator; every number that planning needs is known."""

    name: str
    vendor: str
    family: str
    generation: str
    memory_bytes: int
    hbm_bytes_per_s: float
    flops_of_format: Mapping[str, float] = field(hash=False)
    """Dense peak by format of the multiply, in FLOP/s; what is missing, the chip lacks."""
    fp8_max: float | None = None
    """Largest finite FP8 value (e4m3): 240 in the IEEE-like form, 448 in OCP's; None without FP8."""
    scale_up_bytes_per_s: float
    """All links of the chip, both directions added, as vendors print it; see `pair_bytes_per_s`."""
    scale_up_pair_share: float = 1.0
    """Share of `scale_up_bytes_per_s` between two chips: 1 through a switch, a quarter in a 2-D torus."""
    power_w: float | None = None
    cores: int | None = None
    """Physical cores a chip, where the vendor counts them."""
    ray_resource: str
    """The Ray resource that counts this chip: `neuron_cores`, `GPU` or `CPU`."""
    ray_units_per_chip: int = 1
    """Units of `ray_resource` in a whole chip."""
    ray_accelerator_types: tuple[str, ...] = ()
    """What Ray calls the chip in `accelerator_type:…` and in the label `ray.io/accelerator-type`."""
    announced: bool = False
    source: str
    date: str
    confidence: str
    confidence_of: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Columns whose confidence differs from the row's."""
    title: str = ""
    aliases: tuple[str, ...] = ()
    notes: str = ""

    @property
    def pair_bytes_per_s(self) -> float:
        """What one chip can send to a neighbour of its island, one direction."""
        return self.scale_up_bytes_per_s * self.scale_up_pair_share / 2

    def peak_flops(self, precision: str) -> float:
        """Return the dense peak of one chip in FLOP/s.

        No format stands in for another: fp32 is the vendor's FP32 figure, never TF32's (parity across
        vendors switches TF32 off), and fp16 is not taken for bf16.

        Raises:
            UnsupportedFormat: the catalog has no such peak for the chip.
        """
        if precision not in self.flops_of_format:
            raise UnsupportedFormat(
                f"the catalog has no {precision} peak for the chip {self.name}",
                value=precision,
                valid=self.flops_of_format,
                fix="take a precision that every chip of the fleet has, or leave the chip out",
            )
        return self.flops_of_format[precision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A chip that is announced and of which something that planning needs has not been told."""

    name: str
    title: str
    missing: tuple[str, ...]
    """Columns that the row would need."""
    told: Mapping[str, object] = field(hash=False)
    """The row's columns as they stand in the file, units in their names."""
    source: str
    date: str
    confidence: str
    aliases: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one system costs for an hour."""

    system: str
    kind: str
    """`on_demand` or `capacity_block`."""
    usd_per_hour: float
    source: str
    date: str
    confidence: str
    notes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Chips that are sold together and share a scale-up fabric."""

    name: str
    chip: str
    num_chips: int
    memory_bytes: int | None = None
    """Of all chips; None where the vendor gives none beside the chip's."""
    scale_out_bytes_per_s: float | None = None
    """Network of the whole system, one direction."""
    scale_up_bytes_per_s: float | None = None
    """Of one chip in this system, where it differs from the chip's row."""
    scale_up_pair_share: float | None = None
    instance_type: str | None = None
    """Cloud instance that the system is made of, where it is more than one."""
    num_instances: int = 1
    total_hbm_bytes_per_s: float | None = None
    total_scale_up_bytes_per_s: float | None = None
    total_flops_of_format: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The vendor's own totals; kept to check the chips' rows against."""
    power_w: float | None = None
    prices: tuple[Price, ...] = ()
    source: str
    date: str
    confidence: str
    confidence_of: Mapping[str, str] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()
    notes: str = ""

    @property
    def usd_per_hour(self) -> float | None:
        """On-demand price of the system; None where the catalog has none."""
        return self._price("on_demand")

    @property
    def usd_per_hour_block(self) -> float | None:
        """Price of a capacity block; None where the catalog has none."""
        return self._price("capacity_block")

    def _price(self, kind: str) -> float | None:
        return next((price.usd_per_hour for price in self.prices if price.kind == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDefault:
    """What a link is taken to be where nothing else is known."""

    bandwidth_bytes_per_s: float | None
    """None: the chip's scale-up says."""
    latency_s: float
    source: str
    date: str
    confidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDefaults:
    """The assumed links; see docs/catalog.md."""

    inside_island: LinkDefault
    between_islands: LinkDefault
    between_sites: LinkDefault
