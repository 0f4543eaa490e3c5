"""Repair before and during training, and what a protected attribute leaves behind in the other columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..linear import TwoLogits
from .rates import _auc, binary, membership

CRITERIA = ("demographic parity", "equalized odds")


def _rows(X, n: int | None = None) -> Tensor:
    """Require a finite table of numbers (n, d), n and d >= 1; returns it as float64."""
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(f"X: got {getattr(X, 'dtype', type(X).__name__)}, want a floating-point tensor (n, d)")
    if X.dim() != 2 or X.numel() == 0 or not torch.isfinite(X).all():
        raise ValueError(f"X: got shape {tuple(X.shape)} or values not finite, want (n, d), finite")
    if n is not None and len(X) != n:
        raise ValueError(f"X: got {len(X)} rows, want {n}, as many as the other arguments")
    return X.detach().double()


def logistic_regression(X: Tensor, y, *, weight: Tensor | None = None, reg: float = 0.0, steps: int = 50) -> Tensor:
    """The maximum-likelihood logistic regression by Newton's method, with a weight a row if you like.

        min_theta  sum_i w_i log(1 + exp(-(2 y_i - 1)(<x_i, theta> + b))) + (reg / 2) ||theta||^2

    Args:
        X: (n, d). y: (n,) in {0, 1}. weight: (n,), >= 0. reg: >= 0; needed where a column separates the classes, or where
            columns add up to one.
        steps: of Newton's method, at most.
    Returns: (d + 1,) float64: the coefficients, then the intercept b.
    Raises: TypeError, ValueError: bad input. RuntimeError: no minimum was found (reg = 0 on separated or redundant columns).
    Source: McCullagh & Nelder 1989, chapter 4.
    Example: `logistic_regression(torch.tensor([[0.0], [1], [2], [3]]), [0, 1, 0, 1])`.
    """
    y = binary(y, "y")
    X = _rows(X, len(y))
    checks.nonnegative(reg, "reg")
    checks.positive_int(steps, "steps")
    w = X.new_ones(len(y)) if weight is None else _weight(weight, len(y)).to(X)
    y = torch.from_numpy(y).to(X)
    A = torch.cat([X, X.new_ones(len(X), 1)], 1)
    ridge = torch.diag(torch.cat([X.new_full((X.shape[1],), float(reg)), X.new_zeros(1)]))
    sign = 2 * y - 1

    def value(theta):
        return float((w * F.softplus(-sign * (A @ theta))).sum() + theta @ ridge @ theta / 2)

    theta, now = X.new_zeros(A.shape[1]), float("inf")
    for _ in range(steps):
        p = (A @ theta).sigmoid()
        slope = A.T @ (w * (p - y)) + ridge @ theta
        H = A.T @ ((w * p * (1 - p))[:, None] * A) + ridge
        step, info = torch.linalg.solve_ex(H, slope)
        if int(info) or not torch.isfinite(step).all() or theta.abs().max() > 1e6:
            break
        size, now = 1.0, value(theta)
        while size > 1e-6 and value(theta - size * step) > now:
            size /= 2
        theta = theta - size * step
        if float(slope @ step) < 1e-12 * (1 + abs(now)):
            if reg > 0 or _determined(A, w, H):
                return theta
            break
    raise RuntimeError(
        "logistic_regression: no minimum found; are columns redundant, or the classes separated? Try reg=1e-3"
    )


def _determined(A: Tensor, w: Tensor, H: Tensor) -> bool:
    """Whether the data curve the loss in every direction: no redundant column, no p that has run off to 0 or 1."""
    most, info = torch.linalg.cholesky_ex(A.T @ (w[:, None] * A) / 4)
    if int(info):
        return False
    inner = torch.linalg.solve_triangular(most, torch.linalg.solve_triangular(most, H, upper=False).T, upper=False)
    return bool(torch.linalg.eigvalsh((inner + inner.T) / 2).min() > 1e-7)


def _weight(weight, n: int) -> Tensor:
    if not isinstance(weight, Tensor) or weight.shape != (n,):
        raise ValueError(f"weight: got {getattr(weight, 'shape', type(weight).__name__)}, want a tensor ({n},)")
    weight = weight.detach().double()
    if not torch.isfinite(weight).all() or weight.min() < 0 or weight.sum() == 0:
        raise ValueError("weight: got negative, infinite or only zero weights, want finite ones >= 0")
    return weight


def reweigh(y, group) -> Tensor:
    """Weights under which outcome and group are independent: w = P(A=a) P(Y=y) / P(A=a, Y=y) for each row.

    Rows of a group's rarer outcome count more, others less; their sum is n, and no label is changed.

    Args: y: (n,) in {0, 1}; group: (n,), at least two values, each with both outcomes.
    Returns: (n,) float64, > 0.
    Raises: TypeError, ValueError: bad input, a group without one of the outcomes.
    Source: Kamiran & Calders 2012, section 4.
    Example: `reweigh([1, 1, 0, 0, 1, 0, 0, 0], ["a"] * 4 + ["b"] * 4)`.
    """
    y = binary(y, "y")
    codes, names = membership(group, len(y))
    joint = np.zeros((len(names), 2))
    np.add.at(joint, (codes, y), 1)
    if (joint == 0).any():
        k, label = np.argwhere(joint == 0)[0]
        raise ValueError(
            f"group: {names[k]!r} has no row of y = {label}; no weight makes up for rows that are not there"
        )
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True) / len(y)
    return torch.from_numpy((expected / joint)[codes, y])


def debias(
    X: Tensor, y, group, *, criterion: str = "demographic parity", alpha: float = 1.0, hidden: int = 0, steps: int = 600,
    batch_size: int = 256, lr: float = 0.02, seed: int | None = None,
) -> nn.Sequential:  # fmt: skip
    """Adversarial debiasing: learn Y from X while an adversary tries to read the group off the prediction.

        W <- W - lr ( grad L_P  -  proj_{grad L_A} grad L_P  -  alpha grad L_A )

    L_P is the predictor's cross-entropy, L_A that of the adversary, who sees the predictor's score (and for equalized odds
    also y). The projection takes out of each step whatever would help the adversary; the last term works against it.

    Args:
        X: (n, d), scaled inside. y: (n,) in {0, 1}. group: (n,), at least two values.
        criterion: "demographic parity" or "equalized odds".
        alpha: the weight of the adversary (>= 0). hidden: units of the predictor's hidden layer, 0 for a linear one.
        steps, batch_size, lr: of Adam, lr falling to 0; the adversary learns five times as fast.
        seed: makes the run reproducible and leaves torch's generator as it was.
    Returns: `nn.Sequential` in evaluation mode: float32 (n, d) -> logits (n, 2).
    Raises: TypeError, ValueError: bad input.
    Source: Zhang, Lemoine & Mitchell 2018.
    Example: `debias(torch.rand(20, 2), [0, 1] * 10, ["a"] * 10 + ["b"] * 10, steps=5, seed=0)(torch.rand(3, 2)).shape`.
    """
    y = binary(y, "y")
    codes, names = membership(group, len(y))
    x = _rows(X, len(y)).float()
    checks.choice(criterion, "criterion", CRITERIA)
    checks.nonnegative(alpha, "alpha")
    checks.nonnegative(lr, "lr")
    checks.positive_int(hidden, "hidden", least=0)
    checks.positive_int(steps, "steps")
    checks.positive_int(batch_size, "batch_size")
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    z, target, who = (x - mean) / std, torch.from_numpy(y).to(x), torch.from_numpy(codes).to(x.device)
    with randomness.seeded(seed):
        wide = hidden or 1
        layers = [nn.Linear(x.shape[1], wide), *([nn.ReLU(), nn.Linear(wide, 1)] if hidden else [])]
        predictor = nn.Sequential(*layers).to(x.device)
        adversary = nn.Linear(1 if criterion == "demographic parity" else 3, len(names)).to(x.device)
        batches = torch.randint(len(x), (steps, batch_size)).to(x.device)
    first, second = torch.optim.Adam(predictor.parameters()), torch.optim.Adam(adversary.parameters())
    for step, batch in enumerate(progress.bar(batches, desc="debias")):
        first.param_groups[0]["lr"] = lr * (1 - step / steps)
        second.param_groups[0]["lr"] = 5 * lr * (1 - step / steps)
        score, label = predictor(z[batch]).squeeze(1), target[batch]
        seen = score[:, None]
        if criterion == "equalized odds":
            seen = torch.stack([score, score * label, score * (1 - label)], 1)
        loss, against = F.binary_cross_entropy_with_logits(score, label), F.cross_entropy(adversary(seen), who[batch])
        own = torch.autograd.grad(loss, list(predictor.parameters()), retain_graph=True)
        other = torch.autograd.grad(against, [*predictor.parameters(), *adversary.parameters()])
        for parameter, g in zip(predictor.parameters(), against_adversary(own, other[: len(own)], alpha), strict=True):
            parameter.grad = g
        for parameter, g in zip(adversary.parameters(), other[len(own) :], strict=True):
            parameter.grad = g
        first.step()
        second.step()
    predictor.zero_grad()
    with torch.no_grad():  # the model takes X as it came
        predictor[0].weight /= std
        predictor[0].bias -= predictor[0].weight @ mean
    return nn.Sequential(*predictor, TwoLogits()).eval()


def against_adversary(own, theirs, alpha: float) -> list[Tensor]:
    """g - proj_h g - alpha h, g and h the gradients of predictor and adversary, each a list of tensors taken as one vector.

    Source: Zhang, Lemoine & Mitchell 2018, equation 1.
    Example: `against_adversary([torch.tensor([1.0, 1.0])], [torch.tensor([0.0, 2.0])], 0.5)`.
    """
    size = sum((h * h).sum() for h in theirs).clamp_min(1e-12)
    along = sum((g * h).sum() for g, h in zip(own, theirs, strict=True)) / size
    return [g - (along + alpha) * h for g, h in zip(own, theirs, strict=True)]


def proxies(X: Tensor, group, *, feature_names=None, folds: int = 5, seed: int = 0) -> pd.Series:
    """How well the other columns tell the group: the AUC of predicting it from all of them, and from each alone.

    0.5 is no better than chance, 1 gives the group away. From all columns: logistic regression, tested on rows that it was
    not fitted to. A single column is turned to the side on which it works, so noise gives a little more than 0.5.

    Args:
        X: (n, d), without the group itself. group: (n,), two values (compare one group with the rest).
        feature_names: d texts. folds: of the cross-validation, >= 2. seed: of the folds.
    Returns: Series, "all columns" first, then the columns from the most telling one down.
    Raises: TypeError, ValueError: bad input.
    Source: Barocas, Hardt & Narayanan 2023, chapter 3 (no fairness through unawareness).
    Example: `proxies(torch.rand(40, 2), ["a", "b"] * 20)`.
    """
    codes, names = membership(group)
    X = _rows(X, len(codes)).cpu()
    if len(names) != 2:
        raise ValueError(f"group: got {len(names)} values, want two: one group, and the rest")
    checks.positive_int(folds, "folds", least=2)
    names = [f"column {j}" for j in range(X.shape[1])] if feature_names is None else list(feature_names)
    if len(names) != X.shape[1]:
        raise ValueError(f"feature_names: got {len(names)}, want {X.shape[1]}, one a column")
    if np.bincount(codes).min() < folds:
        raise ValueError(f"group: got {np.bincount(codes).min()} rows of one group, want at least {folds}, one a fold")
    fold = np.random.default_rng(seed).permutation(len(codes)) % folds
    z = (X - X.mean(0)) / X.std(0, correction=0).clamp_min(1e-9)
    guess = np.zeros(len(codes))
    for k in range(folds):
        train = torch.from_numpy(fold != k)
        theta = logistic_regression(z[train], codes[fold != k], reg=1.0)
        guess[fold == k] = (z[~train] @ theta[:-1] + theta[-1]).numpy()
    alone = {name: _rank_auc(codes, column) for name, column in zip(names, X.T.numpy(), strict=True)}
    alone = {name: max(auc, 1 - auc) for name, auc in alone.items()}
    order = sorted(alone, key=alone.get, reverse=True)
    return pd.Series({"all columns": _rank_auc(codes, guess), **{name: alone[name] for name in order}}, name="auc")


def _rank_auc(y: np.ndarray, score: np.ndarray) -> float:
    _, place = np.unique(score, return_inverse=True)
    return float(_auc(np.bincount(place, 1 - y), np.bincount(place, y)))
