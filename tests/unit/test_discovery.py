"""Discovery: what a Ray cluster says of its nodes, read as a fleet or refused with the label to set."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid.config import FleetConfig
from hybrid.errors import FleetError
from hybrid.hardware import (
    Catalog,
    NodeFacts,
    build_fleet,
    emulated_resource,
    fleet_of_nodes,
    fleet_to_config,
    islands_of_nodes,
    load_catalog,
    ray_bundle,
)

INSTANCE = "node.kubernetes.io/instance-type"
TYPE = "ray.io/accelerator-type"
NEURON = {TYPE: "aws-neuron-core"}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def node(number: int = 0, resources: dict[str, float] | None = None, /, **labels: str) -> NodeFacts:
    everywhere = {"CPU": 8.0, "memory": 1e10, "object_store_memory": 1e9, f"node:10.0.0.{number}": 1.0}
    return NodeFacts(
        node_id=f"{number:02d}" + "f" * 54,
        address=f"10.0.0.{number}",
        resources=everywhere | (resources or {}),
        labels={"ray.io/node-id": "f" * 56, **labels},
    )


def found(nodes: list[NodeFacts], catalog: Catalog) -> list[tuple[str, str, int, str]]:
    """Return name, device, count and backend of every island."""
    return [(i.name, i.device, i.count, i.backend) for i in fleet_of_nodes(nodes, catalog).islands]


# what: (nodes, the islands that they are)
CASES: dict[str, tuple[list[NodeFacts], list[tuple[str, str, int, str]]]] = {
    "trn2 by hybrid.chip": (
        [node(0, {"neuron_cores": 8}, **NEURON, **{"hybrid.chip": "trn2"})],
        [("trn2", "trn2", 2, "auto")],
    ),
    "trn2 by an alias of the chip": (
        [node(0, {"neuron_cores": 4}, **{"hybrid.chip": "Trainium2"})],
        [("trn2", "trn2", 1, "auto")],
    ),
    "a whole trn2 instance": (
        [node(0, {"neuron_cores": 64}, **NEURON, **{INSTANCE: "trn2.48xlarge"})],
        [("trn2", "trn2.48xlarge", 1, "auto")],
    ),
    "a part of a trn2 instance": (
        [node(0, {"neuron_cores": 16}, **NEURON, **{INSTANCE: "trn2.48xlarge"})],
        [("trn2", "trn2", 4, "auto")],
    ),
    "trn1 by the older instance label": (
        [node(0, {"neuron_cores": 32}, **{"beta.kubernetes.io/instance-type": "trn1.32xlarge"})],
        [("trn1", "trn1.32xlarge", 1, "auto")],
    ),
    "an instance type set by hand": (
        [node(0, {"neuron_cores": 24}, **{"hybrid.instance-type": "inf2.48xlarge"})],
        [("inf2", "inf2.48xlarge", 1, "auto")],
    ),
    "h100 by Ray's resource": (
        [node(0, {"GPU": 8, "accelerator_type:H100": 1})],
        [("h100", "h100", 8, "auto")],
    ),
    "h200 by Ray's label": ([node(0, {"GPU": 2}, **{TYPE: "H200"})], [("h200", "h200", 2, "auto")]),
    "a whole p5 instance": (
        [node(0, {"GPU": 8, "accelerator_type:H100": 1}, **{INSTANCE: "p5.48xlarge", TYPE: "H100"})],
        [("h100", "p5.48xlarge", 1, "auto")],
    ),
    "an A100 told apart by its instance type": (
        [node(0, {"GPU": 8}, **{TYPE: "A100", INSTANCE: "p4d.24xlarge"})],
        [("a100-40", "p4d.24xlarge", 1, "auto")],
    ),
    "an A100 told apart by hybrid.chip": (
        [node(0, {"GPU": 4}, **{TYPE: "A100", "hybrid.chip": "a100-80"})],
        [("a100-80", "a100-80", 4, "auto")],
    ),
    "an A100 told apart by Ray's sized type": (
        [node(0, {"GPU": 4, "accelerator_type:A100": 1, "accelerator_type:A100-80G": 1})],
        [("a100-80", "a100-80", 4, "auto")],
    ),
    "a type unknown to the catalog, overruled by hybrid.chip": (
        [node(0, {"GPU": 1}, **{TYPE: "GeForce-RTX-5090", "hybrid.chip": "l4"})],
        [("l4", "l4", 1, "auto")],
    ),
    "an unknown instance type beside a known accelerator": (
        [node(0, {"GPU": 4}, **{TYPE: "H100", INSTANCE: "Standard_ND96isr_H100_v5"})],
        [("h100", "h100", 4, "auto")],
    ),
    "one of each vendor": (
        [node(1, {"neuron_cores": 4}, **{"hybrid.chip": "trn2"}), node(2, {"GPU": 1}, **{TYPE: "H100"})],
        [("h100", "h100", 1, "auto"), ("trn2", "trn2", 1, "auto")],
    ),
    "both vendors on one declared node": (
        [node(0, {"neuron_cores": 8, "GPU": 2}, **{TYPE: "H100", "hybrid.chip": "trn2"})],
        [("h100", "h100", 2, "auto"), ("trn2", "trn2", 2, "auto")],
    ),
    "two nodes of one chip are two islands": (
        [node(2, {"GPU": 8}, **{TYPE: "H100"}), node(1, {"GPU": 4}, **{TYPE: "H100"})],
        [("h100-0", "h100", 4, "auto"), ("h100-1", "h100", 8, "auto")],
    ),
    "four instances make an UltraServer": (
        [
            node(
                n,
                {"neuron_cores": 64},
                **{INSTANCE: "trn2u.48xlarge", "neuron.amazonaws.com/ultraserver-server-id-4": "x"},
            )
            for n in range(4)
        ],
        [("trn2", "trn2-ultraserver", 1, "auto")],
    ),
    "two instances of an UltraServer are its chips": (
        [
            node(n, {"neuron_cores": 64}, **{INSTANCE: "trn2u.48xlarge", "topology.k8s.aws/ultraserver-id": "x"})
            for n in range(2)
        ],
        [("trn2", "trn2", 32, "auto")],
    ),
    "eighteen trays make an NVL72": (
        [
            node(n, {"GPU": 4}, **{INSTANCE: "p6e-gb200.36xlarge", TYPE: "GB200", "ray.io/gpu-domain": "rack-1"})
            for n in range(18)
        ],
        [("gb200", "gb200-nvl72", 1, "auto")],
    ),
    "two racks are two islands": (
        [node(n, {"GPU": 4}, **{TYPE: "GB200", "ray.io/gpu-domain": f"rack-{n % 2}"}) for n in range(6)],
        [("gb200-0", "gb200", 12, "auto"), ("gb200-1", "gb200", 12, "auto")],
    ),
    "an island named by its label": (
        [node(n, {"GPU": 8}, **{TYPE: "H100", "hybrid.island": "left"}) for n in range(2)],
        [("left", "h100", 16, "auto")],
    ),
    "one island label over two kinds of chip": (
        [node(1, {"emulated_trn2": 2, "emulated_h100": 2}, **{"hybrid.island": "left"})],
        [("left-h100", "h100", 2, "emulated"), ("left-trn2", "trn2", 2, "emulated")],
    ),
    "emulated chips": (
        [node(0, {"emulated_trn2": 2, "emulated_h100": 2})],
        [("h100", "h100", 2, "emulated"), ("trn2", "trn2", 2, "emulated")],
    ),
    "an emulated chip with a hyphen": (
        [node(0, {"emulated_a100_40": 1})],
        [("a100-40", "a100-40", 1, "emulated")],
    ),
    "emulated chips beside the real ones": (
        [node(0, {"emulated_h100": 2, "GPU": 1}, **{TYPE: "H100"})],
        [("h100-0", "h100", 1, "auto"), ("h100-1", "h100", 2, "emulated")],
    ),
    "an emulated CPU": ([node(0, {"emulated_cpu": 2})], [("cpu", "cpu", 2, "emulated")]),
    "CPU nodes where there is nothing else": (
        [node(1), node(2, {"CPU": 2.5})],
        [("cpu-0", "cpu", 8, "auto"), ("cpu-1", "cpu", 2, "auto")],
    ),
    "CPU nodes beside an accelerator stay out": (
        [node(1), node(2, {"GPU": 1}, **{TYPE: "L4"})],
        [("l4", "l4", 1, "auto")],
    ),
    "CPU cores that a label asks for": (
        [node(1, **{"hybrid.chip": "cpu"}), node(2, {"GPU": 1}, **{TYPE: "L4"})],
        [("cpu", "cpu", 8, "auto"), ("l4", "l4", 1, "auto")],
    ),
    "a node left out by its label": (
        [
            node(1, {"GPU": 1}, **{TYPE: "Intel-GPU-Max-1550", "hybrid.chip": "none"}),
            node(2, {"GPU": 1}, **{TYPE: "L4"}),
        ],
        [("l4", "l4", 1, "auto")],
    ),
    "a head node without cores": ([node(1, {"CPU": 0}), node(2)], [("cpu", "cpu", 8, "auto")]),
    "resources of a placement group are no chips": (
        [
            node(
                0,
                {
                    "emulated_trn2": 2,
                    "emulated_trn2_group_" + "ab" * 18: 2,
                    "emulated_trn2_group_0_" + "ab" * 18: 1,
                    "accelerator_type:H100_group_0_" + "ab" * 18: 1,
                },
            )
        ],
        [("trn2", "trn2", 2, "emulated")],
    ),
    "a resource of zero is none": (
        [node(0, {"GPU": 0, "neuron_cores": 0, "emulated_trn2": 0})],
        [("cpu", "cpu", 8, "auto")],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_cluster_is_read_as_the_fleet_that_it_is(catalog: Catalog, what: str) -> None:
    nodes, expected = CASES[what]
    assert found(nodes, catalog) == expected


# what: (nodes, words that the refusal must hold)
REFUSALS: dict[str, tuple[list[NodeFacts], tuple[str, ...]]] = {
    "no node": ([], ("no live node",)),
    "no device": ([node(0, {"CPU": 0})], ("no device", "10.0.0.0", "neuron_cores, GPU")),
    "all nodes left out": ([node(**{"hybrid.chip": "none"})], ("no device", "hybrid.chip=none")),
    "neuron cores of no told generation": (
        [node(0, {"neuron_cores": 8}, **NEURON)],
        ("10.0.0.0", "neuron_cores cannot be told", "fit several chips", "inf2, trn1, trn2, trn3", "hybrid.chip="),
    ),
    "a GPU of no told type": (
        [node(0, {"GPU": 1})],
        ("GPU cannot be told", "no label or accelerator type", "hybrid.chip="),
    ),
    "an A100 of unknown size": (
        [node(0, {"GPU": 1}, **{TYPE: "A100"})],
        ("fit several chips", "A100", "a100-40, a100-80"),
    ),
    "a V100 of unknown size": ([node(0, {"GPU": 1, "accelerator_type:V100": 1})], ("v100-16, v100-32",)),
    "an accelerator type without a row": (
        [node(0, {"GPU": 1}, **{TYPE: "AMD-Instinct-MI300X-OAM"})],
        ("fit no chip", "AMD-Instinct-MI300X-OAM", "hybrid.chip=none"),
    ),
    "an instance type without a row": (
        [node(0, {"neuron_cores": 8}, **{INSTANCE: "trn9.48xlarge"})],
        ("trn9.48xlarge (not in the catalog)",),
    ),
    "type and instance contradict": (
        [node(0, {"GPU": 8}, **{TYPE: "H100", INSTANCE: "p4d.24xlarge"})],
        ("contradict each other", "H100", "p4d.24xlarge"),
    ),
    "type and hybrid.chip contradict": (
        [node(0, {"GPU": 8}, **{TYPE: "H100", "hybrid.chip": "h200"})],
        ("contradict each other", "H100", "hybrid.chip"),
    ),
    "two accelerator types on one node": (
        [node(0, {"GPU": 2, "accelerator_type:H100": 1, "accelerator_type:L4": 1})],
        ("contradict each other", "H100", "L4"),
    ),
    "a GPU instance type under neuron cores": (
        [node(0, {"neuron_cores": 8}, **{INSTANCE: "p5.48xlarge"})],
        ("contradict each other", "p5.48xlarge"),
    ),
    "hybrid.chip of a resource that is not there": (
        [node(0, {"GPU": 1}, **{TYPE: "H100", "hybrid.chip": "trn2"})],
        ("hybrid.chip=trn2", "neuron_cores"),
    ),
    "hybrid.chip on a bare node": ([node(**{"hybrid.chip": "trn2"})], ("hybrid.chip=trn2", "neuron_cores")),
    "hybrid.chip that no row has": (
        [node(0, {"GPU": 1}, **{"hybrid.chip": "h1000"})],
        ("10.0.0.0", "label hybrid.chip", "'h1000'", "valid: h100"),
    ),
    "hybrid.chip that is only announced": (
        [node(0, {"neuron_cores": 4}, **{"hybrid.chip": "trn4"})],
        ("label hybrid.chip", "announced"),
    ),
    "a part of a chip": (
        [node(0, {"neuron_cores": 6}, **{"hybrid.chip": "trn2"})],
        ("not whole trn2 chips of 4", "multiples of 4"),
    ),
    "half a GPU": ([node(0, {"GPU": 0.5}, **{TYPE: "L4"})], ("part of a GPU", "0.5")),
    "more cores than the instance has": (
        [node(0, {"neuron_cores": 128}, **{INSTANCE: "trn2.48xlarge"})],
        ("32 trn2 chips", "has 16", "at most 64", "NEURON_LOGICAL_NC_CONFIG"),
    ),
    "an emulated chip without a row": (
        [node(0, {"emulated_trn22": 1})],
        ("'emulated_trn22'", "emulated_trn2", "10.0.0.0"),
    ),
    "an emulated chip that is only announced": ([node(0, {"emulated_trn4": 1})], ("announced",)),
    "half an emulated chip": ([node(0, {"emulated_trn2": 1.5})], ("part of a emulated_trn2", "1.5")),
    "a fabric over two sites": (
        [node(n, {"GPU": 4}, **{TYPE: "H100", "hybrid.island": "x", "hybrid.site": f"zone-{n}"}) for n in range(2)],
        ("hybrid.island=x", "several sites", "zone-0, zone-1"),
    ),
    "an island's name that is taken": (
        [node(1, {"emulated_h100": 1}, **{"hybrid.island": "trn2"}), node(2, {"emulated_trn2": 1})],
        ("one name", "trn2", "hybrid.island"),
    ),
    "an island's name that is none": (
        [node(1, {"emulated_h100": 1}, **{"hybrid.island": "left side"})],
        ("'left side'", "hybrid.island"),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_told_is_refused_with_the_label_to_set(catalog: Catalog, what: str) -> None:
    nodes, words = REFUSALS[what]
    with pytest.raises(FleetError) as refused:
        fleet_of_nodes(nodes, catalog)
    message = str(refused.value)
    assert [word for word in words if word not in message] == []
    assert refused.value.fix


def test_a_site_is_the_zone_or_else_the_region(catalog: Catalog) -> None:
    zones = {
        "hybrid.site": "home",
        "topology.kubernetes.io/zone": "eu-1a",
        "ray.io/availability-zone": "eu-1b",
        "ray.io/region": "eu-1",
    }
    sites = []
    while zones:
        sites.append(fleet_of_nodes([node(0, {"emulated_trn2": 1}, **zones)], catalog).islands[0].site)
        del zones[next(iter(zones))]
    assert sites == ["home", "eu-1a", "eu-1b", "eu-1"]
    assert fleet_of_nodes([node()], catalog).islands[0].site == "local"


def test_the_order_in_which_nodes_are_told_changes_nothing(catalog: Catalog) -> None:
    nodes = [node(n, {"GPU": 4}, **{TYPE: "GB200", "ray.io/gpu-domain": f"rack-{n % 2}"}) for n in range(6)]
    assert islands_of_nodes(nodes[::-1], catalog) == islands_of_nodes(nodes, catalog)


def test_an_island_knows_its_nodes(catalog: Catalog) -> None:
    nodes = [node(n, {"GPU": 4}, **{TYPE: "GB200", "ray.io/gpu-domain": f"rack-{n % 2}"}) for n in range(4)]
    racks = islands_of_nodes(nodes, catalog)
    assert [rack.node_ids for rack in racks] == [
        (nodes[0].node_id, nodes[2].node_id),
        (nodes[1].node_id, nodes[3].node_id),
    ]


@pytest.mark.parametrize("what", CASES)
def test_a_discovered_fleet_can_be_saved_and_built_again(catalog: Catalog, what: str) -> None:
    fleet = build_fleet(fleet_of_nodes(CASES[what][0], catalog), catalog)
    assert build_fleet(fleet_to_config(fleet), catalog) == fleet


def test_every_chip_has_an_emulated_resource_of_its_own_that_ray_can_name(catalog: Catalog) -> None:
    names = [emulated_resource(name) for name in catalog.chips]
    assert len(set(names)) == len(names)
    assert all(name.replace("_", "").isalnum() for name in names)
    assert emulated_resource("trn2") == "emulated_trn2"


BUNDLES: list[tuple[dict[str, Any], tuple[str, ...] | None, dict[str, float]]] = [
    ({"device": "cpu"}, None, {"CPU": 1}),
    ({"device": "trn2"}, None, {"emulated_trn2": 1}),
    ({"device": "trn2"}, ("CPU", "emulated_trn2", "neuron_cores"), {"emulated_trn2": 1}),
    ({"device": "trn2"}, ("CPU", "neuron_cores"), {"neuron_cores": 4}),
    ({"device": "trn1"}, ("CPU", "neuron_cores"), {"neuron_cores": 2}),
    ({"device": "h100"}, ("CPU", "GPU"), {"GPU": 1}),
    ({"device": "h100"}, ("CPU",), {"emulated_h100": 1}),
    ({"device": "cpu", "backend": "emulated"}, None, {"emulated_cpu": 1}),
]


@pytest.mark.parametrize(("island", "offered", "bundle"), BUNDLES)
def test_a_rank_asks_for_one_whole_chip(
    island: dict[str, Any], offered: tuple[str, ...] | None, bundle: dict[str, float]
) -> None:
    fleet = build_fleet(FleetConfig.model_validate({"islands": [{"name": "a", **island}]}))
    assert ray_bundle(fleet.island("a"), offered) == bundle
