"""What is minimised: the standard loss, the worst case that an attack finds, and the mixtures and surrogates proposed since.

Each function here returns a loss for `fit`: (model, x, y) -> (scalar, logits). The attack inside sees the model as it would
be deployed (evaluation mode: batch norm with its running statistics, no dropout); the training step does not.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, kernels, models
from ..kernels import graphs
from ..kernels.dispatch import on
from ..layout import channels_last, convolutional, fast_layout

_ANY_LAYOUT = {*graphs.PLAIN, models.Residual}  # other layers may `view` their input, which asks for one layout


def _logits(model, x: Tensor) -> Tensor:
    """model(x), where that is safe in the layout in which a CPU trains convolutions fastest."""
    safe = convolutional(model, x) and all(type(module) in _ANY_LAYOUT for module in model.modules())
    return model(channels_last(x) if safe else x)


def cross_entropy(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and the logits it came from: the standard risk (1/n) sum_i l(h(x_i), y_i)."""
    z = _logits(model, x)
    return F.cross_entropy(z, y), z


def _at(points: Callable) -> Callable:
    """The cross-entropy at the images that `points` finds, (model, x, y) -> x'. `fit` may then record the step from x' on."""

    @functools.wraps(points)
    def loss(model, x: Tensor, y: Tensor, **progress: float) -> tuple[Tensor, Tensor]:
        return cross_entropy(model, points(model, x, y, **progress), y)

    loss.points = points
    return loss


cross_entropy.points = lambda model, x, y: x


def label_smoothing(share: float = 0.1) -> Callable:
    """Cross-entropy to softened labels, (1 - share) e_y + share / K: a control, since it is no training against attacks.

    Args:
        share: of the label's weight that is spread evenly over all K classes, in [0, 1); 0 is `cross_entropy`.
    Source: Szegedy et al. 2016.
    Example: `training.fit(model, train, loss=label_smoothing(0.1), epochs=1, seed=0)`.
    """
    if checks.nonnegative(share, "share") >= 1:
        raise ValueError(f"share: got {share}, want a number in [0, 1)")

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = _logits(model, x)
        return F.cross_entropy(z, y, label_smoothing=share), z

    return loss


# --- attacks as training uses them -----------------------------------------------------------------------------------


def ascent(
    model, x: Tensor, y: Tensor, threat, *, steps: int = 10, alpha: float | None = None, random_start: bool = True
) -> Tensor:
    """PGD without frills, as in Madry's training: x^{t+1} = P_B(x^t + alpha * steepest direction of grad l), the last point.

    `attacks.pgd` returns the best point met, never worse than the clean image, for two forward passes more; in training the
    last point does, and the cost is `steps` forward and backward passes exactly.

    Args:
        model, x, y, threat: as for `attacks.pgd`.
        steps: gradient steps (>= 1).
        alpha: step size in the set's own units (>= 0); default 2.5 times the radius over `steps`.
        random_start: begin at a point drawn uniformly from the set, with torch's generator.
    Returns:
        Images (N, ...) inside the threat set and [0, 1]; some may be easier than the clean ones.
    Raises:
        TypeError, ValueError: bad input.
    Source: Madry et al. 2018.
    Example: `ascent(model, x, y, Linf(0.3), steps=7)`.
    """
    _check(model, x, y)
    alpha = _step(threat, steps, alpha)
    start = threat.random(x) if random_start else x
    return _climb(model, x, y, start, threat, steps, alpha, _cross_entropies)[0]


