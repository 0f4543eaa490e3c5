"""The referee: the attacker's program, the learner's KKT conditions and all, as a mixed-integer program solved to the end.

Complementary slackness "this or that is zero" becomes a binary variable and two inequalities with a constant M that is
proved large enough. It is exact and slow: for small problems, to judge the gradient attack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp
import torch
from torch import Tensor

from .. import checks
from .learners import examples, ridge, svm


@dataclass(frozen=True, eq=False)
class Optimum:
    """A solved program. `low` <= the least objective <= `high`; `y`: responses that reach `high`; `model`: the learner's."""

    low: float
    high: float
    y: Tensor
    model: Tensor


def best_responses(
    X: Tensor,
    y: Tensor,
    risk: Tensor,
    *,
    radius: float,
    reg: float = 1.0,
    nonnegative: bool = True,
    time_limit: float = 60,
) -> Optimum:
    """The best that an attacker can do who moves each response of ridge regression by at most `radius`.

        min_y'  <risk, model>   subject to   |y'_i - y_i| <= radius   and the KKT conditions of `ridge(reg, nonnegative=...)`

    Args:
        X: (n, d), y: (n,), floating point; risk: (d + 1,), the attacker's linear risk of weights and intercept.
        radius >= 0; reg > 0; time_limit in seconds.
    Returns: `Optimum`.
    Raises: TypeError, ValueError: bad input. RuntimeError: the solver found nothing in its time.
    Source: Mei & Zhu 2015 for the conditions; big-M as in Fortuny-Amat & McCarl 1981.
    Example: `best_responses(torch.rand(5, 2), torch.rand(5), torch.ones(3), radius=0.1).low`.
    """
    X, y = examples(X, y, ridge(reg, nonnegative=nonnegative))
    c = _risk(risk, X)
    checks.nonnegative(radius, "radius")
    if reg == 0:
        raise ValueError("reg: got 0, want a number > 0: it bounds the weights")
    n, d = X.shape
    rows, start = X.cpu().numpy(), y.cpu().numpy()
    # R(w, b) <= R(0, 0) bounds what any solution can be: ||residual|| and sqrt(reg) ||w|| are at most ||y'||.
    size = float(np.linalg.norm(np.abs(start) + radius))
    most_w, most_slope = size / np.sqrt(reg), np.linalg.norm(rows, axis=0) * size + np.sqrt(reg) * size
    program = pulp.LpProblem("responses", pulp.LpMinimize)
    w = [pulp.LpVariable(f"w{j}", 0 if nonnegative else -most_w, most_w) for j in range(d)]
    b = pulp.LpVariable("b", None, None)
    new = [pulp.LpVariable(f"y{i}", start[i] - radius, start[i] + radius) for i in range(n)]
    program += pulp.lpSum(float(c[j]) * w[j] for j in range(d)) + float(c[d]) * b
    score = [pulp.lpSum(float(rows[i, j]) * w[j] for j in range(d)) + b for i in range(n)]
    program += pulp.lpSum(score[i] - new[i] for i in range(n)) == 0
    for j in range(d):
        slope = pulp.lpSum(float(rows[i, j]) * (score[i] - new[i]) for i in range(n)) + reg * w[j]
        if not nonnegative:
            program += slope == 0
            continue
        lam = pulp.LpVariable(f"lam{j}", 0, float(most_slope[j]))
        on = pulp.LpVariable(f"on{j}", cat="Binary")
        program += slope - lam == 0
        program += w[j] <= float(most_w) * on
        program += lam <= float(most_slope[j]) * (1 - on)
    low, high = _solve(program, time_limit)
    answer = torch.tensor([v.value() for v in new], dtype=X.dtype, device=X.device)
    model = torch.tensor([v.value() for v in (*w, b)], dtype=X.dtype, device=X.device)
    return Optimum(low, high, answer, model)


