"""Explanations that hide parts of the image and ask again: occlusion, random masks, the best mask of a given area."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks, progress, randomness
from ..layout import fast_layout, images_at_once
from .common import selected, targets
from .gradients import starting_point


def occlusion(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    window: int = 5,
    stride: int = 2,
    baseline: Tensor | float = 0.0,
    batch_size: int | None = None,
) -> Tensor:
    """Occlusion: how far z_c falls when a square is hidden.

        R_i = mean over the squares that cover pixel i of z_c(x) - z_c(x with the square hidden)

    Squares begin every `stride` pixels until the image is covered; at the border they are cut off. A square in which the
    image already equals the baseline changes nothing, so the model is not asked.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, C, H, W), floating point, in [0, 1].
        target: the class c to explain: int64 (N,), one number for all images, or None for the predicted classes.
        window: side of the square in pixels, from 1 to H and W.
        stride: pixels between squares, from 1 to `window`, so that every pixel is covered.
        baseline: what is put there: a number in [0, 1] or images that can be broadcast to the shape of x.
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
    Returns: signed, (N, 1, H, W).
    Raises: TypeError, ValueError: bad input, an image that equals the baseline everywhere, so that nothing can be hidden.
    Source: Zeiler & Fergus 2014.
    Example: `occlusion(model, x, window=4, stride=2)`.
    """
    target = targets(model, x, target)
    h, w = _pictures(x).shape[2:]
    if checks.positive_int(window, "window") > min(h, w):
        raise ValueError(f"window: got {window}, want at most {min(h, w)}, the side of the image")
    if checks.positive_int(stride, "stride") > window:
        raise ValueError(f"stride: got {stride}, want at most the window, {window}, or pixels would be left out")
    x, start = x.detach(), _hidden(x, baseline)
    rows, columns = (math.ceil((side - window) / stride) + 1 for side in (h, w))
    right, below = (columns - 1) * stride + window - w, (rows - 1) * stride + window - h
    differs = F.pad((x != start).any(1, keepdim=True).to(x.dtype), (0, right, 0, below))
    image, row, column = F.max_pool2d(differs, window, stride).squeeze(1).nonzero(as_tuple=True)

    forward, size = fast_layout(model, x), images_at_once(x, batch_size)
    fall = x.new_zeros(len(x), 1, rows, columns)
    down, across = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    with torch.no_grad():
        whole = torch.cat([selected(forward(a), t) for a, t in zip(x.split(size), target.split(size), strict=True)])
        for part in progress.bar(torch.arange(len(image), device=x.device).split(size), desc="occlusion", unit="batch"):
            n, r, c = image[part], row[part], column[part]
            top, left = (stride * v[:, None, None, None] for v in (r, c))
            inside = (down >= top) & (down < top + window) & (across >= left) & (across < left + window)
            fall[n, 0, r, c] = whole[n] - selected(forward(torch.where(inside, start[n], x[n])), target[n])
    ones = x.new_ones(1, 1, window, window)
    total, count = (F.conv_transpose2d(v, ones, stride=stride)[..., :h, :w] for v in (fall, torch.ones_like(fall[:1])))
    return total / count


def rise(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    n: int = 1000,
    cells: int = 7,
    keep: float = 0.5,
    baseline: Tensor | float = 0.0,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """RISE: the mean of random masks, each weighted by the probability of the class that it leaves.

        R_i = mean over masks m of p_c(m x) m_i / E m_i

    A mask is a grid of cells x cells coins, drawn larger than the image, smoothed bilinearly and shifted at random.

    Args:
        model, x, target, batch_size: as for `occlusion`.
        n: masks, the same for all images (>= 1).
        cells: cells of the grid across the image (>= 2).
        keep: probability that a cell stays, in (0, 1).
        baseline: what stands where the mask is 0: a number in [0, 1] or images.
        seed: of the masks; torch's own generator without it.
    Returns: >= 0, (N, 1, H, W).
    Raises: TypeError, ValueError: bad input.
    Source: Petsiuk, Das & Saenko 2018.
    Example: `rise(model, x, n=200, seed=0)`.
    """
    target = targets(model, x, target)
    checks.positive_int(n, "n")
    checks.positive_int(cells, "cells", least=2)
    checks.probability(keep, "keep")
    h, w = _pictures(x).shape[2:]
    x, start = x.detach(), _hidden(x, baseline)
    generator = randomness.generator(seed, x.device)
    forward, size = fast_layout(model, x), images_at_once(x, batch_size)
    high, wide = math.ceil(h / cells), math.ceil(w / cells)
    total = x.new_zeros(len(x), 1, h, w)
    with torch.no_grad():
        for _ in progress.bar(range(n), desc="RISE", unit="mask"):
            coins = torch.rand(1, 1, cells + 1, cells + 1, generator=generator, dtype=x.dtype, device=x.device) < keep
            large = F.interpolate(coins.to(x.dtype), size=((cells + 1) * high, (cells + 1) * wide), mode="bilinear")
            i, j = (int(torch.randint(end, (), generator=generator, device=x.device)) for end in (high, wide))
            mask = large[..., i : i + h, j : j + w]
            for part in torch.arange(len(x), device=x.device).split(size):
                z = forward(start[part] + mask * (x[part] - start[part]))
                total[part] += (selected(z, target[part]) - z.logsumexp(1)).exp().view(-1, 1, 1, 1) * mask
    return total / (n * keep)


def extremal_perturbation(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    area: float = 0.1,
    steps: int = 150,
    lr: float = 0.05,
    sigma: float | None = None,
    baseline: Tensor | float | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Extremal perturbation: the smooth mask of a given area that keeps the class best.

        max over m of  log p_c(m x + (1 - m) x') - lambda ||sort(m) - r_a||^2 / (H W),   r_a = (0, ..., 0, 1, ..., 1)

    with a share `area` of ones in r_a: sorting turns the area into a target for every value of the mask, which makes it
    nearly binary. Smooth masks only: a pixel is the (soft) maximum of a coarse grid's values near it, each seen through a
    bump of radius sigma. lambda grows a hundredfold during the ascent (Adam on the grid, no randomness). At the end the mask
    is shifted by the constant that makes its area exact; of the last masks the one with the best score is kept.

    Args:
        model, x, target, batch_size: as for `occlusion`; the model's gradient to the image is needed.
        area: share of the image that stays, in (0, 1).
        steps: of the ascent (>= 1).
        lr: Adam's learning rate, for grid values in [0, 1].
        sigma: radius of a bump in pixels (> 0); default a twelfth of the longer side.
        baseline: x', what stands where the mask is 0: a number in [0, 1], images, or None for a blurred copy of the image.
    Returns: masks in [0, 1] with mean `area`, (N, 1, H, W).
    Raises: TypeError, ValueError: bad input, an image that equals x' everywhere (a constant one equals its blur).
    Source: Fong, Patrick & Vedaldi 2019.
    Example: `extremal_perturbation(model, x, area=0.2, steps=5)`.
    """
    target = targets(model, x, target)
    checks.probability(area, "area")
    checks.positive_int(steps, "steps")
    checks.positive(lr, "lr")
    h, w = _pictures(x).shape[2:]
    sigma = max(h, w) / 12 if sigma is None else checks.positive(sigma, "sigma")
    x = x.detach()
    start = _hidden(x, blurred(x, 1.5 * sigma).clamp(0, 1) if baseline is None else baseline)
    wanted = (torch.arange(h * w, device=x.device) >= round((1 - area) * h * w)).to(x.dtype)
    near, bump = _bumps(h, w, sigma, x)
    forward, size = fast_layout(model, x), images_at_once(x, batch_size)
    parts = torch.arange(len(x), device=x.device).split(size)
    out = x.new_empty(len(x), 1, h, w)
    with progress.bar(total=len(parts) * steps, desc="extremal perturbation", unit="step") as bar:
        for part in parts:
            out[part] = _ascend(forward, x[part], start[part], target[part], near, bump, wanted, area, steps, lr, bar)
    return out


