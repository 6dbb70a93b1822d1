"""What parity found, and how it is judged: error ratios, the band, the first layer out of it. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Distances from the reference."""

    linf: float
    l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Errors in units of bf16-on-CPU's: 1 is as good as bf16."""

    linf: float
    l2: float

    def within(self, limits: tuple[float, float]) -> bool:
        """Return whether both are at most their limits."""
        return self.linf < limits[0] and self.l2 < limits[1]

    def excess(self, limits: tuple[float, float]) -> float:
        """Return how many times the worse one is its limit."""
        return max(self.linf / limits[0], self.l2 / limits[1])


def ratio_of(found: Errors, yardstick: Errors) -> Ratio:
    """Return the errors in units of the yardstick's; no error is 0, an error where the yardstick has none infinite."""

    def part(a: float, b: float) -> float:
        if a == 0.0:
            return 0.0
        # NaN compares false: what is not a number is infinitely wrong.
        return a / b if b > 0.0 and a < float("inf") else float("inf")

    return Ratio(linf=part(found.linf, yardstick.linf), l2=part(found.l2, yardstick.l2))


def worst(ratios: Sequence[Ratio]) -> Ratio:
    """Return the largest of each."""
    return Ratio(linf=max(r.linf for r in ratios), l2=max(r.l2 for r in ratios))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer's worst ratios over the steps."""

    layer: str
    stage: int
    island: str
    chip: str
    output: Ratio
    """Of the layer by itself, given the reference's input."""
    gradient: Ratio
    """Of its weights' gradients, given the reference's input and output gradient."""
    product_of_weight: Mapping[str, Ratio]
    """Of each linear layer by itself, the worse of output and weight gradient."""
    end_to_end_output: Ratio
    """In the whole run, with what the layers before it passed on; told, not judged."""
    end_to_end_gradient: Ratio

    def judged(self) -> Ratio:
        """Return the worst of what is judged."""
        return worst([self.output, self.gradient, *self.product_of_weight.values()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What explains a layer's error best."""

    kind: str
    """`format`, `rounding`, `tf32`, `auto-cast`, `scale`, or `unknown`."""
    detail: str
    distance: float
    """Between the error seen and the candidate's: 0 the same, 1 unrelated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The outcome of a parity run."""

    job: str
    precision: str
    steps: int
    max_linf_ratio: float
    max_l2_ratio: float
    rows: tuple[LayerRow, ...]
    first_layer: str | None
    """The first one out of the band, in the first step where one is; None where all are within."""
    first_step: int | None = None
    weights: tuple[str, ...] = ()
    """Its linear layers that are out of the band, the worst first."""
    cause: Cause | None = None

    @property
    def in_band(self) -> bool:
        """Whether every layer is."""
        return self.first_layer is None


def first_out(rows: Sequence[LayerRow], limits: tuple[float, float]) -> LayerRow | None:
    """Return the first layer, in the model's order, that leaves the band."""
    return next((row for row in rows if not row.judged().within(limits)), None)


def weights_out(row: LayerRow, limits: tuple[float, float]) -> tuple[str, ...]:
    """Return a layer's linear layers that are out of the band, the worst first."""
    out = [(ratio.excess(limits), name) for name, ratio in row.product_of_weight.items() if not ratio.within(limits)]
    return tuple(name for _, name in sorted(out, key=lambda pair: -pair[0]))
