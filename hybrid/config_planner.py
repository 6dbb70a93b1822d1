"""The job's `planner` section: what a plan is chosen for, what it must keep to, and what may be chosen.

Parsed as a part of `JobConfig`; may import only `config_base`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hybrid.config_base import Count, Frozen, Positive, PositiveReal, Share

Objective = Literal["throughput", "usd_per_token", "joules_per_token", "deadline"]
PlannedSchedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto"]
Codec = Literal["none", "bf16", "fp8"]


class PlannerConfig(Frozen):
    """What a plan is chosen for, what it must keep to, and what may be chosen; without this section, one stage a chip.

    What the job pins stays pinned: `num_stages`, and `schedule` and `batch.microbatch` unless a list here opens them.
    """

    objective: Objective = "throughput"
    """`deadline`: the cheapest plan that is done in `deadline_s`."""
    min_tokens_per_s: PositiveReal | None = None
    max_usd_per_hour: PositiveReal | None = None
    """Of the chips used, with what leaves a site."""
    max_watts: PositiveReal | None = None
    """Of the chips used, at their rated power."""
    deadline_s: PositiveReal | None = None
    """Seconds in which all of the job's `steps` must be done."""
    profile: Path | None = None
    """A `hybrid-profile` (JSON) with each layer's seconds, measured or imported; without, data sheets."""
    links: Path | None = None
    """A `hybrid-links` (JSON) to take every link from; without, the fleet's."""
    schedules: tuple[PlannedSchedule, ...] | Literal["any"] | None = None
    """To choose from, a replica its own; `null`: the job's `schedule`."""
    microbatches: Annotated[tuple[Positive, ...], Field(min_length=1)] | Literal["any"] | None = None
    """To choose from, a replica its own; `any`: what divides `global_batch`, in powers of two; `null`: the job's."""
    max_replicas: Positive | None = None
    """`null`: as many as are best."""
    max_stages: Annotated[Count, Field(gt=0, le=64)] = 16
    tensor_parallel: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """Degrees to choose from, a stage its own; never over more than one node."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """Chips that may share out a stage's microbatch, to choose from."""
    recompute: bool = False
    """A stage may keep only its input and run its forward again."""
    codecs: Annotated[tuple[Codec, ...], Field(min_length=1)] = ("none",)
    """Permitted on edges; `bf16` and `fp8` lose digits, and are taken only where they shorten the step."""
    memory_margin: Share = 0.05
    """Share of a chip's memory that stays free."""
    fixed_bytes: Annotated[Count, Field(ge=0)] = 0
    """Of each chip, whatever it holds: context, libraries."""
    bytes_per_parameter: PositiveReal | None = None
    """Weight, gradient and optimizer state; `null`: what the job's precision and AdamW take."""

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> PlannerConfig:
        if self.schedules == ():
            raise ValueError("schedules is empty; valid: names, any, or null")
        if self.objective == "deadline" and self.deadline_s is None:
            raise ValueError("objective deadline needs deadline_s; valid: seconds above 0")
        return self
