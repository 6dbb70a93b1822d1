"""What the pipeline benchmark computes: models, cuts, microbatches and paces, as data. No torch, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.config import ModelConfig
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.schedules import build_placed_schedule, parse_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One model, its cut and a step's microbatches; the same for every arm. Float32, random tokens."""

    name: str
    model: ModelConfig
    microbatch: int
    num_microbatches: int
    first_layer_of_stage: tuple[int, ...]
    """0 first."""
    seed: int = 1234
    schedule: str = "1f1b"
    """A name of `SCHEDULE_NAMES`; our ranks run it."""
    rank_of_stage: tuple[int, ...] = ()
    """Empty: one stage a rank."""
    order: tuple[str, ...] = ()
    """Of each rank its compute actions, for `auto`."""

    @property
    def num_stages(self) -> int:
        """How many stages the pipelines cut the model into."""
        return len(self.first_layer_of_stage)

    @property
    def layout(self) -> tuple[int, ...]:
        """Each stage's rank."""
        return self.rank_of_stage or tuple(range(self.num_stages))

    @property
    def num_ranks(self) -> int:
        """How many ranks the stages lie on."""
        return max(self.layout) + 1

    def build_schedule(self) -> Schedule:
        """Return the compute actions."""
        if self.order:
            return parse_order(self.order, self.schedule, self.layout, self.num_microbatches)
        return build_placed_schedule(self.schedule, self.layout, self.num_microbatches)

    def layers(self, stage: int) -> range:
        """Return the layers of a stage."""
        ends = (*self.first_layer_of_stage[1:], self.model.num_layers)
        return range(self.first_layer_of_stage[stage], ends[stage])

    @property
    def activation_bytes(self) -> int:
        """What one microbatch sends forward over a cut, and back again as its gradient."""
        return self.microbatch * self.model.sequence_length * self.model.hidden_size * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of each stage's forward and backward; both parts of a split backward take half of it."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    def seconds_of(self, action: Action) -> float:
        """Return the seconds of a compute action."""
        if action.kind is Kind.F:
            return self.forward_s[action.stage]
        return self.backward_s[action.stage] / (1 if action.kind is Kind.B else 2)


COMPUTE_HEAVY = Workload(
    name="compute_heavy",
    model=ModelConfig(
        num_blocks=4,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=704,
        vocab_size=512,
        sequence_length=128,
        tied_embeddings=False,
    ),
    microbatch=2,
    num_microbatches=4,
    first_layer_of_stage=(0, 3),
)
"""Four blocks; 0.25 MiB over the cut for about 50 ms of compute on each side."""

COMM_HEAVY = Workload(
    name="comm_heavy",
    model=ModelConfig(
        num_blocks=1,
        hidden_size=64,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=64,
        vocab_size=300,
        sequence_length=64,
        tied_embeddings=False,
    ),
    microbatch=64,
    num_microbatches=8,
    first_layer_of_stage=(0, 2),
)
"""The least compute that the decoder can do for an activation's byte: one narrow block, the smallest vocabulary."""

_NUM_EMULATED = 8
TINY = Workload(
    name="tiny",
    model=ModelConfig(
        num_blocks=_NUM_EMULATED - 2,
        hidden_size=16,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=32,
        vocab_size=300,
        sequence_length=16,
        tied_embeddings=False,
    ),
    microbatch=1,
    num_microbatches=12,
    first_layer_of_stage=tuple(range(_NUM_EMULATED)),
)
"""One layer a stage: next to no compute of its own, so that eight paced ranks fit two cores."""

EVEN = Pace(forward_s=(0.025,) * _NUM_EMULATED, backward_s=(0.050,) * _NUM_EMULATED)
UNEVEN = Pace(
    forward_s=(0.015, 0.030, 0.020, 0.010, 0.025, 0.015, 0.030, 0.020),
    backward_s=(0.030, 0.055, 0.045, 0.020, 0.050, 0.035, 0.055, 0.040),
)
