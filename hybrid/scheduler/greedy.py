"""List scheduling: walk through time and let each free rank take what a policy says, within its memory.

Pure: no torch, no clock, no network. One policy gives one order; `auto.py` searches policies. What comes out
was executed while it was made, so it cannot deadlock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.pipeline_costs import PipelineCosts

_INF = math.inf
_EPS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a free rank chooses; every tuple has one value a rank.

    An input gradient that is ready goes first: others wait for it. A forward goes next, a weight gradient
    when memory asks for it or nothing else is ready.
    """

    hold: tuple[float, ...]
    """A forward may make a known gradient wait for at most this share of the forward's seconds."""
    first_hold: tuple[float, ...]
    """The same before the rank's first backward, where one more forward fills the wait."""
    overrun: tuple[float, ...]
    """A weight gradient may make a known input wait for at most this share of its own seconds."""
    most_in_flight: tuple[float, ...]
    """Microbatches of a stage between their F and their I."""
    saves_slack: bool
    """Wait rather than overrun, as long as another rank has been idle for longer: only the longest idle
    counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An order, and when it ends under the costs that it was made for."""

    actions_of_rank: tuple[tuple[tuple[int, Kind, int], ...], ...]
    step_s: float
    period_s: float

    def schedule(self, name: str, rank_of_stage: tuple[int, ...], num_microbatches: int) -> Schedule:
        """Return the order as a schedule."""
        return Schedule(
            name=name,
            num_microbatches=num_microbatches,
            rank_of_stage=rank_of_stage,
            actions_of_rank=tuple(tuple(Action(*key) for key in keys) for keys in self.actions_of_rank),
        )


def list_schedule(
    costs: PipelineCosts, num_microbatches: int, policy: Policy, *, cutoff_s: float = math.inf
) -> Outcome | None:
    """Return the order that the policy leads to.

    None where the ranks' memory blocks it for good, or as soon as it is certain that some rank's span is
    longer than `cutoff_s`.

    Cost:
        O(actions · log(ranks) + actions · stages a rank).
    """
    return _Walk(costs, num_microbatches, policy, cutoff_s).run()


