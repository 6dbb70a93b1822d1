"""From the nodes of a Ray cluster to a fleet, and from an island to the Ray resources of one rank.

Pure: the launcher collects what Ray says of its nodes (`NodeFacts`); this file decides what they are, and
says which label to set where it can't. May import only `errors`, `config` and this folder's files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.config import FleetConfig, IslandConfig
from hybrid.errors import FleetError
from hybrid.hardware.catalog import Catalog, Chip, System
from hybrid.hardware.fleet import Island, real_backend

CHIP_LABEL = "hybrid.chip"
"""A chip's name, where Ray's own facts don't tell it; `none` leaves the node out."""
ISLAND_LABEL = "hybrid.island"
"""The island's name: nodes of one value share a scale-up fabric."""
SITE_LABELS = (
    "hybrid.site",
    "topology.kubernetes.io/zone",
    "ray.io/availability-zone",
    "topology.kubernetes.io/region",
    "ray.io/region",
)
FABRIC_LABELS = (
    ISLAND_LABEL,
    "ray.io/gpu-domain",
    "topology.k8s.aws/ultraserver-id",
    "neuron.amazonaws.com/ultraserver-server-id-4",
    "neuron.amazonaws.com/ultraserver-server-id-2",
    "nvidia.com/gpu.clique",
)
"""Nodes that agree in the first of these that they have share a scale-up fabric."""
INSTANCE_LABELS = ("hybrid.instance-type", "node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type")
ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR_RESOURCE = "accelerator_type:"
_EMULATED = "emulated_"
_ACCELERATORS = ("neuron_cores", "GPU")
# A placement group adds resources such as GPU_group_0_<32 hex digits> to its nodes.
_OF_A_PLACEMENT_GROUP = re.compile(r".*_group_(\d+_)?[0-9a-f]{32,}")
_ISLAND_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What Ray says of one live node."""

    node_id: str
    address: str
    resources: Mapping[str, float] = field(hash=False)
    """Totals, not what is free at the moment."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    seen: frozenset[str] = frozenset()
    """Of the accelerator resources, those whose devices were seen on the node (`devices_seen`), not only declared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveredIsland:
    """An island and the nodes that it lies on."""

    config: IslandConfig
    node_ids: tuple[str, ...]


def fleet_of_nodes(nodes: Iterable[NodeFacts], catalog: Catalog) -> FleetConfig:
    """Return the fleet that a cluster's nodes are.

    Raises:
        FleetError: no node, no device, or a node whose chip can't be told; names the node and the label to set.
    """
    islands = tuple(island.config for island in islands_of_nodes(nodes, catalog))
    return FleetConfig(islands=islands, catalog=catalog.override)


def islands_of_nodes(nodes: Iterable[NodeFacts], catalog: Catalog) -> tuple[DiscoveredIsland, ...]:
    """Return the islands of a cluster, by chip, then site, then address.

    An island is one node's chips of one kind, or those of all nodes that a fabric label joins. CPU
    cores are an island only where the cluster has nothing else, or where `hybrid.chip=cpu` asks for them.

    Raises:
        FleetError: see `fleet_of_nodes`.
    """
    live = sorted(nodes, key=lambda node: (node.address, node.node_id))
    if not live:
        raise FleetError("the cluster has no live node", fix="start one with `ray start`, or give the fleet in the job")
    holdings = [holding for node in live for holding in _holdings(node, catalog)]
    if not holdings:
        holdings = [holding for node in live if _wanted(node) for holding in _cores(node, catalog)]
    if not holdings:
        raise FleetError(
            "the cluster offers no device",
            value=", ".join(node.address for node in live),
            valid="nodes with neuron_cores, GPU, emulated_<chip> or CPU",
            fix="start Ray with such resources, or take `hybrid.chip=none` off the nodes",
        )
    groups: dict[tuple[str, bool, str], list[_Holding]] = {}
    for holding in holdings:
        groups.setdefault((holding.chip.name, holding.emulated, holding.fabric), []).append(holding)
    ordered = sorted(groups.values(), key=lambda group: (group[0].chip.name, group[0].site))
    names = _island_names(ordered)
    return tuple(
        DiscoveredIsland(
            config=_island_config(name, group, catalog), node_ids=tuple(held.node.node_id for held in group)
        )
        for name, group in zip(names, ordered, strict=True)
    )


def devices_seen(dev: Path = Path("/dev")) -> frozenset[str]:
    """Return the accelerator resources whose device files are on this node."""
    files = {"neuron_cores": "neuron[0-9]*", "GPU": "nvidia[0-9]*"}
    return frozenset(resource for resource, pattern in files.items() if any(dev.glob(pattern)))


def emulated_resource(chip_name: str) -> str:
    """Return the Ray resource that counts a node's emulated chips of that kind, such as `emulated_a100_40`."""
    return _EMULATED + re.sub(r"[^a-z0-9]", "_", chip_name.lower())


