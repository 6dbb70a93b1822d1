"""Plan: which devices run which layers of which replica, in which order, and what that will cost.

A value that prints, saves, loads and diffs. Pure: no torch, no clock, no network, no files. `planner.py` makes plans;
`plan_file.py` is their YAML and `plan_check.py` says when their parts agree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from hybrid.errors import PlanError, ScheduleError
from hybrid.scheduler import plan_check, plan_file
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.schedules import build_placed_schedule, parse_order
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of a replica: its layers, the ranks that hold it, and what is predicted for one microbatch."""

    stage: int
    """Its place in its replica's pipeline."""
    ranks: tuple[int, ...]
    """The job's ranks that hold it together, `tensor_parallel * width` of them: copy after copy, in each the
    tensor-parallel ranks in order. Stages of one replica may name the same ranks in the same order."""
    island: str
    chip: str
    backend: str
    first_layer: int
    end_layer: int
    """One past the last layer."""
    tensor_parallel: int
    """Over how many ranks each weight is split."""
    width: int
    """How many copies share out each microbatch's samples."""
    recompute: bool
    """Keeps only its input and runs its forward again before each backward."""
    forward_s: float
    backward_s: float
    """The whole backward; with `recompute` the second forward too."""
    weight_gradient_s: float
    """The part of `backward_s` that makes the weights' gradients, where the schedule splits it off."""
    memory_bytes: int
    """Predicted, of one rank: what this stage takes of its rank's peak: parameters with their optimizer state,
    activations in flight, buffers of the edges."""
    memory_limit_bytes: int
    """Of one rank; the stages of a rank share it."""

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
    """Of one microbatch's activation, as it travels."""
    transfer_s: float
    """From the start of a send to its arrival."""
    latency_s: float
    """The part of `transfer_s` in which the link is free for another message."""
    codec: str
    """What travels: `none` (the compute format), `bf16` or `fp8`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One copy of the whole model as a pipeline, and its share of the global batch."""

    replica: int
    schedule: str
    order: tuple[str, ...]
    """Of each pipeline rank its compute actions as text (`0F0 0F1 0B0`), where the schedule's name does not say them;
    else empty."""
    num_microbatches: int
    microbatch: int
    """Samples in one."""
    first_sample: int
    """Where its share of the global batch starts."""
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
    def num_samples(self) -> int:
        """Its share of the global batch."""
        return self.num_microbatches * self.microbatch

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The pipeline's ranks: each the job's ranks that hold the same stages, in the order of their first stage."""
        return tuple(dict.fromkeys(stage.ranks for stage in self.stages))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The job's ranks that belong to this replica, ascending."""
        return tuple(sorted(rank for group in self.groups for rank in group))

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        """Each stage's pipeline rank: an index into `groups`."""
        groups = self.groups
        return tuple(groups.index(stage.ranks) for stage in self.stages)

    def place_of_rank(self, rank: int) -> tuple[int, int]:
        """Return the pipeline rank that one of the job's ranks belongs to, and its place in that group."""
        own = next(index for index, group in enumerate(self.groups) if rank in group)
        return own, self.groups[own].index(rank)

    def build_schedule(self) -> Schedule:
        """Return the replica's compute-only schedule over its pipeline ranks.

        Raises:
            ScheduleError: the order is no schedule, or the stages do not lie as the named schedule needs them.
        """
        if self.order:
            return parse_order(self.order, self.schedule, self.rank_of_stage, self.num_microbatches)
        return build_placed_schedule(self.schedule, self.rank_of_stage, self.num_microbatches)

    def seconds_of(self, action: Action) -> float:
        """Return the predicted seconds of a compute action."""
        stage = self.stages[action.stage]
        match action.kind:
            case Kind.F:
                return stage.forward_s
            case Kind.B:
                return stage.backward_s
            case Kind.I:
                return stage.backward_s - stage.weight_gradient_s
            case Kind.W:
                return stage.weight_gradient_s
        raise ScheduleError("not a compute action", value=str(action))

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

    def predicted(self) -> ReplicaPlan:
        """Return the replica with the step and the idle share that its simulation gives."""
        timeline = self.simulate()
        return replace(self, step_s=timeline.step_s, idle_share=timeline.idle_share)

    def rows(self) -> list[dict[str, object]]:
        """Return one row of plain data a stage, for tables and JSON."""
        edge_of = {edge.from_stage: edge for edge in self.edges}
        idle, home = self.simulate().idle_share_of_rank, self.rank_of_stage
        rows: list[dict[str, object]] = []
        for stage in self.stages:
            row: dict[str, object] = {field.name: getattr(stage, field.name) for field in fields(stage)}
            edge = edge_of.get(stage.stage)
            row["replica"] = self.replica
            row["idle_share"] = idle[home[stage.stage]]
            row["send_bytes"] = edge.size_bytes if edge else 0
            row["send_s"] = edge.transfer_s if edge else 0.0
            rows.append(row)
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job's placement and its predicted step."""

    job: str
    model: str
    num_layers: int
    precision: str
    source: str
    """Where the seconds come from, for example `analytic at efficiency 0.4, uncalibrated`."""
    objective: str
    """What the plan was chosen for."""
    global_batch: int
    """Samples in one step, of all replicas."""
    gradient_codec: str
    """What travels of the gradients between replicas: `none` (float32), `bf16` or `fp8`."""
    step_s: float
    """Predicted: the slowest replica's step and the gradients' reduction; without the optimizer."""
    idle_share: float
    """Predicted mean share of the step in which a rank computes nothing."""
    replicas: tuple[ReplicaPlan, ...]

    @property
    def replica(self) -> ReplicaPlan:
        """The only replica, for callers that know only one.

        Raises:
            PlanError: the plan has another number of replicas.
        """
        if len(self.replicas) != 1:
            raise PlanError("not a plan of one replica", value=len(self.replicas), valid="1", fix="plan one replica")
        return self.replicas[0]

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """All replicas' stages, one replica after the other."""
        return tuple(stage for replica in self.replicas for stage in replica.stages)

    @property
    def num_ranks(self) -> int:
        """How many devices take part."""
        return len({rank for stage in self.stages for rank in stage.ranks})

    def replica_of_rank(self, rank: int) -> ReplicaPlan:
        """Return the replica to which one of the job's ranks belongs."""
        return next(replica for replica in self.replicas if rank in replica.ranks)

    def stages_of_rank(self, rank: int) -> tuple[StagePlan, ...]:
        """Return the stages that one of the job's ranks holds; all of one island, chip and backend."""
        return tuple(stage for stage in self.stages if rank in stage.ranks)

    def rows(self) -> list[dict[str, object]]:
        """Return one row of plain data a stage, for tables and JSON."""
        return [row for replica in self.replicas for row in replica.rows()]

    def __str__(self) -> str:
        lines = [f"{self.job}: {self.model}, {self.num_layers} layers in {self.precision}"]
        for replica in self.replicas:
            lines.append(
                f"replica {replica.replica}: {replica.num_stages} stages, {replica.schedule}, "
                f"{replica.num_microbatches} microbatches of {replica.microbatch}"
            )
            lines.append(
                f"{'stage':>5} {'device':<20} {'layers':<9} {'F ms':>10} {'B ms':>10} {'memory GiB':>16} {'idle':>6}"
            )
            lines += [_line(*pair) for pair in zip(replica.stages, replica.rows(), strict=True)]
        lines.append(f"step {self.step_s * 1e3:.4g} ms, idle {self.idle_share:.1%} ({self.source})")
        return "\n".join(lines)

    def to_yaml(self) -> str:
        """Return the plan as YAML; `from_yaml` reads it back to an equal plan."""
        return plan_file.dump(self)

    @classmethod
    def from_yaml(cls, text: str, *, where: str = "plan") -> Plan:
        """Return the plan in a YAML text.

        Args:
            text: what `to_yaml` returned, maybe edited; or version 1, which knew one replica.
            where: file name for error messages.

        Raises:
            PlanError: no YAML, an unknown version, a key that is unknown, missing or of the wrong type, or
                parts that contradict one another; names the key.
        """
        return plan_check.check_consistent(plan_file.load(text, cls, where=where), where=where)

    def diff(self, other: Plan) -> list[str]:
        """Return what differs, one `key: this -> other` a line; empty when the plans are equal."""
        return _diff(plan_file.plain(self), plan_file.plain(other), "")


def _line(stage: StagePlan, row: dict[str, object]) -> str:
    """Return a stage's line of the table."""
    memory = f"{stage.memory_bytes / 2**30:.3f}/{stage.memory_limit_bytes / 2**30:.1f}"
    count = f"{len(stage.ranks)}x " if len(stage.ranks) > 1 else ""
    return (
        f"{stage.stage:>5} {f'{stage.island} {count}{stage.chip}':<20} "
        f"{f'{stage.first_layer}-{stage.end_layer - 1}':<9} {stage.forward_s * 1e3:>10.4g} "
        f"{stage.backward_s * 1e3:>10.4g} {memory:>16} {row['idle_share']:>6.1%}"
    )


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
