"""The fleet: islands and ranks from a job, links given and assumed, and back to a job again."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybrid.config import FleetConfig
from hybrid.errors import FleetError
from hybrid.hardware.catalog import load_catalog
from hybrid.hardware.fleet import Fleet, build_fleet, fleet_to_config

GIB = 2**30


def config(*islands: dict[str, Any], links: list[dict[str, Any]] | None = None, **more: Any) -> FleetConfig:
    return FleetConfig.model_validate({"islands": islands, "links": links or [], **more})


def mixed(**more: Any) -> Fleet:
    return build_fleet(
        config({"name": "a", "device": "trn2", "count": 2}, {"name": "b", "device": "h100", "count": 2}, **more)
    )


def test_chips_are_counted_island_by_island_in_order() -> None:
    fleet = mixed()
    assert fleet.num_chips == 4
    assert [(rank, island.name, index) for rank, island, index in fleet.chips()] == [
        (0, "a", 0),
        (1, "a", 1),
        (2, "b", 0),
        (3, "b", 1),
    ]


def test_the_place_of_a_rank_agrees_with_the_walk_over_all_chips() -> None:
    fleet = build_fleet(
        config(
            {"name": "a", "device": "trn2.48xlarge", "count": 2},
            {"name": "b", "device": "cpu"},
            {"name": "c", "device": "p5.48xlarge"},
        )
    )
    assert fleet.num_chips == 41
    assert [fleet.place_of_rank(rank) for rank in range(41)] == [(i, n) for _, i, n in fleet.chips()]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_the_fleet_lacks_is_refused(rank: int) -> None:
    with pytest.raises(FleetError, match="0 to 3"):
        mixed().place_of_rank(rank)


def test_a_system_counts_all_of_its_chips() -> None:
    island = build_fleet(config({"name": "a", "device": "trn2-ultraserver", "count": 3})).island("a")
    assert (island.num_chips, island.chip.name, island.system) == (192, "trn2", "trn2-ultraserver")
    assert (island.num_systems, island.chips_per_system) == (3, 64)
    assert island.memory_bytes == 96 * GIB


def test_a_chip_in_a_system_has_no_more_memory_than_the_system_gives_it() -> None:
    fleet = build_fleet(config({"name": "a", "device": "gb300-nvl72"}, {"name": "b", "device": "gb300", "count": 72}))
    assert fleet.island("a").memory_bytes == 20_000 * 10**9 // 72
    assert fleet.island("b").memory_bytes == 288 * 10**9
    # The rack's rounded 13.4 TB would make a little more than the chip has.
    rack = build_fleet(config({"name": "c", "device": "gb200-nvl72"})).island("c")
    assert rack.memory_bytes == 186 * 10**9


def test_the_backend_follows_the_chip_unless_given() -> None:
    fleet = build_fleet(
        config(
            {"name": "a", "device": "cpu"},
            {"name": "b", "device": "trn2"},
            {"name": "c", "device": "cpu", "backend": "emulated"},
        )
    )
    assert [island.backend for island in fleet.islands] == ["cpu", "emulated", "emulated"]


def test_an_accelerator_on_the_cpu_backend_is_refused() -> None:
    with pytest.raises(FleetError, match=r"fleet\.islands\.a\.backend.*cannot play.*auto, emulated"):
        build_fleet(config({"name": "a", "device": "h100", "backend": "cpu"}))


def test_speed_and_memory_of_a_specimen_override_the_catalogs() -> None:
    fleet = build_fleet(config({"name": "a", "device": "h100", "speed": 0.5, "memory_bytes": 1000}))
    assert fleet.island("a").memory_bytes == 1000
    assert fleet.island("a").peak_flops("bf16") == 989e12 / 2


def test_an_unknown_device_is_refused_naming_the_island_and_the_closest() -> None:
    with pytest.raises(FleetError, match=r"fleet\.islands\.left\.device.*'h1000'.*valid: h100") as refused:
        build_fleet(config({"name": "left", "device": "h1000"}))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("device", ["trn4", "rubin", "vr-nvl144"])
def test_an_announced_device_that_lacks_numbers_is_refused(device: str) -> None:
    with pytest.raises(FleetError, match=r"fleet\.islands\.a\.device: the chip .* is announced"):
        build_fleet(config({"name": "a", "device": device}))


def test_an_unknown_island_is_refused_with_those_there_are() -> None:
    with pytest.raises(FleetError, match="valid: a, b"):
        mixed().island("c")


def test_a_given_link_is_taken_as_it_is_in_both_directions() -> None:
    fleet = mixed(links=[{"between": ["b", "a"], "bandwidth_bytes_per_s": 7e9, "latency_s": 3e-6}])
    for link in (fleet.link("a", "b"), fleet.link("b", "a")):
        assert (link.bandwidth_bytes_per_s, link.latency_s, link.source) == (7e9, 3e-6, "given")


def test_inside_an_island_the_chips_scale_up_is_taken() -> None:
    link = mixed().link("b", "b")
    assert (link.bandwidth_bytes_per_s, link.latency_s, link.source) == (450e9, 5e-6, "default")
    assert link.basis == "scale-up of h100, assumed latency"


def test_a_system_whose_links_differ_from_its_chips_has_its_own() -> None:
    fleet = build_fleet(config({"name": "a", "device": "trn1.32xlarge"}, {"name": "b", "device": "trn1n.32xlarge"}))
    assert fleet.link("a", "a").bandwidth_bytes_per_s == 384e9 / 4 / 2
    assert fleet.link("b", "b").bandwidth_bytes_per_s == 768e9 / 4 / 2


def test_between_systems_the_smaller_network_a_chip_is_taken() -> None:
    fleet = build_fleet(config({"name": "a", "device": "trn2.48xlarge"}, {"name": "b", "device": "p5.48xlarge"}))
    link = fleet.link("a", "b")
    assert link.bandwidth_bytes_per_s == 3200e9 / 8 / 16
    assert link.basis == "scale-out of trn2.48xlarge a chip, assumed latency"
    assert (link.latency_s, link.source) == (20e-6, "default")


def test_between_bare_chips_the_assumed_link_is_taken_and_marked() -> None:
    link = mixed().link("a", "b")
    assert (link.bandwidth_bytes_per_s, link.latency_s, link.source) == (12.5e9, 20e-6, "default")
    assert link.basis.startswith("assumed")


def test_a_system_with_a_slow_network_limits_a_link_to_a_bare_chip() -> None:
    fleet = build_fleet(
        config(
            {"name": "a", "device": "p3.16xlarge"},
            {"name": "b", "device": "h100"},
            {"name": "c", "device": "p5.48xlarge"},
        )
    )
    assert fleet.link("a", "b").bandwidth_bytes_per_s == 25e9 / 8 / 8
    assert fleet.link("b", "c").bandwidth_bytes_per_s == 12.5e9


def test_between_sites_a_slow_link_is_assumed() -> None:
    fleet = build_fleet(
        config(
            {"name": "a", "device": "p5.48xlarge", "site": "east"},
            {"name": "b", "device": "p5.48xlarge", "site": "west"},
        )
    )
    link = fleet.link("a", "b")
    assert (link.bandwidth_bytes_per_s, link.latency_s) == (0.625e9, 1e-3)
    assert link.basis == "assumed: a link between the sites east and west"


def test_ranks_of_two_systems_in_one_island_talk_over_the_network() -> None:
    fleet = build_fleet(config({"name": "a", "device": "p5.48xlarge", "count": 2}))
    assert fleet.rank_link(0, 7).bandwidth_bytes_per_s == 450e9
    assert fleet.rank_link(7, 8).bandwidth_bytes_per_s == 3200e9 / 8 / 8
    assert fleet.rank_link(8, 15) == fleet.link("a", "a")


def test_a_given_link_inside_an_island_holds_across_its_systems() -> None:
    island = {"name": "a", "device": "p5.48xlarge", "count": 2}
    links = [{"between": ["a", "a"], "bandwidth_bytes_per_s": 5e9}]
    fleet = build_fleet(config(island, links=links))
    assert {fleet.rank_link(0, 7).bandwidth_bytes_per_s, fleet.rank_link(7, 8).bandwidth_bytes_per_s} == {5e9}


def test_a_link_given_twice_is_refused() -> None:
    links = [{"between": pair, "bandwidth_bytes_per_s": 1e9} for pair in (["a", "b"], ["b", "a"])]
    with pytest.raises(FleetError, match="b and a is given twice"):
        mixed(links=links)


def test_defaults_can_be_overridden_by_a_users_file(tmp_path: Path) -> None:
    row = {"gb_per_s": 3, "latency_us": 50, "source": "iperf", "date": "2026-11", "confidence": "secondary"}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"link_defaults": {"between_islands": row}}), encoding="utf-8")
    link = mixed(catalog=path).link("a", "b")
    assert (link.bandwidth_bytes_per_s, link.latency_s) == (3e9, 50e-6)
    assert link.basis.startswith("secondary")


def test_a_fleet_pickles_and_hashes() -> None:
    fleet = mixed()
    assert pickle.loads(pickle.dumps(fleet)) == fleet
    assert len({fleet, mixed()}) == 1


DEVICES = ["trn2", "h100", "cpu", "trn2.48xlarge", "gb300-nvl72", "p5.48xlarge", "a100-40"]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"device": st.sampled_from(DEVICES), "count": st.integers(1, 4)},
            optional={
                "site": st.sampled_from(["east", "west"]),
                "backend": st.sampled_from(["auto", "emulated"]),
                "memory_bytes": st.sampled_from([1, 80 * 10**9, 288 * 10**9]),
                "speed": st.floats(0.1, 10),
            },
        ),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_a_fleet_saved_as_yaml_and_read_again_is_the_same(islands: list[dict[str, Any]], data: st.DataObject) -> None:
    named = [{"name": f"i{place}", **island} for place, island in enumerate(islands)]
    names = [island["name"] for island in named]
    pairs = list(itertools.combinations_with_replacement(names, 2))
    linked = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=3))
    links = [{"between": pair, "bandwidth_bytes_per_s": 1e9, "latency_s": 1e-6} for pair in linked]
    fleet = build_fleet(config(*named, links=links))
    text = yaml.safe_dump(fleet_to_config(fleet).model_dump(mode="json"))
    assert build_fleet(FleetConfig.model_validate(yaml.safe_load(text))) == fleet


def test_the_catalog_file_of_a_fleet_survives_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    own = {"power_w": 400, "source": "meter", "date": "2026-11", "confidence": "assumed"}
    path.write_text(yaml.safe_dump({"chips": {"h100": own}}), encoding="utf-8")
    fleet = build_fleet(config({"name": "a", "device": "h100"}), load_catalog(path))
    assert fleet.island("a").chip.power_w == 400
    assert build_fleet(fleet_to_config(fleet)) == fleet
