"""Physical attacks: one printed thing, seen in many poses, that makes the model err.

A printed perturbation cannot follow the camera. It must work on average over what may happen to it, the expectation over
transformations (EOT):  max over delta of E_{x, T} l(h(T(x, delta)), y).  `patch` pastes a small picture somewhere into the
image; `sticker` changes the pixels under a mask and moves together with the object. Two penalties keep the print real:
`total_variation` (a camera sees no single pixels) and `non_printability` (a printer has few colours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, progress, randomness
from ..layout import fast_layout
from .losses import objective
from .spatial import affine, place


@dataclass(frozen=True)
class Views:
    """What may happen between print and camera. Every quantity is drawn uniformly and independently.

    Attributes:
        rotation: largest angle, in degrees (>= 0).
        scale: smallest and largest magnification (> 0).
        shift: largest move, in pixels, along each axis (>= 0).
        brightness: largest amount added to or taken from all pixels (>= 0).
    Example: `Views(rotation=20, shift=3).poses(8, seed=0)` is a tensor (8, 4).
    """

    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    brightness: float = 0.0

    def __post_init__(self):
        for name in ("rotation", "shift", "brightness"):
            checks.nonnegative(getattr(self, name), name)
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: got {self.scale}, want (low, high) with 0 < low <= high")

    def poses(self, n: int, *, seed: int | None = None, generator=None, like: Tensor | None = None) -> Tensor:
        """n poses (n, 4) for `affine`: angle, scale, right, down."""
        generator, like = _generator(seed, generator, like), torch.empty(0) if like is None else like
        u = torch.rand(n, 4, generator=generator, dtype=like.dtype, device=like.device)
        low, high = self.scale
        sides = [(-self.rotation, self.rotation), (low, high), (-self.shift, self.shift), (-self.shift, self.shift)]
        sides = torch.tensor(sides, dtype=like.dtype, device=like.device)
        return sides[:, 0] + u * (sides[:, 1] - sides[:, 0])

    def see(self, x: Tensor, *, seed: int | None = None, generator=None) -> Tensor:
        """Each image (N, C, H, W) in a view of its own, in [0, 1]; gradients flow through."""
        generator = _generator(seed, generator, x)
        poses = self.poses(len(x), generator=generator, like=x)
        light = 2 * torch.rand(len(x), 1, 1, 1, generator=generator, dtype=x.dtype, device=x.device) - 1
        still = self.rotation == self.shift == 0 and self.scale == (1, 1)
        return ((x if still else affine(x, poses)) + self.brightness * light).clamp(0, 1)


def _generator(seed, generator, like):
    return generator if seed is None else randomness.generator(seed, "cpu" if like is None else like.device)


@dataclass(frozen=True)
class Patch:
    """A picture to paste: `pattern` (C, h, w) in [0, 1], shown where `mask` (1, h, w) is 1, in poses that `views` allows."""

    pattern: Tensor
    mask: Tensor
    views: Views

    def apply(self, x: Tensor, *, poses: Tensor | None = None, seed: int | None = None, generator=None) -> Tensor:
        """Paste into each image: x' = x (1 - m) + p m, with p and m the pattern and mask seen in the image's pose.

        Args:
            x: images (N, C, H, W).
            poses: (N, 4) as for `affine`; without them, drawn from `views` (by `seed`, if given).
        Returns:
            Images in [0, 1]; outside the patch they are x, bit for bit.
        """
        if poses is None:
            generator = _generator(seed, generator, x)
            poses = self.views.poses(len(x), generator=generator, like=x)
            light = 2 * torch.rand(len(x), 1, 1, 1, generator=generator, dtype=x.dtype, device=x.device) - 1
            pattern = (self.pattern + self.views.brightness * light).clamp(0, 1)
        else:
            pattern = self.pattern.expand(len(x), *self.pattern.shape)
        mask = self.mask.expand(len(x), *self.mask.shape).to(pattern)
        seen = place(torch.cat([pattern * mask, mask], 1), poses, x.shape[2:])
        colour, cover = seen[:, :-1], seen[:, -1:]
        return torch.where(cover > 0, (x * (1 - cover) + colour).clamp(0, 1), x)


@dataclass(frozen=True)
class Sticker:
    """A change `delta` (C, H, W) of the pixels where `mask` (1, H, W) is 1, fixed to the object."""

    delta: Tensor
    mask: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x + M delta, clipped to [0, 1]; outside the mask x, bit for bit."""
        return torch.where(self.mask > 0, (x + self.delta).clamp(0, 1), x)


def total_variation(image: Tensor) -> Tensor:
    """sum over pixels of sqrt((p_ij - p_i+1,j)^2 + (p_ij - p_i,j+1)^2): (C, H, W) -> a number, small if smooth.

    Source: Mahendran & Vedaldi 2015; Sharif et al. 2016, section 5.2.
    """
    down = image[..., 1:, :-1] - image[..., :-1, :-1]
    right = image[..., :-1, 1:] - image[..., :-1, :-1]
    return (down.square() + right.square() + 1e-12).sqrt().sum()


