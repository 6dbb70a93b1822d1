"""Opening what joins a rank to the other replicas: edges, groups, buckets; and the checkpoint of what they share.

Acts on `ownership.py`'s plan. A checkpoint stays one file a layer, whatever the replicas: whoever writes a layer
gathers its moments from their owners, and what the codec owes from every replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybrid.collectives import Group, open_edges, open_group
from hybrid.collectives.codecs import open_codec
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.runtime import checkpoint
from hybrid.runtime.bucket_exchange import BucketExchange
from hybrid.runtime.held_stages import HeldStage
from hybrid.runtime.optimizer import STATE_NAMES
from hybrid.runtime.ownership import SharedLayers, parameters_of_layer
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.replicas import Replicas, SharedBucket, SharedGroup
from hybrid.runtime.stage_sums import shards_of, uncounted_names
from hybrid.runtime.whole_layers import own_part
from hybrid.scheduler.reduction import Bucket, plan_buckets
from hybrid.transports.base import TransportNode


def open_groups(
    shared: Sequence[SharedLayers], node: TransportNode, address_of_rank: Mapping[str, str], *, timeout_s: float
) -> tuple[Group, ...]:
    """Return an open group for each of the rank's groups of layers; closing the node closes their edges.

    Raises:
        CommTimeout, PeerLost: a rank of another replica did not come.
    """
    peers = {rank for each in shared for rank in each.group.ranks}
    edges = open_edges(node, {rank: address_of_rank[str(rank)] for rank in peers}, timeout_s=timeout_s)
    return tuple(
        open_group(edges, each.group.ranks, node.rank, name=each.group.name, timeout_s=timeout_s) for each in shared
    )


def build_replicas(
    spec: WorkerSpec, held: Sequence[HeldStage], shared: Sequence[SharedLayers], groups: Sequence[Group]
) -> Replicas:
    """Return the rank's part of the gradients' reduction, over open groups."""
    feedback = ErrorFeedback(open_codec(spec.plan.gradient_codec))
    return Replicas(
        [_shared_group(spec, held, *pair, feedback) for pair in zip(shared, groups, strict=True)],
        feedback=feedback,
        num_layers=spec.plan.num_layers,
        uncounted=frozenset[str]().union(*(uncounted_names(one.stage) for one in held)),
    )


def _shared_group(
    spec: WorkerSpec, held: Sequence[HeldStage], shared: SharedLayers, group: Group, feedback: ErrorFeedback
) -> SharedGroup:
    parameters = {
        layer: parameters_of_layer(one.stage, layer)
        for layer in shared.group.layers
        for one in held
        if layer in one.plan.layers
    }
    sizes = {layer: sum(p.numel() for p in named.values()) for layer, named in parameters.items()}
    buckets = plan_buckets(spec.plan, shared.group, sizes, tied=spec.job.model.tied_embeddings)
    return SharedGroup(
        shared=shared,
        group=group,
        parameters_of_layer=parameters,
        buckets=tuple(
            SharedBucket(
                bucket=bucket,
                exchange=_exchange(bucket, parameters, shared, group, feedback),
                stage=next(one.plan.stage for one in held if bucket.layers[0] in one.plan.layers),
                parameters=tuple(p for layer in bucket.layers for p in parameters[layer].values()),
            )
            for bucket in buckets
        ),
    )


def _exchange(
    bucket: Bucket,
    parameters: Mapping[int, Mapping[str, Tensor]],
    shared: SharedLayers,
    group: Group,
    feedback: ErrorFeedback,
) -> BucketExchange:
    cuts = [shared.pieces(parameters[layer]) for layer in bucket.layers]
    return BucketExchange(
        "layers-" + "-".join(map(str, bucket.layers)),
        {name: parameter for layer in bucket.layers for name, parameter in parameters[layer].items()},
        [[piece for cut in cuts for piece in cut[member]] for member in range(group.size)],
        group,
        feedback,
    )


def write_shared(replicas: Replicas, held: Sequence[HeldStage], folder: Path) -> dict[str, checkpoint.FileFact]:
    """Write this rank's share of the checkpoint; every member calls it after the same step.

    Returns:
        the files that this rank has written: of each group, every so-manieth bucket's layers.

    Raises:
        CommTimeout, PeerLost: a member was silent or has gone.
        MachineError: the disk is full or cannot be written.
    """
    own = {name: moments for one in held for name, moments in one.optimizer.state().items()}
    files: dict[str, checkpoint.FileFact] = {}
    for shared in replicas.groups:
        for number, each in enumerate(shared.buckets):
            root = number % shared.group.size
            states = {
                key: each.exchange.gather({name: parts[key] for name, parts in own.items()}, root)
                for key in STATE_NAMES
            }
            states |= _gather_lost(each.exchange, replicas.feedback, root)
            for layer in each.bucket.layers if shared.group.rank == root else ():
                one = next(one for one in held if layer in one.plan.layers)
                moments = {
                    name: {key: whole[name] for key, whole in states.items() if whole is not None}
                    for name in shared.parameters_of_layer[layer]
                }
                files |= one.state.write_layer(folder, layer, moments)
    return files


def _gather_lost(exchange: BucketExchange, feedback: ErrorFeedback, root: int) -> dict[str, dict[str, Tensor] | None]:
    """Return, at the root, what the codec owes of every replica's gradients, as `lost_0`, `lost_1`, ..."""
    if feedback.codec.max_error == 0.0:
        return {}
    lost, group = exchange.lost(), exchange.group
    mine = torch.cat([tensor.view(-1) for tensor in lost.values()])
    outs = [torch.empty_like(mine) for _ in range(group.size)] if group.rank == root else None
    group.gather(outs, mine, root).wait()
    sizes = [tensor.numel() for tensor in lost.values()]
    return {
        f"lost_{member}": {
            name: flat.view(lost[name].shape) for name, flat in zip(lost, torch.split(out, sizes), strict=True)
        }
        for member, out in enumerate(outs or ())
    }


def load_lost(replicas: Replicas, held: Sequence[HeldStage], folder: Path) -> None:
    """Take over from a checkpoint what the codec owes; with other replicas than it had, the first one owes it all.

    Raises:
        CheckpointError: a file is missing, cut, altered or of another model.
    """
    if replicas.feedback.codec.max_error == 0.0:
        return
    manifest = checkpoint.read_manifest(folder)
    state: dict[str, Tensor] = {}
    shards = {name: shard for one in held for name, shard in shards_of(one.stage).items()}
    for shared in replicas.groups:
        for each in shared.buckets:
            lost: dict[str, Tensor] = {}
            for layer in each.bucket.layers:
                parts = {key: x for key, x in checkpoint.read_layer(manifest, layer).items() if key.startswith("lost_")}
                for name, parameter in shared.parameters_of_layer[layer].items():
                    own = {key: {name: own_part(found[name], shards[name])} for key, found in parts.items()}
                    lost[name] = _own_lost(own, name, parameter, shared.group)
            state |= each.exchange.load_lost(lost)
    replicas.feedback.load(state)


def _own_lost(parts: Mapping[str, Mapping[str, Tensor]], name: str, parameter: Tensor, group: Group) -> Tensor:
    if len(parts) == group.size:
        return parts[f"lost_{group.rank}"][name]
    zeros = torch.zeros(parameter.shape)
    return sum((parts[key][name] for key in sorted(parts)), zeros) if group.rank == 0 else zeros
