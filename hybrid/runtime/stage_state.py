"""A stage's state by layer: what a checkpoint holds of it, and its gradients' squares for the global norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hybrid.models.decoder import layer_name
from hybrid.models.stage import Stage, named_state
from hybrid.runtime import checkpoint
from hybrid.runtime.axes import SINGLE, StageAxes
from hybrid.runtime.optimizer import STATE_NAMES, AdamW
from hybrid.runtime.stage_sums import counted_squares, shards_of
from hybrid.runtime.whole_layers import WholeLayer, own_part, whole_shape


def names_of_layer(stage: Stage, index: int) -> list[str]:
    """Return the global names of one layer's parameters."""
    prefix = layer_name(stage.config, index) + "."
    return [name for name in named_state(stage) if name.startswith(prefix)]


def squares_of_layers(stage: Stage, axes: StageAxes = SINGLE) -> dict[int, float]:
    """Return each layer's sum of squared gradients; a tied weight counts once, in the embedding."""
    return counted_squares(stage, axes)


def is_due(every: int | None, *, at_end: bool, steps_done: int) -> bool:
    """Return whether something that happens every so many steps, or at the end, happens now."""
    return at_end or (every is not None and steps_done % every == 0)


class StageState:
    """Writes and loads a stage's layers, with the optimizer's moments.

    A file holds whole tensors, whatever number of ranks holds their parts: a stage's ranks write its layers in turn,
    each from the parts of all, and each takes its own parts of what it loads.

    Args:
        place: of this rank among those of its stage; copy after copy, in each the tensor-parallel ranks in order.
        width: how many copies of the stage there are.
    """

    def __init__(self, stage: Stage, optimizer: AdamW, *, place: int = 0, width: int = 1) -> None:
        self._stage, self._optimizer = stage, optimizer
        self._place, self._width = place, width
        self._degree = stage.parallel.axis.size if stage.parallel else 1

    def write(
        self, folder: Path, more: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> dict[str, checkpoint.FileFact]:
        """Write this rank's share of the stage's layers into the checkpoint's partial folder.

        Args:
            more: by parameter, what else is kept of it.
        """
        moments, files = self._optimizer.state(), dict[str, checkpoint.FileFact]()
        for index in self._stage.layers:
            names = names_of_layer(self._stage, index)
            files |= self.write_layer(
                folder, index, {name: {**moments[name], **(more or {}).get(name, {})} for name in names}
            )
        return files

    def write_layer(
        self, folder: Path, index: int, moments: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, checkpoint.FileFact]:
        """Write one layer, where it is this rank's turn; all ranks of the stage call it.

        Args:
            moments: this rank's part of each parameter's, by name, and what else is kept in their shape.
        """
        writer = index % (self._width * self._degree)
        if writer // self._degree != self._place // self._degree:
            return {}  # another copy of the stage has the same bits
        whole = WholeLayer(self._stage, index, is_kept=writer == self._place)
        state = named_state(self._stage)
        weights = {name: whole.join(name, state[name].detach()) for name in moments}
        states = {name: {key: whole.join(name, x) for key, x in each.items()} for name, each in moments.items()}
        if not whole.is_kept:
            return {}
        return {checkpoint.layer_file(index): checkpoint.write_layer(folder, index, weights, states)}

    def load(self, folder: Path) -> int:
        """Load every layer of the stage from a whole checkpoint; return how many steps were done.

        Raises:
            CheckpointError: a file is missing, cut, altered or of another model.
        """
        manifest = checkpoint.read_manifest(folder)
        weights, shards = named_state(self._stage), shards_of(self._stage)
        moments = {}
        for index in self._stage.layers:
            layer = checkpoint.read_layer(manifest, index)
            names = names_of_layer(self._stage, index)
            for part in ("weight", *STATE_NAMES):
                found = {name: tuple(tensor.shape) for name, tensor in layer.get(part, {}).items()}
                wanted = {name: whole_shape(weights[name], shards[name]) for name in names}
                checkpoint.check_names(manifest, index, found, wanted)
            with torch.no_grad():
                for name in names:
                    weights[name].copy_(own_part(layer["weight"][name], shards[name]))
                    moments[name] = {key: own_part(layer[key][name], shards[name]) for key in STATE_NAMES}
        self._optimizer.load_state(moments)
        return manifest.steps_done