class _Walk:
    """The state of one walk through time."""

    def __init__(self, costs: PipelineCosts, num_microbatches: int, policy: Policy, cutoff_s: float) -> None:
        self.policy, self.width = policy, num_microbatches
        self.forward_s, self.transfer_s = costs.forward_s, costs.transfer_s
        self.input_gradient_s, self.weight_gradient_s = costs.input_gradient_s, costs.weight_gradient_s
        self.held_bytes, self.kept_bytes = costs.held_bytes, costs.kept_bytes
        self.rank_of_stage = costs.rank_of_stage
        num_stages, num_ranks = costs.num_stages, costs.num_ranks
        # Deepest first: of two forwards (or gradients) that are ready, the one nearer to the loss goes on.
        self.stages_of_rank = [
            [stage for stage in reversed(range(num_stages)) if costs.rank_of_stage[stage] == rank]
            for rank in range(num_ranks)
        ]
        self.input_s = [[0.0 if stage == 0 else _INF] * num_microbatches for stage in range(num_stages)]
        self.gradient_s = [[_INF] * num_microbatches for _ in range(num_stages)]
        self.num_f, self.num_i, self.num_w = [0] * num_stages, [0] * num_stages, [0] * num_stages
        self.reserve = [self._reserve(stage) for stage in range(num_stages)]
        self.room = [limit * (1 + _EPS) for limit in costs.limit_bytes]
        self.now = [0.0] * num_ranks
        self.start: list[float | None] = [None] * num_ranks
        self.idle = [0.0] * num_ranks
        self.most_idle = 0.0
        self.idle_left = [cutoff_s - work_s * num_microbatches for work_s in costs.work_s_of_rank]
        self.is_cut = False
        self.last_stage = num_stages - 1
        self.owed: list[list[int]] = [[] for _ in range(num_ranks)]
        """Stages of the weight gradients that each rank has put off, oldest first."""
        self.num_paid = [0] * num_ranks
        self.order: list[list[tuple[int, Kind, int]]] = [[] for _ in range(num_ranks)]
        self.heap = [(0.0, rank) for rank in range(num_ranks)]

    def _reserve(self, stage: int) -> float:
        """Return what must stay free after a forward: room for its microbatch in the rank's later stages."""
        later = self.stages_of_rank[self.rank_of_stage[stage]]
        return sum(self.held_bytes[other] for other in later if other > stage)

    def run(self) -> Outcome | None:
        heap, now = self.heap, self.now
        while heap and not self.is_cut:
            time_s, rank = heappop(heap)
            if time_s >= now[rank]:
                self._decide(rank, time_s)
        if self.is_cut or any(count < self.width for count in self.num_w):
            return None
        return Outcome(
            actions_of_rank=tuple(map(tuple, self.order)),
            step_s=max(now),
            period_s=max(end_s - (start_s or 0.0) for end_s, start_s in zip(now, self.start, strict=True)),
        )

    def _decide(self, rank: int, time_s: float) -> None:
        """Start the rank's next action, or wake it when there may be one."""
        policy = self.policy
        next_gradient_s, gradient_stage = self._next_gradient(rank, time_s)
        if next_gradient_s <= time_s:
            return self._start(rank, time_s, Kind.I, gradient_stage)
        next_input_s, input_stage, is_full = self._next_input(rank, time_s)
        owed, num_paid = self.owed[rank], self.num_paid[rank]
        owed_stage = owed[num_paid] if num_paid < len(owed) else -1
        weight_s = self.weight_gradient_s[owed_stage] if owed_stage >= 0 else 0.0
        patience_s = policy.overrun[rank] * weight_s
        if next_input_s <= time_s:
            if is_full:
                if owed_stage >= 0 and time_s + weight_s <= next_gradient_s + patience_s:
                    return self._start(rank, time_s, Kind.W, owed_stage)
            else:
                hold = (policy.hold if self.owed[rank] else policy.first_hold)[rank]
                forward_s = self.forward_s[input_stage]
                if time_s + forward_s <= next_gradient_s + hold * forward_s:
                    return self._start(rank, time_s, Kind.F, input_stage)
        next_s = next_gradient_s
        if time_s < next_input_s < next_s and not is_full:
            next_s = next_input_s
        if owed_stage >= 0:
            is_wait_free = policy.saves_slack and self.idle[rank] + next_s - time_s <= self.most_idle
            if time_s + weight_s <= next_s + patience_s or not is_wait_free:
                return self._start(rank, time_s, Kind.W, owed_stage)
        if next_s < _INF:
            heappush(self.heap, (next_s, rank))
        return None

    def _next_gradient(self, rank: int, time_s: float) -> tuple[float, int]:
        """Return when the next input gradient can start, as far as is known, and of which stage."""
        best_s, best = _INF, -1
        for stage in self.stages_of_rank[rank]:
            microbatch = self.num_i[stage]
            if microbatch < self.num_f[stage]:
                at_s = self.gradient_s[stage][microbatch]
                if at_s < best_s:
                    best_s, best = at_s, stage
                    if at_s <= time_s:
                        break
        return best_s, best

    def _next_input(self, rank: int, time_s: float) -> tuple[float, int, bool]:
        """Return when the next forward can start, of which stage, and whether memory forbids it now."""
        most = self.policy.most_in_flight[rank]
        best_s, best, is_full = _INF, -1, False
        for stage in self.stages_of_rank[rank]:
            microbatch = self.num_f[stage]
            if microbatch >= self.width or microbatch - self.num_i[stage] >= most:
                continue
            at_s = self.input_s[stage][microbatch]
            has_room = self.held_bytes[stage] + self.reserve[stage] <= self.room[rank]
            # A forward that memory allows comes before an earlier one that it forbids.
            if (at_s < best_s and has_room) or (best < 0 and at_s < _INF) or (is_full and has_room and at_s < _INF):
                best_s, best, is_full = at_s, stage, not has_room
                if at_s <= time_s and has_room:
                    break
        return best_s, best, is_full

    def _start(self, rank: int, time_s: float, kind: Kind, stage: int) -> None:
        if self.start[rank] is None:
            self.start[rank] = time_s
        else:
            idle_s = self.idle[rank] + time_s - self.now[rank]
            self.idle[rank] = idle_s
            if idle_s > self.most_idle:
                self.most_idle = idle_s
            if idle_s > self.idle_left[rank]:
                self.is_cut = True
        if kind is Kind.F:
            end_s, microbatch = time_s + self.forward_s[stage], self.num_f[stage]
            self.num_f[stage] += 1
            self.room[rank] -= self.held_bytes[stage]
            if stage < self.last_stage:
                self._hand_on(rank, self.input_s[stage + 1], stage + 1, microbatch, end_s, self.transfer_s[stage])
            else:
                self.gradient_s[stage][microbatch] = end_s
        elif kind is Kind.I:
            end_s, microbatch = time_s + self.input_gradient_s[stage], self.num_i[stage]
            self.num_i[stage] += 1
            self.owed[rank].append(stage)
            self.room[rank] += self.held_bytes[stage] - self.kept_bytes[stage]
            if stage > 0:
                edge_s = self.transfer_s[stage - 1]
                self._hand_on(rank, self.gradient_s[stage - 1], stage - 1, microbatch, end_s, edge_s)
        else:
            end_s, microbatch = time_s + self.weight_gradient_s[stage], self.num_w[stage]
            self.num_w[stage] += 1
            self.num_paid[rank] += 1
            self.room[rank] += self.kept_bytes[stage]
        self.order[rank].append((stage, kind, microbatch))
        self.now[rank] = end_s
        heappush(self.heap, (end_s, rank))

    def _hand_on(
        self, rank: int, table: list[float], stage: int, microbatch: int, end_s: float, transfer_s: float
    ) -> None:
        peer = self.rank_of_stage[stage]
        if peer == rank:
            table[microbatch] = end_s
            return
        arrival_s = end_s + transfer_s
        table[microbatch] = arrival_s
        heappush(self.heap, (max(arrival_s, self.now[peer]), peer))
