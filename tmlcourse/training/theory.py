"""Two models in which robust learning can be worked out exactly, samples from both, and the game that training plays.

In Schmidt's model x ~ N(y' theta, sigma^2 I), y' = -1 or +1, theta = (1, ..., 1): `learned_risk` says how wrong the
classifier is that n examples give, with an attacker and without. In Tsipras' model one strong feature is sometimes wrong and
many weak ones together never are. `linear.gaussian_risk` and `linear.two_feature_risk` hold the errors of given weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.special import ndtr, wofz
from torch import Tensor

from .. import checks, randomness
from ..intervals import clopper_pearson


@dataclass(frozen=True)
class Estimate:
    """A share seen in a simulation, with its 95 % Clopper-Pearson interval.

    Attributes: share, low, high in [0, 1]; n, the number of independent draws.
    """

    share: float
    low: float
    high: float
    n: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{100 * self.share:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f}), n = {self.n}"


def estimate(hits: Tensor) -> Estimate:
    """The share of True among independent draws (N,) and its interval.

    Source: Clopper & Pearson 1934.
    Example: `print(estimate(torch.rand(1000) < 0.3))`.
    """
    if not isinstance(hits, Tensor) or hits.dtype != torch.bool or hits.dim() != 1 or not len(hits):
        got = f"{hits.dtype} {tuple(hits.shape)}" if isinstance(hits, Tensor) else type(hits).__name__
        raise TypeError(f"hits: got {got}, want a bool tensor (N,) with N >= 1")
    k, n = int(hits.sum()), len(hits)
    return Estimate(k / n, *clopper_pearson(k, n), n)


# --- Schmidt's Gaussian model ----------------------------------------------------------------------------------------


def gaussians(n: int, d: int, sigma: float, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """n examples of Schmidt's model: y in {0, 1} with equal chance, x = (2 y - 1) theta + sigma N(0, I), theta = (1, ..., 1).

    Returns:
        x (n, d) in double precision, y (n,) int64.
    Source: Schmidt et al. 2018, definition 1.
    Example: `gaussians(5, 100, 1.6, seed=0)[0].shape` is (5, 100).
    """
    checks.positive_int(n, "n")
    checks.positive_int(d, "d")
    checks.nonnegative(sigma, "sigma")
    generator = randomness.generator(seed)
    y = torch.randint(0, 2, (n,), generator=generator)
    return (2 * y - 1)[:, None] + sigma * torch.randn(n, d, dtype=torch.float64, generator=generator), y


def averaged(x: Tensor, y: Tensor) -> Tensor:
    """The linear classifier that theory studies, w = (1/n) sum_i y'_i x_i with y' = 2 y - 1: (n, d), (n,) in {0, 1} -> (d,).

    Example: `averaged(*gaussians(4, 10, 1.0, seed=0)).shape` is (10,).
    """
    return ((2 * y - 1)[:, None] * x).mean(0)


def learned_risk(n: float, d: int, sigma: float, eps: float = 0.0) -> float:
    """Exact robust error, expected over n training examples, of sign(w^T x) with w = `averaged` of them.

    w ~ N(theta, sigma^2 / n I) and x are independent, so the margin under the worst L-infinity attack,
    sum_i (w_i x_i - eps |w_i|), is a sum of d independent, equally distributed terms. Their characteristic function phi is
    known, and P(sum < 0) = 1/2 - (1/pi) int_0^inf Im phi(t)^d / t dt.

    Args:
        n: training examples (> 0; `math.inf` for w = theta, whose error is Phi(-(1 - eps) sqrt(d) / sigma)).
        d: dimension (>= 1). sigma: standard deviation of a coordinate (> 0). eps: the attacker's radius (>= 0).
    Returns:
        A probability, right to about 1e-8 where d >= 10.
    Source: the model and the learner are of Schmidt et al. 2018, section 3; the inversion formula of Gil-Pelaez 1951.
    Example: `round(learned_risk(1, 100, 100**0.25 / 2), 4)`.
    """
    checks.positive_int(d, "d")
    checks.nonnegative(eps, "eps")
    if not n > 0 or checks.nonnegative(sigma, "sigma") == 0:
        raise ValueError(f"n, sigma: got {n} and {sigma}, want positive numbers")
    if math.isinf(n):
        return float(ndtr(-(1 - eps) * math.sqrt(d) / sigma))
    s = sigma / math.sqrt(n)
    spread = math.sqrt(d * (1 + s * s) * (1 + sigma * sigma + eps * eps))
    u, reach = np.empty(0), 8.0
    while reach == 8.0 or (
        abs(_characteristic(np.array([u[-1] / spread]), s, sigma, eps)[0]) ** d > 1e-12 and reach < 5000
    ):
        u = np.arange(0.02, reach, 0.04)
        reach *= 2
    area = 0.04 * (np.imag(_characteristic(u / spread, s, sigma, eps) ** d) / u).sum()
    return float(min(1.0, max(0.0, 0.5 - area / math.pi)))


def _characteristic(t: np.ndarray, s: float, sigma: float, eps: float) -> np.ndarray:
    """E exp(i t (w x - eps |w|)) with w ~ N(1, s^2), x ~ N(1, sigma^2): two half-line Gaussian integrals.

    w(z) = exp(-z^2) erfc(-i z) keeps every factor finite.
    """
    root = np.sqrt(2 / s**2 + 2 * sigma**2 * t**2)
    plus, minus = (1 / s**2 + 1j * t * (1 - eps)) / root, (1 / s**2 + 1j * t * (1 + eps)) / root
    small = math.exp(-0.5 / s**2)
    halves = 2 * np.exp(plus**2 - 0.5 / s**2) - small * wofz(1j * plus) + small * wofz(1j * minus)
    return halves / (math.sqrt(2) * s * root)


def samples_needed(d: int, sigma: float, eps: float = 0.0, risk: float = 0.01) -> int:
    """The smallest n with `learned_risk`(n, d, sigma, eps) <= risk.

    With sigma = c d^(1/4) this stays bounded for eps = 0 and grows like eps^2 sqrt(d) for a fixed eps > 0.

    Raises:
        ValueError: no number of examples is enough, because even w = theta errs more often.
    Source: Schmidt et al. 2018, theorems 4 to 6.
    Example: `samples_needed(100, 1.5, 0.0)`.
    """
    if not 0 < checks.nonnegative(risk, "risk") < 0.5:
        raise ValueError(f"risk: got {risk}, want an error in (0, 0.5)")
    if (least := learned_risk(math.inf, d, sigma, eps)) >= risk:
        raise ValueError(f"risk: got {risk}, want more than {least:.3g}, the error of the best classifier")
    low, high = 0, 1
    while learned_risk(high, d, sigma, eps) > risk:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if learned_risk(middle, d, sigma, eps) > risk else (low, middle)
    return high


def simulate(
    n: int, d: int, sigma: float, eps: float = 0.0, *, trials: int = 2000, seed: int | None = None
) -> Estimate:
    """The robust error of `averaged` by simulation: each trial draws n examples and one new point, and attacks it exactly.

    Returns:
        `Estimate` over independent trials; its interval holds `learned_risk` 19 times in 20.
    Example: `learned_risk(2, 50, 2.0, 0.2) in simulate(2, 50, 2.0, 0.2, trials=200, seed=1)`.
    """
    checks.positive_int(trials, "trials")
    generator, hits = randomness.generator(seed), []
    for chunk in torch.arange(trials).split(max(1, 2_000_000 // (n * d))):
        seeds = torch.randint(0, 2**62, (2,), generator=generator).tolist()
        x, y = gaussians(len(chunk) * n, d, sigma, seed=seeds[0])
        w = ((2 * y - 1)[:, None] * x).view(len(chunk), n, d).mean(1)
        x, y = gaussians(len(chunk), d, sigma, seed=seeds[1])
        hits.append((2 * y - 1) * (w * x).sum(1) - eps * w.abs().sum(1) <= 0)
    return estimate(torch.cat(hits))


# --- Tsipras' model --------------------------------------------------------------------------------------------------


def strong_and_weak(n: int, d: int, p: float, eta: float, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """n examples of Tsipras' model: x_1 = y' with probability p, else -y'; x_2, ..., x_{d+1} ~ N(eta y', 1), y' = 2 y - 1.

    Returns:
        x (n, d + 1) in double precision, y (n,) int64 in {0, 1}.
    Source: Tsipras et al. 2019, section 2.1.
    Example: `strong_and_weak(5, 100, 0.95, 0.3, seed=0)[0].shape` is (5, 101).
    """
    checks.positive_int(n, "n")
    checks.positive_int(d, "d")
    if not 0.5 <= checks.nonnegative(p, "p") <= 1:
        raise ValueError(f"p: got {p}, want a probability in [0.5, 1]")
    checks.nonnegative(eta, "eta")
    generator = randomness.generator(seed)
    y = torch.randint(0, 2, (n,), generator=generator)
    sign = (2 * y - 1).double()
    strong = torch.where(torch.rand(n, generator=generator) < p, sign, -sign)
    weak = eta * sign[:, None] + torch.randn(n, d, dtype=torch.float64, generator=generator)
    return torch.cat([strong[:, None], weak], 1), y


def falls(w: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Whether the worst L-infinity attack of radius eps makes sign(w^T x) wrong: y' w^T x - eps ||w||_1 <= 0.

    (N, d), (N,) in {0, 1} -> bool (N,).

    Example: `falls(torch.ones(3), torch.ones(2, 3), torch.tensor([1, 0]), 0.5).tolist()`.
    """
    checks.nonnegative(eps, "eps")
    return (2 * y - 1) * (x @ w.to(x)) - eps * w.abs().sum().to(x) <= 0


