"""Clean-label poison: training images that look right and are labelled right, and still teach one wrong answer.

The attacker wants min over delta of l(h_theta(delta)(x_t), y_adv) with theta(delta) what training makes of the poisoned data.
Three ways round the training run inside: one frozen network's features, one network's gradient, a few unrolled steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import checks, progress, randomness
from ..layout import fast_layout
from ..threat import Linf


@dataclass(frozen=True)
class CleanLabel:
    """Training data of which a few images were changed and no label was; `training.fit` takes it as it is.

    Args:
        x: images (n, ...), y: their labels (n,), those of the clean data; where: indices (m,) of the changed images.
        loss: what the attacker made small, at these images.
    Example: `len(gradient_matching(model, data, test.x[:1], 3, eps=0.1, budget=0.1, steps=1, restarts=1).where)`.
    """

    x: Tensor
    y: Tensor
    where: Tensor
    loss: float

    def __len__(self) -> int:
        return len(self.x)


def feature_collision(
    phi: Callable[[Tensor], Tensor],
    base: Tensor,
    target: Tensor,
    *,
    beta: float = 0.1,
    steps: int = 200,
    eps: float | None = None,
    watermark: float = 0.0,
) -> Tensor:
    """Images that look like `base` and that the features take for the target.

        argmin_x ||phi(x) - phi(x_t)||^2 + beta ||x - x_b||^2

    Forward a gradient step on the first term, backward to the base (the exact minimum of the second, cut by the box):

        x^ = x - lam (dphi/dx)^T (phi(x) - phi(x_t)),    x <- P((x^ + lam beta x_b) / (1 + lam beta))

    lam is each image's own: <s, s> / <s, q> from the last change s of the image and q of the gradient, halved until the
    objective falls. Labelled as the base and trained on, such an image drags the boundary across the target.

    Args:
        phi: images -> features (N, m): a network without its last layer, `tmlcourse.attacks.features(model, layer)`.
        base: images (N, ...) in [0, 1] of the class that the target shall be taken for.
        target: one image (1, ...), or one for each base.
        beta: how much the poison must look like its base (>= 0), per squared pixel and squared feature.
        steps: evaluations of phi and its gradient (>= 1).
        eps: the poison also stays within eps of the base in every pixel; anywhere in [0, 1] without.
        watermark: share in [0, 1) of the target blended into the base first, x_b = (1 - watermark) base + watermark x_t.
    Returns: poison of the shape and dtype of base; its objective is never above that of x_b.
    Raises: TypeError, ValueError: bad input.
    Source: Shafahi et al. 2018, algorithm 1; Wright, Nowak & Figueiredo 2009 for lam.
    Example: `feature_collision(model[:1], x_own[:4], x_own[5:6], beta=1.0, steps=5).shape` is (4, 1, 28, 28).
    """
    checks.images(base, "base")
    checks.images(target, "target")
    if len(target) == 1:
        target = target.expand_as(base) if target.shape[1:] == base.shape[1:] else target
    checks.same_shape(target, base, "target")
    checks.model(phi, base)
    beta = checks.nonnegative(beta, "beta")
    checks.positive_int(steps, "steps")
    if checks.nonnegative(watermark, "watermark") >= 1:
        raise ValueError(f"watermark: got {watermark}, want a share in [0, 1)")
    base, target = base.detach(), target.detach().to(base.dtype)
    ball = Linf(1.0 if eps is None else checks.nonnegative(eps, "eps"))
    with torch.no_grad():
        goal = phi(target)
    if goal.dim() != 2 or len(goal) != len(base):
        raise ValueError(f"phi: got output {tuple(goal.shape)}, want features ({len(base)}, m): flatten them")
    phi = fast_layout(phi, base)
    centre = ball.project((1 - watermark) * base + watermark * target, base)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            apart = (phi(x) - goal).square().sum(1) / 2
            (grad,) = torch.autograd.grad(apart.sum(), x)
        return apart.detach() + beta / 2 * (x.detach() - centre).flatten(1).square().sum(1), grad

    x, (value, grad) = centre, evaluate(centre)
    lam = 1 / grad.flatten(1).norm(dim=1).clamp_min(1e-6)
    for _ in progress.bar(range(steps), desc="feature collision", unit="step"):
        new = (x - _rows(lam, x) * grad + _rows(lam * beta, x) * centre) / (1 + _rows(lam * beta, x))
        new = ball.project(new, base)
        new_value, new_grad = evaluate(new)
        s, q = (new - x).flatten(1), (new_grad - grad).flatten(1)
        falls = new_value <= value - 1e-3 * s.square().sum(1) / lam
        curvature = (s * q).sum(1)
        longer = torch.where(curvature > 0, s.square().sum(1) / curvature.clamp_min(1e-30), 2 * lam)
        lam = torch.where(falls, longer, lam / 2).clamp(1e-8, 1e8)
        x, grad = (torch.where(_rows(falls, x), a, b) for a, b in ((new, x), (new_grad, grad)))
        value = torch.where(falls, new_value, value)
    return x


def gradient_matching(
    models: nn.Module | Sequence[nn.Module],
    data,
    target: Tensor,
    adversarial_label: int,
    *,
    eps: float,
    budget: float,
    steps: int = 100,
    restarts: int = 4,
    alpha: float | None = None,
    seed: int | None = None,
) -> CleanLabel:
    """Poison whose gradient points where the attacker's does.

        min over ||delta_i||_inf <= eps of 1 - cos(g_t, sum_i g_i(delta_i))
        g_t = grad_theta l(h_theta(x_t), y_adv),    g_i(delta_i) = grad_theta l(h_theta(x_i + delta_i), y_i)

    A step of training on the poison is then a step towards the wrong answer for x_t. theta is one network trained on the
    clean data; with several the mean over them is made small. The poison is drawn from the class y_adv, so its labels are
    right. delta moves by signed momentum, its step falling.

    Args:
        models: one network or several, in evaluation mode; left exactly as they were. Theta are the parameters that require
            gradients: freeze the others for a victim who trains the last layer alone.
        data: the clean training data, `.x` (n, ...) in [0, 1] and `.y` (n,).
        target: the images (t, ...) that are to be misread, usually one.
        adversarial_label: as which class.
        eps: largest change of a pixel (>= 0); budget: share of the training images that may be changed, in (0, 1).
        steps, restarts: gradient steps of each random start (both >= 1); the best point met is kept.
        alpha: first step, default eps / 5.
        seed: of the choice of images and the starts.
    Returns: `CleanLabel`; its loss is 1 - cos, in [0, 2].
    Raises: TypeError, ValueError: bad input, no or too few images of the class.
    Source: Geiping et al. 2021, algorithm 1.
    Example: `gradient_matching(model, data, test.x[:1], 3, eps=0.1, budget=0.1, steps=2, restarts=1, seed=0).loss < 2`.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start, where, label = _chosen(models, data, target, adversarial_label, budget, seed)
    thetas = [_parameters(model) for model in models]
    goals = [_gradient(model, theta, target, label) for model, theta in zip(models, thetas, strict=True)]

    def objective(x: Tensor) -> Tensor:
        found = [
            _gradient(model, theta, x, label, create_graph=True) for model, theta in zip(models, thetas, strict=True)
        ]
        return 1 - torch.stack([_cosine(a, b) for a, b in zip(found, goals, strict=True)]).mean()

    x, loss = _descend(objective, start, eps, steps, restarts, alpha, seed, "gradient matching")
    return _put(data, where, x, loss)


