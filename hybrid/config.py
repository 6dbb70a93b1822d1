"""JobConfig: the one job file, parsed and checked once, at the edge.

Frozen pydantic models that refuse unknown keys. The only file that reads `os.environ`. What can be checked from
the job alone is checked here; what needs the catalog, the corpus or the cluster is checked by those. May import only
`errors`, `complaints`, `marked_yaml` and the sections' `config_*` files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hybrid.complaints import Key, Place, complaint_of
from hybrid.config_base import Count, Frozen, Positive, Real, Share
from hybrid.config_diloco import DiLoCoConfig
from hybrid.config_planner import PlannerConfig

MAX_MICROBATCHES = 4096
"""In one step; each is planned, simulated and walked one by one."""

Precision = Literal["fp32", "bf16", "fp64"]
ScheduleName = Literal["1f1b", "gpipe", "zb-h1", "zb-h2", "interleaved", "zb-v", "auto"]


class ModelConfig(Frozen):
    """A Llama-style decoder: embedding, `num_blocks` blocks, final norm and head."""

    num_blocks: Annotated[Count, Field(gt=0, le=1024)] = 8
    hidden_size: Positive = 256
    num_heads: Annotated[Count, Field(gt=0, le=4096)] = 8
    num_kv_heads: Positive = 4
    intermediate_size: Positive = 704
    vocab_size: Annotated[Count, Field(ge=300)] = 4096
    sequence_length: Annotated[Count, Field(ge=2)] = 128
    tied_embeddings: bool = True
    rope_theta: Annotated[Real, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-5

    @property
    def num_layers(self) -> int:
        """Layers that a split may part: the embedding, the blocks, the head."""
        return self.num_blocks + 2

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                f"valid: hidden_size {self._around(self.hidden_size, 2 * self.num_heads)}"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head size {self.head_size} (hidden_size / num_heads) is odd, which rotary embedding cannot turn; "
                f"valid: hidden_size {self._around(self.hidden_size, 2 * self.num_heads)}"
            )
        if self.num_heads % self.num_kv_heads:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                f"valid: num_kv_heads {divisors}"
            )
        return self

    @staticmethod
    def _around(size: int, step: int) -> str:
        """Return the multiples of `step` next to a size."""
        below, above = size // step * step, -(-size // step) * step
        return f"{below} or {above}" if below else str(above)


class DataConfig(Frozen):
    """Where the text comes from."""

    source: Literal["python-stdlib", "text"] = "python-stdlib"
    path: Path | None = None
    """A text file, or a folder of text files; only with `source: text`."""
    pattern: str = "**/*.txt"
    """Which files of a folder are read."""
    held_out_share: Annotated[Real, Field(gt=0.0, lt=0.5)] = 0.02
    max_bytes: Positive = 8_000_000
    """The corpus is cut here, at a file's end."""

    @model_validator(mode="after")
    def _path_goes_with_text(self) -> DataConfig:
        if (self.path is None) != (self.source == "python-stdlib"):
            raise ValueError("`path` goes with `source: text`, and only with it; valid: both, or neither")
        return self


class OptimizerConfig(Frozen):
    """AdamW with warm-up and cosine decay, clipped by the global gradient norm."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-3
    min_learning_rate_share: Annotated[Real, Field(ge=0, le=1)] = 0.1
    warmup_steps: Annotated[Count, Field(ge=0)] = 10
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    clip_norm: Annotated[Real, Field(gt=0)] | None = 1.0


class BatchConfig(Frozen):
    """Samples in one optimizer step, and in one microbatch."""

    global_batch: Annotated[Count, Field(gt=0, le=1_000_000)] = 32
    microbatch: Positive = 4

    @property
    def num_microbatches(self) -> int:
        """Microbatches in one step."""
        return self.global_batch // self.microbatch

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.global_batch % self.microbatch:
            divisors = ", ".join(str(n) for n in range(1, self.global_batch + 1) if self.global_batch % n == 0)
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of microbatch {self.microbatch}; "
                f"valid: microbatch {divisors}"
            )
        if self.num_microbatches > MAX_MICROBATCHES:
            raise ValueError(
                f"global_batch {self.global_batch} is {self.num_microbatches} microbatches of {self.microbatch}; "
                f"valid: at most {MAX_MICROBATCHES} microbatches in a step"
            )
        return self


class IslandConfig(Frozen):
    """Devices that share a scale-up fabric."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    device: str
    """A chip or a system of the catalog: `trn2`, `h100`, `trn2.48xlarge`, `cpu`, …"""
    count: Annotated[Count, Field(gt=0, le=1_000_000)] = 1
    """How many of `device`."""
    site: str = "local"
    backend: Literal["auto", "cpu", "emulated", "cuda", "neuron"] = "auto"
    """`auto`: `cpu` for the chip `cpu`, `emulated` for every other; discovery names the backend of a device it saw."""
    memory_bytes: Positive | None = None
    """Overrides the catalog's memory of one chip."""
    speed: Annotated[Real, Field(gt=0)] = 1.0
    """Multiplies the catalog's speed, for a slower or faster specimen."""


