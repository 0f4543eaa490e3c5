"""Feature adversaries: an image that looks like x and that a hidden layer takes for another one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, progress
from ..layout import images_at_once
from ..threat import L0


def feature_adversary(
    model: nn.Module,
    x: Tensor,
    guide: Tensor,
    threat,
    *,
    layer: int | str,
    steps: int = 100,
    batch_size: int | None = None,
) -> Tensor:
    """The image of the threat set around x whose hidden layer comes closest to that of the guide.

    min over x' in B(x) of f(x') = ||phi(x') - phi(guide)||_2^2, phi the output of `layer`, by the spectral projected gradient
    method: each image walks along d = P_B(x^t - lambda grad f) - x^t, with lambda = <s, s> / <s, q> from the last change s of
    the point and q of the gradient (the curvature seen along s), and halves its step until f falls enough.

    Args:
        model: a network in evaluation mode; it is left exactly as it was. No label is asked for: the attack knows none.
        x: source images (N, ...), floating point, in [0, 1].
        guide: the images whose layer is to be matched, one for each of x, of the same shape.
        threat: a convex feasible set around x: `Linf`, `L2` or `L1`.
        layer: which output is matched: an index into an `nn.Sequential` (negative ones count from the end), or the name of
            a module as in `model.named_modules()`.
        steps: evaluations of f and its gradient (>= 1).
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
    Returns:
        Images of the shape, dtype and device of x, inside the threat set and [0, 1], never farther from the guide than x is.
    Raises:
        TypeError, ValueError: bad input or an unknown layer, before any work.
    Source: Sabour, Cao, Faghri & Fleet 2016 (objective, with L-BFGS-B); Birgin, Martínez & Raydan 2000 (the method here).
    Example: `feature_adversary(model, x, x.flip(0), Linf(0.1), layer=-1)`.
    """
    checks.model(model, checks.images(x))
    checks.same_shape(checks.images(guide, "guide"), x, "guide")
    checks.positive_int(steps, "steps")
    if isinstance(threat, L0):
        raise TypeError(f"threat: got {threat!r}, want a convex set: Linf, L2 or L1")
    batch_size = images_at_once(x, batch_size)
    phi, found = features(model, layer), []
    with progress.bar(total=steps * len(x), desc="features", unit="step") as bar:
        for a, b in zip(x.detach().split(batch_size), guide.detach().split(batch_size), strict=True):
            with torch.no_grad():
                goal = phi(b)
            found.append(_descend(phi, a, goal, threat, steps, bar))
    return torch.cat(found)


def features(model: nn.Module, layer: int | str) -> Callable[[Tensor], Tensor]:
    """The function phi: images (N, ...) -> outputs (N, m) of one layer of `model`, flattened.

    Args:
        layer: an index into an `nn.Sequential`, or a name as in `model.named_modules()`.
    Raises:
        TypeError, ValueError: no such layer.
    Example: `features(small_cnn(), -3)(torch.rand(2, 1, 28, 28)).shape` is (2, 200).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module with layers")
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not isinstance(model, nn.Sequential):
            raise TypeError(f"layer: got the index {layer}, want a name: the model is no nn.Sequential")
        if not -len(model) <= layer < len(model):
            raise ValueError(f"layer: got {layer}, want an index in [{-len(model)}, {len(model) - 1}]")
        first = model[: layer % len(model) + 1]
        return lambda x: first(x).flatten(1)
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"layer: got {layer!r}, want an index or one of {', '.join(map(repr, filter(None, modules)))}")

    def phi(x: Tensor) -> Tensor:
        seen = []
        handle = modules[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            model(x)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"layer: got {layer!r}, want a layer that the forward pass uses")
        return seen[-1].flatten(1)

    return phi


def _descend(phi, x: Tensor, goal: Tensor, threat, steps: int, bar) -> Tensor:
    """Spectral projected gradient, one step length and one line search for each image of the batch."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            f = (phi(x) - goal).square().sum(1)
            (grad,) = torch.autograd.grad(f.sum(), x)
        return f.detach(), grad

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b.double()).flatten(1).sum(1).to(a.dtype)

    def rows(mask: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (x.dim() - 1))

    tiny = torch.finfo(x.dtype).tiny
    now, (f, grad) = x, evaluate(x)
    best, lowest = x.clone(), f.clone()
    recent = f.repeat(8, 1)  # f may rise above its last value, but not above its last eight: the method needs that room
    # The first step moves by about the radius: the gradient's own length says nothing about the scale of x.
    scale = threat.full_step / threat.norm(grad).clamp_min(tiny)
    direction, t = threat.project(now - rows(scale) * grad, x) - now, torch.ones_like(f)
    for count in range(steps):
        trial = threat.project(now + rows(t) * direction, x)
        f_trial, grad_trial = evaluate(trial)
        step, change = trial - now, grad_trial - grad
        falls = f_trial <= recent.amax(0) + 1e-4 * dot(grad, step)
        lower = f_trial < lowest
        best, lowest = torch.where(rows(lower), trial, best), torch.where(lower, f_trial, lowest)

        curvature = dot(step, change)
        longer = torch.where(curvature > 0, dot(step, step) / curvature.clamp_min(tiny), 2 * scale)
        scale = torch.where(falls, longer.clamp(1e-10, 1e10), scale)
        now, grad = torch.where(rows(falls), trial, now), torch.where(rows(falls), grad_trial, grad)
        recent[count % 8] = torch.where(falls, f_trial, recent[count % 8])
        direction = torch.where(rows(falls), threat.project(now - rows(scale) * grad, x) - now, direction)
        t = torch.where(falls, 1.0, t / 2)
        bar.update(len(x))
    return best