def meta_poison(
    models: nn.Module | Sequence[nn.Module],
    data,
    target: Tensor,
    adversarial_label: int,
    *,
    eps: float,
    budget: float,
    unroll: int = 2,
    lr: float = 0.1,
    batch_size: int = 100,
    steps: int = 50,
    restarts: int = 1,
    alpha: float | None = None,
    seed: int | None = None,
) -> CleanLabel:
    """Poison for a series of networks: min over delta of the mean of l(h_theta_K(delta)(x_t), y_adv) over starts theta_0.

        theta_{k+1} = theta_k - lr grad_theta [(1 - budget) L(clean batch k) + budget L(poison + delta)],    k < K

    The K steps of training are unrolled and differentiated through. The starts are networks at several ages of their
    training: what fools the whole series has a chance with the next one.

    Args:
        models: the theta_0, in evaluation mode; left exactly as they were.
        data, target, adversarial_label, eps, budget, alpha, seed: as for `gradient_matching`.
        unroll: K >= 1; lr: of the unrolled steps (> 0); batch_size: clean images in each (>= 1).
        steps, restarts: gradient steps of each start of delta; the best point met is kept. The first start is delta = 0.
    Returns: `CleanLabel`; its loss is the mean cross-entropy of the target after K steps.
    Raises: TypeError, ValueError: bad input, no or too few images of the class.
    Source: Huang et al. 2020, algorithm 1.
    Example: `len(meta_poison(model, data, test.x[:1], 3, eps=0.1, budget=0.1, steps=2, seed=0).where)`.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    start, where, label = _chosen(models, data, target, adversarial_label, budget, seed)
    checks.positive_int(unroll, "unroll")
    checks.positive_int(batch_size, "batch_size")
    checks.positive(lr, "lr")
    clean = torch.ones(len(data.x), dtype=torch.bool, device=start.device)
    clean[where] = False
    clean = clean.nonzero().squeeze(1)
    pick = torch.randint(
        len(clean), (len(models), unroll, min(batch_size, len(clean))), generator=randomness.generator(seed)
    )
    batches = clean[pick.to(clean.device)]

    def objective(x: Tensor) -> Tensor:
        ends = [
            _unrolled(model, data, own, x, target, label, budget, lr)
            for model, own in zip(models, batches, strict=True)
        ]
        return torch.stack(ends).mean()

    x, loss = _descend(objective, start, eps, steps, restarts, alpha, seed, "MetaPoison")
    return _put(data, where, x, loss)


def _unrolled(model, data, batches: Tensor, x: Tensor, target: Tensor, label: int, budget: float, lr: float) -> Tensor:
    """The target's loss after one step of training for each batch (row of indices) and the poison x, with its graph."""
    theta = _parameters(model)
    y = torch.full((len(x),), label, device=x.device)
    for batch in batches:
        risk = (1 - budget) * F.cross_entropy(functional_call(model, theta, data.x[batch]), data.y[batch])
        risk = risk + budget * F.cross_entropy(functional_call(model, theta, x), y)
        slopes = torch.autograd.grad(risk, list(theta.values()), create_graph=True)
        theta = {name: value - lr * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
    wanted = torch.full((len(target),), label, device=x.device)
    return F.cross_entropy(functional_call(model, theta, target), wanted)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, apart from the network, to be differentiated for."""
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return {name: value.detach().clone().requires_grad_() for name, value in trained}


def _gradient(model, theta: dict[str, Tensor], x: Tensor, label: int, create_graph: bool = False) -> tuple[Tensor, ...]:
    """grad_theta of the summed loss of the images x, all with one label."""
    with torch.enable_grad():
        y = torch.full((len(x),), label, device=x.device)
        loss = F.cross_entropy(functional_call(model, theta, x), y, reduction="sum")
        return torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """cos of the angle between two gradients, given layer by layer; 0 where one of them is 0."""
    product = sum((u * v).sum() for u, v in zip(a, b, strict=True))
    lengths = sum(u.square().sum() for u in a) * sum(v.square().sum() for v in b)
    return product / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt()


def _descend(objective, start: Tensor, eps, steps, restarts, alpha, seed, desc: str) -> tuple[Tensor, float]:
    """The best of all points met by signed momentum in the ball around `start`, from it and from random points."""
    ball = Linf(checks.nonnegative(eps, "eps"))
    checks.positive_int(steps, "steps")
    checks.positive_int(restarts, "restarts")
    alpha = ball.eps / 5 if alpha is None else checks.nonnegative(alpha, "alpha")
    generator = randomness.generator(seed)
    best, least = start, float("inf")
    with progress.bar(total=restarts * (steps + 1), desc=desc, unit="step") as bar:
        for restart in range(restarts):
            x, memory = start, torch.zeros_like(start)
            if restart:
                x = start + ball.eps * (2 * torch.rand(start.shape, generator=generator).to(start) - 1)
                x = ball.project(x, start)
            for step in range(steps + 1):
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    value = objective(x)
                    (grad,) = torch.autograd.grad(value, x)
                if value.item() < least:
                    best, least = x.detach(), value.item()
                memory = 0.9 * memory + grad / grad.abs().mean().clamp_min(torch.finfo(grad.dtype).tiny)
                x = ball.project(x.detach() - alpha * (1 - step / (steps + 1)) * memory.sign(), start)
                bar.update()
    return best, least


def _chosen(models, data, target: Tensor, label: int, budget: float, seed) -> tuple[Tensor, Tensor, int]:
    """The images to be poisoned, at random from the class `label`, and where they are; input checks that all share."""
    checks.labels(data.y, checks.images(data.x, "data.x"), "data.y")
    checks.images(target, "target")
    if target.shape[1:] != data.x.shape[1:]:
        raise ValueError(f"target: got shape {tuple(target.shape)}, want (t, {', '.join(map(str, data.x.shape[1:]))})")
    checks.positive_int(label, "adversarial_label", least=0)
    if not models:
        raise ValueError("models: got none, want at least one network")
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models: got {type(model).__name__}, want an nn.Module: its parameters are needed")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("models: got a network whose parameters are all frozen, want some that the victim trains")
        checks.model(model, data.x)
        with torch.no_grad():
            z = checks.logits(
                model(target), torch.full((len(target),), label, device=target.device), "adversarial_label"
            )
        if data.y.max() >= z.shape[1]:
            raise ValueError(f"data.y: got label {data.y.max().item()}, want labels in [0, {z.shape[1] - 1}]")
    if not 0 < checks.nonnegative(budget, "budget") < 1:
        raise ValueError(f"budget: got {budget}, want a share of the training images in (0, 1)")
    count, own = round(budget * len(data.x)), (data.y == label).nonzero().squeeze(1)
    if count == 0:
        raise ValueError(f"budget: got {budget}, less than one of {len(data.x)} images")
    if len(own) < count:
        raise ValueError(f"budget: got {budget}, {count} images, but {len(own)} have the label {label}: "
                         "poison keeps its label, so it comes from that class")  # fmt: skip
    where = own[torch.randperm(len(own), generator=randomness.generator(seed))[:count].to(own.device)]
    return data.x[where].detach(), where, label


def _put(data, where: Tensor, x: Tensor, loss: float) -> CleanLabel:
    changed = data.x.clone()
    changed[where] = x
    return CleanLabel(changed, data.y, where, loss)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
