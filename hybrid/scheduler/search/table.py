"""Profile tables: seconds and bytes of every layer by chip, tensor-parallel degree and microbatch.

Pure facts; `formats` reads and writes them as JSON, `analytic` makes them from data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid.errors import PlanError

SOURCES = ("measured", "imported", "analytic")
"""Where a table's numbers come from; `analytic` is printed as uncalibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Seconds of each layer for one microbatch on one kind of chip, at one tensor-parallel degree."""

    forward_s: tuple[float, ...]
    input_gradient_s: tuple[float, ...]
    weight_gradient_s: tuple[float, ...]
    update_s: float
    """Of the optimizer, once a step, as the source counted it for a stage."""

    @property
    def backward_s(self) -> tuple[float, ...]:
        """Both parts of the backward, by layer."""
        return tuple(map(sum, zip(self.input_gradient_s, self.weight_gradient_s, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What each layer holds and sends at one tensor-parallel degree, on one chip."""

    num_parameters: tuple[int, ...]
    saved_bytes: tuple[int, ...]
    """Held from forward to backward, for one sample."""
    output_bytes: tuple[int, ...]
    """Sent to the next stage where a cut falls behind the layer, for one sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """What the search knows of a model."""

    model: str
    source: str
    note: str
    """Who measured what, or at which efficiency."""
    sequence_length: int
    precision: str
    layers: tuple[str, ...]
    sizes: Mapping[int, Sizes]
    """By tensor-parallel degree."""
    cells: Mapping[tuple[str, int, int], Cell]
    """By (chip, tensor-parallel degree, microbatch)."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise PlanError("no such source of a profile", value=self.source, valid=SOURCES, fix="name one of these")
        for (chip, degree, microbatch), cell in self.cells.items():
            place = f"chip {chip}, tensor-parallel degree {degree}, microbatch {microbatch}"
            for name in ("forward_s", "input_gradient_s", "weight_gradient_s"):
                _check_length(getattr(cell, name), self.num_layers, f"{place}: {name}")
            if degree not in self.sizes:
                fix = "give the sizes at this degree"
                raise PlanError(f"{place}: no sizes", value=degree, valid=sorted(self.sizes), fix=fix)
        for degree, sizes in self.sizes.items():
            for name in ("num_parameters", "saved_bytes", "output_bytes"):
                _check_length(getattr(sizes, name), self.num_layers, f"sizes at degree {degree}: {name}")

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def chips(self) -> tuple[str, ...]:
        """Kinds of chips that have at least one cell."""
        return tuple(dict.fromkeys(chip for chip, _, _ in self.cells))

    @property
    def label(self) -> str:
        """The source as every output prints it."""
        return (
            f"{self.source}, uncalibrated: {self.note}" if self.source == "analytic" else f"{self.source}: {self.note}"
        )

    @property
    def num_parameters(self) -> int:
        """Of the whole model, unsplit: from the smallest degree that the table has."""
        return sum(self.sizes[min(self.sizes)].num_parameters)

    def microbatches(self, chip: str) -> tuple[int, ...]:
        """Microbatches that the table has for the chip."""
        return tuple(sorted({size for name, _, size in self.cells if name == chip}))

    def degrees(self, chip: str) -> tuple[int, ...]:
        """Tensor-parallel degrees that the table has for the chip."""
        return tuple(sorted({degree for name, degree, _ in self.cells if name == chip}))


def _check_length(values: tuple[object, ...], wanted: int, where: str) -> None:
    if len(values) != wanted:
        raise PlanError(
            "a row a layer is needed",
            value=len(values),
            valid=str(wanted),
            where=where,
            fix="give every layer's number",
        )
