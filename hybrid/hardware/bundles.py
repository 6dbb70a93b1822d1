"""From the ranks of a job to Ray bundles of whole chips; pure. May import only this folder's files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from hybrid.hardware.discovery import ray_bundle
from hybrid.hardware.fleet import Island


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """The Ray bundles of a job, each of whole chips, and which rank takes what of which."""

    resources: tuple[Mapping[str, float], ...] = field(hash=False)
    bundle_of_rank: tuple[int, ...]
    share_of_rank: tuple[Mapping[str, float], ...] = field(hash=False)


def bundles_of_ranks(islands: Iterable[Island], cluster_resources: Collection[str] | None = None) -> Bundles:
    """Return the bundles for ranks in order: a chip each, or one chip for the ranks that are its logical cores.

    Args:
        islands: each rank's island, in rank order.
        cluster_resources: see `ray_bundle`.
    """
    resources: list[Mapping[str, float]] = []
    bundle_of_rank: list[int] = []
    shares: list[Mapping[str, float]] = []
    last: Island | None = None
    free = 0
    for island in islands:
        bundle = ray_bundle(island, cluster_resources)
        if island != last or not free:
            resources.append(bundle)
            last, free = island, island.ranks_per_chip
        free -= 1
        bundle_of_rank.append(len(resources) - 1)
        shares.append({name: amount / island.ranks_per_chip for name, amount in bundle.items()})
    return Bundles(resources=tuple(resources), bundle_of_rank=tuple(bundle_of_rank), share_of_rank=tuple(shares))
