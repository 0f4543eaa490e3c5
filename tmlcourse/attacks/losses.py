"""What an attacker maximises: functions of logits (N, K) and labels (N,), one number an image, larger is worse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """l(z, y) = log sum_j exp z_j - z_y: (N, K), (N,) -> (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive exactly where another class wins. (N, K), (N,) -> (N,).

    Its gradient does not vanish where the softmax saturates. Source: Carlini & Wagner 2017.
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true


def difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The lecture's targeted objective l(z, y) - l(z, target), which is z_target - z_y. (N, K), (N,), (N,) -> (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def objective(loss: str | Callable, target: Tensor | None) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The function (logits, y, target) -> (N,) to maximise, by name or as given.

    Untargeted: "cross_entropy", "margin", or a callable (logits, y). Targeted: "cross_entropy" (that of the target,
    negated), "margin" (of the target, negated), "difference", or a callable (logits, y, target).
    """
    if callable(loss):
        return (lambda z, y, t: loss(z, y)) if target is None else loss
    if target is None:
        named = {"cross_entropy": cross_entropy, "margin": margin}
        chosen = named[checks.choice(loss, "loss", named)]
        return lambda z, y, t: chosen(z, y)
    named = {
        "cross_entropy": lambda z, y, t: -cross_entropy(z, t),
        "margin": lambda z, y, t: -margin(z, t),
        "difference": difference,
    }
    return named[checks.choice(loss, "loss", named)]
