"""Minimum-norm attacks: the nearest image that the model gets wrong.

The attacker solves  min ||r||  subject to  h(x + r) != y (or = target),  x + r in [0, 1]^d.  `deepfool` and `fab` replace
the model by its tangent and step to the nearest boundary; `lbfgs`, `carlini_wagner` and `elastic_net` turn the constraint
into a penalty and search for its weight c; `jsma` and `one_pixel` count changed entries.

All share three conventions. An image counts as fooled when the wrong class leads by more than rounding. What comes back is
the nearest fooled point met, and the clean image where there was none or where the model was wrong from the start. Images
that are done leave the batch and waiting ones take their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress, randomness
from ..layout import fast_layout, images_at_once
from ..threat import L0, L1, L2, Linf
from .losses import margin

_ROUNDS = 12  # how often Carlini & Wagner's L0 and Linf attacks shrink what they have
_REACH = 0.9  # the a of `_adam`
_BALLS = {"linf": Linf(0.0), "l2": L2(0.0), "l1": L1(0.0), "l0": L0(0)}


def deepfool(
    model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    target: Tensor | None = None,
    candidates: int = 10,
    refine: int = 5,
    batch_size: int | None = None,
) -> Tensor:
    """DeepFool: step to the nearest boundary of the model's tangent until the label changes.

    With f_k = z_k - z_y and w_k = grad f_k, take the class k whose boundary f_k + <w_k, r> = 0 is nearest, and step there:
    r = |f_k| w_k / ||w_k||_2^2 under L2, |f_k| sign(w_k) / ||w_k||_1 under Linf, the entries of largest |w_k| filled one
    after the other under L1; then clip to [0, 1]. On a linear model one step is exact where no pixel meets the box; where
    some do, the clipped steps add up to min(s |w_i|, room_i) or min(s, room_i), which is again the exact form.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1].
        y: int64 labels (N,).
        norm: "l2", "linf" or "l1", the length to make small.
        steps: most steps an image takes (>= 1).
        overshoot: each step goes this fraction too far (>= 0), because a boundary bends.
        target: int64 labels (N,) that the attacker wants to see instead, none equal to y; untargeted without.
        candidates: how many classes, of largest logits, are considered (>= 1).
        refine: forward passes of a last search for the crossing between x and the point found (>= 0; 0 is the
            published algorithm, which keeps the overshoot).
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
    Returns:
        Adversarial images, shape, dtype and device of x, in [0, 1]; the clean image where none was found.
    Raises:
        TypeError, ValueError: bad input, before any work; the message names the argument, what came and what is wanted.
    Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, Algorithms 1 and 2.
    Example: `(deepfool(model, x, y) - x).flatten(1).norm(dim=1)`.
    """
    checks.choice(norm, "norm", ("l2", "linf", "l1"))
    checks.positive_int(steps, "steps")
    checks.nonnegative(overshoot, "overshoot")
    checks.positive_int(candidates, "candidates")
    checks.positive_int(refine, "refine", least=0)
    forward, best, todo, size = _prepare(model, x, y, target, norm, batch_size)
    point, step = best.clean.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    active, waiting = todo[:size], todo[size:]
    with progress.bar(total=len(todo), desc="DeepFool", unit="image") as bar:
        while len(active):
            f, w = _boundaries(forward, best, active, point[active], candidates)
            here = point[active].flatten(1)
            k, r = _nearest_plane(here, f, w, norm)
            if norm != "l1":
                # The formula, which does not know the box: on networks shorter steps, more of them, end nearer to x.
                rows = torch.arange(len(k), device=k.device)
                f, w = f[rows, k], w[rows, k]
                along = w if norm == "l2" else w.sign()
                r = along * (-f / (w * along).sum(1).clamp_min(1e-30))[:, None]
            moved = (here + (1 + overshoot) * r).clamp(0, 1).view_as(point[active])
            with torch.no_grad():
                done = best.offer(active, moved, forward(moved))
            point[active] = moved
            step[active] += 1
            done = done | (step[active] == steps) | (moved.flatten(1) == here).all(1)
            bar.update(int(done.sum()))
            active, waiting = _refill(active[~done], waiting, size)
    _refine(forward, best, todo, refine, size)
    return best.x


def fab(
    model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    steps: int = 100,
    target: Tensor | None = None,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    candidates: int = 10,
    refine: int = 5,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Fast Adaptive Boundary: walk along the decision boundary towards the clean image.

    The boundary's tangent plane at x^i is projected on twice, from x^i (step r_i) and from the clean x (step r_0), and

        x^{i+1} = (1 - a)(x^i + eta r_i) + a (x + eta r_0),   a = min(||r_i|| / (||r_i|| + ||r_0||), alpha_max).

    Where x^{i+1} fools the model it is kept if nearest, and the walk goes on from x + beta (x^{i+1} - x).

    Args:
        steps, restarts: steps of a walk, and walks (both >= 1); every walk but the first begins at a random point half as far
            as the nearest found.
        alpha_max: largest pull towards the clean image (in [0, 1]).
        eta: overshoot of the projections (>= 1).
        beta: how far the walk goes back once over the boundary (in (0, 1)).
        seed: makes the random starts reproducible; without it torch's own generator is used.
        Others: as for `deepfool`.
    Returns, raises: as for `deepfool`.
    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack".
    Example: `Linf(0).norm(fab(model, x, y, norm="linf", steps=50) - x)`.
    """
    checks.choice(norm, "norm", ("linf", "l2", "l1"))
    _check_fab(steps, restarts, alpha_max, eta, beta)
    checks.positive_int(candidates, "candidates")
    checks.positive_int(refine, "refine", least=0)
    forward, best, todo, size = _prepare(model, x, y, target, norm, batch_size)
    generator = randomness.generator(seed, x.device)
    with progress.bar(total=restarts * steps * len(todo), desc="FAB", unit="step") as bar:
        for restart in range(restarts):
            start = best.clean if restart == 0 else _random_start(best, norm, 1.0, generator)
            _walk(forward, best, todo, start, norm, steps, (alpha_max, eta, beta), candidates, 0.0, size, bar)
    _refine(forward, best, todo, refine, size)
    return best.x


