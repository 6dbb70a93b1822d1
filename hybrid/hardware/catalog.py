"""The catalog: every chip, system and price by name, read from the shipped data file and a user's own.

The numbers live in `catalog.yaml`, which a user may lay a file of their own over; none stands in code.
Pure but for reading those two files. May import only `errors`, and `catalog_file` and `chips` of this folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TypeVar

from hybrid.errors import FleetError
from hybrid.hardware.catalog_file import Row, Rows, lay_over, read_catalog_file
from hybrid.hardware.chips import Announcement, Chip, LinkDefault, LinkDefaults, Price, System

__all__ = ["Announcement", "Catalog", "Chip", "LinkDefault", "LinkDefaults", "Price", "System", "load_catalog"]

_SHIPPED = "catalog.yaml"
_NEEDED = ("hbm_tb_per_s", "tflops", "scale_up_gb_per_s")
_RAY_RESOURCES = ("neuron_cores", "GPU", "CPU")
_Named = TypeVar("_Named", bound=Chip | System | Announcement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All rows, by name."""

    chips: Mapping[str, Chip] = field(hash=False)
    systems: Mapping[str, System] = field(hash=False)
    announcements: Mapping[str, Announcement] = field(default_factory=dict, hash=False)
    link_defaults: LinkDefaults
    override: Path | None = None
    """The user's file that lies over the shipped one."""

    def device(self, name: str) -> Chip | System:
        """Return the chip or system of that name or alias.

        Raises:
            FleetError: no such row; the valid names follow, the closest first. Or the chip is announced
                and its row lacks a number.
        """
        rows: tuple[Chip | System, ...] = (*self.chips.values(), *self.systems.values())
        found = _found(name, rows)
        if found is None:
            raise self._unknown("chip or system", name, (*self.chips, *self.systems))
        return found

    def chip(self, name: str) -> Chip:
        """Return the chip of that name or alias; see `device`."""
        found = _found(name, self.chips.values())
        if found is None:
            raise self._unknown("chip", name, self.chips)
        return found

    def system(self, name: str) -> System:
        """Return the system of that name or alias; see `device`."""
        found = _found(name, self.systems.values())
        if found is None:
            raise self._unknown("system", name, self.systems)
        return found

    def _unknown(self, what: str, name: str, valid: Iterable[str]) -> FleetError:
        announcement = _found(name, self.announcements.values())
        if announcement is not None:
            return _announced_only(announcement)
        wanted, names = _folded(name), sorted(valid)
        close = [known for known in names if wanted and known.startswith(wanted)]
        close += [known for known in get_close_matches(wanted, names, n=3, cutoff=0.4) if known not in close]
        ordered = [*close, *(other for other in names if other not in close)]
        return FleetError(
            f"the catalog has no such {what}",
            value=name,
            valid=ordered,
            fix="take one of these, or add a row in a file of your own (fleet.catalog, docs/catalog.md)",
        )


def load_catalog(override: Path | None = None) -> Catalog:
    """Return the shipped catalog, with the rows of a user's file laid over it.

    Raises:
        FleetError: the file is missing or no YAML; a row has an unknown key, a number that is none or not
            positive, no source, date or confidence, or names a chip or system that has no row. Names
            file, row, key and the valid ones.
    """
    shipped = _shipped_rows()
    if override is None:
        return _shipped_catalog()
    try:
        text = override.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "give the path of a YAML file (fleet.catalog)"
        raise FleetError(f"catalog file cannot be read: {error}", value=str(override), fix=fix) from None
    return _build_catalog(lay_over(shipped, read_catalog_file(text, file=str(override))), override)


@cache
def _shipped_rows() -> Rows:
    text = resources.files(__package__).joinpath(_SHIPPED).read_text(encoding="utf-8")
    return read_catalog_file(text, file=_SHIPPED)


@cache
def _shipped_catalog() -> Catalog:
    return _build_catalog(_shipped_rows(), None)


def _build_catalog(rows: Rows, override: Path | None) -> Catalog:
    built = {name: _build_chip(row) for name, row in rows["chips"].items()}
    chips = {name: row for name, row in built.items() if isinstance(row, Chip)}
    announcements = {name: row for name, row in built.items() if isinstance(row, Announcement)}
    prices = [_build_price(row, rows["systems"]) for row in rows["prices"].values()]
    systems = {name: _build_system(row, built, prices) for name, row in rows["systems"].items()}
    _check_names((*built.values(), *systems.values()), rows)
    defaults = {name: _build_link_default(rows["link_defaults"][name]) for name in _link_names(rows)}
    return Catalog(
        chips=chips,
        systems=systems,
        announcements=announcements,
        link_defaults=LinkDefaults(**defaults),
        override=override,
    )


