"""The exact interval of a share, for every module that counts."""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv


def clopper_pearson(k, n, confidence: float = 0.95):
    """The exact interval of a probability of which `k` hits in `n` independent trials were seen.

    With tail = (1 - confidence) / 2, low is the p for which P(Binomial(n, p) >= k) = tail, and high the p for which
    P(Binomial(n, p) <= k) = tail; 0 and 1 where k is 0 and n. Each end by itself is a one-sided bound with error tail.

    Args:
        k, n: counts, 0 <= k <= n and n >= 1; numbers, or arrays that go together.
        confidence: of the interval, in (0, 1).
    Returns:
        (low, high): floats for numbers, float64 arrays for arrays.
    Raises: ValueError: counts out of range.
    Source: Clopper & Pearson 1934.
    Example: `clopper_pearson(3, 10)`.
    """
    k, n = np.broadcast_arrays(np.asarray(k, dtype=float), np.asarray(n, dtype=float))
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError("k, n: got counts out of range, want 0 <= k <= n and n >= 1")
    tail = (1 - confidence) / 2
    # The quantiles of Beta(a, b) are betaincinv(a, b, .); `scipy.stats` would add its import's half second to the package's.
    low = np.where(k > 0, betaincinv(k.clip(1), n - k + 1, tail), 0.0)
    high = np.where(k < n, betaincinv(k + 1, (n - k).clip(1), 1 - tail), 1.0)
    return (float(low), float(high)) if low.ndim == 0 else (low, high)
