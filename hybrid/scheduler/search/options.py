"""Options: what one stage may be, and the seconds and bytes of every run of layers on it.

Pure. One `OptionTable` a microbatch: arrays over (option, first layer, end layer), from prefix sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.search.links import LinkModel, reduce_seconds
from hybrid.scheduler.search.orders import order_of, stages_a_rank
from hybrid.scheduler.search.pace import Pipelines
from hybrid.scheduler.search.problem import Problem
from hybrid.scheduler.search.sent import BYTES_A_NUMBER, narrowing

Array = NDArray[np.float64]
Ints = NDArray[np.intp]

GRADIENT_BYTES = 4
"""Gradients are reduced in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Where and how a stage runs."""

    pool: int
    degree: int
    width: int
    recompute: bool

    @property
    def num_chips(self) -> int:
        """Chips of one such stage."""
        return self.degree * self.width


class OptionTable:
    """Seconds and bytes of every option and every run of layers, for one microbatch size."""

    def __init__(self, problem: Problem, microbatch: int) -> None:
        self.problem, self.microbatch = problem, microbatch
        self._reductions: dict[tuple[int, tuple[int, ...]], Array] = {}
        self.options = tuple(_options(problem, microbatch))
        self.num_layers = problem.table.num_layers
        self.pools = range(len(problem.pools))
        self.pool_of = np.array([option.pool for option in self.options], dtype=np.intp)
        self.chips = np.array(
            [option.width * _slot(option.degree, problem.pools[option.pool].node_size) for option in self.options],
            dtype=np.float64,
        )
        """Chips that an option takes up, those included that its nodes cannot use."""
        size = (len(self.options), self.num_layers + 1, self.num_layers + 1)
        self.forward_s, self.backward_s, self.weight_s = np.empty(size), np.empty(size), np.empty(size)
        self.base_bytes, self.held_bytes = np.empty(size), np.empty(size)
        self.shard_bytes = np.empty(size)
        """Gradients that one chip reduces."""
        self.update_s = np.empty(len(self.options))
        self.limit_bytes = np.empty(len(self.options))
        for index, option in enumerate(self.options):
            self._fill(index, option)
        self.codecs = tuple(name for name in BYTES_A_NUMBER if name in problem.vocabulary.codecs)
        """Permitted on edges, the widest first; messages are counted in the narrowest."""
        sizes = problem.table.sizes[min(problem.table.sizes)]
        self.output_bytes = np.array([0.0, *(float(x) * microbatch for x in sizes.output_bytes)])
        """By layer + 1: what leaves a stage that ends there; the first entry is the model's input."""

    def _fill(self, index: int, option: Option) -> None:
        problem, table = self.problem, self.problem.table
        pool, memory = problem.pools[option.pool], problem.memory
        samples = self.microbatch // option.width
        cell, sizes = table.cells[pool.chip, option.degree, samples], table.sizes[option.degree]
        forward = _runs(np.array(cell.forward_s))
        backward = _runs(np.array(cell.backward_s))
        self.weight_s[index] = _runs(np.array(cell.weight_gradient_s))
        saved = _runs(np.array(sizes.saved_bytes, dtype=np.float64)) * samples
        parameters = _runs(np.array(sizes.num_parameters, dtype=np.float64))
        outputs = np.array([0.0, *map(float, sizes.output_bytes[:-1]), 0.0]) * samples
        cuts = outputs[:, None] + outputs[None, :]
        base = parameters * memory.bytes_per_parameter + (3 * cuts if memory.counts_buffers else 0)
        if option.recompute:
            # The forward runs again: its activations are whole for one microbatch, the others keep their input.
            self.backward_s[index] = backward + forward
            self.base_bytes[index] = base + saved
            self.held_bytes[index] = np.maximum(outputs, 0.0)[:, None] + np.zeros_like(saved)
        else:
            self.backward_s[index] = backward
            self.base_bytes[index], self.held_bytes[index] = base, saved
        self.forward_s[index] = forward
        self.shard_bytes[index] = parameters * GRADIENT_BYTES
        self.update_s[index] = cell.update_s
        self.limit_bytes[index] = pool.memory_bytes * (1.0 - memory.margin) - self.fixed_bytes(index)

    def fixed_bytes(self, index: int) -> float:
        """Return what a chip of the option holds whatever its layers."""
        memory = self.problem.memory
        is_split = self.options[index].degree > 1 and memory.fixed_bytes_split is not None
        return float(memory.fixed_bytes_split or 0.0) if is_split else memory.fixed_bytes

    def coded_edge_s(self, codec: str, here: int, there: int, cut: int) -> tuple[float, float]:
        """Return seconds and latency of the activation that leaves layer `cut - 1`, in a codec."""
        link = self.link(here, there)
        if link is None:
            return float("inf"), 0.0
        one, other = self.options[here], self.options[there]
        lanes = 1 if link.polynomial else min(one.num_chips, other.num_chips)
        size = float(self.output_bytes[cut]) * narrowing(self.problem.table.precision, codec)
        return link.seconds(size / lanes), link.latency_s

    @cached_property
    def edge_s(self) -> Array:
        """Seconds of the activation behind a layer, from option to option, in the narrowest permitted codec.

        Infinite without a link.

        Shapes:
            (options, options, layers + 1)
        """
        seconds = np.full((len(self.options), len(self.options), self.num_layers + 1), np.inf)
        for a, one in enumerate(self.options):
            for b, other in enumerate(self.options):
                link = self.link(a, b)
                if link is not None:
                    lanes = 1 if link.polynomial else min(one.num_chips, other.num_chips)
                    share = narrowing(self.problem.table.precision, self.codecs[-1])
                    seconds[a, b] = link.seconds_of(self.output_bytes * share / lanes)
        return seconds

    @cached_property
    def edge_latency_s(self) -> Array:
        """Latency of the same links.

        Shapes:
            (options, options)
        """
        count = range(len(self.options))
        links = [[self.link(a, b) for b in count] for a in count]
        return np.array([[0.0 if link is None else link.latency_s for link in row] for row in links]).reshape(
            len(self.options), len(self.options)
        )

    def link(self, a: int, b: int) -> LinkModel | None:
        """Return the link from one option's chips to another's."""
        one, other = self.options[a], self.options[b]
        pools = self.problem.pools
        return self.problem.link(pools[one.pool], pools[other.pool], one.num_chips, other.num_chips)

    def fits(self, in_flight: Array | int) -> NDArray[np.bool_]:
        """Return which runs of layers fit on which option with so many microbatches in flight."""
        limit = self.limit_bytes[:, None, None]
        return np.asarray(self.base_bytes + in_flight * self.held_bytes <= limit)

    @cached_property
    def _shards(self) -> list[tuple[Array, Ints]]:
        """The sizes that shards have, and which run of layers has which: a model's layers repeat."""
        found = []
        for rows in self.shard_bytes:
            sizes, place = np.unique(np.maximum(rows, 0.0), return_inverse=True)
            found.append((sizes, place.reshape(rows.shape)))
        return found

    def reduce_s(self, num_replicas: int, used: tuple[int, ...] | None = None) -> Array:
        """Return the seconds in which a stage's gradients are reduced over so many replicas.

        At one site a ring or two trees over the slowest link that the used pools (default: all) have there; between
        sites each chip then exchanges its share of the shard with its peers. Infinite where a link is missing. Sailor's
        law looks at the pool's own link alone (its uniform plans are costed whole, by their members).

        Shapes:
            returns: (options, layers + 1, layers + 1)
        """
        found = np.zeros_like(self.shard_bytes)
        if num_replicas <= 1:
            return found
        pools = self.problem.pools if used is None else tuple(self.problem.pools[index] for index in used)
        num_sites = len({pool.site for pool in pools})
        local = max(1, num_replicas // num_sites)
        for index, option in enumerate(self.options):
            pool = self.problem.pools[option.pool]
            sizes, place = self._shards[index]
            worst = np.zeros_like(sizes)
            for other in (pool,) if self.problem.vocabulary.step_law == "sailor" else pools:
                link = self.problem.link(pool, other)
                if link is None:
                    worst = np.full_like(sizes, np.inf)
                elif other.site == pool.site:
                    worst = np.maximum(worst, self._ring_s(link, sizes, local * option.width, pool.node_size))
            slow = np.zeros_like(sizes)
            for other in pools:
                link = self.problem.link(pool, other) if other.site != pool.site else None
                if link is not None:
                    slow = np.maximum(slow, self._ring_s(link, sizes / local, num_sites, pool.node_size))
            found[index] = (worst + slow)[place]
        return found

    def reduce_s_cached(self, num_replicas: int, used: tuple[int, ...] | None = None) -> Array:
        """Return `reduce_s`, computed once for each number of replicas and set of used pools."""
        key = num_replicas, tuple(self.pools) if used is None else used
        if key not in self._reductions:
            self._reductions[key] = self.reduce_s(num_replicas, used)
        return self._reductions[key]

    def _ring_s(self, link: LinkModel, sizes: Array, ranks: int, sharers: int) -> Array:
        return reduce_seconds(link, sizes, ranks, bucket_bytes=self.problem.reduce_bucket_bytes, sharers=sharers)

    def pipelines(self, chosen: Ints, bounds: Ints) -> Pipelines:
        """Return the seconds of N pipelines.

        Shapes:
            chosen: (N, P), options.  bounds: (N, P + 1), first layers and the end.
        """
        first, end = bounds[:, :-1], bounds[:, 1:]
        here, there = chosen[:, :-1], chosen[:, 1:]
        cut = bounds[:, 1:-1]
        # Sailor sizes a gradient by the output of the stage's own first layer.
        back = cut + 1 if self.problem.vocabulary.step_law == "sailor" else cut
        activation_s, gradient_s = self.edge_s[here, there, cut], self.edge_s[there, here, back]
        busy_s = np.where(np.isfinite(activation_s), activation_s - self.edge_latency_s[here, there], 0.0)
        return Pipelines(
            forward_s=self.forward_s[chosen, first, end],
            backward_s=self.backward_s[chosen, first, end],
            weight_s=self.weight_s[chosen, first, end],
            activation_s=activation_s,
            gradient_s=gradient_s,
            busy_s=np.maximum(busy_s, 0.0),
        )

    def peak_bytes(self, chosen: Ints, bounds: Ints, num_microbatches: int | None, schedule: str = "1f1b") -> Array:
        """Return what each rank holds at its peak, fixed bytes left out.

        Args:
            num_microbatches: in a step; None: as many as are held at most.

        Shapes:
            chosen: (N, stages).  returns: (N, ranks)
        """
        first, end = bounds[:, :-1], bounds[:, 1:]
        ranks = chosen.shape[1] // stages_a_rank(schedule)
        if num_microbatches is None or not self.problem.memory.capped_by_microbatches:
            least = min(self.problem.vocabulary.microbatches)
            num_microbatches = 4 * ranks + 2 if schedule != "gpipe" else -(-self.problem.global_batch // least)
        order = order_of(schedule, ranks, num_microbatches)
        base, held = self.base_bytes[chosen, first, end], self.held_bytes[chosen, first, end]
        home, peaks = np.array(order.rank_of_stage), np.empty((len(chosen), ranks))
        for rank, moments in enumerate(order.held_of_rank):
            mine = home == rank
            peaks[:, rank] = base[:, mine].sum(axis=1) + (held[:, mine] @ moments.T).max(axis=1)
        return peaks


def _options(problem: Problem, microbatch: int) -> list[Option]:
    words = problem.vocabulary
    return [
        Option(pool=index, degree=degree, width=width, recompute=recompute)
        for index, pool in enumerate(problem.pools)
        for degree in words.degrees
        for width in words.widths
        for recompute in ((False, True) if words.recompute else (False,))
        if degree <= pool.node_size
        and degree * width <= pool.num_chips
        and microbatch % width == 0
        and (pool.chip, degree, microbatch // width) in problem.table.cells
    ]


def _slot(degree: int, node_size: int) -> int:
    """Return the chips of a node that stages of a degree take up each: of those that divide the node, the next one."""
    return next(size for size in range(degree, node_size + 1) if node_size % size == 0)


def _runs(values: Array) -> Array:
    """Return the sums over layers first..end-1.

    Shapes:
        values: (layers,).  returns: (layers + 1, layers + 1)
    """
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(prefix[None, :] - prefix[:, None])
