"""Counterfactual explanations: the smallest change of a person's data that would have changed the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from .. import checks, progress


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """`x` (d,), what would have got the wanted score; `found`, whether it does; `score`; `distance`; `lam`, the last weight.

    Where `found` is False no change of what may change was found to be enough, and x is the original row.
    """

    original: Tensor
    x: Tensor
    found: bool
    score: float
    distance: float
    lam: float = float("nan")

    @property
    def changed(self) -> tuple[int, ...]:
        """The features that differ from the original."""
        return tuple(torch.nonzero(self.x != self.original)[:, 0].tolist())

    def say(self, names: Sequence[str], digits: int = 3) -> str:
        """The explanation in words. names: one for each feature; "job=clerk" is read as the value clerk of job."""
        if not self.found:
            return "Nothing that may change would have changed the decision."
        if not self.changed:
            return "The decision is already the wanted one."
        parts = []
        for k in self.changed:
            name, _, value = names[k].partition("=")
            if not value:
                parts.append(f"{name} had been {self.x[k]:.{digits}g} instead of {self.original[k]:.{digits}g}")
            elif self.x[k] > self.original[k]:
                parts.append(f"{name} had been {value}")
        return "If " + " and ".join(parts) + ", the decision would have been the other one."


def mad(X: Tensor) -> Tensor:
    """The median absolute deviation of each column, median_i |X_ik - median_j X_jk|: how far a feature usually varies.

    A column that is mostly one value has MAD 0; there the mean absolute deviation from the median stands in. A constant
    column keeps 0, and what has scale 0 cannot change.

    Args: X: rows (n, d), floating point. Returns: (d,).
    Raises: TypeError, ValueError: bad input.
    Source: Wachter, Mittelstadt & Russell 2018.
    Example: `mad(rows).shape` is (30,).
    """
    _numbers(X, "X", 2)
    away = (X - X.quantile(0.5, dim=0)).abs()
    middle = away.quantile(0.5, dim=0)
    return torch.where(middle > 0, middle, away.mean(0))


def one_hot_groups(names: Sequence[str]) -> list[list[int]]:
    """The columns that belong together by their names: "sex=Male" and "sex=Female" are one group.

    Example: `one_hot_groups(["age", "sex=F", "sex=M"])`.
    """
    groups = {}
    for k, name in enumerate(names):
        if "=" in name:
            groups.setdefault(name.split("=")[0], []).append(k)
    return list(groups.values())


def counterfactual(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    wanted: float,
    scale: Tensor,
    *,
    tol: float = 0.02,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    fixed: Tensor | None = None,
    integer: Tensor | None = None,
    groups: Sequence[Sequence[int]] = (),
    switches: int = 1,
    steps: int = 100,
    raises: int = 20,
) -> Counterfactual:
    """Wachter's counterfactual: reach a score with the least change, counted in each feature's usual deviation.

        argmin_x' max_lambda  lambda (f(x') - y')^2 + d(x, x'),   d(x, x') = sum_k |x_k - x'_k| / MAD_k

    lambda is doubled until |f(x') - y'| <= tol; each lambda is minimised by proximal gradient steps, which leave features
    exactly as they are unless it pays to change them. Categories are enumerated: the search runs for no switch and for every
    choice of at most `switches` of them, all at once. Whole numbers are rounded at the end, and steps that turn
    out to be unnecessary are taken back.

    Args:
        score: rows (m, d) -> (m,), differentiable. A logit is better than a probability, whose slope dies.
        x: one row (d,). wanted: y', a little beyond the boundary of the decision. tol: > 0.
        scale: (d,) >= 0, e.g. `mad(X)`; a feature with scale 0 does not change.
        low, high: numbers or tensors (d,), within which features stay. fixed: bool (d,), what nobody can change.
        integer: bool (d,), features that are whole numbers. groups: lists of one-hot columns; one that is fixed in any column
            stays. switches: in {0, 1, 2}.
        steps: a lambda; raises: how often lambda is doubled.
    Returns: `Counterfactual`; not `found` if no candidate reaches y'.
    Raises: TypeError, ValueError: bad input.
    Source: Wachter, Mittelstadt & Russell 2018.
    Example: `counterfactual(lambda r: r.sum(1), rows[0], 20.0, mad(rows)).found`.
    """
    if not callable(score):
        raise TypeError(f"score: got {type(score).__name__}, want a function of rows (m, d)")
    domain = _Domain(x, scale, low, high, fixed, integer, groups)
    tol = checks.positive(tol, "tol")
    checks.positive_int(steps, "steps")
    checks.positive_int(raises, "raises")
    if switches not in (0, 1, 2):
        raise ValueError(f"switches: got {switches!r}, want 0, 1 or 2")
    if not isinstance(wanted, (int, float)) or wanted != wanted:
        raise ValueError(f"wanted: got {wanted!r}, want a number")
    x = domain.x
    start = float(_scores(score, x[None])[0])
    if abs(start - wanted) <= tol:
        return Counterfactual(x, x.clone(), True, start, 0.0, 0.0)
    side = 1.0 if wanted > start else -1.0

    def reached(rows):
        return side * (_scores(score, rows) - wanted) >= -tol

    starts = domain.switched(switches)
    rows, lam = _wachter(score, starts, float(wanted), side, tol, domain, steps, raises)
    rows = torch.where(reached(starts)[:, None], starts, domain.whole(rows, starts))
    good = reached(rows)
    if not good.any():
        return Counterfactual(x, x.clone(), False, start, 0.0, float(lam.max()))
    order = torch.where(good, domain.distance(rows), torch.inf).argsort()[:10]
    rows, lam = rows[order[good[order]]], lam[order[good[order]]]
    rows = torch.stack([_taken_back(row, reached, domain) for row in rows])
    best = int(domain.distance(rows).argmin())
    row = rows[best]
    return Counterfactual(
        x, row, True, float(_scores(score, row[None])[0]), float(domain.distance(row)), float(lam[best])
    )


def linear_counterfactual(
    w: Tensor,
    b: float,
    x: Tensor,
    wanted: float,
    scale: Tensor,
    *,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    fixed: Tensor | None = None,
) -> Counterfactual:
    """The exact counterfactual of f(x) = <w, x> + b: only the feature with the largest |w_k| MAD_k changes.

        x'_k = x_k + (y' - f(x)) / w_k;   with a box, that feature goes to its end, then the next one

    Each unit of distance spent on feature k buys |w_k| MAD_k of score, so this is a knapsack that may be filled by fractions.

    Args: w: (d,); b; the others as in `counterfactual`.
    Returns: `Counterfactual`; not `found` if the whole box is not enough.
    Raises: TypeError, ValueError: bad input.
    Source: Wachter, Mittelstadt & Russell 2018; Dantzig 1957.
    Example: `linear_counterfactual(torch.tensor([1.0, 3.0]), 0.0, torch.zeros(2), 6.0, torch.ones(2)).x`.
    """
    domain = _Domain(x, scale, low, high, fixed, None, ())
    _numbers(w, "w", 1)
    if w.shape != x.shape:
        raise ValueError(f"w: got shape {tuple(w.shape)}, want {tuple(x.shape)}")
    x, w = domain.x, w.to(domain.x)
    start = float(w @ x) + b
    left, row = wanted - start, x.clone()
    if left == 0:
        return Counterfactual(x, row, True, start, 0.0)
    price = torch.where(domain.free, w.abs() * domain.scale, 0.0)
    for k in price.argsort(descending=True).tolist():
        if price[k] == 0 or left == 0:
            break
        end = domain.high[k] if (left > 0) == bool(w[k] > 0) else domain.low[k]
        room = float((end - x[k]) * w[k])
        if abs(room) >= abs(left):
            row[k], left = x[k] + left / w[k], 0.0
        else:
            row[k], left = end, left - room
    if left:
        return Counterfactual(x, x.clone(), False, start, 0.0)
    return Counterfactual(x, row, True, float(w @ row) + b, float(domain.distance(row)))


class _Domain:
    """What may change, and what a change costs."""

    def __init__(self, x, scale, low, high, fixed, integer, groups):
        _numbers(x, "x", 1)
        _numbers(scale, "scale", 1)
        d = len(x)
        if scale.shape != x.shape or (scale < 0).any():
            raise ValueError(f"scale: got shape {tuple(scale.shape)}, want ({d},) numbers >= 0")
        self.x, self.scale = x.detach(), scale.to(x)
        fixed, self.integer = (_flags(v, n, x) for v, n in ((fixed, "fixed"), (integer, "integer")))
        self.low, self.high = (_end(v, n, x) for v, n in ((low, "low"), (high, "high")))
        outside = ~fixed & ((x < self.low) | (x > self.high))
        if outside.any():
            raise ValueError(f"low, high: x itself is outside in feature(s) {outside.nonzero()[:, 0].tolist()[:9]}")
        category = torch.zeros_like(fixed)
        self.groups = []
        for group in groups:
            index = torch.as_tensor(list(group), dtype=torch.int64, device=x.device)
            if len(index) < 2 or index.min() < 0 or index.max() >= d or category[index].any():
                raise ValueError(f"groups: got {list(group)}, want at least two columns below {d}, in one group each")
            if not torch.isin(x[index], x.new_tensor([0.0, 1.0])).all() or x[index].sum() != 1:
                raise ValueError(f"groups: columns {list(group)} hold {x[index].tolist()}, want one 1 and zeros")
            category[index] = True
            if not fixed[index].any():
                self.groups.append(index)
        self.free = ~fixed & ~category & (self.scale > 0)
        self.cost = torch.where(self.scale > 0, 1 / self.scale, 0.0)

    def distance(self, rows: Tensor) -> Tensor:
        return ((rows - self.x).abs() * self.cost).sum(-1)

    def switched(self, most: int) -> Tensor:
        """x, and x with every choice of at most `most` categories set to another value."""
        rows = [self.x]
        for count in range(1, min(most, len(self.groups)) + 1):
            for chosen in combinations(self.groups, count):
                for values in product(
                    *([int(k) for k in index if self.x[k] == 0 and self.scale[k] > 0] for index in chosen)
                ):
                    row = self.x.clone()
                    for index, value in zip(chosen, values, strict=True):
                        row[index], row[value] = 0.0, 1.0
                    rows.append(row)
        return torch.stack(rows)

    def whole(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Whole numbers, rounded away from the original: a little further than was needed."""
        step = rows - starts
        away = starts + step.sign() * (step.abs() - 1e-4).ceil().clamp_min(0)
        inside = torch.where(away > self.high, self.high.floor(), torch.where(away < self.low, self.low.ceil(), away))
        return torch.where(self.integer & self.free, inside, rows)


def _wachter(score, starts, wanted, side, tol, domain, steps, raises) -> tuple[Tensor, Tensor]:
    """Proximal gradient on lambda (f - y')^2 + d for all rows at once, lambda doubled for those that are not there yet.

    The distance grows with lambda, so rows that are far beyond the best one found are given up.
    """
    scale = torch.where(domain.free, domain.scale, 0.0)
    rows, (f, g) = starts.clone(), _slopes(score, starts, scale)
    # Below 1 / (2 |f - y'| max_k |g_k|) nothing moves.
    lam = 1.1 / (2 * (f - wanted).abs().clamp_min(tol) * g.abs().amax(1).clamp_min(1e-12))
    grow = g.square().sum(1).clamp_min(1e-12)  # 2 lambda grow bounds the curvature
    open_ = torch.arange(len(rows), device=rows.device)
    for _ in progress.bar(range(raises if domain.free.any() else 0), desc="raising lambda"):
        x, centre = rows[open_], starts[open_]
        for _ in range(steps):
            f, g = _slopes(score, x, scale)
            grow[open_] = torch.maximum(grow[open_], g.square().sum(1))
            eta = (1 / (2 * lam[open_] * grow[open_]))[:, None]
            u = (x - centre) * domain.cost - (eta * 2 * lam[open_, None] * (f - wanted)[:, None]) * g
            u = u.sign() * (u.abs() - eta).clamp_min(0)
            new = torch.where(scale > 0, (centre + scale * u).clamp(domain.low, domain.high), centre)
            still = float(((new - x).abs() * domain.cost).amax()) < 1e-5
            x = new
            if still:
                break
        rows[open_] = x
        there = side * (_scores(score, rows) - wanted) >= -tol
        away = domain.distance(rows)
        best = away[there].min() if there.any() else torch.inf
        open_ = torch.nonzero(~there & (away <= 1.5 * best))[:, 0]
        if len(open_) == 0:
            break
        lam[open_] *= 2
    return rows, lam


def _taken_back(row: Tensor, reached, domain: _Domain) -> Tensor:
    """Undo what is not needed: whole features first, the smallest change first; then single steps of whole numbers."""
    size = (row - domain.x).abs() * domain.cost
    for k in size.argsort().tolist():
        if domain.free[k] and row[k] != domain.x[k]:
            trial = row.clone()
            trial[k] = domain.x[k]
            row = trial if bool(reached(trial[None])[0]) else row
    for k in torch.nonzero(domain.integer & domain.free & (row != domain.x))[:, 0].tolist():
        while row[k] != domain.x[k]:
            trial = row.clone()
            trial[k] += (domain.x[k] - row[k]).sign()
            if not bool(reached(trial[None])[0]):
                break
            row = trial
    return row


def _slopes(score, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """f and its slope in units of the scale."""
    rows = rows.detach().requires_grad_()
    with torch.enable_grad():
        f = score(rows)
        (g,) = torch.autograd.grad(f.sum(), rows)
    return f.detach(), g * scale


def _scores(score, rows: Tensor) -> Tensor:
    with torch.no_grad():
        f = score(rows)
    if not isinstance(f, Tensor) or f.shape != (len(rows),) or not torch.isfinite(f).all():
        got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"score: got {got} (or numbers that are not finite), want ({len(rows)},) finite numbers")
    return f


def _numbers(value, name: str, dim: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, want a floating-point tensor")
    if value.dim() != dim or not value.numel() or not torch.isfinite(value).all():
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want {'(d,)' if dim == 1 else '(n, d)'} of finite numbers"
        )


def _flags(value, name: str, x: Tensor) -> Tensor:
    if value is None:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != x.shape:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, want a bool tensor ({len(x)},)")
    return value.to(x.device)


def _end(value, name: str, x: Tensor) -> Tensor:
    if value is None:
        return torch.full_like(x, -torch.inf if name == "low" else torch.inf)
    try:
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand_as(x)
    except (RuntimeError, TypeError, ValueError) as cause:
        raise ValueError(f"{name}: got {value!r}, want a number or a tensor ({len(x)},)") from cause
