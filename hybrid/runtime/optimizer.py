"""AdamW on fp32 (or fp64) master weights, clipping by the global norm, and the learning rate by step.

Everything that decides is a function of values that every rank has; so ranks that hold the same bits go on
holding them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid.config import OptimizerConfig
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


_BLOCK = 4096
"""Elements whose squares an accelerator adds in float32."""


def squared_norm(gradients: list[Tensor]) -> float:
    """Return the sum of squares of one layer's gradients.

    Numerics:
        On the host each tensor's norm is taken in float64, squares are added in the order given. On an accelerator,
        which may have no float64, squares of 4,096 elements are added in float32 there and these sums in float64 on the
        host: within 1e-5 of the former, relative (one copy to the host a layer).
    """
    if gradients and gradients[0].device.type != "cpu":
        partials = torch.cat([_block_squares(gradient) for gradient in gradients])
        return float(partials.to("cpu").double().sum())
    total = 0.0
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2
    return total


def _block_squares(gradient: Tensor) -> Tensor:
    """Return the sums of squares of a gradient's blocks, float32, on its device.

    Shapes:
        gradient: any, N elements.  returns: (ceil(N / 4096),)
    """
    flat = gradient.detach().reshape(-1).float()
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = flat[:whole].view(-1, _BLOCK).square().sum(1)
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

    Source:
        Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, num_steps: int) -> None:
        self._parameters = dict(parameters)
        self._config, self._num_steps = config, num_steps
        self._moments = {
            name: {key: torch.zeros_like(p, requires_grad=False) for key in STATE_NAMES}
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def step(self, step: int, norm: float) -> None:
        """Clip by the global norm, update with the rate of `step` (from 0), and clear the gradients."""
        config = self._config
        coefficient = clip_coefficient(norm, config.clip_norm)
        rate = learning_rate(config, step, self._num_steps)
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            moments = self._moments[name]
            adamw_(
                parameter.detach().view(-1),
                parameter.grad.view(-1),
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
        """Return exp_avg and exp_avg_sq by parameter name; zeros before the first step."""
        return self._moments

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the moments of every parameter."""
        for name, moments in self._moments.items():
            for key, moment in moments.items():
                moment.copy_(state[name][key])
