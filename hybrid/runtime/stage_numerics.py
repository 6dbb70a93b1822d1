"""Which arithmetic a stage's chip is to be emulated with: the job's words checked against the chip's generation.

Decides only; `backends/number_emulation.py` computes. The driver checks with it, so torch waits until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid.config import JobConfig
from hybrid.errors import ConfigError, UnsupportedFormat
from hybrid.hardware.chips import Chip
from hybrid.hardware.fleet import Fleet
from hybrid.hardware.numerics import GenerationNumerics, load_numerics
from hybrid.scheduler.plan import Plan

if TYPE_CHECKING:
    from hybrid.backends.number_emulation import MatmulNumerics


def declared_numerics(job: JobConfig, *, island: str, chip: Chip, backend: str) -> MatmulNumerics | None:
    """Return what `emulation.numerics` says of an island; None where it says nothing.

    Raises:
        ConfigError, UnsupportedFormat: see `check_numerics`.
    """
    row = _checked_row(job, island, chip, backend)
    if row is None:
        return None
    from hybrid.backends.number_emulation import MatmulNumerics

    asked = job.emulation.numerics[island]
    return MatmulNumerics(matmul=asked.matmul, rounding=asked.rounding, fp8_format=row.fp8 or "e4m3fn")


def check_numerics(job: JobConfig, fleet: Fleet, plan: Plan) -> None:
    """Refuse numerics that a stage's chip does not have or that would be without effect.

    Raises:
        ConfigError: the island's chips are not emulated, so their numerics are their own; or the job is in fp64.
        UnsupportedFormat: the chip's generation has no such format or rounding.
    """
    for stage in plan.stages:
        _checked_row(job, stage.island, fleet.island(stage.island).chip, stage.backend)


def _checked_row(job: JobConfig, island: str, chip: Chip, backend: str) -> GenerationNumerics | None:
    asked = job.emulation.numerics.get(island)
    if asked is None:
        return None
    where = f"emulation.numerics.{island}"
    if backend != "emulated":
        raise ConfigError(
            "numerics are emulated on emulated chips alone",
            value=backend,
            valid=["emulated"],
            where=where,
            fix="write `backend: emulated` at the island, or leave its numerics out",
        )
    if job.precision == "fp64":
        raise ConfigError(
            "emulated numerics are narrower than the job's precision",
            value="fp64",
            valid=["fp32", "bf16"],
            where="precision",
            fix="train in fp32 or bf16, or leave emulation.numerics out",
        )
    row = load_numerics().of(chip.generation)
    for what, value, known in (("matmul", asked.matmul, row.formats), ("rounding", asked.rounding, row.rounding)):
        if value not in known:
            words = ("fp32", "tf32", "bf16", "fp8") if what == "matmul" else known
            raise UnsupportedFormat(
                f"chip {chip.name} does not have this {'format' if what == 'matmul' else 'rounding'}",
                value=value,
                valid=[word for word in words if word in known],
                where=f"{where}.{what}",
                fix="take one of these",
            )
    return row