def _build_chip(row: Row) -> Chip | Announcement:
    announced = row.flag("announced")
    memory_bytes = row.optional_memory_bytes()
    missing = tuple(key for key in _NEEDED if row.columns.get(key) is None)
    missing = missing if memory_bytes is not None else ("memory_gib", *missing)
    if announced and missing:
        return Announcement(
            name=row.name,
            title=row.text("title", row.name),
            missing=missing,
            told=dict(row.columns),
            aliases=row.texts("aliases"),
            **_provenance(row),
        )
    if memory_bytes is None or missing:
        fix = "give the row these columns, or mark it `announced: true`"
        raise FleetError("row lacks what planning needs", value=", ".join(missing), where=row.where, fix=fix)
    resource = row.text("ray_resource")
    if resource not in _RAY_RESOURCES:
        raise row.refusal("ray_resource", "is none that a chip can have", resource, valid=_RAY_RESOURCES)
    share = row.optional_number("scale_up_pair_share")
    return Chip(
        name=row.name,
        title=row.text("title", row.name),
        aliases=row.texts("aliases"),
        vendor=row.text("vendor"),
        family=row.text("family"),
        generation=row.text("generation"),
        memory_bytes=memory_bytes,
        hbm_bytes_per_s=row.number("hbm_tb_per_s", 1e12),
        flops_of_format=row.formats("tflops", 1e12),
        fp8_max=row.optional_number("fp8_max"),
        scale_up_bytes_per_s=row.number("scale_up_gb_per_s", 1e9),
        scale_up_pair_share=1.0 if share is None else share,
        power_w=row.optional_number("power_w"),
        cores=row.count("cores") if row.columns.get("cores") is not None else None,
        ray_resource=resource,
        ray_units_per_chip=row.count("ray_units_per_chip", 1),
        ray_accelerator_types=row.texts("ray_accelerator_types"),
        announced=announced,
        confidence_of=row.confidence_of(),
        **_provenance(row),
    )


def _build_system(row: Row, chips: Mapping[str, Chip | Announcement], prices: Iterable[Price]) -> System:
    chip = row.text("chip")
    if chip not in chips:
        raise row.refusal("chip", "has no row among the chips", chip, valid=chips)
    return System(
        name=row.name,
        chip=chip,
        aliases=row.texts("aliases"),
        num_chips=row.count("num_chips"),
        memory_bytes=row.optional_memory_bytes(),
        scale_out_bytes_per_s=row.optional_number("scale_out_gbit_per_s", 1e9 / 8),
        scale_up_bytes_per_s=row.optional_number("scale_up_gb_per_s", 1e9),
        scale_up_pair_share=row.optional_number("scale_up_pair_share"),
        instance_type=row.text("instance_type") if "instance_type" in row.columns else None,
        num_instances=row.count("num_instances", 1),
        total_hbm_bytes_per_s=row.optional_number("total_hbm_tb_per_s", 1e12),
        total_scale_up_bytes_per_s=row.optional_number("total_scale_up_tb_per_s", 1e12),
        total_flops_of_format=row.formats("total_pflops", 1e15),
        power_w=row.optional_number("power_w"),
        prices=tuple(price for price in prices if price.system == row.name),
        confidence_of=row.confidence_of(),
        **_provenance(row),
    )


def _build_price(row: Row, systems: Mapping[str, Row]) -> Price:
    system, kind = row.name.split("/")
    if system not in systems:
        fix = "give the system a row of its own first"
        raise FleetError("price of an unknown system", value=system, valid=systems, where=row.where, fix=fix)
    return Price(system=system, kind=kind, usd_per_hour=row.number("usd_per_hour"), **_provenance(row))


def _build_link_default(row: Row) -> LinkDefault:
    facts = _provenance(row)
    return LinkDefault(
        bandwidth_bytes_per_s=row.optional_number("gb_per_s", 1e9),
        latency_s=row.number("latency_us") / 1e6,
        source=facts["source"],
        date=facts["date"],
        confidence=facts["confidence"],
    )


def _link_names(rows: Rows) -> tuple[str, ...]:
    names = tuple(LinkDefaults.__dataclass_fields__)
    for name, row in rows["link_defaults"].items():
        if name not in names:
            fix = "rename or remove it"
            raise FleetError("unknown link default", value=name, valid=names, where=row.where, fix=fix)
    return names


def _provenance(row: Row) -> dict[str, str]:
    columns = ("source", "date", "confidence")
    return {key: row.text(key) for key in columns} | {"notes": row.text("notes", "none").removeprefix("none")}


def _check_names(rows: Iterable[Chip | Announcement | System], files: Rows) -> None:
    """Check that a name or alias means one row only."""
    owner_of: dict[str, str] = {}
    for row in rows:
        for name in (row.name, *map(_folded, row.aliases)):
            if owner_of.setdefault(name, row.name) != row.name:
                section = "systems" if isinstance(row, System) else "chips"
                where = files[section][row.name].where
                raise FleetError(
                    f"name stands for two rows, {owner_of[name]} and {row.name}",
                    value=name,
                    where=where,
                    fix="rename one, or take the alias away",
                )


def _announced_only(row: Announcement) -> FleetError:
    return FleetError(
        f"the chip {row.name} is announced, and its vendor has not told all that planning needs: "
        f"{', '.join(row.missing)}",
        value=row.name,
        fix=f"give them in a file of your own (fleet.catalog, chips.{row.name}), or take another chip",
    )


def _found(name: str, rows: Iterable[_Named]) -> _Named | None:
    wanted = _folded(name)
    return next((row for row in rows if wanted == row.name or wanted in map(_folded, row.aliases)), None)


def _folded(name: str) -> str:
    return name.strip().lower()
