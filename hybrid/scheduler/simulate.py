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

_NOT_YET = -1.0


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
        transfer_s: seconds from the start of a send to its arrival, by its SEND_F or SEND_B action; minus
            infinity for a message whose time is not waited for.
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
    """One run: how far each rank is, and since when each stage has what.

    In the tables stage s, microbatch m stands at `s * num_microbatches + m`; below zero is not yet.
    """

    def __init__(
        self,
        schedule: Schedule,
        seconds_of: Callable[[Action], float],
        transfer_s: Callable[[Action], float],
        link_busy_s: Callable[[Action], float],
    ) -> None:
        self.schedule = schedule
        self.seconds_of, self.transfer_s, self.link_busy_s = seconds_of, transfer_s, link_busy_s
        self.has_messages = any(a.kind not in COMPUTE for row in schedule.actions_of_rank for a in row)
        self.next_of_rank = [0] * schedule.num_ranks
        self.now_of_rank = [0.0] * schedule.num_ranks
        self.is_blocked = [False] * schedule.num_ranks
        self.ready = list(range(schedule.num_ranks))[::-1]
        self.spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
        self.transfers: list[Transfer] = []
        self.link_free_s: dict[tuple[int, int], float] = {}
        width = schedule.num_microbatches
        size = schedule.num_stages * width
        # The first stage has its inputs from the start, and the last one the gradients of the loss.
        self.input_s = [0.0] * width + [_NOT_YET] * (size - width)
        self.output_gradient_s = [_NOT_YET] * (size - width) + [0.0] * width
        self.is_forward_done = [False] * size
        self.is_backward_done = [False] * size

    def run(self) -> Timeline:
        while self.ready:
            self._advance(self.ready.pop())
        if any(self.is_blocked):
            raise self._deadlock()
        spans = tuple(map(tuple, self.spans))
        return Timeline(schedule=self.schedule, spans_of_rank=spans, transfers=tuple(self.transfers))

    def _advance(self, rank: int) -> None:
        """Run a rank until it is done or waits for another."""
        actions, spans = self.schedule.actions_of_rank[rank], self.spans[rank]
        width = self.schedule.num_microbatches
        index, now_s = self.next_of_rank[rank], self.now_of_rank[rank]
        while index < len(actions):
            action = actions[index]
            kind = action.kind
            if kind in COMPUTE:
                place = action.stage * width + action.microbatch
                ready_s = self._ready_s(kind, place)
                if ready_s < 0.0:
                    break
                start_s = now_s if now_s > ready_s else ready_s
                now_s = start_s + self.seconds_of(action)
                spans.append(Span(action, start_s, now_s))
                self._hand_on(action, place, rank, now_s)
            elif kind is Kind.SEND_F or kind is Kind.SEND_B:
                self._send(action, rank, now_s)
            index += 1
        self.next_of_rank[rank], self.now_of_rank[rank] = index, now_s
        self.is_blocked[rank] = index < len(actions)

    def _ready_s(self, kind: Kind, place: int) -> float:
        """Return since when a compute action has all that it needs, or `_NOT_YET`."""
        if kind is Kind.F:
            return self.input_s[place]
        if kind is Kind.W:
            return 0.0 if self.is_backward_done[place] else _NOT_YET
        return self.output_gradient_s[place] if self.is_forward_done[place] else _NOT_YET

    def _hand_on(self, action: Action, place: int, rank: int, now_s: float) -> None:
        """Give a product to the stage that needs it: at once on the same rank, else by a message."""
        width, rank_of_stage = self.schedule.num_microbatches, self.schedule.rank_of_stage
        if action.kind is Kind.F:
            self.is_forward_done[place] = True
            if action.stage + 1 < len(rank_of_stage):
                if rank_of_stage[action.stage + 1] == rank:
                    self.input_s[place + width] = now_s
                elif not self.has_messages:
                    self._send(Action(action.stage, Kind.SEND_F, action.microbatch), rank, now_s)
        elif action.kind is not Kind.W:
            self.is_backward_done[place] = True
            if action.stage > 0:
                if rank_of_stage[action.stage - 1] == rank:
                    self.output_gradient_s[place - width] = now_s
                elif not self.has_messages:
                    self._send(Action(action.stage, Kind.SEND_B, action.microbatch), rank, now_s)

    def _send(self, send: Action, rank: int, now_s: float) -> None:
        table, target = self.input_s, send.stage + 1
        if send.kind is Kind.SEND_B:
            table, target = self.output_gradient_s, send.stage - 1
        peer = self.schedule.rank_of_stage[target]
        start_s = max(now_s, self.link_free_s.get((rank, peer), 0.0))
        end_s = max(0.0, start_s + self.transfer_s(send))
        self.link_free_s[rank, peer] = start_s + self.link_busy_s(send)
        self.transfers.append(Transfer(send, rank, peer, start_s, end_s))
        table[target * self.schedule.num_microbatches + send.microbatch] = end_s
        if self.is_blocked[peer]:
            self.is_blocked[peer] = False
            self.ready.append(peer)

    def _deadlock(self) -> ScheduleError:
        waits = []
        for rank, actions in enumerate(self.schedule.actions_of_rank):
            if self.is_blocked[rank]:
                action = actions[self.next_of_rank[rank]]
                waits.append(f"rank {rank} at {action} waits for {self._missing(action)}")
        return ScheduleError("the ranks wait for one another: " + "; ".join(waits), value=self.schedule.name)

    def _missing(self, action: Action) -> str:
        place = action.stage * self.schedule.num_microbatches + action.microbatch
        if action.kind is Kind.W:
            return f"its own {Action(action.stage, Kind.I, action.microbatch)}"
        if action.kind is not Kind.F and not self.is_forward_done[place]:
            return f"its own {Action(action.stage, Kind.F, action.microbatch)}"
        what, source = ("activation", -1) if action.kind is Kind.F else ("gradient", 1)
        return f"the {what} of stage {action.stage + source}, microbatch {action.microbatch}"
