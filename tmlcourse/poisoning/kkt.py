"""The KKT attack: change the training data a little so that the learner ends where the attacker wants it.

The attacker's program has the learner's program inside. Its solution (theta, lam, mu) is pinned down by the conditions of
Karush, Kuhn and Tucker, a system f(theta, lam, mu; D) = 0; the implicit function theorem says how it moves with the data D.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from scipy.linalg import lapack
from torch import Tensor

from .. import checks, progress
from .learners import Learner, examples, scores

MOVES = ("features", "responses", "both")
_SINGULAR = 1e-14  # reciprocal condition number of the (equilibrated) KKT matrix below which it counts as singular


class SingularKKT(RuntimeError):
    """The learner's KKT system is singular here: no unique solution, or no derivative."""


# ---- the learner's own program


@dataclass(frozen=True, eq=False)
class Fit:
    """A learner's solution and the multipliers that prove it optimal.

    Attributes: `learner`, `X`, `y` (double precision); `theta`, `lam` >= 0 of g <= 0, `mu` of s = 0; `model` (d + 1,),
    weights and then the intercept; `residual`, the largest violation of the KKT conditions.
    """

    learner: Learner
    X: Tensor
    y: Tensor
    theta: Tensor
    lam: Tensor
    mu: Tensor
    model: Tensor
    residual: float

    @property
    def active(self) -> Tensor:
        """Which inequalities hold with equality, bool (k,): lam_i > -g_i, where one of the two is zero."""
        return self.lam > -_Program(self.learner, self.X, self.y).g(self.theta)


