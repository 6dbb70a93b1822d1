"""Control messages between the coordinator and the workers: frozen values with one codec.

On the wire a message is a msgpack map `{"v": version, "t": type, …fields}`; anything else is a ProtocolError.
Nothing is unpickled. No message carries a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

from hybrid.errors import ProtocolError
from hybrid.wire import pack, unpack

CONTROL_VERSION = 2
MAX_CONTROL_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlAddress:
    """Where and how a worker reaches the coordinator; travels to it inside the launcher's own channel."""

    endpoint: str
    server_key: bytes
    token: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Worker: I am here, and peers reach me at `address`."""

    rank: int
    token: bytes
    pid: int
    host: str
    address: str
    native_address: str = ""
    """Where the ranks of my stages open their native group; empty where I am not their first, or they have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Worker: my stages are built and warm; a kind of action (`2F`: stage 2's forward) -> what it costs this CPU."""

    rank: int
    seconds_of: Mapping[str, float]
    allocated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Worker: one of my functions is compiled, `done` of `total` are."""

    rank: int
    name: str
    done: int
    total: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Worker: I live."""

    rank: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Worker: I have done this step; `loss` is what this rank adds to the step's loss, None where it adds nothing."""

    rank: int
    step: int
    loss: float | None
    grad_norm: float
    learning_rate: float
    seconds: float
    busy_s: float
    overrun_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Worker of the last stage: held-out loss after `steps_done` steps."""

    rank: int
    steps_done: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    """Worker: my layers of this checkpoint are written; file name -> [size_bytes, sha256]."""

    rank: int
    steps_done: int
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Worker: I can't go on."""

    rank: int
    error: str
    """Class name."""
    text: str
    traceback: str
    exit_code: int
    is_consequence: bool
    """True when a peer's loss caused it, so that the root cause is looked for elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Worker: every step is done."""

    rank: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Coordinator: everyone is here; open your edges."""

    address_of_rank: Mapping[str, str]
    native_address_of_rank: Mapping[str, str] = field(default_factory=dict)
    """Of the first ranks of stages that open a native group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Coordinator: go; emulated chips take `time_scale` wall seconds for one of their own."""

    time_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Coordinator: I live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Coordinator: stop now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Coordinator: all is done; leave in order."""


Message: TypeAlias = (
    Hello
    | Ready
    | Compiled
    | Heartbeat
    | StepReport
    | EvalReport
    | CheckpointPart
    | Fault
    | Finished
    | Welcome
    | Start
    | Alive
    | Abort
    | Shutdown
)
_TYPES: Mapping[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Hello,
        Ready,
        Compiled,
        Heartbeat,
        StepReport,
        EvalReport,
        CheckpointPart,
        Fault,
        Finished,
        Welcome,
        Start,
        Alive,
        Abort,
        Shutdown,
    )
}
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    # True is an int to Python, and no rank.
    "int": lambda x: type(x) is int,
    "float": lambda x: type(x) in (int, float),
    "str": lambda x: type(x) is str,
    "bytes": lambda x: type(x) is bytes,
    "bool": lambda x: type(x) is bool,
    "float | None": lambda x: x is None or type(x) in (int, float),
    "Mapping[str, str]": lambda x: type(x) is dict and all(type(v) is str for v in x.values()),
    "Mapping[str, float]": lambda x: (
        type(x) is dict and all(type(k) is str and type(v) in (int, float) for k, v in x.items())
    ),
    "Mapping[str, tuple[int, str]]": lambda x: (
        type(x) is dict and all(type(v) is tuple and tuple(map(type, v)) == (int, str) for v in x.values())
    ),
}


def encode(message: Message) -> bytes:
    """Return the message's bytes."""
    return pack({"v": CONTROL_VERSION, "t": type(message).__name__, **asdict(message)})


def decode(data: bytes) -> Message:
    """Return the message in `data`.

    Raises:
        ProtocolError: too large, no msgpack map, another version, an unknown type, or fields that do not fit it.
    """
    raw = unpack(data, max_bytes=MAX_CONTROL_BYTES)
    if not isinstance(raw, dict):
        raise ProtocolError("control message is no map", value=type(raw).__name__)
    version = raw.get("v")
    if type(version) is not int or version != CONTROL_VERSION:
        raise ProtocolError(
            "control message of another version",
            value=str(version)[:80],
            valid=[CONTROL_VERSION],
            fix="run the same release on every node",
        )
    kind = raw.get("t")
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError("control message of unknown type", value=str(kind)[:80], valid=_TYPES)
    values = {key: value for key, value in raw.items() if key not in ("v", "t")}
    wanted = {each.name: str(each.type) for each in fields(cls)}
    if values.keys() != wanted.keys():
        raise ProtocolError(f"{kind} has the wrong fields", value=sorted(values)[:20], valid=wanted)
    for name, type_name in wanted.items():
        if not _CHECKS[type_name](values[name]):
            raise ProtocolError(f"{kind}.{name} is not {type_name}", value=str(values[name])[:80])
    message: Message = cls(**values)
    return message
