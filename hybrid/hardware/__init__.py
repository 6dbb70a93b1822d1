"""Hardware: the catalog of chips and systems, the fleet made of them, and what a Ray cluster holds.

Data and pure functions; no torch, no Ray, no network.
"""

from hybrid.hardware.catalog import Announcement, Catalog, Chip, Price, System, load_catalog
from hybrid.hardware.discovery import (
    DiscoveredIsland,
    NodeFacts,
    emulated_resource,
    fleet_of_nodes,
    islands_of_nodes,
    ray_bundle,
)
from hybrid.hardware.fleet import Fleet, Island, Link, build_fleet, fleet_to_config

__all__ = [
    "Announcement",
    "Catalog",
    "Chip",
    "DiscoveredIsland",
    "Fleet",
    "Island",
    "Link",
    "NodeFacts",
    "Price",
    "System",
    "build_fleet",
    "emulated_resource",
    "fleet_of_nodes",
    "fleet_to_config",
    "islands_of_nodes",
    "load_catalog",
    "ray_bundle",
]
