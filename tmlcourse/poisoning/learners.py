"""Learners as the programs that they solve: an objective, constraints, and the model that is read off the solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Learner:
    """A convex program over theta, given the data D = (X, y), with a linear model as its answer.

        min_theta  R(theta; X, y)   subject to   g(theta; X, y) <= 0,   s(theta; X, y) = 0

    All parts are written in torch for double precision; every derivative that an attack needs comes from autograd.

    Args:
        name: for messages and figures.
        objective: R, (theta, X, y) -> scalar, convex and twice differentiable in theta.
        inequality: g, -> (k,), convex in theta. equality: s, -> (p,), affine in theta. None where there are none.
        start: (X, y) -> theta strictly inside g < 0; zeros (d + 1,) without.
        model: (theta, mu, X, y) -> (d + 1,), weights and then the intercept; mu are the multipliers of s. Theta itself
            without.
        signs: whether y are labels -1 and 1, not numbers.
        guess: (X, y) -> theta, whose active constraints are tried before an interior point is sought.
        stages: smoother learners that an attack passes through before this one, where this one has kinks.
    Source: Mei & Zhu 2015; the lecture's g and s.
    Example: `Learner("mean", lambda theta, X, y: (theta[-1] - y).square().sum() + theta[:-1].square().sum())`.
    """

    name: str
    objective: Function
    inequality: Function | None = None
    equality: Function | None = None
    start: Callable[[Tensor, Tensor], Tensor] | None = None
    model: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    signs: bool = False
    guess: Callable[[Tensor, Tensor], Tensor] | None = None
    stages: tuple[Learner, ...] = ()


def scores(model: Tensor, X: Tensor) -> Tensor:
    """<w, x> + b of a model (w, b) (d + 1,) for rows X (n, d).

    Example: `scores(torch.tensor([1.0, 2.0, 3.0]), torch.ones(4, 2))`.
    """
    return X @ model[:-1] + model[-1]


def ridge(reg: float = 1.0, *, nonnegative: bool = False) -> Learner:
    """Least squares, R = ||X w + b - y||^2 / 2 + reg ||w||^2 / 2; with reg = 0 ordinary least squares (OLS).

    `nonnegative` adds the constraints -w <= 0: then some multipliers are at work.

    Args: reg >= 0.
    Raises: TypeError, ValueError: bad input.
    Source: Hoerl & Kennard 1970; Mei & Zhu 2015.
    Example: `ridge(0.0).name`.
    """
    checks.nonnegative(reg, "reg")

    def objective(theta, X, y):
        return (scores(theta, X) - y).square().sum() / 2 + reg * theta[:-1].square().sum() / 2

    name = ("ridge" if reg else "OLS") + (", w >= 0" if nonnegative else "")
    if not nonnegative:
        return Learner(name, objective)
    return Learner(name, objective, inequality=lambda theta, X, y: -theta[:-1],
                   start=lambda X, y: torch.full_like(X[0, :1], 0.1).repeat(X.shape[1] + 1))  # fmt: skip


def logistic(reg: float = 1.0, *, radius: float | None = None) -> Learner:
    """Logistic regression, R = sum_i log(1 + exp(-y_i (w.x_i + b))) + reg ||w||^2 / 2, labels y_i in {-1, 1}.

    Between -1 and 1 a label is a belief: the loss is the mean of the two losses, weighted (1 - y) / 2 and (1 + y) / 2.
    `radius` adds the constraint ||(w, b)||^2 <= radius^2.

    Args: reg >= 0, radius > 0.
    Raises: TypeError, ValueError: bad input.
    Source: Mei & Zhu 2015.
    Example: `logistic(0.1, radius=2.0).name`.
    """
    checks.nonnegative(reg, "reg")
    if radius is not None:
        _positive(radius=radius)

    def objective(theta, X, y):
        m = scores(theta, X)
        loss = (1 + y) / 2 * F.softplus(-m) + (1 - y) / 2 * F.softplus(m)
        return loss.sum() + reg * theta[:-1].square().sum() / 2

    inside = None if radius is None else lambda theta, X, y: (theta.square().sum() - radius**2).reshape(1)
    return Learner("logistic regression", objective, inequality=inside, signs=True)


def svm(C: float = 1.0, *, smooth: float = 1e-6) -> Learner:
    """The soft-margin support vector machine by its dual, over theta = (a_1, ..., a_n).

        min_a  ||w||^2 / 2 - sum_i a_i + smooth ||a||^2 / 2,   w = sum_i a_i y_i x_i
        subject to   -a_i <= 0,   a_i - C <= 0,   sum_i a_i y_i = 0

    The multiplier of the equality is the intercept b. `smooth` rounds the corner of the hinge over a width smooth C, so
    that a is unique even where examples coincide.

    Args: C > 0; smooth > 0.
    Raises: TypeError, ValueError: bad input.
    Source: Cortes & Vapnik 1995; Mei & Zhu 2015.
    Example: `svm(10.0).signs`.
    """
    _positive(C=C, smooth=smooth)

    def weights(a, X, y):
        return (a * y) @ X

    def objective(a, X, y):
        return weights(a, X, y).square().sum() / 2 - a.sum() + smooth * a.square().sum() / 2

    def guess(X, y):
        theta = _rounded_optimum(X, y, C, smooth)
        return ((1 - y * scores(theta, X)) / smooth).clamp(0, C)

    return Learner(
        "SVM",
        objective,
        inequality=lambda a, X, y: torch.cat([-a, a - C]),
        equality=lambda a, X, y: (a @ y).reshape(1),
        start=lambda X, y: torch.full_like(y, C / 2),
        model=lambda a, mu, X, y: torch.cat([weights(a, X, y), mu]),
        signs=True,
        guess=guess,
        stages=tuple(smooth_svm(C, width=width) for width in (1.0, 0.3, 0.1, 0.03, 0.01)),
    )


def smooth_svm(C: float = 1.0, *, width: float = 0.1) -> Learner:
    """The support vector machine by its primal, over (w, b), with the corner of the hinge rounded by a softplus.

        R = ||w||^2 / 2 + C sum_i width log(1 + exp((1 - y_i (w.x_i + b)) / width))

    As width falls its model goes to that of `svm(C)`.

    Args: C > 0; width > 0.
    Raises: TypeError, ValueError: bad input.
    Source: Cortes & Vapnik 1995; Koh & Liang 2017 for this rounding.
    Example: `smooth_svm(10.0).signs`.
    """
    _positive(C=C, width=width)

    def objective(theta, X, y):
        z = 1 - y * scores(theta, X)
        return theta[:-1].square().sum() / 2 + C * width * F.softplus(z / width).sum()

    return Learner("smooth SVM", objective, signs=True, guess=lambda X, y: _rounded_optimum(X, y, C, width))


def _rounded_optimum(X: Tensor, y: Tensor, C: float, smooth: float) -> Tensor:
    """The primal SVM's (w, b), the hinge's corner a parabola, from one so wide that least squares solve it to `smooth`."""
    theta, width = X.new_zeros(X.shape[1] + 1), max(4 / C, smooth)
    while width > smooth:
        theta = _rounded_newton(theta, X, y, C, width)
        width = max(width / 3, smooth)
    return _rounded_newton(theta, X, y, C, smooth)


def _rounded_newton(theta: Tensor, X: Tensor, y: Tensor, C: float, smooth: float) -> Tensor:
    """Newton's method for ||w||^2 / 2 + sum_i h(1 - y_i (w.x_i + b)), quadratic but for its corners.

    h(z) is 0, z^2 / (2 smooth) and C z - smooth C^2 / 2 for z <= 0, z <= smooth C and beyond.
    """
    rows = y[:, None] * torch.cat([X, torch.ones_like(X[:, :1])], 1)
    eye = torch.eye(len(theta), dtype=X.dtype, device=X.device)
    eye[-1, -1] = 0

    def value(theta):
        z = (1 - rows @ theta).clamp_min(0)
        bent = z.clamp_max(smooth * C)
        return theta[:-1].square().sum() / 2 + (bent.square() / (2 * smooth) + C * (z - bent)).sum()

    now = value(theta)
    for _ in range(50):
        z = 1 - rows @ theta
        slope = eye @ theta - (z / smooth).clamp(0, C) @ rows
        bent = rows[(z > 0) & (z < smooth * C)]  # where the loss is curved
        step = torch.linalg.solve(eye + bent.T @ bent / smooth + 1e-6 * torch.eye(len(theta)).to(eye), slope)
        size, fall = 1.0, float(slope @ step)
        while (after := value(theta - size * step)) > now - 1e-4 * size * fall and size > 1e-10:
            size /= 2
        if after >= now:
            break
        theta, now = theta - size * step, after
    return theta


def _positive(**values) -> None:
    for name, value in values.items():
        checks.positive(value, name)


def examples(X, y, learner: Learner) -> tuple[Tensor, Tensor]:
    """Require a table and its responses; both in double precision."""
    if not isinstance(learner, Learner):
        raise TypeError(
            f"learner: got {type(learner).__name__}, want a Learner: ridge(), logistic(), svm() or your own"
        )
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(
            f"X: got {X.dtype if isinstance(X, Tensor) else type(X).__name__}, want a floating-point tensor"
        )
    if X.dim() != 2 or X.numel() == 0:
        raise ValueError(f"X: got shape {tuple(X.shape)}, want a non-empty table (n, d)")
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: got {got}, want a floating-point tensor (labels: -1.0 and 1.0)")
    if y.shape != X.shape[:1]:
        raise ValueError(f"y: got shape {tuple(y.shape)}, want ({len(X)},), one response a row")
    if y.device != X.device:
        raise ValueError(f"y: got device {y.device}, want {X.device}, the device of X")
    for name, value in (("X", X), ("y", y)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    if learner.signs and (y.abs() > 1).any():
        raise ValueError(f"y: got values in [{y.min():g}, {y.max():g}], want labels -1 and 1 for {learner.name}")
    if learner.signs and (y.min() == y.max() or math.copysign(1, y.min()) == math.copysign(1, y.max())):
        raise ValueError(f"y: got one class, want examples of both for {learner.name}")
    return X.detach().double(), y.detach().double()