def ray_bundle(island: Island, cluster_resources: Collection[str] | None = None) -> Mapping[str, float]:
    """Return the Ray resources that one rank of an island asks for: one whole chip.

    Args:
        island: the rank's island.
        cluster_resources: names of the resources that the cluster has. Where an emulated chip's own
            resource is not among them and the real chip's is, the rank takes the real chip's place.
    """
    chip = island.chip
    real = {chip.ray_resource: float(chip.ray_units_per_chip)}
    if island.backend != "emulated":
        return real
    emulated = emulated_resource(chip.name)
    offered = {emulated} if cluster_resources is None else set(cluster_resources)
    return real if emulated not in offered and chip.ray_resource in offered else {emulated: 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holding:
    """Chips of one kind on one node."""

    node: NodeFacts
    chip: Chip
    num_chips: int
    emulated: bool
    system: System | None = None
    """The system that the node is, where it has all of its chips."""

    @property
    def site(self) -> str:
        return _first_label(self.node, SITE_LABELS) or "local"

    @property
    def fabric(self) -> str:
        """What joins the node with others; its own identity where nothing does."""
        labels = (ISLAND_LABEL,) if self.emulated or self.chip.ray_resource == "CPU" else FABRIC_LABELS
        label = next((label for label in labels if label in self.node.labels), None)
        return f"{label}={self.node.labels[label]}" if label else f"node={self.node.node_id}"


def _holdings(node: NodeFacts, catalog: Catalog) -> list[_Holding]:
    """Return a node's accelerators, real and emulated; CPU cores only where a label asks for them."""
    if not _wanted(node):
        return []
    counts = {name: _whole(node, name) for name in _ACCELERATORS if node.resources.get(name)}
    named = _named_chip(node, catalog)
    emulated = _emulated(node, catalog)
    if named is None or named.ray_resource in counts:
        return [_real(node, name, count, named, catalog) for name, count in counts.items()] + emulated
    if named.ray_resource == "CPU":
        rest = [_real(node, name, count, None, catalog) for name, count in counts.items()]
        return rest + emulated + _cores(node, catalog)
    raise _refusal(
        node,
        f"label {CHIP_LABEL}={named.name} stands on a node without the resource {named.ray_resource}",
        valid=f"a node with {named.ray_resource}",
        fix=f"take the label away, or start Ray there with {named.ray_resource}",
    )


def _named_chip(node: NodeFacts, catalog: Catalog) -> Chip | None:
    """Return the chip that the node's own label names."""
    if CHIP_LABEL not in node.labels:
        return None
    try:
        return catalog.chip(node.labels[CHIP_LABEL])
    except FleetError as error:
        fact = f"label {CHIP_LABEL}: {error.fact}"
        fix = error.fix or f"start Ray there with another {CHIP_LABEL}"
        raise _refusal(node, fact, value=error.value, valid=error.valid, fix=fix) from None


def _real(node: NodeFacts, resource: str, units: int, named: Chip | None, catalog: Catalog) -> _Holding:
    instance = _first_label(node, INSTANCE_LABELS)
    system = next((row for row in catalog.systems.values() if instance in (row.name, *row.aliases)), None)
    chip = _chip_of_node(node, resource, named, system, catalog)
    if units % chip.ray_units_per_chip:
        raise _refusal(
            node,
            f"the {units} {resource} are not whole {chip.name} chips of {chip.ray_units_per_chip}",
            valid=f"multiples of {chip.ray_units_per_chip}",
            fix=f"start Ray there with `--resources` of whole chips, or set {CHIP_LABEL} if the chip is another",
        )
    num_chips = units // chip.ray_units_per_chip
    if system is not None and num_chips > system.num_chips:
        raise _refusal(
            node,
            f"the {units} {resource} are {num_chips} {chip.name} chips, but a {system.name} has {system.num_chips}",
            valid=f"at most {system.num_chips * chip.ray_units_per_chip}",
            fix="count logical cores at the default NEURON_LOGICAL_NC_CONFIG, or give the chip its "
            "ray_units_per_chip in a catalog file (fleet.catalog)",
        )
    whole = system if system is not None and num_chips == system.num_chips else None
    return _Holding(node=node, chip=chip, num_chips=num_chips, emulated=False, system=whole)


def _chip_of_node(node: NodeFacts, resource: str, named: Chip | None, system: System | None, catalog: Catalog) -> Chip:
    """Return the one chip that everything the node says of itself allows."""
    possible = {chip.name for chip in catalog.chips.values() if chip.ray_resource == resource}
    types = {
        name.removeprefix(_ACCELERATOR_RESOURCE)
        for name in node.resources
        if name.startswith(_ACCELERATOR_RESOURCE) and not _OF_A_PLACEMENT_GROUP.fullmatch(name)
    }
    types |= {node.labels[ACCELERATOR_LABEL]} if ACCELERATOR_LABEL in node.labels else set()
    evidence: dict[str, set[str]] = {}
    for accelerator in sorted(types):
        chips = {c.name for c in catalog.chips.values() if accelerator in c.ray_accelerator_types}
        # A node with both kinds of accelerator names the type of each.
        if chips & possible or not chips:
            evidence[f"{ACCELERATOR_LABEL} {accelerator}"] = chips
    if system is not None:
        evidence[f"instance type {system.name}"] = {system.chip}
    if named is not None and named.ray_resource == resource:
        # The user's word outranks a name that the catalog doesn't know, but not one that it does.
        evidence = {what: chips for what, chips in evidence.items() if chips} | {CHIP_LABEL: {named.name}}
    left = possible.intersection(*evidence.values())
    if len(left) == 1:
        return catalog.chip(left.pop())
    told = ", ".join(evidence) or "no label or accelerator type"
    instance = _first_label(node, INSTANCE_LABELS)
    if system is None and instance is not None:
        told += f", instance type {instance} (not in the catalog)"
    contradiction = not left and all(evidence.values())
    raise _refusal(
        node,
        f"the chip behind {resource} cannot be told: its facts "
        + ("contradict each other" if contradiction else "fit no chip" if not left else "fit several chips"),
        value=told,
        valid=sorted(left or possible),
        fix=f"start Ray there with `--labels {CHIP_LABEL}=<chip>`, or {CHIP_LABEL}=none to leave the node out",
    )


def _emulated(node: NodeFacts, catalog: Catalog) -> list[_Holding]:
    known = {emulated_resource(name): name for name in (*catalog.chips, *catalog.announcements)}
    found = []
    for resource in sorted(node.resources):
        if not resource.startswith(_EMULATED) or _OF_A_PLACEMENT_GROUP.fullmatch(resource):
            continue
        if resource not in known:
            raise _refusal(
                node,
                "resource stands for no chip of the catalog",
                value=resource,
                valid=[emulated_resource(name) for name in catalog.chips],
                fix="start Ray there with one of these",
            )
        num_chips = _whole(node, resource)
        if num_chips:
            chip = catalog.chip(known[resource])
            found.append(_Holding(node=node, chip=chip, num_chips=num_chips, emulated=True))
    return found


def _cores(node: NodeFacts, catalog: Catalog) -> list[_Holding]:
    """Return a node's CPU cores as chips; a fraction of a core is none."""
    num_cores = int(node.resources.get("CPU", 0))
    chip = catalog.chip("cpu")
    return [_Holding(node=node, chip=chip, num_chips=num_cores, emulated=False)] if num_cores else []


def _island_names(groups: list[list[_Holding]]) -> list[str]:
    """Return an island's label, or its chip's name with a number where several islands have that chip."""
    keys = [(group[0].node.labels.get(ISLAND_LABEL), group[0].chip.name) for group in groups]
    twins, namesakes = Counter(label for label, _ in keys), Counter(keys)
    names: list[str] = []
    for place, (label, chip) in enumerate(keys):
        number = f"-{keys[:place].count((label, chip))}" if namesakes[label, chip] > 1 else ""
        # One label over two kinds of chip is two islands.
        names.append(chip + number if label is None else label + (f"-{chip}{number}" if twins[label] > 1 else ""))
    unusable = [name for name in names if not _ISLAND_NAME.fullmatch(name)]
    if unusable:
        valid = "1 to 64 letters, digits, dots, hyphens and underscores"
        fix = f"give {ISLAND_LABEL} such a value"
        raise FleetError("an island's name is not usable", value=unusable[0], valid=valid, fix=fix)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        fix = f"give {ISLAND_LABEL} another value"
        raise FleetError("two islands would have one name", value=", ".join(twice), fix=fix)
    return names


def _island_config(name: str, group: list[_Holding], catalog: Catalog) -> IslandConfig:
    first = group[0]
    sites = sorted({holding.site for holding in group})
    if len(sites) > 1:
        raise _refusal(
            first.node,
            f"its fabric ({first.fabric}) spans several sites",
            value=", ".join(sites),
            fix=f"give nodes of different sites different values of {first.fabric.split('=')[0]}",
        )
    system = _system_of_group(group, catalog)
    device, count = (first.chip.name, sum(held.num_chips for held in group)) if system is None else (system.name, 1)
    # A resource may be declared where no device is; then `auto` rehearses the chip.
    there = all(held.chip.ray_resource in held.node.seen for held in group)
    backend = "emulated" if first.emulated else (real_backend(first.chip) or "auto") if there else "auto"
    return IslandConfig.model_validate(
        {"name": name, "device": device, "count": count, "site": first.site, "backend": backend}
    )


def _system_of_group(group: list[_Holding], catalog: Catalog) -> System | None:
    """Return the system that the nodes make up together; None where they are less or more than one."""
    parts = {held.system.name for held in group if held.system is not None}
    if len(parts) != 1 or any(held.system is None for held in group):
        return None
    part = catalog.system(parts.pop())
    if len(group) == 1:
        return part
    wholes = catalog.systems.values()
    return next((s for s in wholes if s.instance_type == part.name and s.num_instances == len(group)), None)


def _wanted(node: NodeFacts) -> bool:
    return node.labels.get(CHIP_LABEL) != "none"


def _whole(node: NodeFacts, resource: str) -> int:
    amount = node.resources[resource]
    if amount != int(amount) or amount < 0:
        fix = "start Ray there with a whole number"
        raise _refusal(node, f"offers a part of a {resource}", value=amount, valid="whole numbers", fix=fix)
    return int(amount)


def _first_label(node: NodeFacts, keys: Iterable[str]) -> str | None:
    return next((node.labels[key] for key in keys if key in node.labels), None)


def _refusal(
    node: NodeFacts,
    fact: str,
    *,
    value: object = None,
    valid: str | Iterable[object] | None = None,
    fix: str,
) -> FleetError:
    where = f"Ray node {node.address} ({node.node_id[:12]})"
    return FleetError(fact, value=value, valid=valid, fix=fix, where=where)
