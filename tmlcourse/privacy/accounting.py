"""Accounting: what many private steps cost together.

A step of DP-SGD takes each record with probability q and adds Gaussian noise of sigma sensitivities: the output is
P = (1 - q) N(0, sigma^2) + q N(1, sigma^2) with the record and Q = N(0, sigma^2) without it. All that privacy depends on is
the privacy loss L = ln(P / Q): composition adds it up, and delta(eps) = E_P[(1 - e^{eps - L})_+].

    Accountant().add(sigma=1.1, q=256 / 60000, steps=3515).eps(delta=1e-5)

Neighbours differ by one record present or absent, both ways; sampling is Poisson's, each record by its own coin.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import next_fast_len
from scipy.optimize import brentq
from scipy.signal import lfilter
from scipy.special import logsumexp, ndtr, ndtri

from .. import checks
from .mechanisms import gaussian_eps

ORDERS = (*(1 + i / 10 for i in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
TAIL = 1e-13  # mass that the numerical accountant gives up, as an addition to delta
_LEAST = 0.05  # the least sigma that the numerical accountant looks at


# ---- composition of (eps, delta)


def advanced_composition(eps: float, delta: float, steps: int, slack: float) -> tuple[float, float]:
    """`steps` mechanisms of (eps, delta) each: (eps sqrt(2 k ln(1 / slack)) + k eps (e^eps - 1), k delta + slack), k = steps.

    Basic composition, (k eps, k delta), is smaller where k is small: the smaller of the two eps is returned.

    Args:
        eps, delta: of one mechanism: > 0, and in [0, 1).
        steps: k >= 1, each chosen after the answers of those before, if one likes.
        slack: the additional delta, in (0, 1).
    Source: Dwork, Rothblum & Vadhan 2010; Dwork & Roth 2014, theorem 3.20.
    Example: `advanced_composition(0.1, 0.0, 100, 1e-5)`.
    """
    checks.positive(eps, "eps")
    checks.probability(delta, "delta", zero=True)
    checks.positive_int(steps, "steps")
    checks.probability(slack, "slack")
    advanced = eps * math.sqrt(2 * steps * math.log(1 / slack)) + steps * eps * math.expm1(min(eps, 700))
    if advanced >= steps * eps:
        return steps * eps, steps * delta
    return advanced, steps * delta + slack


def amplify(eps: float, delta: float, q: float) -> tuple[float, float]:
    """An (eps, delta) mechanism on a Poisson sample of rate q: (ln(1 + q (e^eps - 1)), q delta).

    Nearly q eps for small eps, and never less than that.

    Source: Li, Qardaji & Su 2012; Balle, Barthe & Gaboardi 2018.
    Example: `amplify(1.0, 1e-5, 0.01)`.
    """
    checks.positive(eps, "eps")
    checks.probability(delta, "delta", zero=True)
    checks.probability(q, "q", zero=True, one=True)
    return math.log1p(q * math.expm1(eps)) if eps < 700 else eps + math.log(max(q, 1e-320)), q * delta


def for_groups(eps: float, delta: float, size: int) -> tuple[float, float]:
    """The guarantee of k records together, from that of one: (k eps, delta (e^{k eps} - 1) / (e^eps - 1)), k = size.

    Source: Dwork & Roth 2014, theorem 2.2, with the sum of its series.
    Example: `for_groups(0.5, 1e-6, 4)`.
    """
    checks.positive(eps, "eps")
    checks.probability(delta, "delta", zero=True)
    checks.positive_int(size, "size")
    total = sum(math.exp(min(i * eps, 700)) for i in range(size))
    return size * eps, min(1.0, delta * total)


# ---- Renyi


def rdp_gaussian(sigma: float, q: float = 1.0, orders: Sequence[float] = ORDERS) -> np.ndarray:
    """Renyi divergence of order a of one step: 1 / (a - 1) ln E_Q[(P / Q)^a], a number for each order.

    For q = 1 this is a / (2 sigma^2). Otherwise the expectation is an integral over the line of an analytic function, for
    which equally spaced sums converge geometrically; whole and fractional orders are treated alike.

    Args:
        sigma: noise in units of the sensitivity (> 0).
        q: sampling rate in [0, 1].
        orders: each > 1.
    Source: Mironov 2017; Abadi et al. 2016; Mironov, Talwar & Zhang 2019 for the sampled mechanism.
    Example: `rdp_gaussian(1.0, 0.01, [2, 4.5])`.
    """
    checks.positive(sigma, "sigma")
    checks.probability(q, "q", zero=True, one=True)
    orders = np.asarray(orders, dtype=float)
    if orders.ndim != 1 or orders.size == 0 or not (orders > 1).all() or not np.isfinite(orders).all():
        raise ValueError(f"orders: got {orders}, want finite numbers > 1")
    if q in (0, 1):
        return q * orders / (2 * sigma**2)
    step = min(sigma, sigma**2) / 8
    result = np.empty(len(orders))
    for i, order in enumerate(orders):
        # The integrand is largest near 0 (most samples miss the record) or near z = order (all hit it), never far outside.
        z = np.arange(-12 * sigma, order + 12 * sigma + step, step)
        if len(z) > 200_000:
            raise ValueError(f"sigma: got {sigma}, want at least 0.1 with q < 1")
        log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
        terms = order * log_ratio - z**2 / (2 * sigma**2)
        result[i] = max(logsumexp(terms) + math.log(step / (sigma * math.sqrt(2 * math.pi))), 0.0) / (order - 1)
    return result


def rdp_to_eps(rdp, orders, delta: float, *, conversion: str = "improved") -> float:
    """The least eps over all orders a with divergence r: what (a, r)-Renyi privacy says at this delta.

    "classic" (Mironov 2017): r + ln(1 / delta) / (a - 1).
    "improved" (Balle et al. 2020; Canonne, Kamath & Steinke 2020): r + ln((a - 1) / a) - (ln delta + ln a) / (a - 1),
    never the larger one. Published figures differ by which one they used: name it.

    Example: `rdp_to_eps(rdp_gaussian(1.0), ORDERS, 1e-5)`.
    """
    checks.probability(delta, "delta")
    a, r = np.asarray(orders, dtype=float), np.asarray(rdp, dtype=float)
    if checks.choice(conversion, "conversion", ("improved", "classic")) == "classic":
        eps = r - math.log(delta) / (a - 1)
    else:
        eps = r + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    return max(float(eps.min()), 0.0)


# ---- privacy loss distributions


@dataclass(frozen=True)
class _Losses:
    """Masses of a privacy loss at step * (start, start + 1, ...), and what is at infinity or unaccounted for."""

    start: int
    step: float
    mass: np.ndarray
    infinite: float

    def delta(self, eps: float) -> float:
        """E[(1 - e^{eps - L})_+]."""
        loss = self.step * np.arange(self.start, self.start + len(self.mass))
        above = loss > eps
        return min(float(self.mass[above] @ -np.expm1(eps - loss[above])) + self.infinite, 1.0)

    def eps(self, delta: float) -> float:
        """The least eps >= 0 with delta(eps) <= delta; between points of the grid, delta is linear in e^eps."""
        if delta <= 1.1 * self.infinite:
            raise ValueError(f"delta: got {delta}, want more than {1.1 * self.infinite:.1e}: what is smaller drowns in "
                             "rounding; method='rdp' has no such limit")  # fmt: skip
        first = max(1 - self.start, 0)
        mass, loss = self.mass[first:], self.step * np.arange(self.start + first, self.start + len(self.mass))
        shrink = math.exp(-self.step)
        beyond = np.append(np.cumsum(mass[:0:-1])[::-1], 0)  # sum of the masses behind each point, and the same
        scaled = lfilter([0, shrink], [1, -shrink], mass[::-1])[
            ::-1
        ]  # with e^{point - L}: delta there is the difference
        i = int(np.argmax(beyond - scaled + self.infinite <= delta))
        rest = (beyond[i] + mass[i] + self.infinite - delta) / (scaled[i] + mass[i])
        return max(loss[i] + math.log(max(rest, 1e-300)), 0.0)


def _one_step(sigma: float, q: float, step: float, tail: float, present: bool) -> tuple[int, np.ndarray, float]:
    """The privacy loss of one step on the grid, never better than it is: first index, masses, mass at infinity.

    `present`: L = ln(P / Q) under P, or else ln(Q / P) under Q. The masses that P and Q give to a cell of the grid are
    handed to its two ends so that both are kept. The delta(eps) of the result joins points of the true curve by lines
    that are straight in e^eps; the curve is convex, so they lie above it (Doroshenko et al. 2022, "connect the dots").
    What lies left of the grid moves up to its first point, what lies right of it to infinity.
    """
    low, high = _ratio_range(sigma, q, tail)
    first, last = math.floor(low / step), math.ceil(high / step)
    ratio = (
        np.arange(first, last + 1) * step
    )  # ln(P / Q), which rises along the line; here is where it takes these values:
    room = -np.expm1(np.minimum(_log(1 - q) - ratio, 0))
    z = np.where(room > 0, sigma**2 * (ratio + _log(room) - math.log(q)) + 0.5, -np.inf)
    out = _cells(z / sigma)
    both = (1 - q) * out + q * _cells((z - 1) / sigma)
    here, there, start = (both, out, first) if present else (out[::-1], both[::-1], -last)
    ends = step * np.arange(start, start + len(ratio))
    inner = here[1:-1]
    up = np.clip((inner - np.exp(ends[:-1]) * there[1:-1]) / -math.expm1(-step), 0, inner)
    mass = np.append(inner - up, 0) + np.append(here[0], up)
    return start, mass, float(here[-1])


def _log(value):
    with np.errstate(divide="ignore"):
        return np.log(value)


def _cells(z: np.ndarray) -> np.ndarray:
    """Standard Gaussian mass below the first of the points, between neighbours, and above the last, each precisely."""
    low, high = np.append(-np.inf, z), np.append(z, np.inf)
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def _ratio_range(sigma: float, q: float, tail: float) -> tuple[float, float]:
    """ln(P / Q) where each Gaussian has mass `tail` left, and right, of it."""
    reach = -ndtri(tail) * sigma
    ends = (2 * np.array([-reach, 1 + reach]) - 1) / (2 * sigma**2)
    return tuple(np.logaddexp(_log(1 - q), math.log(q) + ends))


@functools.lru_cache(maxsize=16)
def _compose(events: tuple) -> tuple[_Losses, _Losses]:
    """The privacy loss of all events together, once for a record that is present and once for one that is absent.

    Sums of independent losses are convolutions, products after a Fourier transform. The transform is cyclic, so its length
    holds all but `TAIL` of the sum's mass (Chernoff's bound says where), and that much is added at infinity.
    """
    count = sum(steps for *_, steps in events)
    tail = TAIL / count
    z = np.linspace(-8, 8, 1601)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    variance, widest = 0.0, 0.0
    for sigma, q, steps in events:
        low, high = _ratio_range(sigma, q, tail)
        ratio = np.logaddexp(_log(1 - q), math.log(q) + (2 * sigma * z - 1) / (2 * sigma**2))
        variance += steps * float(weight @ (ratio - weight @ ratio) ** 2)
        widest = max(widest, high - low)
    spread = max(math.sqrt(variance), 1e-4 * widest)  # of the sum, under the law without the record
    step = max(spread / (64 * math.sqrt(count)), widest / 2**22, 1e-9)
    return tuple(_convolve(events, step, tail, spread, present) for present in (True, False))


def _convolve(events: tuple, step: float, tail: float, spread: float, present: bool) -> _Losses:
    single = [(*_one_step(sigma, q, step, tail, present), steps) for sigma, q, steps in events]
    tilts = 2.0 ** np.arange(-4, 8) / spread
    ends = []
    for sign in (1, -1):
        exponents = np.zeros(len(tilts))
        for start, mass, _, steps in single:
            loss, weight = step * np.arange(start, start + len(mass)), _log(np.maximum(mass, 0))
            exponents += steps * np.array([logsumexp(weight + sign * tilt * loss) for tilt in tilts])
        ends.append(float(np.min((exponents - math.log(TAIL)) / tilts)))
    low, high = math.floor(-ends[1] / step), math.ceil(ends[0] / step)
    size = next_fast_len(high - low + 1, real=True)
    spectrum, certain = np.ones(size // 2 + 1, dtype=complex), 0.0
    for start, mass, infinite, steps in single:
        folded = np.bincount((start + np.arange(len(mass))) % size, mass, size)
        spectrum = spectrum * np.fft.rfft(folded) ** steps
        certain += steps * math.log1p(-infinite)
    mass = np.roll(np.fft.irfft(spectrum, size), -low % size)
    rounding = 4 * np.finfo(float).eps * sum(steps for *_, steps in events) * math.log2(size)
    return _Losses(low, step, np.maximum(mass, 0), -math.expm1(certain) + 2 * TAIL + rounding)


# ---- the accountant


@dataclass(frozen=True)
class Accountant:
    """What has been spent: a list of (sigma, q, steps) of sampled Gaussian steps; `add` returns a new accountant.

    Args:
        events: tuples (sigma, q, steps).
    Example: `Accountant().add(sigma=1.1, q=256 / 60000, steps=3515).eps(1e-5)`.
    """

    events: tuple[tuple[float, float, int], ...] = ()

    def add(self, *, sigma: float, q: float = 1.0, steps: int = 1) -> Accountant:
        """The account after `steps` more steps with noise of sigma sensitivities on a Poisson sample of rate q.

        Raises: ValueError for sigma <= 0, q outside (0, 1], steps < 1.
        Example: `Accountant().add(sigma=2.0).add(sigma=1.0, q=0.01, steps=100)`.
        """
        new = checks.positive(sigma, "sigma"), checks.probability(q, "q", one=True), checks.positive_int(steps, "steps")
        if self.events and self.events[-1][:2] == new[:2]:
            return Accountant((*self.events[:-1], (*new[:2], self.events[-1][2] + steps)))
        return Accountant((*self.events, new))

    def rdp(self, orders: Sequence[float] = ORDERS) -> np.ndarray:
        """Renyi divergence at each order: the steps' add up."""
        return sum((steps * rdp_gaussian(sigma, q, orders) for sigma, q, steps in self.events), np.zeros(len(orders)))

    def eps(self, delta: float, method: str = "pld", *, conversion: str = "improved") -> float:
        """The eps spent at this delta. Every method is an upper bound; in order from tight to loose:

        "pld": the privacy loss distribution itself, on a grid that errs upwards (Koskela et al. 2020; Gopi et al. 2021);
            infinite where a sigma is below 0.05, which protects nobody.
        "rdp": Renyi divergences, with the conversion "improved" or "classic" (see `rdp_to_eps`).
        "zcdp": rho + 2 sqrt(rho ln(1 / delta)), rho = sum of 1 / (2 sigma^2) (Bun & Steinke 2016); for q = 1 only.
        "advanced": advanced composition of amplified single steps, the best split of delta; for equal steps only.

        Raises: ValueError for delta outside (0, 1), an unknown method, or one that does not apply.
        """
        checks.probability(delta, "delta")
        checks.choice(method, "method", ("pld", "rdp", "zcdp", "advanced"))
        if not self.events:
            return 0.0
        if method == "rdp":
            return rdp_to_eps(self.rdp(), ORDERS, delta, conversion=conversion)
        if method == "zcdp":
            if any(q < 1 for _, q, _ in self.events):
                raise ValueError("method: got 'zcdp' with q < 1, want 'pld' or 'rdp': zCDP gains nothing from sampling")
            rho = sum(steps / (2 * sigma**2) for sigma, _, steps in self.events)
            return rho + 2 * math.sqrt(rho * math.log(1 / delta))
        if method == "advanced":
            return self._advanced(delta)
        if min(sigma for sigma, *_ in self.events) < _LEAST:
            return math.inf
        return max(losses.eps(delta) for losses in _compose(self.events))

    def delta(self, eps: float) -> float:
        """The delta at this eps >= 0, from the privacy loss distribution."""
        checks.nonnegative(eps, "eps")
        if not self.events:
            return 0.0
        if min(sigma for sigma, *_ in self.events) < _LEAST:
            return 1.0
        return max(losses.delta(eps) for losses in _compose(self.events))

    def _advanced(self, delta: float) -> float:
        if len(self.events) > 1:
            raise ValueError("method: got 'advanced' with unequal steps, want 'pld' or 'rdp'")
        ((sigma, q, steps),) = self.events
        found = []
        for share in np.linspace(0.02, 0.98, 49):  # of delta that goes to the steps; the rest is the slack
            eps, _ = amplify(gaussian_eps(sigma, share * delta / (q * steps)), 0.0, q)
            found.append(advanced_composition(eps, 0.0, steps, (1 - share) * delta)[0])
        return min(found)


