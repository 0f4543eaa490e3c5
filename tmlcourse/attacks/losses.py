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


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), z_(k) the k-th largest: (N, K), (N,) -> (N,).

    Like the margin it is positive exactly where another class wins; unlike it, it does not change when the logits are
    shifted or multiplied by a positive number, so no scale hides its gradient. It divides by the third largest logit and
    needs K >= 3; with two classes use "margin". Source: Croce & Hein 2020, equation 6.
    """
    top = _largest(logits, 3, "dlr", "margin")
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(_FLAT)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), z_(k) the k-th largest; needs K >= 4. (N, K), (N,), (N,) -> (N,).

    Shift and scale of the logits cancel as in `dlr`; with fewer classes use "difference". Source: Croce & Hein 2020,
    equation 7.
    """
    top = _largest(logits, 4, "targeted dlr", "difference")
    return difference(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(_FLAT)


_FLAT = 1e-12  # where the largest logits are all the same, the ratios divide by this instead of by zero


def _largest(logits: Tensor, k: int, name: str, instead: str) -> Tensor:
    if logits.shape[1] < k:
        raise ValueError(
            f"loss: got {name} and K = {logits.shape[1]} classes, want K >= {k}; with fewer use {instead!r}"
        )
    return logits.topk(k, dim=1).values


def difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The lecture's targeted objective l(z, y) - l(z, target), which is z_target - z_y. (N, K), (N,), (N,) -> (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def fools(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Whether the model is wrong (with a target: answers it), by more than rounding: bool (N,).

    Another layout or batch size may move a logit by its last digits, and a fall must stay one.
    """
    ahead = margin(logits, y) if target is None else -margin(logits, target)
    return ahead > 1e-5 * (1 + logits.abs().amax(1))


def objective(loss: str | Callable, target: Tensor | None) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The function (logits, y, target) -> (N,) to maximise, by name or as given.

    Untargeted: "cross_entropy", "margin", "dlr", or a callable (logits, y). Targeted: "cross_entropy" (that of the target,
    negated), "margin" (of the target, negated), "difference", "dlr", or a callable (logits, y, target).
    """
    if callable(loss):
        return (lambda z, y, t: loss(z, y)) if target is None else loss
    if target is None:
        named = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
        chosen = named[checks.choice(loss, "loss", named)]
        return lambda z, y, t: chosen(z, y)
    named = {
        "cross_entropy": lambda z, y, t: -cross_entropy(z, t),
        "margin": lambda z, y, t: -margin(z, t),
        "difference": difference,
        "dlr": targeted_dlr,
    }
    return named[checks.choice(loss, "loss", named)]
