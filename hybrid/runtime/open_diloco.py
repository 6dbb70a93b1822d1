"""Opening what joins a DiLoCo rank to the other replicas; and the checkpoint of what they share.

A checkpoint is written just after a meeting, when all replicas hold the same weights: the first replica writes it, with
its own AdamW moments and the outer momentum. Whoever resumes starts every replica from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hybrid.collectives import Group
from hybrid.collectives.codecs import open_codec
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.runtime import checkpoint
from hybrid.runtime.diloco import Fragments, OuterRule
from hybrid.runtime.held_stages import HeldStage
from hybrid.runtime.ownership import SharedLayers, parameters_of_layer
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.stage_sums import shards_of
from hybrid.runtime.whole_layers import own_part
from hybrid.scheduler.fragments import build_outer_schedule

_MOMENTUM = "outer_momentum"


def build_fragments(
    spec: WorkerSpec, held: Sequence[HeldStage], shared: Sequence[SharedLayers], groups: Sequence[Group]
) -> Fragments:
    """Return the outer steps of the rank's layers, over open groups; on from the checkpoint that the job resumes."""
    config, plan = spec.job.diloco, spec.plan
    assert config is not None, "a job without a diloco section has no fragments"
    fragments = Fragments(
        {layer: parameters_of_layer(one.stage, layer) for one in held for layer in one.plan.layers},
        build_outer_schedule(
            plan.num_layers,
            every_steps=config.every_steps,
            num_fragments=config.num_fragments,
            overlap_steps=config.overlap_steps,
            tied=spec.job.model.tied_embeddings,
            warmup_steps=config.warmup_steps,
        ),
        {layer: group for each, group in zip(shared, groups, strict=True) for layer in each.group.layers},
        [replica.num_samples / plan.global_batch for replica in plan.replicas],
        ErrorFeedback(open_codec(config.codec)),
        OuterRule(learning_rate=config.learning_rate, momentum=config.momentum, mixing=config.mixing),
    )
    if spec.resume is not None:
        _load(fragments, held, spec.resume)
    return fragments


def write_met(fragments: Fragments, held: Sequence[HeldStage], folder: Path) -> dict[str, checkpoint.FileFact]:
    """Write the rank's layers, of which all replicas hold the same weights now.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    momentum = {name: {_MOMENTUM: found[_MOMENTUM]} for name, found in fragments.state().items()}
    return {name: fact for one in held for name, fact in one.state.write(folder, more=momentum).items()}


def _load(fragments: Fragments, held: Sequence[HeldStage], folder: Path) -> None:
    """Go on with the outer momentum that a checkpoint holds; one of another kind of training holds none."""
    manifest = checkpoint.read_manifest(folder)
    state = fragments.state()
    for one in held:
        shards = shards_of(one.stage)
        for layer in one.plan.layers:
            found = checkpoint.read_layer(manifest, layer).get(_MOMENTUM, {})
            for name in parameters_of_layer(one.stage, layer):
                momentum = found.get(name)
                zeros = torch.zeros_like(state[name]["outer"])
                state[name][_MOMENTUM] = zeros if momentum is None else own_part(momentum, shards[name])
    fragments.load_state(state)