def noise_for(
    eps: float, delta: float, *, q: float = 1.0, steps: int = 1, method: str = "pld", conversion: str = "improved"
) -> float:
    """The least noise sigma with which `steps` steps at rate q are (eps, delta)-private, to four digits, rounded up.

    Args:
        eps, delta: the budget: > 0, and in (0, 1).
        q, steps, method, conversion: as in `Accountant`.
    Raises: ValueError for a budget that no sigma below 1e6 meets, or bad input.
    Example: `noise_for(2.0, 1e-5, q=0.01, steps=1000)`.
    """
    checks.positive(eps, "eps")

    def spent(sigma: float) -> float:
        return Accountant().add(sigma=sigma, q=q, steps=steps).eps(delta, method, conversion=conversion)

    def excess(log_sigma: float) -> float:
        return math.log(max(spent(math.exp(log_sigma)), 1e-12) / eps)

    high = 1.0
    while spent(high) > eps:
        high *= 2
        if high > 1e6:
            raise ValueError(f"eps: got {eps} at delta {delta}, want a larger budget: no noise below 1e6 meets it")
    low = high / 2
    while spent(low) <= eps:
        low, high = low / 1.5, low
        if low < 0.1:
            return high
    sigma = math.exp(brentq(excess, math.log(low), math.log(high), xtol=2e-5))
    while spent(sigma) > eps:
        sigma *= 1 + 5e-5
    return sigma
