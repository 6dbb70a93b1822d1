"""Plan: which device runs which layers, and what that will cost; a value that prints, saves, loads and diffs.

Pure: no torch, no clock, no network, no files. `planner.py` makes plans; `plan_file.py` is their YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hybrid.scheduler import plan_file
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: its layers, its device, and what is predicted for one microbatch."""

    stage: int
    rank: int
    island: str
    chip: str
    backend: str
    first_layer: int
    end_layer: int
    """One past the last layer."""
    forward_s: float
    backward_s: float
    memory_bytes: int
    """Predicted peak: parameters with their optimizer state, activations in flight, buffers of the edges."""
    memory_limit_bytes: int

    @property
    def layers(self) -> range:
        """The stage's layers."""
        return range(self.first_layer, self.end_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgePlan:
    """The edge from a stage to the next one; the gradient comes back over it with the same size."""

    from_stage: int
    to_stage: int
    size_bytes: int
    """Of one microbatch's activation."""
    transfer_s: float
    """From the start of a send to its arrival."""
    latency_s: float
    """The part of `transfer_s` in which the link is free for another message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job's placement and its predicted step."""

    job: str
    model: str
    num_layers: int
    schedule: str
    num_microbatches: int
    microbatch: int
    """Samples in one."""
    precision: str
    source: str
    """Where the seconds come from, for example `analytic at efficiency 0.4, uncalibrated`."""
    step_s: float
    """Predicted: forwards, backwards and messages of one step; without the optimizer."""
    idle_share: float
    """Predicted mean share of the step in which a rank computes nothing."""
    stages: tuple[StagePlan, ...]
    edges: tuple[EdgePlan, ...]

    @property
    def num_stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.stages)

    @property
    def num_ranks(self) -> int:
        """How many devices take part."""
        return len({stage.rank for stage in self.stages})

    def build_schedule(self) -> Schedule:
        """Return the plan's compute-only schedule."""
        return build_schedule(self.schedule, self.num_stages, self.num_microbatches)

    def seconds_of(self, action: Action) -> float:
        """Return the predicted seconds of a compute action; the parts of a split backward take half each.

        Both parts are one matrix product a weight of the forward, so that halves are right where products
        dominate.
        """
        stage = self.stages[action.stage]
        if action.kind is Kind.F:
            return stage.forward_s
        return stage.backward_s if action.kind is Kind.B else stage.backward_s / 2

    def transfer_s(self, send: Action) -> float:
        """Return the predicted seconds of a message, by its SEND_F or SEND_B."""
        return self._edge_of(send).transfer_s

    def link_busy_s(self, send: Action) -> float:
        """Return how long a message keeps its link from taking another."""
        edge = self._edge_of(send)
        return edge.transfer_s - edge.latency_s

    def _edge_of(self, send: Action) -> EdgePlan:
        return self.edges[send.stage if send.kind is Kind.SEND_F else send.stage - 1]

    def simulate(self) -> Timeline:
        """Return the predicted step."""
        return simulate(
            self.build_schedule(),
            seconds_of=self.seconds_of,
            transfer_s=self.transfer_s,
            link_busy_s=self.link_busy_s,
        )

    def rows(self) -> list[dict[str, object]]:
        """Return one row of plain data a stage, for tables and JSON."""
        edge_of = {edge.from_stage: edge for edge in self.edges}
        idle = self.simulate().idle_share_of_rank
        rows: list[dict[str, object]] = []
        for stage in self.stages:
            row: dict[str, object] = {field.name: getattr(stage, field.name) for field in fields(stage)}
            edge = edge_of.get(stage.stage)
            row["idle_share"] = idle[stage.rank]
            row["send_bytes"] = edge.size_bytes if edge else 0
            row["send_s"] = edge.transfer_s if edge else 0.0
            rows.append(row)
        return rows

    def __str__(self) -> str:
        head = (
            f"{self.job}: {self.model}, {self.num_layers} layers in {self.num_stages} stages, "
            f"{self.schedule}, {self.num_microbatches} microbatches of {self.microbatch} in {self.precision}"
        )
        lines = [f"{'stage':>5} {'device':<20} {'layers':<9} {'F ms':>10} {'B ms':>10} {'memory GiB':>16} {'idle':>6}"]
        for stage, row in zip(self.stages, self.rows(), strict=True):
            memory = f"{stage.memory_bytes / 2**30:.3f}/{stage.memory_limit_bytes / 2**30:.1f}"
            lines.append(
                f"{stage.stage:>5} {f'{stage.island} {stage.chip}':<20} "
                f"{f'{stage.first_layer}-{stage.end_layer - 1}':<9} {stage.forward_s * 1e3:>10.4g} "
                f"{stage.backward_s * 1e3:>10.4g} {memory:>16} {row['idle_share']:>6.1%}"
            )
        foot = f"step {self.step_s * 1e3:.4g} ms, idle {self.idle_share:.1%} ({self.source})"
        return "\n".join([head, *lines, foot])

    def to_yaml(self) -> str:
        """Return the plan as YAML; `from_yaml` reads it back to an equal plan."""
        return plan_file.dump(self)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "plan") -> Plan:
        """Return the plan in a YAML text.

        Args:
            text: what `to_yaml` returned, maybe edited.
            where: file name for error messages.

        Raises:
            PlanError: no YAML, an unknown version, a key that is unknown, missing or of the wrong type, or
                parts that contradict one another; names the key.
        """
        return plan_file.check_consistent(plan_file.load(text, cls, where=where), where=where)

    def diff(self, other: Plan) -> list[str]:
        """Return what differs, one `key: this -> other` a line; empty when the plans are equal."""
        return _diff(plan_file.plain(self), plan_file.plain(other), "")


def _diff(this: Any, other: Any, key: str) -> list[str]:
    if isinstance(this, dict) and isinstance(other, dict):
        return [line for name in this for line in _diff(this[name], other[name], f"{key}.{name}".lstrip("."))]
    if isinstance(this, list) and isinstance(other, list):
        lines = [
            line
            for index, pair in enumerate(zip(this, other, strict=False))
            for line in _diff(*pair, f"{key}[{index}]")
        ]
        if len(this) != len(other):
            lines.append(f"{key}: {len(this)} entries -> {len(other)}")
        return lines
    return [] if this == other else [f"{key}: {this} -> {other}"]
