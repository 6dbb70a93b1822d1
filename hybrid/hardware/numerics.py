"""Numerics by generation: encodings, rounding, defaults and parity's tolerances, read from `numerics.yaml`.

Data only: what emulates a format is `backends/number_emulation.py`. Pure but for reading the shipped file. May import
only `errors` and `marked_yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from hybrid.errors import FleetError
from hybrid.marked_yaml import read_yaml

_FILE = "numerics.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """A floating format narrower than float32."""

    mantissa_bits: int
    """Stored ones."""
    min_exponent: int
    """Of the smallest normal value."""
    maximum: float | None
    """Largest finite value; None where it is float32's, but for the mantissa."""
    source: str
    date: str
    confidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationNumerics:
    """What one generation of chips computes in."""

    formats: tuple[str, ...]
    """Of the multiply's inputs; accumulation is fp32."""
    fp8: str | None
    """The encoding that it calls e4m3; None without FP8."""
    rounding: tuple[str, ...]
    tf32_default: bool
    """Whether fp32 products run in TF32 unless switched off."""
    auto_cast_default: str | None
    """The format to which the vendor's compiler casts fp32 products unless told not to; None where it does not."""
    mx: tuple[str, ...]
    """Block-scaled formats."""
    source: str
    date: str
    confidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityTolerance:
    """How far a result may lie from the fp32 reference, in units of bf16-on-CPU's own error."""

    max_linf_ratio: float
    max_l2_ratio: float
    share_of_precision: Mapping[str, float] = field(hash=False)
    """By the job's precision: what the limits are multiplied by."""
    source: str
    date: str
    confidence: str

    def limits(self, precision: str) -> tuple[float, float]:
        """Return the largest allowed L∞ and L2 ratios for a job of that precision."""
        share = self.share_of_precision[precision]
        return self.max_linf_ratio * share, self.max_l2_ratio * share


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsTable:
    """The whole file."""

    encodings: Mapping[str, Encoding] = field(hash=False)
    generations: Mapping[str, GenerationNumerics] = field(hash=False)
    parity: ParityTolerance

    def of(self, generation: str) -> GenerationNumerics:
        """Return a generation's row.

        Raises:
            FleetError: there is none; names those that there are.
        """
        if generation not in self.generations:
            raise FleetError(
                "nothing is known of the numerics of this generation",
                value=generation,
                valid=self.generations,
                fix="leave emulation.numerics out for its islands",
            )
        return self.generations[generation]


@cache
def load_numerics() -> NumericsTable:
    """Return the shipped table."""
    text = resources.files(__package__).joinpath(_FILE).read_text(encoding="utf-8")
    raw: Any = read_yaml(text, what="numerics", where=_FILE).value
    return NumericsTable(
        encodings={name: Encoding(**row) for name, row in raw["encodings"].items()},
        generations={name: _generation(row) for name, row in raw["generations"].items()},
        parity=ParityTolerance(**raw["tolerances"]["parity"]),
    )


def _generation(row: dict[str, Any]) -> GenerationNumerics:
    lists = {key: tuple(row[key]) for key in ("formats", "rounding", "mx")}
    return GenerationNumerics(**{**row, **lists})
