"""JobConfig: the one job file, parsed and checked once, at the edge.

Frozen pydantic models that refuse unknown keys. The only file that reads `os.environ` and the only
one that imports pydantic. What can be checked from the job alone is checked here; what needs the catalog, the
corpus or the cluster is checked by those. May import only `errors`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hybrid.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["fp32", "bf16", "fp64"]
ScheduleName = Literal["1f1b", "gpipe"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """A Llama-style decoder: embedding, `num_blocks` blocks, final norm and head."""

    num_blocks: Positive = 8
    hidden_size: Positive = 256
    num_heads: Positive = 8
    num_kv_heads: Positive = 4
    intermediate_size: Positive = 704
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    sequence_length: Annotated[int, Field(ge=2)] = 128
    tied_embeddings: bool = True
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

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
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} (hidden_size / num_heads) must be even for rotary embedding")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class DataConfig(_Frozen):
    """Where the text comes from."""

    source: Literal["python-stdlib", "text"] = "python-stdlib"
    path: Path | None = None
    """A text file, or a folder of text files; only with `source: text`."""
    pattern: str = "**/*.txt"
    """Which files of a folder are read."""
    held_out_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    max_bytes: Positive = 8_000_000
    """The corpus is cut here, at a file's end."""

    @model_validator(mode="after")
    def _path_goes_with_text(self) -> DataConfig:
        if (self.path is None) != (self.source == "python-stdlib"):
            raise ValueError("give `path` with `source: text`, and only with it")
        return self


class OptimizerConfig(_Frozen):
    """AdamW with warm-up and cosine decay, clipped by the global gradient norm."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    min_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class BatchConfig(_Frozen):
    """Samples in one optimizer step, and in one microbatch."""

    global_batch: Positive = 32
    microbatch: Positive = 4

    @property
    def num_microbatches(self) -> int:
        """Microbatches in one step."""
        return self.global_batch // self.microbatch

    @model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.global_batch % self.microbatch:
            divisors = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of microbatch {self.microbatch}; "
                f"valid microbatch: {', '.join(map(str, divisors))}"
            )
        return self


class IslandConfig(_Frozen):
    """Devices that share a scale-up fabric."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    device: str
    """A chip or a system of the catalog: `trn2`, `h100`, `trn2.48xlarge`, `cpu`, …"""
    count: Positive = 1
    """How many of `device`."""
    site: str = "local"
    backend: Literal["auto", "cpu", "emulated"] = "auto"
    """`auto`: `cpu` for the chip `cpu`, `emulated` for every other chip."""
    memory_bytes: Positive | None = None
    """Overrides the catalog's memory of one chip."""
    speed: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies the catalog's speed, for a slower or faster specimen."""


class LinkConfig(_Frozen):
    """The link between two islands, or inside one (`between: [a, a]`)."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: Annotated[float, Field(gt=0)]
    latency_s: Annotated[float, Field(ge=0)] = 0.0


class FleetConfig(_Frozen):
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
            raise ValueError(f"island named twice: {', '.join(twice)}")
        for link in self.links:
            unknown = sorted(set(link.between) - set(names))
            if unknown:
                raise ValueError(f"link names unknown island {', '.join(unknown)}; valid: {', '.join(names)}")
        return self


class CheckpointConfig(_Frozen):
    """When the state is written, and how many are kept."""

    every_steps: Positive | None = None
    keep: Positive = 2
    at_end: bool = True


class EvaluateConfig(_Frozen):
    """Held-out loss, over the same samples each time."""

    every_steps: Positive | None = None
    num_microbatches: Positive = 8
    at_end: bool = True


class RuntimeConfig(_Frozen):
    """How the job runs, not what it computes."""

    placement: Literal["ray", "threads"] = "ray"
    """`ray`: one process a rank; `threads`: all ranks in this process, for tests and debugging."""
    transport: Literal["zmq", "inproc"] = "zmq"
    zmq_medium: Literal["ipc", "tcp"] = "tcp"
    threads_per_rank: Positive = 1
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """The longest silence of a peer that is waited out."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 1.0
    placement_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    coordinator_port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """0 takes a free port."""

    @model_validator(mode="after")
    def _inproc_is_one_process(self) -> RuntimeConfig:
        if self.transport == "inproc" and self.placement != "threads":
            raise ValueError("transport `inproc` joins threads of one process; set placement: threads, or transport: zmq")
        return self


