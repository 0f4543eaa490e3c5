"""Poison against a defender whose centroids move with the data it is given.

With p_y = n_y / n and poison of weights w_i (sum 1) at x_i = mu'_y + u_i / w_i, the defender's centroids are linear in u:

    mu'_y = mu_y + (eps / p_y) sum_{i of class y} u_i,     sphere: ||u_i|| <= w_i r,     slab: |<u_i, v'>| <= w_i s ||v'||

with v' = mu'_+ - mu'_-. For the hinge two points a class suffice, one that has a loss and one that only pulls the centroid:
averaging the points on each side of the margin leaves the loss, the centroids and the sets as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import progress
from .sets import SIGNS, Sanitizer

# Of the four points: negative active, negative passive, positive active, positive passive.
_SIDE = torch.tensor([0, 0, 1, 1])


@dataclass(frozen=True, eq=False)
class _Setting:
    """What the worst poison depends on: inner products of theta with the clean centroids, and the defender's sizes."""

    eps: float
    pull: Tensor  # (2,) eps / p_y
    clean: Tensor  # (2,) 1 - y (w.mu_y + b), the hinge argument at the clean centroids
    gram: Tensor  # (2, 2) of (w, v)
    radii: Tensor
    slabs: Tensor | None

    @property
    def h(self) -> Tensor:
        """v' = v + sum_j h_j u_j."""
        return (self.pull * torch.tensor(SIGNS))[_SIDE]


def _setting(problem, defense: Sanitizer, eps: float, theta: Tensor) -> _Setting:
    share = torch.stack([(problem.signs == sign).double().mean() for sign in SIGNS])
    v = defense.centroids[1] - defense.centroids[0]
    pair = torch.stack([theta[:-1], v])
    sign = torch.tensor(SIGNS).to(theta)
    clean = 1 - sign * (defense.centroids @ theta[:-1] + theta[-1])
    slabs = None if defense.slabs is None else defense.slabs.cpu()
    return _Setting(eps, (eps / share).cpu(), clean.cpu(), (pair @ pair.T).cpu(), defense.radii.cpu(), slabs)


def _sphere_worst(s: _Setting, loss) -> tuple[float, int]:
    """max over poison of its mean loss, spheres alone: all of it in one class, which inflates that class's radius.

    Every point gains from a centroid pulled its way, so all sit at the same extreme; with a share q in a class the loss
    is q loss(clean + (1 + q eps / p) r ||w||), convex in q, hence largest at q = 0 or 1.
    """
    most = s.clean + (1 + s.pull) * s.radii * s.gram[0, 0].sqrt()
    side = int(most.argmax())
    return float(loss(1 - most[side])), side


# ---- the semidefinite program, by its dual: every choice of multipliers is an upper bound


