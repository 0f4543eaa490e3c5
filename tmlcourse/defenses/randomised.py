"""Defences that draw lots: the attacker does not know which network will answer.

All draw from torch's own generator, anew for each image of each call; `torch.manual_seed` makes them reproducible, and the
functions of this package that take `seed=` set it inside and put it back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, progress, randomness


class RandomResizePad(nn.Module):
    """Shrink each image to a random size and put it at a random place of the canvas, zeros around it.

    The side r is drawn uniformly from the integers in [low, size], the corner uniformly from the places where it fits.
    Resizing is bilinear, so that the layer is linear in x once the lots are drawn, and gradients flow.

    Args:
        low: smallest height in pixels (>= 1); the width keeps the proportions, rounded.
        size: height and width of the result; those of the image itself without it, so that the network need not change.
    Shape: (N, C, H, W) -> (N, C, *size).
    Source: Xie et al. 2018 (from 299 to between 299 and 330, on a canvas of 331, nearest neighbour).
    Example: `RandomResizePad(low=24)(x).shape == x.shape`.
    """

    def __init__(self, low: int, size: tuple[int, int] | None = None):
        super().__init__()
        self.low, self.size = checks.positive_int(low, "low"), size
        if size is not None:
            self._check_room(*(checks.positive_int(s, "size") for s in size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
        height, width = self.size or x.shape[2:]
        self._check_room(height, width)
        u = torch.rand(3, len(x), dtype=torch.float64, device=x.device)
        tall = (self.low + u[0] * (height - self.low + 1)).floor()
        wide = (tall * width / height).round().clamp_min(1)
        top, left = ((height - tall + 1) * u[1]).floor(), ((width - wide + 1) * u[2]).floor()
        return _stretch(x.shape[2], height, tall, top, x) @ x @ _stretch(x.shape[3], width, wide, left, x).mT

    def extra_repr(self) -> str:
        return f"low={self.low}, size={self.size}"

    def _check_room(self, height: int, width: int) -> None:
        if self.low > height:
            raise ValueError(f"low: got {self.low}, want at most {height}, the height of the canvas")


def _stretch(source: int, canvas: int, length: Tensor, start: Tensor, like: Tensor) -> Tensor:
    """One matrix an image, (N, 1, canvas, source): `source` pixels interpolated to `length`, placed at `start`."""
    place = torch.arange(canvas, device=like.device) - start[:, None]
    inside = (place >= 0) & (place < length[:, None])
    seen = ((place + 0.5) * source / length[:, None] - 0.5).clamp(0, source - 1)
    weight = 1 - (seen[:, :, None] - torch.arange(source, device=like.device)).abs()
    return (weight.clamp_min(0) * inside[:, :, None])[:, None].to(like.dtype)


class ActivationPruning(nn.Module):
    """Stochastic activation pruning: keep activations by lot, the large ones more likely, and scale those kept.

    r times an index is drawn with p_i = |a_i| / sum_j |a_j|. What was never drawn becomes 0; what was drawn is divided by
    its chance 1 - (1 - p_i)^r, so that the mean over the lots is a_i exactly. The lots count as constants in the gradient.

    Args:
        share: r as a share of the number of activations of an image (> 0); 1 is the paper's SAP-100.
    Shape: (N, ...) -> the same.
    Source: Dhillon et al. 2018, section 4, Algorithm 1.
    Example: `ActivationPruning(0.5)(torch.rand(4, 100)).shape` is (4, 100).
    """

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share = checks.nonnegative(share, "share")
        if self.share == 0:
            raise ValueError("share: got 0, want a positive number of draws for each activation")

    def forward(self, a: Tensor) -> Tensor:
        size = a.detach().flatten(1).abs()
        alive = size.sum(1, keepdim=True) > 0
        size = torch.where(alive, size, torch.ones_like(size))  # where nothing is active, any lots leave zeros
        p = size / size.sum(1, keepdim=True)
        draws = max(1, round(self.share * p.shape[1]))
        kept = _drawn(p, draws)
        chance = -torch.expm1(draws * torch.log1p(-p.clamp_max(1 - torch.finfo(p.dtype).eps)))
        return a * torch.where(kept, 1 / chance, torch.zeros_like(p)).view_as(a)

    def extra_repr(self) -> str:
        return f"share={self.share:g}"


def _drawn(p: Tensor, draws: int) -> Tensor:
    """Which indices come up at least once in `draws` independent draws from each row of p: bool, the shape of p.

    Sums of exponential variables, divided by the last, are uniform draws in rising order; so the draws that fall into an
    index's share of [0, 1] are counted by two searches, without sorting and faster than one draw at a time.
    """
    share = p.cumsum(1)
    waits = torch.empty(len(p), draws + 1, dtype=p.dtype, device=p.device).exponential_().cumsum(1)
    points = waits[:, :-1] / waits[:, -1:] * share[:, -1:]  # share ends at 1, up to rounding
    below = torch.searchsorted(points, share, right=True)
    return (below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0) & (p > 0)


def prune_activations(model: nn.Sequential, share: float = 1.0, *, after=None) -> nn.Sequential:
    """The same layers with `ActivationPruning(share)` behind each ReLU, or behind the layers numbered in `after`.

    Args:
        model: an `nn.Sequential`; its layers are shared, not copied.
        share: draws for each activation, as in `ActivationPruning`.
        after: indices of layers (negative ones count from the end).
    Raises:
        TypeError, ValueError: no nn.Sequential, an index outside it, or nothing to prune.
    Source: Dhillon et al. 2018, section 4.
    Example: `prune_activations(models.mlp(hidden=(50,)), 0.5)`.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Sequential")
    if after is None:
        chosen = {i for i, layer in enumerate(model) if isinstance(layer, nn.ReLU)}
    else:
        if bad := [i for i in after if not -len(model) <= i < len(model)]:
            raise ValueError(f"after: got {bad[0]}, want indices in [{-len(model)}, {len(model) - 1}]")
        chosen = {i % len(model) for i in after}
    if not chosen:
        raise ValueError("after: got no layer, want at least one (the model has no ReLU of its own)")
    layers = [[layer, ActivationPruning(share)] if i in chosen else [layer] for i, layer in enumerate(model)]
    return nn.Sequential(*(layer for pair in layers for layer in pair)).train(model.training)


