"""A stage's state by layer: what a checkpoint holds of it, and its gradients' squares for the global norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hybrid.models.decoder import layer_name
from hybrid.models.stage import Stage, named_state, tied_parameters
from hybrid.runtime import checkpoint
from hybrid.runtime.optimizer import STATE_NAMES, AdamW, squared_norm


def names_of_layer(stage: Stage, index: int) -> list[str]:
    """Return the global names of one layer's parameters."""
    prefix = layer_name(stage.config, index) + "."
    return [name for name in named_state(stage) if name.startswith(prefix)]


def squares_of_layers(stage: Stage) -> dict[int, float]:
    """Return each layer's sum of squared gradients; a tied weight counts once, in the embedding."""
    tied = tied_parameters(stage.config)
    state = named_state(stage)
    out: dict[int, float] = {}
    for index in stage.layers:
        names = [name for name in names_of_layer(stage, index) if tied is None or name != tied[1]]
        out[index] = squared_norm([grad for name in names if (grad := state[name].grad) is not None])
    return out


def is_due(every: int | None, *, at_end: bool, steps_done: int) -> bool:
    """Return whether something that happens every so many steps, or at the end, happens now."""
    return at_end or (every is not None and steps_done % every == 0)


class StageState:
    """Writes and loads a stage's layers, with the optimizer's moments."""

    def __init__(self, stage: Stage, optimizer: AdamW) -> None:
        self._stage, self._optimizer = stage, optimizer

    def write(
        self, folder: Path, more: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> dict[str, checkpoint.FileFact]:
        """Write every layer of the stage into the checkpoint's partial folder.

        Args:
            more: by parameter, what else is kept of it.
        """
        state, moments = named_state(self._stage), self._optimizer.state()
        files: dict[str, checkpoint.FileFact] = {}
        for index in self._stage.layers:
            names = names_of_layer(self._stage, index)
            weights = {name: state[name].detach().cpu() for name in names}
            states = {name: {**moments[name], **(more or {}).get(name, {})} for name in names}
            files[checkpoint.layer_file(index)] = checkpoint.write_layer(
                folder, index, weights, {name: {key: x.cpu() for key, x in states[name].items()} for name in names}
            )
        return files

    def load(self, folder: Path) -> int:
        """Load every layer of the stage from a whole checkpoint; return how many steps were done.

        Raises:
            CheckpointError: a file is missing, cut, altered or of another model.
        """
        manifest = checkpoint.read_manifest(folder)
        weights = named_state(self._stage)
        moments = {}
        for index in self._stage.layers:
            layer = checkpoint.read_layer(manifest, index)
            names = names_of_layer(self._stage, index)
            for part in ("weight", *STATE_NAMES):
                found = {name: tuple(tensor.shape) for name, tensor in layer.get(part, {}).items()}
                checkpoint.check_names(manifest, index, found, {name: tuple(weights[name].shape) for name in names})
            with torch.no_grad():
                for name in names:
                    weights[name].copy_(layer["weight"][name])
                    moments[name] = {key: layer[key][name] for key in STATE_NAMES}
        self._optimizer.load_state(moments)
        return manifest.steps_done
