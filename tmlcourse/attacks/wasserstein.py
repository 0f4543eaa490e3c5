"""The Wasserstein attack: move the ink of an image instead of repainting it.

The distance between two images of equal mass is the work of turning one into the other: a plan Pi_ij >= 0 says how much goes
from pixel i to pixel j, and costs C_ij = |i - j| (in pixels) times that amount. Plans are local: ink travels within a
kernel x kernel window, so that a plan has 25 numbers a pixel and not thousands. Every image returned here comes with a plan
that reaches it within the budget, so its distance is at most eps whatever the solver's accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress
from ..layout import fast_layout, images_at_once
from ..threat import L2
from .gradient import _Best
from .losses import objective


def wasserstein(
    model,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    kernel: int = 5,
    steps: int = 40,
    alpha: float = 2.0,
    lam: float = 60.0,
    iterations: int = 10,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    stop_early: bool = False,
    batch_size: int | None = None,
) -> Tensor:
    """Projected gradient ascent on the Wasserstein ball: x^{t+1} = P_W(x^t + alpha grad l / ||grad l||_2).

    P_W is `project_wasserstein`; each projection begins from the plan of the one before.

    Args:
        model, x, y, loss, target, stop_early, batch_size: as for `pgd`; x is (N, C, H, W).
        eps: the budget: how far the ink moves on average, in pixels (>= 0). 0.1 moves a tenth of it by one pixel.
        kernel: side of the window (odd) within which ink moves, in pixels; it stays in its channel.
        steps: gradient steps (>= 1).
        alpha: step size, Euclidean (> 0).
        lam, iterations: as for `project_wasserstein`.
    Returns:
        Adversarial images, shape and dtype of x, in [0, 1], of the same mass, at distance at most eps; for each the best
        point met, the clean image included.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Wong, Schmidt & Kolter 2019. Unlike there, steps follow the gradient and not its sign (on a linear model only
        they end at the maximum), pixels stay in [0, 1] by the projection itself, and the distance is certified.
    Example: `wasserstein(model, x, y, 0.5)`.
    """
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    _check(x, eps, kernel, lam, iterations)
    checks.positive_int(steps, "steps")
    if checks.nonnegative(alpha, "alpha") == 0:
        raise ValueError("alpha: got 0, want a step size > 0")
    if target is not None:
        checks.other_class(target, x, y)
    attacker = objective(loss, target)
    batch_size = images_at_once(x, batch_size)

    x = x.detach()
    forward, best = fast_layout(model, x), _Best(x, y, target, attacker)
    with progress.bar(total=steps * len(x), desc="Wasserstein", unit="step") as bar:
        for chunk in torch.arange(len(x), device=x.device).split(batch_size):
            z, warm = x[chunk], None
            for t in range(steps + 1):
                last = t == steps or eps == 0
                z = z.detach().requires_grad_(not last)
                with torch.set_grad_enabled(not last):
                    logits = checks.logits(forward(z), y[chunk])
                    if target is not None:
                        checks.logits(logits, target[chunk], "target")
                    value, fooled = best.offer(chunk, z.detach(), logits)
                    grad = z if last else torch.autograd.grad(value.sum(), z)[0]
                if last:
                    break
                stay = ~fooled if stop_early else torch.ones_like(fooled)
                if not stay.any():
                    break
                chunk, z, grad = chunk[stay], z.detach()[stay], grad[stay]
                warm = None if warm is None else tuple(v[stay] for v in warm)
                z, warm = _project(z + L2(0.0).steepest(grad, alpha), x[chunk], eps, kernel, lam, iterations, warm)
                bar.update(len(chunk))
    return best.x


def project_wasserstein(
    w: Tensor, x: Tensor, eps: float, *, kernel: int = 5, lam: float = 60.0, iterations: int = 100
) -> Tensor:
    """The image z nearest to w in the Wasserstein ball around x, by the projected Sinkhorn iteration.

    min over z, Pi of (lam / 2) ||w - z||^2 + sum Pi log Pi  with  Pi 1 = x,  Pi^T 1 = z <= 1,  cost <= eps sum(x).
    The multipliers of the three constraints are found in turn: a scaling of the rows, a scaling of the columns (by
    Lambert's function), and psi, the price of moving (by Newton's method). The cost counts what moves after flows in both
    directions between two pixels are cancelled, <|Pi - Pi^T|, C> / 2. What the iteration leaves inexact is repaired: rows
    are scaled to sum to x, ink that a full pixel cannot take stays where it was, and the plan is mixed with the one that
    moves nothing until its cost is at most the budget.

    Args:
        w: any images (N, C, H, W).
        x: images in [0, 1].
        eps, kernel: as for `wasserstein`.
        lam: how little the entropy counts (> 0). Larger is closer to the exact projection, and slower.
        iterations: rounds over the three multipliers (>= 1).
    Returns:
        Images in [0, 1] with the mass of x, at distance at most eps from x.
    Source: Wong, Schmidt & Kolter 2019, Algorithm 2 and appendix.
    Example: `project_wasserstein(x.flip(3), x, 0.5)`.
    """
    _check(checks.images(x), eps, kernel, lam, iterations)
    checks.same_shape(w, x, "w")
    if not torch.isfinite(w).all():
        raise ValueError("w: got NaN or infinite values, want finite ones")
    return x.clone() if eps == 0 else _project(w, x, eps, kernel, lam, iterations, None)[0]


def wasserstein_distance(x: Tensor, z: Tensor, *, kernel: int | None = None) -> Tensor:
    """The exact distance min <Pi, C> / sum(x) over plans with Pi 1 = x, Pi^T 1 = z, by linear programming: (N,).

    Args:
        x, z: images (N, C, H, W) of equal mass in each channel.
        kernel: if given, ink moves within that window only; infinite where no such plan exists.
    Example: `wasserstein_distance(x, wasserstein(model, x, y, 0.1))` is at most 0.1.
    """
    checks.same_shape(z, checks.images(x), "z")
    return torch.tensor([sum(_work(a, b, kernel) for a, b in zip(p, q, strict=True)) / max(p.sum().item(), 1e-30)
                         for p, q in zip(x, z, strict=True)], dtype=torch.float64)  # fmt: skip


def _work(x: Tensor, z: Tensor, kernel: int | None) -> float:
    """The cost of the best plan between two grey images (H, W), which may differ in mass by rounding."""
    from scipy import sparse
    from scipy.optimize import linprog

    a, b = x.detach().double().cpu().numpy().ravel(), z.detach().double().cpu().numpy().ravel()
    if not a.any() and not b.any():
        return 0.0
    place = np.stack(np.unravel_index(np.arange(a.size), tuple(x.shape)), 1)
    i, j = (v.ravel() for v in np.meshgrid(np.flatnonzero(a), np.arange(a.size), indexing="ij"))
    gap = np.abs(place[i] - place[j])
    near = gap.max(1) <= (np.inf if kernel is None else kernel // 2)
    i, j, cost = i[near], j[near], np.hypot(*gap[near].T)
    rows = np.concatenate([i, a.size + j])
    equal = sparse.csr_array((np.ones(2 * len(i)), (rows, np.tile(np.arange(len(i)), 2))), shape=(2 * a.size, len(i)))
    # Rounded sums need not agree exactly, so a unit of ink may also appear or vanish, at the price of the longest way.
    slack = sparse.hstack([sparse.eye_array(2 * a.size), -sparse.eye_array(2 * a.size)])
    far = 1e3 * np.hypot(*x.shape)
    answer = linprog(
        np.concatenate([cost, np.full(4 * a.size, far)]), A_eq=sparse.hstack([equal, slack]).tocsr(),
        b_eq=np.concatenate([a, b]), method="highs",
    )  # fmt: skip
    lost = answer.x[len(i) :].sum()
    return float("inf") if lost > 1e-4 * a.sum() + 1e-6 else float(cost @ answer.x[: len(i)])


def _check(x, eps, kernel, lam, iterations):
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    checks.nonnegative(eps, "eps")
    if checks.positive_int(kernel, "kernel") % 2 == 0:
        raise ValueError(f"kernel: got {kernel}, want an odd number of pixels")
    checks.positive(lam, "lam")
    checks.positive_int(iterations, "iterations")


@torch.no_grad()
def _project(w, x, eps, kernel, lam, iterations, warm):
    """`project_wasserstein`, and the multipliers (b, psi) to begin the next projection from.

    The plan is Pi_ij = a_i exp(-psi C_ij) b_j. Pixels are counted in units of 1 and the budget as eps times the mass.
    """
    n, c, h, width = x.shape
    near = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    cost = torch.hypot(near[:, None], near[None, :])
    budget = eps * x.flatten(1).sum(1)
    w = w.clamp(-0.5, 1.5)  # no answer lies beyond; keeps the exponentials in range

    def spread(v: Tensor) -> Tensor:
        """sum_j exp(-psi C_ij) v_j, every image with its own psi."""
        K = torch.exp(-psi[:, None, None] * cost).repeat_interleave(c, 0)[:, None]
        return F.conv2d(v.reshape(1, n * c, h, width), K, padding=kernel // 2, groups=n * c).view_as(v)

    b, psi = (torch.ones_like(x), torch.ones_like(budget)) if warm is None else warm
    for _ in range(iterations):
        a = x / spread(b)
        b = _columns(spread(a), w, lam)
        work, slope = _Moves(a, b, psi, kernel).work(1, 2)
        # Newton on log <Pi, C> = log budget, which falls in psi.
        excess = (work.clamp_min(1e-30) / budget.clamp_min(1e-30)).log().clamp(-5, 5)
        psi = (psi + work * excess / slope.clamp_min(1e-30)).clamp(0, 2 * lam)
    moves = _Moves(x / spread(b), b, psi, kernel)
    return _repair(x, moves, budget), (b, psi)


class _Moves:
    """The ink that a plan carries from pixel to pixel, after what goes both ways has been cancelled.

    For each offset d of half the window, flow_d(i) = Pi_i,i+d - Pi_i+d,i: positive flow goes from i to i + d, negative flow
    comes back. The cancelled part changes no image and would only cost. Borders are padded, so that rolling wraps nothing.
    """

    def __init__(self, a: Tensor, b: Tensor, psi: Tensor, kernel: int):
        self.r = r = kernel // 2
        a, b = (F.pad(v, (r, r, r, r)) for v in (a, b))
        self.offsets = [(i, j) for i in range(r + 1) for j in range(-r, r + 1) if i > 0 or j > 0]
        self.flows = [
            torch.exp(-psi * math.hypot(*d)).view(-1, 1, 1, 1) * (a * _at(b, d) - _at(a, d) * b) for d in self.offsets
        ]

    def taken(self, share: Tensor) -> None:
        """Keep of every flow the share that its destination (N, C, H, W) takes."""
        share = F.pad(share, (self.r,) * 4)
        self.flows = [
            f.clamp_min(0) * _at(share, d) + f.clamp_max(0) * share
            for f, d in zip(self.flows, self.offsets, strict=True)
        ]

    def in_and_out(self) -> tuple[Tensor, Tensor]:
        """What arrives at each pixel, and what leaves it."""
        into, out = torch.zeros_like(self.flows[0]), torch.zeros_like(self.flows[0])
        for f, (i, j) in zip(self.flows, self.offsets, strict=True):
            there, back = f.clamp_min(0), (-f).clamp_min(0)
            into += _at(there, (-i, -j)) + back
            out += there + _at(back, (-i, -j))
        inner = (..., slice(self.r, -self.r), slice(self.r, -self.r))
        return into[inner], out[inner]

    def work(self, *powers: int) -> list[Tensor]:
        """<|flow|, C^power> of each image."""
        sizes = [f.abs().flatten(1).sum(1) for f in self.flows]
        return [sum(math.hypot(*d) ** p * size for size, d in zip(sizes, self.offsets, strict=True)) for p in powers]


def _at(v: Tensor, offset: tuple[int, int]) -> Tensor:
    """v_{i + d} at each pixel i."""
    return v.roll((-offset[0], -offset[1]), (2, 3))


def _columns(s: Tensor, w: Tensor, lam: float) -> Tensor:
    """The b with b s = min(1, w - log(b) / lam): where the column's ink meets what pulls it towards w, or a full pixel.

    u = lam b s solves u + log u = lam w + log(lam s), Lambert's equation; Newton's method climbs to it from below.
    """
    L = (lam * w + (lam * s).clamp_min(1e-30).log()).clamp_min(-50)  # below that u is nothing
    u = torch.where(L > 1, L - L.clamp_min(1).log(), torch.sigmoid(L))
    for _ in range(3):
        u = u * (1 + L - u.log()) / (1 + u)
    return torch.minimum((lam * w - u).exp(), 1 / s.clamp_min(1e-30))


def _repair(x: Tensor, moves: _Moves, budget: Tensor) -> Tensor:
    """The image that the moves make of x, when no pixel gets more than 1 and the work is within the budget.

    The rows of the plan sum to x, so no pixel gives more than it has. A pixel that would get too much takes a share of what
    is offered and the rest stays where it was; then less leaves those pixels too, so shares fall until all have room.
    """
    for _ in range(30):
        into, out = moves.in_and_out()
        room = (1 - x + out).clamp_min(0)
        if not (into > room + 1e-6).any():
            break
        moves.taken((room / into.clamp_min(1e-30)).clamp_max(1))
    into, out = moves.in_and_out()
    fits = (x + into - out <= 1 + 1e-5).flatten(1).all(1)
    keep = fits * (budget / moves.work(1)[0].clamp_min(1e-30)).clamp_max(1)
    return (x + keep.view(-1, 1, 1, 1) * (into - out)).clamp(0, 1)
