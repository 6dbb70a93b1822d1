"""Cost: seconds of a layer on a chip, and of a message on a link, from data sheets alone.

Pure: no torch, no clock, no network. What comes out is *uncalibrated*: a roofline under one stated
efficiency. A measured profile replaces it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid.errors import PlanError
from hybrid.scheduler.profile import LayerProfile

if TYPE_CHECKING:
    from hybrid.hardware.catalog import Chip
    from hybrid.hardware.fleet import Link

BYTES_OF_PRECISION = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def layer_seconds(
    layer: LayerProfile, chip: Chip, precision: str, efficiency: float, *, speed: float = 1.0
) -> tuple[float, float]:
    """Return the seconds of a layer's forward and backward for one microbatch.

    The larger of arithmetic and memory traffic, each at `efficiency` of the data sheet's peak. A forward
    reads the weights and writes what it saves and its output; a backward reads those and writes both
    gradients: twice that.

    Args:
        layer: FLOPs and bytes for one microbatch.
        chip: peaks from the catalog.
        precision: format of the arithmetic: `fp32`, `bf16`, …
        efficiency: share of the peaks that is reached, in (0, 1].
        speed: multiplies the chip's speed, for a slower or faster specimen.

    Raises:
        PlanError: efficiency or speed out of range, or no such precision.
        UnsupportedFormat: the chip does not have the precision.
    """
    if not 0 < efficiency <= 1:
        raise PlanError("efficiency out of range", value=efficiency, valid="above 0, at most 1")
    if speed <= 0:
        raise PlanError("speed out of range", value=speed, valid="above 0")
    flops_per_s = chip.peak_flops(precision) * efficiency * speed
    bytes_per_s = chip.hbm_bytes_per_s * efficiency * speed
    weights = layer.num_parameters * bytes_of(precision)
    activations = layer.saved_activation_bytes + layer.output_bytes
    # A look-up reads its tokens' rows alone; its gradient is as large as the table.
    forward_bytes = activations + (0 if layer.kind == "embedding" else weights)
    forward_s = max(layer.forward_flops / flops_per_s, forward_bytes / bytes_per_s)
    backward_s = max(layer.backward_flops / flops_per_s, 2 * (activations + weights) / bytes_per_s)
    return forward_s, backward_s


def transfer_seconds(link: Link, size_bytes: int) -> float:
    """Return the seconds from the start of a send to its arrival: latency plus bytes over bandwidth."""
    return link.latency_s + size_bytes / link.bandwidth_bytes_per_s


def bytes_of(precision: str) -> int:
    """Return the bytes of one number.

    Raises:
        PlanError: no such precision.
    """
    size = BYTES_OF_PRECISION.get(precision)
    if size is None:
        raise PlanError("no such precision", value=precision, valid=BYTES_OF_PRECISION, fix="name one of these")
    return size
