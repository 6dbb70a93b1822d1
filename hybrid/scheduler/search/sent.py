"""Sent: the bytes that a message takes in each codec. Pure."""

from __future__ import annotations

from hybrid.scheduler.cost import BYTES_OF_PRECISION

BYTES_A_NUMBER = {"none": None, "bf16": 2.0, "fp8": 1.0 + 4 / 256}
"""By codec, the widest first; `none` sends the compute format, `fp8` a float32 scale with each 256 numbers."""


def narrowing(precision: str, codec: str) -> float:
    """Return the share of a message's bytes that it takes in a codec; 1 where the compute format is not known."""
    number, own = BYTES_A_NUMBER[codec], BYTES_OF_PRECISION.get(precision)
    return 1.0 if number is None or own is None else min(1.0, number / own)