def fab_bounded(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    stop_early: bool = True,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """FAB for a fixed budget: one walk towards each of the most likely wrong classes; what lies in the threat set is kept.

    Args:
        threat: `Linf`, `L2` or `L1` of `tmlcourse.threat`.
        targets: how many classes, of largest logits, are tried one after the other (>= 1; K - 1 at most are).
        stop_early: let an image go once a point inside the set fools the model; else the nearest is sought.
        Others: as for `fab`.
    Returns:
        Images inside the threat set and [0, 1]; the clean image where no fooling one was found inside.
    Raises: as for `deepfool`.
    Source: Croce & Hein 2020 (FAB-T, the targeted member of AutoAttack).
    Example: `fab_bounded(model, x, y, Linf(0.3), targets=9, steps=100, seed=0)`.
    """
    names = {Linf: "linf", L2: "l2", L1: "l1"}
    norm = names.get(type(threat))
    if norm is None:
        raise TypeError(f"threat: got {threat!r}, want Linf, L2 or L1")
    checks.positive_int(targets, "targets")
    _check_fab(steps, restarts, alpha_max, eta, beta)
    forward, best, todo, size = _prepare(model, x, y, None, norm, batch_size)
    generator = randomness.generator(seed, x.device)
    ranked = best.logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
    goals = ranked[:, :targets]
    enough = threat.eps if stop_early else 0.0
    with progress.bar(total=restarts * goals.shape[1] * steps * len(todo), desc="FAB", unit="step") as bar:
        for restart in range(restarts):
            for column in range(goals.shape[1]):
                queue = todo[best.distance[todo] > enough]
                bar.update(steps * (len(todo) - len(queue)))
                start = best.clean if restart == 0 else _random_start(best, norm, threat.eps, generator)
                rules = (alpha_max, eta, beta)
                _walk(forward, best, queue, start, norm, steps, rules, 1, enough, size, bar, goals[:, column])
    _refine(forward, best, todo[best.distance[todo] > threat.eps], 5, size)
    inside = threat.contains(best.x, best.clean, tolerance=1e-7) & torch.isfinite(best.distance)
    return torch.where(_rows(inside, x), best.x, best.clean)


def carlini_wagner(
    model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 50,
    search: int = 5,
    lr: float = 0.1,
    kappa: float = 0.0,
    target: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Carlini & Wagner: minimise the distance plus c times a hinge on the logits, and search for c.

    L2: min over u of ||x' - x||_2^2 + c f(x'), x' = (tanh(u) + 1) / 2, f = max(z_y - max_{j != y} z_j + kappa, 0), by Adam;
    the smallest c that succeeds is bracketed and bisected, image by image, from the c that a linear model would need.
    L0: solve under L2, freeze the entries that contribute least, grad f_i |r_i|, and solve again while that succeeds.
    Linf: solve with every |r_i| <= tau, for a tau that shrinks while that succeeds (the paper penalises what exceeds tau
    instead of forbidding it).

    Args:
        norm: "l2", "l0" (changed entries) or "linf".
        steps: steps of Adam for each c, mask or tau (>= 1).
        search: how many values of c are tried under L2 (>= 1).
        lr: learning rate of Adam in u (> 0), falling to zero over each run.
        kappa: by how much the wrong class must lead (>= 0, in logits). What comes back leads by more than that.
        Others: as for `deepfool`.
    Returns, raises: as for `deepfool`; with kappa > 0 an image without a point of that margin comes back clean.
    Source: Carlini & Wagner 2017, sections V and VI.
    Example: `carlini_wagner(model, x, y, kappa=5.0)`.
    """
    checks.choice(norm, "norm", ("l2", "l0", "linf"))
    checks.positive_int(steps, "steps")
    checks.positive_int(search, "search")
    checks.positive(lr, "lr")
    checks.nonnegative(kappa, "kappa")
    forward, best, todo, size = _prepare(model, x, y, target, "linf" if norm == "linf" else "l2", batch_size, kappa)
    if not len(todo):
        return best.x
    rounds = search if norm == "l2" else search + _ROUNDS
    with progress.bar(total=rounds * steps * len(todo), desc="C&W", unit="step") as bar:
        run = (forward, best, todo, steps, lr, size, bar)
        c, start = _linear(forward, best, todo, size, "linf" if norm == "linf" else "l2")
        c = _search_c(run, c, start, search, first_only=norm != "l2")
        _refine(forward, best, todo, 5, size)
        if norm == "l0":
            best = _freeze(run, c)
        elif norm == "linf":
            _shrink(run, c)
            _refine(forward, best, todo, 5, size)
    return best.x


def elastic_net(
    model,
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1.0,
    rule: str = "l1",
    steps: int = 50,
    search: int = 4,
    lr: float = 0.03,
    kappa: float = 0.0,
    target: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Elastic-net attack (EAD): min over r of c f(x + r) + beta ||r||_1 + ||r||_2^2 with x + r in [0, 1].

    FISTA: a gradient step on c f + ||r||_2^2 from the extrapolated point, then shrinkage of each entry towards the clean
    pixel, S(z) = z - t, x or z + t for z - x above, inside and below the band [-t, t], with t = lr beta; then the box.
    c is searched for as in `carlini_wagner`.

    Args:
        beta: weight of the L1 norm (>= 0). The paper shrinks by beta whatever the step, so that its beta divided by its step
            is this one.
        rule: which success counts as nearest: "en", beta ||r||_1 + ||r||_2^2, or "l1".
        lr: step size (> 0), falling as the square root of the steps left.
        Others: as for `carlini_wagner`.
    Returns, raises: as for `carlini_wagner`.
    Source: Chen, Sharma, Zhang, Yi & Hsieh 2018; Beck & Teboulle 2009 for FISTA.
    Example: `(elastic_net(model, x, y) - x).flatten(1).abs().sum(1)`.
    """
    checks.nonnegative(beta, "beta")
    checks.choice(rule, "rule", ("en", "l1"))
    checks.positive_int(steps, "steps")
    checks.positive_int(search, "search")
    checks.positive(lr, "lr")
    checks.nonnegative(kappa, "kappa")

    def elastic(r: Tensor) -> Tensor:
        return beta * _BALLS["l1"].norm(r) + r.flatten(1).square().sum(1)

    measure = elastic if rule == "en" else _BALLS["l1"].norm
    forward, best, todo, size = _prepare(model, x, y, target, measure, batch_size, kappa)
    if not len(todo):
        return best.x
    c, _ = _linear(forward, best, todo, size)
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    with progress.bar(total=search * steps * len(todo), desc="EAD", unit="step") as bar:
        for _ in range(search):
            found = _fista(forward, best, todo, c, beta, steps, lr, size, bar)
            c, low, high = _next_c(c, low, high, found)
    _refine(forward, best, todo, 5, size)
    return best.x


def _fista(forward, best, queue, c, beta, steps, lr, size, bar) -> Tensor:
    """One run for the given c; which images were fooled in it, bool (N,).

    The candidates are the extrapolated points, whose logits the gradient needs anyway: they are sparse where two iterates
    are.
    """
    at, ahead = best.x.clone(), best.x.clone()  # the iterate, and the extrapolated point
    step = torch.zeros(len(at), dtype=torch.int64, device=at.device)
    found = torch.zeros(len(at), dtype=torch.bool, device=at.device)
    active, waiting = queue[:size], queue[size:]
    while len(active):
        x = best.clean[active]
        y_k = ahead[active].requires_grad_()
        with torch.enable_grad():
            z = forward(y_k)
            loss = c[active] * best.hinge(active, z) + (y_k - x).flatten(1).square().sum(1)
            (grad,) = torch.autograd.grad(loss.sum(), y_k)
        y_k = y_k.detach()
        found[active] |= best.offer(active, y_k, z.detach())
        k = step[active].to(x.dtype)
        rate = _rows(lr * (1 - k / steps).sqrt(), x)
        new = _shrink_towards(y_k - rate * grad, x, rate * beta)
        ahead[active] = (new + _rows(k / (k + 3), x) * (new - at[active])).clamp(0, 1)
        at[active] = new
        step[active] += 1
        bar.update(len(active))
        active, waiting = _refill(active[step[active] < steps], waiting, size)
    return found


def _shrink_towards(z: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Soft thresholding about x, in the box: argmin over v in [0, 1]^d of t ||v - x||_1 + ||v - z||_2^2 / 2."""
    r = z - x
    return (x + r.sign() * (r.abs() - t).clamp_min(0)).clamp(0, 1)


def lbfgs(
    model,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 20,
    search: int = 8,
    memory: int = 6,
    target: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Box-constrained L-BFGS: min over r of c ||r||_2^2 + l(x + r), x + r in [0, 1], for the largest c that still fools.

    l = log(1 + exp(z_y - max_{j != y} z_j)), with a target log(1 + exp(max_{j != t} z_j - z_t)): for two classes the
    cross-entropy of the wrong class. c is bracketed and bisected on a logarithmic scale, image by image.
    A run begins at the nearest point known, the first one where the tangent at x vanishes.
    Each image has its own memory and its own line search, but all share the model's forward and backward passes.

    Args:
        steps: evaluations of the model for each c (>= 1).
        search: how many values of c are tried (>= 1).
        memory: pairs of differences kept (>= 1).
        Others, returns, raises: as for `deepfool`; the length is that of L2.
    Source: Szegedy et al. 2014, section 4.1; Nocedal & Wright 2006, algorithm 7.4, with projection on the box.
    Example: `(lbfgs(model, x, y) - x).flatten(1).norm(dim=1)`.
    """
    checks.positive_int(steps, "steps")
    checks.positive_int(search, "search")
    checks.positive_int(memory, "memory")
    forward, best, todo, size = _prepare(model, x, y, target, "l2", batch_size)
    if not len(todo):
        return best.x
    c, start = _linear(forward, best, todo, size)
    c = 1 / c
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)  # low fools, high does not
    with progress.bar(total=search * steps * len(todo), desc="L-BFGS", unit="step") as bar:
        for _ in range(search):
            found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            start = torch.where(_rows(torch.isfinite(best.distance), x), best.x, start)
            for index in todo.split(size):
                found[index] = _projected_lbfgs(forward, best, index, start[index], c[index], steps, memory)
                bar.update(steps * len(index))
            low, high = torch.where(found, c, low), torch.where(found, high, c)
            middle = (low * high).sqrt()
            c = torch.where(low == 0, high / 5, torch.where(high.isinf(), low * 5, middle))
    _refine(forward, best, todo, 5, size)
    return best.x


def _projected_lbfgs(forward, best, index, point, c, steps, memory) -> Tensor:
    """Minimise from `point` for the images `index`; which of them were fooled on the way.

    Entries that lie on the box with a gradient that pushes them out are held. Each evaluation serves one trial step of every
    image: those whose trial lowers the loss enough (Armijo) take it, the others halve theirs.
    """
    x = best.clean[index]
    found = torch.zeros(len(index), dtype=torch.bool, device=x.device)

    def evaluate(point):
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            z = forward(point)
            loss = c * (point - x).flatten(1).square().sum(1) + F.softplus(-best.ahead(index, z))
            (grad,) = torch.autograd.grad(loss.sum(), point)
        found.logical_or_(best.offer(index, point.detach(), z.detach()))
        return loss.detach(), grad.flatten(1)

    loss, grad = evaluate(point)
    size, d = grad.shape
    s = grad.new_zeros(memory, size, d)
    q, rho = torch.zeros_like(s), grad.new_zeros(memory, size)
    scale = 1 / (2 * c)  # the inverse Hessian of the penalty alone
    length = torch.ones_like(loss)
    for _ in range(steps - 1):
        flat = point.flatten(1)
        held = ((flat <= 0) & (grad > 0)) | ((flat >= 1) & (grad < 0))
        free = grad.masked_fill(held, 0)
        step = _two_loops(free, s, q, rho, scale).masked_fill(held, 0)
        uphill = (step * free).sum(1, keepdim=True) <= 0
        step = torch.where(uphill, free * scale[:, None], step)
        trial = (flat - length[:, None] * step).clamp(0, 1)
        new_loss, new_grad = evaluate(trial.view_as(x))
        taken = new_loss <= loss + 1e-4 * (free * (trial - flat)).sum(1)
        dx, dg = trial - flat, new_grad - grad
        curved = (dx * dg).sum(1)
        push = taken & (curved > 1e-10 * dg.square().sum(1)) & (curved > 0)
        s = torch.where(push[:, None], torch.cat([s[1:], dx[None]]), s)
        q = torch.where(push[:, None], torch.cat([q[1:], dg[None]]), q)
        rho = torch.where(push, torch.cat([rho[1:], (1 / curved)[None]]), rho)
        scale = torch.where(push, curved / dg.square().sum(1), scale)
        point = torch.where(_rows(taken, x), trial.view_as(x), point)
        loss, grad = torch.where(taken, new_loss, loss), torch.where(taken[:, None], new_grad, grad)
        length = torch.where(taken, 1.0, length / 2)
    return found


def _two_loops(grad: Tensor, s: Tensor, q: Tensor, rho: Tensor, scale: Tensor) -> Tensor:
    """The L-BFGS direction H grad of each row; s, q, rho hold the newest pair last and zeros where there is none yet."""
    a = []
    for i in reversed(range(len(s))):
        a.append(rho[i] * (s[i] * grad).sum(1))
        grad = grad - a[-1][:, None] * q[i]
    grad = scale[:, None] * grad
    for i in range(len(s)):
        grad = grad + (a[-1 - i] - rho[i] * (q[i] * grad).sum(1))[:, None] * s[i]
    return grad


def jsma(
    model,
    x: Tensor,
    y: Tensor,
    *,
    theta: float = 1.0,
    budget: float = 0.25,
    target: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Jacobian saliency map: change the two entries that help the target most and the other classes least, again and again.

    With a_i = d_i dz_t / dx_i and b_i = d_i d(sum_{j != t} z_j) / dx_i, d_i the part of theta that entry i can move by before
    it meets the box, the pair (p, q) maximises -(a_p + a_q)(b_p + b_q) among those with a_p + a_q > 0 > b_p + b_q. (The
    paper has d_i = theta for every entry that is not used up.) Pairs are formed from the up to 80 entries that lead in some
    mixture of a and -b.

    Args:
        theta: what is added to an entry at a time (in [-1, 1], not 0); 1 paints white, -1 black.
        budget: largest share of an image's entries that may change (in (0, 1]).
        target: the class to reach; without, the runner-up of the clean image, and any wrong class counts.
        Others, returns, raises: as for `deepfool`; the length is the number of changed entries.
    Source: Papernot et al. 2016, algorithms 2 and 3, on the logits (JSMA-Z of Carlini & Wagner 2017).
    Example: `(jsma(model, x, y) != x).flatten(1).sum(1)`.
    """
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < abs(theta) <= 1:
        raise ValueError(f"theta: got {theta!r}, want a number in [-1, 1] other than 0")
    if not 0 < checks.nonnegative(budget, "budget") <= 1:
        raise ValueError(f"budget: got {budget}, want a share in (0, 1]")
    forward, best, todo, size = _prepare(model, x, y, target, "l0", batch_size)
    goal = target if target is not None else best.logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    point, changed = best.clean.clone(), torch.zeros_like(x.flatten(1), dtype=torch.bool)
    most = max(2, int(budget * changed.shape[1])) if changed.shape[1] > 1 else 1
    active, waiting = todo[:size], todo[size:]
    with progress.bar(total=len(todo), desc="JSMA", unit="image") as bar:
        while len(active):
            here = point[active].requires_grad_()
            with torch.enable_grad():
                z = forward(here)
                (a,) = torch.autograd.grad(z.gather(1, goal[active, None]).sum(), here, retain_graph=True)
                (total,) = torch.autograd.grad(z.sum(), here)
            a, b, flat = a.flatten(1), (total - a).flatten(1), here.detach().flatten(1)
            change = (flat + theta).clamp(0, 1) - flat  # what the box leaves of theta
            pair, gain = _best_pair(a * change, -b * change, change != 0)
            moved = flat.scatter_add(1, pair, torch.full_like(flat[:, :2], theta) * (gain > 0)[:, None]).clamp(0, 1)
            moved = moved.view_as(here)
            with torch.no_grad():
                done = best.offer(active, moved, forward(moved)) | (gain <= 0)
            point[active] = moved
            changed[active] = (moved != best.clean[active]).flatten(1)
            done = done | (changed[active].sum(1) + 2 > most)
            bar.update(int(done.sum()))
            active, waiting = _refill(active[~done], waiting, size)
    return best.x


def _best_pair(a: Tensor, b: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the two entries p != q with the largest (a_p + a_q)(b_p + b_q), both sums positive: (N, 2), gain (N,)."""
    unit = [v / v.abs().amax(1, keepdim=True).clamp_min(1e-30) for v in (a, b)]
    scores = [((1 - t) * unit[0] + t * unit[1]).masked_fill(~usable, -torch.inf) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    pool = torch.cat([score.topk(min(16, a.shape[1]), dim=1).indices for score in scores], 1)
    ok, a, b = usable.gather(1, pool), a.gather(1, pool), b.gather(1, pool)
    sum_a, sum_b = a[:, :, None] + a[:, None], b[:, :, None] + b[:, None]
    allowed = (pool[:, :, None] != pool[:, None]) & ok[:, :, None] & ok[:, None] & (sum_a > 0) & (sum_b > 0)
    gain, where = (sum_a * sum_b).masked_fill(~allowed, 0).flatten(1).max(1)
    n = pool.shape[1]
    return torch.stack([pool.gather(1, (where // n)[:, None]), pool.gather(1, (where % n)[:, None])], 2)[:, 0], gain


def one_pixel(
    model,
    x: Tensor,
    y: Tensor,
    *,
    pixels: int = 1,
    population: int = 100,
    steps: int = 30,
    target: Tensor | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Differential evolution over the place and the value of one pixel (or a few): needs scores only, no gradient.

    A candidate is (row, column, value of each channel) for each pixel. Each round makes for each candidate i the child
    a + 0.5 (b - c) of three others drawn at random, which replaces i if the model likes the wrong class better on it.

    Args:
        model: any function that returns scores (N, K).
        x: images (N, C, H, W) in [0, 1].
        pixels: how many pixels may change (>= 1), each with all its channels.
        population, steps: candidates of an image (>= 4), and rounds (>= 1): population (1 + steps) queries at most.
        seed: makes the search reproducible; without it torch's own generator is used.
        Others, returns, raises: as for `deepfool`; an image is let go as soon as it fools.
    Source: Su, Vargas & Sakurai 2019; Storn & Price 1997 for differential evolution.
    Example: `one_pixel(model, x, y, pixels=1, seed=0)`.
    """
    checks.positive_int(pixels, "pixels")
    checks.positive_int(population, "population", least=4)
    checks.positive_int(steps, "steps")
    if checks.images(x).dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (N, C, H, W)")
    forward, best, todo, size = _prepare(model, x, y, target, "l0", batch_size)
    generator = randomness.generator(seed, x.device)
    per_round = max(1, 10 * size // population)  # images searched at once
    with progress.bar(total=(1 + steps) * len(todo), desc="one pixel", unit="round") as bar, torch.no_grad():
        for index in todo.split(per_round):
            _evolve(forward, best, index, pixels, population, steps, generator, bar)
    return best.x


def _evolve(forward, best, index, pixels, population, steps, generator, bar) -> None:
    """Differential evolution for the images `index`, each with its own population; genes in [0, 1]."""
    x = best.clean
    c, h, w = x.shape[1:]

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)

    def paint(genes):  # (M, P, pixels * (2 + c)) -> images (M * P, C, H, W)
        m, p = genes.shape[:2]
        genes = genes.view(m * p, pixels, 2 + c)
        row, column = (genes[..., 0] * h).long().clamp_max(h - 1), (genes[..., 1] * w).long().clamp_max(w - 1)
        out = x[index].repeat_interleave(p, 0).flatten(2)
        place = (row * w + column)[:, None].expand(-1, c, -1)
        return out.scatter(2, place, genes[..., 2:].transpose(1, 2)).view(m * p, c, h, w)

    def score(genes):  # the lead of the wrong class, (M, P); successes are kept on the way
        m, p = genes.shape[:2]
        owner, points = index.repeat_interleave(p), paint(genes)
        z = torch.cat([forward(part) for part in points.split(1000)])
        ahead = best.ahead(owner, z).view(m, p)
        first = ahead.argmax(1) + p * torch.arange(m, device=x.device)
        fooled = best.offer(index, points[first], z[first])
        return ahead, fooled

    genes = rand(len(index), population, pixels * (2 + c))
    value, fooled = score(genes)
    for _ in range(steps):
        bar.update(len(index))
        index, genes, value = index[~fooled], genes[~fooled], value[~fooled]
        if not len(index):
            return
        # Three different others: a random ranking of the population, with oneself pushed to the end.
        rank = rand(len(index), population, population) + 2 * torch.eye(population, dtype=x.dtype, device=x.device)
        others = rank.topk(3, dim=2, largest=False).indices
        a, b, d = (genes.gather(1, others[..., i, None].expand_as(genes)) for i in range(3))
        child = a + 0.5 * (b - d)
        child = torch.where((child < 0) | (child > 1), rand(*child.shape), child)
        child_value, fooled = score(child)
        better = child_value > value
        genes, value = torch.where(better[..., None], child, genes), torch.where(better, child_value, value)


# --- what they share -------------------------------------------------------------------------------------------------


@dataclass
class _Nearest:
    """The nearest point met so far that fools the model, for each image: the clean one, at infinity, until there is one."""

    clean: Tensor
    x: Tensor
    distance: Tensor
    y: Tensor
    target: Tensor | None
    logits: Tensor  # of the clean images
    measure: Callable[[Tensor], Tensor]
    kappa: float

    def ahead(self, index: Tensor, z: Tensor) -> Tensor:
        """By how much the wrong class (with a target: the target) leads. (M,), (M, K) -> (M,)."""
        return margin(z, self.y[index]) if self.target is None else -margin(z, self.target[index])

    def needed(self, z: Tensor) -> Tensor:
        """The lead that counts: kappa and more than rounding (see `gradient._Best`)."""
        return self.kappa + 1e-5 * (1 + z.detach().abs().amax(1))

    def hinge(self, index: Tensor, z: Tensor) -> Tensor:
        """Carlini & Wagner's f: zero exactly where the lead is enough, with as much again to spare."""
        return (self.kappa + 2 * (self.needed(z) - self.kappa) - self.ahead(index, z)).clamp_min(0)

    def offer(self, index: Tensor, x_adv: Tensor, z: Tensor) -> Tensor:
        """Keep the fooling points that are nearer than what is known; which points fool, bool (M,)."""
        fooled = self.ahead(index, z) > self.needed(z)
        distance = self.measure(x_adv - self.clean[index])
        closer = fooled & (distance < self.distance[index])
        won = index[closer]
        self.x[won], self.distance[won] = x_adv[closer], distance[closer]
        return fooled


def _prepare(model, x, y, target, measure, batch_size, kappa=0.0):
    """Check the input and look at the clean images: (forward, best, indices of images still right, batch size)."""
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    if target is not None:
        checks.other_class(target, x, y)
    size = images_at_once(x, batch_size)
    x = x.detach()
    forward = fast_layout(model, x)
    batches = zip(x.split(size), y.split(size), strict=True)
    with torch.no_grad():
        z = torch.cat([checks.logits(forward(a), b) for a, b in batches])
    nothing = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    measure = _BALLS[measure].norm if isinstance(measure, str) else measure
    best = _Nearest(x, x.clone(), nothing, y, target, z, measure, kappa)
    if target is not None:
        checks.logits(best.logits, target, "target")
    seen = best.logits.argmax(1)
    return forward, best, (seen == y if target is None else seen != target).nonzero().squeeze(1), size


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), so that it broadcasts against images."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _refill(active: Tensor, waiting: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images that wait take the places of those that are done."""
    room = size - len(active)
    return torch.cat([active, waiting[:room]]), waiting[room:]


def _refine(forward, best: _Nearest, index: Tensor, rounds: int, size: int) -> None:
    """Search the segment from x to the point found for where the label changes, `rounds` forward passes.

    The crossing is guessed by the chord of the lead between the two ends, kept a tenth of the bracket away from either.
    """
    index = index[torch.isfinite(best.distance[index])]
    for chunk in index.split(size) if rounds else ():
        x, r = best.clean[chunk], best.x[chunk] - best.clean[chunk]
        low, high = torch.zeros_like(best.distance[chunk]), torch.ones_like(best.distance[chunk])
        with torch.no_grad():
            z = best.logits[chunk]
            z_high = forward(best.x[chunk])
            lead_low, lead_high = (best.ahead(chunk, v) - best.needed(v) for v in (z, z_high))
            for _ in range(rounds):
                guess = (lead_low / (lead_low - lead_high).clamp_max(-1e-30)).clamp(0.1, 0.98) * 1.01
                t = low + (high - low) * guess
                point = (x + _rows(t, x) * r).clamp(0, 1)
                z = forward(point)
                fooled = best.offer(chunk, point, z)
                lead = best.ahead(chunk, z) - best.needed(z)
                low, high = torch.where(fooled, low, t), torch.where(fooled, t, high)
                lead_low, lead_high = torch.where(fooled, lead_low, lead), torch.where(fooled, lead, lead_high)


def _boundaries(forward, best, active, point, candidates, goal=None) -> tuple[Tensor, Tensor]:
    """f_k = z_k - z_y of the likeliest wrong classes k and their gradients: (B, k), (B, k, d).

    With a target there is one: z_target minus the largest other logit.
    """
    y = best.y[active]
    goal = best.target if best.target is not None else goal
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        z = forward(point)
        if goal is None:
            rivals = z.detach().scatter(1, y[:, None], -torch.inf).topk(min(candidates, z.shape[1] - 1), dim=1).indices
            own = y[:, None]
        else:
            rivals = goal[active][:, None]
            own = y[:, None] if best.target is None else z.detach().scatter(1, rivals, -torch.inf).argmax(1)[:, None]
        f = z.gather(1, rivals) - z.gather(1, own)
        columns = range(f.shape[1])
        w = [torch.autograd.grad(f[:, k].sum(), point, retain_graph=k < f.shape[1] - 1)[0].flatten(1) for k in columns]
    # Aim a little beyond the boundary, so that rounding does not leave the point on it.
    return f.detach() - 2 * best.needed(z)[:, None], torch.stack(w, 1)


def _nearest_plane(x: Tensor, f: Tensor, w: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Which of the planes f_k + <w_k, r> = 0 is nearest, and the step to it: x (B, d), f (B, k), w (B, k, d)."""
    if f.shape[1] == 1:
        return torch.zeros_like(f[:, 0], dtype=torch.int64), _to_plane(x, w[:, 0], f[:, 0], norm)
    r = _to_plane(x[:, None].expand_as(w).flatten(0, 1), w.flatten(0, 1), f.flatten(), norm).view_as(w)
    length = _BALLS[norm].norm(r.flatten(0, 1)).view_as(f)
    # A plane that the box hides is taken only where every one is hidden.
    hidden = (f + (w * r).sum(2)).abs() > 1e-3 * f.abs()
    k = length.masked_fill(hidden, torch.inf).argmin(1)
    return k, r[torch.arange(len(k), device=k.device), k]


def _to_plane(x: Tensor, w: Tensor, f: Tensor, norm: str) -> Tensor:
    """The smallest r with f + <w, r> = 0 and x + r in [0, 1], for rows x, w (M, d) and f (M,).

    r_i = -sign(f w_i) t_i with 0 <= t_i <= room_i, the way to the box: under Linf t_i = min(s, room_i), under L2
    t_i = min(s |w_i|, room_i), and under L1 the largest |w_i| are filled first. sum_i |w_i| t_i grows with s, and in ever
    flatter straight pieces, so Newton's steps from s = 0 never go too far and soon end in the right piece. Where the box
    leaves no such r, every entry goes to its end.
    """
    sign = -(w * f.sign()[:, None]).sign()
    room = torch.where(sign > 0, 1 - x, x)
    weight, need = w.abs(), f.abs()
    if norm == "l1":
        order = weight.argsort(1, descending=True)
        gain = (weight * room).gather(1, order)
        spent = (need[:, None] - (gain.cumsum(1) - gain)).clamp_min(0).minimum(gain)
        t = spent / weight.gather(1, order).clamp_min(torch.finfo(w.dtype).tiny)
        return sign * torch.zeros_like(t).scatter(1, order, t).minimum(room)
    rate = torch.ones_like(weight) if norm == "linf" else weight / weight.amax(1, keepdim=True).clamp_min(1e-30)
    slopes = weight * rate
    s = torch.zeros_like(need)
    for _ in range(40):
        t = (s[:, None] * rate).minimum(room)
        slope = (slopes * (t < room)).sum(1)
        lacking = need - (weight * t).sum(1)
        move = (lacking / slope.clamp_min(1e-30)).clamp_min(0)
        move = torch.where(slope > 0, move, 0.0)
        s = s + move
        if (move <= 1e-6 * s).all():
            break
    return sign * (s[:, None] * rate).minimum(room)


def _check_fab(steps, restarts, alpha_max, eta, beta) -> None:
    checks.positive_int(steps, "steps")
    checks.positive_int(restarts, "restarts")
    if checks.nonnegative(alpha_max, "alpha_max") > 1:
        raise ValueError(f"alpha_max: got {alpha_max}, want a number in [0, 1]")
    if checks.nonnegative(eta, "eta") < 1:
        raise ValueError(f"eta: got {eta}, want a number >= 1")
    if not 0 < checks.nonnegative(beta, "beta") < 1:
        raise ValueError(f"beta: got {beta}, want a number in (0, 1)")


def _random_start(best: _Nearest, norm: str, most: float, generator) -> Tensor:
    """A random direction, half as long as the way to the nearest point known and at most half of `most`."""
    x = best.clean
    if norm == "linf":
        direction = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1
    else:
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    length = best.distance.clamp_max(most) / best.measure(direction).clamp_min(1e-30) / 2
    return (x + _rows(length, x) * direction).clamp(0, 1)


def _walk(forward, best, queue, start, norm, steps, rules, candidates, enough, size, bar, goal=None) -> None:
    """FAB's walk for the queued images; one that has come as near as `enough` leaves."""
    alpha_max, eta, beta = rules
    point, step = start.clone(), torch.zeros(len(start), dtype=torch.int64, device=start.device)
    active, waiting = queue[:size], queue[size:]
    while len(active):
        f, w = _boundaries(forward, best, active, point[active], candidates, goal)
        here, x = point[active].flatten(1), best.clean[active].flatten(1)
        k, r = _nearest_plane(here, f, w, norm)
        rows = torch.arange(len(k), device=k.device)
        f, w = f[rows, k], w[rows, k]
        from_x = f + (w * (x - here)).sum(1)
        r0 = _to_plane(x, w, from_x, norm)
        length, length0 = best.measure(r), best.measure(r0)
        a = (length / (length + length0).clamp_min(1e-30)).clamp_max(alpha_max)[:, None]
        moved = ((1 - a) * (here + eta * r) + a * (x + eta * r0)).clamp(0, 1).view_as(point[active])
        with torch.no_grad():
            fooled = best.offer(active, moved, forward(moved))
        back = best.clean[active] + beta * (moved - best.clean[active])
        point[active] = torch.where(_rows(fooled, moved), back, moved)
        step[active] += 1
        done = (step[active] == steps) | (best.distance[active] <= enough)
        bar.update(len(active) + int((steps - step[active])[done].sum()))
        active, waiting = _refill(active[~done], waiting, size)


def _linear(forward, best, todo, size, norm="l2") -> tuple[Tensor, Tensor]:
    """What a linear model would need: c = 2 |f| / ||w||_2^2 (N,), at which ||r||_2^2 + c f just reaches the nearest boundary
    of the tangent, and the point of [0, 1]^d nearest in `norm` where it does."""
    c, start = torch.ones_like(best.distance), best.clean.clone()
    for index in todo.split(size):
        x = best.clean[index]
        f, w = _boundaries(forward, best, index, x, 10)
        k, r = _nearest_plane(x.flatten(1), f, w, norm)
        rows = torch.arange(len(k), device=k.device)
        c[index] = 2 * f[rows, k].abs() / w[rows, k].square().sum(1).clamp_min(1e-12)
        start[index] = (x + r.view_as(x)).clamp(0, 1)
    return c.clamp(1e-6, 1e9), start


def _next_c(c: Tensor, low: Tensor, high: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where c succeeded look below it, else above: the middle of the bracket, or tenfold while it has no upper end."""
    low, high = torch.where(found, low, c), torch.where(found, c, high)
    return torch.where(high.isinf(), 10 * c, (low + high) / 2), low, high


def _search_c(run, c: Tensor, start: Tensor, search: int, *, first_only: bool = False) -> Tensor:
    """Adam under L2 for a bracketed and bisected c; returns for each image the smallest c that succeeded (or the last).

    Each run begins at the nearest point known, the first at `start`. With `first_only` one success is enough.
    """
    forward, best, queue, *rest = run
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    for _ in range(search):
        known = torch.isfinite(best.distance)
        if first_only:
            queue = queue[~known[queue]]
        found = _adam((forward, best, queue, *rest), torch.where(_rows(known, start), best.x, start), _squares, c)
        c, low, high = _next_c(c, low, high, found)
    return torch.where(high.isinf(), c, high)


def _freeze(run, c: Tensor) -> _Nearest:
    """L0: keep the entries that contribute most, grad f_i |r_i|, solve with them alone, and again while that succeeds."""
    forward, best, queue, steps, lr, size, bar = run
    measure = _BALLS["l0"].norm
    known = torch.isfinite(best.distance)
    count = torch.where(known, measure(best.x - best.clean), best.distance)
    best = replace(best, x=best.x.clone(), distance=count, measure=measure)
    share, x = torch.full_like(c, 0.5), best.clean
    for _ in range(_ROUNDS):
        queue = queue[torch.isfinite(best.distance[queue])]
        count = best.distance[queue]
        keep = (share[queue] * count).floor().clamp_min(1)
        queue, keep = queue[keep < count], keep[keep < count]
        if not len(queue):
            break
        low, high, start = x.clone(), x.clone(), x.clone()
        for index, k in zip(queue.split(size), keep.split(size), strict=True):
            _, w = _boundaries(forward, best, index, best.x[index], 1)
            w = w.view(len(index), -1)
            gain = w.abs() * (best.x[index] - x[index]).flatten(1).abs()
            kept = (gain.argsort(1, descending=True).argsort(1) < k[:, None]).view_as(x[index])
            low[index], high[index] = x[index].masked_fill(kept, 0), x[index].masked_fill(kept, 1)
            # The fewer entries are left the farther they have to go, so begin most of the way to the end of the box.
            end = (w > 0).to(x.dtype).view_as(x[index])
            start[index] = torch.where(kept, best.x[index] + 0.9 * (end - best.x[index]), x[index])
        found = _adam((forward, best, queue, steps, 5 * lr, size, bar), start, None, c, low, high)
        share = torch.where(found, share, share.sqrt())
    return best


def _shrink(run, c: Tensor) -> None:
    """Linf: minimise f over |r_i| <= tau with tau below what was reached, and again while that succeeds."""
    forward, best, queue, steps, lr, size, bar = run
    queue = queue[torch.isfinite(best.distance[queue])]
    factor, x = torch.full_like(c, 0.7), best.clean
    for _ in range(_ROUNDS):
        tau = _rows(factor * best.distance.nan_to_num(posinf=0.0), x)
        low, high = (x - tau).clamp_min(0), (x + tau).clamp_max(1)
        start = best.x.maximum(low).minimum(high)
        found = _adam((forward, best, queue, steps, lr, size, bar), start, None, c, low, high)
        factor = torch.where(found, factor, factor.sqrt())
        queue = queue[factor[queue] < 0.995]
        if not len(queue):
            break


def _squares(r: Tensor) -> Tensor:
    return r.flatten(1).square().sum(1)


def _adam(run, start: Tensor, cost: Callable | None, c: Tensor, low=0.0, high=1.0) -> Tensor:
    """Minimise cost(r) + c f over u with x' = low + (high - low)(tanh(u) / a + 1) / 2; which images were fooled, bool (N,).

    With the paper's a = 1 a pixel at 0 or 1 lies at infinite u and hardly moves; a little less than 1 puts the ends of the
    range at finite u (what exceeds them is clipped). Without a cost an image is let go as soon as it fools.
    """
    forward, best, queue, steps, lr, size, bar = run
    low, width = torch.zeros_like(start) + low, torch.zeros_like(start) + (high - low)
    u = torch.atanh((2 * (start - low) / width.clamp_min(1e-12) - 1).clamp(-1, 1) * _REACH)
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    step = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    found = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    active, waiting = queue[:size], queue[size:]
    while len(active):
        here, x = u[active].requires_grad_(), best.clean[active]
        with torch.enable_grad():
            point = low[active] + width[active] * ((here.tanh() / _REACH + 1) / 2)
            clipped = point.detach().maximum(low[active]).minimum((low + width)[active]).clamp(0, 1)
            point = clipped + (point - point.detach())  # the value clipped, the gradient that of tanh
            z = forward(point)
            loss = c[active] * best.hinge(active, z)
            loss = loss if cost is None else loss + cost(point - x)
            (grad,) = torch.autograd.grad(loss.sum(), here)
        found[active] |= best.offer(active, point.detach(), z.detach())
        step[active] = torch.where(found[active] & (cost is None), steps, step[active] + 1)
        t = _rows(step[active].to(x.dtype), x)
        m, v = 0.9 * first[active] + 0.1 * grad, 0.999 * second[active] + 0.001 * grad.square()
        move = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        u[active] = here.detach() - lr * (1 - (t - 1) / steps) * move
        first[active], second[active] = m, v
        bar.update(len(active))
        active, waiting = _refill(active[step[active] < steps], waiting, size)
    return found
