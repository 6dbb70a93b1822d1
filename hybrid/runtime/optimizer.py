"""AdamW on fp32 (or fp64) master weights, clipping by the global norm, and the learning rate by step.

Everything that decides is a function of values that every rank has; so ranks that hold the same bits go on
holding them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hybrid.config import OptimizerConfig
from hybrid.scheduler.reduction import BLOCK
from hybrid_kernels.adamw import adamw_

STATE_NAMES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, by the names that torch.optim.AdamW uses too."""


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then cosine decay to the minimum share at the last step."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    floor = peak * config.min_learning_rate_share
    span = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def squared_norm(gradients: list[Tensor]) -> float:
    """Return the sum of squares of one layer's gradients.

    Numerics:
        Squares are summed block by block (`block_squares`) and the blocks' sums in float64 in their order: so whoever
        has the blocks of a layer, one rank or several, gets the same bits. On an accelerator within 1e-5 of the host's,
        relative (one copy to the host a layer).
    """
    return sum_in_order([block_squares(gradient) for gradient in gradients])


def sum_in_order(parts: list[Tensor]) -> float:
    """Return the sum of all elements, added one after the other in float64; 0.0 of nothing.

    Shapes:
        parts: each (N,), float64, on the host
    """
    flat = torch.cat(parts).numpy() if parts else np.zeros(0)
    return float(np.add.accumulate(flat)[-1]) if len(flat) else 0.0


def block_squares(gradient: Tensor) -> Tensor:
    """Return the sums of squares of a gradient's blocks of `BLOCK` elements, on the host.

    Shapes:
        gradient: any, N elements.  returns: (ceil(N / BLOCK),) float64

    Numerics:
        In float64 on the host. On an accelerator, which may have no float64, a block is summed in float32. A block's
        sum has the same bits whatever blocks stand beside it.
    """
    if gradient.device.type != "cpu":
        return _block_squares(gradient).to("cpu").double()
    flat = gradient.detach().reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    parts = [torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1, dtype=torch.float64)] if whole else []
    if whole < flat.numel():
        parts.append(torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).view(1))
    return torch.cat(parts).square() if parts else torch.zeros(0, dtype=torch.float64)


def _block_squares(gradient: Tensor) -> Tensor:
    """Return the sums of squares of a gradient's blocks, float32, on its device.

    Shapes:
        gradient: any, N elements.  returns: (ceil(N / BLOCK),)
    """
    flat = gradient.detach().reshape(-1).float()
    whole = flat.numel() // BLOCK * BLOCK
    blocks = flat[:whole].view(-1, BLOCK).square().sum(1)
    return blocks if whole == flat.numel() else torch.cat((blocks, flat[whole:].square().sum().view(1)))


def global_norm(squares_of_layer: list[float]) -> float:
    """Return the model's gradient norm from each layer's sum of squares, added in layer order.

    The order is the layers', whatever the split, so every split and one device get the same bits.
    """
    total = 0.0
    for square in squares_of_layer:
        total += square
    return math.sqrt(total) if math.isfinite(total) else math.nan


def clip_coefficient(norm: float, clip_norm: float | None) -> float:
    """Return what gradients are multiplied with so that their norm is at most `clip_norm`."""
    if clip_norm is None or norm <= clip_norm:
        return 1.0
    return clip_norm / norm


class AdamW:
    """AdamW over named parameters; matrices decay, vectors do not.

    The update itself is `hybrid_kernels.adamw`: one fused pass, without torch.optim, whose first use imports torch's
    compiler (3 s of CPU a worker).

    Args:
        parameters: by global name; leaves in the master format, contiguous.
        num_steps: the length of the job, which the cosine needs.
        owned: which elements of each parameter are updated here, and have moments here; None: all of all. Starts that
            are multiples of `BLOCK` make the bits of an update of the whole.

    Source:
        Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimizerConfig,
        num_steps: int,
        owned: Mapping[str, slice] | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._config, self._num_steps = config, num_steps
        self._owned = owned
        self._moments = {
            name: {key: torch.zeros_like(self._own(name, p), requires_grad=False) for key in STATE_NAMES}
            for name, p in self._parameters.items()
            if owned is None or name in owned
        }

    def _own(self, name: str, x: Tensor) -> Tensor:
        """Return what is owned of a tensor of a parameter's shape: all of it as it is, or a flat part."""
        return x.detach() if self._owned is None else x.detach().reshape(-1)[self._owned[name]]

    @torch.no_grad()
    def step(self, step: int, norm: float) -> None:
        """Clip by the global norm, update with the rate of `step` (from 0), and clear the gradients."""
        config = self._config
        coefficient = clip_coefficient(norm, config.clip_norm)
        rate = learning_rate(config, step, self._num_steps)
        for name, moments in self._moments.items():
            parameter = self._parameters[name]
            if parameter.grad is None:
                continue
            adamw_(
                self._own(name, parameter).view(-1),
                self._own(name, parameter.grad).view(-1),
                *(moments[key].view(-1) for key in STATE_NAMES),
                step=step + 1,
                learning_rate=rate,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay if parameter.ndim >= 2 else 0.0,
                grad_scale=coefficient,
            )
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients but keep their memory."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return exp_avg and exp_avg_sq by parameter name, of what is owned; zeros before the first step."""
        return self._moments

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the moments of every parameter.

        Shapes:
            state: of each parameter its whole moments, in its shape
        """
        for name, moments in self._moments.items():
            for key, moment in moments.items():
                moment.copy_(self._own(name, state[name][key]))
