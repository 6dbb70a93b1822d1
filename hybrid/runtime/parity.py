"""Parity: a job's first steps under each stage's emulated numerics, beside fp32 on the CPU, in one process.

Three computations from the same weights: fp32 on the CPU (the reference), bf16 on the CPU (the yardstick), and the
job's precision with every stage's chip emulated. A layer is judged by itself, given the reference's input and output
gradient, so that no layer is blamed for another's error; the whole run is told beside it. Every step starts from the
reference's weights. The step's first microbatch is compared. May import all but the launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybrid.backends.number_emulation import MatmulNumerics, NumericsOf, emulated_matmuls
from hybrid.config import JobConfig, Precision
from hybrid.errors import ConfigError
from hybrid.hardware.fleet import Fleet
from hybrid.hardware.numerics import load_numerics
from hybrid.models.decoder import layer_name
from hybrid.models.sampler import batch_at
from hybrid.models.stage import Stage, boundary_dtype, build_stage, compute_context, microbatch_loss, named_state
from hybrid.models.tokens import TokenData
from hybrid.runtime.optimizer import AdamW, global_norm
from hybrid.runtime.parity_cause import Product, likely_cause, replay
from hybrid.runtime.parity_report import (
    Cause,
    Errors,
    LayerRow,
    ParityReport,
    Ratio,
    first_out,
    ratio_of,
    weights_out,
    worst,
)
from hybrid.runtime.reference import accumulate_gradients
from hybrid.runtime.stage_numerics import declared_numerics
from hybrid.runtime.stage_state import squares_of_layers
from hybrid.scheduler.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """One microbatch's forward and backward, layer by layer."""

    inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    output_grads: Mapping[int, Tensor]
    weight_grads: Mapping[int, Tensor]
    """Flat, all parameters of a layer."""
    products: Mapping[tuple[int, str], Product]


def run_parity(
    job: JobConfig,
    fleet: Fleet,
    plan: Plan,
    tokens: TokenData,
    *,
    steps: int,
    instead: Mapping[str, MatmulNumerics] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> ParityReport:
    """Compare the job's first steps with the reference.

    Args:
        instead: numerics by a layer's name (`block.02`) or a weight's (`block.02.mlp.down.weight`), where they are
            not what the job says: what a chip that misbehaves would do.
        on_step: told each step that is done.

    Raises:
        ConfigError: the job's precision is fp64, a name in `instead` is none, or numerics that have no effect.
        UnsupportedFormat: numerics that a chip does not have.
    """
    if job.precision == "fp64":
        raise ConfigError("parity is judged in units of bf16's error", value="fp64", valid=["fp32", "bf16"])
    model = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=torch.float32)
    numerics = _numerics_by_layer(job, fleet, plan, model, instead or {})
    optimizer = AdamW(named_state(model), job.optimizer, job.steps)
    limits = load_numerics().parity.limits(job.precision)
    rows_of_step: list[list[LayerRow]] = []
    verdict: dict[str, Any] = {"first_layer": None}
    for step in range(steps):
        reference, rows = _compare(job, plan, model, numerics, tokens, step)
        rows_of_step.append(rows)
        out = first_out(rows, limits)
        if out is not None and verdict["first_layer"] is None:
            names = weights_out(out, limits)
            cause = _cause(job, rows.index(out), names, reference, numerics)
            verdict = {"first_layer": out.layer, "first_step": step, "weights": names, "cause": cause}
        on_step(step)
        if step + 1 < steps:
            accumulate_gradients(model, job.model_copy(update={"precision": "fp32"}), tokens, step)
            optimizer.step(step, global_norm(list(squares_of_layers(model).values())))
    return ParityReport(
        job=job.name,
        precision=job.precision,
        steps=steps,
        max_linf_ratio=limits[0],
        max_l2_ratio=limits[1],
        rows=tuple(_merge(rows) for rows in zip(*rows_of_step, strict=True)),
        **verdict,
    )


def _numerics_by_layer(
    job: JobConfig, fleet: Fleet, plan: Plan, model: Stage, instead: Mapping[str, MatmulNumerics]
) -> list[NumericsOf]:
    """Return for each layer what numerics each of its weights has."""
    layers = {layer_name(job.model, index): index for index in model.layers}
    unknown = sorted(instead.keys() - layers.keys() - named_state(model).keys())
    if unknown:
        raise ConfigError("no such layer or weight", value=unknown[0], valid=layers, fix="name one of these")
    declared = {
        index: declared_numerics(job, island=s.island, chip=fleet.island(s.island).chip, backend=s.backend)
        for s in plan.replicas[0].stages
        for index in s.layers
    }

    def numerics_of(name: str, index: int) -> NumericsOf:
        return lambda weight: instead.get(f"{name}.{weight}", instead.get(name, declared[index]))

    return [numerics_of(name, index) for name, index in layers.items()]


