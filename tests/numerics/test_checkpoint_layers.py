"""A checkpoint's layers do not know the plan: the same bytes from any split, and back into any other."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hybrid.config import ModelConfig, OptimizerConfig
from hybrid.errors import CheckpointError
from hybrid.models.stage import Stage, build_stage, named_state
from hybrid.runtime import checkpoint
from hybrid.runtime.checkpoint import Manifest, layer_file
from hybrid.runtime.optimizer import AdamW
from hybrid.runtime.stage_state import StageState

MODEL = ModelConfig(
    num_blocks=3,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=24,
    vocab_size=300,
    sequence_length=8,
    tied_embeddings=False,
)
SPLITS = {"one stage": (0, 5), "two": (0, 2, 5), "uneven": (0, 1, 4, 5), "a layer each": (0, 1, 2, 3, 4, 5)}
FACTS = {"model": MODEL.model_dump(mode="json"), "precision": "fp32", "seed": 1, "global_batch": 4, "data": "d"}


def _stages(split: tuple[int, ...], seed: int = 1) -> list[tuple[Stage, StageState]]:
    out = []
    for first, end in pairwise(split):
        stage = build_stage(MODEL, first, end, seed=seed, dtype=torch.float32)
        optimizer = AdamW(named_state(stage), OptimizerConfig(), 10)
        for name, parameter in named_state(stage).items():
            chance = torch.Generator().manual_seed(sum(name.encode()) + seed)
            parameter.grad = torch.randn(parameter.shape, generator=chance)
        optimizer.step(0, 1.0)
        out.append((stage, StageState(stage, optimizer)))
    return out


def _write(run: Path, split: tuple[int, ...]) -> Manifest:
    folder = checkpoint.checkpoint_folder(run, 1)
    files = {}
    for _, state in _stages(split):
        files.update(state.write(folder))
    checkpoint.commit_checkpoint(folder, steps_done=1, facts=FACTS, files=files, keep=1)
    return checkpoint.read_manifest(folder)


@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_every_split_writes_the_same_bytes(tmp_path, split):
    whole, parted = _write(tmp_path / "whole", SPLITS["one stage"]), _write(tmp_path / "parted", SPLITS[split])
    assert whole.files == parted.files
    assert len(whole.files) == MODEL.num_layers


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_loads_what_another_wrote(tmp_path, split):
    manifest = _write(tmp_path, SPLITS["two"])
    wanted = {name: tensor for stage, _ in _stages(SPLITS["two"]) for name, tensor in named_state(stage).items()}
    for stage, state in _stages(SPLITS[split], seed=2):
        assert state.load(manifest.path) == 1
        for name, tensor in named_state(stage).items():
            assert torch.equal(tensor, wanted[name]), name
        again = state.write(tmp_path / "again" / "step-000001")
        assert again == {layer_file(i): manifest.files[layer_file(i)] for i in stage.layers}


def test_a_layer_of_another_shape_is_refused_by_name(tmp_path):
    manifest = _write(tmp_path, SPLITS["two"])
    other = MODEL.model_copy(update={"intermediate_size": 32})
    stage = build_stage(other, 0, 5, seed=1, dtype=torch.float32)
    state = StageState(stage, AdamW(named_state(stage), OptimizerConfig(), 10))
    with pytest.raises(CheckpointError, match=r"another block\.00\.mlp\.down.*\(16, 24\) there, \(16, 32\)"):
        state.load(manifest.path)


def test_bytes_that_are_no_safetensors_are_refused_even_under_a_right_checksum(tmp_path):
    manifest = _write(tmp_path, SPLITS["two"])
    junk = b"\xff" * 100
    (manifest.path / layer_file(0)).write_bytes(junk)
    fact = checkpoint.FileFact(size_bytes=100, sha256=hashlib.sha256(junk).hexdigest())
    with pytest.raises(CheckpointError, match=r"layer-000\.safetensors: checkpoint file is damaged"):
        checkpoint.read_layer(replace(manifest, files={**manifest.files, layer_file(0): fact}), 0)
