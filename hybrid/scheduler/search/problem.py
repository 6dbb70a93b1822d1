"""The problem: a model's table, pools of chips, links, a batch, a vocabulary of choices, an objective, limits.

Pure facts, checked once when they are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.schedules import SCHEDULE_NAMES
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.table import ProfileTable

OBJECTIVES = ("throughput", "usd_per_token", "joules_per_token")
STEP_LAWS = ("simulated", "sailor")
CODECS = ("none", "bf16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Chips of one kind at one site, in nodes of one size; planned as a number."""

    name: str
    chip: str
    num_chips: int
    node_size: int
    memory_bytes: int
    """Of one chip."""
    site: str = "local"
    usd_per_hour: float = 0.0
    """Of one chip."""
    watts: float = 0.0
    """Of one chip."""

    @property
    def names(self) -> tuple[str, str]:
        """What a link may call it."""
        return self.name, self.chip


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """What a chip must hold."""

    bytes_per_parameter: float
    """Weight, gradient and optimizer state."""
    fixed_bytes: float = 0.0
    """Whatever the stage: context, libraries."""
    fixed_bytes_split: float | None = None
    """The same where the tensor-parallel degree is above 1; None: `fixed_bytes`."""
    margin: float = 0.05
    """Share of the chip that stays free."""
    counts_buffers: bool = True
    """Count the edges' buffers: two inputs and one output on each side."""
    capped_by_microbatches: bool = True
    """A stage never holds more microbatches than the step has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the search may choose from."""

    degrees: tuple[int, ...] = (1, 2, 4, 8)
    """Tensor-parallel degrees of a stage; a stage never leaves its node."""
    widths: tuple[int, ...] = (1,)
    """Data-parallel degrees inside a stage: chips that share out each microbatch's samples."""
    microbatches: tuple[int, ...] = (1, 2, 4, 8)
    recompute: bool = True
    """A stage may keep only its input and run its forward again before each backward."""
    schedules: tuple[str, ...] = ("1f1b",)
    """A replica has one of them; see `orders.py` for which are searched and which are tried on what was found."""
    codecs: tuple[str, ...] = ("none",)
    """What may travel on an edge."""
    max_stages: int = 16
    num_stages: int | None = None
    """Every replica has exactly so many."""
    max_replicas: int | None = None
    step_law: str = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan must keep to; None: anything goes."""

    min_tokens_per_s: float | None = None
    max_usd_per_hour: float | None = None
    max_watts: float | None = None
    deadline_s: float | None = None
    total_tokens: float | None = None
    """To be trained on before `deadline_s`."""

    @property
    def wanted_tokens_per_s(self) -> float:
        """The throughput that the limits ask for, 0 without one."""
        rate = self.min_tokens_per_s or 0.0
        if self.deadline_s is not None and self.total_tokens is not None:
            rate = max(rate, self.total_tokens / self.deadline_s)
        return rate


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that decides a plan."""

    table: ProfileTable
    pools: tuple[Pool, ...]
    network: Network
    global_batch: int
    """Samples in a step."""
    memory: MemoryModel
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    objective: str = "throughput"
    limits: Limits = field(default_factory=Limits)
    reduce_bucket_bytes: float = float("inf")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise PlanError("no such objective", value=self.objective, valid=OBJECTIVES, fix="name one of these")
        if self.vocabulary.step_law not in STEP_LAWS:
            raise PlanError("no such step law", value=self.vocabulary.step_law, valid=STEP_LAWS)
        self._check_words()
        if self.global_batch < 1:
            raise PlanError("the global batch is below one", value=self.global_batch, valid="1 or more")
        if (self.limits.deadline_s is None) != (self.limits.total_tokens is None):
            raise PlanError("a deadline needs deadline_s and total_tokens", fix="give both or neither")
        if not self.pools:
            raise FleetError("the fleet has no chip", fix="add a pool")
        for pool in self.pools:
            if pool.num_chips < 1 or pool.node_size < 1 or pool.memory_bytes <= 0:
                raise FleetError(f"pool {pool.name} has no chips, no node or no memory", fix="give numbers above zero")
            if pool.chip not in self.table.chips:
                raise PlanError(
                    f"the profile has no chip {pool.chip}, and pool {pool.name} has {pool.num_chips} of them",
                    value=pool.chip,
                    valid=self.table.chips,
                    fix=f"add one cell or more for {pool.chip} to the profile, or leave its {pool.num_chips} chips out",
                )
        if self.objective != "throughput":
            price = "usd_per_hour" if self.objective == "usd_per_token" else "watts"
            for pool in self.pools:
                if getattr(pool, price) <= 0:
                    fix = f"give a {price} above zero"
                    raise FleetError(f"pool {pool.name} has no {price}, and {self.objective} is asked for", fix=fix)

    def _check_words(self) -> None:
        words = self.vocabulary
        for given, known, what in ((words.schedules, SCHEDULE_NAMES, "schedule"), (words.codecs, CODECS, "codec")):
            strange = [name for name in given if name not in known]
            if strange or not given:
                raise PlanError(f"no such {what}", value=strange or given, valid=known, fix="name one or more of these")
        deepest = min(words.max_stages, self.table.num_layers)
        if words.num_stages is not None and not 1 <= words.num_stages <= deepest:
            valid = f"1 to {deepest}"
            raise PlanError("num_stages is out of reach", value=words.num_stages, valid=valid, fix="change num_stages")

    @property
    def num_chips(self) -> int:
        """Of all pools."""
        return sum(pool.num_chips for pool in self.pools)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.global_batch * self.table.sequence_length

    def with_pools(self, pools: Iterable[Pool]) -> Problem:
        """Return the problem on other chips."""
        return replace(self, pools=tuple(pools))

    def link(self, a: Pool, b: Pool, lanes: int = 1, other_lanes: int = 1) -> LinkModel | None:
        """Return the link between chips of two pools, or None where there is none."""
        return self.network.find(a.names, b.names, lanes, other_lanes)