class FeatureMask(nn.Module):
    """Multiply the features by a fixed mask: c(x) = m * x, m (m_1, ..., m_d) of zeros and ones. (N, d) -> (N, d).

    Source: Gao et al. 2017. Example: `FeatureMask(torch.tensor([1.0, 0.0]))(torch.ones(1, 2))`.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@torch.no_grad()
def deep_cloak(model: nn.Sequential, x: Tensor, x_adv: Tensor, *, share: float = 0.01) -> nn.Sequential:
    """DeepCloak: switch off the features that attacks move most, F(x) = W (m * g(x)) + b.

    g is everything before the last layer; the features with the largest mean |g(x)_i - g(x')_i| over the pairs are masked.

    Args:
        model: an `nn.Sequential` whose last layer is linear, in evaluation mode; its layers are shared, not copied.
        x, x_adv: clean images and their adversarial versions (N, ...).
        share: share of the features to mask, in [0, 1).
    Returns:
        An `nn.Sequential` with a `FeatureMask` before the last layer.
    Raises:
        TypeError, ValueError: bad input.
    Source: Gao et al. 2017, section 2.
    Example: `deep_cloak(model, x, x.flip(0), share=0.05)`.
    """
    checks.model(model, checks.images(x))
    checks.same_shape(checks.images(x_adv, "x_adv"), x)
    if not isinstance(model, nn.Sequential) or not isinstance(model[-1], nn.Linear):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Sequential that ends in nn.Linear")
    if checks.nonnegative(share, "share") >= 1:
        raise ValueError(f"share: got {share}, want a share in [0, 1)")
    features = model[:-1]
    moved = torch.cat([(features(a) - features(b)).abs() for a, b in zip(x.split(250), x_adv.split(250), strict=True)])
    mask = torch.ones_like(moved[0])
    mask[moved.mean(0).topk(round(share * len(mask))).indices] = 0
    return nn.Sequential(*features, FeatureMask(mask), model[-1]).train(model.training)


@torch.no_grad()
def expected_accuracy(model, x: Tensor, y: Tensor, *, draws: int = 10, seed: int | None = None) -> float:
    """Accuracy of a randomised model over images and lots: the mean of 1[argmax_k h(x_i)_k = y_i] over i and `draws` calls.

    Args:
        model, x, y: as for `tmlcourse.training.accuracy`.
        draws: calls for each image (>= 1).
        seed: makes the result reproducible and leaves torch's generator as it was.
    Returns:
        A number in [0, 1].
    Example: `expected_accuracy(nn.Sequential(RandomResizePad(24), model), x, y, draws=5, seed=0)`.
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    checks.positive_int(draws, "draws")
    size, right = 100 if x.device.type == "cpu" else 1000, 0
    with randomness.seeded(seed, x.device), progress.bar(total=draws * len(x), desc="draws", unit="image") as bar:
        for _ in range(draws):
            for a, b in zip(x.split(size), y.split(size), strict=True):
                right += int((checks.logits(model(a), b).argmax(1) == b).sum())
                bar.update(len(a))
    return right / (draws * len(x))
