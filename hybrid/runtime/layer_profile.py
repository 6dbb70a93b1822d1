"""A measured profile: each distinct layer run on a device, its seconds and its saved bytes.

Runs the layers; reads a clock that it is given. Layers of a kind cost the same, so that the embedding, one block and
the head stand for all.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from hybrid.backends.base import Backend
from hybrid.config import ModelConfig, OptimizerConfig, Precision
from hybrid.models.measure import measure_saved_bytes
from hybrid.models.profile import build_profile
from hybrid.models.stage import Stage, boundary_dtype, boundary_shape, build_stage, named_state, parameter_dtype
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.optimizer import AdamW

_WARM_UPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """What one layer of a kind costs for one microbatch."""

    kind: str
    """`embedding`, `block` or `head`; the head's include the loss."""
    forward_s: float
    backward_s: float
    split_forward_s: float
    """Of a forward whose backward may come in two parts."""
    input_gradient_s: float
    weight_gradient_s: float
    """The two parts; together they may take longer than a whole backward."""
    update_s: float
    """Of AdamW over the layer's parameters, once a step."""
    saved_bytes: int
    """Held from the forward to the backward, the layer's input included."""
    output_bytes: int
    num_parameters: int


def measure_layers(
    model: ModelConfig,
    backend: Backend,
    *,
    microbatch: int,
    precision: Precision,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LayerSeconds, ...]:
    """Return what each kind of layer costs on a device: medians of `rounds` runs.

    A backward adds to gradients that are there, as every microbatch of a step but the first does.

    Args:
        clock: seconds; `time.thread_time` counts the processor alone, whatever else runs on the machine.

    Raises:
        UnsupportedFormat: the device lacks the precision.
        torch.OutOfMemoryError: a layer does not fit.
    """
    backend.check_precision(precision)
    profile = build_profile(model, microbatch=microbatch, precision=precision)
    found = []
    for index in dict.fromkeys((0, 1, model.num_layers - 1)):
        stage = build_stage(model, index, index + 1, seed=0, dtype=parameter_dtype(precision))
        row = profile.layers[index]
        saved = measure_saved_bytes(stage, microbatch=microbatch, precision=precision)
        seconds = _measure_stage(stage, backend, microbatch, precision, rounds, clock)
        found.append(
            LayerSeconds(
                kind=row.kind,
                forward_s=seconds["whole", "F"],
                backward_s=seconds["whole", "B"],
                split_forward_s=seconds["split", "F"],
                input_gradient_s=seconds["split", "I"],
                weight_gradient_s=seconds["split", "W"],
                update_s=_measure_update(stage, rounds, clock),
                saved_bytes=saved,
                output_bytes=row.output_bytes,
                num_parameters=sum(parameter.numel() for parameter in stage.parameters()),
            )
        )
    return tuple(found)


def _measure_stage(
    stage: Stage, backend: Backend, microbatch: int, precision: Precision, rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, str], float]:
    """Return the median seconds of one layer's actions in turn: whole backwards (F, B) and split ones (F, I, W)."""
    stage = backend.place(stage)
    for parameter in stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ways = {
        way: StageCompute(stage, backend, precision=precision, num_microbatches=1, splits=way == "split")
        for way in ("whole", "split")
    }
    shape = boundary_shape(stage.config, microbatch)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(stage.config.vocab_size, shape[:2], generator=generator)
    boundary = backend.to_device(torch.randn(shape, generator=generator).to(boundary_dtype(precision)))
    x, gradient = (ids if stage.is_first else boundary), (None if stage.is_last else boundary * 1e-3)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def run(way: str, kind: str, act: Callable[[], object], *, counts: bool) -> None:
        backend.synchronize()
        start_s = clock()
        act()
        backend.synchronize()
        if counts:
            seconds[way, kind].append(clock() - start_s)

    with ways["whole"].context():
        for turn in range(_WARM_UPS + rounds):
            for way, compute in ways.items():
                one = partial(run, way, counts=turn >= _WARM_UPS)
                one("F", partial(compute.forward, 0, x, ids))
                if way == "whole":
                    one("B", partial(compute.backward, 0, gradient))
                else:
                    one("I", partial(compute.backward_input, 0, gradient))
                    one("W", partial(compute.backward_weight, 0))
                compute.take_loss()
    return {key: median(found) for key, found in seconds.items()}


def _measure_update(stage: Stage, rounds: int, clock: Callable[[], float]) -> float:
    """Return the median seconds of the optimizer over one layer."""
    optimizer = AdamW(named_state(stage), OptimizerConfig(), rounds + _WARM_UPS)
    seconds = []
    for turn in range(_WARM_UPS + rounds):
        start_s = clock()
        optimizer.step(turn, 0.0)
        if turn >= _WARM_UPS:
            seconds.append(clock() - start_s)
    return median(seconds)
