"""Explaining by example: prototypes that stand for a data set, criticisms that they miss, and influential training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from .influence import Regression, influence


class Chosen(NamedTuple):
    """`prototypes` (m,) and `criticisms` (c,), rows in the order of choice; `mmd` (m,), squared, after each prototype."""

    prototypes: Tensor
    criticisms: Tensor
    mmd: Tensor


def prototypes(
    X: Tensor, m: int = 10, *, criticisms: int = 0, labels: Tensor | None = None, gamma: float | None = None
) -> Chosen:
    """MMD-critic: examples whose distribution is nearest to that of all of them, and those that are worst covered.

        MMD^2(S) = mean_ij k(x_i, x_j) - 2 mean_{i, j in S} k(x_i, x_j) + mean_{i, j in S} k(x_i, x_j),
        k(x, x') = exp(-gamma ||x - x'||^2)

    Prototypes are added greedily. Criticisms are where the witness |mean_i k(x_i, x) - mean_{j in S} k(x_j, x)| is large;
    log det of their kernel matrix keeps them apart.

    Args:
        X: rows or images (n, ...), floating point. m: prototypes, in [1, n]. criticisms: in [0, n - m].
        labels: int64 (n,); with them examples of different classes count as unlike, k = 0.
        gamma: > 0; without, one over the median of the squared distances.
    Returns: `Chosen`.
    Raises: TypeError, ValueError: bad input, all rows equal.
    Source: Kim, Khanna & Koyejo 2016.
    Example: `prototypes(x, 3, criticisms=2).prototypes.shape` is (3,).
    """
    rows = _flat(X)
    n = len(rows)
    if checks.positive_int(m, "m") > n or checks.positive_int(criticisms, "criticisms", least=0) > n - m:
        raise ValueError(f"m, criticisms: got {m} and {criticisms}, want at most {n} together, the number of rows")
    K = kernel(rows, gamma=gamma)
    if labels is not None:
        checks.labels(labels, X, "labels")
        K = K * (labels[:, None] == labels)
    pull, own = K.mean(0), K.diagonal()
    S, covered, inside, trace = [], torch.zeros_like(pull), 0.0, []
    for size in range(1, m + 1):
        # MMD^2 but for its first term, if j joined
        value = (inside + 2 * covered + own) / size**2 - 2 * (pull[S].sum() + pull) / size
        value[S] = torch.inf
        j = int(value.argmin())
        inside = inside + float(2 * covered[j] + own[j])
        covered, S = covered + K[j], [*S, j]
        trace.append(K.mean() + value[j])
    C = _criticisms(K, (pull - covered / m).abs(), S, criticisms)
    return Chosen(torch.tensor(S), torch.tensor(C, dtype=torch.int64), torch.stack(trace).clamp_min(0))


def _criticisms(K: Tensor, witness: Tensor, S: list[int], count: int) -> list[int]:
    """Greedily sum |witness| + log det K_CC; the gain in log det is the log of a Schur complement."""
    C, left = [], K.diagonal().clone()
    columns = K.new_zeros(0, len(K))  # of the Cholesky factor
    for _ in range(count):
        gain = witness + left.clamp_min(1e-12).log()
        gain[S + C] = -torch.inf
        j = int(gain.argmax())
        column = (K[j] - columns[:, j] @ columns) / left[j].clamp_min(1e-12).sqrt()
        columns, left, C = torch.cat([columns, column[None]]), left - column**2, [*C, j]
    return C


def kernel(X: Tensor, *, gamma: float | None = None) -> Tensor:
    """exp(-gamma ||x_i - x_j||^2), (n, n) double precision; gamma: one over the median squared distance without.

    Example: `kernel(x).shape` is (8, 8).
    """
    rows = _flat(X)
    square = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    if gamma is None:
        apart = square[square > 0]
        if len(apart) == 0:
            raise ValueError("X: got rows that are all equal, want different ones (or gamma=)")
        gamma = 1 / float(apart.median())
    return torch.exp(-checks.positive(gamma, "gamma") * square)


def mmd(K: Tensor, S: Tensor) -> float:
    """MMD^2 between all rows of a kernel matrix and the rows S.

    Example: `mmd(kernel(x), torch.arange(8))` is 0.0.
    """
    return float(K.mean() - 2 * K[:, S].mean() + K[S][:, S].mean())


def influential(model: Regression, X: Tensor, y: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """The training examples that a test prediction rests on: the prototypes of that one decision.

    Args: model: from `regression`; X, y: test points (m, ...) and labels; k: how many, in [1, n].
    Returns: helpful and harmful rows of the training set, (m, k) each, the strongest first: leaving out a helpful one raises
        the test loss.
    Raises: TypeError, ValueError: bad input.
    Source: Koh & Liang 2017.
    Example: `influential(tmlcourse.interpret.regression(rows, torch.arange(8) % 2), rows[:2],
        torch.tensor([0, 1]), 3)[0].shape` is (2, 3).
    """
    if not isinstance(model, Regression):
        raise TypeError(f"model: got {type(model).__name__}, want a Regression: regression(X, y)")
    if checks.positive_int(k, "k") > len(model.X):
        raise ValueError(f"k: got {k}, want at most {len(model.X)}, the number of training points")
    order = influence(model, X, y).argsort(1)
    return order[:, :k], order.flip(1)[:, :k]


def _flat(X) -> Tensor:
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(
            f"X: got {X.dtype if isinstance(X, Tensor) else type(X).__name__}, want a floating-point tensor"
        )
    if X.dim() < 2 or X.numel() == 0 or not torch.isfinite(X).all():
        raise ValueError(f"X: got shape {tuple(X.shape)}, want (n, ...) of finite numbers")
    return X.detach().flatten(1).double()
