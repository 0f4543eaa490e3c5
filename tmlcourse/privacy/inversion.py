"""Model inversion: the image that a trained model holds for typical of a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress


def model_inversion(
    model: nn.Module,
    target: Tensor,
    *,
    shape,
    objective: str = "confidence",
    l2: float = 0.0,
    tv: float = 0.0,
    centre: float = 0.0,
    start: Tensor | None = None,
    steps: int = 300,
    alpha: float = 1.0,
) -> Tensor:
    """min over x in [0, 1] of c(x) + l2 ||x - centre||^2 + tv TV(x), by projected gradient descent, one image a target.

    c(x) = 1 - p_t(x) for "confidence" (Fredrikson et al. 2015, algorithm 1), which only needs the probability of the class;
    -log p_t(x) for "cross_entropy", whose slope does not vanish where the class is unlikely. Every image has a step length of
    its own: times 1.3 after an improvement, halved without one, and only improvements count.

    For softmax regression z = W x + b, "cross_entropy" and tv = 0 the problem is convex, and its solution satisfies, pixel by
    pixel, x = clip(centre + sum_k (1[k = t] - p_k) w_k / (2 l2), 0, 1): a picture made of rows of W.

    Args:
        model: a network with logits, in evaluation mode; left as it was.
        target: int64 classes (N,). shape: (C, H, W) of an image.
        objective, l2, tv: as above; weights >= 0, the total variation is the mean absolute difference of neighbours.
        centre: grey value in [0, 1] that l2 draws pixels to. start: images (N, C, H, W); all `centre` without.
        steps: of descent (>= 1). alpha: first step length (> 0).
    Returns: images (N, C, H, W) in [0, 1], never worse than the start, in the dtype of the model.
    Raises: TypeError, ValueError: bad input.
    Source: Fredrikson, Jha & Ristenpart 2015.
    Example: `model_inversion(model, torch.tensor([3]), shape=(1, 28, 28), steps=5).shape`.
    """
    checks.choice(objective, "objective", ("confidence", "cross_entropy"))
    for name, value in (("l2", l2), ("tv", tv)):
        checks.nonnegative(value, name)
    checks.probability(centre, "centre", zero=True, one=True)
    checks.positive(alpha, "alpha")
    checks.positive_int(steps, "steps")
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    like = dict(dtype=first.dtype, device=first.device) if first is not None else dict(device=target.device)
    x = (
        torch.full((len(target), *shape), float(centre), **like)
        if start is None
        else checks.images(start, "start").clone()
    )
    if x.shape != (len(target), *shape):
        raise ValueError(f"start: got shape {tuple(x.shape)}, want {(len(target), *shape)}")
    checks.model(model, x)
    checks.labels(target, x, "target")
    with torch.no_grad():
        checks.logits(model(x[:1]), target, "target") if len(target) == 1 else checks.logits(model(x), target, "target")

    def cost(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(model(x), target, reduction="none")
            loss = -torch.expm1(-loss) if objective == "confidence" else loss
            variation = x.diff(dim=-1).abs().flatten(1).mean(1) + x.diff(dim=-2).abs().flatten(1).mean(1)
            value = loss + l2 * (x - centre).square().flatten(1).sum(1) + tv * variation
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    value, slope = cost(x)
    length = torch.full_like(value, alpha)
    each = (-1, *[1] * len(shape))
    for _ in progress.bar(range(steps), desc="model inversion", unit="step"):
        trial = (x - length.view(each) * slope).clamp(0, 1)
        found, its_slope = cost(trial)
        better = found < value
        keep = better.view(each)
        x, slope, value = trial.where(keep, x), its_slope.where(keep, slope), found.where(better, value)
        length = torch.where(better, 1.3 * length, length / 2)
    return x


def nearest(x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the most similar candidate, and how similar: the correlation of their pixels, in [-1, 1].

    Args: x (N, ...) and candidates (M, ...) of the same shape of image.
    Returns: indices (N,) and correlations (N,); 0 for an image of one grey.
    Example: `nearest(x[2:4], x)[0].tolist() == [2, 3]`.
    """
    checks.same_shape(x[:1], candidates[:1], "x")
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (x, candidates))
    best = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).max(1)
    return best.indices, best.values
