"""Universal perturbations: one v for all images.

The attacker chooses v once, before seeing the image it will be added to:  max over ||v|| <= eps of E_x 1[h(x + v) != y].
That it works at all says that the decision boundaries of different images bend the same way; that the same v works on
other images, and other networks, says so louder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import checks, kernels, progress, randomness
from ..layout import fast_layout
from ..threat import L1, L2, Linf
from .losses import margin, objective
from .minimum_norm import deepfool


def universal(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    method: str = "gradient",
    target: int | None = None,
    passes: int = 10,
    alpha: float | None = None,
    loss: str | Callable | None = None,
    rate: float = 1.0,
    batch_size: int = 64,
    seed: int | None = None,
) -> Tensor:
    """One perturbation v, ||v|| <= eps, that makes the model wrong on as many of the images as possible.

    method="gradient": stochastic projected ascent on the mean loss, v <- P(v + alpha steepest(mean grad l(h(x_i + v), y_i))),
    over batches in random order. With a target and batch_size=1 this is the iteration of Hirano & Takemoto.
    method="deepfool": image after image, if x_i + v still fools nobody, v <- P(v + DeepFool's step for x_i + v).

    Pixels are clipped, x_i + v becomes clip(x_i + v); a pixel that is pushed further out of [0, 1] counts for nothing.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, C, H, W), floating point, in [0, 1].
        y: int64 labels (N,). `model(x).argmax(1)` gives the paper's fooling rate, which asks for a change of answer.
        threat: `Linf`, `L2` or `L1`, the set for v; its box is that of x + v.
        target: the class that every image should get; images of that class are left out. Untargeted without.
        passes: times over the images (>= 1).
        alpha: first step size in the set's units (> 0), for "gradient"; it falls linearly to zero. Default: eps / 4,
            or 4 eps / steps where that is more.
        loss: as for `pgd`; by default the margin, cut off at 5 so that images already fooled leave the work to the others.
        rate: stop once this share of the images is fooled, in (0, 1]; the paper's 1 - delta.
        batch_size: images a step, for "gradient".
        seed: makes the order of the images reproducible; without it torch's own generator is used.
    Returns:
        v (C, H, W): of those after each pass, and v = 0, the one with most images fooled.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Moosavi-Dezfooli et al. 2017, Algorithm 1; Shafahi et al. 2020 (stochastic gradients); Hirano & Takemoto 2020.
    Example: `v = universal(model, x, y, Linf(0.2), seed=0)`; then `fooling_rate(model, x_new, v)`.
    """
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    checks.choice(method, "method", ("gradient", "deepfool"))
    if not isinstance(threat, Linf | L2 | L1):
        raise TypeError(f"threat: got {threat!r}, want Linf, L2 or L1")
    checks.positive_int(passes, "passes"), checks.positive_int(batch_size, "batch_size")
    if not 0 < checks.nonnegative(rate, "rate") <= 1:
        raise ValueError(f"rate: got {rate}, want a share in (0, 1]")
    steps = passes * (-(-len(x) // batch_size) if method == "gradient" else len(x))
    alpha = threat.eps * max(0.25, 4 / steps) if alpha is None else checks.nonnegative(alpha, "alpha")
    x, goal = x.detach(), None
    if target is not None:
        checks.positive_int(target, "target", least=0)
        if (y == target).all():
            raise ValueError(f"target: got {target}, the label of every image, want another class")
        x, y = x[y != target], y[y != target]
        goal = torch.full_like(y, target)
    if loss is None:
        attacker = lambda z, y, t: (margin(z, y) if t is None else -margin(z, t)).clamp_max(5)  # noqa: E731
    else:
        attacker = objective(loss, goal)
    generator = randomness.own_generator(seed, x.device)

    forward, ball, box = fast_layout(model, x), replace(threat, box=None), threat.box or (-torch.inf, torch.inf)
    zero = torch.zeros_like(x[:1])
    v = best = zero
    best_rate = _fooled(forward, x, y, goal, zero, box).double().mean().item()
    with progress.bar(total=steps, desc="universal", unit="step") as bar:
        done = 0
        for _ in range(passes):
            order = torch.randperm(len(x), generator=generator, device=x.device)
            for index in order.split(batch_size if method == "gradient" else 1):
                if method == "gradient":
                    g = _gradient(forward, x[index], y[index], None if goal is None else goal[index], v, box, attacker)
                    step = ball.steepest(g, alpha * (1 - done / steps))
                else:
                    step = _deepfool_step(model, x[index], y[index], None if goal is None else goal[index], v, box)
                v = ball.project(v + step, zero)
                done += 1
                bar.update()
            now = _fooled(forward, x, y, goal, v, box).double().mean().item()
            if now > best_rate:
                best, best_rate = v, now
            if best_rate >= rate:
                break
    return best[0]


def fooling_rate(model, x: Tensor, v: Tensor, *, y: Tensor | None = None, target: int | None = None) -> float:
    """Share of images that clip(x + v) changes: mean 1[h(x + v) != h(x)], in [0, 1].

    Args:
        model, x: as for `universal`.
        v: the perturbation (C, H, W).
        y: compare with these labels instead of the model's own answers.
        target: instead, the share of the images, of another class than the target, that the model gives to it.
    Source: Moosavi-Dezfooli et al. 2017, section 2.
    Example: `fooling_rate(model, test.x, v)`.
    """
    checks.model(model, x=checks.images(x))
    if v.shape != x.shape[1:]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, want {tuple(x.shape[1:])}")
    if y is None:
        with torch.no_grad():
            y = torch.cat([model(part).argmax(1) for part in x.split(256)])
    checks.labels(y, x)
    goal = None
    if target is not None:
        if (y == target).all():
            raise ValueError(f"target: got {target}, the label of every image, want another class")
        x, y = x[y != target], y[y != target]
        goal = torch.full_like(y, checks.positive_int(target, "target", least=0))
    return _fooled(model, x, y, goal, v[None], (0.0, 1.0)).double().mean().item()


def data_free(
    model: nn.Module, shape, threat, *, around: float | Tensor = 0.5, steps: int = 100, restarts: int = 4,
    seed: int | None = None,
) -> Tensor:  # fmt: skip
    """A universal perturbation without a single image: max over v of sum_i log ||l_i(v)||_2, l_i the ReLU layers.

    The product of the activations' norms: a v that excites every layer drowns whatever the image says.

    Args:
        model: a module with `nn.ReLU` layers, in evaluation mode. It is left exactly as it was.
        shape: (C, H, W) of the images.
        threat: `Linf`, `L2` or `L1`, the set for v; the box is not used.
        around: the blank that v is added to, a number or a tensor (C, H, W): a stand-in for the images.
        steps: gradient steps (>= 1).
        restarts: random starts (>= 1), all in one batch; the one of largest product is returned.
        seed: makes the starts reproducible; without it torch's own generator is used.
    Returns:
        v (C, H, W).
    Raises:
        TypeError, ValueError: bad input; a model without ReLU layers.
    Source: Mopuri, Ganeshan & Babu 2019 (GD-UAP), equation 3, the product over layers.
    Example: `fooling_rate(model, x, data_free(model, (1, 28, 28), Linf(0.3), seed=0))`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module, whose layers are looked into")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.ReLU)]
    if not layers:
        raise ValueError("model: got no nn.ReLU layer, want at least one")
    if not isinstance(threat, Linf | L2 | L1):
        raise TypeError(f"threat: got {threat!r}, want Linf, L2 or L1")
    checks.positive_int(steps, "steps"), checks.positive_int(restarts, "restarts")
    like = next(model.parameters())
    blank = torch.as_tensor(around, dtype=like.dtype, device=like.device).expand(restarts, *shape)
    checks.model(model, x=blank)
    generator = randomness.generator(seed, like.device)
    ball, zero = replace(threat, box=None), torch.zeros_like(blank)
    v = ball.random(zero, generator)
    seen, hooks = [], []
    try:
        for layer in layers:
            hooks.append(
                layer.register_forward_hook(lambda module, given, out: seen.append(out.flatten(1).norm(dim=1)))
            )
        for t in progress.bar(range(steps + 1), desc="data-free", unit="step"):
            seen.clear()
            with torch.enable_grad():
                v = v.detach().requires_grad_()
                model(blank + v)
                value = torch.stack(seen).clamp_min(1e-12).log().sum(0)
                (grad,) = torch.autograd.grad(value.sum(), v)
            v = v.detach()
            if t < steps:
                v = kernels.ascent_step(v, grad, zero, ball, 0.2 * threat.eps * (1 - t / steps))
    finally:
        for hook in hooks:
            hook.remove()
    return v[value.argmax()]


