"""Explanations against the truth: does the map point at the evidence, and does the model need what it marks?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..intervals import clopper_pearson
from ..layout import images_at_once
from .common import selected, targets
from .gradients import starting_point


@dataclass(frozen=True)
class Score:
    """A mean over images with its interval: `value`, `low`, `high`, and what `each` (N,) image contributed."""

    value: float
    low: float
    high: float
    each: Tensor


def pointing_game(heat: Tensor, masks: Tensor, *, tolerance: float = 0.0, confidence: float = 0.95) -> Score:
    """The share of images whose largest value lies in the mask, or within `tolerance` pixels of it.

    Where several places share the largest value, all of them must: a map that says nothing hits nothing.

    Args:
        heat: maps (N, 1, H, W); see `per_pixel` for maps with channels.
        masks: bool (N, 1, H, W), the evidence.
        tolerance: Euclidean distance in pixels (>= 0) at which a miss still counts as a hit.
        confidence: of the Clopper-Pearson interval.
    Raises: TypeError, ValueError: bad input, an empty mask.
    Source: Zhang et al. 2018; Fong, Patrick & Vedaldi 2019 use 15 pixels on photographs.
    Example: `pointing_game(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8) > 0.5).value`.
    """
    _maps(heat, masks)
    checks.nonnegative(tolerance, "tolerance")
    heat = heat.detach()
    top = heat == heat.amax((1, 2, 3), keepdim=True)
    missed = top & ~_grown(masks, tolerance)
    hits = ~missed.flatten(1).any(1)
    return Score(float(hits.double().mean()), *clopper_pearson(int(hits.sum()), len(hits), confidence), hits)


def mass_accuracy(heat: Tensor, masks: Tensor, *, confidence: float = 0.95, seed: int = 0) -> Score:
    """The share of the positive relevance that lies in the mask: sum over the mask of max(R, 0) / sum of max(R, 0).

    A map without any positive value scores 0. A map that is the same everywhere scores the mask's own share of the image.

    Args:
        heat, masks: as for `pointing_game`.
        confidence, seed: of the bootstrap interval over images.
    Source: Arras, Osman & Samek 2022.
    Example: `mass_accuracy(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8) > 0.5).low`.
    """
    _maps(heat, masks)
    positive = heat.detach().clamp(min=0).double()
    total = positive.sum((1, 2, 3))
    each = torch.where(total > 0, (positive * masks).sum((1, 2, 3)) / total, 0)
    return _mean(each, confidence, seed)


def deletion_curve(model, x: Tensor, heat: Tensor, target: Tensor | int | None = None, *, steps: int = 32,
                   baseline: Tensor | float = 0.0, insert: bool = False,
                   batch_size: int | None = None) -> Tensor:  # fmt: skip
    """The probability of the class while the pixels are replaced by the baseline, those with the largest values first.

    With `insert` the other way round: pixels of the image come into the baseline, those with the largest values first.

    Args:
        model: returns logits (N, K); in evaluation mode.
        x: images (N, C, H, W) in [0, 1].
        heat: maps (N, 1, H, W).
        target: int64 (N,), one number for all images, or None for the predicted classes.
        steps: how many times about H W / steps pixels are changed, from 1 to H W.
        baseline: what stands for "nothing": a number in [0, 1] or images like x.
    Returns: probabilities (N, steps + 1), from the whole image (or baseline) to the whole baseline (or image).
    Raises: TypeError, ValueError: bad input.
    Source: Petsiuk, Das & Saenko 2018.
    Example: `deletion_curve(model, x, torch.rand(8, 1, 28, 28)).shape` is (8, 33).
    """
    target = targets(model, x, target)
    _maps(heat, None)
    if heat.shape[2:] != x.shape[2:] or len(heat) != len(x):
        raise ValueError(f"heat: got shape {tuple(heat.shape)}, want ({len(x)}, 1, {x.shape[2]}, {x.shape[3]})")
    if checks.positive_int(steps, "steps") > heat[0].numel():
        raise ValueError(f"steps: got {steps}, want at most the number of pixels, {heat[0].numel()}")
    start = starting_point(baseline, x)
    order = heat.detach().flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
    rank = rank.view(heat.shape)
    out = torch.empty(len(x), steps + 1, dtype=x.dtype, device=x.device)
    size = images_at_once(x, batch_size)
    with torch.no_grad():
        for k in range(steps + 1):
            changed = rank < round(k * order.shape[1] / steps)
            images = torch.where(changed, x, start) if insert else torch.where(changed, start, x)
            for part in torch.arange(len(x), device=x.device).split(size):
                z = model(images[part])
                out[part, k] = (selected(z, target[part]) - z.logsumexp(1)).exp()
    return out


def deletion(model, x, heat, target=None, *, confidence: float = 0.95, seed: int = 0, **options) -> Score:
    """The mean height of `deletion_curve`, by the trapezoid rule, in [0, 1]: low where the map marks what the model needs.

    Args: as for `deletion_curve`; confidence and seed of the bootstrap interval over images.
    Example: `deletion(model, x, torch.rand(8, 1, 28, 28)).value`.
    """
    return _mean(_height(deletion_curve(model, x, heat, target, **options)), confidence, seed)


def insertion(model, x, heat, target=None, *, confidence: float = 0.95, seed: int = 0, **options) -> Score:
    """The mean height of the insertion curve, by the trapezoid rule, in [0, 1]: high where the marked pixels suffice.

    Args: as for `deletion_curve`; confidence and seed of the bootstrap interval over images.
    Example: `insertion(model, x, torch.rand(8, 1, 28, 28)).value`.
    """
    return _mean(_height(deletion_curve(model, x, heat, target, insert=True, **options)), confidence, seed)


def _height(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve.double(), dx=1 / (curve.shape[1] - 1))


def _mean(each: Tensor, confidence: float, seed: int, samples: int = 1000) -> Score:
    """The mean and the quantiles of the means of `samples` resamples of the images."""
    tail = (1 - checks.probability(confidence, "confidence")) / 2
    values = each.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(samples)]
    )
    mean = float(values.mean())
    low, high = (float(means.quantile(q)) for q in (tail, 1 - tail))
    return Score(mean, min(low, mean), max(high, mean), each)


def _maps(heat: Tensor, masks: Tensor | None) -> None:
    if not isinstance(heat, Tensor) or heat.dim() != 4 or heat.shape[1] != 1 or not heat.numel():
        got = tuple(heat.shape) if isinstance(heat, Tensor) else type(heat).__name__
        raise ValueError(f"heat: got {got}, want maps (N, 1, H, W); per_pixel joins the channels")
    if not torch.isfinite(heat).all():
        raise ValueError("heat: got NaN or infinite values, want finite ones")
    if masks is None:
        return
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.shape != heat.shape:
        got = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks: got {got}, want bool {tuple(heat.shape)}")
    if empty := int((~masks.flatten(1).any(1)).sum()):
        raise ValueError(f"masks: got {empty} without a pixel, want at least one pixel of evidence an image")


def _grown(masks: Tensor, tolerance: float) -> Tensor:
    """All pixels within `tolerance` of a pixel of the mask."""
    reach = int(tolerance)
    if not reach:
        return masks
    d = torch.arange(-reach, reach + 1, device=masks.device)
    disc = ((d[:, None] ** 2 + d**2) <= tolerance**2).to(torch.float32)
    return F.conv2d(masks.float(), disc[None, None], padding=reach) > 0.5
