"""Spatial attacks: turn and shift the image until the model errs, with every pixel value left honest.

A pose is (angle, scale, right, down): turn clockwise by an angle in degrees, enlarge, move by pixels. The attacker solves
max over poses of l(h(T_pose(x)), y), and because there are only three numbers to choose, a search finds the maximum where
a gradient gets stuck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress, randomness
from ..layout import fast_layout
from .gradient import _Best
from .losses import objective


def affine(x: Tensor, poses: Tensor) -> Tensor:
    """Turn, scale and shift each image about its centre: T(x)(p) = x(R^-1 (p - t) / s), bilinear, 0 outside.

    Args:
        x: images (N, C, H, W); gradients flow through.
        poses: (N, 4) or (1, 4), columns angle (degrees, clockwise), scale (> 0), right and down (pixels).
    Returns:
        (N, C, H, W), values within the range of x and 0. The pose (0, 1, 0, 0) returns x.
    Raises:
        ValueError: other shapes.
    Example: `affine(x, torch.tensor([[30.0, 1.0, 3.0, 0.0]]))` turns all by 30 degrees and moves them right by 3.
    """
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    if poses.dim() != 2 or poses.shape[1] != 4 or len(poses) not in (1, len(x)):
        raise ValueError(f"poses: got shape {tuple(poses.shape)}, want ({len(x)}, 4) or (1, 4)")
    return place(x, poses.expand(len(x), 4), x.shape[2:])


def place(texture: Tensor, poses: Tensor, size) -> Tensor:
    """The textures (N, C, h, w) seen in their poses (N, 4), centred on an empty canvas (N, C, H, W), size = (H, W)."""
    (h, w), (height, width) = texture.shape[2:], size
    poses = poses.to(texture)
    angle, scale, right, down = torch.deg2rad(poses[:, 0]), poses[:, 1], poses[:, 2], poses[:, 3]
    u = torch.arange(width).to(texture) + 0.5 - width / 2 - right[:, None]  # (N, W): seen from the centre
    v = torch.arange(height).to(texture) + 0.5 - height / 2 - down[:, None]
    cos, sin = ((f(angle) / scale)[:, None, None] for f in (torch.cos, torch.sin))
    u, v = u[:, None, :], v[:, :, None]
    grid = torch.stack([(cos * u + sin * v) * (2 / w), (cos * v - sin * u) * (2 / h)], 3)
    return F.grid_sample(texture, grid, align_corners=False)


def spatial(
    model,
    x: Tensor,
    y: Tensor,
    *,
    rotation: float = 30.0,
    shift: float = 3.0,
    grid: tuple[int, int, int] = (31, 5, 5),
    tries: int | None = None,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    stop_early: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """The worst rotation and translation: max over |angle| <= rotation, |right|, |down| <= shift of l(h(T(x)), y).

    Tries every point of a regular grid, or `tries` poses drawn at random for each image; in both cases the image as it is
    too, so the answer is never worse than the start.

    Args:
        model, x, y, loss, target, stop_early, batch_size, seed: as for `pgd`; x is (N, C, H, W).
        rotation: largest angle, in degrees (>= 0).
        shift: largest move, in pixels, along each axis (>= 0).
        grid: how many angles, moves to the right and moves down (each >= 1); one value means no movement.
        tries: if given, worst of that many random poses instead of the grid.
    Returns:
        The moved images, shape and dtype of x, in [0, 1]; for each the pose that fools with the highest loss, if any does.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Engstrom et al. 2019, section 3: the grid of 31 x 5 x 5, and the worst of 10.
    Example: `spatial(model, x, y, rotation=30, shift=3)`.
    """
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    checks.nonnegative(rotation, "rotation"), checks.nonnegative(shift, "shift")
    if not isinstance(grid, tuple) or len(grid) != 3:
        raise ValueError(f"grid: got {grid!r}, want three integers >= 1: angles, moves right, moves down")
    for number in grid:
        checks.positive_int(number, "grid")
    if target is not None:
        checks.other_class(target, x, y)
    attacker = objective(loss, target)
    batch_size = (64 if x.device.type == "cpu" else 2000) if batch_size is None else batch_size
    checks.positive_int(batch_size, "batch_size")

    x = x.detach()
    if tries is None:
        poses = _regular(rotation, shift, grid).to(x)[:, None].expand(-1, len(x), 4)
    else:
        checks.positive_int(tries, "tries")
        generator = randomness.generator(seed, x.device)
        draw = 2 * torch.rand(tries, len(x), 4, generator=generator, dtype=x.dtype, device=x.device) - 1
        poses = draw * torch.tensor([rotation, 0, shift, shift]).to(x) + torch.tensor([0.0, 1, 0, 0]).to(x)

    forward, best = fast_layout(model, x), _Best(x, y, target, attacker)
    with torch.no_grad(), progress.bar(total=len(poses) * len(x), desc="spatial", unit="pose") as bar:
        for chunk in torch.arange(len(x), device=x.device).split(batch_size):
            z = checks.logits(forward(x[chunk]), y[chunk])
            if target is not None:
                checks.logits(z, target[chunk], "target")
            best.offer(chunk, x[chunk], z)
            done, left = 0, chunk[~best.fooled[chunk]] if stop_early else chunk
            while done < len(poses) and len(left):
                some = poses[done : done + batch_size // len(left), left]  # (poses, images, 4): one batch is full
                seen = place(x[left].repeat(len(some), 1, 1, 1), some.reshape(-1, 4), x.shape[2:]).clamp_(0, 1)
                z = forward(seen)
                for k in range(len(some)):
                    part = slice(k * len(left), (k + 1) * len(left))
                    best.offer(left, seen[part], z[part])
                done += len(some)
                bar.update(some.shape[0] * len(left))
                left = left[~best.fooled[left]] if stop_early else left
    return best.x


def _regular(rotation: float, shift: float, grid: tuple[int, int, int]) -> Tensor:
    """The poses (M, 4) of a regular grid, those far from the identity first: they fool most, and soonest."""
    ranges = (rotation, shift, shift)
    axes = [
        torch.linspace(-r, r, k, dtype=torch.float64) if k > 1 else torch.zeros(1)
        for r, k in zip(ranges, grid, strict=True)
    ]
    angle, right, down = torch.meshgrid(*(a.double() for a in axes), indexing="ij")
    poses = torch.stack([angle, torch.ones_like(angle), right, down], 3).reshape(-1, 4)
    size = (poses[:, 0] / (rotation or math.inf)).square() + (poses[:, 2:] / (shift or math.inf)).square().sum(1)
    return poses[size.argsort(descending=True, stable=True)][: int((size > 0).sum())]  # the identity is tried anyway
