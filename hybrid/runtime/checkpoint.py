"""Checkpoints that do not depend on the plan: one safetensors file a layer, and a manifest with checksums.

    RUN/checkpoints/step-000100/
        manifest.json                 format, step, job facts that must match, file -> size and sha256
        layer-000.safetensors         weight:NAME, exp_avg:NAME, exp_avg_sq:NAME
        …

Each rank writes its own layers into `step-000100.partial`; the coordinator writes the manifest once every part is there
and renames the folder, so that a folder without `.partial` is whole. Reading needs no torch until a layer is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import JobConfig
from hybrid.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_WHOLE = re.compile(r"step-(\d+)")
_FACTS = ("model", "precision", "seed", "global_batch", "data")
_HASHING_THREADS = 4
_OTHER = "resume from another checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """What the manifest says of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole checkpoint's facts."""

    path: Path
    steps_done: int
    facts: Mapping[str, Any]
    files: Mapping[str, FileFact]

    @property
    def num_layers(self) -> int:
        """Layers of the model that wrote it: embedding, blocks, head."""
        return int(self.facts["model"]["num_blocks"]) + 2


def job_facts(job: JobConfig, data_digest: str) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be resumed: the mathematics, not the split."""
    return {
        "model": job.model.model_dump(mode="json"),
        "precision": "fp64" if job.precision == "fp64" else "fp32",  # of the master weights
        "seed": job.seed,
        "global_batch": job.batch.global_batch,
        "data": data_digest,
    }


def checkpoint_folder(run: Path, steps_done: int) -> Path:
    """Return where the checkpoint after `steps_done` steps stands."""
    return run / "checkpoints" / f"step-{steps_done:06d}"


def layer_file(index: int) -> str:
    """Return the file name of a layer."""
    return f"layer-{index:03d}.safetensors"


def write_layer(
    folder: Path, index: int, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
) -> FileFact:
    """Write one layer into the partial folder of a checkpoint; return its size and checksum.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    from safetensors.torch import save

    tensors = {f"weight:{name}": tensor.detach().contiguous() for name, tensor in weights.items()}
    for name, state in moments.items():
        tensors.update({f"{key}:{name}": tensor.contiguous() for key, tensor in state.items()})
    data = save(tensors)
    partial = folder.with_name(folder.name + _PARTIAL)
    with _writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        _write_through(partial / layer_file(index), data)
    return FileFact(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def commit_checkpoint(
    folder: Path, *, steps_done: int, facts: Mapping[str, Any], files: Mapping[str, FileFact], keep: int
) -> None:
    """Write the manifest, make the checkpoint visible in one rename, and remove the oldest beyond `keep`.

    Killed at any point, it leaves every checkpoint that was visible before whole. A step is committed once: where its
    checkpoint is there already, that one stays.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    manifest = {
        "format": FORMAT,
        "steps_done": steps_done,
        "facts": dict(facts),
        "files": {name: {"size_bytes": f.size_bytes, "sha256": f.sha256} for name, f in sorted(files.items())},
    }
    if folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        return
    with _writing(folder):
        _write_through(partial / _MANIFEST, json.dumps(manifest, indent=1).encode())
        _fsync_folder(partial)
        partial.rename(folder)
        _fsync_folder(folder.parent)
    for old in complete_checkpoints(folder.parent.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def discard_partial(run: Path) -> None:
    """Remove what an ended job left half-written."""
    for partial in (run / "checkpoints").glob(f"*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    steps_of = {path: _WHOLE.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*")}
    return sorted((path for path, match in steps_of.items() if match), key=_steps_of)


def _steps_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: itself, or the newest of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / _MANIFEST).is_file():
        return path
    found = complete_checkpoints(path)
    if found:
        return found[-1]
    partial = sorted(path.parent.glob(f"{path.name}{_PARTIAL}")) or sorted((path / "checkpoints").glob(f"*{_PARTIAL}"))
    raise CheckpointError(
        "no whole checkpoint there" + (f" (only the unfinished {partial[0].name})" if partial else ""),
        value=str(path),
        fix="give a run folder that has checkpoints/step-*, or one such folder",
    )


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest; the files are there and have the right size.

    Raises:
        CheckpointError: no manifest, another format, or a missing or cut file.
    """
    path = folder / _MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(
                "checkpoint of another format", value=raw["format"], valid=[FORMAT], where=str(path), fix=_OTHER
            )
        manifest = _manifest(folder, raw)
    except FileNotFoundError:
        raise CheckpointError(
            "no checkpoint there", value=str(folder), fix="give a checkpoint or a run folder"
        ) from None
    except KeyError as error:
        raise CheckpointError(f"manifest is damaged: it has no {error}", where=str(path), fix=_OTHER) from None
    except OSError as error:
        raise CheckpointError(f"manifest cannot be read: {error.strerror}", where=str(path), fix=_OTHER) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"manifest is damaged: {error}", where=str(path), fix=_OTHER) from None
    for name, fact in manifest.files.items():
        if Path(name).name != name:
            raise CheckpointError(
                "manifest names a file outside its folder", value=name, where=str(path), fix="do not use it"
            )
        _check_size(folder / name, fact)
    for index in range(manifest.num_layers):
        if layer_file(index) not in manifest.files:
            raise CheckpointError("checkpoint lacks a layer", value=layer_file(index), where=str(folder), fix=_OTHER)
    return manifest


