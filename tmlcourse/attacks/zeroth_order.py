"""Zeroth-order attacks: gradients estimated from answers alone, and one optimiser interface that uses them.

An estimate asks for f at points near x and combines the differences. Three choices make an attack: the *estimator* (which
directions, one side or two), the *optimiser* (what to do with the estimate) and the *problem* (climb inside a threat set, or
find the nearest point that fools the model). ZOO, AutoZOOM, NES and their relatives are such triples, one line each.

A function to minimise is `f(points, index) -> (R,)` for R points of the variables `index` (R,) of a batch; it may return
(R, K) numbers a point, which cost no more. Everything is done for all variables of the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..threat import L1, L2, Linf, _per_image
from .gradient import _Best
from .losses import margin, objective
from .queries import BudgetExceeded, Queries, open_door

# --- estimators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """g = scale * sum_j D_j u_j, with D_j the difference quotient of f along u_j. Call it: `g, queries = e(f, x, generator)`.

    Two-sided: D_j = (f(x + beta u_j) - f(x - beta u_j)) / (2 beta). One-sided: D_j = (f(x + beta u_j) - f(x)) / beta.

    Attributes:
        draw: (x (N, d), generator) -> directions (N, m, d), or (1, m, d) for all the same.
        size: d -> m.
        beta: length of the step along u_j (> 0).
        paired: two-sided.
        scale: d -> the factor.
    """

    draw: Callable[[Tensor, torch.Generator | None], Tensor]
    size: Callable[[int], int]
    beta: float
    paired: bool = True
    scale: Callable[[int], float] = lambda d: 1.0

    def __post_init__(self):
        if checks.nonnegative(self.beta, "beta") == 0:
            raise ValueError("beta: got 0, want a step > 0")

    def queries(self, d: int) -> int:
        """Queries of one estimate in d dimensions, f(x) itself not among them."""
        return self.size(d) * (2 if self.paired else 1)

    def probe(
        self, f: Callable, x: Tensor, generator=None, base: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (N or 1, m, d), first differences (N, m, ...) and, two-sided with `base` = f(x), second ones."""
        n, flat = len(x), x.flatten(1)
        directions = self.draw(flat, generator)
        if base is None and not self.paired:
            base = f(x, torch.arange(n, device=x.device))
        sides = ([], [])
        for u in directions.split(max(1, 2**22 // flat.numel()), 1):
            index = torch.arange(n, device=x.device).repeat_interleave(u.shape[1])
            for sign, answers in zip((1, -1) if self.paired else (1,), sides, strict=False):
                points = (flat[:, None] + sign * self.beta * u).reshape(-1, *x.shape[1:])
                answers.append(f(points, index).unflatten(0, (n, -1)))
        up = torch.cat(sides[0], 1)
        if not self.paired:
            return directions, (up - base[:, None]) / self.beta, None
        down = torch.cat(sides[1], 1)
        second = None if base is None else (up - 2 * base[:, None] + down) / self.beta**2
        return directions, (up - down) / (2 * self.beta), second

    def __call__(self, f: Callable, x: Tensor, generator=None, base: Tensor | None = None) -> tuple[Tensor, int]:
        """The estimate, shape of x (or (N, K, ...) for K numbers a point), and the queries it took for each image.

        Args:
            f: (points (R, ...), index (R,)) -> (R,) or (R, K).
            x: (N, ...), where the gradient is wanted.
            generator: of the random directions.
            base: f(x), if it is known; a one-sided estimator asks for it otherwise.
        """
        d = x[0].numel()
        directions, first, _ = self.probe(f, x, generator, base)
        g = self.scale(d) * (first.reshape(len(x), first.shape[1], -1).transpose(1, 2) @ directions)
        shape = x.shape if first.dim() == 2 else (len(x), first.shape[2], *x.shape[1:])
        return g.reshape(shape), self.queries(d) + int(base is None and not self.paired)


def coordinates(k: int | None = None, *, beta: float = 1e-2) -> Estimator:
    """g_i = (f(x + beta e_i) - f(x - beta e_i)) / (2 beta), for all coordinates or for k drawn at random (0 elsewhere).

    Exact on quadratics; otherwise |error| <= beta^2 / 6 max |f'''|. Takes 2 d or 2 k queries.
    Source: Chen P.-Y. et al. 2017 (ZOO).
    Example: `g, queries = coordinates()(f, x)`.
    """
    if k is None:
        return Estimator(lambda x, _: torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None], lambda d: d, beta)
    checks.positive_int(k, "k")

    def draw(x: Tensor, generator) -> Tensor:
        chosen = _uniform(x.shape, x, generator).argsort(1)[:, :k]
        return F.one_hot(chosen, x.shape[1]).to(x.dtype)

    return Estimator(draw, lambda d: min(k, d), beta)


def groups(size: int, *, beta: float = 1e-2) -> Estimator:
    """Two-sided differences along random groups of `size` coordinates: each coordinate gets its group's mean derivative.

    The groups are a fresh partition for each estimate, so it takes 2 ceil(d / size) queries, not 2 d. u = 1_S / sqrt|S|.
    Source: Bhagoji et al. 2018, random grouping.
    Example: `groups(8)` asks an eighth of the questions of `coordinates()`.
    """
    checks.positive_int(size, "size")

    def draw(x: Tensor, generator) -> Tensor:
        rank = _uniform(x.shape, x, generator).argsort(1).argsort(1)
        member = F.one_hot(rank // size, -(-x.shape[1] // size)).to(x.dtype).transpose(1, 2)
        return member / member.sum(2, keepdim=True).sqrt()

    return Estimator(draw, lambda d: -(-d // size), beta)


def components(basis: Tensor, *, beta: float = 1e-2) -> Estimator:
    """Two-sided differences along the orthonormal rows of `basis` (m, d): the gradient, projected on their span.

    Source: Bhagoji et al. 2018 (principal components of the attacker's own images, see `principal_components`).
    Example: `components(principal_components(x_own, 50))` takes 100 queries.
    """
    if basis.dim() != 2 or not torch.allclose(basis @ basis.t(), torch.eye(len(basis)).to(basis), atol=1e-4):
        raise ValueError(f"basis: got shape {tuple(basis.shape)}, want orthonormal rows (m, d)")
    return Estimator(lambda x, _: basis.to(x)[None], lambda d: len(basis), beta)


def principal_components(x: Tensor, k: int) -> Tensor:
    """The k directions in which the images x (N, ...) vary most: orthonormal rows (k, d).

    Example: `principal_components(x_own, 50).shape`, which is (50, d).
    """
    flat = checks.images(x).flatten(1)
    if checks.positive_int(k, "k") > min(flat.shape):
        raise ValueError(f"k: got {k}, want at most {min(flat.shape)} for {len(x)} images of {flat.shape[1]} pixels")
    return torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:k]


def random_directions(
    q: int, *, beta: float = 1e-2, antithetic: bool = True, kind: str = "sphere", b: float | None = None
) -> Estimator:
    """g = (b / q) sum_j D_j u_j over q random directions; E g = (b / d) grad f on the sphere, as beta -> 0.

    "sphere": u uniform with length 1 and b = d by default, which makes g unbiased. "gaussian": u normal, length about
    sqrt(d), and b = 1: with `antithetic` the estimator of NES, in which every even order of f cancels.
    Takes 2 q queries with `antithetic`, else q (and f(x) once).

    Source: Ghadimi & Lan 2013; Tu et al. 2019 (AutoZOOM: one-sided, scaled by b); Ilyas et al. 2018 (NES).
    Example: `random_directions(10, antithetic=False)` is AutoZOOM's, with q = 10.
    """
    checks.positive_int(q, "q")
    sphere = checks.choice(kind, "kind", ("sphere", "gaussian")) == "sphere"

    def draw(x: Tensor, generator) -> Tensor:
        u = torch.randn(len(x), q, x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
        return u / u.norm(dim=2, keepdim=True) if sphere else u

    return Estimator(draw, lambda d: q, beta, antithetic, lambda d: (b or (d if sphere else 1)) / q)


@dataclass(frozen=True)
class Mean:
    """The finite sum f(w) = (1/n) sum_i f_i(w), and random parts of it: `Mean(terms, n, batch)`.

    terms: (points, index, which (R, b) term numbers) -> (R,), the mean of f_i over i in which[r]. `batch` terms a step.
    """

    terms: Callable[[Tensor, Tensor, Tensor], Tensor]
    n: int
    batch: int

    def __call__(self, points: Tensor, index: Tensor) -> Tensor:
        return self.terms(points, index, torch.arange(self.n, device=points.device).expand(len(points), -1))

    def sample(self, generator, device) -> Callable:
        """f over `batch` terms drawn now, the same ones for every point."""
        which = torch.randperm(self.n, generator=generator, device=device)[: self.batch]
        return lambda points, index: self.terms(points, index, which.expand(len(points), -1))


def _uniform(shape, like: Tensor, generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


# --- optimisers ------------------------------------------------------------------------------------------------------
# An optimiser is a function (problem, w, memory) -> the next w. It asks through `problem` alone; `memory` is a dict of
# tensors, one row a variable, that starts empty.


class Problem:
    """What an optimiser may use at one step: estimates of the gradient, the known part of it, and the projection.

    The function to minimise is f(w) + penalty(w): f can only be asked, the penalty is the attacker's own and known.
    """

    def __init__(self, f, estimator: Estimator, generator, *, project=None, penalty=None, scores=None, threat=None,
                 active=None, door=None):  # fmt: skip
        self.f, self.estimator, self.generator, self.penalty = f, estimator, generator, penalty
        self.project = project or (lambda w, metric=None: w)
        self.scores, self.threat = scores, threat
        self.active, self.door = active, door  # the images still at work, by number, and where they ask
        self.base = self.answer = None  # f and the scores at the current w, where they are known
        self.done = 0.0  # the share of the budget that is spent

    def afford(self, w: Tensor, estimator: Estimator) -> None:
        """Refuse an estimate that some image could not pay in full, before its first query."""
        if self.door is not None:
            left = self.door.left(int(self.active.max()) + 1)[self.active.cpu()].min()
            if estimator.queries(w[0].numel()) > left:
                raise BudgetExceeded("the budget does not allow another estimate")

    def estimate(
        self, w: Tensor, *, at_current: bool = True, estimator: Estimator | None = None, whole=False
    ) -> Tensor:
        """The gradient of f alone; of a random part of f if f is a `Mean`, unless `whole`."""
        estimator = estimator or self.estimator
        self.afford(w, estimator)
        part = isinstance(self.f, Mean) and not whole
        f = self.f.sample(self.generator, w.device) if part else self.f
        return estimator(f, w, self.generator, self.base if at_current and not part else None)[0]

    def known(self, w: Tensor) -> Tensor | float:
        """The gradient of the penalty, exactly and without a query."""
        if self.penalty is None:
            return 0.0
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            return torch.autograd.grad(self.penalty(w, torch.arange(len(w), device=w.device)).sum(), w)[0]

    def gradient(self, w: Tensor, **options) -> Tensor:
        """The gradient of f + penalty: what is estimated plus what is known."""
        return self.estimate(w, **options) + self.known(w)


def sgd(lr: float) -> Callable:
    """w <- P(w - lr g). Example: `minimise(f, w, estimator=coordinates(), optimiser=sgd(0.1), steps=50)`."""
    return lambda problem, w, memory: problem.project(w - lr * problem.gradient(w))


def _average(memory: dict, g: Tensor, momentum: float) -> Tensor:
    """m <- momentum m + (1 - momentum) g: estimates of several steps, added up."""
    memory["mean"] = momentum * memory.get("mean", torch.zeros_like(g)) + (1 - momentum) * g
    return memory["mean"]


def sign(lr: float, *, momentum: float = 0.0) -> Callable:
    """m <- momentum m + (1 - momentum) g; w <- P(w - lr sign(m)). Source: Liu S. et al. 2019 (ZO-signSGD)."""
    return lambda problem, w, memory: problem.project(w - lr * _average(memory, problem.gradient(w), momentum).sign())


def steepest(lr: float, *, momentum: float = 0.0) -> Callable:
    """m <- momentum m + (1 - momentum) g; w <- P(w - the steepest step of length lr along m in the threat set's norm)."""

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        return problem.project(w - problem.threat.steepest(_average(memory, problem.gradient(w), momentum), lr))

    return step


def adam(
    lr: float, *, beta1: float = 0.9, beta2: float = 0.999, largest: bool = False, decay: bool = False
) -> Callable:
    """w <- P(w - lr m / (sqrt(v) + 1e-8)), m and v running means of g and g^2, corrected for their start at 0.

    A coordinate with g_i = 0 was not asked about and keeps its own m, v and clock, as in ZOO. `largest` keeps the largest v
    met, without corrections, and projects in the metric sqrt(v): AdaMM. `decay`: lr falls linearly to 0 with the budget.
    Source: Chen P.-Y. et al. 2017 (ZOO-Adam); Chen X. et al. 2019 (ZO-AdaMM).
    """

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        g, rate = problem.gradient(w), lr * (1 - problem.done if decay else 1)
        zero = torch.zeros_like(g)
        m, v, t, top = (memory.get(key, zero) for key in ("m", "v", "t", "top"))
        asked = g != 0
        m = torch.where(asked, beta1 * m + (1 - beta1) * g, m)
        v = torch.where(asked, beta2 * v + (1 - beta2) * g.square(), v)
        t, top = t + asked, torch.maximum(top, v)
        memory.update(m=m, v=v, t=t, top=top)
        if largest:
            metric = top.sqrt() + 1e-8
            return problem.project(w - rate * m / metric, metric)
        first, second = m / (1 - beta1 ** t.clamp_min(1)), v / (1 - beta2 ** t.clamp_min(1))
        return problem.project(torch.where(asked, w - rate * first / (second.sqrt() + 1e-8), w))

    return step


def newton(lr: float, *, least: float = 0.1) -> Callable:
    """w <- P(w - lr sum_j D_j / h_j u_j), with h_j the second difference along u_j; where h_j < 0, h_j = 1.

    Needs a two-sided estimator with orthonormal directions. h_j is at least `least`.
    Source: Chen P.-Y. et al. 2017 (ZOO-Newton).
    """

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        problem.afford(w, problem.estimator)
        every = torch.arange(len(w), device=w.device)
        penalty = problem.penalty or (lambda points, index: 0.0)
        base = problem.f(w, every) if problem.base is None else problem.base
        directions, first, second = problem.estimator.probe(
            lambda points, index: problem.f(points, index) + penalty(points, index),
            w, problem.generator, base + penalty(w, every),
        )  # fmt: skip
        ratio = first / torch.where(second < 0, 1.0, second.clamp_min(least))
        return problem.project(w - lr * (ratio[:, None] @ directions).reshape(w.shape))

    return step


def svrg(optimiser: Callable, *, every: int = 10, anchor: Estimator) -> Callable:
    """v = g_B(w) - g_B(w~) + g(w~), the same directions (and terms) B in both; w~ and g(w~) are renewed every few steps.

    `optimiser` then moves along v; `anchor` is the better estimator, of g(w~), used each `every` steps.
    Source: Liu S. et al. 2018 (ZO-SVRG), after Johnson & Zhang 2013.
    """
    checks.positive_int(every, "every")

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        clock = memory.get("svrg_t", torch.zeros(len(w), device=w.device))
        if clock[0] % every == 0:
            memory["svrg_w"], memory["svrg_g"] = w, problem.estimate(w, estimator=anchor, whole=True)
        memory["svrg_t"] = clock + 1

        class Reduced:
            """The problem, with the variance taken out of its gradient."""

            def __getattr__(self, name):
                return getattr(problem, name)

            def gradient(self, w: Tensor) -> Tensor:
                state = problem.generator.get_state()
                here = problem.estimate(w)
                problem.generator.set_state(state)
                there = problem.estimate(memory["svrg_w"], at_current=False)
                return here - there + memory["svrg_g"] + problem.known(w)

        return optimiser(Reduced(), w, memory)

    return step


def natural(lr: float, *, damping: float = 0.1, momentum: float = 0.0) -> Callable:
    """w <- P(w - steepest step along (Fisher + gamma I)^-1 g), Fisher = J^T (diag p - p p^T) J of the softmax of the scores.

    J, the Jacobian of the scores, costs the same queries as one gradient, because every answer holds all K scores; Fisher has
    rank < K and is inverted in K dimensions. gamma is `damping` times the mean eigenvalue of the K x K matrix.
    Source: Zhao P. et al. 2020 (ZO-NGD).
    """

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        mean = _average(memory, natural_gradient(problem, w, damping), momentum)
        return problem.project(w - problem.threat.steepest(mean, lr))

    return step


def natural_gradient(problem: Problem, w: Tensor, damping: float = 0.1) -> Tensor:
    """(Fisher + gamma I)^-1 g at w, g the gradient of f through the scores; see `natural`."""
    problem.afford(w, problem.estimator)
    ask, loss = problem.scores
    z = problem.answer
    with torch.enable_grad():
        z_ = z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(loss(z_, torch.arange(len(w), device=w.device)).sum(), z_)
    jacobian = problem.estimator(ask, w, problem.generator, z)[0].flatten(2)
    g = (dz[:, None] @ jacobian)[:, 0]
    p = z.softmax(1)
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]  # root root^T = diag p - p p^T
    a = root.transpose(1, 2) @ jacobian  # (N, K, d): Fisher = a^T a
    small = a @ a.transpose(1, 2)
    gamma = (damping * small.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12))[:, None, None]
    inner = torch.linalg.solve(small + gamma * torch.eye(a.shape[1]).to(a), a @ g[:, :, None])
    return ((g - (a.transpose(1, 2) @ inner)[:, :, 0]) / gamma[:, 0]).reshape(w.shape)


def admm(rho: float = 10.0, *, eta: float = 30.0) -> Callable:
    """min |z|^2 + f(w) with z = w, by turns: z exactly, w along the estimate, then the multiplier u of the constraint.

    z <- argmin |z|^2 + rho/2 |z - w + u/rho|^2;  w <- (eta w + rho z + u - g) / (eta + rho);  u <- u + rho (z - w).
    1/eta is the step along g; the penalty |w|^2 is the problem's own.
    Source: Zhao P. et al. 2019 (ZO-ADMM).
    """

    def step(problem: Problem, w: Tensor, memory: dict) -> Tensor:
        g, u = problem.estimate(w), memory.get("u", torch.zeros_like(w))
        z = problem.project((rho * w - u) / (2 + rho))
        w = problem.project((eta * w + rho * z + u - g) / (eta + rho))
        memory["u"] = u + rho * (z - w)
        return w

    return step


def minimise(
    f: Callable,
    w: Tensor,
    *,
    estimator: Estimator,
    optimiser: Callable,
    steps: int,
    project=None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise f by its values alone: `steps` steps of `optimiser` on estimates of `estimator`, N variables at once.

    Args:
        f: (points (R, ...), index (R,)) -> (R,), or a `Mean`.
        w: (N, ...), the starts.
        project: (w, metric) -> w, onto the feasible set; none without.
        seed: makes the run reproducible.
    Returns:
        The last w, and the trace f(w_t) (steps + 1, N), which is looked at for the record: the optimiser does not see it.
    Example: `w, trace = minimise(f, w, estimator=coordinates(), optimiser=sgd(0.1), steps=100)`.
    """
    checks.positive_int(steps, "steps")
    problem = Problem(f, estimator, randomness.own_generator(seed, w.device), project=project)
    memory, every, w = {}, torch.arange(len(w), device=w.device), w.detach()
    trace = [f(w, every)]
    for _ in progress.bar(range(steps), desc="minimise", unit="step"):
        w = optimiser(problem, w, memory)
        trace.append(f(w, every))
    return w, torch.stack(trace)


# --- the two problems of an attacker ---------------------------------------------------------------------------------


def _checked(predict, x, y, queries, target, seed):
    checks.labels(y, checks.images(x))
    if target is not None and (checks.labels(target, x, "target") == y).any():
        raise ValueError(f"target: got the true label for {int((target == y).sum())} images, want other classes")
    return x.detach(), open_door(predict, x, queries), randomness.own_generator(seed, x.device)


def _run(problem: Problem, w: Tensor, optimiser, look, door: Queries, count: int, *, steps: int | None = None) -> None:
    """Look at w, step, look again, until every image is done or cannot pay. `look(w)` says who goes on: bool (len(w),).

    The door itself ends the attack: when it refuses, the images with the fewest queries left go; the others repeat the step.
    """
    memory, t = {}, 0
    while len(w) and (steps is None or t <= steps):
        problem.done = 1 - int(door.left(count).max()) / max(door.budget, 1)
        try:
            w = optimiser(problem, w, memory) if t else w
            stay = look(w)
            t += 1
        except BudgetExceeded:
            left = door.left(count).to(w.device)[problem.active]
            stay = left > left.min()
        if not stay.all():
            w, problem.active = w[stay], problem.active[stay]
            memory = {key: kept[stay] for key, kept in memory.items()}
            problem.base, problem.answer = (None if v is None else v[stay] for v in (problem.base, problem.answer))


def _bounded(predict, x, y, threat, *, queries, estimator, optimiser, loss, target, seed, steps=None, name) -> Tensor:
    """Climb the loss inside the threat set until the image falls or the budget is spent; the best confirmed point."""
    attacker = objective(loss, target)
    x, oracle, generator = _checked(predict, x, y, queries, target, seed)
    best = _Best(x, y, target, attacker)
    bar = progress.bar(total=len(x) * queries, desc=name, unit="query")

    def value(z: Tensor, index: Tensor) -> Tensor:
        image = problem.active[index]
        return -attacker(z, y[image], None if target is None else target[image])

    def ask(points: Tensor, index: Tensor) -> Tensor:
        return oracle(points, problem.active[index])

    def project(w: Tensor, metric: Tensor | None = None) -> Tensor:
        center = x[problem.active]
        return threat.project(w, center) if metric is None else mahalanobis(threat, w, center, metric)

    def look(w: Tensor) -> Tensor:
        z = checks.logits(oracle(w, problem.active), y[problem.active])
        if target is not None:
            checks.logits(z, target[problem.active], "target")
        gained, fooled = best.offer(problem.active, w, z)
        problem.base, problem.answer = -gained, z
        bar.update(oracle.total - bar.n)
        return ~fooled

    problem = Problem(
        lambda points, index: value(ask(points, index), index), estimator, generator, project=project,
        scores=(ask, value), threat=threat, active=torch.arange(len(x), device=x.device), door=oracle,
    )  # fmt: skip
    with bar:
        _run(problem, x, optimiser, look, oracle, len(x), steps=steps)
    return best.x


def mahalanobis(threat, w: Tensor, x: Tensor, metric: Tensor) -> Tensor:
    """argmin over z in the set around x of sum_i metric_i (z_i - w_i)^2, metric > 0: the projection that AdaMM needs.

    For `Linf` the metric does not matter. For `L2` and `L1` one multiplier lambda makes z - x a shrunk w - x, by
    metric_i / (metric_i + lambda) or by soft thresholds lambda / metric_i; bisection finds it.
    Example: with a metric of ones this is `threat.project(w, x)`.
    """
    if isinstance(threat, Linf):
        return threat.project(w, x)
    if not isinstance(threat, (L2, L1)):
        raise ValueError(f"threat: got {threat!r}, want Linf, L2 or L1 for a projection in another metric")
    delta, metric = w - x, metric / _per_image(metric.flatten(1).amax(1), metric)

    def shrink(strength: Tensor) -> Tensor:
        s = _per_image(strength, w)
        if isinstance(threat, L2):
            return threat._clip(x + delta * metric / (metric + s))
        return threat._clip(x + delta.sign() * (delta.abs() - s / metric).clamp_min(0))

    low, high = torch.zeros_like(delta.flatten(1)[:, 0]), torch.full_like(delta.flatten(1)[:, 0], 1e-6)
    for _ in range(60):
        high = torch.where(threat.norm(shrink(high) - x) > threat.eps, 4 * high, high)
    for _ in range(60):
        middle = (low + high) / 2
        outside = threat.norm(shrink(middle) - x) > threat.eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    inside = _per_image(threat.norm(threat._clip(w) - x) <= threat.eps, w)
    return threat.project(torch.where(inside, threat._clip(w), shrink(high)), x)


@dataclass(frozen=True)
class Decoder:
    """A map from a smaller space of variables to perturbations: `decode` (R, *shape) -> (R, C, H, W); the attack starts at 0.

    Only differences to decode(0) are used, so that the start is the clean image.
    """

    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]


def resize(shape, size: int) -> Decoder:
    """Perturbations of `size` x `size` pixels, enlarged to (C, H, W) by bilinear interpolation: a decoder without training.

    Example: `resize((1, 28, 28), 14)` has 196 variables instead of 784.
    """
    c, h, w = shape
    checks.positive_int(size, "size")
    return Decoder((c, size, size), lambda v: F.interpolate(v, (h, w), mode="bilinear", align_corners=False))


def train_decoder(x: Tensor, *, channels: int = 16, steps: int = 300, seed: int | None = None) -> Decoder:
    """The decoding half of a convolutional autoencoder, trained on the attacker's own images; its code has half the side.

    min over both halves of |decode(encode(x)) - x|^2: conv-pool-conv, and conv-enlarge-conv back.

    Args:
        x: images (N, C, H, W) of the kind to be attacked; H and W even.
        channels: of the hidden layer.
        steps: of Adam, on batches of 64.
        seed: makes the result reproducible.
    Source: Tu et al. 2019, appendix (the autoencoder for MNIST).
    Example: `autozoom(oracle, x, y, decoder=train_decoder(x_own))`.
    """
    if checks.images(x).dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W) with even H and W")
    c, h, w = x.shape[1:]
    generator = randomness.own_generator(seed)
    with randomness.seeded(int(torch.randint(2**62, (), generator=generator))):
        encode = nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
                               nn.Conv2d(channels, c, 3, padding=1)).to(x)  # fmt: skip
        decode = nn.Sequential(nn.Conv2d(c, channels, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="nearest"),
                               nn.Conv2d(channels, c, 3, padding=1)).to(x)  # fmt: skip
    adam = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=3e-3)
    with torch.enable_grad():
        for _ in progress.bar(range(steps), desc="autoencoder", unit="step"):
            batch = x[torch.randint(len(x), (64,), generator=generator).to(x.device)]
            loss = (decode(encode(batch)) - batch).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return Decoder((c, h // 2, w // 2), decode.requires_grad_(False).eval())


def _nearest(
    predict, x, y, *, queries, estimator, optimiser, decoder=None, c=1.0, kappa=0.0, target=None, seed=None, name
) -> Tensor:
    """min |x' - x|^2 + c max(kappa - margin, 0): the nearest fooling point; last, a bisection towards x.

    x' = clip(x + decode(w) - decode(0)). c rises while x' stands and falls while it fools: w walks along the boundary.
    """
    x, oracle, generator = _checked(predict, x, y, queries, target, seed)
    checks.nonnegative(kappa, "kappa")
    if checks.nonnegative(c, "c") == 0:
        raise ValueError("c: got 0, want the weight of the loss > 0")
    descent = Queries(oracle, budget=queries - min(queries // 4, 10))  # the rest is for the bisection
    weight = torch.full((len(x),), float(c), dtype=x.dtype, device=x.device)
    best, nearest = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    decode = decoder.decode if decoder else lambda w: w
    start = x.new_zeros(len(x), *(decoder.shape if decoder else x.shape[1:]))
    zero = decode(start[:1])
    bar = progress.bar(total=len(x) * queries, desc=name, unit="query")

    def image(points: Tensor, index: Tensor) -> Tensor:
        return (x[problem.active[index]] + decode(points) - zero).clamp(0, 1)

    def ahead(z: Tensor, which: Tensor) -> Tensor:
        return margin(z, y[which]) if target is None else -margin(z, target[which])

    def hinge(z: Tensor, which: Tensor) -> Tensor:
        wanted = kappa + 2e-5 * (1 + z.abs().amax(1))
        return weight[which] * (wanted - ahead(z, which)).clamp_min(0)

    def f(points: Tensor, index: Tensor) -> Tensor:
        which = problem.active[index]
        return hinge(descent(image(points, index), which), which)

    def distance(points: Tensor, index: Tensor) -> Tensor:
        return (image(points, index) - x[problem.active[index]]).flatten(1).square().sum(1)

    def inside(w: Tensor, metric=None) -> Tensor:
        return w if decoder else (x[problem.active] + w).clamp(0, 1) - x[problem.active]

    def offer(points: Tensor, which: Tensor, door: Queries) -> tuple[Tensor, Tensor]:
        """Ask about new points, keep those that fool and are nearer than what is known."""
        z = checks.logits(door(points, which), y[which])
        if target is not None:
            checks.logits(z, target[which], "target")
        fooled = ahead(z, which) > kappa + 1e-5 * (1 + z.abs().amax(1))
        length = (points - x[which]).flatten(1).norm(dim=1)
        won = fooled & (length < nearest[which])
        best[which[won]], nearest[which[won]] = points[won], length[won]
        bar.update(oracle.total - bar.n)
        return z, fooled

    def look(w: Tensor) -> Tensor:
        which = problem.active
        z, fooled = offer(image(w, torch.arange(len(w), device=w.device)), which, descent)
        if problem.base is None:  # the clean images: one that is wrong already is left alone
            fooled = ahead(z, which) > 1e-5 * (1 + z.abs().amax(1))
            nearest[which[fooled]] = 0
        else:
            weight[which] *= torch.where(fooled, 0.8, 1.1).to(weight) ** (1 - problem.done)  # smaller and smaller turns
        problem.base = hinge(z, which)
        return nearest[which] > 0

    problem = Problem(f, estimator, generator, project=inside, penalty=distance,
                      active=torch.arange(len(x), device=x.device), door=descent)  # fmt: skip
    with bar:
        _run(problem, start, optimiser, look, descent, len(x))
        low, high, found = torch.zeros_like(nearest), torch.ones_like(nearest), best.clone()
        while True:
            paid = oracle.left(len(x)).to(x.device) > 0
            which = (nearest.isfinite() & (nearest > 0) & paid & (high - low > 1e-3)).nonzero().squeeze(1)
            if not len(which):
                return best
            middle = (low + high)[which] / 2
            _, fooled = offer(x[which] + _per_image(middle, x) * (found - x)[which], which, oracle)
            low[which], high[which] = torch.where(fooled, low[which], middle), torch.where(fooled, middle, high[which])


# --- the attacks: one line each --------------------------------------------------------------------------------------


def _climb(predict, x, y, threat, alpha, rule: Callable, *, queries: int, cost: int, **options) -> Tensor:
    """`_bounded` with the optimiser `rule(alpha)`, whose step takes `cost` queries.

    Without alpha: a fifth of the radius, or eight radii over as many steps as the budget allows, if that is less.
    """
    checks.positive_int(queries, "queries", least=0)
    if alpha is None:
        alpha = threat.full_step * min(0.2, 8 * cost / max(queries, 1))
    rule = rule(checks.nonnegative(alpha, "alpha"))
    return _bounded(predict, x, y, threat, queries=queries, optimiser=rule, **options)


def finite_difference(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int | None = None,
    estimator: Estimator | None = None,
    steps: int = 1,
    alpha: float | None = None,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """FGSM, or its iteration, on a gradient estimated coordinate by coordinate: P(x + alpha sign FD(l)) under `Linf`.

    On a linear model the estimate, and so the attack, is exact. `groups(k)` and `components(basis)` save queries.

    Args:
        predict: images -> scores (N, K), as logits, or a `Queries`. Points up to beta outside [0, 1] are asked about.
        x, y, threat, loss, target: as for `pgd`.
        queries: budget of each image; by default what `steps` steps need.
        estimator: by default `coordinates()`, 2 d queries a step.
        steps, alpha: number and length of the steps; alpha is by default the radius for one step, else 2.5 radii / steps.
        seed: makes random directions reproducible.
    Returns:
        The best image that was looked at, for each; the clean image if the budget does not allow a step.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Bhagoji et al. 2018.
    Example: `finite_difference(model, x, y, Linf(0.1), estimator=groups(8))`.
    """
    estimator = estimator or coordinates()
    checks.positive_int(steps, "steps")
    needed = 1 + steps * (1 + estimator.queries(checks.images(x)[0].numel()))
    alpha = (
        threat.full_step * (1 if steps == 1 else 2.5 / steps) if alpha is None else checks.nonnegative(alpha, "alpha")
    )
    return _bounded(predict, x, y, threat, queries=needed if queries is None else queries, estimator=estimator, loss=loss,
                    optimiser=steepest(alpha), target=target, seed=seed, steps=steps, name="finite differences")  # fmt: skip


def nes(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 1000,
    q: int = 20,
    sigma: float = 0.01,
    momentum: float = 0.9,
    alpha: float | None = None,
    loss: str | Callable = "margin",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Projected steepest ascent on the NES gradient: q answers at x +- sigma u a step, u Gaussian, in antithetic pairs.

    Args: see `zo_signsgd`; q is even, sigma the length of the differences (for each coordinate of u).
    Source: Ilyas et al. 2018.
    Example: `nes(model, x, y, Linf(0.1), queries=2000, seed=0)`.
    """
    if checks.positive_int(q, "q", least=2) % 2:
        raise ValueError(f"q: got {q}, want an even number: the queries come in pairs")
    estimator = random_directions(q // 2, beta=sigma, kind="gaussian")
    return _climb(predict, x, y, threat, alpha, lambda alpha: steepest(alpha, momentum=momentum), queries=queries,
                  estimator=estimator, loss=loss, target=target, seed=seed, cost=q, name="NES")  # fmt: skip


def zo_signsgd(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 1000,
    q: int = 20,
    beta: float = 0.1,
    momentum: float = 0.9,
    alpha: float | None = None,
    loss: str | Callable = "margin",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZO-signSGD: x <- P(x + alpha sign(m)), m the running mean of estimates along q random directions, one-sided.

    Args:
        predict: images -> scores (N, K), or a `Queries` around it. Points up to beta outside [0, 1] are asked about.
        x, y: images (N, ...) in [0, 1] and int64 labels (N,).
        threat: the feasible set, of `tmlcourse.threat`.
        queries: budget of each image (>= 0), the look at the clean image and at every step included.
        q: directions of an estimate.
        beta: length of the differences.
        momentum: weight of the past in the running mean, in [0, 1); 0 is the paper's algorithm.
        alpha: length of a step in the set's units; by default a fifth of the radius, less with a large budget.
        loss, target: as for `pgd`.
        seed: makes the directions reproducible.
    Returns:
        For each image the best point that was looked at; an image leaves as soon as it falls.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Liu S. et al. 2019.
    Example: `zo_signsgd(model, x, y, Linf(0.1), queries=2000, seed=0)`.
    """
    estimator = random_directions(q, beta=beta, antithetic=False)
    return _climb(predict, x, y, threat, alpha, lambda alpha: sign(alpha, momentum=momentum), queries=queries,
                  estimator=estimator, loss=loss, target=target, seed=seed, cost=q, name="ZO-signSGD")  # fmt: skip


def zo_svrg(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 1000,
    q: int = 10,
    every: int = 5,
    anchor: int = 50,
    beta: float = 0.1,
    momentum: float = 0.9,
    alpha: float | None = None,
    loss: str | Callable = "margin",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZO-SVRG: steps along g_u(x) - g_u(x~) + g(x~), with the same q directions u twice and `anchor` of them every few steps.

    In the paper the sum is over data; here the randomness to reduce is that of the directions. See `svrg` and `Mean`.
    Args: see `zo_signsgd`; `every` steps x~ moves on.
    Source: Liu S. et al. 2018.
    Example: `zo_svrg(model, x, y, Linf(0.1), queries=2000, seed=0)`.
    """
    cheap, good = (random_directions(k, beta=beta, antithetic=False) for k in (q, anchor))
    rule = lambda alpha: svrg(steepest(alpha, momentum=momentum), every=every, anchor=good)  # noqa: E731
    return _climb(predict, x, y, threat, alpha, rule, queries=queries, estimator=cheap, loss=loss, target=target, seed=seed,
                  cost=2 * q + anchor // every, name="ZO-SVRG")  # fmt: skip


def zo_adam(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 1000,
    q: int = 20,
    beta: float = 0.1,
    alpha: float | None = None,
    loss: str | Callable = "margin",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZO-AdaMM: Adam with the largest second moment kept, and the projection in Adam's own metric (`Linf`, `L2`, `L1`).

    Args: see `zo_signsgd`.
    Source: Chen X. et al. 2019.
    Example: `zo_adam(model, x, y, Linf(0.1), queries=2000, seed=0)`.
    """
    estimator = random_directions(q, beta=beta, antithetic=False)
    return _climb(predict, x, y, threat, alpha, lambda alpha: adam(alpha, beta2=0.9, largest=True), queries=queries,
                  estimator=estimator, loss=loss, target=target, seed=seed, cost=q, name="ZO-AdaMM")  # fmt: skip


def zo_ngd(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 1000,
    q: int = 20,
    beta: float = 0.1,
    damping: float = 1.0,
    momentum: float = 0.9,
    alpha: float | None = None,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZO natural gradient: steepest steps along (Fisher + gamma I)^-1 g, both from the same q queries.

    Args: see `zo_signsgd` and `natural`.
    Source: Zhao P. et al. 2020.
    Example: `zo_ngd(model, x, y, Linf(0.1), queries=2000, seed=0)`.
    """
    estimator = random_directions(q, beta=beta, antithetic=False)
    rule = lambda alpha: natural(alpha, damping=damping, momentum=momentum)  # noqa: E731
    return _climb(predict, x, y, threat, alpha, rule, queries=queries, estimator=estimator, loss=loss, target=target,
                  seed=seed, cost=q, name="ZO-NGD")  # fmt: skip


def zo_admm(
    predict,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = 1000,
    q: int = 20,
    beta: float = 0.1,
    rho: float = 10.0,
    eta: float = 30.0,
    c: float = 1.0,
    kappa: float = 0.0,
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZO-ADMM: the nearest fooling image in L2, the distortion and the loss minimised by turns (see `admm`).

    Args: see `zoo`.
    Source: Zhao P. et al. 2019.
    Example: `zo_admm(model, x, y, queries=2000, seed=0)`.
    """
    estimator = random_directions(q, beta=beta, antithetic=False)
    return _nearest(predict, x, y, queries=queries, estimator=estimator, optimiser=admm(rho, eta=eta), c=c, kappa=kappa,
                    target=target, seed=seed, name="ZO-ADMM")  # fmt: skip


def zoo(
    predict,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = 1000,
    solver: str = "adam",
    k: int = 8,
    size: int | None = None,
    beta: float = 1e-2,
    lr: float = 0.3,
    c: float = 1.0,
    kappa: float = 0.0,
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """ZOO: min over delta of |delta|_2^2 + c max(kappa - margin, 0), by two-sided differences along k coordinates a step.

    Args:
        predict: images -> scores (N, K), as logits or log-probabilities; or a `Queries` around it.
        x, y: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        queries: budget of each image (>= 0). Up to 10 of them go to a bisection towards x at the end.
        solver: "adam", with a clock for each coordinate, or "newton", with second differences.
        k: coordinates a step (2 k queries, and one to look at the new point).
        size: side of a smaller attack space, enlarged to the image by bilinear interpolation; none without.
        beta: length of the differences.
        lr: step of the solver, in pixel units; Adam's falls to 0 as the budget is spent.
        c: weight of the loss at the start; it then rises by 10 % at a step that fails and falls by 20 % at one that fools;
            the paper restarts with nine values of c.
        kappa: margin (in the units of the scores) by which the wrong class must lead.
        target: int64 labels (N,) that the attacker wants to see instead; untargeted without.
        seed: makes the choice of coordinates reproducible.
    Returns:
        The nearest fooling image that was looked at; the clean one where there was none or where it was wrong from the start.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Chen P.-Y. et al. 2017.
    Example: `zoo(model, x, y, queries=2000, size=14, seed=0)`.
    """
    steps = {"adam": lambda lr: adam(lr, decay=True), "newton": newton}
    decoder = None if size is None else resize(checks.images(x).shape[1:], size)
    step = steps[checks.choice(solver, "solver", steps)](lr)
    return _nearest(predict, x, y, queries=queries, estimator=coordinates(k, beta=beta), optimiser=step, decoder=decoder,
                    c=c, kappa=kappa, target=target, seed=seed, name="ZOO")  # fmt: skip


def autozoom(
    predict,
    x: Tensor,
    y: Tensor,
    *,
    queries: int = 1000,
    decoder: Decoder | None = None,
    q: int = 10,
    b: float | None = None,
    beta: float = 0.1,
    lr: float = 0.03,
    c: float = 1.0,
    kappa: float = 0.0,
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """AutoZOOM: Adam on the one-sided estimate of q random directions, scaled by b, in the space of a decoder.

    Args: see `zoo`; `decoder` as from `train_decoder` or `resize`, by default half the side by `resize`; b = d by default.
    Source: Tu et al. 2019.
    Example: `autozoom(model, x, y, decoder=train_decoder(x_own), queries=2000, seed=0)`.
    """
    decoder = decoder or resize(checks.images(x).shape[1:], max(1, x.shape[2] // 2))
    estimator = random_directions(q, beta=beta, antithetic=False, b=b)
    return _nearest(predict, x, y, queries=queries, estimator=estimator, optimiser=adam(lr, decay=True), decoder=decoder,
                    c=c, kappa=kappa, target=target, seed=seed, name="AutoZOOM")  # fmt: skip
