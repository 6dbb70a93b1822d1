"""What each NeuronCore generation has and how much of it, read from `generations.yaml`.

Pure apart from reading that file: no number of a chip stands in code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from hybrid.errors import UserError
from hybrid.testing.nki.refusal import refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The limits of one NeuronCore generation; sizes are of one physical core."""

    name: str
    nc_version: int
    partitions: int
    sbuf_partition_bytes: int
    psum_partition_bytes: int
    psum_bank_bytes: int
    psum_banks: int
    stationary_free_max: int
    gemm_moving_fmax: int
    moving_free_max_fp32: int
    moving_free_max_bf16: int
    bn_stats_fmax: int
    transpose_tensor_max: int
    transpose_vector_max: int
    row_tiles: tuple[int, ...]
    has: frozenset[str]

    def require(self, feature: str, what: str) -> None:
        """Refuse `what` where the generation lacks `feature`.

        Raises:
            NkiRefused: rule `generation-lacks`.
        """
        if feature not in self.has:
            having = [g.name for g in generations().values() if feature in g.has]
            refuse("generation-lacks", f"{self.name} has no {what}", valid=f"{what} on {', '.join(having)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRange:
    """The inputs for which an activation function is documented, both ends included."""

    low: float
    high: float
    magnitude: bool
    """True where the range is of the input's absolute value."""


@cache
def _table() -> dict[str, dict[str, dict[str, object]]]:
    loaded: dict[str, dict[str, dict[str, object]]] = yaml.safe_load(
        files(__package__).joinpath("generations.yaml").read_text(encoding="utf-8")
    )
    return loaded


@cache
def generations() -> dict[str, Generation]:
    """Return every generation by its name: trn1, trn2, trn3."""
    found: dict[str, Generation] = {}
    for name, row in _table()["generations"].items():
        values: dict[str, object] = {**_table()["common"], **row}
        values["has"] = frozenset(values["has"])  # type: ignore[call-overload]
        values["row_tiles"] = tuple(values["row_tiles"])  # type: ignore[arg-type]
        found[name] = Generation(name=name, **values)  # type: ignore[arg-type]
    return found


def generation(name: str) -> Generation:
    """Return one generation.

    Raises:
        UserError: no such generation.
    """
    if name not in generations():
        raise UserError("no such NeuronCore generation", value=name, valid=generations(), fix="name one of them")
    return generations()[name]


@cache
def activation_ranges() -> dict[str, ActivationRange]:
    """Return the documented input range of each activation that has one."""
    return {name: _range(row) for name, row in _table()["activation_ranges"].items()}


def _range(row: dict[str, object]) -> ActivationRange:
    def end(side: str) -> float:
        exponent = row.get(f"{side}_exponent")
        return float(row[side]) if exponent is None else math.ldexp(1.0, int(exponent))  # type: ignore[arg-type, call-overload]

    return ActivationRange(low=end("low"), high=end("high"), magnitude=bool(row.get("magnitude", False)))
