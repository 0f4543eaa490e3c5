"""Mechanisms of differential privacy: answers that one person's record can hardly change.

M is (eps, delta)-differentially private if for all neighbouring D, D' and every event S, in both directions,
Pr[M(D) in S] <= e^eps Pr[M(D') in S] + delta.

Noise is added on a grid. Real noise has an answer for every number; floating-point noise has gaps, which depend on the
value beneath and give it away (Mironov 2012). So values are rounded to multiples of a power of two that depends on the
sensitivity alone, noise is rounded to the same multiples, and the sensitivity grows by what rounding can add. The random
bits come from torch's generator, which is reproducible and therefore not meant for secrets: in production, take a
cryptographic one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from .. import checks, randomness
from ..intervals import clopper_pearson

_GRID = -24  # the grid's step is the power of two next below the sensitivity, times 2^-24
_LARGEST = 2.0**28  # a value of so many sensitivities still has 2^-24 of one in its 53 bits


@dataclass(frozen=True)
class Estimate:
    """A private answer: `value`, the `variance` of its noise, and an interval `low`, `high` at the asked-for confidence.

    Numbers, or tensors of one shape.
    """

    value: float | Tensor
    variance: float | Tensor
    low: float | Tensor
    high: float | Tensor

    def __str__(self) -> str:
        if isinstance(self.value, Tensor):
            return f"{self.value.numel()} private values"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


# ---- randomised response


def randomized_response(answers: Tensor, *, truth: float = 0.5, yes: float = 0.5, seed: int | None = None) -> Tensor:
    """Two coins a person: with probability `truth` the true answer, else "yes" with probability `yes`.

    Pr[report yes | yes] = truth + (1 - truth) yes,  Pr[report yes | no] = (1 - truth) yes; with fair coins 3/4 and 1/4.

    Args:
        answers: booleans (any shape), True for "yes".
        truth: probability of a true answer, in [0, 1]; at 1 nothing is private, at 0 nothing is learned.
        yes: of the second coin, in (0, 1).
        seed: makes the coins reproducible; torch's own generator without.
    Returns:
        Reports: booleans of the same shape. `response_eps(truth, yes)` says how private one is.
    Raises:
        TypeError, ValueError: answers that are no booleans, or probabilities out of range.
    Source: Warner 1965; Dwork & Roth 2014, section 3.2.
    Example: `randomized_response(torch.tensor([True, False]), seed=0)`.
    """
    if not isinstance(answers, Tensor) or answers.dtype != torch.bool:
        got = answers.dtype if isinstance(answers, Tensor) else type(answers).__name__
        raise TypeError(f"answers: got {got}, want a torch.Tensor of booleans")
    if answers.numel() == 0:
        raise ValueError("answers: got none, want at least one")
    checks.probability(truth, "truth", zero=True, one=True)
    checks.probability(yes, "yes")
    first, second = torch.rand(2, *answers.shape, generator=randomness.generator(seed), dtype=torch.float64)
    return torch.where((first < truth).to(answers.device), answers, (second < yes).to(answers.device))


def response_eps(truth: float = 0.5, yes: float = 0.5) -> float:
    """The eps of one randomised response, ln max of the four ratios: ln 3 for two fair coins; infinite for truth = 1.

    Example: `response_eps(0.5)`.
    """
    checks.probability(truth, "truth", zero=True, one=True)
    checks.probability(yes, "yes")
    if truth == 1:
        return math.inf
    lie = (1 - truth) * min(yes, 1 - yes)
    return math.log((truth + lie) / lie)


def estimate(reports: Tensor, *, truth: float = 0.5, yes: float = 0.5, confidence: float = 0.95) -> Estimate:
    """The share of true "yes" from randomised responses: P = (N_yes / N - (1 - truth) yes) / truth; 2 N_yes / N - 1/2.

    Unbiased, so a small share may come out negative; the interval is cut to [0, 1]. Its variance is
    lambda (1 - lambda) / (truth^2 N) with lambda the share of reported "yes": P (1 - P) / N from the sampling of people,
    and for fair coins 3 / (4 N) from the coins.

    Args:
        reports: booleans, one a person.
        truth, yes: as they were when the reports were made; truth > 0.
        confidence: of the interval, in (0, 1); exact (Clopper & Pearson) for lambda.
    Source: Warner 1965.
    Example: `estimate(torch.tensor([True, False, True]))`.
    """
    if not isinstance(reports, Tensor) or reports.dtype != torch.bool or reports.numel() == 0:
        got = (reports.dtype, tuple(reports.shape)) if isinstance(reports, Tensor) else type(reports).__name__
        raise TypeError(f"reports: got {got}, want a non-empty torch.Tensor of booleans")
    checks.probability(truth, "truth", one=True)
    checks.probability(yes, "yes")
    checks.probability(confidence, "confidence")
    n, count = reports.numel(), int(reports.sum())
    low, high = clopper_pearson(count, n, confidence)
    share = count / n
    value, *ends = ((v - (1 - truth) * yes) / truth for v in (share, low, high))
    low, high = (min(max(v, 0.0), 1.0) for v in ends)
    return Estimate(value, share * (1 - share) / (truth**2 * n), low, high)


# ---- additive noise


def laplace(value, *, sensitivity: float, eps: float, seed: int | None = None) -> Tensor:
    """value + Laplace noise of scale b = sensitivity / eps, density e^{-|t| / b} / (2 b): eps-differentially private.

    Args:
        value: the true answer, a number or a tensor of finite numbers.
        sensitivity: the most that one record can change it, in the L1 norm over all entries (> 0). You must know it.
        eps: > 0.
        seed: makes the noise reproducible; torch's own generator without.
    Returns:
        A tensor of the value's shape, device and dtype (float64 for numbers and integers).
    Raises:
        TypeError, ValueError: eps or sensitivity not > 0; NaN; values of more than 2^28 sensitivities.
    Source: Dwork, McSherry, Nissim & Smith 2006; the grid: Mironov 2012.
    Example: `laplace(41, sensitivity=1, eps=0.5, seed=0)`.
    """
    checks.positive(eps, "eps")
    value, step, shape = _on_grid(value, sensitivity)
    scale = (sensitivity + value.numel() * step) / eps
    first, second = torch.empty(2, *value.shape, dtype=torch.float64).exponential_(generator=randomness.generator(seed))
    return _release(value, scale * (first - second), step, shape)


def gaussian(
    value, *, sensitivity: float, eps: float, delta: float, method: str = "analytic", seed: int | None = None
) -> Tensor:
    """value + N(0, sigma^2) noise, sigma = `gaussian_sigma(...)`: (eps, delta)-differentially private.

    Args:
        value: the true answer, a number or a tensor of finite numbers.
        sensitivity: the most that one record can change it, in the L2 norm over all entries (> 0).
        eps, delta: > 0 and in (0, 1).
        method: "analytic" (exact, any eps) or "classical" (the textbook's, for eps <= 1).
        seed: makes the noise reproducible.
    Returns, raises: as for `laplace`.
    Source: Dwork & Roth 2014, appendix A; Balle & Wang 2018 for the exact calibration.
    Example: `gaussian(torch.tensor([3.0, 4.0]), sensitivity=1, eps=0.5, delta=1e-5, seed=0)`.
    """
    gaussian_sigma(eps=eps, delta=delta, method=method)
    value, step, shape = _on_grid(value, sensitivity)
    wide = sensitivity + math.sqrt(value.numel()) * step
    sigma = gaussian_sigma(sensitivity=wide, eps=eps, delta=delta, method=method)
    noise = torch.randn(value.shape, generator=randomness.generator(seed), dtype=torch.float64)
    return _release(value, sigma * noise, step, shape)


def gaussian_sigma(*, sensitivity: float = 1.0, eps: float, delta: float, method: str = "analytic") -> float:
    """Standard deviation that makes a Gaussian mechanism (eps, delta)-private; in units of a sensitivity of 1 by default.

    "classical": sensitivity sqrt(2 ln(1.25 / delta)) / eps, proved for eps <= 1 only.
    "analytic": the least sigma with `gaussian_delta(sigma, eps) <= delta`; smaller, and right for every eps.

    Raises: ValueError for eps <= 0, delta outside (0, 1), sensitivity <= 0, or the classical formula beyond eps = 1.
    Source: Dwork & Roth 2014, theorem A.1; Balle & Wang 2018, theorem 8.
    Example: `gaussian_sigma(eps=1, delta=1e-5)`.
    """
    checks.positive(eps, "eps")
    checks.probability(delta, "delta")
    checks.positive(sensitivity, "sensitivity")
    if checks.choice(method, "method", ("analytic", "classical")) == "classical":
        if eps > 1:
            raise ValueError(f"eps: got {eps}, want at most 1 with method='classical' (its proof ends there); "
                             "method='analytic' has no such limit")  # fmt: skip
        return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / eps

    def gap(log_sigma: float) -> float:
        return math.log(max(gaussian_delta(math.exp(log_sigma), eps), 1e-320)) - math.log(delta)

    low, high = math.log(1e-3), math.log(10.0)
    while gap(low) < 0:
        low -= 2
    while gap(high) > 0:
        high += 2
    return sensitivity * math.exp(brentq(gap, low, high, xtol=1e-13)) * (1 + 1e-9)


def gaussian_delta(sigma: float, eps: float, *, sensitivity: float = 1.0) -> float:
    """The exact delta of the Gaussian mechanism: Phi(s/2 - eps/s) - e^eps Phi(-s/2 - eps/s) with s = sensitivity / sigma.

    Source: Balle & Wang 2018, theorem 8.
    Example: `gaussian_delta(1.0, 4.377)`.
    """
    s = checks.positive(sensitivity, "sensitivity") / checks.positive(sigma, "sigma")
    checks.nonnegative(eps, "eps")
    return float(ndtr(s / 2 - eps / s) - np.exp(eps + log_ndtr(-s / 2 - eps / s)))


def gaussian_eps(sigma: float, delta: float, *, sensitivity: float = 1.0) -> float:
    """The least eps >= 0 of the Gaussian mechanism at this delta: where `gaussian_delta` falls to it.

    Example: `gaussian_eps(1.0, 1e-5)`.
    """
    checks.probability(delta, "delta")
    if gaussian_delta(sigma, 0.0, sensitivity=sensitivity) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(sigma, high, sensitivity=sensitivity) > delta:
        high *= 2
    return brentq(lambda eps: gaussian_delta(sigma, eps, sensitivity=sensitivity) - delta, 0.0, high, xtol=1e-12)


def _on_grid(value, sensitivity: float) -> tuple[Tensor, float, Tensor]:
    """The value in float64 on the CPU, rounded to the grid; the grid's step; and the value as the caller has it."""
    step = 2.0 ** (math.floor(math.log2(checks.positive(sensitivity, "sensitivity"))) + _GRID)
    original = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    exact = original.detach().to("cpu", torch.float64)
    if exact.numel() == 0 or not torch.isfinite(exact).all():
        raise ValueError(f"value: got {'NaN or infinite values' if exact.numel() else 'nothing'}, want finite numbers")
    if exact.abs().max() > _LARGEST * sensitivity:
        raise ValueError(f"value: got more than 2^28 sensitivities of {sensitivity}, want less: "
                         "noise so much smaller than the value drowns in rounding")  # fmt: skip
    return (exact / step).round() * step, step, original


def _release(value: Tensor, noise: Tensor, step: float, original: Tensor) -> Tensor:
    """value + noise, both on the grid; what comes after (a shorter type) is post-processing."""
    noisy = value + (noise / step).round() * step
    return noisy.to(original.device, original.dtype if original.is_floating_point() else torch.float64)


# ---- choosing


def exponential(scores: Tensor, *, sensitivity: float, eps: float, seed: int | None = None) -> Tensor:
    """Draw an option with probability proportional to e^{eps u / (2 sensitivity)}, u its score: eps-private.

    Args:
        scores: (K,), or (N, K) for N independent draws; the higher the better.
        sensitivity: the most that one record can change any single score (> 0).
        eps: > 0, of one draw.
        seed: makes the draw reproducible.
    Returns:
        The index drawn, int64, () or (N,).
    Source: McSherry & Talwar 2007.
    Example: `exponential(torch.tensor([3.0, 5.0, 1.0]), sensitivity=1, eps=2, seed=0)`.
    """
    scores = _scores(scores, sensitivity, eps)
    weights = torch.softmax(eps / (2 * sensitivity) * scores.detach().to("cpu", torch.float64), -1)
    drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=randomness.generator(seed))
    return drawn.reshape(weights.shape[:-1]).to(scores.device)


