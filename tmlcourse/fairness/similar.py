"""Individual fairness: similar people get similar treatment, as a linear program over randomised classifiers.

    minimise  (1/n) sum_x sum_a mu_x(a) L(x, a)   subject to   D(mu_x, mu_y) <= d(x, y)  for all x, y

mu_x is the distribution over outcomes that person x gets, L the loss of the one who decides, d how different two people
are for this decision. All the ethics is in d, and the program does not say where d comes from.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pulp
import torch
from torch import Tensor

from .. import checks

DIVERGENCES = ("total variation", "relative infinity")


@dataclass(frozen=True, eq=False)
class Individual:
    """The best Lipschitz map of a decision-maker: `probability` (n, K), its mean `loss`, and by how much it misses d.

    violation: max over pairs of D(mu_x, mu_y) - d(x, y), at most about 1e-9.
    """

    probability: Tensor
    loss: float
    violation: float


def divergence(p: Tensor, q: Tensor, kind: str = "total variation") -> Tensor:
    """How differently two distributions treat people: D_tv = sum_a |p_a - q_a| / 2, or D_inf = max_a |ln(p_a / q_a)|.

    Args: p, q: (..., K) probabilities, sums 1. kind: "total variation" or "relative infinity".
    Returns: (...), D_tv in [0, 1], D_inf in [0, inf]; 0 / 0 counts as equal.
    Raises: TypeError, ValueError: bad input.
    Source: Dwork et al. 2012, section 2.
    Example: `divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8]))`.
    """
    checks.choice(kind, "kind", DIVERGENCES)
    for name, value in (("p", p), ("q", q)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: got {type(value).__name__}, want a floating-point tensor (..., K)")
        off = (value.sum(-1) - 1).abs().max().item() if value.numel() else math.inf
        if not (off < 1e-5 and value.min() >= -1e-12):
            raise ValueError(f"{name}: got numbers that are no probabilities (sums off by {off:.3g})")
    if kind == "total variation":
        return (p - q).abs().sum(-1) / 2
    return torch.where(p == q, 0.0, (p.clamp_min(0).log() - q.clamp_min(0).log()).abs()).amax(-1)


def individual(distance: Tensor, loss: Tensor, *, kind: str = "total variation") -> Individual:
    """Dwork's linear program: the least loss of any randomised classifier that treats similar people similarly.

        min (1/n) sum_x <mu_x, L_x>   over distributions mu_x   with   D(mu_x, mu_y) <= d(x, y)

    Total variation is linear with one variable a pair and outcome; relative infinity says mu_x(a) <= e^d(x,y) mu_y(a).

    Args:
        distance: d (n, n), symmetric, >= 0, 0 on the diagonal; infinite where two people may be treated as one likes.
        loss: L (n, K), of each outcome for each person, K >= 2.
        kind: D, "total variation" or "relative infinity".
    Returns: `Individual`.
    Raises: TypeError, ValueError: bad input.
    Source: Dwork, Hardt, Pitassi, Reingold & Zemel 2012, figure 1.
    Example: `individual(torch.tensor([[0, 0.3], [0.3, 0]]), torch.eye(2)).probability`.
    """
    checks.choice(kind, "kind", DIVERGENCES)
    d, cost = _distance(distance), _loss(loss, len(distance))
    n, k = cost.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = pulp.LpProblem("fairness", pulp.LpMinimize)
        mu = [[pulp.LpVariable(f"mu{x}_{a}", 0, 1) for a in range(k)] for x in range(n)]
        program += pulp.lpSum(float(cost[x, a]) * mu[x][a] for x in range(n) for a in range(k))
        for x in range(n):
            program += pulp.lpSum(mu[x]) == 1
        for x, y in combinations(range(n), 2):
            for row in _close(mu[x], mu[y], float(d[x, y]), kind, f"{x}_{y}"):
                program += row
        program.solve(pulp.HiGHS(msg=False, threads=1, primal_feasibility_tolerance=1e-10))
    if program.status != pulp.LpStatusOptimal:
        raise RuntimeError(f"individual: the solver stopped with {pulp.LpStatus[program.status]}")
    p = torch.tensor([[v.varValue for v in row] for row in mu], dtype=torch.float64).clamp(0, 1)
    p = p / p.sum(1, keepdim=True)
    apart = divergence(p[:, None], p[None], kind) - torch.from_numpy(d)
    return Individual(p.to(loss), float((p * torch.from_numpy(cost)).sum() / n), float(apart.max()))


def _close(p: list, q: list, d: float, kind: str, name: str):
    """Linear rows that say D(p, q) <= d."""
    if kind == "relative infinity":
        if d < 700:  # beyond, e^d is no number and the row says nothing
            for a, b in zip((*p, *q), (*q, *p), strict=True):
                yield a <= math.exp(d) * b
    elif d < 1:
        if len(p) == 2:
            yield p[0] - q[0] <= d
            yield q[0] - p[0] <= d
            return
        more = [pulp.LpVariable(f"t{name}_{a}", 0, 1) for a in range(len(p))]
        for t, a, b in zip(more, p, q, strict=True):
            yield t >= a - b
        yield pulp.lpSum(more) <= d


def _distance(distance) -> np.ndarray:
    if not isinstance(distance, Tensor) or not distance.is_floating_point():
        raise TypeError(f"distance: got {type(distance).__name__}, want a floating-point tensor (n, n)")
    d = distance.detach().cpu().double().numpy()
    if d.ndim != 2 or d.shape[0] != d.shape[1] or d.size == 0:
        raise ValueError(f"distance: got shape {d.shape}, want (n, n) with n >= 1")
    if np.isnan(d).any() or (d < 0).any() or np.diag(d).any() or not np.array_equal(d, d.T):
        raise ValueError(
            "distance: got NaN, a negative number, an asymmetry or a diagonal that is not 0, want a distance"
        )
    return d


def _loss(loss, n: int) -> np.ndarray:
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise TypeError(f"loss: got {type(loss).__name__}, want a floating-point tensor (n, K)")
    if loss.dim() != 2 or loss.shape[0] != n or loss.shape[1] < 2 or not torch.isfinite(loss).all():
        raise ValueError(f"loss: got shape {tuple(loss.shape)} or values not finite, want ({n}, K) with K >= 2, finite")
    return loss.detach().cpu().double().numpy()
