"""Links: seconds of a message by its size, between any two pools and inside one; what leaving a site costs.

Pure. A bandwidth is a constant, a table over message sizes, or a polynomial in log2(bytes / 1e6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import FleetError

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """One way from a chip to another, one direction."""

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    points: tuple[tuple[float, float], ...] = ()
    """(message bytes, bytes/s), by rising size; between two points linear in log(bytes), beyond them constant."""
    polynomial: tuple[float, ...] = ()
    """Highest power first; GB/s (1e9) of x = log2(bytes / 1e6)."""
    smallest_bytes: float = 1.0
    """Below this size the polynomial is not used: the bandwidth is that at this size."""
    shared_by: int = 1
    """Ranks of a node that share the interface when all send at once (a reduction)."""
    source: str = "given"

    def __post_init__(self) -> None:
        given = (self.bytes_per_s is not None) + bool(self.points) + bool(self.polynomial)
        if given != 1:
            fact = "a link needs one of bytes_per_s, points and polynomial"
            raise FleetError(fact, value=f"{given} of them", fix="give exactly one")
        if self.latency_s < 0 or (self.bytes_per_s is not None and self.bytes_per_s <= 0) or self.shared_by < 1:
            raise FleetError(
                "a link's numbers are out of range", valid="latency from 0, bandwidth above 0, sharers from 1"
            )

    def bandwidth(self, size_bytes: Array) -> Array:
        """Return the bytes/s that messages of these sizes get alone.

        Raises:
            FleetError: a polynomial that is not above zero at some size.
        """
        if self.bytes_per_s is not None:
            return np.full_like(size_bytes, self.bytes_per_s)
        if self.points:
            sizes, rates = np.array(self.points, dtype=np.float64).T
            return np.asarray(np.interp(np.log(size_bytes), np.log(sizes), rates), dtype=np.float64)
        rate = np.polyval(self.polynomial, np.log2(np.maximum(size_bytes, self.smallest_bytes) / 1e6))
        if np.any(rate <= 0):
            fact = "the link's polynomial gives no bandwidth above zero"
            worst = float(size_bytes[np.argmin(rate)])
            raise FleetError(fact, value=worst, valid="sizes in its range", fix="give a table of points instead")
        return np.asarray(rate * 1e9)

    def seconds_of(self, size_bytes: Array, *, sharers: int = 1) -> Array:
        """Return the seconds from the start of each send to its arrival, `sharers` ranks of the node sending at once.

        Shapes:
            size_bytes: (N,).  returns: (N,)
        """
        sizes = np.where(size_bytes > 0, size_bytes, 1e6)  # what is not sent is not looked up
        seconds = self.latency_s + sizes * min(sharers, self.shared_by) / self.bandwidth(sizes)
        return np.where(size_bytes > 0, seconds, 0.0)

    def seconds(self, size_bytes: float, *, sharers: int = 1) -> float:
        """Return the seconds from the start of one send to its arrival."""
        return float(self.seconds_of(np.array([float(size_bytes)]), sharers=sharers)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """All links of a fleet, by (from kind, from lanes, to kind, to lanes).

    A kind is a pool's name or its chip; lanes are the chips of a stage that send side by side. What is missing
    for some lanes is taken from the next smaller number of lanes, and either direction stands for both.
    """

    links: Mapping[tuple[str, int, str, int], LinkModel]
    usd_per_gb: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Egress by (from site, to site); what is missing costs nothing."""

    def find(self, names: tuple[str, ...], others: tuple[str, ...], lanes: int, other_lanes: int) -> LinkModel | None:
        """Return the link between two kinds, each known by several names, or None."""
        for a in names:
            for b in others:
                link = self._at(a, lanes, b, other_lanes) or self._at(b, other_lanes, a, lanes)
                if link is not None:
                    return link
        return None

    def _at(self, a: str, lanes: int, b: str, other_lanes: int) -> LinkModel | None:
        for i in range(lanes, 0, -1):
            for j in range(other_lanes, 0, -1):
                if (a, i, b, j) in self.links:
                    return self.links[a, i, b, j]
        return None


def reduce_seconds(
    link: LinkModel, size_bytes: Array, num_ranks: int, *, bucket_bytes: float = math.inf, sharers: int = 1
) -> Array:
    """Return the seconds of all-reduces over `num_ranks` ranks on the slowest link among them.

    The better of a ring (2(n-1) messages of bytes/n a bucket) and, where the link has a latency, two binary trees
    (2 log2 n latencies and the bytes twice).

    Shapes:
        size_bytes: (N,), one reduction each.  returns: (N,)

    Source:
        Patarasuk and Yuan 2009 (ring); Sanders, Speck and Traeff 2009 (two trees).
    """
    if num_ranks <= 1:
        return np.zeros_like(size_bytes)
    whole = np.floor(size_bytes / bucket_bytes)
    rest = size_bytes - whole * bucket_bytes if math.isfinite(bucket_bytes) else size_bytes
    messages = 2 * (num_ranks - 1)
    ring = messages * link.seconds_of(rest / num_ranks, sharers=sharers)
    if whole.any():
        ring = ring + whole * messages * link.seconds(bucket_bytes / num_ranks, sharers=sharers)
    if not link.latency_s:
        return ring
    stream_s = link.seconds_of(size_bytes, sharers=sharers) - link.latency_s
    tree = 2 * stream_s + 2 * math.ceil(math.log2(num_ranks)) * link.latency_s
    return np.where(size_bytes > 0, np.minimum(ring, tree), 0.0)