# --- training as a game ----------------------------------------------------------------------------------------------


def zero_sum(payoff) -> tuple[float, np.ndarray, np.ndarray]:
    """Value and optimal mixed strategies of a two-player zero-sum game: max_p min_j sum_i p_i A_ij by linear programming.

    Args:
        payoff: A (m, k), what the row player gets from the column player.
    Returns:
        (value, p, q): p (m,) maximises, q (k,) minimises; max over p and min over q may be swapped (von Neumann 1928).
    Raises:
        ValueError: not a finite matrix.
    Source: Boyd & Vandenberghe 2004, section 5.2.5.
    Example: `zero_sum([[1, -1], [-1, 1]])`.
    """
    A = np.asarray(payoff, dtype=float)
    if A.ndim != 2 or not A.size or not np.isfinite(A).all():
        raise ValueError(f"payoff: got shape {A.shape}, want a finite matrix (m, k)")
    strategies = []
    for M in (A, -A.T):  # the column player maximises the negative of what it pays
        m, k = M.shape
        found = linprog(np.r_[np.zeros(m), -1], A_ub=np.c_[-M.T, np.ones(k)], b_ub=np.zeros(k),
                        A_eq=[np.r_[np.ones(m), 0]], b_eq=[1], bounds=[(0, None)] * m + [(None, None)])  # fmt: skip
        strategies.append((found.x[-1], found.x[:-1]))
    return strategies[0][0], strategies[0][1], strategies[1][1]
