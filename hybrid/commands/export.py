"""`hybrid export`: a run's weights as one safetensors file, with its config and tokenizer, for use elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import MachineError
from hybrid.runtime import checkpoint
from hybrid.runtime.preflight import check_folder

if TYPE_CHECKING:
    from torch import Tensor


def run_export(run: Path, *, to: Path) -> None:
    """Write `model.safetensors`, `config.json` and `tokenizer.json` into a new folder, in one rename.

    Raises:
        CheckpointError: no whole checkpoint.
        MachineError: the folder is taken or cannot be made; nothing of it is left.
    """
    if to.exists() or to.is_symlink():
        raise MachineError(
            "the export's folder is there already",
            value=str(to),
            valid="a folder that is not there yet",
            where="--to",
            fix="give another, or remove it",
        )
    manifest = checkpoint.read_manifest(checkpoint.find_checkpoint(run))
    check_folder(to.parent, where="--to")
    weights: dict[str, Tensor] = {}
    for index in range(manifest.num_layers):
        weights.update(checkpoint.read_layer(manifest, index).get("weight", {}))
    if manifest.facts["model"].get("tied_embeddings"):
        # One tensor in the file where the model has one weight.
        weights.pop("head.weight", None)
    try:
        _write(weights, manifest, to)
    except OSError as error:
        raise MachineError(
            f"the export cannot be written: {error.strerror}",
            value=str(to),
            valid="a folder in one that can be written, with room",
            where="--to",
            fix="give another, or free space there",
        ) from None
    print(f"{to}: {len(weights)} tensors after {manifest.steps_done} steps")


def _write(weights: Mapping[str, Tensor], manifest: checkpoint.Manifest, to: Path) -> None:
    """Make the folder under another name and rename it, so that nobody sees half of it."""
    from safetensors.torch import save

    made = [folder for folder in to.absolute().parents if not folder.exists()]
    to.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        (building / "model.safetensors").write_bytes(save(dict(weights), metadata={"format": "pt"}))
        config = {"steps_done": manifest.steps_done, **manifest.facts}
        (building / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _copy_tokenizer(manifest, building)
        building.chmod(0o755)
        building.rename(to)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _copy_tokenizer(manifest: checkpoint.Manifest, folder: Path) -> None:
    tokenizer = manifest.path.parent.parent / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
