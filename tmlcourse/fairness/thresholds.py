"""Repair behind the classifier: the best mixture of thresholds, one for each group, that meets a criterion.

A rule "Y^ = 1 if S >= t" is a point (FPR, TPR) of its group's ROC curve. Drawing lots between rules reaches every point of
the curve's convex hull and no other. A criterion asks that the groups meet at the same point, or on the same line, so the
best fair rule is a linear program over the weights of the rules.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pulp
import torch
from torch import Tensor

from .. import checks
from .rates import _numbers, binary, membership, roc

CONSTRAINTS = {"equalized odds": ("fpr", "tpr"), "equal opportunity": ("tpr",), "demographic parity": ("selection_rate",),
               "none": ()}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Equalized:
    """A randomised threshold rule for each group.

    rules: DataFrame with columns group, threshold, flipped, weight: draw one of the group's rules with its weight; it says
    Y^ = 1[S >= threshold], or the contrary where flipped. rates: of each group, fpr, tpr and selection_rate. loss: the mean
    cost of a decision. constraint: what the rates obey.
    """

    constraint: str
    rules: pd.DataFrame
    rates: pd.DataFrame
    loss: float

    def probability(self, score, group) -> Tensor:
        """P(Y^ = 1) of each person, (n,) float64. Raises ValueError for a group that the rules do not know."""
        score = _numbers(score, "score", None)
        codes, names = membership(group, len(score), least=1)
        if unknown := [name for name in names if name not in set(self.rules["group"])]:
            raise ValueError(f"group: got {unknown[0]!r}, want one of {', '.join(map(repr, self.rates.index))}")
        p = np.zeros(len(score))
        for k, name in enumerate(names):
            mine = codes == k
            for rule in self.rules[self.rules["group"] == name].itertuples():
                p[mine] += rule.weight * ((score[mine] >= rule.threshold) != rule.flipped)
        return torch.from_numpy(p.clip(0, 1))

    def predict(self, score, group, *, seed: int | None = None) -> Tensor:
        """Decisions (n,) int64, the lots drawn with `seed` (NumPy's own entropy without it)."""
        p = self.probability(score, group).numpy()
        return torch.from_numpy((np.random.default_rng(seed).random(len(p)) < p).astype(np.int64))


def equalize(
    y, score, group, *, constraint: str = "equalized odds", cost: tuple[float, float] = (1.0, 1.0), tolerance: float = 0.0,
    flip: bool = False,
) -> Equalized:  # fmt: skip
    """The cheapest mixture of thresholds, group by group, that meets a criterion: a linear program over the mixtures.

        min  sum_a P(A=a) [ c_fp P(Y=0|a) FPR_a + c_fn P(Y=1|a) (1 - TPR_a) ]
        over weights w_{a,t} >= 0 with sum_t w_{a,t} = 1,  FPR_a = sum_t w_{a,t} FPR_a(t),  TPR_a = sum_t w_{a,t} TPR_a(t),
        with rates of two groups at most `tolerance` apart

    A decision Y^ in {0, 1} is a score, too: then the rules are "nobody", Y^ and "everybody" (and with `flip` 1 - Y^, which
    makes Hardt's program of four variables).

    Args:
        y: (n,) in {0, 1}, both in each group. score: (n,), finite. group: (n,), at least two values.
        constraint: "equalized odds", "equal opportunity", "demographic parity" or "none".
        cost: (c_fp, c_fn) of a false positive and a false negative, >= 0.
        tolerance: how far apart the rates may be (>= 0).
        flip: whether a rule may also select those *below* a threshold; it helps where a score is worse than chance.
    Returns: `Equalized`.
    Raises: TypeError, ValueError: bad input, a group without both outcomes.
    Source: Hardt, Price & Srebro 2016, section 4.
    Example: `equalize([0, 1, 0, 1], [0.1, 0.9, 0.6, 0.4], ["a", "a", "b", "b"]).rates`.
    """
    y = binary(y, "y")
    score = _numbers(score, "score", len(y))
    codes, names = membership(group, len(y))
    checks.choice(constraint, "constraint", CONSTRAINTS)
    if len(cost) != 2:
        raise ValueError(f"cost: got {cost}, want (c_fp, c_fn)")
    c_fp, c_fn = (checks.nonnegative(c, "cost") for c in cost)
    checks.nonnegative(tolerance, "tolerance")
    rules = [_rules(y[codes == k], score[codes == k], name, flip) for k, name in enumerate(names)]
    cost_of = []
    for k, rule in enumerate(rules):
        negative, positive = (np.mean((codes == k) & (y == label)) for label in (0, 1))
        cost_of.append((c_fp * negative * rule["fpr"] + c_fn * positive * (1 - rule["tpr"])).to_numpy())
    weights = _program(rules, cost_of, CONSTRAINTS[constraint], tolerance)
    rates = [(w @ r[["fpr", "tpr", "selection_rate"]]) for w, r in zip(weights, rules, strict=True)]
    rates = pd.DataFrame(rates, index=pd.Index(names, name="group"))
    table = pd.concat([r.assign(weight=w)[w > 0] for w, r in zip(weights, rules, strict=True)], ignore_index=True)
    loss = float(sum(w @ c for w, c in zip(weights, cost_of, strict=True)))
    return Equalized(constraint, table[["group", "threshold", "flipped", "weight"]], rates, loss)


def _rules(y: np.ndarray, score: np.ndarray, name, flip: bool) -> pd.DataFrame:
    """The rules at the corners of the group's convex hull, and with `flip` their contraries."""
    if y.min() == y.max():
        raise ValueError(f"group: {name!r} has only rows of y = {y[0]}, want both outcomes in each group")
    table = roc(y, score)
    corners = np.union1d(_upper(table, 1), _upper(table, -1))
    table = table.iloc[corners].assign(group=name, flipped=False)
    if not flip:
        return table.reset_index(drop=True)
    other = table.assign(flipped=True, **{rate: 1 - table[rate] for rate in ("fpr", "tpr", "selection_rate")})
    return pd.concat([table, other.iloc[1:-1]], ignore_index=True)


def _upper(table: pd.DataFrame, side: int) -> list[int]:
    """Indices of the corners of the upper (side 1) or lower (-1) convex hull of the curve, from left to right."""
    x, y = table["fpr"].to_numpy(), side * table["tpr"].to_numpy()
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (x[b] - x[a]) * (y[i] - y[a]) - (y[b] - y[a]) * (x[i] - x[a]) < 0:
                break
            hull.pop()
        hull.append(i)
    return hull


def _program(rules, cost_of, equal: tuple[str, ...], tolerance: float) -> list[np.ndarray]:
    """The weights of the rules, one array a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = pulp.LpProblem("equalize", pulp.LpMinimize)
        w = [[pulp.LpVariable(f"w{k}_{t}", 0, 1) for t in range(len(r))] for k, r in enumerate(rules)]
        program += pulp.lpSum(
            float(c) * v for row, costs in zip(w, cost_of, strict=True) for v, c in zip(row, costs, strict=True)
        )
        for row in w:
            program += pulp.lpSum(row) == 1
        for rate in equal:
            low = pulp.LpVariable(f"low_{rate}", 0, 1)
            for row, r in zip(w, rules, strict=True):
                value = pulp.lpSum(float(c) * v for v, c in zip(row, r[rate], strict=True))
                program += value >= low
                program += value <= low + tolerance
        program.solve(
            pulp.HiGHS(msg=False, threads=1, primal_feasibility_tolerance=1e-10, dual_feasibility_tolerance=1e-10)
        )
    if program.status != pulp.LpStatusOptimal:
        raise RuntimeError(f"equalize: the solver stopped with {pulp.LpStatus[program.status]}")
    found = [np.array([v.varValue for v in row]).clip(0) for row in w]
    found = [np.where(values < 1e-11, 0.0, values) for values in found]
    return [values / values.sum() for values in found]
