"""Ownership: which part of each parameter a rank updates, of the layers that it shares with other replicas.

Joins the pure plan of `scheduler/reduction.py` with the parameters' real sizes; moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hybrid.config import JobConfig
from hybrid.models.profile import build_profile
from hybrid.models.stage import Stage, named_state, parameter_dtype
from hybrid.runtime.optimizer import STATE_NAMES
from hybrid.runtime.stage_state import names_of_layer
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.reduction import LayerGroup, Piece, cut_layer, layer_groups, shares_of_group


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayers:
    """A group of layers that a rank shares with one rank of each other replica, and each member's part of them."""

    group: LayerGroup
    position: int
    """This rank's in the group."""
    shares: tuple[float, ...]
    """Of the parameters, by position."""

    def pieces(self, parameters: Mapping[str, Tensor]) -> tuple[tuple[Piece, ...], ...]:
        """Return, by position, the pieces of one layer that each member owns."""
        return cut_layer({name: parameter.numel() for name, parameter in parameters.items()}, self.shares)


def shared_layers(job: JobConfig, plan: Plan, rank: int) -> tuple[SharedLayers, ...]:
    """Return the groups that a rank belongs to; none where there is one replica.

    Raises:
        PlanError: see `layer_groups`.
    """
    if len(plan.replicas) == 1:
        return ()
    profile = build_profile(job.model, microbatch=job.batch.microbatch, precision=job.precision)
    bytes_of_element = len(STATE_NAMES) * parameter_dtype(job.precision).itemsize
    found = []
    for group in layer_groups(plan):
        if rank in group.ranks:
            elements = sum(profile.layers[layer].num_parameters for layer in group.layers)
            shares = shares_of_group(plan, group, state_bytes=elements * bytes_of_element)
            found.append(SharedLayers(group=group, position=group.ranks.index(rank), shares=shares))
    return tuple(found)


def owned_slices(shared: tuple[SharedLayers, ...], stage: Stage) -> dict[str, slice] | None:
    """Return which elements of each parameter of a stage its rank owns; None where it owns everything."""
    if not shared:
        return None
    return {
        piece.name: slice(piece.start, piece.end)
        for each in shared
        for layer in each.group.layers
        if layer in stage.layers
        for piece in each.pieces(parameters_of_layer(stage, layer))[each.position]
    }


def parameters_of_layer(stage: Stage, layer: int) -> dict[str, Tensor]:
    """Return one layer's parameters by their names in the whole model."""
    state = named_state(stage)
    return {name: state[name] for name in names_of_layer(stage, layer)}
