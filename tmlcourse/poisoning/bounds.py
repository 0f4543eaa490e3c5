"""How much any poison can do to a linear classifier behind a sanitising defence: bounds from an online game."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor

from .. import checks, progress
from .sets import SIGNS, Sanitizer, examples

LOSSES = ("hinge", "logistic")
_TOLERANCE = 1e-3  # relative duality gap at which the learner counts as trained


@dataclass(frozen=True, eq=False)
class Bound:
    """What `certified_bound` proved for one eps: lower <= M <= upper, M = max over D_p in F of min over theta of the loss.

    All losses are sums over examples divided by n, the number of clean ones.

    Attributes:
        eps, n, loss, rho: the question.
        upper: U*; no poison of at most eps n points that passes the defence makes the learner's training loss larger.
        lower: what the poison found does at least (a dual value: true whatever the learner's solver left undone).
        attack_loss, clean_loss: loss of the learner trained on D_c and D_p, on all of that and on D_c alone.
        poison_x, poison_y: D_p, in the shape, dtype and labels of the data.
        weight (d,), bias: that learner; upper_weight, upper_bias: the parameters at which U* was found.
        labels: the two classes, negative class first.
        regret: an upper bound of Regret/T from the rule of the online learner: it bounds the gap of the game (`trace`).
        trace: one row a step: `value` U(theta_t), `upper` its minimum so far, `lower` the loss that the poison so far
            forces, each step's point counting eps n / t examples.
    """

    eps: float
    n: int
    loss: str
    rho: float
    upper: float
    lower: float
    attack_loss: float
    clean_loss: float
    poison_x: Tensor
    poison_y: Tensor
    weight: Tensor
    bias: float
    upper_weight: Tensor
    upper_bias: float
    labels: tuple[int, int]
    regret: float
    trace: pd.DataFrame

    @property
    def gap(self) -> float:
        """upper - lower, what is left open."""
        return self.upper - self.lower

    def scores(self, x: Tensor) -> Tensor:
        """<w, x> + b of the poisoned learner; positive is labels[1]. x (n, ...) -> (n,)."""
        return x.detach().flatten(1).to(self.weight) @ self.weight + self.bias

    def test(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """(mean loss, share of errors) of the poisoned learner on other examples of the two classes."""
        signs = torch.where(y == self.labels[1], 1.0, -1.0).to(self.weight)
        margins = signs * self.scores(x)
        return float(_loss(margins, self.loss).mean()), float((margins <= 0).double().mean())

    def __str__(self) -> str:
        return f"eps {self.eps:g}: {self.lower:.4f} <= M <= {self.upper:.4f} ({self.loss}, {len(self.poison_x)} points)"


def certified_bound(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Sequence[float],
    defense: Sanitizer,
    loss: str = "hinge",
    rho: float = 1.0,
    steps: int = 400,
    seed: int = 0,
    n_jobs: int = 1,
    folder: str | Path | None = None,
) -> Bound | list[Bound]:
    """Bounds from above and below on the training loss that eps n points of poison can force on a linear learner.

        M = max_{D_p in F, |D_p| <= eps n}  min_{||theta|| <= rho}  (1/n) sum_{D_c and D_p} loss(y (w.x + b))
        U(theta) = (1/n) L(theta; D_c) + eps max_F loss(theta; x, y) >= M for every theta

    Algorithm 1: the attacker answers each theta_t with the worst point of F, the learner takes a step of regularised dual
    averaging on the clean loss plus eps times the loss of that point. U* is the least U(theta_t); the points are the
    candidate attack; the game's gap is at most Regret/T. The learner is then trained to the end on D_c and D_p.

    Args:
        x: clean examples (n, ...), floating point; y: int64 labels (n,) of two classes.
        eps: poison per clean example, in [0, 1), or several of them for a sweep; floor(eps n) examples are written.
        defense: `sanitizer(x, y, ...)`: the sets F, fixed or data-dependent.
        loss: "hinge" max(0, 1 - m) or "logistic" log(1 + exp(-m)) of the margin m = y (w.x + b).
        rho: the learner's parameters satisfy ||(w, b)||_2 <= rho.
        steps: T, steps of the game.
        seed: for the rounding of integer features; all else is deterministic.
        n_jobs: how many eps of a sweep are worked on at once (joblib, threads unless its backend is set otherwise).
        folder: where each bound of a sweep is kept as soon as it is known, and found again by the next call.
    Returns:
        `Bound`, or for a sweep a list of them. A sweep that is interrupted warns and returns what it has.
    Raises:
        TypeError, ValueError: bad input. RuntimeError: the learner did not converge.
    Source: Steinhardt, Koh & Liang 2017, Algorithm 1 and Proposition 1.
    Example: `print(certified_bound(x, y, eps=0.05, defense=sanitizer(x, y), rho=1.0))`.
    """
    rows, signs, labels = examples(x, y)
    sweep = not isinstance(eps, (int, float))
    values = [_share(e) for e in (eps if sweep else [eps])]
    if not values:
        raise ValueError("eps: got no value, want at least one in [0, 1)")
    if not isinstance(defense, Sanitizer):
        raise TypeError(f"defense: got {type(defense).__name__}, want a Sanitizer: sanitizer(x, y, ...)")
    if defense.labels != labels or defense.centroids.shape[1] != rows.shape[1]:
        raise ValueError(f"defense: made for classes {defense.labels} and {defense.centroids.shape[1]} features, "
                         f"want {labels} and {rows.shape[1]}")  # fmt: skip
    if defense.centroids.device != rows.device:
        raise ValueError(f"defense: got device {defense.centroids.device}, want {rows.device}, the device of x")
    checks.choice(loss, "loss", LOSSES)
    if defense.data_dependent and defense.slabs is not None and loss != "hinge":
        raise ValueError("loss: got 'logistic' with a data-dependent slab, want 'hinge' there")
    checks.positive(rho, "rho")
    checks.positive_int(steps, "steps", least=2)
    checks.positive_int(seed, "seed", least=0)
    problem = _Problem(torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * signs[:, None], signs, float(rho), loss)
    files = [None] * len(values) if folder is None else _files(folder, problem, defense, values, steps, seed)

    def work(e, file):
        if file is not None and file.exists():
            return torch.load(file, weights_only=False)
        bound = _bound(problem, defense, e, steps, seed, x, labels)
        if file is not None:
            _store(bound, file)
        return bound

    if not sweep:
        return work(values[0], files[0])
    done = []
    jobs = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")
    try:
        for bound in progress.bar(jobs(delayed(work)(e, f) for e, f in zip(values, files, strict=True)),
                                  total=len(values), desc="certified bounds"):  # fmt: skip
            done.append(bound)
    except KeyboardInterrupt:
        warnings.warn(f"interrupted: {len(done)} of {len(values)} bounds are returned", stacklevel=2)
    return _exchange(done, problem, defense)


def _exchange(found: list[Bound], problem, defense) -> list[Bound]:
    """Every theta of a sweep bounds every eps: U* becomes the least of all, so that it grows with eps as it should."""
    if defense.data_dependent:  # U grows with eps at each theta, so a bound for more poison is one for less
        return [replace(b, upper=min(c.upper for c in found if c.eps >= b.eps)) for b in found]
    lines = []
    for bound in found:
        theta = torch.cat([bound.upper_weight, bound.upper_weight.new_tensor([bound.upper_bias])])
        worst = torch.tensor(_worst(defense, theta)[2], dtype=torch.float64)
        clean = float(_loss(problem.rows @ theta, problem.loss).sum()) / problem.n
        lines.append((clean, float(_loss(worst, problem.loss)), bound))
    result = []
    for bound in found:
        eps = _whole(bound.eps, problem.n)
        clean, worst, at = min(lines, key=lambda line: line[0] + eps * line[1])  # noqa: B023
        theta = {"upper_weight": at.upper_weight, "upper_bias": at.upper_bias}
        value = clean + eps * worst
        result.append(replace(bound, upper=value, **theta) if value < bound.upper else bound)
    return result


def _whole(eps: float, n: int) -> float:
    """Poison comes in whole examples: floor(eps n) / n."""
    return math.floor(eps * n + 1e-9) / n


def _share(eps) -> float:
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.floating)) or not math.isfinite(eps):
        raise TypeError(f"eps: got {eps!r}, want a number in [0, 1)")
    if not 0 <= eps < 1:
        raise ValueError(f"eps: got {eps}, want a share in [0, 1)")
    return float(eps)


def _files(folder, problem, defense, values, steps, seed) -> list[Path]:
    """One file an eps, named by everything that the bound depends on."""
    digest = hashlib.sha256(repr((problem.rho, problem.loss, steps, seed, defense.box, defense.integer,
                                  defense.data_dependent, defense.labels)).encode())  # fmt: skip
    for tensor in (problem.rows, defense.centroids, defense.radii, defense.slabs):
        digest.update(b"none" if tensor is None else tensor.cpu().numpy().tobytes())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [folder / f"bound-{digest.hexdigest()[:12]}-eps-{e!r}.pt" for e in values]


def _store(bound: Bound, file: Path) -> None:
    """Written beside its place and moved there, so that an interruption leaves no half file."""
    part = file.with_suffix(f".{os.getpid()}.part")
    torch.save(bound, part)
    part.replace(file)


# ---- losses of the margin m


def _loss(m: Tensor, loss: str) -> Tensor:
    return (1 - m).clamp_min(0) if loss == "hinge" else F.softplus(-m)


def _slope(m: Tensor, loss: str) -> Tensor:
    """-d loss / d m, in [0, 1]."""
    return (m < 1).to(m.dtype) if loss == "hinge" else torch.sigmoid(-m)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The clean data as signed rows y (x, 1), (n, d + 1), so that margins are rows @ theta."""

    rows: Tensor
    signs: Tensor
    rho: float
    loss: str

    @property
    def n(self) -> int:
        return len(self.rows)


class _Screen:
    """Clean loss and gradient, leaving out rows that cannot matter: |m_i(theta) - m_i(ref)| <= ||theta - ref|| ||row_i||.

    While theta stays within `reach` of ref, a row whose margin at ref exceeds 1 by more than reach ||row_i|| has no hinge
    loss, so the sums are exact.
    """

    def __init__(self, problem: _Problem):
        self.problem, self.sizes = problem, problem.rows.norm(dim=1)
        self.kept, self.ref, self.last, self.reach, self.age = problem.rows, None, None, 0.0, 0

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        problem = self.problem
        if problem.loss == "hinge":
            moved = math.inf if self.ref is None else float((theta - self.ref).norm())
            if moved > self.reach or self.age >= 16:
                stride = problem.rho if self.last is None else float((theta - self.last).norm())
                self.ref, self.reach, self.age = theta.clone(), 20 * stride, 0
                self.kept = problem.rows[problem.rows @ theta - 1 <= self.reach * self.sizes]
            self.last, self.age = theta.clone(), self.age + 1
        m = self.kept @ theta
        value = float(_loss(m, problem.loss).sum()) / problem.n
        return value, -(_slope(m, problem.loss) @ self.kept) / problem.n


# ---- Algorithm 1


def _worst(defense: Sanitizer, theta: Tensor) -> tuple[Tensor, int, float]:
    """The point of F of least margin: its signed row y (x, 1), its side, and a lower bound of all margins in F."""
    found = []
    for side, sign in enumerate(SIGNS):
        point, most = defense.worst(theta[:-1], side)
        found.append((sign * float(theta[-1]) - most, side, point))
    margin, side, point = min(found, key=lambda f: f[0])
    return SIGNS[side] * torch.cat([point, torch.ones_like(point[:1])]), side, margin


def _game(problem: _Problem, defense: Sanitizer, eps: float, steps: int):
    """Algorithm 1 with regularised dual averaging: theta_t = -(g_1 + ... + g_t) / lambda_t.

    lambda_t >= ||g_1 + ... + g_t|| / rho keeps theta in the ball; it grows at least like the root of the sum of the
    ||g||^2, which gives Regret <= rho^2 lambda_T / 2 + sum_t ||g_t||^2 / (2 lambda_{t-1}).
    """
    rho, loss = problem.rho, problem.loss
    theta = torch.zeros_like(problem.rows[0])
    clean, z = _Screen(problem), torch.zeros_like(theta)
    lam = squares = bound = 0.0
    best, best_theta = math.inf, theta
    values, offsets, points, sides, sums = [], [], [], [], [z.clone()]
    for _ in progress.bar(range(steps), desc=f"online game, eps {eps:g}"):
        value, g = clean(theta)
        row, side, margin = _worst(defense, theta)
        m = row @ theta
        upper = value + eps * float(_loss(torch.tensor(margin, dtype=m.dtype), loss))
        played = value + eps * float(_loss(m, loss))
        g = g - eps * float(_slope(m, loss)) * row
        if upper < best:
            best, best_theta = upper, theta
        values.append(upper)
        offsets.append(played - float(g @ theta))  # the played loss is at least offset + <g, .> everywhere
        points.append(row)
        sides.append(side)
        z = z - g
        squares += float(g @ g)
        new = max(lam, float(z.norm()) / rho, math.sqrt(squares) / rho)
        bound += float(g @ g) / (2 * (lam or new or 1.0))
        lam = new
        theta = z / lam if lam > 0 else z
        sums.append(z.clone())
    regret = (bound + rho**2 * lam / 2) / steps
    return best, best_theta, values, np.cumsum([0.0, *offsets]), torch.stack(sums), torch.stack(points), sides, regret


def _forced(offsets, sums: Tensor, rho: float, start: int, end: int) -> float:
    """min over the ball of the linearised losses of steps start..end: a lower bound of the loss that these points force."""
    steps = end - start
    return (offsets[end] - offsets[start] - rho * float((sums[end] - sums[start]).norm())) / steps


def _starts(end: int) -> list[int]:
    """Where the counting may begin: the first steps of a game, with theta far off, only blur the attack."""
    return sorted({0, end // 4, end // 2, 3 * end // 4, 7 * end // 8} & set(range(end)))


def _bound(problem, defense, asked, steps, seed, x, labels) -> Bound:
    eps = _whole(asked, problem.n)
    if defense.data_dependent:
        from .data_dependent import game  # the sets move with the poison: a game of its own

        upper, upper_theta, rows, sides, trace, regret = game(problem, defense, eps, steps)
        start_theta = upper_theta
    else:
        upper, upper_theta, values, offsets, sums, rows, sides, regret = _game(problem, defense, eps, steps)
        lower = [max(_forced(offsets, sums, problem.rho, s, t) for s in _starts(t)) for t in range(1, steps + 1)]
        trace = pd.DataFrame({"step": range(1, steps + 1), "value": values, "upper": np.minimum.accumulate(values),
                              "lower": lower})  # fmt: skip
        start = max(_starts(steps), key=lambda s: _forced(offsets, sums, problem.rho, s, steps))
        m = round(eps * problem.n)
        pick = start + ((torch.arange(m) + 0.5) * (steps - start) / max(m, 1)).long()
        rows, sides = rows[pick], torch.tensor(sides)[pick]
        start_theta = upper_theta
    side = sides.to(rows.device)
    sign = torch.tensor(SIGNS, dtype=rows.dtype, device=rows.device)[side]
    points = rows[:, :-1] * sign[:, None]
    if defense.integer and len(points):
        points = defense.round(points, side, torch.Generator().manual_seed(seed))
        rows = torch.cat([points, torch.ones_like(points[:, :1])], 1) * sign[:, None]
    learner = _train(torch.cat([problem.rows, rows]), problem, start_theta)
    clean_at = lambda theta: float(_loss(problem.rows @ theta, problem.loss).sum()) / problem.n  # noqa: E731
    if not defense.data_dependent:
        # The trained learner is one more theta at which U may be small.
        own = clean_at(learner.theta)
        own += eps * float(_loss(torch.tensor(_worst(defense, learner.theta)[2]), problem.loss)) if eps else 0.0
        if own < upper:
            upper, upper_theta = own, learner.theta
    poison_y = torch.tensor(labels, device=x.device)[side.to(x.device)]
    return Bound(
        eps=asked, n=problem.n, loss=problem.loss, rho=problem.rho, upper=float(upper), lower=learner.lower,
        attack_loss=learner.value, clean_loss=clean_at(learner.theta),
        poison_x=points.to(x).reshape(-1, *x.shape[1:]), poison_y=poison_y,
        weight=learner.theta[:-1], bias=float(learner.theta[-1]),
        upper_weight=upper_theta[:-1], upper_bias=float(upper_theta[-1]), labels=labels, regret=regret, trace=trace,
    )  # fmt: skip


# ---- the learner


@dataclass(frozen=True, eq=False)
class _Learner:
    theta: Tensor
    value: float
    lower: float


def _train(rows: Tensor, problem: _Problem, start: Tensor) -> _Learner:
    """min over ||theta|| <= rho of (1/n) sum_i loss(row_i theta), by Newton's method on a smoothed loss and a barrier.

    The hinge is smoothed to mu log(1 + exp((1 - m) / mu)), mu falling until the duality gap closes. The dual value

        sum_i a_i - rho ||sum_i a_i row_i||,  0 <= a_i <= 1/n      (logistic: binary entropies of n a_i in place of n a_i)

    is a lower bound for any such a; the slopes of the losses at theta are the ones to take.
    """
    n, rho, hinge = problem.n, problem.rho, problem.loss == "hinge"
    theta = start * min(1.0, 0.98 * rho / max(float(start.norm()), 1e-300))
    # The start is an answer, too: with the game's own theta the loss cannot come out above the game's bound.
    start = start * min(1.0, rho / max(float(start.norm()), 1e-300))
    best, lower = (float(_loss(rows @ start, problem.loss).sum()) / n, start), -math.inf
    mu = 0.02 if hinge else 1.0
    barrier = 3e-2
    for _ in range(16):
        theta = _newton(rows, theta, rho, n, mu, barrier * (mu if hinge else 1.0), hinge)
        m = rows @ theta
        value = float(_loss(m, problem.loss).sum()) / n
        a = torch.sigmoid((1 - m) / mu) if hinge else torch.sigmoid(-m)
        gain = a if hinge else torch.special.entr(a) + torch.special.entr(1 - a)
        lower = max(lower, float(gain.sum()) / n - rho * float((a @ rows).norm()) / n)
        best = min(best, (value, theta), key=lambda b: b[0])
        if best[0] - lower <= _TOLERANCE * best[0] + 1e-7:
            return _Learner(best[1], best[0], lower)
        if hinge:
            mu /= 4
        else:
            barrier /= 5
    raise RuntimeError(f"learner: did not converge, duality gap {best[0] - lower:.2e} at loss {best[0]:.2e}: "
                       "are the features of very different sizes?")  # fmt: skip


def _newton(rows, theta, rho, n, mu, tau, hinge, iterations: int = 60) -> Tensor:
    """Minimise (1/n) sum mu softplus((shift - m) / mu) - tau log(rho^2 - ||theta||^2) from an inner point."""
    shift = 1.0 if hinge else 0.0
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)

    def objective(t):
        room = rho**2 - float(t @ t)
        if room <= least:
            return math.inf
        return mu * float(F.softplus((shift - rows @ t) / mu).sum()) / n - tau * math.log(room)

    least = 0.0
    now = objective(theta)
    for _ in range(iterations):
        z = (shift - rows @ theta) / mu
        p = torch.sigmoid(z)
        room = rho**2 - theta @ theta
        g = -(p @ rows) / n + 2 * tau / room * theta
        h = p * (1 - p) / (mu * n)
        bent = h > 1e-5 * h.max()  # the other rows do not bend the loss here: a Hessian may leave them out
        sub = rows[bent]
        H = sub.T @ (h[bent, None] * sub) + 2 * tau / room * eye + 4 * tau / room**2 * torch.outer(theta, theta)
        step = -torch.cholesky_solve(g[:, None], torch.linalg.cholesky(H + 1e-14 * H.diagonal().max() * eye))[:, 0]
        fall = -float(g @ step)
        # The duality gap grows with rho ||gradient||, which a small Newton decrement alone does not make small.
        if rho * float(g.norm()) <= 1e-4 * mu * float(F.softplus(z).sum()) / n + 1e-9:
            break
        least = 0.1 * float(room)  # a step that ends at the wall is slow to come back from it
        length, trial = 1.0, objective(theta + step)
        while trial > now - 0.1 * length * fall and length > 1e-10:
            length /= 2
            trial = objective(theta + length * step)
        if trial >= now:
            break
        theta, now = theta + length * step, trial
    return theta