def _manifest(folder: Path, raw: Any) -> Manifest:
    """Return the manifest in parsed JSON; ValueError, TypeError, KeyError or AttributeError where it is none."""
    files = {
        str(name): FileFact(size_bytes=int(fact["size_bytes"]), sha256=str(fact["sha256"]))
        for name, fact in raw["files"].items()
    }
    facts = {name: raw["facts"][name] for name in _FACTS} | dict(raw["facts"])
    for name, value in (("steps_done", raw["steps_done"]), ("num_blocks", facts["model"]["num_blocks"])):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
    return Manifest(path=folder, steps_done=raw["steps_done"], facts=facts, files=files)


def check_matches(manifest: Manifest, job: JobConfig, data_digest: str | None) -> None:
    """Refuse to resume a job whose mathematics differs from the checkpoint's, or that has nothing left to do.

    Args:
        data_digest: of the job's tokens; None where they are not made yet: the text is not compared.

    Raises:
        CheckpointError: names the first fact that differs, and both values.
    """
    wanted = _flat(job_facts(job, manifest.facts["data"] if data_digest is None else data_digest))
    found = _flat(manifest.facts)
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            same = "train on the same text" if key == "data" else f"set {_JOB_KEY.get(key, key)} to {found.get(key)}"
            raise CheckpointError(
                f"checkpoint is of another job: {key} is {found.get(key)} there and {wanted.get(key)} in the job",
                value=wanted.get(key),
                valid=str(found.get(key)),
                where=str(manifest.path),
                fix=f"{same}, or start without --resume",
            )
    if manifest.steps_done >= job.steps:
        raise CheckpointError(
            "checkpoint is at the job's end or beyond it",
            value=manifest.steps_done,
            valid=f"fewer steps done than the job's steps = {job.steps}",
            where=str(manifest.path),
            fix=f"set steps to more than {manifest.steps_done}",
        )


_JOB_KEY = {"global_batch": "batch.global_batch"}


def check_content(manifest: Manifest) -> None:
    """Compare every file with its checksum; reads the whole checkpoint, several files at once.

    Raises:
        CheckpointError: a file is altered or cannot be read.
    """
    with ThreadPoolExecutor(max_workers=_HASHING_THREADS) as pool:
        # A list: the first failure in the order of the layers is told.
        list(pool.map(lambda name: _check_sha256(manifest, name), sorted(manifest.files)))


def _check_sha256(manifest: Manifest, name: str) -> None:
    path = manifest.path / name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file cannot be read: {error.strerror}", where=str(path), fix=_OTHER
        ) from None
    if digest != manifest.files[name].sha256:
        raise _altered(path)


def _altered(path: Path) -> CheckpointError:
    return CheckpointError("checkpoint file is altered: its sha256 differs", where=str(path), fix=_OTHER)


def read_layer(manifest: Manifest, index: int) -> dict[str, dict[str, Tensor]]:
    """Return a layer's tensors as {weight|exp_avg|exp_avg_sq: {global name: tensor}}, checksum verified.

    Raises:
        CheckpointError: the file is cut, altered or no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = layer_file(index)
    path = manifest.path / name
    _check_size(path, manifest.files[name])
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise _altered(path)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file is damaged: {error}", where=str(path), fix=_OTHER) from None
    out: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, parameter = key.partition(":")
        out.setdefault(part, {})[parameter] = tensor
    return out


def check_names(
    manifest: Manifest,
    index: int,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a layer whose parameters, name -> shape, are not the model's."""
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise CheckpointError(
            f"checkpoint layer has another {odd[0]}: {found.get(odd[0])} there, {wanted.get(odd[0])} in the model",
            where=str(manifest.path / layer_file(index)),
            fix="resume with the model that wrote it",
        )


def _check_size(path: Path, fact: FileFact) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise CheckpointError(
            "checkpoint file is missing", value=path.name, where=str(path.parent), fix=_OTHER
        ) from None
    if size != fact.size_bytes:
        raise CheckpointError(f"checkpoint file is cut: {size} bytes of {fact.size_bytes}", where=str(path), fix=_OTHER)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            out.update(_flat(inner, f"{prefix}{key}."))
        else:
            out[prefix + key] = inner
    return out


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"checkpoint cannot be written: {error.strerror}", value=str(path), fix="free space there, and resume"
        ) from error


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
