"""The job's `diloco` section: replicas that train by themselves and meet every so many steps.

Parsed as a part of `JobConfig`; may import only `config_base`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hybrid.config_base import Count, Frozen, Positive, PositiveReal, Share


class DiLoCoConfig(Frozen):
    """Low-communication training between replicas; without this section, gradients are reduced at every step."""

    every_steps: Positive = 20
    """Steps that a replica trains by itself between two meetings of a layer."""
    warmup_steps: Annotated[Count, Field(ge=0)] = 0
    """First steps of the job, after each of which all replicas meet and are averaged."""
    learning_rate: PositiveReal = 0.7
    """Of the outer step; the inner one is `optimizer`."""
    momentum: Share = 0.5
    """Of the outer step, Nesterov's. Long runs (hundreds of meetings) bear 0.9; over a few tens of meetings so much
    overshoots."""
    num_fragments: Positive = 1
    """Parts of the model that meet at different steps, so that the link is used evenly."""
    overlap_steps: Annotated[Count, Field(ge=0)] = 0
    """Steps that go on while a meeting is under way; its result is taken in this much later."""
    mixing: Share = 0.5
    """With an overlap: the share of a replica's own weights in what it goes on with."""
    codec: Literal["none", "bf16", "fp8", "int4"] = "fp8"
    """How outer gradients travel; what one loses is added to the next."""

    @model_validator(mode="after")
    def _meetings_do_not_overtake(self) -> DiLoCoConfig:
        if self.overlap_steps >= self.every_steps:
            raise ValueError(
                f"overlap_steps {self.overlap_steps} is not below every_steps {self.every_steps}; "
                f"valid: overlap_steps 0 to {self.every_steps - 1}"
            )
        if self.num_fragments > self.every_steps:
            raise ValueError(
                f"num_fragments {self.num_fragments} is more than every_steps {self.every_steps}; "
                f"valid: num_fragments 1 to {self.every_steps}"
            )
        return self
