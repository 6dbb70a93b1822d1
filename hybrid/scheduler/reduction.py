"""Reduction: which ranks add up which layers' gradients, in which buckets, and who owns which part of each layer.

Replicas may cut the layers differently. A layer is reduced among those who hold it, one rank a replica; layers with the
same holders share a group. Pure: no torch, no clock, no network. `runtime/replicas.py` acts on what is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid.errors import PlanError
from hybrid.scheduler.plan import Plan, ReplicaPlan, StagePlan

BLOCK = 4096
"""Elements of a parameter that are never parted: squares are summed and updates are computed block by block."""
DEFAULT_BUCKET_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that the same ranks hold."""

    ranks: tuple[int, ...]
    """One a replica, in the order of the replicas."""
    layers: tuple[int, ...]
    """Ascending."""

    @property
    def name(self) -> str:
        """A name that no other group of the plan has."""
        return "layers-" + "-".join(map(str, self.ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Layers of one group whose gradients travel together."""

    layers: tuple[int, ...]
    """Descending: the order in which backwards end."""
    is_tied: bool
    """Leaves only when the two copies of a tied weight have met within their replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A contiguous part of one parameter."""

    name: str
    start: int
    end: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.end - self.start


def layer_groups(plan: Plan) -> tuple[LayerGroup, ...]:
    """Return the plan's groups, by their lowest layer; of a stage of several ranks each place has groups of its own.

    Raises:
        PlanError: replicas split a layer's weights over different numbers of ranks.
    """
    layers_of_ranks: dict[tuple[int, ...], list[int]] = {}
    for layer in range(plan.num_layers):
        stages = [stage_of_layer(replica, layer) for replica in plan.replicas]
        for stage in stages:
            if (stage.tensor_parallel, stage.width) != (stages[0].tensor_parallel, stages[0].width):
                raise PlanError(
                    f"layer {layer} is split over other numbers of ranks in different replicas",
                    value=f"{stage.tensor_parallel} x {stage.width}",
                    valid=f"{stages[0].tensor_parallel} x {stages[0].width}, as in replica 0",
                    where=f"plan, stage {stage.stage}",
                    fix="give a layer the same degrees in every replica",
                )
        for ranks in zip(*(stage.ranks for stage in stages), strict=True):
            layers_of_ranks.setdefault(ranks, []).append(layer)
    return tuple(LayerGroup(ranks=ranks, layers=tuple(layers)) for ranks, layers in layers_of_ranks.items())


def stage_of_layer(replica: ReplicaPlan, layer: int) -> StagePlan:
    """Return the stage of a replica that holds a layer."""
    return next(stage for stage in replica.stages if layer in stage.layers)


def plan_buckets(
    plan: Plan,
    group: LayerGroup,
    num_elements_of_layer: Mapping[int, int],
    *,
    tied: bool,
    bucket_elements: int = DEFAULT_BUCKET_ELEMENTS,
) -> tuple[Bucket, ...]:
    """Return a group's buckets in the one order in which all its members send them.

    Later layers come first, as backwards end; tied layers last, each alone. A bucket never joins layers that are in
    different stages anywhere: it can leave as soon as one stage's backwards are done.
    """
    late = {0, plan.num_layers - 1} if tied else set[int]()
    buckets: list[Bucket] = []
    run: list[int] = []
    for layer in sorted(set(group.layers) - late, reverse=True):
        grown = sum(num_elements_of_layer[each] for each in (*run, layer))
        if run and (grown > bucket_elements or _stages(plan, layer) != _stages(plan, run[-1])):
            buckets.append(Bucket(layers=tuple(run), is_tied=False))
            run = []
        run.append(layer)
    if run:
        buckets.append(Bucket(layers=tuple(run), is_tied=False))
    last = sorted(late & set(group.layers), reverse=True)
    return (*buckets, *(Bucket(layers=(layer,), is_tied=True) for layer in last))


def _stages(plan: Plan, layer: int) -> tuple[int, ...]:
    return tuple(stage_of_layer(replica, layer).stage for replica in plan.replicas)


def owner_shares(speeds: Sequence[float], room_shares: Sequence[float]) -> tuple[float, ...]:
    """Return which share of a group's parameters each member owns: by its speed, at most what its memory holds.

    Args:
        speeds: relative; all 0 counts as equal.
        room_shares: the largest share each member has room for. Where they sum to less than 1 everyone takes more than
            it has room for, in proportion.

    Shapes:
        both, and what is returned: one a member; the result sums to 1.
    """
    weights = [speed if sum(speeds) > 0 else 1.0 for speed in speeds]
    room = [max(0.0, share) for share in room_shares]
    if sum(room) <= 1.0:
        total = sum(room)
        return tuple(share / total for share in room) if total > 0 else tuple(1 / len(room) for _ in room)
    shares, free, left = [0.0] * len(weights), set(range(len(weights))), 1.0
    while True:
        total = sum(weights[member] for member in free)
        wanted = {member: left * (weights[member] / total if total > 0 else 1 / len(free)) for member in free}
        full = {member for member in free if wanted[member] > room[member]}
        for member in full or free:
            shares[member] = room[member] if full else wanted[member]
        if not full:
            return tuple(shares)
        left -= sum(room[member] for member in full)
        free -= full


def shares_of_group(plan: Plan, group: LayerGroup, *, state_bytes: int) -> tuple[float, ...]:
    """Return `owner_shares` of a group, from what the plan predicts of its members.

    A member's speed is the layers that its stages compute a second. Its memory, as planned, holds the optimizer's state
    of all its own layers; what is free beside that is room for more.

    Args:
        state_bytes: the optimizer's state of the group's layers.
    """
    speeds, rooms = [], []
    for rank in group.ranks:
        stages = plan.stages_of_rank(rank)
        seconds = sum(stage.forward_s + stage.backward_s for stage in stages)
        speeds.append(sum(len(stage.layers) for stage in stages) / seconds if seconds > 0 else 0.0)
        free = stages[0].memory_limit_bytes - sum(stage.memory_bytes for stage in stages)
        rooms.append(1.0 + free / max(1, state_bytes))
    return owner_shares(speeds if all(speeds) else [1.0] * len(speeds), rooms)


def cut_layer(size_of_parameter: Mapping[str, int], shares: Sequence[float]) -> tuple[tuple[Piece, ...], ...]:
    """Return, for each member, the pieces of a layer that it owns: one run of whole blocks a member, in their order.

    Every layer is cut, not the list of layers: so all members have something to do for each bucket, at the same time.

    Args:
        size_of_parameter: the elements of each parameter, in the order of the parameters.
        shares: each member's, summing to 1.
    """
    total, done, member = sum(size_of_parameter.values()), 0, 0
    pieces: list[list[Piece]] = [[] for _ in shares]
    border = shares[0] * total
    for name, start, end in _blocks(size_of_parameter):
        # The next member's turn where more than half of this block lies beyond the border.
        while member < len(shares) - 1 and done + (end - start) / 2 > border:
            member += 1
            border += shares[member] * total
        done += end - start
        _append(pieces[member], name, start, end)
    return tuple(map(tuple, pieces))


def _blocks(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    return [(name, start, min(start + BLOCK, size)) for name, size in sizes.items() for start in range(0, size, BLOCK)]


def _append(pieces: list[Piece], name: str, start: int, end: int) -> None:
    if pieces and pieces[-1].name == name:
        start = pieces.pop().start
    pieces.append(Piece(name=name, start=start, end=end))
