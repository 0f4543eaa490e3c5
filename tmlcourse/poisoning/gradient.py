"""The gradient attack on a linear classifier behind a defence: poison that climbs the loss of the retrained learner."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress
from .bounds import LOSSES, _newton, _share, _whole
from .sets import SIGNS, Sanitizer, examples

_WIDTH = {"hinge": 0.1, "logistic": 1.0}  # of the softplus that rounds the hinge
_BARRIER = 3e-3  # holds the learner inside its ball, so that it has a derivative there


def gradient_attack(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    defense: Sanitizer,
    loss: str = "hinge",
    rho: float = 1.0,
    points: int = 10,
    steps: int = 20,
    alpha: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """floor(eps n) points of poison, copies of a few, that climb the clean loss of the learner retrained on them.

        x_p <- P_F(x_p + alpha_t r_y g_p / ||g_p||),   g_p = d L(theta(D_c and D_p); D_c) / d x_p
        d theta / d x_p = -H^-1 d^2 L / (d theta d x_p),   H the Hessian of the learner's objective

    It begins with examples of the other class that pass with a wrong label. Labels stay; F is a fixed defence. The hinge is
    rounded for the derivative. The best step is kept.

    Args:
        x: clean examples (n, ...), floating point; y: int64 labels (n,) of two classes.
        eps: poison per clean example, in [0, 1). defense: `sanitizer(x, y, ...)` with fixed centroids.
        loss: "hinge" or "logistic"; rho: ||(w, b)|| <= rho, as in `certified_bound`.
        points: different points in each class; steps; alpha: first step, as a share of the class's size.
    Returns: poison (m, ...) and labels (m,), in the dtype of the data; all pass the defence.
    Raises: TypeError, ValueError: bad input.
    Source: the baseline of Steinhardt, Koh & Liang 2017; Biggio, Nelson & Laskov 2012; Koh & Liang 2017.
    Example: `gradient_attack(x, y, eps=0.05, defense=sanitizer(x, y), steps=2)[1].unique()`.
    """
    rows, signs, labels = examples(x, y)
    eps = _whole(_share(eps), len(rows))
    if not isinstance(defense, Sanitizer) or defense.data_dependent:
        raise ValueError("defense: want a Sanitizer with fixed centroids: sanitizer(x, y, data_dependent=False)")
    if defense.labels != labels or defense.centroids.shape[1] != rows.shape[1]:
        raise ValueError(f"defense: made for classes {defense.labels} and {defense.centroids.shape[1]} features, "
                         f"want {labels} and {rows.shape[1]}")  # fmt: skip
    checks.choice(loss, "loss", LOSSES)
    checks.positive(rho, "rho")
    checks.positive_int(points, "points")
    checks.positive_int(steps, "steps")
    checks.nonnegative(alpha, "alpha")
    m = round(eps * len(rows))
    moved, side = _flipped(rows, y, defense, min(points, max(m // 2, 1)))
    weight = torch.full_like(moved[:, 0], m / len(moved))
    sign = torch.tensor(SIGNS).to(moved)[side]
    clean = signs[:, None] * torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    theta, best = torch.zeros_like(clean[0]), (-math.inf, moved)
    for t in progress.bar(range(steps + 1), desc="gradient attack"):
        poison = sign[:, None] * torch.cat([moved, torch.ones_like(moved[:, :1])], 1)
        theta = _learn(clean, poison, weight, theta, rho, loss)
        value, slopes = _climb(clean, poison, weight, theta, rho, loss)
        best = max(best, (value, moved), key=lambda b: b[0])
        g = sign[:, None] * slopes[:, :-1]
        size = alpha / (1 + 4 * t / steps) * _sizes(defense)[side]
        moved = _allowed(defense, moved + size[:, None] * g / g.norm(dim=1, keepdim=True).clamp_min(1e-300), side)
    moved = best[1]
    if defense.integer:
        moved = defense.round(moved, side, torch.Generator().manual_seed(0))
    index = torch.arange(m, device=moved.device) % len(moved)
    poison_y = torch.tensor(labels, device=x.device)[side[index].to(x.device)]
    return moved[index].to(x).reshape(-1, *x.shape[1:]), poison_y


def _sizes(defense: Sanitizer) -> Tensor:
    return torch.tensor([defense._sizes(i)[0] for i in range(2)]).to(defense.centroids)


def _flipped(rows: Tensor, y: Tensor, defense: Sanitizer, points: int) -> tuple[Tensor, Tensor]:
    """Examples with the wrong label, `points` for each class, brought inside where they would not pass."""
    found, sides = [], []
    for i, label in enumerate(defense.labels):
        others = rows[y != label]
        away = (others - defense.centroids[i]).norm(dim=1).argsort()[: max(points, len(others) // 4)]
        chosen = away[torch.linspace(0, len(away) - 1, points).long().to(away.device)]
        side = torch.full((points,), i, device=rows.device)
        found.append(_allowed(defense, others[chosen], side))
        sides.append(side)
    return torch.cat(found), torch.cat(sides)


def _allowed(defense: Sanitizer, points: Tensor, side: Tensor) -> Tensor:
    """Into the slab, then into the sphere, then by and by towards a point that surely passes."""
    centre = defense.centroids[side]
    away = points - centre
    if defense.slabs is not None:
        along = away @ defense.axis
        s = defense.slabs[side]
        away = away + (along.clamp(-s, s) - along)[:, None] * defense.axis
    if defense.radii is not None:
        along = (away @ defense.axis)[:, None] * defense.axis if defense.slabs is not None else torch.zeros_like(away)
        across, r = away - along, defense.radii[side]
        room = (r**2 - along.square().sum(1)).clamp_min(0).sqrt()
        away = along + across * (room / across.norm(dim=1).clamp_min(1e-300)).clamp_max(1)[:, None]
    points = centre + away
    if defense.box is not None:
        points = points.clamp(*defense.box)
    safe = torch.stack([defense.worst(torch.zeros_like(centre[0]), i)[0] for i in range(2)])[side]
    loose = replace(defense, integer=False)  # whole numbers come at the end
    factor = torch.ones_like(points[:, :1])
    label = torch.tensor(defense.labels, device=points.device)[side]
    for _ in range(60):
        bad = ~loose.keeps(safe + factor * (points - safe), label, tol=1e-9)
        if not bad.any():
            break
        factor[bad] *= 0.8
    return safe + factor * (points - safe)


def _learn(clean, poison, weight, theta, rho: float, loss: str) -> Tensor:
    """The learner on all rows, its hinge rounded, held inside the ball by a barrier."""
    copies = poison.repeat_interleave(weight.round().long().clamp_min(0), 0)
    theta = theta * min(1.0, 0.98 * rho / max(float(theta.norm()), 1e-300))
    width = _WIDTH[loss]
    return _newton(torch.cat([clean, copies]), theta, rho, len(clean), width, _BARRIER * width, loss == "hinge")


def _climb(clean, poison, weight, theta, rho: float, loss: str) -> tuple[float, Tensor]:
    """The clean loss, and its gradient with respect to the signed rows of poison through the learner."""
    n, width, shift = len(clean), _WIDTH[loss], 1.0 if loss == "hinge" else 0.0

    def parts(rows):
        z = (shift - rows @ theta) / width
        p = torch.sigmoid(z)
        return width * F.softplus(z), p, p * (1 - p) / width  # the loss, minus its slope, its curvature

    value, p, h = parts(clean)
    _, p_own, h_own = parts(poison)
    room = rho**2 - theta @ theta
    tau = _BARRIER * width
    bent = h > 1e-5 * h.max()
    H = (clean[bent].T * h[bent]) @ clean[bent] + (poison.T * (weight * h_own)) @ poison
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    H = H / n + 2 * tau / room * eye + 4 * tau / room**2 * torch.outer(theta, theta)
    slope = -(p @ clean) / n  # of the clean loss
    u = torch.linalg.solve(H, slope)
    # d theta = -H^-1 (weight / n) (h (theta . dz) z - p dz)
    own = weight / n
    return float(value.mean()), -own[:, None] * ((h_own * (poison @ u))[:, None] * theta - p_own[:, None] * u)