def _ascend(model, x, start, target, near, bump, wanted, area, steps, lr, bar) -> Tensor:
    grid = torch.full((len(x), int(near.max()) + 1), 0.5, dtype=x.dtype, device=x.device, requires_grad=True)
    adam = torch.optim.Adam([grid], lr=lr)
    best = x.new_full((len(x),), -torch.inf)
    kept = x.new_zeros(len(x), 1, *x.shape[2:])

    def score(mask):
        z = model(start + mask * (x - start))
        return selected(z, target) - z.logsumexp(1)

    for t in range(1, steps + 1):
        with torch.enable_grad():
            values = grid[:, near] * bump
            mask = (values * torch.softmax(20 * values, dim=-1)).sum(
                -1
            )  # the soft maximum over the bumps near each pixel
            off = (mask.sort(1).values - wanted).square().mean(1)
            gain = score(mask.view_as(kept)) - 3 * 100 ** (t / steps) * off
            (grid.grad,) = torch.autograd.grad(-gain.sum(), grid)
        adam.step()
        with torch.no_grad():
            grid.clamp_(0, 1)
            if t == steps or (t > 0.7 * steps and t % 5 == 0):
                exact = with_area(mask.detach().view_as(kept), area)
                now = score(exact)
                better = now > best
                best[better], kept[better] = now[better], exact[better]
        bar.update()
    return kept


