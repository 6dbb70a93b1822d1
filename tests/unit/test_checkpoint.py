"""Checkpoints on disk: whole or not there, whatever happens while they are written; and refused when spoiled."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid.config import parse_job
from hybrid.errors import CheckpointError, MachineError
from hybrid.runtime import checkpoint
from hybrid.runtime.checkpoint import FileFact, checkpoint_folder, commit_checkpoint, complete_checkpoints, layer_file

JOB = parse_job(
    {"fleet": {"islands": [{"name": "a", "device": "cpu"}]}, "model": {"num_blocks": 1, "vocab_size": 300}, "steps": 50}
)
FACTS = checkpoint.job_facts(JOB, "digest")


def _write_layers(run: Path, steps_done: int) -> dict[str, FileFact]:
    """Write what the ranks write: three layers in the partial folder, of bytes that tell the step."""
    partial = checkpoint_folder(run, steps_done).with_name(f"step-{steps_done:06d}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    facts = {}
    for index in range(JOB.model.num_layers):
        data = f"layer {index} after {steps_done}".encode() * 100
        (partial / layer_file(index)).write_bytes(data)
        facts[layer_file(index)] = FileFact(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return facts


def _commit(run: Path, steps_done: int, keep: int = 2) -> Path:
    files = _write_layers(run, steps_done)
    folder = checkpoint_folder(run, steps_done)
    commit_checkpoint(folder, steps_done=steps_done, facts=FACTS, files=files, keep=keep)
    return folder


def _check_whole(folder: Path) -> int:
    manifest = checkpoint.read_manifest(folder)
    checkpoint.check_content(manifest)
    return manifest.steps_done


def test_a_checkpoint_is_read_back_as_it_was_committed(tmp_path):
    manifest = checkpoint.read_manifest(_commit(tmp_path, 7))
    assert (manifest.steps_done, manifest.num_layers, dict(manifest.facts)) == (7, 3, FACTS)
    assert sorted(manifest.files) == ["layer-000.safetensors", "layer-001.safetensors", "layer-002.safetensors"]
    checkpoint.check_content(manifest)
    checkpoint.check_matches(manifest, JOB, "digest")
    checkpoint.check_matches(manifest, JOB, None)


def test_nothing_is_visible_before_the_commit(tmp_path):
    _write_layers(tmp_path, 7)
    assert complete_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"only the unfinished step-000007\.partial"):
        checkpoint.find_checkpoint(tmp_path)
    checkpoint.discard_partial(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _kill_self(*_args: object, **_kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(call: int, module: object, name: str, body: Callable[[], object]) -> bool:
    """Run `body` in a child process that is killed at its nth call of a function; return whether it came to that."""
    child = os.fork()
    if child == 0:
        real, calls = getattr(module, name), 0

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                _kill_self()
            return real(*args, **kwargs)

        setattr(module, name, counted)
        try:
            body()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    ("module", "name"), [(os, "fsync"), (os, "rename"), (checkpoint.json, "dumps"), (checkpoint.shutil, "rmtree")]
)
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that was written before"])
def test_killed_at_any_point_of_a_commit_every_visible_checkpoint_is_whole(tmp_path, module, name, again):
    deaths = 0
    for call in range(1, 6):
        run = tmp_path / str(call)
        _commit(run, 1)
        _commit(run, 2)
        files = _write_layers(run, 2 if again else 3)
        folder = checkpoint_folder(run, 2 if again else 3)

        def commit(folder: Path = folder, files: dict[str, FileFact] = files) -> None:
            commit_checkpoint(folder, steps_done=2 if again else 3, facts=FACTS, files=files, keep=2)

        deaths += _die_at(call, module, name, commit)
        visible = [_check_whole(path) for path in complete_checkpoints(run)]
        assert visible in ([1, 2], [2, 3], [1, 2, 3])
        assert _check_whole(checkpoint.find_checkpoint(run)) == visible[-1]
        checkpoint.discard_partial(run)
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert left == {f"step-{steps:06d}" for steps in visible}
    assert deaths or again


def test_the_newest_are_kept_and_the_oldest_go_by_number_not_by_name(tmp_path):
    for steps_done in (999_998, 999_999, 1_000_000, 1_000_001):
        _commit(tmp_path, steps_done, keep=2)
    assert [_check_whole(path) for path in complete_checkpoints(tmp_path)] == [1_000_000, 1_000_001]
    assert checkpoint.find_checkpoint(tmp_path).name == "step-1000001"


def test_a_folder_that_only_looks_like_a_checkpoint_is_not_taken_for_one(tmp_path):
    _commit(tmp_path, 3)
    for name in ("step-", "step-x", "step-000009.partial", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000003"]


def test_a_run_folder_or_one_checkpoint_of_it_may_be_named(tmp_path):
    first, second = _commit(tmp_path, 3), _commit(tmp_path, 4)
    assert checkpoint.find_checkpoint(tmp_path) == second
    assert checkpoint.find_checkpoint(first) == first


def test_every_flipped_byte_is_found(tmp_path):
    folder = _commit(tmp_path, 3)
    path = folder / layer_file(1)
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        spoiled = bytearray(good)
        spoiled[place] ^= 0x40
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=r"layer-001\.safetensors: checkpoint file is altered"):
            checkpoint.check_content(checkpoint.read_manifest(folder))
    path.write_bytes(good)
    checkpoint.check_content(checkpoint.read_manifest(folder))


@pytest.mark.parametrize("place", range(0, 900, 13))
def test_a_manifest_that_is_cut_anywhere_is_refused(tmp_path, place):
    folder = _commit(tmp_path, 3)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: min(place, len(text) - 2)])
    with pytest.raises(CheckpointError, match="manifest is damaged"):
        checkpoint.read_manifest(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.pop("format"),
        lambda raw: raw.pop("files"),
        lambda raw: raw.update(files=[]),
        lambda raw: raw.update(files={"layer-000.safetensors": 3}),
        lambda raw: raw["files"]["layer-000.safetensors"].pop("sha256"),
        lambda raw: raw.update(facts="x"),
        lambda raw: raw["facts"].pop("seed"),
        lambda raw: raw["facts"].update(model=None),
        lambda raw: raw["facts"]["model"].update(num_blocks=-1),
        lambda raw: raw.update(steps_done=True),
        lambda raw: raw.update(steps_done=-1),
    ],
)
def test_a_manifest_of_the_wrong_shape_is_refused(tmp_path, spoil):
    folder = _commit(tmp_path, 3)
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    spoil(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="manifest is damaged"):
        checkpoint.read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"seed": 5}, "seed is 1234 there and 5 in the job"),
        ({"precision": "fp64"}, "precision is fp32 there and fp64 in the job"),
        ({"steps": 3}, r"at the job's end or beyond it \(got 3\)"),
        ({"steps": 2}, "at the job's end or beyond it"),
    ],
)
def test_a_job_whose_mathematics_differs_does_not_go_on(tmp_path, change, fact):
    manifest = checkpoint.read_manifest(_commit(tmp_path, 3))
    with pytest.raises(CheckpointError, match=fact):
        checkpoint.check_matches(manifest, JOB.model_copy(update=change), "digest")


def test_what_does_not_change_the_mathematics_may_differ(tmp_path):
    manifest = checkpoint.read_manifest(_commit(tmp_path, 3))
    other = JOB.model_copy(update={"name": "x", "schedule": "gpipe", "num_stages": 2, "precision": "bf16", "steps": 99})
    checkpoint.check_matches(manifest, other, "digest")
    with pytest.raises(CheckpointError, match="data is digest there and other in the job"):
        checkpoint.check_matches(manifest, other, "other")


def test_a_disk_that_cannot_be_written_is_told_as_the_machines_fault(tmp_path):
    files = _write_layers(tmp_path, 3)
    (checkpoint_folder(tmp_path, 3).with_name("step-000003.partial") / "manifest.json").mkdir()
    with pytest.raises(MachineError, match="checkpoint cannot be written: Is a directory"):
        commit_checkpoint(checkpoint_folder(tmp_path, 3), steps_done=3, facts=FACTS, files=files, keep=2)
    assert complete_checkpoints(tmp_path) == []
