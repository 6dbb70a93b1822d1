"""Write the tables of docs/catalog.md from the shipped catalog; `--check` only says whether they are up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybrid.hardware import Announcement, Catalog, Chip, System, load_catalog

PAGE = Path(__file__).parents[1] / "docs" / "catalog.md"
FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4")
HEADERS = {
    "chips": (
        *("name", "chip", *FORMATS, "memory", "TB/s", "scale-up GB/s", "pair share", "W", "FP8 max"),
        *("Ray", "confidence", "date", "source", "notes"),
    ),
    "announcements": ("name", "chip", "told", "missing", "confidence", "date", "source", "notes"),
    "systems": (
        *("name", "chips", "memory", "scale-out Gb/s", "instances", "on demand US$/h", "capacity block US$/h"),
        *("confidence", "date", "source", "notes"),
    ),
    "prices": ("system", "kind", "US$/h", "confidence", "date", "source", "notes"),
    "links": ("default", "GB/s", "latency µs", "confidence", "date", "source"),
}


def tables(catalog: Catalog) -> dict[str, str]:
    """Return the Markdown table of each section."""
    defaults = catalog.link_defaults
    rows: dict[str, list[tuple[str, ...]]] = {
        "chips": [chip_row(chip) for chip in catalog.chips.values()],
        "announcements": [announcement_row(row) for row in catalog.announcements.values()],
        "systems": [system_row(system) for system in catalog.systems.values()],
        "prices": [
            (price.system, price.kind, figure(price.usd_per_hour), *provenance(price))
            for system in catalog.systems.values()
            for price in system.prices
        ],
        "links": [
            (
                name,
                "the chip's scale-up"
                if link.bandwidth_bytes_per_s is None
                else figure(link.bandwidth_bytes_per_s / 1e9),
                figure(link.latency_s * 1e6),
                *(link.confidence, link.date, link.source),
            )
            for name, link in (
                ("inside_island", defaults.inside_island),
                ("between_islands", defaults.between_islands),
                ("between_sites", defaults.between_sites),
            )
        ],
    }
    return {section: table(HEADERS[section], rows[section]) for section in HEADERS}


def chip_row(chip: Chip) -> tuple[str, ...]:
    """Return a chip's cells."""
    peaks = [marked(chip, f"tflops.{f}", tera(chip.flops_of_format.get(f))) for f in FORMATS]
    names = ", ".join([f"`{chip.name}`", *(f"`{alias}`" for alias in chip.aliases)])
    return (
        *(names, chip.title, *peaks, memory(chip.memory_bytes), figure(chip.hbm_bytes_per_s / 1e12)),
        marked(chip, "scale_up_gb_per_s", figure(chip.scale_up_bytes_per_s / 1e9)),
        marked(chip, "scale_up_pair_share", figure(chip.scale_up_pair_share)),
        marked(chip, "power_w", figure(chip.power_w)),
        *(figure(chip.fp8_max), f"{chip.ray_units_per_chip} {chip.ray_resource}", *provenance(chip)),
    )


def announcement_row(row: Announcement) -> tuple[str, ...]:
    """Return an announced chip's cells."""
    columns = ("memory_gib", "memory_gb", "hbm_tb_per_s", "tflops", "scale_up_gb_per_s")
    told = "; ".join(f"`{key}: {row.told[key]}`" for key in columns if row.told.get(key) is not None)
    return (f"`{row.name}`", row.title, told, ", ".join(row.missing), *provenance(row))


def system_row(system: System) -> tuple[str, ...]:
    """Return a system's cells."""
    network = system.scale_out_bytes_per_s
    names = ", ".join([f"`{system.name}`", *(f"`{alias}`" for alias in system.aliases)])
    instances = f"{system.num_instances} {system.instance_type or ''}".strip() if system.num_instances > 1 else ""
    return (
        *(names, f"{system.num_chips} {system.chip}"),
        "" if system.memory_bytes is None else memory(system.memory_bytes),
        figure(None if network is None else network * 8 / 1e9),
        *(instances, figure(system.usd_per_hour), figure(system.usd_per_hour_block), *provenance(system)),
    )


def provenance(row: Chip | Announcement | System | object) -> tuple[str, ...]:
    """Return confidence, date, source and notes of any row."""
    return tuple(str(getattr(row, key)) for key in ("confidence", "date", "source", "notes"))


def marked(chip: Chip, column: str, cell: str) -> str:
    """Return the cell, with its own confidence where that differs from the row's."""
    differing = chip.confidence_of.get(column) or chip.confidence_of.get(column.split(".")[0])
    return f"{cell} ({differing})" if cell and differing else cell


def memory(size_bytes: int) -> str:
    """Return a size in the unit that makes it whole, GiB before GB."""
    return f"{size_bytes // 2**30:,} GiB" if size_bytes % 2**30 == 0 else f"{size_bytes / 1e9:,.0f} GB"


def tera(flops: float | None) -> str:
    """Return a peak in TFLOP/s."""
    return figure(None if flops is None else flops / 1e12)


def figure(value: float | None) -> str:
    """Return a number as people write it; nothing for None."""
    return "" if value is None else f"{value:,.6g}" if value < 1e5 else f"{value:,.0f}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewritten(page: str, catalog: Catalog) -> str:
    """Return the page with every table between `<!-- name -->` and `<!-- end name -->` made anew."""
    for section, text in tables(catalog).items():
        before, start, rest = page.partition(f"<!-- {section} -->\n")
        _, end, after = rest.partition(f"\n<!-- end {section} -->")
        if not (start and end):
            raise SystemExit(f"docs/catalog.md has no place for the table of {section}")
        page = before + start + text + end + after
    return page


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    fresh = rewritten(page, load_catalog())
    if fresh == page:
        return 0
    if arguments.check:
        print("docs/catalog.md is out of date; run scripts/catalog_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
