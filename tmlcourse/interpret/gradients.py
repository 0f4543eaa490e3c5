"""Explanations of one decision by gradients: how the logit z_c answers when a pixel moves.

All of them return one number a pixel and channel, with the shape of x: `per_pixel` joins the channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import checks, progress, randomness
from ..layout import fast_layout, images_at_once
from .common import gradient, selected, targets


def sensitivity(model, x: Tensor, target: Tensor | int | None = None, *, batch_size: int | None = None) -> Tensor:
    """Sensitivity analysis: R_i = (dz_c / dx_i)^2, so that the sum over all pixels is ||grad z_c||^2.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1].
        target: the class c to explain: int64 (N,), one number for all images, or None for the predicted classes.
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
    Returns: >= 0, shape, dtype and device of x.
    Raises: TypeError, ValueError: bad input, a class that the model has not; the message names the argument.
    Source: Baehrens et al. 2010; Simonyan, Vedaldi & Zisserman 2014.
    Example: `sensitivity(model, x)`.
    """
    return _by_batches(gradient, model, x, target, batch_size).square()


def saliency(model, x: Tensor, target: Tensor | int | None = None, *, batch_size: int | None = None) -> Tensor:
    """Saliency: |dz_c / dx_i| for each channel. Simonyan et al. draw the maximum over them, `per_pixel(..., "max")`.

    Args, returns, errors: as for `sensitivity`.
    Source: Simonyan, Vedaldi & Zisserman 2014.
    Example: `saliency(model, x)`.
    """
    return _by_batches(gradient, model, x, target, batch_size).abs()


def gradient_x_input(model, x: Tensor, target: Tensor | int | None = None, *, batch_size: int | None = None) -> Tensor:
    """Gradient times input: R_i = x_i dz_c / dx_i, signed; exact shares of z_c on a linear model without bias.

    Args, errors: as for `sensitivity`. Returns: signed, shape, dtype and device of x.
    Source: Shrikumar, Greenside & Kundaje 2017.
    Example: `gradient_x_input(model, x)`.
    """
    return _by_batches(gradient, model, x, target, batch_size) * x.detach()


def guided_backprop(model, x: Tensor, target: Tensor | int | None = None, *, batch_size: int | None = None) -> Tensor:
    """Guided backpropagation: the gradient, but every ReLU on the way back also cuts what is negative.

    At a ReLU:  dL/da -> dL/da * [a > 0] * [dL/da > 0].  Sharp pictures that hardly depend on the network's upper layers or
    on the class: a caution, see `tmlcourse.interpret.sanity`. ReLUs are recognised as `nn.ReLU` and as functions.

    Args, errors: as for `sensitivity`. Returns: signed, shape, dtype and device of x.
    Source: Springenberg, Dosovitskiy, Brox & Riedmiller 2015.
    Example: `guided_backprop(model, x)`.
    """

    def explain(model, x, target):
        with _GuidedReLUs():
            return gradient(model, x, target)

    return _by_batches(explain, model, x, target, batch_size)


def smoothgrad(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    n: int = 50,
    sigma: float = 0.15,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """SmoothGrad: the mean gradient over noisy copies, (1/n) sum_k grad z_c(x + sigma g_k), g_k ~ N(0, I).

    It is a Monte Carlo estimate of the gradient of z_c smoothed by a Gaussian. Copies are not clipped to [0, 1].

    Args:
        model, x, target, batch_size: as for `sensitivity`.
        n: noisy copies an image (>= 1).
        sigma: standard deviation of the noise in units of the pixel range (>= 0).
        seed: of the noise; torch's own generator without it.
    Returns: signed, shape, dtype and device of x.
    Raises: as for `sensitivity`.
    Source: Smilkov et al. 2017.
    Example: `smoothgrad(model, x, n=20, seed=0)`.
    """
    target = targets(model, x, target)
    checks.positive_int(n, "n")
    checks.nonnegative(sigma, "sigma")
    generator = randomness.generator(seed, x.device)

    def noisy(x):
        return x + sigma * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    total = torch.zeros_like(x)
    for part, _, grad in _gradients_at(model, [noisy] * n, target, batch_size, "SmoothGrad", x):
        total[part] += grad / n
    return total


def integrated_gradients(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 50,
    method: str = "midpoint",
    calibrate: bool = True,
    batch_size: int | None = None,
) -> Tensor:
    """Integrated gradients: R_i = (x_i - x'_i) * integral over t in [0, 1] of dz_c / dx_i at x' + t (x - x').

    Completeness: the sum over all pixels is D = z_c(x) - z_c(x'), up to the error of the quadrature. Calibration takes that
    error away: with d_k = <grad z_c at point k, x - x'>, the weights w_k of the rule become w_k (1 + c (d_k - mean d)), where
    the one number c makes them reproduce D. They still add to 1, and c vanishes with the error.

    Args:
        model, x, target, batch_size: as for `sensitivity`.
        baseline: x', a number in [0, 1] or images that can be broadcast to the shape of x.
        steps: gradients an image (>= 1).
        method: "midpoint", "gausslegendre" or "trapezoid", the quadrature rule.
        calibrate: tilt the rule's weights as above; they stay >= 0, which in hard cases leaves a rest of the error.
    Returns: signed, shape, dtype and device of x.
    Raises: as for `sensitivity`; ValueError for a baseline of another shape or outside [0, 1].
    Source: Sundararajan, Taly & Yan 2017.
    Example: `integrated_gradients(model, x, steps=20)`.
    """
    target = targets(model, x, target)
    nodes, shares = quadrature(steps, method)
    x, start = x.detach(), starting_point(baseline, x)
    way = x - start

    def point(t):
        return lambda start, way: start + t * way

    points, total = [point(t) for t in nodes], torch.zeros_like(x)
    steps_of = _gradients_at(model, points, target, batch_size, "integrated gradients", start, way)
    if not calibrate:
        for part, k, grad in steps_of:
            total[part] += shares[k] * grad
        return total * way

    rise = _logits(model, x, target, batch_size) - _logits(model, start, target, batch_size)
    errors, tilted = torch.zeros(steps, len(x), dtype=x.dtype, device=x.device), torch.zeros_like(x)
    for part, k, grad in steps_of:
        errors[k, part] = (grad * way[part]).flatten(1).sum(1) - rise[part]  # d_k - D
        total[part] += shares[k] * grad
        tilted[part] += shares[k] * _across(errors[k, part], grad) * grad
    weights = torch.tensor(shares, dtype=x.dtype, device=x.device)
    error = weights @ errors
    spread = weights @ (errors - error).square()
    most = 1 / (errors - error).abs().amax(0)
    c = (-error / spread).clamp(-most, most).nan_to_num(0, 0, 0)  # 0 where the gradient is the same all the way
    return (total + _across(c, x) * (tilted - _across(error, x) * total)) * way


def quadrature(steps: int, method: str) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and weights of sum 1 of a rule for integrals over [0, 1].

    method: "gausslegendre" (exact for polynomials up to degree 2 steps - 1), "midpoint" or "trapezoid" (2 steps or more).
    Example: `quadrature(2, "midpoint")` is ([0.25, 0.75], [0.5, 0.5]).
    """
    checks.positive_int(steps, "steps")
    checks.choice(method, "method", ("gausslegendre", "midpoint", "trapezoid"))
    if method == "trapezoid":
        if steps < 2:
            raise ValueError("steps: got 1, want at least 2 for the trapezoid rule")
        nodes, weights = np.linspace(0, 1, steps), np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
    elif method == "midpoint":
        nodes, weights = (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    else:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        nodes, weights = (nodes + 1) / 2, weights / 2
    return nodes.tolist(), weights.tolist()


def starting_point(baseline: Tensor | float, x: Tensor) -> Tensor:
    """The images that stand for "nothing": a number in [0, 1] or images, broadcast to the shape of x.

    Example: `starting_point(0.5, x)`.
    """
    if not isinstance(baseline, Tensor):
        if checks.nonnegative(baseline, "baseline") > 1:
            raise ValueError(f"baseline: got {baseline}, want a number in [0, 1] or images")
        return torch.full_like(x, baseline)
    try:
        start = baseline.to(x).expand(x.shape)
    except RuntimeError:
        raise ValueError(f"baseline: got shape {tuple(baseline.shape)}, want {tuple(x.shape)} or one like it") from None
    checks.images(start, "baseline")
    return start.detach()


def _by_batches(explain, model, x, target, batch_size) -> Tensor:
    """`explain(model, x, target)` on as many images at once as the caches hold."""
    target = targets(model, x, target)
    size = images_at_once(x, batch_size)
    return torch.cat([explain(model, a, t) for a, t in zip(x.split(size), target.split(size), strict=True)])


def _logits(model, x, target, batch_size) -> Tensor:
    """z_c of each image, (N,)."""
    size = images_at_once(x, batch_size)
    with torch.no_grad():
        return torch.cat([selected(model(a), t) for a, t in zip(x.split(size), target.split(size), strict=True)])


def _across(value: Tensor, x: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), as many dimensions as x."""
    return value.view(-1, *[1] * (x.dim() - 1))


def _gradients_at(model, points, target, batch_size, name, *images):
    """Yields (slice, k, grad z_c at points[k](*images)[slice]) for all points and images.

    A batch holds as many images as suit the caches at one point; few images go together at several points.
    """
    x = images[0]
    forward = fast_layout(model, x)
    size = 32 if batch_size is None and x.device.type == "cpu" else images_at_once(x, batch_size)
    together = max(1, size // len(x))
    firsts = range(0, len(points), together)
    with progress.bar(total=math.ceil(len(x) / size) * len(firsts), desc=name, unit="batch") as bar:
        for part in (slice(i, i + size) for i in range(0, len(x), size)):
            arguments = [value[part].detach() for value in images]
            for first in firsts:
                group = points[first : first + together]
                batch = torch.cat([point(*arguments) for point in group])
                grads = gradient(forward, batch, target[part].repeat(len(group)))
                yield from ((part, first + i, grad) for i, grad in enumerate(grads.chunk(len(group))))
                bar.update()


class _GuidedReLUs(TorchFunctionMode):
    """Inside this context a ReLU passes back only positive gradients of positive units."""

    _RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._RELUS:
            return _GuidedReLU.apply(args[0] if args else kwargs["input"])
        return function(*args, **(kwargs or {}))


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad.clamp(min=0) * (a > 0)