def early_stopped(
    model, x: Tensor, y: Tensor, threat, *, steps: int = 10, tau: int = 0, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """The friendly attack: `ascent` that lets an image go after it was seen misclassified, and took `tau` steps more.

    Instead of the worst point of the set this looks for one that is misclassified, but not by much:
    argmin_{x' in B(x)} l(h(x'), y)  subject to  l(h(x'), y) - min_{y'} l(h(x'), y') >= rho.

    Args:
        model, x, y, threat, steps, alpha: as for `ascent`; the start is random.
        tau: steps after the first misclassification, from 0 to `steps` (>= 0). With tau = steps no image stops early.
    Returns:
        (x_adv, taken): images inside the threat set, and the steps (N,) that each took.
    Raises:
        TypeError, ValueError: bad input.
    Source: Zhang et al. 2020 ("Attacks which do not kill training make adversarial learning stronger"), algorithm 1.
    Example: `x_adv, taken = early_stopped(model, x, y, Linf(0.3), steps=10, tau=1)`.
    """
    _check(model, x, y)
    alpha = _step(threat, steps, alpha)
    checks.positive_int(tau, "tau", least=0)
    return _climb(model, x, y, threat.random(x), threat, steps, alpha, _cross_entropies, tau=tau)


def single_step(
    model, x: Tensor, y: Tensor, threat, *, alpha: float | None = None, random_start: bool = True
) -> Tensor:
    """The attack of fast adversarial training: one step of `alpha` from a random start, taken whether or not it helps.

    Args:
        alpha: step size; default `threat.full_step`, the whole radius. Without `random_start` that is FGSM.
    Source: Wong, Rice & Kolter 2020 (they use alpha = 1.25 eps for MNIST and CIFAR-10).
    Example: `adversarial(Linf(0.3), single_step, alpha=0.375)`.
    """
    start = threat.random(x) if random_start else x
    return _climb(model, x, y, start, threat, 1, threat.full_step if alpha is None else alpha, _cross_entropies)[0]


def _climb(model, x, y, start, threat, steps, alpha, objective, *, target=None, tau=None) -> tuple[Tensor, Tensor]:
    """Take `steps` steps up the objective (logits, y, target) -> (N,); images wrong more than `tau` times stay behind.

    Each step costs one forward and one backward pass of the images that still climb. On a GPU the steps of a small network
    are played back (`kernels.graphs`), unless images leave.
    """
    from ..attacks.losses import fools

    name = objective.__name__
    if tau is None and graphs.playable(model, x, threat, name):
        with on(x):
            found = graphs.climb(model, x, y, target, threat, name, objective, lambda z, y, _: fools(z, y))
            if found is not None:
                climb, replay = found
                climb.load(x=x, y=y, x_adv=start, **({} if target is None else {"target": target}))
                climb.alpha.fill_(alpha)
                for _ in range(steps):
                    replay()
                return climb.x_adv.clone(), torch.full_like(y, steps)
    forward = fast_layout(model, x)
    point, clean, result = start.detach().clone(), x, torch.empty_like(x)
    active, taken = torch.arange(len(x), device=x.device), torch.full_like(y, steps)
    patience = None if tau is None else torch.full_like(y, tau)
    for step in range(steps):
        point.requires_grad_()
        with torch.enable_grad():
            z = forward(point)
        (grad,) = torch.autograd.grad(objective(z, y, target).sum(), point)
        point = point.detach()
        if patience is not None:
            wrong = fools(z.detach(), y)
            stay = ~wrong | (patience > 0)
            patience = patience - wrong.long()
            if not stay.all():
                result[active[~stay]], taken[active[~stay]] = point[~stay], step
                active, point, grad, clean, y, patience = (v[stay] for v in (active, point, grad, clean, y, patience))
                if not len(active):
                    break
        point = kernels.ascent_step(point, grad, clean, threat, alpha)
    result[active] = point
    return result, taken


def _cross_entropies(z: Tensor, y: Tensor, target: None = None) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _divergence(z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return _kl(target, z)


def _check(model, x: Tensor, y: Tensor) -> None:
    checks.model(model, checks.images(x))
    checks.labels(y, x)


def _step(threat, steps: int, alpha: float | None) -> float:
    """The step size, with the default of `attacks.pgd`."""
    checks.positive_int(steps, "steps")
    return 2.5 * threat.full_step / steps if alpha is None else checks.nonnegative(alpha, "alpha")


@contextlib.contextmanager
def _deployed(model):
    """The model in evaluation mode; each of its layers gets its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if modes:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _steady(model) -> bool:
    """Whether a model is known to compute the same in training as in evaluation: layers of other types may not."""
    return isinstance(model, nn.Module) and all(type(module) in graphs.STEADY for module in model.modules())


# --- losses ----------------------------------------------------------------------------------------------------------


def adversarial(threat, attack: Callable | None = None, **options) -> Callable:
    """The adversarial risk (1/n) sum_i max_{x' in B(x_i)} l(h(x'), y_i), the maximum found by `attack`.

    By Danskin's theorem the gradient of the maximum is the gradient at the maximiser, so the attack is not differentiated.

    Args:
        threat: the feasible set.
        attack: (model, x, y, threat, **options) -> x_adv; `ascent` without, the last point of PGD.
        options: passed to the attack.
    Returns:
        A loss for `fit`. Its logits are those of the adversarial images.
    Source: Madry et al. 2018; Danskin 1966.
    Example: `training.fit(model, data, loss=adversarial(Linf(0.3), steps=10, alpha=0.1), epochs=1)`.
    """
    attack = ascent if attack is None else attack

    def points(model, x: Tensor, y: Tensor) -> Tensor:
        with _deployed(model):
            return attack(model, x, y, threat, **options)

    return _at(points)


def mixture(threat, weight: float = 0.5, attack: Callable | None = None, **options) -> Callable:
    """Clean and adversarial loss together, Goodfellow's alpha J + (1 - alpha) J_adv.

    weight l(h(x), y) + (1 - weight) l(h(x_adv), y).

    Args:
        threat: the feasible set.
        weight: of the clean loss, in [0, 1]; 1 is standard training.
        attack, options: as for `adversarial`; without an attack, the full gradient step from the clean image (FGSM).
    Returns:
        A loss for `fit`. Its logits are those of the clean images.
    Source: Goodfellow, Shlens & Szegedy 2015, section 6 (weight 0.5).
    Example: `training.fit(model, data, loss=mixture(Linf(0.1)), epochs=1, seed=0)`.
    """
    _share(weight, "weight")
    attack, options = _or_fgsm(attack, options)

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, z = cross_entropy(model, x, y)
        if weight == 1:
            return clean, z
        with _deployed(model):
            x_adv = attack(model, x, y, threat, **options)
        return weight * clean + (1 - weight) * cross_entropy(model, x_adv, y)[0], z

    return loss


def friendly(threat, steps: int = 10, tau: int | Callable[[float], int] = 0, alpha: float | None = None) -> Callable:
    """Friendly adversarial training: the loss at the points of `early_stopped`, misclassified, but not by much.

    With tau = steps this is `adversarial(threat, steps=steps, alpha=alpha)`, bit for bit.

    Args:
        threat, steps, alpha: as for `ascent`.
        tau: steps after the first misclassification; a number (>= 0), or a function of the fraction of training done, e.g.
            the paper's schedule `lambda done: int(done > 0.42) + int(done > 0.75)`.
    Returns:
        A loss for `fit`. Its logits are those of the adversarial images.
    Source: Zhang et al. 2020 ("Attacks which do not kill training make adversarial learning stronger").
    Example: `training.fit(model, data, loss=friendly(Linf(0.1), steps=5, tau=1), epochs=1, seed=0)`.
    """
    _step(threat, steps, alpha)
    if not callable(tau):
        checks.positive_int(tau, "tau", least=0)

    def points(model, x: Tensor, y: Tensor, progress: float = 1.0) -> Tensor:
        patience = tau(progress) if callable(tau) else tau
        with _deployed(model):
            return early_stopped(model, x, y, threat, steps=steps, tau=patience, alpha=alpha)[0]

    return _at(points)


def trades(threat, beta: float = 6.0, steps: int = 10, alpha: float | None = None) -> Callable:
    """TRADES: l(h(x), y) + beta max_{x' in B(x)} KL(p(x) || p(x')), p = softmax h: be right here, and the same all around.

    The first term is about accuracy, the second about the boundary's distance and needs no label; beta weighs them.

    Args:
        threat, steps, alpha: as for `ascent`; the climb starts 0.001 N(0, I) away from x, where the KL has its minimum.
        beta: weight of robustness (>= 0); 0 is standard training. The authors use 1 and 6.
    Returns:
        A loss for `fit`. Its logits are those of the clean images.
    Source: Zhang et al. 2019.
    Example: `training.fit(model, data, loss=trades(Linf(0.1), beta=6.0, steps=5), epochs=1, seed=0)`.
    """
    alpha = _step(threat, steps, alpha)
    checks.nonnegative(beta, "beta")

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, z = cross_entropy(model, x, y)
        if beta == 0:
            return clean, z
        with _deployed(model):
            with torch.no_grad():
                here = (z if _steady(model) else _logits(model, x)).log_softmax(1)
            x_adv, _ = _climb(model, x, y, _nearby(x, threat), threat, steps, alpha, _divergence, target=here)
        return clean + beta * _kl(z.log_softmax(1), _logits(model, x_adv)).mean(), z

    return loss


def mart(threat, beta: float = 5.0, steps: int = 10, alpha: float | None = None) -> Callable:
    """MART: misclassified images count more. BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' the PGD point.

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k), a cross-entropy that also pushes the strongest rival down.

    Args:
        threat, steps, alpha: as for `ascent`; the climb starts 0.001 N(0, I) away from x.
        beta: weight of the second term (>= 0).
    Returns:
        A loss for `fit`. Its logits are those of the clean images.
    Source: Wang et al. 2020 ("Improving adversarial robustness requires revisiting misclassified examples").
    Example: `training.fit(model, data, loss=mart(Linf(0.1), beta=5.0, steps=5), epochs=1, seed=0)`.
    """
    alpha = _step(threat, steps, alpha)
    checks.nonnegative(beta, "beta")

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with _deployed(model):
            x_adv, _ = _climb(model, x, y, _nearby(x, threat), threat, steps, alpha, _cross_entropies)
        z, z_adv = _logits(model, x), _logits(model, x_adv)
        here = z.log_softmax(1)
        doubt = -here.gather(1, y[:, None]).squeeze(1).expm1()
        return (_boosted(z_adv, y) + beta * _kl(here, z_adv) * doubt).mean(), z

    return loss


def ensemble(
    threat, sources: Sequence[nn.Module], *, weight: float = 0.5, attack: Callable | None = None, **options
) -> Callable:
    """Ensemble adversarial training: attack fixed networks too, so that hiding one's own gradient does not help.

    weight l(h(x), y) + (1 - weight) l(h(x_adv), y), x_adv made on a network drawn for each batch from {h, sources}.

    Args:
        threat: the feasible set.
        sources: trained networks in evaluation mode, on the images' device; they are not changed.
        weight: of the clean loss, in [0, 1].
        attack, options: as for `mixture`.
    Returns:
        A loss for `fit`. Its logits are those of the clean images.
    Source: Tramèr et al. 2018.
    Example: `training.fit(model, data, loss=ensemble(Linf(0.1), [mlp(seed=1)]), epochs=1, seed=0)`.
    """
    _share(weight, "weight")
    _networks(sources)
    attack, options = _or_fgsm(attack, options)

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, z = cross_entropy(model, x, y)
        with _deployed(model):
            x_adv = attack(_drawn([model, *sources]), x, y, threat, **options)
        return weight * clean + (1 - weight) * cross_entropy(model, x_adv, y)[0], z

    return loss


def cascade(
    threat,
    defended: Sequence[nn.Module],
    *,
    weight: float = 0.5,
    similarity: float = 0.01,
    pivot: bool = False,
    steps: int = 10,
    alpha: float | None = None,
) -> Callable:
    """Cascade adversarial training: learn from iterative attacks on networks that were defended before, and one's own FGSM.

    weight l(h(x), y) + (1 - weight) l(h(x_adv), y) + similarity ||h(x) - h(x_adv)||_2^2: the embedding, which is the argument
    of the softmax, should not notice the perturbation.

    Args:
        threat: the feasible set.
        defended: networks of earlier stages, in evaluation mode, on the images' device; they are not changed. Each batch
            draws one of them (iterative FGSM: `ascent` from the clean image) or h itself (one full gradient step).
        weight: of the clean loss, in [0, 1].
        similarity: weight of the distance between the embeddings (>= 0).
        pivot: hold the clean embedding fixed and move only the adversarial one; without it both move.
        steps, alpha: of the iterative attack.
    Returns:
        A loss for `fit`. Its logits are those of the clean images.
    Source: Na, Ko & Mukhopadhyay 2018.
    Example: `training.fit(model, data, loss=cascade(Linf(0.1), [mlp(seed=1)], steps=5), epochs=1, seed=0)`.
    """
    _share(weight, "weight")
    _networks(defended)
    checks.nonnegative(similarity, "similarity")
    alpha = _step(threat, steps, alpha)

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, z = cross_entropy(model, x, y)
        source = _drawn([model, *defended])
        with _deployed(model):
            if source is model:
                x_adv = single_step(model, x, y, threat, random_start=False)
            else:
                x_adv = ascent(source, x, y, threat, steps=steps, alpha=alpha, random_start=False)
        worst, z_adv = cross_entropy(model, x_adv, y)
        distance = ((z.detach() if pivot else z) - z_adv).square().sum(1).mean()
        return weight * clean + (1 - weight) * worst + similarity * distance, z

    return loss


def growing(make: Callable, threat, *, share: float = 0.3) -> Callable:
    """Any of these losses with a radius that grows from 0 over the first `share` of training.

    At full radius from the first step a network may stay at guessing for thousands of steps, because nothing it could learn
    survives; curriculum adversarial training makes the attacker stronger step by step.

    Args:
        make: threat set -> loss, e.g. `lambda threat: trades(threat, beta=6.0)`.
        threat: the set at full size: `Linf`, `L2` or `L1`.
        share: of training until the radius is full, in (0, 1].
    Returns:
        A loss for `fit`. It is told the fraction of training done.
    Source: in the spirit of Cai et al. 2018 ("Curriculum adversarial training"), who grow the number of steps.
    Example: `training.fit(model, data, loss=growing(adversarial, Linf(0.3)), epochs=1, seed=0)`.
    """
    if not callable(make):
        raise TypeError(f"make: got {type(make).__name__}, want a function threat -> loss")
    if _share(share, "share") == 0:
        raise ValueError("share: got 0, want a number in (0, 1]")
    full = make(threat)
    told = "progress" in inspect.signature(full).parameters

    def now(progress: float) -> tuple[Callable, dict]:
        grown = full if progress >= share else make(replace(threat, eps=threat.eps * progress / share))
        return grown, {"progress": progress} if told else {}

    def points(model, x: Tensor, y: Tensor, progress: float = 1.0) -> Tensor:
        grown, options = now(progress)
        return grown.points(model, x, y, **options)

    def loss(model, x: Tensor, y: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        grown, options = now(progress)
        return grown(model, x, y, **options)

    return _at(points) if hasattr(full, "points") else loss


def _kl(log_p: Tensor, z: Tensor) -> Tensor:
    """KL(p || softmax z) of each image: (N, K) logarithms, (N, K) logits -> (N,)."""
    return (log_p.exp() * (log_p - z.log_softmax(1))).sum(1)


def _boosted(z: Tensor, y: Tensor) -> Tensor:
    """-log p_y - log(1 - max_{k != y} p_k) of each image; 1 - p_k as the sum of the others, so that nothing cancels."""
    mine = F.one_hot(y, z.shape[1]).bool()
    rival = F.one_hot(z.masked_fill(mine, -torch.inf).argmax(1), z.shape[1]).bool()
    all_, others = z.logsumexp(1), z.masked_fill(rival, -torch.inf).logsumexp(1)
    return 2 * all_ - z.gather(1, y[:, None]).squeeze(1) - others


def _nearby(x: Tensor, threat) -> Tensor:
    return threat.project(x + 0.001 * torch.randn_like(x), x)


def _or_fgsm(attack: Callable | None, options: dict) -> tuple[Callable, dict]:
    return (single_step, {"random_start": False, **options}) if attack is None else (attack, options)


def _drawn(models: Sequence):
    return models[int(torch.randint(len(models), ()))]


def _share(value: float, name: str) -> float:
    if checks.nonnegative(value, name) > 1:
        raise ValueError(f"{name}: got {value}, want a number in [0, 1]")
    return value


def _networks(sources) -> None:
    if isinstance(sources, nn.Module) or not len(sources) or not all(isinstance(s, nn.Module) for s in sources):
        raise TypeError(f"sources: got {type(sources).__name__}, want a non-empty list of networks")