def report_noisy_max(scores: Tensor, *, sensitivity: float, eps: float, seed: int | None = None) -> Tensor:
    """The index of the largest score after Laplace noise of scale 2 sensitivity / eps on each: eps-private.

    Only the index may be told: the noisy scores beside it would cost eps for each of them.

    Args, returns: as for `exponential`.
    Source: Dwork & Roth 2014, section 3.3.
    Example: `report_noisy_max(torch.tensor([30.0, 50.0, 10.0]), sensitivity=1, eps=1, seed=0)`.
    """
    scores = _scores(scores, sensitivity, eps)
    value, step, original = _on_grid(scores.double(), sensitivity)
    scale = 2 * (sensitivity + step) / eps
    first, second = torch.empty(2, *value.shape, dtype=torch.float64).exponential_(generator=randomness.generator(seed))
    return _release(value, scale * (first - second), step, original).argmax(-1).to(scores.device)


def _scores(scores: Tensor, sensitivity: float, eps: float) -> Tensor:
    checks.positive(sensitivity, "sensitivity")
    checks.positive(eps, "eps")
    if not isinstance(scores, Tensor) or scores.dim() not in (1, 2) or scores.numel() == 0:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores: got {got}, want a tensor (K,) or (N, K)")
    if not torch.isfinite(scores).all():
        raise ValueError("scores: got NaN or infinite values, want finite numbers")
    return scores


