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

STATE_NAMES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, in the names of torch.optim.AdamW."""


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
        each tensor's norm is taken in float64, squares are added in the order given.
    """
    total = 0.0
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2
    return total


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
    """torch's fused AdamW over named parameters; matrices decay, vectors do not.

    Args:
        parameters: by global name; leaves in the master format.
        num_steps: the length of the job, which the cosine needs.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, num_steps: int) -> None:
        self._parameters = dict(parameters)
        self._config, self._num_steps = config, num_steps
        groups = [
            {
                "params": [p for p in self._parameters.values() if p.ndim >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in self._parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def step(self, step: int, norm: float) -> None:
        """Clip by the global norm, update with the rate of `step`, and clear the gradients."""
        coefficient = clip_coefficient(norm, self._config.clip_norm)
        if coefficient != 1.0:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, coefficient)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self._config, step, self._num_steps)
        self._adamw.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients but keep their memory."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return exp_avg and exp_avg_sq by parameter name; zeros before the first step."""
        return {
            name: {key: self._adamw.state[p].get(key, torch.zeros_like(p)) for key in STATE_NAMES}
            for name, p in self._parameters.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], *, steps_done: int) -> None:
        """Set the state of every parameter, as of after `steps_done` steps."""
        for name, parameter in self._parameters.items():
            moments = {key: state[name][key].to(parameter.dtype).clone() for key in STATE_NAMES}
            self._adamw.state[parameter] = {"step": torch.tensor(float(steps_done)), **moments}