def _program(tilt, radius, width, h, S) -> tuple[np.ndarray, np.ndarray]:
    """max sum_i tilt_i <w, u_i> over ||u_i|| <= radius_i, |<u_i, v'>| <= width_i ||v'||, v' = v + sum_j h_j u_j, k times.

    It is linear in the Gram matrix of u_1..u_m, w, v: a semidefinite program, exact with at least m + 2 features. Its dual
    has lam >= 0 (spheres), nu (slabs) and eta >= 0, from |nu| ||v'|| <= (eta ||v'||^2 + nu^2 / eta) / 2. The Lagrangian
    -u'Qu + l'u + const is largest at u = Q^-1 l / 2, where it is const + tr(S l'Q^-1 l) / 4; each Q > 0 is a proof.
    Newton's method on that, with the barrier -tau (log det Q + ...), whose primal Gram matrix across w and v is tau Q^-1.

    tilt, radius, width: (k, m); h: (m,); S: Gram matrix of (w, v). Returns upper bounds (k,) and near-best u (k, m, 2 + m):
    coordinates along w and along v (oblique), then along m directions orthogonal to both.
    """
    k, m = tilt.shape
    radius = np.maximum(radius, 1e-3 * radius.max())
    Qs, Ls, L0 = np.zeros((k, 3 * m, m, m)), np.zeros((k, 3 * m, m, 2)), np.zeros((k, m, 2))
    L0[:, :, 0] = tilt
    for i, e in enumerate(np.eye(m)):
        Qs[:, i] = np.diag(e)
        Qs[:, m + i] = (np.outer(e, h) + np.outer(h, e)) / 2
        Qs[:, 2 * m + i] = -width[:, i, None, None] / 2 * np.outer(h, h)
        Ls[:, m + i, :, 1] = -e
        Ls[:, 2 * m + i, :, 1] = width[:, i, None] * h

    def evaluate(z, tau):
        """(value, value and barrier, Q^-1, l): infinite where Q is not positive definite."""
        lam, nu, eta = z[:, :m], z[:, m : 2 * m], z[:, 2 * m :]
        Q, L = np.einsum("kj,kjab->kab", z, Qs), L0 + np.einsum("kj,kjab->kab", z, Ls)
        eigen = np.linalg.eigvalsh(Q)
        good = (lam > 0).all(1) & (eta > 0).all(1) & (eigen[:, 0] > 1e-11 * eigen[:, -1])
        inverse = np.linalg.inv(np.where(good[:, None, None], Q, np.eye(m)))
        with np.errstate(invalid="ignore", divide="ignore"):
            value = (lam * radius**2).sum(1) + (width * (eta * S[1, 1] + nu**2 / eta)).sum(1) / 2
            value = value + ((L @ S) * (inverse @ L)).sum((1, 2)) / 4
            total = value - tau * (np.log(eigen).sum(1) + np.log(lam).sum(1) + np.log(eta).sum(1))
        good &= np.isfinite(total)
        return np.where(good, value, np.inf), np.where(good, total, np.inf), inverse, L

    def newton(z, tau, inverse, L):
        nu, eta = z[:, m : 2 * m], z[:, 2 * m :]
        Y = (inverse @ L)[:, None]
        R, PQ = Ls - Qs @ Y, inverse[:, None] @ Qs
        flat = lambda a: a.reshape(k, 3 * m, -1)  # noqa: E731
        g = ((2 * Ls - Qs @ Y) * (Y @ S)).sum((2, 3)) / 4 - tau * np.trace(PQ, axis1=2, axis2=3)
        H = flat(R) @ flat(inverse[:, None] @ R @ S).transpose(0, 2, 1) / 2
        H += tau * flat(PQ) @ flat(PQ.transpose(0, 1, 3, 2)).transpose(0, 2, 1)
        g[:, :m] += radius**2 - tau / z[:, :m]
        g[:, m : 2 * m] += width * nu / eta
        g[:, 2 * m :] += width * (S[1, 1] - (nu / eta) ** 2) / 2 - tau / eta
        i = np.arange(m)
        H[:, i, i] += tau / z[:, :m] ** 2
        H[:, m + i, m + i] += width / eta
        H[:, 2 * m + i, 2 * m + i] += width * nu**2 / eta**3 + tau / eta**2
        H[:, m + i, 2 * m + i] -= width * nu / eta**2
        H[:, 2 * m + i, m + i] -= width * nu / eta**2
        d = 1 / np.sqrt(np.maximum(H[:, np.arange(3 * m), np.arange(3 * m)], 1e-30))
        scaled = H * d[:, :, None] * d[:, None, :] + 1e-10 * np.eye(3 * m)
        step = -d * np.linalg.solve(scaled, (d * g)[..., None])[..., 0]
        return step, np.abs((step * g).sum(1))

    start = math.sqrt(S[0, 0]) / radius + 1e-3
    z = np.concatenate([4 * start, np.zeros_like(start), np.full_like(start, 1e-3 / (1 + S[1, 1]))], 1)
    best, tau = np.full(k, np.inf), 0.3
    for stage in range(9):
        tau = 0.3 / 4**stage
        for _ in range(15):
            value, now, inverse, L = evaluate(z, tau)
            best = np.minimum(best, value)
            step, fall = newton(z, tau, inverse, L)
            if (fall < 0.1 * tau).all():
                break
            moved = np.zeros(k, dtype=bool)
            for length in (1.0, 0.6, 0.3, 0.1, 0.03, 0.01, 0.001):
                take = ~moved & (evaluate(z + length * step, tau)[1] < now)
                z[take], moved = (z + length * step)[take], moved | take
                if moved.all():
                    break
            if not moved.any():
                break
    value, _, inverse, L = evaluate(z, tau)
    across = np.linalg.cholesky(tau * inverse + 1e-14 * np.eye(m))
    return np.minimum(best, value), np.concatenate([inverse @ L / 2, across], 2)


_SHARES = np.linspace(0, 1, 41)