class LinkConfig(Frozen):
    """The link between two islands, or inside one (`between: [a, a]`)."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: Annotated[Real, Field(gt=0)]
    latency_s: Annotated[Real, Field(ge=0)] = 0.0


class FleetConfig(Frozen):
    """The devices of the job."""

    islands: Annotated[tuple[IslandConfig, ...], Field(min_length=1)]
    links: tuple[LinkConfig, ...] = ()
    catalog: Path | None = None
    """A YAML file whose rows are laid over the shipped catalog's."""

    @model_validator(mode="after")
    def _names(self) -> FleetConfig:
        names = [island.name for island in self.islands]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"island {', '.join(twice)} is named twice; valid: a name of its own for each")
        for link in self.links:
            unknown = sorted(set(link.between) - set(names))
            if unknown:
                raise ValueError(f"link names unknown island {', '.join(unknown)}; valid: {', '.join(names)}")
        return self


class CheckpointConfig(Frozen):
    """When the state is written, and how many are kept."""

    every_steps: Positive | None = None
    keep: Positive = 2
    at_end: bool = True


class EvaluateConfig(Frozen):
    """Held-out loss, over the same samples each time."""

    every_steps: Positive | None = None
    num_microbatches: Positive = 8
    at_end: bool = True


class RuntimeConfig(Frozen):
    """How the job runs, not what it computes."""

    placement: Literal["ray", "threads"] = "ray"
    """`ray`: one process a rank; `threads`: all ranks in this process, for tests and debugging."""
    transport: Literal["tcp", "zmq", "shm", "inproc"] = "tcp"
    """What carries tensors between ranks. `tcp` and `zmq` encrypt what leaves the host, and `tcp` is the faster of the
    two; `shm`: shared memory, for ranks of one host; `inproc`: for threads."""
    zmq_medium: Literal["ipc", "tcp"] = "tcp"
    threads_per_rank: Positive = 1
    timeout_s: Annotated[Real, Field(gt=0)] | Literal["auto"] = "auto"
    """The longest wait for a peer; `auto` follows the waits that were observed, 30 s to 10 min, 60 s at first."""
    heartbeat_s: Annotated[Real, Field(gt=0)] = 1.0
    placement_timeout_s: Annotated[Real, Field(gt=0)] = 60.0
    sequence_parallel: bool = True
    """Where several ranks hold each weight's parts, share out the tokens between norms among them too."""
    compile: bool = False
    """Run stages through torch.compile on `cuda` and `neuron`, ahead of the first step."""
    compile_timeout_s: Annotated[Real, Field(gt=0)] = 1800.0
    """The longest that all ranks' compilations may take."""
    compile_cache: Path | None = None
    """Folder of compiled graphs, on each node; None leaves the vendor's default."""
    stochastic_rounding: bool = False
    """On Trainium, round bf16 by chance, seeded by the job's seed."""
    coordinator_port: Annotated[Count, Field(ge=0, lt=65536)] = 0
    """0 takes a free port."""

    @property
    def fixed_timeout_s(self) -> float | None:
        """The user's own limit of a wait, or None where it is derived."""
        return None if self.timeout_s == "auto" else self.timeout_s

    @property
    def setup_timeout_s(self) -> float:
        """The limit of waits before anything was observed: to meet, to be ready, to leave."""
        return 60.0 if self.timeout_s == "auto" else self.timeout_s

    @property
    def medium(self) -> str:
        """The name of the transport's variant."""
        return f"zmq-{self.zmq_medium}" if self.transport == "zmq" else self.transport

    @model_validator(mode="after")
    def _inproc_is_one_process(self) -> RuntimeConfig:
        if self.transport == "inproc" and self.placement != "threads":
            raise ValueError(
                "transport inproc joins threads of one process; valid: placement threads, or transport tcp"
            )
        return self


class NumericsConfig(Frozen):
    """How the chips of one island multiply matrices; accumulation is fp32."""

    matmul: Literal["fp32", "tf32", "bf16", "fp8"]
    """Format of a linear layer's inputs; `fp8` takes the chip's own encoding and one scale a tensor."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """`stochastic` is seeded by the job's seed."""


