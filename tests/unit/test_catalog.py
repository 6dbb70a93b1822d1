"""The catalog: every published number is there, every row can be traced, and a wrong file is refused in words."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import yaml

from hybrid.errors import FleetError, UnsupportedFormat
from hybrid.hardware.catalog import Announcement, Catalog, Chip, LinkDefault, System, load_catalog
from hybrid.hardware.catalog_file import COLUMNS_OF_SECTION

GIB, GB = 2**30, 10**9

# name: (memory bytes, TB/s, {format: TFLOP/s}, scale-up GB/s, watts), as published
PUBLISHED_CHIPS: dict[str, tuple[int, float, dict[str, float], float, float | None]] = {
    "trn1": (32 * GIB, 0.82, {"bf16": 190, "fp32": 47.5, "fp8": 190}, 384, None),
    "inf2": (32 * GIB, 0.82, {"bf16": 190, "fp8": 190}, 192, None),
    "trn2": (96 * GIB, 2.9, {"bf16": 667, "fp32": 181, "fp8": 1299}, 1280, 500),
    "trn3": (144 * GIB, 4.9, {"bf16": 671, "fp32": 183, "fp8": 2517, "fp4": 2517}, 704, None),
    "h100": (80 * GB, 3.35, {"bf16": 989, "fp8": 1979, "fp32": 67}, 900, 700),
    "h200": (141 * GB, 4.8, {"bf16": 989, "fp8": 1979}, 900, 700),
    "b200": (180 * GB, 8, {"bf16": 2250, "fp8": 4500, "fp4": 9000}, 1800, 1000),
    "gb200": (186 * GB, 8, {"bf16": 2500, "fp8": 5000, "fp4": 10000}, 1800, 1200),
    "gb300": (288 * GB, 8, {"bf16": 2250, "fp8": 4500, "fp4": 14000}, 1800, 1400),
}
# name: (chip, chips, memory bytes or None, network Gb/s or None)
PUBLISHED_SYSTEMS = {
    "trn1.32xlarge": ("trn1", 16, 512 * GIB, 800),
    "trn1n.32xlarge": ("trn1", 16, 512 * GIB, 1600),
    "trn2.48xlarge": ("trn2", 16, 1536 * GIB, 3200),
    "trn2-ultraserver": ("trn2", 64, 6144 * GIB, 12800),
    "trn3-ultraserver-gen1": ("trn3", 64, 9216 * GIB, 12800),
    "trn3-ultraserver-gen2": ("trn3", 144, 20736 * GIB, 28800),
    "p5.48xlarge": ("h100", 8, 640 * GB, 3200),
    "p5e.48xlarge": ("h200", 8, 1128 * GB, 3200),
    "p5en.48xlarge": ("h200", 8, 1128 * GB, 3200),
    "p6-b200.48xlarge": ("b200", 8, 1440 * GB, 3200),
    "gb200-nvl72": ("gb200", 72, 13400 * GB, 28800),
    "gb300-nvl72": ("gb300", 72, 20000 * GB, None),
    "vr-nvl144": ("rubin", 72, 20700 * GB, None),
}
PUBLISHED_PRICES = {
    "trn1.32xlarge": (21.50, 9.53),
    "trn2.48xlarge": (85.96, 35.76),
    "p5.48xlarge": (55.04, 39.33),
    "p5e.48xlarge": (107.0, 43.26),
    "p5en.48xlarge": (63.30, 63.16),
    "p6-b200.48xlarge": (113.93, None),
}
CONFIDENCES = {"vendor", "secondary", "weak", "announced", "assumed"}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def a_chip(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "vendor": "acme",
        "family": "anvil",
        "generation": "anvil1",
        "memory_gb": 64,
        "hbm_tb_per_s": 1.5,
        "tflops": {"fp32": 10, "bf16": 100},
        "scale_up_gb_per_s": 200,
        "ray_resource": "GPU",
        "source": "Acme data sheet",
        "date": "2026-11-21",
        "confidence": "vendor",
    }
    row |= changes
    return {key: value for key, value in row.items() if value is not ...}


@pytest.mark.parametrize("name", PUBLISHED_CHIPS)
def test_a_chip_has_its_published_numbers_in_exact_bytes(catalog: Catalog, name: str) -> None:
    memory_bytes, terabytes, tflops, scale_up, power_w = PUBLISHED_CHIPS[name]
    chip = catalog.chip(name)
    assert chip.memory_bytes == memory_bytes
    assert chip.hbm_bytes_per_s == terabytes * 1e12
    assert {f: chip.peak_flops(f) for f in tflops} == {f: peak * 1e12 for f, peak in tflops.items()}
    assert chip.scale_up_bytes_per_s == scale_up * 1e9
    assert chip.power_w == power_w


@pytest.mark.parametrize("name", PUBLISHED_SYSTEMS)
def test_a_system_has_its_published_numbers(catalog: Catalog, name: str) -> None:
    chip, num_chips, memory_bytes, gbit = PUBLISHED_SYSTEMS[name]
    system = catalog.system(name)
    assert (system.chip, system.num_chips, system.memory_bytes) == (chip, num_chips, memory_bytes)
    assert system.scale_out_bytes_per_s == (None if gbit is None else gbit * 1e9 / 8)


@pytest.mark.parametrize("name", PUBLISHED_PRICES)
def test_a_system_has_its_published_prices(catalog: Catalog, name: str) -> None:
    system = catalog.system(name)
    assert (system.usd_per_hour, system.usd_per_hour_block) == PUBLISHED_PRICES[name]
    assert all(price.source and price.date and price.confidence in CONFIDENCES for price in system.prices)


def test_weak_prices_and_numbers_are_marked_weak(catalog: Catalog) -> None:
    on_demand = {name: catalog.system(name).prices[0].confidence for name in PUBLISHED_PRICES}
    assert on_demand["trn2.48xlarge"] == on_demand["p5e.48xlarge"] == "weak"
    assert on_demand["trn1.32xlarge"] == "vendor"
    assert catalog.chip("trn2").confidence_of["power_w"] == "weak"
    assert catalog.chip("gb300").confidence_of["power_w"] == "weak"


def test_every_row_says_where_when_and_how_sure(catalog: Catalog) -> None:
    rows: list[Chip | System | Announcement | LinkDefault] = [*catalog.chips.values()]
    rows += [*catalog.systems.values(), *catalog.announcements.values()]
    rows += [catalog.link_defaults.inside_island, catalog.link_defaults.between_islands]
    assert len(rows) > 40
    for row in rows:
        assert row.source
        assert row.date[:3] == "202"
        assert row.confidence in CONFIDENCES


def test_every_chip_that_can_be_planned_with_has_an_fp32_peak(catalog: Catalog) -> None:
    assert [chip.name for chip in catalog.chips.values() if "fp32" not in chip.flops_of_format] == []


def test_the_vendors_totals_agree_with_chips_times_chip(catalog: Catalog) -> None:
    checked = 0
    for system in catalog.systems.values():
        if system.chip in catalog.announcements:
            continue
        chip = catalog.chip(system.chip)
        for precision, total in system.total_flops_of_format.items():
            assert math.isclose(total, chip.peak_flops(precision) * system.num_chips, rel_tol=0.1), system.name
            checked += 1
        if system.total_hbm_bytes_per_s is not None:
            expected = chip.hbm_bytes_per_s * system.num_chips
            assert math.isclose(system.total_hbm_bytes_per_s, expected, rel_tol=0.01), system.name
            checked += 1
        if system.memory_bytes is not None:
            assert math.isclose(system.memory_bytes, chip.memory_bytes * system.num_chips, rel_tol=0.05), system.name
            checked += 1
    assert checked > 20


def test_neuron_chips_clip_fp8_at_240_and_ocp_chips_at_448(catalog: Catalog) -> None:
    assert {name: catalog.chip(name).fp8_max for name in ("trn1", "trn2", "trn3", "h100", "b200", "a100-40")} == {
        "trn1": 240,
        "trn2": 240,
        "trn3": 448,
        "h100": 448,
        "b200": 448,
        "a100-40": None,
    }


def test_a_whole_neuron_chip_is_its_logical_cores_and_a_gpu_is_one(catalog: Catalog) -> None:
    chips = {name: catalog.chip(name) for name in ("trn1", "trn2", "h100", "cpu")}
    assert {name: (chip.ray_resource, chip.ray_units_per_chip) for name, chip in chips.items()} == {
        "trn1": ("neuron_cores", 2),
        "trn2": ("neuron_cores", 4),
        "h100": ("GPU", 1),
        "cpu": ("CPU", 1),
    }


def test_the_host_cpu_is_marked_as_assumed(catalog: Catalog) -> None:
    cpu = catalog.chip("cpu")
    assert cpu.confidence == "assumed"
    assert cpu.memory_bytes == 8 * GIB
    assert cpu.peak_flops("fp32") == 50e9
    assert set(cpu.flops_of_format) == {"fp64", "fp32", "bf16"}


@pytest.mark.parametrize("name", ["TRN2", " trn2 ", "trainium2", "Trainium2"])
def test_a_chip_is_found_by_alias_and_in_any_case(catalog: Catalog, name: str) -> None:
    assert catalog.chip(name).name == "trn2"


def test_a_device_is_a_chip_or_a_system(catalog: Catalog) -> None:
    assert isinstance(catalog.device("h100"), Chip)
    assert isinstance(catalog.device("p5.48xlarge"), System)


@pytest.mark.parametrize(
    ("wrong", "closest"), [("h1000", "h100"), ("p5.48xlage", "p5.48xlarge"), ("trn22", "trn2"), ("a100", "a100-")]
)
def test_an_unknown_name_is_refused_with_the_closest_first(catalog: Catalog, wrong: str, closest: str) -> None:
    with pytest.raises(FleetError) as refused:
        catalog.device(wrong)
    assert refused.value.value == wrong
    assert refused.value.valid is not None
    assert refused.value.valid.startswith(closest)
    assert "gb300-nvl72" in refused.value.valid


def test_chip_and_system_refuse_names_of_the_other_kind(catalog: Catalog) -> None:
    with pytest.raises(FleetError, match="no such chip"):
        catalog.chip("p5.48xlarge")
    with pytest.raises(FleetError, match="no such system"):
        catalog.system("h100")


@pytest.mark.parametrize(("name", "column"), [("trn4", "scale_up_gb_per_s"), ("rubin", "hbm_tb_per_s")])
def test_an_announced_chip_that_lacks_a_number_is_refused_naming_it(catalog: Catalog, name: str, column: str) -> None:
    with pytest.raises(FleetError, match=f"announced.*{column}"):
        catalog.chip(name)
    assert name in catalog.announcements


def test_a_users_file_can_complete_an_announced_chip(tmp_path: Path) -> None:
    told = {"scale_up_gb_per_s": 3600, "source": "our guess", "date": "2026-11", "confidence": "assumed"}
    catalog = load_catalog(write(tmp_path / "my.yaml", {"chips": {"trn4": told}}))
    chip = catalog.chip("trn4")
    assert chip.announced
    assert chip.memory_bytes == 288 * GIB
    assert chip.scale_up_bytes_per_s == 3600e9
    with pytest.raises(UnsupportedFormat, match="no bf16 peak for the chip trn4"):
        chip.peak_flops("bf16")


@pytest.mark.parametrize(
    ("name", "precision"), [("trn2", "fp64"), ("v100-16", "bf16"), ("h100", "fp4"), ("cpu", "fp8")]
)
def test_a_format_that_a_chip_lacks_is_refused_with_those_it_has(catalog: Catalog, name: str, precision: str) -> None:
    chip = catalog.chip(name)
    with pytest.raises(UnsupportedFormat) as refused:
        chip.peak_flops(precision)
    message = str(refused.value)
    assert name in message
    assert precision in message
    assert all(known in message for known in chip.flops_of_format)


def test_tf32_never_stands_in_for_fp32(tmp_path: Path) -> None:
    row = a_chip(tflops={"tf32": 50, "bf16": 100})
    catalog = load_catalog(write(tmp_path / "my.yaml", {"chips": {"anvil": row}}))
    with pytest.raises(UnsupportedFormat, match="no fp32 peak"):
        catalog.chip("anvil").peak_flops("fp32")


def test_a_pair_of_neighbours_has_its_share_one_way(catalog: Catalog) -> None:
    assert catalog.chip("h100").pair_bytes_per_s == 450e9
    assert catalog.chip("trn2").pair_bytes_per_s == 128e9


def test_facts_pickle_copy_hash_and_compare(catalog: Catalog) -> None:
    chip, system = catalog.chip("trn2"), catalog.system("trn2.48xlarge")
    assert pickle.loads(pickle.dumps((chip, system))) == (chip, system)
    assert copy.deepcopy(chip) == chip
    assert len({chip, catalog.chip("trn2"), catalog.chip("h100")}) == 2
    with pytest.raises(AttributeError):
        chip.memory_bytes = 1  # type: ignore[misc]


def test_a_users_file_adds_chips_systems_and_prices(tmp_path: Path) -> None:
    provenance = {"source": "Acme price list", "date": "2026-11", "confidence": "vendor"}
    own = {
        "chips": {"anvil": a_chip(aliases=["hammer"], ray_accelerator_types=["Anvil"])},
        "systems": {"acme.8": {"chip": "anvil", "num_chips": 8, "scale_out_gbit_per_s": 400, **provenance}},
        "prices": {"acme.8": {"on_demand": {"usd_per_hour": 12.5, **provenance}}},
    }
    path = write(tmp_path / "my.yaml", own)
    catalog = load_catalog(path)
    assert catalog.chip("hammer").memory_bytes == 64 * GB
    assert catalog.system("acme.8").usd_per_hour == 12.5
    assert catalog.system("acme.8").usd_per_hour_block is None
    assert catalog.chip("h100") == load_catalog().chip("h100")
    assert catalog.override == path


def test_a_users_column_is_laid_over_the_shipped_row_and_the_rest_keeps_its_confidence(tmp_path: Path) -> None:
    own = {"power_w": 450, "memory_gb": 100, "tflops": {"bf16": 600}}
    own |= {"source": "our meter", "date": "2026-12-01", "confidence": "assumed"}
    chip = load_catalog(write(tmp_path / "my.yaml", {"chips": {"trn2": own}})).chip("trn2")
    shipped = load_catalog().chip("trn2")
    assert (chip.power_w, chip.memory_bytes) == (450, 100 * GB)
    assert chip.flops_of_format == {**shipped.flops_of_format, "bf16": 600e12}
    assert chip.hbm_bytes_per_s == shipped.hbm_bytes_per_s
    assert chip.confidence == "assumed"
    assert "power_w" not in chip.confidence_of
    assert chip.confidence_of["hbm_tb_per_s"] == "vendor"
    assert chip.confidence_of["tflops.fp8"] == "vendor"
    assert "tflops.bf16" not in chip.confidence_of
    assert chip.source.startswith("our meter; other columns: AWS Neuron documentation")


def test_a_users_price_replaces_one_kind_and_leaves_the_other(tmp_path: Path) -> None:
    price = {"usd_per_hour": 40.0, "source": "our contract", "date": "2026-11", "confidence": "vendor"}
    path = write(tmp_path / "my.yaml", {"prices": {"p5.48xlarge": {"on_demand": price}}})
    system = load_catalog(path).system("p5.48xlarge")
    assert (system.usd_per_hour, system.usd_per_hour_block) == (40.0, 39.33)


def chips(**changes: object) -> dict[str, object]:
    return {"chips": {"anvil": a_chip(**changes)}}


SYSTEM = {"chip": "h100", "num_chips": 2, "source": "x", "date": "2026-11", "confidence": "weak"}
PRICE = {"usd_per_hour": 1.0, "source": "x", "date": "2026-11", "confidence": "weak"}
WRONG_FILES: dict[str, tuple[object, tuple[str, ...]]] = {
    "no YAML": ("chips: {a: [", ("my.yaml, line", "not YAML")),
    "a list": (["h100"], ("my.yaml", "no mapping")),
    "an empty file": ("", ("my.yaml", "no mapping")),
    "an unknown section": ({"chip": {}}, ("unknown section", "'chip'", "chips, systems, prices")),
    "an unknown column": (chips(memory_gig=1), ("chips.anvil", "unknown column", "'memory_gig'", "memory_gib")),
    "a row that is no mapping": ({"chips": {"anvil": 3}}, ("chips.anvil", "no mapping")),
    "a row given twice": ("chips:\n  a: {}\n  a: {}\n", ("line 3", "a is given twice")),
    "no source": (chips(source=...), ("chips.anvil", "no source")),
    "an empty source": (chips(source=" "), ("chips.anvil.source", "not text")),
    "no date": (chips(date=...), ("chips.anvil", "no date")),
    "no confidence": (chips(confidence=...), ("chips.anvil", "no confidence")),
    "a date that is none": (chips(date="last year"), ("chips.anvil.date", "'last year'", "2026-11")),
    "a month that is none": (chips(date="2026-13"), ("chips.anvil.date", "'2026-13'")),
    "an unknown confidence": (chips(confidence="sure"), ("chips.anvil.confidence", "'sure'", "vendor, secondary")),
    "a confidence of no column": (chips(confidence_of={"power_w": "weak"}), ("anvil.confidence_of", "'power_w'")),
    "a negative number": (chips(hbm_tb_per_s=-1), ("chips.anvil.hbm_tb_per_s", "-1", "more than 0")),
    "a zero": (chips(scale_up_gb_per_s=0), ("chips.anvil.scale_up_gb_per_s", "more than 0")),
    "an infinite number": (chips(power_w=math.inf), ("chips.anvil.power_w", "inf")),
    "a number as text": (chips(power_w="1e3"), ("chips.anvil.power_w", "not a number", "'1e3'")),
    "a truth for a number": (chips(power_w=True), ("chips.anvil.power_w", "not a number", "True")),
    "an unknown format": (chips(tflops={"fp32": 1, "posit8": 2}), ("anvil.tflops", "'posit8'", "fp64, fp32")),
    "a negative peak": (chips(tflops={"fp32": -1}), ("anvil.tflops.fp32", "-1")),
    "a peak that is no mapping": (chips(tflops=3), ("anvil.tflops", "3")),
    "memory given twice": (chips(memory_gib=60), ("chips.anvil", "both in GiB and in GB")),
    "no memory": (chips(memory_gb=...), ("chips.anvil", "lacks what planning needs", "memory_gib")),
    "no bandwidth": (chips(hbm_tb_per_s=...), ("chips.anvil", "lacks", "hbm_tb_per_s")),
    "no vendor": (chips(vendor=...), ("chips.anvil", "no vendor")),
    "an unknown Ray resource": (chips(ray_resource="TPU"), ("anvil.ray_resource", "'TPU'", "neuron_cores, GPU, CPU")),
    "half a core a chip": (chips(ray_units_per_chip=0.5), ("anvil.ray_units_per_chip", "0.5")),
    "aliases that are no list": (chips(aliases="hammer"), ("anvil.aliases", "'hammer'")),
    "an alias of another chip": (chips(aliases=["h100"]), ("chips.anvil", "two rows", "'h100'")),
    "announced that is no truth": (chips(announced="yes"), ("anvil.announced", "'yes'", "true, false")),
    "an unusable name": ({"chips": {"An Vil": a_chip()}}, ("not usable", "'An Vil'", "lower-case")),
    "a system of an unknown chip": (
        {"systems": {"acme.8": {**SYSTEM, "chip": "anvil"}}},
        ("systems.acme.8.chip", "'anvil'", "trn2"),
    ),
    "a system without chips": ({"systems": {"acme.8": {**SYSTEM, "num_chips": 0}}}, ("acme.8.num_chips", "0")),
    "a price of an unknown system": ({"prices": {"acme.8": {"on_demand": PRICE}}}, ("prices.acme.8", "'acme.8'")),
    "an unknown kind of price": ({"prices": {"p5.48xlarge": {"spot": PRICE}}}, ("'spot'", "on_demand")),
    "a negative price": (
        {"prices": {"p5.48xlarge": {"on_demand": {**PRICE, "usd_per_hour": -3}}}},
        ("prices.p5.48xlarge.on_demand.usd_per_hour", "-3"),
    ),
    "an unknown link default": (
        {
            "link_defaults": {
                "between_worlds": {"latency_us": 1, "source": "x", "date": "2026-11", "confidence": "weak"}
            }
        },
        ("link_defaults.between_worlds", "between_sites"),
    ),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_catalog_file_is_refused_naming_file_row_key_and_value(tmp_path: Path, what: str) -> None:
    content, expected = WRONG_FILES[what]
    path = write(tmp_path / "my.yaml", content)
    with pytest.raises(FleetError) as refused:
        load_catalog(path)
    message = str(refused.value)
    assert str(path) in message
    assert [part for part in expected if part not in message] == []
    assert refused.value.fix


def test_a_missing_catalog_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"nowhere\.yaml"):
        load_catalog(tmp_path / "nowhere.yaml")


def test_the_tables_of_the_catalogs_page_are_those_of_the_file() -> None:
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("catalog_docs", root / "scripts" / "catalog_docs.py")
    assert spec is not None
    assert spec.loader is not None
    catalog_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(catalog_docs)
    page = (root / "docs" / "catalog.md").read_text(encoding="utf-8")
    assert catalog_docs.rewritten(page, load_catalog()) == page, "run scripts/catalog_docs.py"


def test_the_catalogs_page_names_every_column_of_the_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "catalog.md").read_text(encoding="utf-8")
    columns = {column for section in COLUMNS_OF_SECTION.values() for column in section}
    assert sorted(column for column in columns if f"`{column}`" not in page) == []


def test_the_example_file_of_the_catalogs_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "catalog.md").read_text(encoding="utf-8")
    example = page.split("# my.yaml\n")[1].split("```")[0]
    catalog = load_catalog(write(tmp_path / "my.yaml", example))
    assert catalog.chip("h100").power_w == 650
    assert catalog.chip("anvil").peak_flops("bf16") == 100e12
    assert catalog.system("p5.48xlarge").usd_per_hour == 40