def non_printability(image: Tensor, palette: Tensor) -> Tensor:
    """sum over pixels p of prod over printable colours c of |p - c|: zero if each pixel is a colour of the palette.

    Args: image (C, H, W); palette (P, C) with P >= 1 colours.
    Source: Sharif et al. 2016, section 5.2.
    """
    gap = image[None] - palette.to(image)[:, :, None, None]
    return (gap.square().sum(1) + 1e-12).sqrt().prod(0).sum()


def patch(
    model,
    x: Tensor,
    y: Tensor,
    *,
    target: int | None = None,
    size: int | None = None,
    mask: Tensor | None = None,
    rotation: float = 20.0,
    scale: tuple[float, float] = (0.9, 1.1),
    shift: float | None = None,
    brightness: float = 0.0,
    loss: str | Callable | None = None,
    tv: float = 0.0,
    nps: float = 0.0,
    palette: Tensor | None = None,
    steps: int = 100,
    alpha: float = 0.2,
    batch_size: int = 64,
    seed: int | None = None,
) -> Patch:
    """An adversarial patch: max over p of E_{x, pose} l(h(A(p, x, pose)), y) - tv TV(p) - nps NPS(p).

    A pastes p into x in a random pose. Each step takes other images and other poses, climbs along the averaged gradient
    (by Adam), and keeps p in [0, 1]; of the patches on the way the one that does best on a fixed set of poses is returned.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, C, H, W), floating point, in [0, 1].
        y: int64 labels (N,).
        target: the class that every patched image should get (images of that class are left out); untargeted without.
        size: side of a square patch, in pixels; or
        mask: (1, h, w) of zeros and ones, the shape of the patch.
        rotation, scale, brightness: as in `Views`; the light falls on the patch alone.
        shift: as in `Views`; by default as far as the patch stays inside the image.
        loss: as for `pgd`; a callable is given (logits, y), or (logits, y, target) with a target. By default "cross_entropy"
            of the target, or the "margin" without one, because the cross-entropy of a sure answer has no gradient.
        tv, nps: weights of the penalties (>= 0), per pixel of the patch.
        palette: the printable colours (P, C) for nps; by default black and white.
        steps: gradient steps (>= 1).
        alpha: first step size, in pixel values (> 0); it falls linearly to zero.
        batch_size: images, each in its own pose, a step.
        seed: makes the result reproducible; without it torch's own generator is used.
    Returns:
        `Patch`; `.apply(x)` pastes it into images, also new ones.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Brown et al. 2017; Athalye et al. 2018 (EOT); Thys et al. 2019 for the penalised loss of a detector's score.
    Example: `patch(model, x, y, target=8, size=7, seed=0).apply(x_new)`.
    """
    if (size is None) == (mask is None):
        raise ValueError("size, mask: got both or neither, want one of the two")
    x, y, goal, forward = _prepare(model, x, y, target)
    if mask is None:
        mask = torch.ones(1, checks.positive_int(size, "size"), size)
    mask = _mask(mask, x, "mask")
    if mask.shape[1] > x.shape[2] or mask.shape[2] > x.shape[3]:
        raise ValueError(
            f"size, mask: got a patch of {tuple(mask.shape[1:])} pixels, want at most {tuple(x.shape[2:])}"
        )
    if shift is None:
        shift = min(x.shape[2] - mask.shape[1], x.shape[3] - mask.shape[2]) / 2
    views = Views(rotation, scale, shift, brightness)
    penalty = _penalty(tv, nps, palette, mask)
    start = torch.full((x.shape[1], *mask.shape[1:]), 0.5, dtype=x.dtype, device=x.device)

    def paste(pattern, x, generator):
        return Patch(pattern, mask, views).apply(x, generator=generator)

    pattern = _expected_ascent(
        forward,
        x,
        y,
        goal,
        loss,
        start,
        paste,
        penalty,
        lambda p: p.clamp(0, 1),
        steps,
        alpha,
        batch_size,
        seed,
        "patch",
    )
    return Patch(pattern * mask, mask, views)


