"""What a rank does in one step, as data: actions that print as text, and schedules made of them.

Pure: no torch, no clock, no network. `schedules.py` builds compute actions, `lowering.py` adds
communication, `simulate.py` runs a schedule on paper, and the worker runs the same actions for real.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from hybrid.errors import ScheduleError


class Kind(StrEnum):
    """What an action does to one microbatch of one stage."""

    F = "F"
    """Forward."""
    B = "B"
    """Whole backward: gradients of the inputs and of the weights."""
    I = "I"  # noqa: E741 - the field's letter (torch.distributed.pipelining)
    """Backward of the inputs only."""
    W = "W"
    """Backward of the weights only; follows its I."""
    RECV_F = "RECV_F"
    """Post the receive of this stage's input activation."""
    SEND_F = "SEND_F"
    """Start sending this stage's output activation to the next stage."""
    RECV_B = "RECV_B"
    """Post the receive of the gradient of this stage's output."""
    SEND_B = "SEND_B"
    """Start sending the gradient of this stage's input to the stage before."""


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
_PATTERN = re.compile(r"([0-9]+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)([0-9]+)")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One action; prints as `2F0`: stage 2, forward, microbatch 0."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that prints as `text`.

        Raises:
            ScheduleError: the text is no action.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ScheduleError("no such action", value=text, valid="<stage><kind><microbatch>, like 2F0 or 1SEND_F3")
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The actions of every rank for one step, in order.

    A stage is a contiguous run of layers; `rank_of_stage[s]` holds it. With one stage a rank the two
    numbers are the same; interleaved schedules put several stages on a rank.
    """

    name: str
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    actions_of_rank: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.rank_of_stage)

    @property
    def num_ranks(self) -> int:
        """How many ranks take part."""
        return len(self.actions_of_rank)

    def __str__(self) -> str:
        return "\n".join(
            f"rank {rank}: " + " ".join(map(str, actions)) for rank, actions in enumerate(self.actions_of_rank)
        )
