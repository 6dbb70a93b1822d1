"""`hybrid export`: a run's weights as one safetensors file, with its config and tokenizer, for use elsewhere."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from hybrid.errors import CheckpointError
from hybrid.runtime import checkpoint


def run_export(run: Path, *, to: Path) -> None:
    """Write `model.safetensors`, `config.json` and `tokenizer.json` into a new folder, in one rename.

    Raises:
        CheckpointError: no whole checkpoint, or the folder is taken.
    """
    if to.exists():
        raise CheckpointError(
            "the export's folder exists already", value=str(to), fix="give another --to, or remove it"
        )
    manifest = checkpoint.read_manifest(checkpoint.find_checkpoint(run))
    from safetensors.torch import save_file

    weights = {}
    num_layers = int(manifest.facts["model"]["num_blocks"]) + 2
    for index in range(num_layers):
        weights.update(checkpoint.read_layer(manifest, index)["weight"])
    if manifest.facts["model"]["tied_embeddings"]:
        # One tensor in the file where the model has one weight.
        del weights["head.weight"]
    to.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        config = {"steps_done": manifest.steps_done, **manifest.facts}
        (building / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _copy_tokenizer(manifest, building)
        building.chmod(0o755)
        building.rename(to)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    print(f"{to}: {len(weights)} tensors after {manifest.steps_done} steps")


def _copy_tokenizer(manifest: checkpoint.Manifest, folder: Path) -> None:
    tokenizer = manifest.path.parent.parent / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
