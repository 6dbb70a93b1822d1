"""What the job's classes are made of: the frozen base, and numbers that refuse what YAML would let pass.

May import nothing of ours; with `config.py` and its sections' files the only ones that import pydantic.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def no_flag(value: object) -> object:
    """Refuse true and false: YAML's `yes` would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError("not a number; valid: a number")
    return value


Count = Annotated[int, Field(strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Real = Annotated[float, BeforeValidator(no_flag)]
PositiveReal = Annotated[float, BeforeValidator(no_flag), Field(gt=0)]
Share = Annotated[Real, Field(ge=0.0, lt=1.0)]


class Frozen(BaseModel):
    """A part of the job: immutable, unknown keys refused, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
