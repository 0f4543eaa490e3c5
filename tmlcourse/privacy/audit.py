"""Auditing: what an attacker can tell about one record is a lower bound on eps, whatever the mechanism claims.

If M is (eps, delta)-private, every test "the record was there" has TPR <= e^eps FPR + delta, and TNR <= e^eps FNR + delta.
So rates that were seen prove an eps, up to chance, and chance has exact intervals (Clopper & Pearson).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .. import checks, progress
from ..intervals import clopper_pearson


@dataclass(frozen=True)
class Audit:
    """What was found: `eps` lies below the true one with the stated confidence; the test that shows it; its rates.

    tpr, fpr: hit rates of "the record was there", measured on runs that did not choose the threshold.
    """

    eps: float
    threshold: float
    tpr: float
    fpr: float
    trials: int
    confidence: float

    def breaks(self, claimed: float) -> bool:
        """Whether the claim "at most this eps" is refuted."""
        return self.eps > checks.positive(claimed, "claimed")

    def __str__(self) -> str:
        return f"eps >= {self.eps:.3f} at confidence {self.confidence:g}, from {self.trials} runs each"


def audit(
    mechanism: Callable,
    data,
    neighbour,
    *,
    delta: float = 0.0,
    trials: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Audit:
    """Run the mechanism `trials` times on each of two neighbouring data sets and prove a lower bound on its eps.

    Half of the runs choose the threshold on the output, and the direction; the other half measures its rates, so that the
    choice costs nothing. The bound is ln((TPR_low - delta) / FPR_high), or the same with both sides exchanged.

    Args:
        mechanism: (data, seed) -> a number: its output, or whatever an attacker makes of it. Higher speaks for `data`. It is
            called with a new seed each time; one that ignores it is audited all the same.
        data, neighbour: any two data sets that differ in one record.
        delta: of the claim, in [0, 1).
        trials: runs on each (>= 20). With t runs no eps beyond about ln(t / 8) can be shown at confidence 0.95.
        confidence: of the bound, in (0, 1).
        seed: of the first run.
    Returns: an `Audit`.
    Raises: ValueError for outputs that are no finite numbers, or bad input.
    Source: Jagielski, Ullman & Oprea 2020; Nasr et al. 2021.
    Example: `audit(lambda d, seed: d + seed % 7, 3.0, 0.0, trials=50)`.
    """
    if not callable(mechanism):
        raise TypeError(f"mechanism: got {type(mechanism).__name__}, want a function (data, seed) -> number")
    checks.positive_int(trials, "trials", least=20)
    scores = np.empty((2, trials))
    with progress.bar(total=2 * trials, desc="audit", unit="run") as bar:
        for side, records in enumerate((data, neighbour)):
            for trial in range(trials):
                scores[side, trial] = float(mechanism(records, seed + 2 * trial + side))
                bar.update()
    return lower_bound(*scores, delta=delta, confidence=confidence)


def lower_bound(present, absent, *, delta: float = 0.0, confidence: float = 0.95) -> Audit:
    """The eps that an attacker's scores prove: `present` where the record was there, `absent` where it was not.

    Every second score, in the order given, chooses the threshold; the others count.

    Args:
        present, absent: finite numbers, at least 20 each.
        delta, confidence: in [0, 1) and (0, 1).
    Source: as for `audit`.
    Example: `lower_bound(range(20, 60), range(40))`.
    """
    checks.probability(delta, "delta", zero=True)
    checks.probability(confidence, "confidence")
    sides = []
    for name, values in (("present", present), ("absent", absent)):
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(list(values), float)
        if values.ndim != 1 or len(values) < 20 or not np.isfinite(values).all():
            raise ValueError(f"{name}: got {len(values)} scores, want at least 20 finite numbers")
        sides.append(values.astype(float))
    choose, test = [s[::2] for s in sides], [s[1::2] for s in sides]
    rules = [(float(cut), swap, below) for cut in _cuts(*choose) for swap in (False, True) for below in (False, True)]
    cut, swap, below = max(rules, key=lambda rule: _eps(*_counts(*choose, *rule), delta, confidence))
    hits, n, false, m = _counts(*test, cut, swap, below)
    tpr, fpr = (1 - false / m, 1 - hits / n) if swap else (hits / n, false / m)
    return Audit(max(_eps(hits, n, false, m, delta, confidence), 0.0), cut, tpr, fpr, len(sides[0]), confidence)


def _cuts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Thresholds between the scores, at most 50 of them."""
    scores = np.unique(np.concatenate([a, b]))
    middles = (scores[1:] + scores[:-1]) / 2 if len(scores) > 1 else scores
    return middles[np.unique(np.linspace(0, len(middles) - 1, 50).astype(int))]


def _counts(present, absent, cut: float, swap: bool, below: bool) -> tuple[int, int, int, int]:
    """How often the event score > cut (or <= cut) happens on one side, of how many, and on the other, of how many."""
    one, other = (absent, present) if swap else (present, absent)
    return int(((one > cut) != below).sum()), len(one), int(((other > cut) != below).sum()), len(other)


def _eps(hits: int, n: int, false: int, m: int, delta: float, confidence: float) -> float:
    """ln((p_low - delta) / p'_high) for an event's probabilities on both sides; each end has half of the allowed error."""
    low = clopper_pearson(hits, n, confidence)[0]
    high = clopper_pearson(false, m, confidence)[1]
    return math.log((low - delta) / high) if low > delta else -math.inf


def advantage_bound(eps: float, delta: float = 0.0) -> float:
    """The most that TPR - FPR of any membership test can be: (e^eps - 1 + 2 delta) / (e^eps + 1).

    Source: Humphries et al. 2020; Kairouz, Oh & Viswanath 2015 for the region it comes from.
    Example: `advantage_bound(1.0)`.
    """
    checks.nonnegative(eps, "eps")
    checks.probability(delta, "delta", zero=True)
    return math.tanh(eps / 2) + 2 * delta / (math.exp(min(eps, 700)) + 1)