# ---- tables and averages


def histogram(
    labels: Tensor, classes: int, *, eps: float, confidence: float = 0.95, seed: int | None = None
) -> Estimate:
    """Private counts of each class: one person adds 1 to one count, so the whole table has sensitivity 1.

    Neighbours differ by one person present or absent. Low and high hold the true count with the stated confidence each:
    count -+ b ln(1 / (1 - confidence)), b = 1 / eps. Counts may come out negative; rounding them is post-processing.

    Args:
        labels: int64 (N,) in [0, classes).
        classes: number of cells, known beforehand and not read off the data.
        eps, confidence, seed: > 0, in (0, 1), for the noise.
    Source: Dwork et al. 2006.
    Example: `histogram(y, 10, eps=1.0, seed=0)`.
    """
    checks.positive_int(classes, "classes")
    checks.positive(eps, "eps")
    checks.probability(confidence, "confidence")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
        raise TypeError("labels: want a torch.Tensor of int64 labels (N,)")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels: got labels outside [0, {classes - 1}]")
    counts = torch.bincount(labels, minlength=classes).double()
    return _interval(laplace(counts, sensitivity=1, eps=eps, seed=seed), 1 / eps, confidence)


def mean(values: Tensor, *, low: float, high: float, eps: float, confidence=0.95, seed: int | None = None) -> Estimate:
    """The private mean of numbers that are first clamped to [low, high]: sensitivity (high - low) / N.

    Neighbours differ in the value of one of N people; N is public. The interval is about the mean of the clamped values:
    clamping moves the mean by an amount that no interval knows of, so choose low and high without looking at the data.

    Args:
        values: finite numbers (N,).
        low, high: low < high.
        eps, confidence, seed: as for `histogram`.
    Source: Dwork et al. 2006.
    Example: `mean(torch.rand(50), low=0.0, high=1.0, eps=1.0, seed=0)`.
    """
    checks.positive(eps, "eps")
    checks.probability(confidence, "confidence")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low, high: got {low} and {high}, want finite numbers with low < high")
    if not isinstance(values, Tensor) or values.dim() != 1 or len(values) == 0 or not torch.isfinite(values).all():
        raise ValueError("values: want a non-empty torch.Tensor (N,) of finite numbers")
    width = (high - low) / len(values)
    noisy = laplace(values.double().clamp(low, high).mean(), sensitivity=width, eps=eps, seed=seed)
    return _interval(noisy, width / eps, confidence)


def _interval(noisy: Tensor, scale: float, confidence: float) -> Estimate:
    reach = scale * math.log(1 / (1 - confidence))
    made = noisy, torch.full_like(noisy, 2 * scale**2), noisy - reach, noisy + reach
    return Estimate(*(made if noisy.dim() else (float(v) for v in made)))