def _gradient(forward, x, y, goal, v, box, attacker):
    """The mean gradient at clip(x + v), without the pixels that would only be pushed further out of the box: (1, C, H, W)."""
    low, high = box
    moved = x + v
    inside = moved.clamp(low, high).requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(attacker(checks.logits(forward(inside), y), y, goal).sum(), inside)
    stuck = ((moved <= low) & (g < 0)) | ((moved >= high) & (g > 0))
    return g.masked_fill(stuck, 0).mean(0, keepdim=True)


def _deepfool_step(model, x, y, goal, v, box):
    """What DeepFool adds to clip(x + v), nothing where the model is fooled already: (1, C, H, W)."""
    inside = (x + v).clamp(*box)
    return deepfool(model, inside, y, target=goal, steps=10, refine=0) - inside


@torch.no_grad()
def _fooled(forward, x, y, goal, v, box) -> Tensor:
    """Which of the images the perturbation fools, by more than rounding: bool (N,)."""
    found = []
    size = 100 if x.device.type == "cpu" else 2000
    for k in range(0, len(x), size):
        part = slice(k, k + size)
        z = checks.logits(forward((x[part] + v).clamp(*box)), y[part])
        if goal is not None:
            checks.logits(z, goal[part], "target")
        ahead = margin(z, y[part]) if goal is None else -margin(z, goal[part])
        found.append(ahead > 1e-5 * (1 + z.abs().amax(1)))
    return torch.cat(found)
