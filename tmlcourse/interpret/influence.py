"""Influence functions: which training examples a prediction rests on, and what happens when one of them changes.

Everything here is about a linear model trained to its optimum, where the answer can be checked by training again:

    theta = argmin (1/n) sum_i L(z_i, theta) + lam/2 ||w||^2,   H = (1/n) sum_i d^2 L(z_i, theta) + lam I

with weights w and an intercept that pays no penalty. An image may come as its pixels, or as a network's last features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, progress, randomness

LOSSES = ("logistic", "softmax", "squared")
SOLVERS = ("exact", "cg", "lissa")
_SMALL, _LARGE = 200, 2500  # number of parameters from which training begins with conjugate gradients, and
# from which it writes down no Hessian at all


@dataclass(frozen=True, eq=False)
class Regression:
    """A linear model at the optimum of its training objective, and the data that put it there.

    Attributes: `theta` (d + 1, K), weights and then the intercepts, double precision; `X` (n, d + 1), the training rows with
    a one at the end; `y` (n, K), responses, 0/1 labels or one-hot rows; `labels`, the values that y had; `loss`; `lam`.
    """

    theta: Tensor
    X: Tensor
    y: Tensor
    labels: Tensor | None
    loss: str
    lam: float
    pull: float  # of the penalty in the sum over examples: n lam, kept when examples are removed

    def scores(self, X: Tensor) -> Tensor:
        """<w_k, x> + b_k for rows X (m, ...): (m, K), or (m,) where there is one score."""
        z = _rows(X, self.X, "X") @ self.theta
        return z[:, 0] if z.shape[1] == 1 else z

    def predict(self, X: Tensor) -> Tensor:
        """The label, or the response of a squared loss: (m,)."""
        z = self.scores(X)
        if self.loss == "squared":
            return z
        return self.labels[(z > 0).long() if z.dim() == 1 else z.argmax(1)]

    def losses(self, X: Tensor, y: Tensor) -> Tensor:
        """L(z, theta) of each row: (m,)."""
        rows, y = _rows(X, self.X, "X"), _encode(y, self, len(X))
        return _losses(self.loss, rows @ self.theta, y)


def regression(X: Tensor, y: Tensor, *, loss: str = "logistic", lam: float = 0.01) -> Regression:
    """Train a linear model to its optimum by Newton's method.

        theta = argmin (1/n) sum_i L(z_i, theta) + lam/2 ||w||^2

    Args:
        X: rows (n, d), or images (n, ...) that are flattened; floating point, finite.
        y: (n,) int64 labels; two different ones for "logistic" (the larger is the positive class); floats for "squared",
            whose loss is (score - y)^2 / 2.
        lam: strength of the penalty, >= 0.
    Returns: `Regression`.
    Raises: TypeError, ValueError: bad input; a singular Hessian; no finite optimum (separable classes and lam = 0).
    Source: Koh & Liang 2017, section 4.1, for the setting.
    Example: `regression(torch.rand(30, 4), torch.arange(30) % 2).theta.shape` is (5, 1).
    """
    checks.choice(loss, "loss", LOSSES)
    lam = checks.nonnegative(lam, "lam")
    rows = _rows(X, None, "X")
    labels = None
    if loss != "squared":
        checks.labels(y, X)
        labels = y.unique()
        if len(labels) < 2 or (loss == "logistic" and len(labels) != 2):
            raise ValueError(
                f"y: got {len(labels)} different labels, want {'2' if loss == 'logistic' else 'at least 2'}"
            )
    start = Regression(rows.new_zeros(rows.shape[1], 1 if loss != "softmax" else len(labels)), rows, rows[:, :1], labels,
                       loss, lam, len(rows) * lam)  # fmt: skip
    model = _newton(replace(start, y=_encode(y, start, len(rows))))
    if lam == 0 and loss != "squared" and bool((model.predict(X) == y).all()):
        raise ValueError("lam: got 0 for classes that a plane separates, where no optimum is finite: want lam > 0")
    return model


def retrain(model: Regression, points: Tensor, *, X: Tensor | None = None, y: Tensor | None = None) -> Regression:
    """The optimum after some training points were removed, or replaced by others: what influence functions predict.

    The sum of the losses changes, the penalty n lam/2 ||w||^2 stays, as in removing with weight -1/n.

    Args:
        model: from `regression`. points: int64 (p,), different training rows.
        X: (p, ...) new features, y: (p,) new labels or responses; without both the points are removed.
    Raises: TypeError, ValueError: bad input.
    Example: `retrain(regression(torch.rand(30, 4), torch.arange(30) % 2), torch.tensor([3])).X.shape` is (29, 5).
    """
    _points(points, model)
    rows, targets = model.X.clone(), model.y.clone()
    if X is None and y is None:
        keep = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        keep[points] = False
        rows, targets = rows[keep], targets[keep]
        if len(rows) == 0:
            raise ValueError("points: got all of the training set, want something left")
    if X is not None:
        rows[points] = _rows(X, model.X, "X", len(points))
    if y is not None:
        targets[points] = _encode(y, model, len(points))
    return _newton(replace(model, X=rows, y=targets), _factor(model) if model.theta.numel() <= _LARGE else None)


def influence(
    model: Regression,
    X: Tensor,
    y: Tensor,
    *,
    of: str = "loss",
    solver: str = "exact",
    steps: int | None = None,
    batch: int = 100,
    seed: int | None = None,
) -> Tensor:
    """The lecture's first form: how a test loss answers to a little more weight on a training point.

        I(z_i, z_test) = -grad L(z_test)^T H^-1 grad L(z_i)

    Positive: the point is harmful to this test point. Taking it away changes the test loss by about -I / n; see `removal`.

    Args:
        model: from `regression`. X, y: test points (m, ...) and their labels or responses (m,).
        of: "loss", or "score", the logit of the label's class ("squared": the prediction), for which y sets the class only.
        solver: "exact" (Cholesky), "cg" (conjugate gradients, `steps` at most, to a relative residual of 1e-8) or "lissa"
            (a stochastic Neumann series of `steps` batches, Agarwal, Bullins & Hazan 2017).
        batch, seed: of LiSSA.
    Returns: (m, n), double precision.
    Raises: TypeError, ValueError: bad input, a singular Hessian; RuntimeError: LiSSA that diverges.
    Source: Koh & Liang 2017, equation 2.
    Example: `influence(regression(torch.rand(30, 4), torch.arange(30) % 2), torch.rand(2, 4), torch.tensor([0, 1])).shape`
        is (2, 30).
    """
    V = _solve(model, _gradients(model, X, y, of), solver, steps, batch, seed)
    residual = _derivatives(model)[0]
    return -len(model.X) * torch.einsum("nmk,nk->mn", _along(model.X, V), residual)


def removal(model: Regression, X: Tensor, y: Tensor, *, of: str = "loss", leverage: bool = True) -> Tensor:
    """The change of a test loss when a training point is taken away: -I / n, with the leverage h_ii put right.

        -I(z_i, z_test) / n * 1 / (1 - h_ii),   h_ii = s_i x_i^T (n H)^-1 x_i,   s_i = d^2 L(z_i) / d score^2

    The first form is the answer to an *infinitesimal* weight. A removal is one Newton step of the problem without the point,
    whose Hessian lacks that point: that is the factor. With it the score of a ridge regression is exact.

    Args: as in `influence`; leverage: whether the factor is used. With several classes it is a matrix.
    Returns: (m, n) predicted change, new minus old.
    Raises: TypeError, ValueError: bad input, a singular Hessian.
    Source: Koh & Liang 2017; Cook & Weisberg 1982 for the factor.
    Example: `removal(regression(torch.rand(30, 4), torch.arange(30) % 2), torch.rand(2, 4), torch.tensor([0, 1])).shape`
        is (2, 30).
    """
    V = _solve(model, _gradients(model, X, y, of), "exact", None, 1, None)
    residual, S = _derivatives(model)
    if leverage:
        eye = torch.eye(S.shape[1], dtype=S.dtype, device=S.device)
        residual = torch.linalg.solve(eye - S @ _boxes(model), residual[:, :, None])[:, :, 0]
    return torch.einsum("nmk,nk->mn", _along(model.X, V), residual)


def leverages(model: Regression) -> Tensor:
    """h_ii = trace of S_i (x_i^T (n H)^-1 x_i): how much a training point holds its own prediction, (n,).

    Ordinary least squares: the diagonal of the hat matrix, whose sum is the number of parameters.

    Raises: TypeError, ValueError: bad input, a singular Hessian.
    Source: Cook & Weisberg 1982.
    Example: `leverages(regression(torch.rand(30, 4), torch.rand(30), loss="squared", lam=0.0)).sum().round()`.
    """
    _model(model)
    return torch.einsum("nkl,nlk->n", _derivatives(model)[1], _boxes(model))


def modification(model: Regression, X: Tensor, y: Tensor, points: Tensor, *, of: str = "loss") -> Tensor:
    """The lecture's second form: the direction in which a training point's features move the test loss.

        I_pert(z_i, z_test) = -grad L(z_test)^T H^-1 d^2 L(z_i) / (dtheta dx)

    Moving x_i by delta changes the test loss by about I_pert . delta / n.

    Args: X, y, of: as in `influence`; points: int64 (p,), training rows.
    Returns: (m, p, d), double precision.
    Raises: TypeError, ValueError: bad input, a singular Hessian.
    Source: Koh & Liang 2017, equation 5; the same derivative as `tmlcourse.poisoning.implicit_gradient`.
    Example: `modification(regression(torch.rand(30, 4), torch.arange(30) % 2), torch.rand(2, 4), torch.tensor([0, 1]),
        torch.tensor([5])).shape` is (2, 1, 4).
    """
    V = _solve(model, _gradients(model, X, y, of), "exact", None, 1, None)
    _points(points, model)
    residual, S = (part[points] for part in _derivatives(model))
    along = _along(model.X[points], V)  # (p, m, K)
    direct = torch.einsum("mdk,pk->mpd", V[:, :-1], residual)
    through = torch.einsum("pmk,pkl,dl->mpd", along, S, model.theta[:-1])
    return -len(model.X) * (direct + through)


def relabelling(model: Regression, X: Tensor, y: Tensor, points: Tensor, labels: Tensor, *, of: str = "loss") -> Tensor:
    """The change of a test loss when a training point gets another label: exact for the score of ridge regression.

        -(1/n) grad L(z_test)^T H^-1 (grad L(x_i, y_i') - grad L(x_i, y_i))

    Args: X, y, of: as in `influence`; points: int64 (p,); labels: (p,) their new labels or responses.
    Returns: (m, p) predicted change, each point by itself.
    Raises: TypeError, ValueError: bad input, a singular Hessian.
    Source: Koh & Liang 2017.
    Example: `relabelling(regression(torch.rand(9, 2), torch.rand(9), loss="squared"), torch.rand(2, 2), torch.rand(2),
        torch.tensor([5]), torch.tensor([1.0])).shape` is (2, 1).
    """
    V = _solve(model, _gradients(model, X, y, of), "exact", None, 1, None)
    _points(points, model)
    # In all three losses the label enters the gradient as -y, whatever the score.
    change = model.y[points] - _encode(labels, model, len(points))
    return -torch.einsum("pmk,pk->mp", _along(model.X[points], V), change)


class Attack(NamedTuple):
    """`X` (p, d), the changed training points; `model`, retrained on them; `losses` (steps + 1,) of the test on the way."""

    X: Tensor
    model: Regression
    losses: Tensor


def poison(
    model: Regression,
    X: Tensor,
    y: Tensor,
    points: Tensor,
    *,
    eps: float,
    steps: int = 20,
    alpha: float | None = None,
    box: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Change training points a little, labels untouched, so that the model retrained on them is wrong at the test points.

        x_i <- P(x_i + alpha sign(sum over test points of I_pert(z_i, z_test))),   P: ||delta||_inf <= eps and the box

    The model is trained again after every step. It ends when every test point is misclassified.

    Args:
        model, points: as in `modification`; X, y: test points to get wrong and their true labels.
        eps: largest change of a feature, >= 0; alpha: step, eps / 5 without it; steps: at most. box: (low, high).
    Returns: `Attack`; the best step is kept, so the loss is never below the start.
    Raises: TypeError, ValueError: bad input.
    Source: Koh & Liang 2017, section 5.2.
    Example: `poison(regression(torch.rand(30, 4), torch.arange(30) % 2), torch.rand(1, 4), torch.tensor([1]),
        torch.tensor([5]), eps=0.1, steps=2).X.shape` is (1, 4).
    """
    eps = checks.nonnegative(eps, "eps")
    alpha = eps / 5 if alpha is None else checks.positive(alpha, "alpha")
    checks.positive_int(steps, "steps")
    _points(points, model)
    start = model.X[points, :-1]
    if (start < box[0]).any() or (start > box[1]).any():
        raise ValueError(f"box: got {box}, want one that holds the training points")
    low, high = (start - eps).clamp(min=box[0]), (start + eps).clamp(max=box[1])
    now, best, trace = model, (float(model.losses(X, y).sum()), start, model), []
    trace.append(best[0])
    for _ in progress.bar(range(steps), desc="poisoning by influence"):
        if eps == 0 or model.loss != "squared" and bool((now.predict(X) != y).all()):
            break
        ascent = modification(now, X, y, points).sum(0).sign()
        x = (now.X[points, :-1] + alpha * ascent).clamp(low, high)
        now = retrain(now, points, X=x)
        trace.append(float(now.losses(X, y).sum()))
        best = max(best, (trace[-1], x, now), key=lambda b: b[0])
    return Attack(best[1], best[2], torch.tensor(trace, dtype=torch.float64))


# ---- the loss and its derivatives in the scores


def _losses(loss: str, z: Tensor, y: Tensor) -> Tensor:
    if loss == "squared":
        return ((z - y) ** 2).sum(1) / 2
    if loss == "softmax":
        return z.logsumexp(1) - (z * y).sum(1)
    return (torch.nn.functional.softplus(z) - y * z).sum(1)


def _derivatives(model: Regression) -> tuple[Tensor, Tensor]:
    """dL/dscore (n, K) and d^2 L/dscore^2 (n, K, K) at the training points."""
    z = model.X @ model.theta
    if model.loss == "squared":
        return z - model.y, torch.ones_like(z)[:, :, None]
    if model.loss == "softmax":
        p = z.softmax(1)
        return p - model.y, torch.diag_embed(p) - p[:, :, None] * p[:, None]
    p = z.sigmoid()
    return p - model.y, (p * (1 - p))[:, :, None]


def _gradients(model: Regression, X: Tensor, y: Tensor, of: str) -> Tensor:
    """d(test loss or score)/dtheta: (m, d + 1, K)."""
    _model(model)
    checks.choice(of, "of", ("loss", "score"))
    rows, y = _rows(X, model.X, "X"), _encode(y, model, len(X))
    if of == "loss":
        slope = _derivatives(replace(model, X=rows, y=y))[0]
    else:
        slope = (
            y if model.loss == "softmax" else torch.where(y > 0, 1.0, -1.0) if model.loss == "logistic" else 0 * y + 1
        )
    return rows[:, :, None] * slope[:, None].to(rows)


def _along(X: Tensor, V: Tensor) -> Tensor:
    """x_n . V_mk: (n, m, K)."""
    return (X @ V.permute(1, 0, 2).flatten(1)).view(len(X), len(V), V.shape[2])


# ---- n H: its factor, its products, its inverse


def _curvature(model: Regression) -> Tensor:
    """The Cholesky factor of n H, parameters ordered class by class."""
    S, (n, D), K = _derivatives(model)[1], model.X.shape, model.theta.shape[1]
    A = model.X.new_zeros(K * D, K * D)
    for k in range(K):
        for j in range(k + 1):
            block = model.X.T @ (S[:, k, j, None] * model.X)
            A[k * D : (k + 1) * D, j * D : (j + 1) * D] = block
            A[j * D : (j + 1) * D, k * D : (k + 1) * D] = block.T
    penalty = torch.full((K, D), model.pull, dtype=A.dtype, device=A.device)
    penalty[:, -1] = 0
    A.diagonal().add_(penalty.flatten())
    if model.loss == "softmax":  # all intercepts shifted together change no prediction: hold that direction
        intercepts = torch.arange(1, K + 1, device=A.device) * D - 1
        A[intercepts[:, None], intercepts] += n / K
    factor, info = torch.linalg.cholesky_ex(A)
    pivots = factor.diagonal() ** 2 / A.diagonal()
    if int(info) or not float(pivots.min()) > 1e-13:
        raise ValueError(f"lam: got {model.lam:g}, with which the Hessian is singular (constant or repeated features, "
                         "or fewer examples than parameters): want lam > 0")  # fmt: skip
    return factor


def _factor(model: Regression) -> Tensor:
    """The factor, made once a model."""
    if "_kept" not in model.__dict__:
        object.__setattr__(model, "_kept", _curvature(model))
    return model._kept


def _product(model: Regression, V: Tensor, S: Tensor, rows: Tensor) -> Tensor:
    """(n H) V for V (m, D, K) with the rows given, their S scaled to stand for all n."""
    bent = torch.einsum("nmk,nkl->nml", _along(rows, V), S)
    out = (rows.T @ bent.flatten(1)).view(V.shape[1], len(V), V.shape[2]).permute(1, 0, 2)
    out[:, :-1] += model.pull * V[:, :-1]
    return out


def _solve(model: Regression, G: Tensor, solver: str, steps, batch: int, seed) -> Tensor:
    """(n H)^-1 G for G (m, D, K)."""
    checks.choice(solver, "solver", SOLVERS)
    if steps is not None:
        checks.positive_int(steps, "steps")
    if solver == "exact":
        return _exact(_factor(model), G)
    if solver == "cg":
        return _conjugate_gradients(model, G, steps or 10 * G[0].numel())
    return _lissa(model, G, steps or 2000, checks.positive_int(batch, "batch"), seed)


def _exact(factor: Tensor, G: Tensor) -> Tensor:
    m, D, K = G.shape
    return torch.cholesky_solve(G.transpose(1, 2).reshape(m, K * D).T, factor).T.reshape(m, K, D).transpose(1, 2)


def _conjugate_gradients(model: Regression, G: Tensor, steps: int, tol: float = 1e-8) -> Tensor:
    """All right-hand sides at once, each with its own step sizes."""
    S = _derivatives(model)[1]

    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)

    V, r = torch.zeros_like(G), G.clone()
    p, size = r.clone(), dot(r, r)
    enough = tol**2 * size
    for _ in progress.bar(range(steps), desc="conjugate gradients"):
        if (size <= enough).all():
            break
        Ap = _product(model, p, S, model.X)
        open_, bend = size > enough, dot(p, Ap)
        step = torch.where(open_, size / bend.where(open_, bend.new_ones(())), 0.0)
        V, r = V + step * p, r - step * Ap
        before, size = size, dot(r, r)
        p = r + torch.where(open_, size / before.where(open_, before.new_ones(())), 0.0) * p
    return V


def _lissa(model: Regression, G: Tensor, steps: int, batch: int, seed) -> Tensor:
    """V <- V + (G - (n H_batch) V) / scale; the mean of the last third, which quietens the noise of the batches."""
    X, S, n = model.X, _derivatives(model)[1], len(model.X)
    generator = randomness.generator(seed)
    v = torch.randn(G[:1].shape, generator=torch.Generator().manual_seed(0), dtype=G.dtype).to(G)
    for _ in range(20):  # the largest eigenvalue of n H, by the power method
        v = _product(model, v / v.norm(), S, X)
    scale = 2 * float(v.norm())
    V, mean, last = G / scale, torch.zeros_like(G), max(1, steps // 3)
    for step in progress.bar(range(steps), desc="LiSSA"):
        index = torch.randint(n, (min(batch, n),), generator=generator).to(X.device)
        V = V + (G - _product(model, V, S[index] * (n / len(index)), X[index])) / scale
        if step >= steps - last:
            mean += V / last
    if not torch.isfinite(mean).all() or mean.norm() > 1e8 * G.norm() / max(model.pull, 1e-12):
        raise RuntimeError(f"solver: LiSSA diverged with batches of {batch}: want larger batches")
    return mean


def _boxes(model: Regression) -> Tensor:
    """x_i^T (n H)^-1 x_i, class by class: (n, K, K)."""
    (_, D), K = model.X.shape, model.theta.shape[1]
    factor, out = _factor(model), []
    for rows in model.X.split(max(1, 2**24 // (K * K * D))):
        units = rows.new_zeros(K, D, len(rows), K)
        for k in range(K):
            units[k, :, :, k] = rows.T
        half = torch.linalg.solve_triangular(factor, units.reshape(K * D, -1), upper=False).view(K * D, len(rows), K)
        out.append(torch.einsum("dnk,dnl->nkl", half, half))
    return torch.cat(out)


# ---- training


def _slope(model: Regression) -> Tensor:
    slope = model.X.T @ _derivatives(model)[0]
    slope[:-1] += model.pull * model.theta[:-1]
    return slope


def _objective(model: Regression) -> float:
    data = _losses(model.loss, model.X @ model.theta, model.y).sum()
    return float(data + model.pull / 2 * model.theta[:-1].square().sum())


def _newton(model: Regression, factor: Tensor | None = None) -> Regression:
    """Newton's method with a line search: far away with conjugate gradients, near with a factor for as long as it serves."""
    size = 1e-11 * (1 + float(torch.linalg.vector_norm(model.X) * len(model.X) ** 0.5))
    value, slope = _objective(model), _slope(model)
    many, far = model.theta.numel(), 1e-4 * float(slope.norm())
    for _ in range(200):
        now = float(slope.norm())
        if now <= size:
            return model
        chord = factor is not None
        if many > _LARGE or (many > _SMALL and now > far and not chord):
            step = _conjugate_gradients(model, slope[None], 300, tol=0.1 if now > far else 1e-3)[0]
        else:
            factor = factor if chord else _curvature(model)
            step = _exact(factor, slope[None])[0]
        length, good = 1.0, False
        while not good and length > 1e-9:
            new = replace(model, theta=model.theta - length * step)
            after, new_slope = _objective(new), _slope(new)
            good = after < value or float(new_slope.norm()) < 0.5 * now
            length = 0.0 if chord else length / 2
        if not good and not chord:
            break  # rounding has the last word
        if float(new_slope.norm()) > 0.2 * now:
            factor = None  # the next step with the curvature of there
        if good:
            model, value, slope = new, after, new_slope
    if float(slope.norm()) <= 1e4 * size:
        return model
    raise ValueError(f"lam: got {model.lam:g}, with which training found no optimum (separable classes?): want lam > 0")


# ---- input checks


def _model(model) -> Regression:
    if not isinstance(model, Regression):
        raise TypeError(f"model: got {type(model).__name__}, want a Regression: regression(X, y)")
    return model


def _rows(X, like: Tensor | None, name: str, count: int | None = None) -> Tensor:
    """(m, d + 1) in double precision, a one at the end."""
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(
            f"{name}: got {X.dtype if isinstance(X, Tensor) else type(X).__name__}, want a floating-point tensor"
        )
    if X.dim() < 2 or X.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(X.shape)}, want a non-empty table (n, d) or images (n, ...)")
    if not torch.isfinite(X).all():
        raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    rows = X.detach().flatten(1).double()
    if like is not None and rows.shape[1] != like.shape[1] - 1:
        raise ValueError(f"{name}: got {rows.shape[1]} features, want {like.shape[1] - 1}, as in training")
    if count is not None and len(rows) != count:
        raise ValueError(f"{name}: got {len(rows)} rows, want {count}, one for each of the points")
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _encode(y, model: Regression, count: int) -> Tensor:
    """Responses as (m, K)."""
    if not isinstance(y, Tensor) or y.shape != (count,):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: got {got}, want a tensor ({count},), one label a row")
    if model.loss == "squared":
        if not y.is_floating_point() or not torch.isfinite(y).all():
            raise TypeError(f"y: got {y.dtype}, want finite floating-point responses for the squared loss")
        return y.detach().double()[:, None]
    if y.dtype != torch.int64 or not torch.isin(y, model.labels).all():
        raise ValueError(f"y: got {y.dtype} labels {y.unique().tolist()[:9]}, want int64 among {model.labels.tolist()}")
    code = (y[:, None] == model.labels).double()
    return code[:, 1:] if model.loss == "logistic" else code


def _points(points, model: Regression) -> Tensor:
    _model(model)
    if not isinstance(points, Tensor) or points.dtype != torch.int64 or points.dim() != 1 or len(points) == 0:
        raise TypeError("points: want a non-empty int64 tensor (p,) of training rows")
    if points.min() < 0 or points.max() >= len(model.X) or len(points.unique()) != len(points):
        raise ValueError(f"points: got {points.tolist()[:9]}, want different rows in [0, {len(model.X) - 1}]")
    return points
