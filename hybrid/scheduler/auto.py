"""The search for an order: many list-scheduling policies, the best of them varied, never worse than by hand.

Pure: no torch, no clock, no network; chance comes in as a seed, so that the same costs give the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from random import Random

from hybrid.errors import PlanError
from hybrid.scheduler.actions import Schedule
from hybrid.scheduler.greedy import Outcome, Policy, list_schedule
from hybrid.scheduler.interleaved import interleaved, round_layout
from hybrid.scheduler.pipeline_costs import PipelineCosts
from hybrid.scheduler.schedules import SCHEDULES
from hybrid.scheduler.zero_bubble import v_layout, zb_v

_FAR_BEHIND = 1.05
_NUM_KEPT = 6
"""How many of the best policies are varied."""
_PATIENCE = 60
"""Variations that may fail in a row before the search ends."""
_HOLDS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_OVERRUNS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)


def auto_schedule(
    costs: PipelineCosts,
    num_microbatches: int,
    *,
    barrier: bool = True,
    num_tries: int = 400,
    seed: int = 0,
) -> Schedule:
    """Return the fastest order found in which no rank holds more than its limit.

    Tried are every schedule by hand that has these stages on these ranks and fits, a grid of policies, and
    random variations of the best of them. The result is never slower than any schedule by hand that fits.

    Args:
        costs: stages may differ in everything.
        num_microbatches: microbatches in one step.
        barrier: True minimises the step from first start to last end (an optimizer that waits for all
            ranks); False the longest span of any one rank (steps follow one another with no barrier).
        num_tries: policies tried, the grid's included.
        seed: of the variations.

    Raises:
        PlanError: no order fits; says what the tightest rank lacks for a single microbatch, or that no order
            was found.
    """
    best_s, best = math.inf, None
    for schedule in fitting_by_hand(costs, num_microbatches):
        timeline = costs.simulate(schedule)
        seconds = timeline.step_s if barrier else timeline.period_s
        if seconds < best_s:
            best_s, best = seconds, schedule
    search = _Search(costs=costs, num_microbatches=num_microbatches, barrier=barrier, to_beat_s=best_s)
    found = search.run(num_tries, Random(seed))
    if found is not None and search.seconds(found) < best_s:
        return found.schedule("auto", costs.rank_of_stage, num_microbatches)
    if best is None:
        raise _misfit(costs)
    return replace(best, name="auto")


def fitting_by_hand(costs: PipelineCosts, num_microbatches: int) -> Iterator[Schedule]:
    """Yield the named schedules that have the costs' layout and fit its limits."""
    num_ranks = costs.num_ranks
    builders: list[Callable[[], Schedule]] = []
    if costs.rank_of_stage == tuple(range(num_ranks)):
        builders += [partial(build, num_ranks, num_microbatches) for build in SCHEDULES.values()]
    if costs.rank_of_stage == v_layout(num_ranks):
        builders.append(partial(zb_v, num_ranks, num_microbatches))
    stages_of_rank = [costs.rank_of_stage.count(rank) for rank in range(num_ranks)]
    if costs.rank_of_stage == round_layout(stages_of_rank) and max(stages_of_rank) > 1:
        builders.append(partial(interleaved, stages_of_rank, num_microbatches))
    for build in builders:
        schedule = build()
        if costs.fits(schedule):
            yield schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    costs: PipelineCosts
    num_microbatches: int
    barrier: bool
    to_beat_s: float
    """What the best schedule by hand takes."""

    def seconds(self, outcome: Outcome) -> float:
        """Return what is minimised."""
        return outcome.step_s if self.barrier else outcome.period_s

    def run(self, num_tries: int, random: Random) -> Outcome | None:
        """Return the best outcome of the grid and its variations."""
        floor_s = max(self.costs.work_s_of_rank) * self.num_microbatches
        tried: list[tuple[float, int, Policy, Outcome]] = []
        num_grid = 0
        for index, policy in enumerate(islice(self._grid(), num_tries)):
            num_grid += 1
            # What is far behind the best is not worth varying.
            cutoff_s = _FAR_BEHIND * min([self.to_beat_s, *(entry[0] for entry in tried)])
            outcome = list_schedule(self.costs, self.num_microbatches, policy, cutoff_s=cutoff_s)
            if outcome is not None:
                tried.append((self.seconds(outcome), index, policy, outcome))
        if not tried:
            return None
        kept = sorted(tried, key=lambda entry: entry[:2])[:_NUM_KEPT]
        best_s, _, _, best = kept[0]
        improved_at = 0
        for index in range(num_tries - num_grid):
            if best_s <= floor_s * (1 + 1e-9) or index - improved_at > _PATIENCE:
                break
            place = index % len(kept)
            policy = _varied(kept[place][2], self.costs.num_ranks, random)
            outcome = list_schedule(self.costs, self.num_microbatches, policy, cutoff_s=kept[place][0])
            # Equals are taken over too: they lead off a plateau.
            if outcome is not None and self.seconds(outcome) <= kept[place][0]:
                if self.seconds(outcome) < kept[place][0]:
                    improved_at = index
                kept[place] = (self.seconds(outcome), index, policy, outcome)
                if self.seconds(outcome) < best_s:
                    best_s, best = self.seconds(outcome), outcome
        return best

    def _grid(self) -> Iterator[Policy]:
        num_ranks = self.costs.num_ranks
        free = (math.inf,) * num_ranks
        most = max(self.costs.rank_of_stage.count(rank) for rank in range(num_ranks))
        as_1f1b = tuple(float(num_ranks - rank) for rank in range(num_ranks)) if most == 1 else free
        as_h2 = tuple(2.0 * (num_ranks - rank) - 1 for rank in range(num_ranks)) if most == 1 else free
        for hold in (0.6, 1.0, 0.3, 0.1):
            for in_flight in dict.fromkeys((free, as_h2, as_1f1b)):
                for saves_slack in (False, True):
                    for num_eager in (0, 2) if num_ranks > 2 else (0, 1):
                        yield Policy(
                            hold=(hold,) * num_ranks,
                            first_hold=(1.0,) * num_eager + (hold,) * (num_ranks - num_eager),
                            overrun=(0.0,) * num_ranks,
                            most_in_flight=in_flight,
                            saves_slack=saves_slack,
                        )


