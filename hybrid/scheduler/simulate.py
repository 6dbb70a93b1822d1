"""The simulator: executes a schedule on paper and says when each action runs.

Pure: no torch, no clock, no network. What it models: each rank runs its actions in order, one at a time; a
forward waits for the activation, a backward for the gradient; sending takes no time from the sender's
compute. What it does not: the cost of posting a receive, of copying, or of the processor that runs it all.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import COMPUTE, Action, Kind, Schedule
from hybrid.scheduler.timeline import Span, Timeline, Transfer

_F, _B, _W = range(3)
_PRODUCT_OF_KIND = {Kind.F: _F, Kind.B: _B, Kind.I: _B, Kind.W: _W}


def no_seconds(action: Action) -> float:
    """Return zero: a transfer that takes no time."""
    return 0.0


def simulate(
    schedule: Schedule,
    *,
    seconds_of: Callable[[Action], float],
    transfer_s: Callable[[Action], float] = no_seconds,
    link_busy_s: Callable[[Action], float] = no_seconds,
) -> Timeline:
    """Return when each action of the schedule runs.

    Without communication in the schedule a message leaves when the action that makes it ends; with it, when
    the rank reaches the send.

    Args:
        schedule: compute actions, with or without communication.
        seconds_of: seconds of a compute action (F, B, I, W).
        transfer_s: seconds from the start of a send to its arrival, by its SEND_F or SEND_B action.
        link_busy_s: the part of it (without latency) in which the link from rank to rank takes no other
            message.

    Raises:
        ScheduleError: the ranks wait for one another; names each waiting rank, its action and what it waits
            for.

    Cost:
        O(actions).
    """
    return _Execution(schedule, seconds_of, transfer_s, link_busy_s).run()


class _Execution:
    """One run: how far each rank is, what exists since when, and who waits for what."""

    def __init__(
        self,
        schedule: Schedule,
        seconds_of: Callable[[Action], float],
        transfer_s: Callable[[Action], float],
        link_busy_s: Callable[[Action], float],
    ) -> None:
        self.schedule = schedule
        self.seconds_of, self.transfer_s, self.link_busy_s = seconds_of, transfer_s, link_busy_s
        self.has_messages = any(
            a.kind not in COMPUTE for actions in schedule.actions_of_rank for a in actions
        )
        self.next_of_rank = [0] * schedule.num_ranks
        self.now_of_rank = [0.0] * schedule.num_ranks
        self.spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
        self.transfers: list[Transfer] = []
        # A product is (kind, stage, microbatch); the time is when the stage that needs it next has it.
        self.made_s: dict[tuple[int, int, int], float] = {}
        self.arrived_s: dict[tuple[int, int, int], float] = {}
        self.waiting: dict[tuple[int, int, int], int] = {}
        self.link_free_s: dict[tuple[int, int], float] = {}
        self.ready = list(range(schedule.num_ranks))[::-1]

    def run(self) -> Timeline:
        while self.ready:
            self._advance(self.ready.pop())
        if any(
            index < len(a) for index, a in zip(self.next_of_rank, self.schedule.actions_of_rank, strict=True)
        ):
            raise self._deadlock()
        return Timeline(
            schedule=self.schedule,
            spans_of_rank=tuple(map(tuple, self.spans)),
            transfers=tuple(self.transfers),
        )

    def _advance(self, rank: int) -> None:
        """Run a rank until it is done or waits for another."""
        actions = self.schedule.actions_of_rank[rank]
        while (index := self.next_of_rank[rank]) < len(actions):
            action = actions[index]
            if action.kind in COMPUTE:
                start_s = self._start(action, rank)
                if start_s is None:
                    return
                end_s = start_s + self.seconds_of(action)
                self.now_of_rank[rank] = end_s
                self.spans[rank].append(Span(action, start_s, end_s))
                self._make(action, rank, end_s)
            elif action.kind is Kind.SEND_F or action.kind is Kind.SEND_B:
                self._send(action, rank)
            self.next_of_rank[rank] = index + 1

    def _start(self, action: Action, rank: int) -> float | None:
        """Return when an action can start; None, and the rank put down as waiting, when that is unknown."""
        stage, microbatch = action.stage, action.microbatch
        start_s = self.now_of_rank[rank]
        for table, product in self._inputs(action.kind, stage, microbatch):
            at_s = table.get(product)
            if at_s is None:
                self.waiting[product] = rank
                return None
            start_s = max(start_s, at_s)
        return start_s

    def _inputs(
        self, kind: Kind, stage: int, microbatch: int
    ) -> list[tuple[dict[tuple[int, int, int], float], tuple[int, int, int]]]:
        if kind is Kind.F:
            return [(self.arrived_s, (_F, stage - 1, microbatch))] if stage else []
        if kind is Kind.W:
            return [(self.made_s, (_B, stage, microbatch))]
        own = (self.made_s, (_F, stage, microbatch))
        if stage == self.schedule.num_stages - 1:
            return [own]
        return [own, (self.arrived_s, (_B, stage + 1, microbatch))]

    def _make(self, action: Action, rank: int, end_s: float) -> None:
        product = (_PRODUCT_OF_KIND[action.kind], action.stage, action.microbatch)
        self.made_s[product] = end_s
        if action.kind is Kind.W:
            return
        target = action.stage + 1 if action.kind is Kind.F else action.stage - 1
        if not 0 <= target < self.schedule.num_stages:
            return
        if self.schedule.rank_of_stage[target] == rank:
            self._arrive(product, end_s)
        elif not self.has_messages:
            kind = Kind.SEND_F if action.kind is Kind.F else Kind.SEND_B
            self._send(Action(action.stage, kind, action.microbatch), rank)

    def _send(self, send: Action, rank: int) -> None:
        forward = send.kind is Kind.SEND_F
        peer = self.schedule.rank_of_stage[send.stage + 1 if forward else send.stage - 1]
        link = (rank, peer)
        start_s = max(self.now_of_rank[rank], self.link_free_s.get(link, 0.0))
        end_s = start_s + self.transfer_s(send)
        self.link_free_s[link] = start_s + self.link_busy_s(send)
        self.transfers.append(Transfer(send, rank, peer, start_s, end_s))
        self._arrive((_F if forward else _B, send.stage, send.microbatch), end_s)

    def _arrive(self, product: tuple[int, int, int], at_s: float) -> None:
        self.arrived_s[product] = at_s
        rank = self.waiting.pop(product, None)
        if rank is not None:
            self.ready.append(rank)

    def _deadlock(self) -> ScheduleError:
        waits = []
        for (kind, stage, microbatch), rank in sorted(self.waiting.items(), key=lambda item: item[1]):
            action = self.schedule.actions_of_rank[rank][self.next_of_rank[rank]]
            what = "activation" if kind == _F else "gradient"
            waits.append(
                f"rank {rank} at {action} waits for the {what} of stage {stage}, microbatch {microbatch}"
            )
        return ScheduleError("the ranks wait for one another: " + "; ".join(waits), value=self.schedule.name)