def best_flips(
    X: Tensor, y: Tensor, risk: Tensor, *, C: float = 1.0, effort: float = 0.0, count: int | None = None,
    time_limit: float = 60,
) -> Optimum:  # fmt: skip
    """The best label flips against a soft-margin support vector machine.

        min_y'  <risk, model> + effort ||y' - y||^2 / 2   over labels y' with at most `count` flips, model = SVM(X, y')

    Each flip costs 2 effort. Products of a binary and a bounded variable are exact, too. Where the intercept is not unique
    the attacker has the choice.

    Args:
        X: (n, d), y: labels -1.0 and 1.0 (n,); risk: (d + 1,), linear in weights and intercept.
        C > 0; effort >= 0; count >= 0, all without; time_limit in seconds.
    Returns: `Optimum`.
    Raises: TypeError, ValueError: bad input. RuntimeError: the solver found nothing in its time.
    Source: Biggio, Nelson & Laskov 2011 for the attack; big-M as in Fortuny-Amat & McCarl 1981.
    Example: `best_flips(torch.eye(4), torch.tensor([-1.0, -1, 1, 1]), torch.ones(5), count=1).low`.
    """
    X, y = examples(X, y, svm(C))
    c = _risk(risk, X)
    checks.nonnegative(effort, "effort")
    n, d = X.shape
    count = n if count is None else checks.positive_int(count, "count", least=0)
    if not (y.abs() == 1).all():
        raise ValueError("y: got values between -1 and 1, want labels -1 and 1")
    rows, sign = X.cpu().numpy(), y.cpu().numpy()
    # ||w||^2 / 2 is at most the program's value at w = 0, b = 0; some best b leaves a score within [-1, 1].
    most_w = float(np.sqrt(2 * C * n))
    most = most_w * float(np.linalg.norm(rows, axis=1).max())
    M = 2 * most + 2
    program = pulp.LpProblem("flips", pulp.LpMinimize)
    w = [pulp.LpVariable(f"w{j}", -most_w, most_w) for j in range(d)]
    b = pulp.LpVariable("b", -most - 1, most + 1)
    flip = [pulp.LpVariable(f"flip{i}", cat="Binary") for i in range(n)]
    pull = []
    program += pulp.lpSum(float(c[j]) * w[j] for j in range(d)) + float(c[d]) * b + 2 * effort * pulp.lpSum(flip)
    program += pulp.lpSum(flip) <= count
    for i in range(n):
        a, turned = pulp.LpVariable(f"a{i}", 0, C), pulp.LpVariable(f"turned{i}", 0, C)  # turned = a flip
        xi = pulp.LpVariable(f"xi{i}", 0, 2 * M)
        support, bounded = pulp.LpVariable(f"s{i}", cat="Binary"), pulp.LpVariable(f"t{i}", cat="Binary")
        program += turned <= a
        program += turned <= C * flip[i]
        program += turned >= a - C * (1 - flip[i])
        pull.append(float(sign[i]) * (a - 2 * turned))
        margin = float(sign[i]) * (pulp.lpSum(float(rows[i, j]) * w[j] for j in range(d)) + b)
        for side, off in ((margin, flip[i]), (-margin, 1 - flip[i])):  # the margin of the label that is in force
            program += side >= 1 - xi - 2 * M * off
            program += side <= 1 - xi + 3 * M * (1 - support) + 3 * M * off
        program += a <= C * support  # a > 0 only where the margin is 1 - xi
        program += C - a <= C * (1 - bounded)  # xi > 0 only where a = C
        program += xi <= 2 * M * bounded
    program += pulp.lpSum(pull) == 0
    for j in range(d):
        program += w[j] == pulp.lpSum(float(rows[i, j]) * pull[i] for i in range(n))
    low, high = _solve(program, time_limit)
    flipped = torch.tensor([v.value() > 0.5 for v in flip], device=X.device)
    model = torch.tensor([v.value() for v in (*w, b)], dtype=X.dtype, device=X.device)
    return Optimum(low, high, torch.where(flipped, -y, y), model)


def _risk(risk, X: Tensor) -> np.ndarray:
    want = (X.shape[1] + 1,)
    if not isinstance(risk, Tensor) or risk.shape != want or not torch.isfinite(risk).all():
        got = tuple(risk.shape) if isinstance(risk, Tensor) else type(risk).__name__
        raise ValueError(f"risk: got {got}, want a finite tensor {want}: weights and intercept")
    return risk.detach().double().cpu().numpy()


def _solve(program: pulp.LpProblem, time_limit: float) -> tuple[float, float]:
    """(low, high): solved by HiGHS through PuLP; low is the solver's proved bound."""
    checks.nonnegative(time_limit, "time_limit")
    program.solve(pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=1e-6, threads=1))
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise RuntimeError(f"referee: no solution in {time_limit:g} s: {pulp.LpStatus[program.status]}")
    high = float(program.objective.value())
    info = program.solverModel.getInfo()
    low = float(info.mip_dual_bound) if info.mip_node_count >= 0 else high
    return min(low, high), high
