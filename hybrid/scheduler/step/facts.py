"""What a training step is made of: stages, messages, pipelines, reductions. Seconds and bytes; no chips, no layers.

Pure facts. Everything that is the same is said once: a stage of several ranks that do the same, and a pipeline of
which there are many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What each rank of a stage holds."""

    fixed_bytes: float = 0.0
    """Whatever it computes: the device's context, the libraries."""
    state_bytes: float = 0.0
    """Weights, gradients, optimizer state."""
    held_bytes: float = 0.0
    """What one microbatch's forward leaves for its backward."""
    kept_bytes: float | None = None
    """The part of it that the input gradient of a split backward does not free; None: all."""
    forward_bytes: float = 0.0
    """More, while a forward runs."""
    backward_bytes: float = 0.0
    """More, while a backward runs."""
    reduce_bytes: float = 0.0
    """More, while gradients are reduced and weights updated."""
    limit_bytes: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage of a pipeline: what one microbatch costs each of its ranks."""

    name: str
    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    update_s: float = 0.0
    """Of the optimizer, once a step."""
    num_ranks: int = 1
    """Ranks that do the same side by side: tensor-parallel degree times width."""
    memory: StageMemory = field(default_factory=StageMemory)
    usd_per_hour: float = 0.0
    """Of one rank."""
    watts: float = 0.0
    """Of one rank."""

    @property
    def backward_s(self) -> float:
        """Both parts of the backward."""
        return self.input_gradient_s + self.weight_gradient_s

    def seconds_of(self, kind: Kind) -> float:
        """Return the seconds of a compute action."""
        match kind:
            case Kind.F:
                return self.forward_s
            case Kind.I:
                return self.input_gradient_s
            case Kind.W:
                return self.weight_gradient_s
        return self.backward_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One microbatch's way over an edge, one direction."""

    transfer_s: float = 0.0
    """From the start of the send to the arrival, alone on its interfaces."""
    latency_s: float = 0.0
    """The part of it in which the interfaces are free for another message."""
    sender_s: float = 0.0
    """How long the sender computes nothing: 0 where communication overlaps with compute."""
    receiver_s: float = 0.0
    """How long the receiver computes nothing once the message is on its way: waiting for its bytes, unpacking."""
    interfaces: tuple[str, ...] = ()
    """What it occupies; messages of the pipeline that do so at the same time share the bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeCost:
    """The messages between a stage and the next one."""

    activation: Message = field(default_factory=Message)
    gradient: Message = field(default_factory=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """One replica of the model, and how many there are of exactly this kind.

    Shapes:
        stages: (stages,).  edges: (stages - 1,), behind each stage but the last.
    """

    name: str
    schedule: Schedule
    """Compute actions only."""
    stages: tuple[StageCost, ...]
    edges: tuple[EdgeCost, ...]
    samples: int
    """In one microbatch."""
    count: int = 1

    def __post_init__(self) -> None:
        if len(self.stages) != self.schedule.num_stages or len(self.edges) != len(self.stages) - 1:
            raise ScheduleError(
                f"pipeline {self.name} has {len(self.stages)} stages, {len(self.edges)} edges and a schedule of "
                f"{self.schedule.num_stages}"
            )
        if self.count < 1:
            raise ScheduleError(f"pipeline {self.name} exists {self.count} times", valid="1 or more")

    @property
    def num_devices(self) -> int:
        """Devices of one replica; stages that share a rank share its devices."""
        return sum(self.ranks_of_rank)

    @property
    def ranks_of_rank(self) -> tuple[int, ...]:
        """How many identical devices stand for each rank of the schedule."""
        counts = [0] * self.schedule.num_ranks
        for stage, rank in zip(self.stages, self.schedule.rank_of_stage, strict=True):
            counts[rank] = max(counts[rank], stage.num_ranks)
        return tuple(counts)

    @property
    def samples_per_step(self) -> int:
        """Of all replicas of the kind."""
        return self.samples * self.schedule.num_microbatches * self.count

    def message_of(self, send: Action) -> Message:
        """Return the message of a SEND_F or SEND_B."""
        if send.kind is Kind.SEND_F:
            return self.edges[send.stage].activation
        return self.edges[send.stage - 1].gradient

    def crosses(self, stage: int, other: int) -> bool:
        """Return whether two neighbouring stages are on different ranks."""
        ranks = self.schedule.rank_of_stage
        return 0 <= other < len(ranks) and ranks[stage] != ranks[other]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """Gradients that are summed over the replicas of some layers."""

    name: str
    members: tuple[tuple[int, int], ...]
    """(index of the pipeline, stage); every replica of the kind and every rank of the stage takes part."""
    seconds: float
    num_buckets: int = 1
    """More than one: buckets leave while the last backward still runs, as their layers' gradients get ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """One optimizer step of a whole fleet."""

    pipelines: tuple[Pipeline, ...]
    reductions: tuple[Reduction, ...] = ()
    tokens_per_sample: int = 1
    norm_s: float | None = None
    """Seconds of the global gradient norm, which every rank waits for before its update; None: nobody waits."""
    barrier: bool = True
    """Whether the next step starts when the last rank is done; without, each rank starts when it can."""
    source: str = "given"
    """Where the seconds come from."""

    def __post_init__(self) -> None:
        for reduction in self.reductions:
            for pipeline, stage in reduction.members:
                if not (0 <= pipeline < len(self.pipelines) and 0 <= stage < len(self.pipelines[pipeline].stages)):
                    raise ScheduleError(f"reduction {reduction.name} has no such member", value=(pipeline, stage))

    @property
    def num_devices(self) -> int:
        """Devices of all replicas."""
        return sum(pipeline.num_devices * pipeline.count for pipeline in self.pipelines)

    @property
    def tokens(self) -> int:
        """Tokens that the step trains on."""
        return sum(pipeline.samples_per_step for pipeline in self.pipelines) * self.tokens_per_sample


def chain(stages: tuple[StageCost, ...]) -> tuple[EdgeCost, ...]:
    """Return edges that cost nothing."""
    return tuple(EdgeCost() for _ in pairwise(stages))


def blocked_seconds(pipeline: Pipeline) -> Callable[[Action], tuple[float, float]]:
    """Return a function of a compute action: the seconds that messages block its rank before it and after it."""
    table: dict[tuple[int, Kind], tuple[float, float]] = {}
    for stage in range(len(pipeline.stages)):
        before, after = pipeline.crosses(stage, stage - 1), pipeline.crosses(stage, stage + 1)
        receive_f = pipeline.edges[stage - 1].activation.receiver_s if before else 0.0
        send_f = pipeline.edges[stage].activation.sender_s if after else 0.0
        receive_b = pipeline.edges[stage].gradient.receiver_s if after else 0.0
        send_b = pipeline.edges[stage - 1].gradient.sender_s if before else 0.0
        table[stage, Kind.F] = (receive_f, send_f)
        table[stage, Kind.B] = table[stage, Kind.I] = (receive_b, send_b)
        table[stage, Kind.W] = (0.0, 0.0)
    return lambda action: table[action.stage, action.kind]
