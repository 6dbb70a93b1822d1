"""The error tree: every error that a user of `hybrid` can meet, and whose fault it is.

    HybridError
    ├── UserError               what the user handed us is wrong; exit code 2
    │   ├── ConfigError         the job file
    │   ├── FleetError          the fleet, a catalog row, a link
    │   ├── PlanError           no plan fits the job on the fleet
    │   ├── DataError           the corpus, the tokenizer, the token file
    │   ├── CheckpointError     a checkpoint that is missing, cut or of another model
    │   ├── MachineError        this machine: a taken port, a package or a cluster that is not there
    │   └── TrainingDiverged    the loss or a gradient is no longer finite
    ├── DeviceError             a device refuses
    │   ├── DeviceOutOfMemory   (also a torch.OutOfMemoryError where torch raised it)
    │   └── UnsupportedFormat   a number format that the chip does not have
    ├── CommError               a peer or the wire
    │   ├── PeerLost            the peer has gone; rebuild the edge or the group
    │   ├── CommTimeout         the peer was silent for too long
    │   └── ProtocolError       bytes that no honest peer sends
    ├── ScheduleError           a schedule that deadlocks or computes the wrong thing: our fault
    └── WorkerFailed            a worker ended before its job did; exit code 1

Pure: imports nothing of ours and nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable


class HybridError(Exception):
    """Base of every error raised on purpose.

    Args:
        fact: what is wrong, in one clause.
        value: the offending value; left out when None.
        valid: the valid values, as text or as an iterable of them.
        fix: what to do next, in the imperative.
        where: file, line or key of the offence.
    """

    exit_code = 1

    def __init__(
        self,
        fact: str,
        *,
        value: object = None,
        valid: str | Iterable[object] | None = None,
        fix: str | None = None,
        where: str | None = None,
    ) -> None:
        self.fact, self.value, self.fix, self.where = fact, value, fix, where
        self.valid = valid if valid is None or isinstance(valid, str) else ", ".join(map(str, valid))
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        text = f"{self.where}: {self.fact}" if self.where else self.fact
        if self.value is not None:
            text += f" (got {self.value!r})"
        if self.valid is not None:
            text += f"; valid: {self.valid}"
        if self.fix is not None:
            text += f". {self.fix[0].upper()}{self.fix[1:]}"
        return text if text.endswith((".", "?")) else text + "."

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive Exception's own pickling, which
        # multiprocessing and Ray use to carry an error to the driver.
        return (_rebuild, (type(self), self.fact, self.value, self.valid, self.fix, self.where))


def _rebuild(
    cls: type[HybridError], fact: str, value: object, valid: str | None, fix: str | None, where: str | None
) -> HybridError:
    return cls(fact, value=value, valid=valid, fix=fix, where=where)


class UserError(HybridError):
    """What the user handed us is wrong; nothing was started or written."""

    exit_code = 2


class ConfigError(UserError):
    """The job file is wrong."""


class FleetError(UserError):
    """The fleet, a catalog row or a link is wrong."""


class PlanError(UserError):
    """No plan fits the job on the fleet."""


class DataError(UserError):
    """The corpus, the tokenizer or the token file is missing or wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, cut short, or of another model."""


class MachineError(UserError):
    """This machine lacks something: a port, a package, a cluster."""


class TrainingDiverged(UserError):
    """The loss or a gradient is no longer finite."""

    @classmethod
    def at(cls, step: int, loss: float, grad_norm: float) -> TrainingDiverged:
        """Return the error of a step whose loss or gradient norm is not finite."""
        return cls(
            f"step {step} (from 0): the loss is {loss} and the gradient norm {grad_norm}; "
            "no weight was changed in this step",
            valid="finite numbers",
            fix="lower optimizer.learning_rate, lengthen optimizer.warmup_steps or lower optimizer.clip_norm",
        )


class DeviceError(HybridError):
    """A device refuses."""


class DeviceOutOfMemory(DeviceError):
    """A device has not enough memory for what was asked of it."""


class UnsupportedFormat(DeviceError):
    """The chip does not have the number format."""

    exit_code = 2


class CommError(HybridError):
    """A peer or the wire failed."""


class PeerLost(CommError):
    """The peer has gone; rebuild the edge or the group."""


class CommTimeout(CommError):
    """The peer was silent for longer than the wait allowed."""


class ProtocolError(CommError):
    """Bytes arrived that no honest peer sends."""


class ScheduleError(HybridError):
    """A schedule deadlocks or computes the wrong thing: our own fault."""


class WorkerFailed(HybridError):
    """A worker ended before its job did."""