def with_area(heat: Tensor, area: float) -> Tensor:
    """The mask clip(heat + t, 0, 1) whose mean is `area`, image by image; t is found by bisection. (N, 1, H, W) in and out.

    Example: `with_area(torch.rand(2, 1, 8, 8), 0.25).mean((1, 2, 3))` is 0.25 twice.
    """
    checks.probability(area, "area")
    low, high = -heat.amax((1, 2, 3), keepdim=True), 1 - heat.amin((1, 2, 3), keepdim=True)
    for _ in range(40):
        middle = (low + high) / 2
        small = (heat + middle).clamp(0, 1).mean((1, 2, 3), keepdim=True) < area
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return (heat + high).clamp(0, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images or maps through a Gaussian of standard deviation `sigma` pixels (> 0); at the border the weights inside count.

    Example: `blurred(torch.rand(2, 3, 32, 32), 4.0)`.
    """
    checks.positive(sigma, "sigma")

    def weights(side):
        d = torch.arange(side, dtype=x.dtype, device=x.device)
        k = (-((d[:, None] - d) ** 2) / (2 * sigma**2)).exp()
        return k / k.sum(1, keepdim=True)

    h, w = _pictures(x).shape[2:]
    return weights(h) @ x.detach() @ weights(w).T


def _bumps(h: int, w: int, sigma: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the H W pixels the grid points near it (H W, k) and how much of each arrives there, from 1 down to 0.

    Grid points are sigma / 1.5 apart; a bump is 1 up to sigma from its centre and falls off beyond like a Gaussian.
    """
    step = max(sigma / 1.5, 1.0)
    v, u = (torch.arange(0, side - 1 + step, step) for side in (h, w))
    points = torch.cartesian_prod(v, u)
    pixels = torch.cartesian_prod(torch.arange(float(h)), torch.arange(float(w)))
    distance = torch.cdist(pixels, points)
    k = min(len(points), int((distance < 2 * sigma).sum(1).max()) + 1)
    near = distance.topk(k, largest=False)
    bump = (-0.5 * ((near.values / sigma - 1).clamp(min=0) / 0.4) ** 2).exp()
    return near.indices.to(x.device), bump.to(x)


def _hidden(x: Tensor, baseline) -> Tensor:
    start = starting_point(baseline, x)
    same = int(((x.detach() - start).abs().flatten(1).amax(1) < 1e-6).sum())
    if same:
        raise ValueError(f"x: got {same} of {len(x)} images that equal the baseline everywhere (a constant image, say), "
                         "want images in which something can be hidden: choose another baseline")  # fmt: skip
    return start


def _pictures(x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    return x
