"""Attacks that see only the winning label: they walk along the decision boundary by asking on which side a point lies.

A direction theta has a number, the distance from x at which the answer changes along it:
g(theta) = min {lambda > 0 : f(x + lambda theta / ||theta||) != y}. Labels jump, but g is smooth where the boundary is, and
labels give each of its values by bisection. The nearest adversarial image is min g, so zeroth-order descent applies again.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import checks, progress, randomness
from .queries import open_door


def opt_attack(
    predict,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = 5000,
    q: int = 10,
    beta: float = 0.05,
    starts: Tensor | None = None,
    tries: int = 20,
    target: Tensor | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    seed: int | None = None,
) -> Tensor:
    """Zeroth-order descent on g: theta <- theta - eta v, v the mean over u of u (g(theta + beta u) - g(theta)) / beta.

    Every value of g costs a bisection of ten to twenty queries. The first direction is the best of `tries` random ones (or of
    directions to `starts`); eta is found by doubling and halving. Points are clipped to the box, and distances are those
    of the clipped points. Along a direction only one change of the answer is sought, not certainly the first.

    Args:
        predict: images -> int64 labels (N,), or scores (N, K) of which only the winner is used; or a `Queries`.
        x: images (N, ...), floating point, in [0, 1].
        y: int64 labels (N,).
        queries: the budget of each image (>= 0), the look at the clean image included; with 0 the images come back.
        q: random unit directions u an estimate (>= 1).
        beta: how far theta, of length 1, is moved along them (> 0).
        starts: images (M, ...), of any class, to set out towards; random noise without.
        tries: first directions tried for each image (>= 1).
        target: int64 labels (N,) that the attacker wants to see instead; untargeted without. It needs `starts` that show
            them: noise rarely does.
        box: (low, high) of valid pixels, or None.
        seed: makes the search reproducible; without it torch's own generator is used.
    Returns:
        The nearest adversarial image met (in L2), for each; x itself where there was none, or where the answer was wrong
        from the start.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Cheng et al. 2019.
    Example: `(opt_attack(model, x, y, queries=2000, seed=0) - x).flatten(1).norm(dim=1)` are the distances.
    """
    estimate = partial(_finite_differences, q=checks.positive_int(q, "q"))
    return _descend(estimate, predict, x, y, queries, beta, starts, tries, target, box, seed, "OPT")


def sign_opt(
    predict,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = 5000,
    q: int = 50,
    beta: float = 0.02,
    starts: Tensor | None = None,
    tries: int = 20,
    target: Tensor | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    seed: int | None = None,
) -> Tensor:
    """Descent on g by signs only: theta <- theta - eta v, v the mean over u of u sign(g(theta + beta u) - g(theta)).

    A sign costs one query: the point at distance g(theta) along theta + beta u is adversarial just where g is smaller.

    Args, returns, errors: as for `opt_attack`.
    Source: Cheng et al. 2020.
    Example: `(sign_opt(model, x, y, queries=2000, seed=0) - x).flatten(1).norm(dim=1)` are the distances.
    """
    estimate = partial(_signs, q=checks.positive_int(q, "q"))
    return _descend(estimate, predict, x, y, queries, beta, starts, tries, target, box, seed, "Sign-OPT")


class _Rays:
    """The labels along rays from each image, asked for within its budget, and the nearest adversarial point met."""

    def __init__(self, oracle, x: Tensor, y: Tensor, target: Tensor | None, box):
        self.oracle, self.x, self.y, self.target, self.box = oracle, x, y, target, box
        self.left = oracle.left(len(x)).to(x.device)
        self.nearest, self.distance = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def fits(self, index: Tensor) -> Tensor:
        """Which of the rows, each one query of image index[r], the budgets still allow: bool, as index."""
        order = index.argsort(stable=True)
        _, sizes = index[order].unique_consecutive(return_counts=True)
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        rank = torch.empty_like(index)
        rank[order] = torch.arange(len(index), device=index.device) - first
        return rank < self.left[index]

    def adversarial(self, index: Tensor, theta: Tensor, reach: Tensor) -> Tensor:
        """Whether x[index] + reach theta is answered otherwise than y (with a target: by it): bool (rows,)."""
        hit = []
        for i, direction, length in zip(index.split(4096), theta.split(4096), reach.split(4096), strict=True):
            points = self.x[i] + (length[:, None] * direction).view_as(self.x[i])
            points = points if self.box is None else points.clamp(*self.box)
            answer = self.oracle(points, i)
            hit.append(answer != self.y[i] if self.target is None else answer == self.target[i])
            self.left -= torch.bincount(i, minlength=len(self.left))
            self._keep(i[hit[-1]], points[hit[-1]])
        return torch.cat(hit)

    def _keep(self, index: Tensor, points: Tensor) -> None:
        """Remember the nearest of the adversarial points for each image."""
        away = (points - self.x[index]).flatten(1).norm(dim=1)
        order = away.argsort()
        order = order[index[order].argsort(stable=True)]  # by image, the nearest of each first
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = index[order[1:]] != index[order[:-1]]
        won = order[first & (away[order] < self.distance[index[order]])]
        self.nearest[index[won]], self.distance[index[won]] = points[won], away[won]

    def cross(self, index, theta, near, *, width=0.01, precision=1e-4, nearer=False) -> Tensor:
        """g along each row: bracketed by steps that double, from `near` on, then bisected; inf where not found.

        width: the first step, as a share of `near`. precision: the relative width of the last bracket. nearer: only rows
        that are adversarial at `near` are of interest; the others cost one query and are inf.
        """
        low, high, at = torch.zeros_like(near), torch.full_like(near, torch.inf), near.clone()
        rows = torch.arange(len(index), device=index.device)
        for _ in range(60):
            rows = rows[self.fits(index[rows])]
            if not len(rows):
                break
            hit = self.adversarial(index[rows], theta[rows], at[rows])
            high[rows[hit]], low[rows[~hit]] = at[rows[hit]], at[rows[~hit]]
            rows = rows[hit] if nearer else rows
            nearer = False
            wide = high[rows] - low[rows] > precision * high[rows]
            rows = rows[torch.where(high[rows].isinf(), low[rows] < 1e6, wide)]
            inward = high * (1 - min(width, 0.5))
            at = torch.where(high.isinf(), low * (1 + width), torch.where(low == 0, inward, (low + high) / 2))
            width *= 2
        return high


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _around(theta: Tensor, q: int, beta: Tensor, generator) -> tuple[Tensor, Tensor]:
    """q random unit vectors for each row of theta (m, d), and the directions theta + beta u: both (m, q, d)."""
    u = torch.randn((len(theta), q, theta.shape[1]), generator=generator, dtype=theta.dtype, device=theta.device)
    u = _unit(u)
    return u, _unit(theta[:, None] + beta[:, None, None] * u)


def _finite_differences(rays: _Rays, index, theta, g, beta, generator, *, q: int) -> Tensor:
    """Estimate of the gradient of g at each row of theta, from q more values of g."""
    u, moved = _around(theta, q, beta, generator)
    values = rays.cross(
        index.repeat_interleave(q), moved.flatten(0, 1), g.repeat_interleave(q), width=0.002, precision=1e-5
    )
    values = values.view(-1, q)
    slope = torch.where(values.isfinite(), values - g[:, None], 0)
    return (slope[:, :, None] * u).mean(1)


def _signs(rays: _Rays, index, theta, g, beta, generator, *, q: int) -> Tensor:
    """Estimate of the direction of the gradient of g at each row of theta, from q labels."""
    u, moved = _around(theta, q, beta, generator)
    rows, sign = index.repeat_interleave(q), torch.zeros(len(index) * q, dtype=theta.dtype, device=theta.device)
    fits = rays.fits(rows)
    if fits.any():
        hit = rays.adversarial(rows[fits], moved.flatten(0, 1)[fits], g.repeat_interleave(q)[fits])
        sign[fits] = 1 - 2 * hit.to(theta.dtype)
    return (sign.view(-1, q, 1) * u).mean(1)


def _descend(estimate, predict, x, y, queries, beta, starts, tries, target, box, seed, name) -> Tensor:
    checks.labels(y, checks.images(x))
    checks.positive_int(tries, "tries")
    checks.positive(beta, "beta")
    if target is not None and (checks.labels(target, x, "target") == y).any():
        raise ValueError(f"target: got the true label for {int((target == y).sum())} images, want other classes")
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"box: got {box}, want (low, high) with low < high, or None")
    if starts is not None and checks.images(starts, "starts").shape[1:] != x.shape[1:]:
        raise ValueError(f"starts: got shape {tuple(starts.shape)}, want (M, {', '.join(map(str, x.shape[1:]))})")
    oracle = open_door(predict, x, queries, answers="labels")
    generator = randomness.generator(seed, x.device)
    x = x.detach()
    starts = None if starts is None else starts.to(x)
    rays = _Rays(oracle, x, y, target, box)
    total = int(rays.left.sum())
    with progress.bar(total=total, desc=name, unit="query") as bar:
        index = (rays.left > 0).nonzero().squeeze(1)
        theta, g = torch.zeros_like(x.flatten(1)), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        if len(index):
            index = index[~rays.adversarial(index, theta[index], torch.zeros_like(g[index]))]
        for _ in range(tries):
            index = index[rays.left[index] > 0]
            if len(index):
                points = _start(x[index], starts, box, generator)
                _try(rays, index, theta, g, points)
        index = index[g[index].isfinite()]
        beta, eta = torch.full_like(g, beta), torch.full_like(g, 0.2)
        while len(index := index[rays.left[index] > 0]):
            v = _unit(estimate(rays, index, theta[index], g[index], beta[index], generator))
            improved = _line_search(rays, index, theta, g, eta, v)
            beta[index[~improved]] /= 2
            bar.update(total - int(rays.left.sum()) - bar.n)
    return rays.nearest


def _start(x: Tensor, starts: Tensor | None, box, generator) -> Tensor:
    """One point for each image to set out towards: noise, or one of `starts`."""
    if starts is not None:
        return starts[torch.randint(len(starts), (len(x),), generator=generator, device=x.device)]
    if box is None:
        return x + 1000 * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    low, high = box
    return low + (high - low) * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _try(rays: _Rays, index: Tensor, theta: Tensor, g: Tensor, points: Tensor) -> None:
    """Take the direction to `points` where the boundary is nearer that way than known."""
    ray = (points - rays.x[index]).flatten(1)
    near = torch.minimum(ray.norm(dim=1), g[index])
    found = rays.cross(index, _unit(ray), near, width=0.5, nearer=True)
    won = found < g[index]
    theta[index[won]], g[index[won]] = _unit(ray)[won], found[won]


def _line_search(rays: _Rays, index: Tensor, theta: Tensor, g: Tensor, eta: Tensor, v: Tensor) -> Tensor:
    """Steps theta - eta v: eta doubles while that helps, or is halved until it does. Returns who improved: bool, as index."""
    origin, step = theta[index], eta[index]
    rows = torch.arange(len(index), device=index.device)
    improved, halved = torch.zeros((2, len(index)), dtype=torch.bool, device=index.device)
    for _ in range(10):
        rows = rows[rays.left[index[rows]] > 0]
        if not len(rows):
            break
        i, candidate = index[rows], _unit(origin[rows] - step[rows, None] * v[rows])
        found = rays.cross(i, candidate, g[i], nearer=True)
        better = found < g[i]
        theta[i[better]], g[i[better]], eta[i[better]] = candidate[better], found[better], step[rows[better]]
        improved[rows[better]] = True
        halved[rows[~better]] = True
        step[rows] *= torch.where(better, 2.0, 0.5)
        rows = rows[torch.where(better, ~halved[rows], ~improved[rows])]
    failed = index[~improved]
    eta[failed] = (eta[failed] / 2).clamp_min(1e-3)
    return improved