def _slab_bound(s: _Setting) -> float:
    """An upper bound of the poison's mean hinge loss, whatever its points and their shares.

    With a share q of the poison in a class, the mean offset U / q of its points from their centroid lies in the class's
    convex sets, and so does the offset e of the one of largest loss, clean - y <w, e + (eps / p) U>. The program in
    e, U_-, U_+ bounds that loss by B_y(q), and the mean by the largest q B_-(q) + (1 - q) B_+(1 - q) in steps of q.
    """
    S, pull, sign = s.gram.numpy(), s.pull.numpy(), np.array(SIGNS)
    low, high = _SHARES[:-1], _SHARES[1:]
    caps = np.stack([high, 1 - low], 1)  # the most of each class within a step
    worst = np.zeros((len(low), 2))
    for c in range(2):
        one = np.ones((len(low), 1))
        size = np.concatenate([one, caps], 1)
        radius = size * np.r_[s.radii.numpy()[c], s.radii.numpy()]
        width = size * np.r_[s.slabs.numpy()[c], s.slabs.numpy()]
        tilt = np.zeros((len(low), 3))
        tilt[:, 0], tilt[:, 1 + c] = -sign[c], -sign[c] * pull[c]
        value = _program(tilt, radius, width, np.r_[0.0, pull * sign], S)[0]
        worst[:, c] = np.maximum(s.clean.numpy()[c] + value, 0)
    return float(
        max((low * worst[:, 0] + (1 - low) * worst[:, 1]).max(), (high * worst[:, 0] + (1 - high) * worst[:, 1]).max())
    )


_WEIGHTS = np.array([  # where the attacker looks: one class, both, with and without passive points
    [1, 0, 0, 0], [0, 0, 1, 0], [0.8, 0.2, 0, 0], [0, 0, 0.8, 0.2], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5],
    [0.5, 0, 0.5, 0], [0.8, 0, 0, 0.2], [0, 0.2, 0.8, 0], [0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0], [0.8, 0, 0.2, 0], 
    [0.2, 0, 0.8, 0],
])  # fmt: skip


def _slab_worst(s: _Setting) -> tuple[float, np.ndarray, np.ndarray]:
    """(mean hinge loss, weights (4,), u (4, 6)) of the worst poison among those weights, each solved as a program."""
    side, sign = _SIDE.numpy(), np.array(SIGNS)
    weights = np.maximum(_WEIGHTS, 1e-3)
    mass = _WEIGHTS[:, [0, 0, 2, 2]]  # the active weight of each point's class
    tilt = -sign[side] * (np.array([1, 0, 1, 0]) + mass * s.pull.numpy()[side])
    radius, width = weights * s.radii.numpy()[side], weights * s.slabs.numpy()[side]
    value, u = _program(tilt, radius, width, s.h.numpy(), s.gram.numpy())
    value = value + _WEIGHTS[:, [0, 2]] @ s.clean.numpy()
    top = int(value.argmax())
    return float(value[top]), _WEIGHTS[top], u[top]


def _in_space(u: np.ndarray, theta: Tensor, v: Tensor) -> Tensor:
    """The vectors (4, d) that coordinates `u` stand for; with fewer than six features the directions across are cut."""
    w, d = theta[:-1], len(v)
    u = torch.tensor(u).to(v)
    gen = torch.Generator().manual_seed(0)
    free = torch.randn(d, max(min(4, d - 2), 0), generator=gen, dtype=torch.float64).to(v)
    basis = torch.linalg.qr(torch.cat([torch.stack([w, v], 1), free], 1))[0][:, 2:]
    across = torch.linalg.svd(u[:, 2:])
    across = (across[0] * across[1])[:, : basis.shape[1]]
    return u[:, :2] @ torch.stack([w, v]) + across @ basis.T


def _poison(problem, defense: Sanitizer, eps: float, q: np.ndarray, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """floor(eps n) points in the shares q at the given offsets (4, d) from their centroids: (points (m, d), sides (m,)).

    Whole numbers of points move the centroids a little less or more: the offsets shrink until all points pass.
    """
    m = round(eps * problem.n)
    exact = np.asarray(q) * m
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact)[: m - counts.sum()]:
        counts[i] += 1
    counts = torch.tensor(counts).to(offsets.device)
    size = torch.stack([(problem.signs == sign).sum() for sign in SIGNS])
    side = _SIDE.to(offsets.device)

    def place(factor):
        moved = counts[:, None] * factor * offsets
        shift = torch.stack([moved[:2].sum(0), moved[2:].sum(0)]) / size[:, None]
        centroids = defense.centroids + shift
        return centroids, centroids[side] + factor * offsets

    def passes(factor):
        centroids, points = place(factor)
        away = points - centroids[side]
        good = away.norm(dim=1) <= defense.radii[side]
        if defense.slabs is not None:
            axis = centroids[1] - centroids[0]
            good &= (away @ axis).abs() <= defense.slabs[side] * axis.norm()
        return bool(good[counts > 0].all())

    factor = 1 - 1e-12
    while factor > 1e-3 and not passes(factor):
        factor *= 0.999
    points = place(factor if passes(factor) else 0.0)[1]
    return points.repeat_interleave(counts, 0), side.repeat_interleave(counts)