class EmulationConfig(Frozen):
    """How emulated chips keep their pace, and their numbers."""

    time_scale: Annotated[Real, Field(gt=0)] | Literal["auto"] = "auto"
    """Wall seconds for one second of the real chip; `auto` takes the smallest at which this machine keeps up."""
    pace: bool = True
    """False computes as fast as this machine can."""
    efficiency: Annotated[Real, Field(gt=0, le=1)] = 0.4
    """Share of the catalog's peak that the cost table assumes."""
    numerics: dict[str, NumericsConfig] = {}  # noqa: RUF012 - a pydantic default is copied
    """By an island's name: how its linear layers compute; an island that is not named computes in `precision`."""


class JobConfig(Frozen):
    """One training job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "job"
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 1234
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    diloco: DiLoCoConfig | None = None
    batch: BatchConfig = BatchConfig()
    steps: Positive = 100
    precision: Precision = "fp32"
    schedule: ScheduleName = "1f1b"
    """The last three put several stages on a rank, or may; see docs/schedules.md."""
    num_stages: Positive | None = None
    """Of all ranks together; default: what all chips hold."""
    stages_per_rank: Positive | tuple[Positive, ...] | None = None
    """One number for all, or one a rank; default: 2 for `interleaved` and `zb-v`, else 1."""
    fleet: FleetConfig | Literal["ray"]
    """`ray` discovers the devices of the cluster at `--address`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    emulation: EmulationConfig = EmulationConfig()
    planner: PlannerConfig | None = None
    """How a plan is chosen; without it, one stage a chip on `schedule`."""
    runs_dir: Path = Path("runs")

    @field_validator("fleet", mode="before")
    @classmethod
    def _fleet_word(cls, value: object) -> object:
        # Without this, pydantic reports each branch of the union and buries the cause.
        if isinstance(value, dict):
            return FleetConfig.model_validate(value)
        if value == "ray" or isinstance(value, FleetConfig):
            return value
        raise ValueError("not a fleet; valid: a mapping with islands, links, catalog, or the word ray")

    @model_validator(mode="after")
    def _parts_fit(self) -> JobConfig:
        numerics = self.emulation.numerics
        names = [island.name for island in self.fleet.islands] if isinstance(self.fleet, FleetConfig) else numerics
        strange = sorted(numerics.keys() - names)
        if strange:
            raise ValueError(f"emulation.numerics names no island: {strange[0]}; valid: {', '.join(names)}")
        if self.num_stages is not None and self.num_stages > self.model.num_layers:
            raise ValueError(
                f"num_stages {self.num_stages} is more than the model's {self.model.num_layers} layers "
                f"(embedding + {self.model.num_blocks} blocks + head); valid: 1 to {self.model.num_layers}"
            )
        if self.diloco is not None and self.diloco.num_fragments > self.model.num_layers:
            raise ValueError(
                f"diloco.num_fragments {self.diloco.num_fragments} is more than the model's {self.model.num_layers} "
                f"layers; valid: 1 to {self.model.num_layers}"
            )
        return self


def parse_job(raw: Mapping[str, object], *, where: str | Place = "job") -> JobConfig:
    """Return the job that a mapping describes; see `hybrid.job_file.load_job`. Relative paths stay as they are.

    Args:
        where: names the mapping's origin in errors, by itself or for a key.
    """
    return _parsed(raw, (lambda key: f"{where}: {dotted(key)}") if isinstance(where, str) else where)


def dump_job(job: JobConfig) -> str:
    """Return the job as YAML that `hybrid.job_file.load_job` reads back equal."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)


def environment(name: str, default: str | None = None) -> str | None:
    """Return an environment variable; nothing else in the package reads the environment."""
    return os.environ.get(name, default)


def set_environment(variables: Mapping[str, str]) -> None:
    """Set variables of this process's environment, for libraries that read them when they are first imported."""
    os.environ.update(variables)


def cache_dir() -> Path:
    """Return where token files are cached: $HYBRID_CACHE, else $XDG_CACHE_HOME/hybrid, else ~/.cache/hybrid."""
    own = environment("HYBRID_CACHE")
    if own:
        return Path(own)
    return Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"


def _parsed(raw: Mapping[str, object], place: Place) -> JobConfig:
    try:
        return JobConfig.model_validate(raw)
    except ValidationError as error:
        raise complaint_of(error.errors(include_url=False), JobConfig, place) from None


def dotted(key: Key) -> str:
    """Return a key's place in the job as one writes it: `batch.microbatch`."""
    return ".".join(map(str, key)) or "job"