class EmulationConfig(_Frozen):
    """How emulated chips keep their pace."""

    time_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Wall seconds for one second of the real chip; `auto` takes the smallest at which this machine keeps up."""
    pace: bool = True
    """False computes as fast as this machine can."""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the catalog's peak that the cost table assumes."""


class JobConfig(_Frozen):
    """One training job."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "job"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    steps: Positive = 100
    precision: Precision = "fp32"
    schedule: ScheduleName = "1f1b"
    num_stages: Positive | None = None
    """Default: one stage a chip."""
    fleet: FleetConfig | Literal["ray"]
    """`ray` discovers the devices of the cluster at `--address`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    emulation: EmulationConfig = EmulationConfig()
    runs_dir: Path = Path("runs")

    @field_validator("fleet", mode="before")
    @classmethod
    def _fleet_word(cls, value: object) -> object:
        # Without this, pydantic reports each branch of the union and buries the cause.
        if isinstance(value, str) and value != "ray":
            raise ValueError(f"fleet {value!r} is neither a mapping with `islands` nor the word `ray`")
        return FleetConfig.model_validate(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _stages_have_layers(self) -> JobConfig:
        if self.num_stages is not None and self.num_stages > self.model.num_layers:
            raise ValueError(
                f"num_stages {self.num_stages} is more than the model's {self.model.num_layers} layers "
                f"(embedding + {self.model.num_blocks} blocks + head); valid: 1 to {self.model.num_layers}"
            )
        return self


def load_job(path: Path) -> JobConfig:
    """Return the job in a YAML file; its relative paths are taken from the file's folder.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a wrong value; names file, key, value and valid ones.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such job file", value=str(path), fix="give the path of a job.yaml; see examples/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file cannot be read: {error}", where=str(path), fix="give a UTF-8 YAML file") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"job file is not YAML: {problem}", where=f"{path}{line}", fix="mend that line") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            "job file holds no mapping", where=str(path), valid=JobConfig.model_fields, fix="see examples/"
        )
    return parse_job(raw, where=str(path), base=path.parent)


def parse_job(raw: dict[str, object], *, where: str = "job", base: Path | None = None) -> JobConfig:
    """Return the job that a mapping describes; see `load_job`."""
    try:
        job = JobConfig.model_validate(raw)
    except ValidationError as error:
        raise _config_error(error, where) from None
    return job if base is None else _anchored(job, base)


def dump_job(job: JobConfig) -> str:
    """Return the job as YAML that `load_job` reads back equal."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)


def environment(name: str, default: str | None = None) -> str | None:
    """Return an environment variable; nothing else in the package reads the environment."""
    return os.environ.get(name, default)


def cache_dir() -> Path:
    """Return where token files are cached: $HYBRID_CACHE, else $XDG_CACHE_HOME/hybrid, else ~/.cache/hybrid."""
    own = environment("HYBRID_CACHE")
    if own:
        return Path(own)
    return Path(environment("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"


def _anchored(job: JobConfig, base: Path) -> JobConfig:
    """Anchor the job's input paths to the folder of its file (a run folder stays relative to where one stands)."""
    if job.data.path is not None and not job.data.path.is_absolute():
        job = job.model_copy(update={"data": job.data.model_copy(update={"path": base / job.data.path})})
    if isinstance(job.fleet, FleetConfig) and job.fleet.catalog is not None and not job.fleet.catalog.is_absolute():
        fleet = job.fleet.model_copy(update={"catalog": base / job.fleet.catalog})
        job = job.model_copy(update={"fleet": fleet})
    return job


def _config_error(error: ValidationError, where: str) -> ConfigError:
    """Turn pydantic's first complaint into one sentence, with the valid keys where a key is unknown."""
    first = error.errors(include_url=False)[0]
    key = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("function", "FleetConfig", "literal"))
    )
    place = f"{where}: {key}" if key else where
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        parent = _model_at(first["loc"][:-1])
        name = first["loc"][-1]
        valid = parent.model_fields if parent else None
        return ConfigError(f"unknown key{more}", value=str(name), valid=valid, where=place, fix="rename or remove it")
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    shown = value if isinstance(value, str | int | float | bool | None) else None
    return ConfigError(f"{message}{more}", value=shown, where=place, fix="mend that key")


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the config class at a pydantic error's location."""
    model: type[BaseModel] | None = JobConfig
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(str(part))
        model = _model_in(field.annotation) if field else model
    return model


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the config class inside an annotation such as `tuple[IslandConfig, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