# ---- the game


def game(problem, defense: Sanitizer, eps: float, steps: int):
    """Algorithm 1 with the worst *distribution* of poison at each step; the points are those of one step, not a mixture.

    A mixture of allowed sets of poison need not be allowed: the game's steps are candidates for an attack, and the gap need
    not vanish. Upper bounds hold at every theta: in closed form for spheres, by semidefinite programs with a slab.
    """
    from .bounds import _loss, _Screen, _slope, _train

    rho, slab = problem.rho, defense.slabs is not None
    v = defense.centroids[1] - defense.centroids[0]
    if slab and len(v) < 2:
        raise ValueError("x: got one feature, want at least two for a slab that moves with the data")
    theta = torch.zeros_like(problem.rows[0])
    clean, z = _Screen(problem), torch.zeros_like(theta)
    lam = squares = 0.0
    seen, values = [], []
    sphere_loss = lambda m: _loss(m, problem.loss)  # noqa: E731
    for _ in progress.bar(range(steps), desc=f"data-dependent game, eps {eps:g}"):
        value, g = clean(theta)
        s = _setting(problem, defense, eps, theta)
        if slab and float(theta[:-1].norm()) > 0:
            gain, q, u = _slab_worst(s)
            offsets = _in_space(u, theta, v) / torch.tensor(np.maximum(q, 1e-3)).to(theta)[:, None]
        else:
            gain, side = _sphere_worst(s, sphere_loss)
            direction = -SIGNS[side] * theta[:-1] / theta[:-1].norm().clamp_min(1e-300)
            q = np.zeros(4)
            q[2 * side] = 1.0
            offsets = torch.zeros(4, len(v), dtype=v.dtype, device=v.device)
            offsets[2 * side] = defense.radii[side] * direction
        weights = torch.tensor(q).to(theta)
        share = s.pull.to(theta)
        shift = torch.stack([(weights[:2, None] * offsets[:2]).sum(0), (weights[2:, None] * offsets[2:]).sum(0)])
        points = (defense.centroids + share[:, None] * shift)[_SIDE.to(v.device)] + offsets
        sign = torch.tensor(SIGNS).to(theta)[_SIDE.to(v.device)]
        rows = torch.cat([points, torch.ones_like(points[:, :1])], 1) * sign[:, None]
        g = g - eps * (weights * _slope(rows @ theta, problem.loss)) @ rows
        values.append(value + eps * max(gain, 0.0))
        seen.append((values[-1], theta, q, offsets, gain, value))
        z, squares = z - g, squares + float(g @ g)
        lam = max(lam, float(z.norm()) / rho, math.sqrt(squares) / rho)
        theta = z / lam if lam > 0 else z
    order = sorted(range(steps), key=lambda t: seen[t][0])
    upper, upper_theta = math.inf, theta
    for t in order[: 2 if slab and eps else 1]:
        total, at, _, _, gain, value = seen[t]
        if slab and eps:
            s = _setting(problem, defense, eps, at)
            total = value + eps * _slab_bound(s)
        if total < upper:
            upper, upper_theta = total, at
    best = None
    for t in sorted({order[0], steps // 2, steps - 1}):
        points, side = _poison(problem, defense, eps, seen[t][2], seen[t][3])
        sign = torch.tensor(SIGNS).to(points)[side]
        rows = torch.cat([points, torch.ones_like(points[:, :1])], 1) * sign[:, None]
        learner = _train(torch.cat([problem.rows, rows]), problem, seen[t][1])
        if best is None or learner.lower > best[0]:
            best = (learner.lower, rows, side)
        if not len(points):
            break
    certified = np.minimum.accumulate(values) if not slab else np.r_[np.full(steps - 1, np.nan), upper]
    trace = pd.DataFrame({"step": range(1, steps + 1), "value": values, "upper": certified, "lower": np.nan})
    return upper, upper_theta, best[1], best[2], trace, math.nan
