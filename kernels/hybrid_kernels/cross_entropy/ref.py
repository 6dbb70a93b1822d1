"""Cross-entropy of the output projection, slow and obvious: here the logits do exist whole.

Letters: N tokens, H hidden size, V vocabulary. May import only torch and `precision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    """Return each token's ``logsumexp(weight @ hidden) - logit of its label``; 0 where the label is ignored.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,), integers in [0, V) or `ignore_index`.  returns: (N,)

    Numerics:
        Operands widened to float32 (float64 for float64) and the losses returned in that format. The largest
        logit is subtracted before the exponential, so that large logits do not overflow. A token whose logits
        hold a NaN or +inf has a loss that is not finite; an ignored token is 0 whatever its logits.
    """
    logits = wide(hidden) @ wide(weight).T
    kept = labels != ignore_index
    label_logits = logits.gather(1, labels.where(kept, 0).long()[:, None])[:, 0]
    return (torch.logsumexp(logits, dim=1) - label_logits).where(kept, 0.0)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, scale: float) -> Tensor:
    """Return ``scale * sum(token_losses)``; `scale` is 1 for a sum and 1/tokens for a mean.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,).  returns: ()
    """
    return token_losses(hidden, weight, labels, ignore_index=ignore_index).sum() * scale


def cross_entropy_backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``hidden`` and of ``weight``, for an upstream gradient of 1.

    ``grad_logits = scale * (softmax(logits) - one_hot(label))``, and a row of zeros for an ignored token.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,).  returns: (N, H) and (V, H)
    """
    hidden_wide, weight_wide = wide(hidden), wide(weight)
    kept = labels != ignore_index
    grad_logits = torch.softmax(hidden_wide @ weight_wide.T, dim=1)
    rows = torch.arange(len(labels), device=labels.device)[kept]
    grad_logits[rows, labels[kept].long()] -= 1.0
    grad_logits = (grad_logits * scale).where(kept[:, None], 0.0)
    grad_hidden, grad_weight = grad_logits @ weight_wide, grad_logits.T @ hidden_wide
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


def cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    scale: float,
    needs_hidden: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and, where needed, the gradients of ``hidden`` and ``weight``.

    The form that the faster variants have: they make the gradients while a chunk of logits is at hand.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,).  returns: (), (N, H) or None, (V, H) or None
    """
    loss = cross_entropy(hidden, weight, labels, ignore_index=ignore_index, scale=scale)
    if not needs_hidden and not needs_weight:
        return loss, None, None
    grads = cross_entropy_backward(hidden, weight, labels, ignore_index=ignore_index, scale=scale)
    return loss, grads[0] if needs_hidden else None, grads[1] if needs_weight else None