def _compare(
    job: JobConfig, plan: Plan, model: Stage, numerics: Sequence[NumericsOf], tokens: TokenData, step: int
) -> tuple[_Trace, list[LayerRow]]:
    """Return the reference's trace of a step's first microbatch, and each layer's ratios."""
    ids, targets = batch_at(
        tokens.train_tokens,
        seed=job.seed,
        step=step,
        global_batch=job.batch.global_batch,
        first_sample=0,
        num_samples=job.batch.microbatch,
        sequence_length=job.model.sequence_length,
    )
    batch = torch.from_numpy(ids), torch.from_numpy(targets)
    seed = job.seed + step
    reference = _trace(model, batch, "fp32", None, seed)
    yardstick = _trace(model, batch, "bf16", None, seed)
    found = _trace(model, batch, job.precision, numerics, seed)
    rows = []
    for index, layer in model.layers.items():
        stage = next(s for s in plan.replicas[0].stages if index in s.layers)
        near = _alone(layer, index, reference, "bf16", None, seed)
        ours = _alone(layer, index, reference, job.precision, numerics[index], seed)
        exact = reference.outputs[index], reference.weight_grads[index]
        output, gradient = (_ratio(a, b, c) for a, b, c in zip(ours, near, exact, strict=True))
        rows.append(
            LayerRow(
                layer=layer_name(job.model, index),
                stage=stage.stage,
                island=stage.island,
                chip=stage.chip,
                output=output,
                gradient=gradient,
                product_of_weight={
                    weight: _product_ratio(product, numerics[index](weight), job.precision, seed)
                    for (owner, weight), product in reference.products.items()
                    if owner == index
                },
                end_to_end_output=_ratio(found.outputs[index], yardstick.outputs[index], exact[0]),
                end_to_end_gradient=_ratio(found.weight_grads[index], yardstick.weight_grads[index], exact[1]),
            )
        )
    return reference, rows


def _cause(
    job: JobConfig, index: int, weights: Sequence[str], reference: _Trace, numerics: Sequence[NumericsOf]
) -> Cause:
    """Return what makes the worst of a layer's products err."""
    if not weights:
        return Cause(kind="unknown", detail="every product is in the band: see norms and attention", distance=1.0)
    product = reference.products[index, weights[0]]
    # Another seed than the candidates': a chip's chance is its own.
    found = replay(product, numerics[index](weights[0]), job.precision, seed=job.seed)
    return likely_cause(product, found, job.precision, seed=job.seed + 1)


def _trace(
    model: Stage,
    batch: tuple[Tensor, Tensor],
    precision: Precision,
    numerics: Sequence[NumericsOf] | None,
    seed: int,
) -> _Trace:
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    recorders = {index: _Recorder(layer) for index, layer in model.layers.items()}
    x = batch[0]
    with compute_context(precision):
        for index, layer in model.layers.items():
            inputs[index] = x
            with recorders[index], _emulated(layer, None if numerics is None else numerics[index], seed + index):
                x = layer(x)
            outputs[index] = x
        loss = microbatch_loss(x, batch[1])
        products = [(index, name, call) for index, r in recorders.items() for name, call in r.calls.items()]
        wanted = [*outputs.values(), *model.parameters(), *(call[2] for _, _, call in products)]
        grads = iter(torch.autograd.grad(loss, wanted))
    output_grads = {index: next(grads) for index in outputs}
    grad_of_parameter = {id(parameter): next(grads) for parameter in model.parameters()}
    return _Trace(
        inputs={index: x.detach() for index, x in inputs.items()},
        outputs={index: y.detach().float() for index, y in outputs.items()},
        output_grads=output_grads,
        weight_grads={
            index: torch.cat([grad_of_parameter[id(p)].flatten() for p in layer.parameters()])
            for index, layer in model.layers.items()
        },
        products={
            (index, name): Product(
                x=x.detach(),
                weight=weight.detach(),
                grad=next(grads),
                y=y.detach().float(),
                grad_weight=grad_of_parameter[id(weight)],
            )
            for index, name, (x, weight, y) in products
        },
    )


class _Recorder(TorchFunctionMode):
    """Keeps what goes in and out of each product with one of a layer's weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._name_of_id = {id(parameter): name for name, parameter in layer.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self._name_of_id:
            self.calls[self._name_of_id[id(args[1])]] = (args[0], args[1], out)
        return out


def _alone(
    layer: nn.Module, index: int, reference: _Trace, precision: Precision, numerics: NumericsOf | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Return a layer's output and flat weight gradient, given the reference's input and output gradient."""
    x = reference.inputs[index]
    if x.is_floating_point():
        x = x.to(boundary_dtype(precision))
    with compute_context(precision), _emulated(layer, numerics, seed + index):
        y = layer(x)
        grads = torch.autograd.grad(y, list(layer.parameters()), reference.output_grads[index].to(y.dtype))
    return y.detach().float(), torch.cat([grad.flatten() for grad in grads])


def _emulated(layer: nn.Module, numerics: NumericsOf | None, seed: int) -> AbstractContextManager[None]:
    return nullcontext() if numerics is None else emulated_matmuls(layer, numerics, seed=seed)


def _product_ratio(product: Product, numerics: MatmulNumerics | None, precision: Precision, seed: int) -> Ratio:
    ours, near = replay(product, numerics, precision, seed=seed), replay(product, None, "bf16", seed=seed)
    return worst([_ratio(ours.y, near.y, product.y), _ratio(ours.grad_weight, near.grad_weight, product.grad_weight)])


def _ratio(found: Tensor, yardstick: Tensor, exact: Tensor) -> Ratio:
    return ratio_of(_errors(found, exact), _errors(yardstick, exact))


def _errors(found: Tensor, exact: Tensor) -> Errors:
    error = (found - exact).flatten()
    return Errors(linf=float(error.abs().amax()), l2=float(torch.linalg.vector_norm(error)))


def _merge(rows: Sequence[LayerRow]) -> LayerRow:
    """Return a layer's row with the worst of every step."""
    return replace(
        rows[0],
        output=worst([row.output for row in rows]),
        gradient=worst([row.gradient for row in rows]),
        product_of_weight={
            name: worst([row.product_of_weight[name] for row in rows]) for name in rows[0].product_of_weight
        },
        end_to_end_output=worst([row.end_to_end_output for row in rows]),
        end_to_end_gradient=worst([row.end_to_end_gradient for row in rows]),
    )