class _Program:
    """The learner's objective and constraints at fixed data, as functions of theta alone, and their derivatives."""

    def __init__(self, learner: Learner, X: Tensor, y: Tensor):
        self.learner, self.X, self.y, self.none = learner, X, y, X.new_zeros(0)

    def R(self, theta: Tensor) -> Tensor:
        return self.learner.objective(theta, self.X, self.y)

    def g(self, theta: Tensor) -> Tensor:
        return self.none if self.learner.inequality is None else self.learner.inequality(theta, self.X, self.y)

    def s(self, theta: Tensor) -> Tensor:
        return self.none if self.learner.equality is None else self.learner.equality(theta, self.X, self.y)

    def lagrangian(self, theta: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
        return self.R(theta) + lam @ self.g(theta) + mu @ self.s(theta)

    def slope(self, theta: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
        return torch.func.grad(self.lagrangian)(theta, lam, mu)

    def curvature(self, theta: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
        return torch.func.jacrev(torch.func.grad(self.lagrangian))(theta, lam, mu)  # twice backwards: faster here

    def jacobians(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """dg/dtheta and ds/dtheta: (k, m), (p, m)."""
        empty = theta.new_zeros(0, len(theta))
        A = empty if self.learner.inequality is None else torch.func.jacrev(self.g)(theta)
        B = empty if self.learner.equality is None else torch.func.jacrev(self.s)(theta)
        return A, B

    def matrix(self, theta: Tensor, lam: Tensor, mu: Tensor, active: Tensor) -> Tensor:
        """df/d(theta, lam, mu) with the complementary slackness lam_i g_i = 0 resolved: symmetric.

        Where g_i < 0 it says that lam_i stays 0, so row and column leave; where lam_i > 0 it says that g_i stays 0.
        """
        A, B = self.jacobians(theta)
        rows = torch.cat([A[active], B])
        zero = rows.new_zeros(len(rows), len(rows))
        return torch.cat([torch.cat([self.curvature(theta, lam, mu), rows.T], 1), torch.cat([rows, zero], 1)])


def fit(learner: Learner, X: Tensor, y: Tensor, *, start: Fit | None = None) -> Fit:
    """Solve the learner's program: Newton's method, with an interior point where there are inequalities.

    Args:
        learner: `ridge()`, `logistic()`, `svm()` or your own `Learner`.
        X: rows (n, d), y: responses (n,), floating point; labels are -1 and 1.
        start: an earlier solution nearby, whose active constraints are tried first.
    Returns: `Fit`, its KKT conditions met to about 1e-9 of the size of the objective's gradient.
    Raises: TypeError, ValueError: bad input. RuntimeError: no solution was found.
    Source: Boyd & Vandenberghe 2004, section 11.7.
    Example: `fit(ridge(), torch.rand(9, 2), torch.rand(9)).model`.
    """
    X, y = examples(X, y, learner)
    return _fit(learner, X, y, start)


def _fit(learner: Learner, X: Tensor, y: Tensor, start: Fit | None) -> Fit:
    program = _Program(learner, X, y)
    theta = X.new_zeros(X.shape[1] + 1) if learner.start is None else learner.start(X, y)
    none = X.new_zeros(len(program.g(theta))), X.new_zeros(len(program.s(theta)))
    scale = 1 + float(program.slope(theta, *none).abs().max())
    if start is not None and start.theta.shape == theta.shape:
        found = _pivot(program, start.theta, start.lam, start.mu, scale)
        if found is not None:
            return _finished(program, *found)
    if learner.guess is not None:
        guess = learner.guess(X, y)
        # What the guess puts on its boundary counts as active.
        found = _pivot(program, guess, 1e-12 * (program.g(guess) >= 0).to(X), none[1], scale)
        if found is not None:
            return _finished(program, *found)
    theta, lam, mu = _interior(program, theta, scale)
    return _finished(program, *(_pivot(program, theta, lam, mu, scale) or (theta, lam, mu)))


def _finished(program: _Program, theta: Tensor, lam: Tensor, mu: Tensor) -> Fit:
    learner, X, y = program.learner, program.X, program.y
    model = theta if learner.model is None else learner.model(theta, mu, X, y)
    g, s = program.g(theta), program.s(theta)
    off = [program.slope(theta, lam, mu).abs(), s.abs(), g.clamp_min(0), (-lam).clamp_min(0), (lam * g).abs()]
    return Fit(learner, X, y, theta, lam, mu, model, float(torch.cat(off).max()))


def _pivot(program: _Program, theta, lam, mu, scale: float, rounds: int = 12):
    """Newton's method on the KKT system of a guessed active set, changed until all signs are right; None where that fails."""
    active, last = lam > -program.g(theta), math.inf
    for _ in range(rounds):
        K = program.matrix(theta, lam, mu, active)
        r = torch.cat([program.slope(theta, lam * active, mu), program.g(theta)[active], program.s(theta)])
        # The step solves for new multipliers, so those of constraints that have just become active start from zero.
        step = _solve(K, r)
        if step is None:
            return None
        m, k = len(theta), int(active.sum())
        theta, mu = theta - step[:m], mu - step[m + k :]
        lam = torch.where(active, lam, 0.0)
        lam[active] -= step[m : m + k]
        g = program.g(theta)
        off = torch.cat([program.slope(theta, lam, mu), g[active], program.s(theta)]).abs().max()
        wrong = (active & (lam < -1e-12 * scale)) | (~active & (g > 1e-12))
        if float(off) <= 1e-11 * scale and not wrong.any():
            return theta, lam.clamp_min(0), mu
        if not wrong.any() and float(off) > 0.5 * last:
            return (theta, lam.clamp_min(0), mu) if float(off) <= 1e-8 * scale else None
        last = math.inf if wrong.any() else float(off)
        active = active ^ wrong
    return None


def _solve(K: Tensor, r: Tensor) -> Tensor | None:
    """K^-1 r, or None for a singular K."""
    factor, pivots, info = torch.linalg.lu_factor_ex(K)
    if int(info):
        return None
    step = torch.linalg.lu_solve(factor, pivots, r[:, None])[:, 0]
    return step if torch.isfinite(step).all() else None


def _interior(program: _Program, theta: Tensor, scale: float, iterations: int = 100):
    """The primal-dual interior-point method; without inequalities, Newton's method with a line search on the residual."""
    g, name = program.g(theta), program.learner.name
    if (g >= 0).any():
        raise ValueError(f"learner: the start of {name} is not strictly inside its inequalities")
    k, lam, mu = len(g), -1 / g, torch.zeros_like(program.s(theta))

    def residual(theta, lam, mu, t):
        centre = -lam * program.g(theta) - (1 / t if k else 0)
        return torch.cat([program.slope(theta, lam, mu), centre, program.s(theta)])

    for _ in range(iterations):
        g = program.g(theta)
        gap = float(-(g @ lam))
        off = torch.cat([program.slope(theta, lam, mu), program.s(theta)]).abs().max()
        if off <= 1e-10 * scale and gap <= 1e-10 * scale:
            return theta, lam, mu
        t = 10 * k / max(gap, min(float(off), 1.0)) if k else 1.0  # no nearer to the walls than the slope is to zero
        r = residual(theta, lam, mu, t)
        A, B = program.jacobians(theta)
        H = program.curvature(theta, lam, mu) - A.T @ ((lam / g)[:, None] * A)
        K = torch.cat([torch.cat([H, B.T], 1), torch.cat([B, B.new_zeros(len(B), len(B))], 1)])
        m = len(theta)
        # Eliminated: dlam = (centre - lam A dtheta) / g.
        right = -torch.cat([r[:m] + A.T @ (r[m : m + k] / g), r[m + k :]])
        step = _solve(K, right)
        if step is None:
            raise SingularKKT(f"singular KKT matrix of {name}: constant or duplicated features? (reg > 0 helps)")
        d, dmu = step[:m], step[m:]
        dlam = (r[m : m + k] - lam * (A @ d)) / g
        down = dlam < 0
        size = min(1.0, 0.99 * float((-lam[down] / dlam[down]).min())) if down.any() else 1.0
        while k and (program.g(theta + size * d) >= 0).any() and size > 1e-12:
            size /= 2
        now = r.norm()
        while size > 1e-12:
            if residual(theta + size * d, lam + size * dlam, mu + size * dmu, t).norm() <= (1 - 0.01 * size) * now:
                break
            size /= 2
        if size <= 1e-12:  # rounding has the last word
            break
        theta, lam, mu = theta + size * d, lam + size * dlam, mu + size * dmu
    if off <= 1e-6 * scale and gap <= 1e-6 * scale:
        return theta, lam, mu
    raise RuntimeError(f"learner: {name} did not converge: KKT residual {float(off):.2e}, gap {gap:.2e}: are the features "
                       "of very different sizes, or is the solution not unique (reg > 0 helps)?")  # fmt: skip


# ---- the implicit function theorem


def _pullback(solved: Fit, cotangents: Tensor, strict: bool = True) -> tuple[Tensor, Tensor]:
    """For each row c of `cotangents` (r, d + 1): d<c, model> / dX (r, n, d) and / dy (r, n), by the adjoint system.

    d<c, model>/dD = c dmodel/dD - <u, df/dD>,   (df/d[theta, lam, mu])^T u = c dmodel/d[theta, lam, mu]
    """
    learner, theta, active = solved.learner, solved.theta, solved.active
    program = _Program(learner, solved.X, solved.y)
    K = program.matrix(theta, solved.lam, solved.mu, active)
    if strict:
        _require_regular(K, solved, active)
    X, y, theta, mu = (v.clone().requires_grad_() for v in (solved.X, solved.y, theta, solved.mu))
    with torch.enable_grad():
        there = _Program(learner, X, y)
        slope = torch.autograd.grad(there.lagrangian(theta, solved.lam, mu), theta, create_graph=True)[0]
        f = torch.cat([slope, there.g(theta)[active], there.s(theta)])
        model = theta if learner.model is None else learner.model(theta, mu, X, y)

        def back(outputs, inputs, weights):
            found = torch.autograd.grad(outputs, inputs, weights, retain_graph=True, is_grads_batched=True,
                                        allow_unused=True, materialize_grads=True)  # fmt: skip
            return found

        if learner.model is None:
            dtheta, dmu = cotangents, cotangents.new_zeros(len(cotangents), len(mu))
            direct = [v.new_zeros(len(cotangents), *v.shape) for v in (X, y)]
        else:
            dtheta, dmu, *direct = back(model, (theta, mu, X, y), cotangents)
        right = torch.cat([dtheta, dtheta.new_zeros(len(dtheta), int(active.sum())), dmu], 1)
        u = _solve_or_least(K, right.T, strict)
        dX, dy = back(f, (X, y), u.T)
    return direct[0] - dX, direct[1] - dy


def _solve_or_least(K: Tensor, right: Tensor, strict: bool) -> Tensor:
    factor, pivots, info = torch.linalg.lu_factor_ex(K)
    u = torch.linalg.lu_solve(factor, pivots, right)
    if strict or (int(info) == 0 and torch.isfinite(u).all() and u.abs().max() * K.abs().max() < 1e13):
        return u
    return torch.linalg.pinv(K, rtol=1e-11, hermitian=True) @ right


def _require_regular(K: Tensor, solved: Fit, active: Tensor) -> None:
    g = _Program(solved.learner, solved.X, solved.y).g(solved.theta)
    weak = (torch.maximum(solved.lam, -g) < 1e-7).sum() if len(g) else 0
    if weak:
        raise SingularKKT(f"degenerate: {int(weak)} constraint(s) of {solved.learner.name} hold with equality and with "
                          "multiplier zero: there the solution has a kink, and no derivative")  # fmt: skip
    if _reciprocal_condition(K) < _SINGULAR:
        raise SingularKKT(f"singular KKT matrix of {solved.learner.name}: its solution is not unique or has no derivative: "
                          "constant or duplicated features, or an SVM without any example on its margin?")  # fmt: skip


def _reciprocal_condition(K: Tensor) -> float:
    """LAPACK's estimate for the matrix scaled to entries of at most one in each row and column."""
    size = K.abs().amax(1).sqrt()
    if (size == 0).any():
        return 0.0
    scaled = (K / size[:, None] / size).cpu().numpy()
    norm = lapack.dlange("1", scaled)
    factor, _, info = lapack.dgetrf(scaled)
    return 0.0 if info else float(lapack.dgecon(factor, norm)[0])


def implicit_jacobian(solved: Fit) -> tuple[Tensor, Tensor]:
    """How the learned model moves with each number in the training data.

        d[theta, lam, mu]/dD = -(df/d[theta, lam, mu])^-1 df/dD,   f = (dL/dtheta, lam_i g_i, s)

    Args: solved: from `fit(learner, X, y)`.
    Returns: dmodel/dX (d + 1, n, d) and dmodel/dy (d + 1, n), the last row the intercept's.
    Raises: SingularKKT: a degenerate or singular system, with the reason.
    Source: Mei & Zhu 2015; the lecture's implicit function theorem.
    Example: `implicit_jacobian(fit(ridge(), torch.rand(9, 2), torch.rand(9)))[0].shape` is (3, 9, 2).
    """
    eye = torch.eye(len(solved.model), dtype=solved.X.dtype, device=solved.X.device)
    return tuple(part.detach() for part in _pullback(solved, eye))


def implicit_gradient(solved: Fit, risk: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of risk(model) with respect to the training data: one adjoint system instead of a Jacobian.

    Args: solved: from `fit(learner, X, y)`; risk: (d + 1,) -> scalar, in torch.
    Returns: gradients (n, d) and (n,).
    Raises: SingularKKT: a degenerate or singular system, with the reason.
    Source: Mei & Zhu 2015; Biggio, Nelson & Laskov 2012 for the SVM.
    Example: `implicit_gradient(fit(ridge(), torch.rand(9, 2), torch.rand(9)), lambda model: model[0])[0].shape` is (9, 2).
    """
    return _gradient(solved, risk, strict=True)[1:]


def _gradient(solved: Fit, risk, strict: bool) -> tuple[float, Tensor, Tensor]:
    model = solved.model.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = risk(model)
        (slope,) = torch.autograd.grad(value, model)
    dX, dy = _pullback(solved, slope[None], strict)
    return float(value.detach()), dX[0].detach(), dy[0].detach()


# ---- the attack


@dataclass(frozen=True, eq=False)
class Poisoned:
    """What `kkt_attack` found.

    Attributes:
        X, y: the poisoned training data, in the dtype of the clean data.
        model: what the learner makes of them (d + 1,), weights and then the intercept; clean: what it made of the clean ones.
        risk: R_A(model); cost: C_A = ||D - D_0||^2 / 2; objective: R_A + effort C_A.
        trace: one row a step: `risk`, `cost`, `objective`.
        singular: in how many steps the KKT system was singular or degenerate (a one-sided derivative was taken).
    """

    X: Tensor
    y: Tensor
    model: Tensor
    clean: Tensor
    risk: float
    cost: float
    objective: float
    trace: pd.DataFrame
    singular: int

    def __str__(self) -> str:
        return f"risk {self.risk:.4g} for a change of norm {math.sqrt(2 * self.cost):.4g}"


def kkt_attack(
    learner: Learner,
    X: Tensor,
    y: Tensor,
    target: Tensor | Callable[[Tensor], Tensor],
    *,
    move: str = "features",
    effort: float = 1e-6,
    box: tuple | None = None,
    response_box: tuple | None = None,
    frozen_rows: Tensor | None = None,
    frozen_columns: Tensor | None = None,
    integer: Tensor | None = None,
    steps: int = 100,
    tol: float = 1e-4,
) -> Poisoned:
    """Move the training data so that the learner ends near the attacker's model, with the least change.

        min_D  R_A(model(D)) + effort C_A(D, D_0),   R_A = ||model - target||^2 / 2,   C_A = ||D - D_0||_F^2 / 2
        D <- P(D - alpha [ (dmodel/dD)^T dR_A/dmodel + effort dC_A/dD ])

    The derivative of the model is the implicit one, through the learner's KKT system; P clips to the box and puts back what
    is frozen. For a target model the step is Gauss and Newton's: the program with the model replaced by its linearisation,
    solved over the box, and a line search. For a function it is the projected gradient with Barzilai and Borwein's alpha.

    Args:
        learner: `ridge()`, `logistic()`, `svm()` or your own `Learner`.
        X: rows (n, d); y: responses (n,), floating point; labels are -1 and 1.
        target: weights and intercept (d + 1,), NaN where the attacker does not care; or R_A itself, model -> scalar.
        move: "features", "responses" or "both".
        effort: weight of the cost, >= 0. With 0 and a target: the least change that reaches it.
        box: (low, high) of the features, numbers or tensors (d,). response_box: the same of the responses.
        frozen_rows (n,), frozen_columns (d,): bool, what the attacker cannot touch.
        integer: bool (d,), features that are rounded to whole numbers at the end.
        steps: at most so many. tol: relative decrease of the objective at which the attack stops.
    Returns: `Poisoned`.
    Raises: TypeError, ValueError: bad input; SingularKKT: the clean problem has no derivative for a structural reason.
        RuntimeError: the learner could not be trained.
    Source: Mei & Zhu 2015. Direct term and the sign of the step as derived there; slides sometimes lose them.
    Example: `kkt_attack(ridge(), torch.rand(9, 2), torch.rand(9), torch.zeros(3), move="responses").risk`.
    """
    D = _Data(learner, X, y, move, box, response_box, frozen_rows, frozen_columns, integer)
    checks.nonnegative(effort, "effort")
    checks.positive_int(steps, "steps")
    checks.nonnegative(tol, "tol")
    known = None
    if isinstance(target, Tensor):
        known = _target(target, D)
        risk = _distance(known)
    elif callable(target):
        risk = target
    else:
        raise TypeError(f"target: got {type(target).__name__}, want a tensor ({D.d + 1},) or a function of the model")
    walk = _Walk(D, risk, effort)
    for stage in (*learner.stages, learner):
        walk.learn(stage)
        if known is None:
            _projected_gradient(walk, steps if stage is learner else min(steps, 12), tol)
        else:
            _gauss_newton(walk, known, steps if stage is learner else min(steps, 12), tol)
    return walk.result()


def naive_attack(learner: Learner, X: Tensor, y: Tensor, target: Tensor, *, move: str = "features") -> Poisoned:
    """What an attacker does who does not solve the learner's program: write data that look like the target model.

    "features": the columns whose target weight is zero are blanked, each value replaced by the column's mean, so that the
    learner finds nothing there. "responses": each y is what the target model would say.

    Args: as in `kkt_attack`; target (d + 1,) without NaN.
    Returns: `Poisoned`, its effort 0.
    Raises: TypeError, ValueError: bad input, or features to move and no zero in the target.
    Source: the kind of baseline that Mei & Zhu 2015 compare with.
    Example: `naive_attack(ridge(), torch.rand(9, 2), torch.rand(9), torch.tensor([0.0, 1.0, 0.0])).cost`.
    """
    checks.choice(move, "move", MOVES[:2])
    D = _Data(learner, X, y, move, None, None, None, None, None)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, want a tensor ({D.d + 1},)")
    target = _target(target, D)
    if target.isnan().any():
        raise ValueError("target: got NaN, want a whole model for the naive attack")
    walk = _Walk(D, _distance(target), 0.0)
    new_X, new_y = D.X.clone(), D.y.clone()
    if move == "features":
        blank = target[:-1] == 0
        if not blank.any():
            raise ValueError("target: got no weight of zero, want at least one whose column can be blanked")
        new_X[:, blank] = D.X[:, blank].mean(0)
    else:
        new_y = scores(target, D.X)
        new_y = torch.where(new_y >= 0, 1.0, -1.0).to(new_y) if learner.signs else new_y
    v = D.join(new_X, new_y)
    solved = _fit(learner, new_X, new_y, None)
    walk.move(v, solved, walk.objective(v, solved))
    return walk.result()


class _Data:
    """What may move, as one vector: features and then responses, between `low` and `high`."""

    def __init__(self, learner, X, y, move, box, response_box, frozen_rows, frozen_columns, integer):
        self.learner, self.original = learner, (X, y)
        self.X, self.y = examples(X, y, learner)
        self.n, self.d = self.X.shape
        checks.choice(move, "move", MOVES)
        self.features, self.responses = move != "responses", move != "features"
        rows = _mask(frozen_rows, "frozen_rows", self.n, self.X.device)
        columns = _mask(frozen_columns, "frozen_columns", self.d, self.X.device)
        self.integer = _mask(integer, "integer", self.d, self.X.device)
        free_X = ~rows[:, None] & ~columns & self.features
        free_y = ~rows & self.responses
        self.free = torch.cat([free_X.flatten(), free_y])
        if not self.free.any():
            raise ValueError("frozen_rows, frozen_columns: everything is frozen, want something that may move")
        if learner.signs and self.responses and response_box is None:
            response_box = (-1.0, 1.0)
        low_X, high_X = _box(box, "box", self.X)
        low_y, high_y = _box(response_box, "response_box", self.y)
        self.low, self.high = torch.cat([low_X.flatten(), low_y]), torch.cat([high_X.flatten(), high_y])
        self.start = self.join(self.X, self.y)
        outside = self.free & ((self.start < self.low) | (self.start > self.high))
        if outside.any():
            raise ValueError(f"box: {int(outside.sum())} number(s) of the clean data lie outside it, want all inside")

    def join(self, X: Tensor, y: Tensor) -> Tensor:
        return torch.cat([X.flatten(), y])

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return v[: self.n * self.d].reshape(self.n, self.d), v[self.n * self.d :]

    def project(self, v: Tensor) -> Tensor:
        """P: into the box, and what is frozen back in its place."""
        return torch.where(self.free, v.clamp(self.low, self.high), self.start)

    def rounded(self, v: Tensor) -> Tensor:
        """Moved integer features to the nearest whole number in the box."""
        X, y = self.split(v)
        low, high = (self.split(b)[0] for b in (self.low, self.high))
        whole = X.round().clamp(low.ceil(), high.floor())
        return self.project(self.join(torch.where(self.integer, whole, X), y))


def _mask(value, name: str, size: int, device) -> Tensor:
    if value is None:
        return torch.zeros(size, dtype=torch.bool, device=device)
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != (size,):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, want a bool tensor ({size},)")
    return value.to(device)


def _box(value, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    if value is None:
        value = (-math.inf, math.inf)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}: got {value!r}, want (low, high)")
    try:
        low, high = (torch.as_tensor(v, dtype=like.dtype, device=like.device).expand_as(like) for v in value)
    except (RuntimeError, TypeError) as cause:
        raise ValueError(f"{name}: got {value!r}, want numbers or tensors that fit {tuple(like.shape)}") from cause
    if not (low <= high).all():
        raise ValueError(f"{name}: got a low end above the high end, want low <= high")
    return low, high


def _target(target: Tensor, D: _Data) -> Tensor:
    if target.shape != (D.d + 1,) or not target.is_floating_point():
        raise ValueError(f"target: got {target.dtype} {tuple(target.shape)}, want ({D.d + 1},): weights and intercept")
    if torch.isinf(target).any() or torch.isnan(target).all():
        raise ValueError(
            "target: got infinite values or nothing but NaN, want finite weights, NaN for those of no interest"
        )
    return target.detach().to(D.X)


def _distance(target: Tensor):
    wanted = ~target.isnan()
    return lambda model: (model[wanted] - target[wanted]).square().sum() / 2


class _Walk:
    """Where the attack stands: the data, the learner trained on them, and the trace of it."""

    def __init__(self, D: _Data, risk, effort: float):
        self.D, self.risk, self.effort, self.singular = D, risk, effort, 0
        self.v, self.learner = D.start, D.learner
        self.fit = self.clean = _fit(D.learner, D.X, D.y, None)
        value = risk(self.fit.model)
        if not isinstance(value, Tensor) or value.numel() != 1 or not torch.isfinite(value).all():
            raise ValueError("target: the function's value is not a finite scalar tensor")
        self.value = self.objective(self.v, self.fit)
        self.rows = []
        self.note()

    def learn(self, learner: Learner) -> None:
        """Go on from here with another learner."""
        if learner is not self.learner:
            self.learner, self.fit = learner, _fit(learner, *self.D.split(self.v), None)
            self.value = self.objective(self.v, self.fit)

    def cost(self, v: Tensor) -> float:
        return float((v - self.D.start).square().sum()) / 2

    def objective(self, v: Tensor, solved: Fit) -> float:
        return float(self.risk(solved.model)) + self.effort * self.cost(v)

    def note(self) -> None:
        risk, cost = float(self.risk(self.fit.model)), self.cost(self.v)
        self.rows.append({"risk": risk, "cost": cost, "objective": self.value})

    def derivative(self, function):
        """Strictly where that is possible; at a kink one of the one-sided derivatives, counted."""
        try:
            return function(strict=True)
        except SingularKKT:
            if len(self.rows) == 1 and self.learner.inequality is None:
                raise
            self.singular += 1
            return function(strict=False)

    def attempt(self, v: Tensor) -> tuple[Fit | None, float]:
        try:
            solved = _fit(self.learner, *self.D.split(v), self.fit)
        except RuntimeError:
            return None, math.inf
        return solved, self.objective(v, solved)

    def move(self, v: Tensor, solved: Fit, value: float) -> None:
        self.v, self.fit, self.value = v, solved, value
        self.note()

    def result(self) -> Poisoned:
        D = self.D
        v = D.rounded(self.v) if D.integer.any() and D.features else self.v
        X, y = D.split(v)
        X, y = X.to(D.original[0].dtype), y.to(D.original[1].dtype)
        solved = self.fit
        if v is not self.v or X.dtype != v.dtype or y.dtype != v.dtype:
            v = D.join(X.double(), y.double())
            solved = _fit(D.learner, X.double(), y.double(), None)
        if self.singular:
            warnings.warn(f"the KKT system of {D.learner.name} was singular or degenerate in {self.singular} of "
                          f"{len(self.rows)} steps: one-sided derivatives were used there", stacklevel=3)  # fmt: skip
        return Poisoned(X, y, solved.model, self.clean.model, float(self.risk(solved.model)), self.cost(v),
                        self.objective(v, solved), pd.DataFrame(self.rows), self.singular)  # fmt: skip


def _gauss_newton(walk: _Walk, target: Tensor, steps: int, tol: float) -> None:
    """Gauss and Newton's steps; where the model does not follow its linearisation, damped ones (Levenberg, Marquardt)."""
    D, wanted = walk.D, ~target.isnan()
    rows = torch.eye(D.d + 1, dtype=D.X.dtype, device=D.X.device)[wanted]
    damping = 0.0
    for _ in progress.bar(range(steps), desc=f"KKT attack on {walk.learner.name}"):
        dX, dy = walk.derivative(lambda strict: _pullback(walk.fit, rows, strict))
        J = torch.cat([dX.detach().flatten(1), dy.detach()], 1) * D.free
        size = float(J.square().sum()) / len(J)
        effort, before = walk.effort or 1e-12 * size, walk.value
        for _ in range(12):
            v = _linearised(J, target[wanted] - walk.fit.model[wanted], effort, damping, walk.v, D)
            solved, value = walk.attempt(v)
            if value < before:
                walk.move(v, solved, value)
                damping = damping / 10 if damping > 1e-6 * size else 0.0
                break
            damping = max(4 * damping, 1e-4 * size)
        if not before - walk.value > tol * abs(before):
            return


def _linearised(J: Tensor, r: Tensor, effort: float, damping: float, v: Tensor, D: _Data) -> Tensor:
    """min over the box of ||J (v' - v) - r||^2 / 2 + effort ||v' - start||^2 / 2 + damping ||v' - v||^2 / 2, by its dual.

    What is left over, nu = r - J (v' - v), gives each coordinate by itself: v' = P(centre + J^T nu / (effort + damping)).
    """
    both = effort + damping
    centre = (effort * D.start + damping * v) / both
    nu = torch.zeros_like(r)

    def point(nu):
        return D.project(centre + J.T @ nu / both)

    def off(nu):
        return nu - r + J @ (point(nu) - v)

    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    now = off(nu)
    for _ in range(50):
        inside = point(nu)
        half = J[:, D.free & (inside > D.low) & (inside < D.high)]
        step = torch.linalg.solve(eye + half @ half.T / both, now)
        size, trial = 1.0, off(nu - step)
        while trial.norm() > (1 - 0.1 * size) * now.norm() and size > 1e-4:
            size /= 2
            trial = off(nu - size * step)
        nu, now = nu - size * step, trial
        if now.norm() <= 1e-12 * r.norm():
            break
    return point(nu)


def _projected_gradient(walk: _Walk, steps: int, tol: float, memory: int = 5) -> None:
    """The spectral projected gradient method (Birgin, Martinez & Raydan 2000); the best point seen is kept."""
    D = walk.D

    def gradient():
        _, dX, dy = walk.derivative(lambda strict: _gradient(walk.fit, walk.risk, strict))
        return D.join(dX, dy) * D.free + walk.effort * (walk.v - D.start)

    g = gradient()
    alpha = 1 / max(float((D.project(walk.v - g) - walk.v).abs().max()), 1e-12)
    best, recent = (walk.value, walk.v, walk.fit), [walk.value]
    for _ in progress.bar(range(steps), desc=f"KKT attack on {walk.learner.name}"):
        direction = D.project(walk.v - alpha * g) - walk.v
        slope = float(g @ direction)
        if -slope <= tol * (abs(walk.value) + 1e-12):
            break
        size = 1.0
        for _ in range(20):
            v = walk.v + size * direction
            solved, value = walk.attempt(v)
            if value <= max(recent[-memory:]) + 1e-4 * size * slope:
                break
            size /= 2
        else:
            break
        before, old = g, walk.v
        walk.move(v, solved, value)
        recent.append(value)
        best = min(best, (value, v, solved), key=lambda b: b[0])
        g = gradient()
        s, z = walk.v - old, g - before
        bend = float(s @ z)
        alpha = float(s @ s) / bend if bend > 0 else 10 * alpha
        alpha = min(max(alpha, 1e-10), 1e10)
    walk.value, walk.v, walk.fit = best
