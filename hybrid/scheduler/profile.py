"""What the planner needs to know of a model: one row a layer, for one microbatch.

Pure facts; `hybrid.models.profile` makes them from a model. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """Cost of one layer for one microbatch."""

    name: str
    kind: str
    """`embedding`, `block` or `head`: layers of a kind cost the same."""
    num_parameters: int
    forward_flops: float
    backward_flops: float
    saved_activation_bytes: int
    """Held from the layer's forward to its backward."""
    output_bytes: int
    """Sent to the next layer where a cut falls behind this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Cost of a whole model for one microbatch."""

    model: str
    microbatch: int
    """Samples in the microbatch that the layers' numbers are for."""
    sequence_length: int
    precision: str
    """Compute format: `fp32`, `bf16` or `fp64`."""
    bytes_per_parameter: int
    """Held on the device for a parameter: weight, gradient and optimizer state."""
    source: str
    """`analytic`, `measured` or `imported`."""
    layers: tuple[LayerProfile, ...]