def sticker(
    model,
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    target: int | None = None,
    views: Views = Views(),
    lam: float = 0.0,
    p: int = 1,
    loss: str | Callable | None = None,
    tv: float = 0.0,
    nps: float = 0.0,
    palette: Tensor | None = None,
    steps: int = 100,
    alpha: float = 0.2,
    batch_size: int = 64,
    seed: int | None = None,
) -> Sticker:
    """Robust physical perturbation: min over delta of lam ||M delta||_p + (1/k) sum_i J(h(T_i(x_i + M delta)), y*).

    The x_i are pictures of one object (or of many, for a pair of glasses that fits all), M the mask of the printable area,
    T_i random views of object and sticker together. Each step draws other pictures and views, moves along the mean gradient
    (by Adam), and keeps the sticker between black and white; the best on a fixed set of views is returned.

    Args:
        model, x, y, target, loss, tv, nps, palette, steps, alpha, batch_size, seed: as for `patch`. The penalties look at
            the printed pixels, x + M delta of the first image.
        mask: (1, H, W) of zeros and ones: where the sticker may be.
        views: what may happen to object and sticker on their way to the model.
        lam: weight of the norm (>= 0), per pixel of the mask.
        p: 1 or 2, the norm.
    Returns:
        `Sticker`; `.apply(x)` puts it on.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Eykholt et al. 2018, equation 3; Sharif et al. 2016 for the penalties.
    Example: `sticker(model, x, y, mask, target=3, views=Views(shift=3, brightness=0.2), seed=0).apply(x)`.
    """
    x, y, goal, forward = _prepare(model, x, y, target)
    mask = _mask(mask, x, "mask")
    if mask.shape[1:] != x.shape[2:]:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, want {(1, *x.shape[2:])}, the size of the images")
    if not isinstance(views, Views):
        raise TypeError(f"views: got {type(views).__name__}, want Views")
    checks.nonnegative(lam, "lam"), checks.choice(p, "p", (1, 2))
    printed = _penalty(tv, nps, palette, mask)
    start = torch.zeros_like(x[0])

    def penalty(delta):
        size = delta.abs().sum() if p == 1 else (delta.square().sum() + 1e-12).sqrt()
        return lam * size / mask.sum() + printed((x[0] + delta).clamp(0, 1))

    def put_on(delta, x, generator):
        return views.see(Sticker(delta, mask).apply(x), generator=generator)

    def cut(delta):
        return delta.clamp(-1, 1) * mask

    delta = _expected_ascent(
        forward, x, y, goal, loss, start, put_on, penalty, cut, steps, alpha, batch_size, seed, "sticker"
    )
    return Sticker(delta, mask)


def _prepare(model, x, y, target):
    """Checked input without the images that are of the target's class already, the target as (N,), and the model."""
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    x, goal = x.detach(), None
    if target is not None:
        checks.positive_int(target, "target", least=0)
        keep = y != target
        if not keep.any():
            raise ValueError(f"target: got {target}, the label of every image, want another class")
        x, y = x[keep], y[keep]
        goal = torch.full_like(y, target)
    with torch.no_grad():
        z = checks.logits(model(x[:1]), y[:1]) if isinstance(model, torch.nn.Module) else model(x[:1])
    if goal is not None and z.dim() == 2 and target >= z.shape[1]:
        raise ValueError(f"target: got {target}, want a class in [0, {z.shape[1] - 1}]")
    return x, y, goal, fast_layout(model, x)


def _mask(mask, x, name):
    if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.shape[0] != 1:
        raise ValueError(f"{name}: got {tuple(getattr(mask, 'shape', ()))}, want a tensor (1, h, w)")
    mask = mask.to(x)
    if not ((mask == 0) | (mask == 1)).all() or not mask.any():
        raise ValueError(f"{name}: want zeros and ones, and at least one 1")
    return mask


def _penalty(tv, nps, palette, mask):
    """The function picture -> tv TV + nps NPS, per pixel of the mask."""
    checks.nonnegative(tv, "tv"), checks.nonnegative(nps, "nps")

    def penalty(picture):
        colours = torch.tensor([0.0, 1.0])[:, None].expand(2, len(picture)) if palette is None else palette
        value = picture.new_zeros(())
        if tv:
            value = value + tv * total_variation(picture * mask) / mask.sum()
        if nps:
            value = value + nps * non_printability(picture, colours) / mask.sum()
        return value

    return penalty


def _expected_ascent(forward, x, y, goal, loss, start, show, penalty, project, steps, alpha, batch_size, seed, name):
    """Climb E l(h(show(p, x))) - penalty(p) by Adam, whose steps suit noisy gradients; the best p met on the fixed views."""
    checks.positive_int(steps, "steps"), checks.positive_int(batch_size, "batch_size")
    if checks.nonnegative(alpha, "alpha") == 0:
        raise ValueError("alpha: got 0, want a step size > 0")
    attacker = objective(loss or ("margin" if goal is None else "cross_entropy"), goal)
    generator = randomness.own_generator(seed, x.device)
    fixed = int(torch.randint(2**62, (), generator=generator, device=x.device))
    few = torch.randperm(len(x), generator=generator, device=x.device).repeat(2 * batch_size)[: 2 * batch_size]

    def value(p, index, generator):
        z = forward(show(p, x[index], generator))
        return attacker(z, y[index], None if goal is None else goal[index]).mean() - penalty(p)

    p, best, best_value = start.clone().requires_grad_(), start, -torch.inf
    optimiser = torch.optim.Adam([p], lr=alpha, betas=(0.9, 0.99), eps=1e-12, maximize=True)
    fade = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 1 - t / steps)
    every = max(1, steps // 8)
    for t in progress.bar(range(steps + 1), desc=name, unit="step"):
        if t % every == 0 or t == steps:
            with torch.no_grad():
                now = value(p, few, torch.Generator(x.device).manual_seed(fixed)).item()
            if now > best_value:
                best, best_value = p.detach().clone(), now
        if t == steps:
            return best
        index = torch.randint(len(x), (batch_size,), generator=generator, device=x.device)
        with torch.enable_grad():
            (p.grad,) = torch.autograd.grad(value(p, index, generator), p)
        optimiser.step()
        fade.step()
        with torch.no_grad():
            p.copy_(project(p))