def _varied(policy: Policy, num_ranks: int, random: Random) -> Policy:
    """Return the policy with one or two of its values changed."""
    for _ in range(random.choice((1, 1, 2))):
        rank = random.randrange(num_ranks)
        match random.choice(("hold", "first_hold", "first_hold", "overrun", "overrun", "in_flight", "slack")):
            case "hold":
                policy = replace(policy, hold=_with(policy.hold, rank, random.choice(_HOLDS)))
            case "first_hold":
                policy = replace(policy, first_hold=_with(policy.first_hold, rank, random.choice(_HOLDS)))
            case "overrun":
                policy = replace(policy, overrun=_with(policy.overrun, rank, random.choice(_OVERRUNS)))
            case "in_flight":
                most = min(policy.most_in_flight[rank], 2.0 * num_ranks) + random.choice((-1, 1))
                policy = replace(policy, most_in_flight=_with(policy.most_in_flight, rank, max(1.0, most)))
            case _:
                policy = replace(policy, saves_slack=not policy.saves_slack)
    return policy


def _with(values: tuple[float, ...], index: int, value: float) -> tuple[float, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _misfit(costs: PipelineCosts) -> PlanError:
    """Return the error that says what the tightest rank lacks."""
    needed = [0.0] * costs.num_ranks
    for stage, rank in enumerate(costs.rank_of_stage):
        needed[rank] += costs.held_bytes[stage]
    lacks = [need - limit for need, limit in zip(needed, costs.limit_bytes, strict=True)]
    rank = max(range(costs.num_ranks), key=lacks.__getitem__)
    if lacks[rank] <= 0:
        return PlanError("no order of the actions fits the ranks' memory", fix="raise the limits or cut finer")
    return PlanError(
        f"one microbatch does not fit: rank {rank} lacks {lacks[rank]:,.0f} bytes",
        value=costs.limit_bytes[rank],
        fix=f"give rank {rank} {lacks[rank]:,.0f} bytes more, or a smaller microbatch",
    )
