"""Maps of what a layer knows: groups of neurons, facets of a class, an atlas of directions, units with a name, perception.

Where `maximization` asks what one direction of a layer wants to see, this module asks which directions are worth asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress
from ..randomness import generator
from .common import gradient, layer_named
from .maximization import activations


def _features(model: nn.Module, layer: str, x: Tensor, *, positions: bool) -> Tensor:
    """The layer's output at images x, (N, C, H, W), or (N, C) for a layer without positions where that will do."""
    checks.model(model, checks.images(x))
    with torch.no_grad():
        h = torch.cat([activations(model, part, [layer])[0] for part in x.split(256)])
    if h.dim() != 4 and (positions or h.dim() != 2):
        raise ValueError(f"layer: {layer!r} gives {tuple(h.shape)}, want a layer with positions, (N, C, H, W)")
    return h


@dataclass(frozen=True, eq=False)
class Groups:
    """Neuron groups of a layer, h = sum_g maps_g directions_g: `maps` (N, k, H, W), `directions` (k, C), both >= 0.

    `errors` (steps + 1,) is the squared error before each step and after the last, relative to ||h||^2.
    Example: `neuron_groups(models.small_cnn(seed=0), "1", x, 2, steps=3, seed=0).errors.shape` is (4,).
    """

    maps: Tensor
    directions: Tensor
    errors: Tensor


def neuron_groups(
    model: nn.Module, layer: str, x: Tensor, k: int, *, steps: int = 200, seed: int | None = None
) -> Groups:
    """Groups of neurons that fire together: min ||A - M D||^2 with M, D >= 0, A the activations at all positions.

    Non-negative matrix factorisation by Lee and Seung's multiplicative steps, D <- D * (M^T A) / (M^T M D) and the same for
    M, which never raise the error. Each direction can be shown by `maximization.direction`, each map over its image.

    Args:
        layer: one whose output is never negative (behind a ReLU), with positions.
        x: images (N, C, H, W) in [0, 1]; k: number of groups (>= 1); steps (>= 1); seed of the random start.
    Returns: `Groups`, the directions scaled to length 1, the largest group first.
    Raises: TypeError, ValueError: bad input; a layer with negative values or none that is positive.
    Sources: Lee & Seung 2001; Olah et al. 2018 ("Building blocks").
    Example: `neuron_groups(models.small_cnn(seed=0), "1", x, 2, steps=5, seed=0).directions.shape` is (2, 32).
    """
    checks.positive_int(k, "k")
    checks.positive_int(steps, "steps")
    h = _features(model, layer, x, positions=True)
    if h.min() < 0 or h.max() == 0:
        raise ValueError(f"layer: {layer!r} gives values in [{h.min():.3g}, {h.max():.3g}], want some > 0 and none < 0: "
                         "a layer behind a ReLU")  # fmt: skip
    n, c, height, width = h.shape
    a = h.movedim(1, -1).reshape(-1, c)
    draw = generator(seed, x.device)
    scale = (a.mean() / k).sqrt()
    maps = scale * (0.1 + torch.rand(len(a), k, generator=draw, dtype=a.dtype, device=a.device))
    directions = scale * (0.1 + torch.rand(k, c, generator=draw, dtype=a.dtype, device=a.device))
    tiny, whole, errors = torch.finfo(a.dtype).tiny, a.square().sum(), []
    for _ in progress.bar(range(steps), desc="neuron groups"):
        errors.append((a - maps @ directions).square().sum() / whole)
        directions = directions * (maps.T @ a) / (maps.T @ maps @ directions).clamp_min(tiny)
        maps = maps * (a @ directions.T) / (maps @ (directions @ directions.T)).clamp_min(tiny)
    errors.append((a - maps @ directions).square().sum() / whole)
    length = directions.norm(dim=1)
    maps, directions = maps * length, directions / length.clamp_min(tiny)[:, None]
    order = maps.sum(0).argsort(descending=True)
    return Groups(
        maps[:, order].T.reshape(k, n, height, width).movedim(0, 1), directions[order], torch.stack(errors).cpu()
    )


def facets(
    model: nn.Module, layer: str, x: Tensor, k: int, *, nearest: int = 15, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The k facets of what images x have in common: clusters of their features, and an image to start from for each.

    k-means on the layer's output; the start is the mean of the `nearest` images to each centre. Give the starts to
    `activation_maximization` with the same objective k times (multifaceted feature visualisation).

    Args: x: images (N, C, H, W) in [0, 1] of one class, or that excite one neuron; 1 <= k <= N; nearest >= 1; seed.
    Returns: the facet of each image, int64 (N,), the largest facet being 0, and the starts (k, C, H, W).
    Raises: TypeError, ValueError: bad input.
    Source: Nguyen, Yosinski & Clune 2016, Algorithm 1, without its t-SNE.
    Example: `facets(models.small_cnn(seed=0), "14", x, 2)[1].shape` is (2, 1, 28, 28).
    """
    from sklearn.cluster import KMeans  # takes a second: only when it is needed

    checks.positive_int(nearest, "nearest")
    if checks.positive_int(k, "k") > len(checks.images(x)):
        raise ValueError(f"k: got {k} facets of {len(x)} images, want at most as many")
    h = _features(model, layer, x, positions=False).flatten(1)
    found = KMeans(k, n_init=4, random_state=seed).fit(h.double().cpu().numpy())
    labels = torch.as_tensor(found.labels_, dtype=torch.int64)
    order = labels.bincount(minlength=k).argsort(descending=True, stable=True)
    distances = torch.cdist(h.double().cpu(), torch.as_tensor(found.cluster_centers_))[:, order]
    close = distances.topk(min(nearest, len(x)), dim=0, largest=False).indices.T
    return order.argsort()[labels].to(x.device), x[close.to(x.device)].mean(1)


@dataclass(frozen=True, eq=False)
class Atlas:
    """A map of a layer: in each cell of a grid the mean `directions` (n, C) of the activations that fall there.

    `rows`, `columns` (n,): the cell; `counts` (n,): how many fall there; `side`: cells in a row.
    Example: `activation_atlas(models.small_cnn(seed=0), "1", x, side=2).directions.shape[1]` is 32.
    """

    directions: Tensor
    rows: Tensor
    columns: Tensor
    counts: Tensor
    side: int

    def sheet(self, x: Tensor, background: float = 1.0) -> Tensor:
        """One image for each direction, (n, C, H, W), laid out as the map, (1, C, side H, side W).

        Example: `a = activation_atlas(model, "1", x, side=1); a.sheet(torch.rand(1, 1, 8, 8)).shape` is (1, 1, 8, 8).
        """
        n, c, h, w = x.shape
        if n != len(self.counts):
            raise ValueError(f"x: got {n} images, want {len(self.counts)}, one a direction")
        sheet = x.new_full((self.side, self.side, c, h, w), background)
        sheet[self.rows, self.columns] = x
        return sheet.permute(2, 0, 3, 1, 4).reshape(1, c, self.side * h, self.side * w)


def activation_atlas(
    model: nn.Module, layer: str, x: Tensor, *, side: int = 6, least: int = 1, seed: int | None = None
) -> Atlas:
    """A map on which similar activations are neighbours: one activation an image, laid out in the plane, averaged by cell.

    Each image gives the activation at one random position of the layer. The plane is that of the two principal components,
    each axis stretched by rank so that no part is crowded (the original uses UMAP). Show the cells with
    `maximization.direction(layer, atlas.directions, power=2)`.

    Args: x: images (N, C, H, W) in [0, 1], N >= 2; side: cells in a row (>= 1); least: cells with fewer activations are left
        out; seed of the positions.
    Returns: `Atlas`.
    Raises: TypeError, ValueError: bad input; no cell with `least` activations.
    Source: Carter et al. 2019.
    Example: `activation_atlas(models.small_cnn(seed=0), "1", x, side=2, seed=0).counts.sum()`.
    """
    checks.positive_int(side, "side")
    checks.positive_int(least, "least")
    h = _features(model, layer, x, positions=False)
    if len(h) < 2:
        raise ValueError(f"x: got {len(h)} image, want at least 2")
    if h.dim() == 4:
        draw = generator(seed, x.device)
        place = torch.randint(h[0, 0].numel(), (len(h), 1, 1), generator=draw, device=x.device)
        h = h.flatten(2).gather(2, place.expand(-1, h.shape[1], 1)).squeeze(2)
    unit = F.normalize(h - h.mean(0), dim=1).double()
    _, _, axes = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()  # the sign of an axis is free
    rank = (unit @ axes.T).argsort(0).argsort(0)
    cell = (rank * side // len(h)).flip(1)  # the first component runs across
    index = cell[:, 0] * side + cell[:, -1]
    counts = index.bincount(minlength=side**2)
    kept = (counts >= least).nonzero().squeeze(1)
    if not len(kept):
        raise ValueError(f"least: got {least}, want at most {int(counts.max())}, the number in the fullest cell")
    total = torch.zeros(side**2, h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, index, h)
    return Atlas(total[kept] / counts[kept, None], kept // side, kept % side, counts[kept], side)


def dissect(model: nn.Module, layer: str, x: Tensor, masks: Tensor, *, quantile: float = 0.9) -> Tensor:
    """How well each channel of a layer marks a concept: |A & M| / |A | M|, A where it is above its own quantile.

    The channel's map is enlarged to the size of the masks, its threshold is the `quantile` of its values over all images.

    Args: x: images (N, C, H, W) in [0, 1]; masks: bool (N, 1, H, W), where the concept is; quantile in (0, 1).
    Returns: intersection over union in [0, 1], one a channel: (channels,), of the dtype of x.
    Raises: TypeError, ValueError: bad input; a layer without positions; masks that are empty.
    Source: Bau et al. 2017 (network dissection), with quantile 0.995.
    Example: `dissect(models.small_cnn(seed=0), "1", x, x > 0.5).shape` is (32,).
    """
    checks.probability(quantile, "quantile")
    h = _features(model, layer, x, positions=True)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.shape != x[:, :1].shape:
        got = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks: got {got}, want torch.bool {tuple(x[:, :1].shape)}")
    if not masks.any():
        raise ValueError("masks: got no marked pixel, want the concept somewhere")
    h = F.interpolate(h, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    flat = h.movedim(1, 0).flatten(1)
    rank = min(flat.shape[1] - 1, math.floor(quantile * flat.shape[1]))
    active = h > flat.kthvalue(rank + 1, dim=1).values[:, None, None]
    both, either = (active & masks).sum((0, 2, 3)), (active | masks).sum((0, 2, 3))
    return both.to(x.dtype) / either


@contextmanager
def ablated(model: nn.Module, layer: str, channels: Sequence[int] | Tensor) -> Iterator[nn.Module]:
    """Context in which the named channels of a layer put out 0; outside it the model is as before.

    Raises: ValueError for a layer or channel that does not exist.
    Source: Bau et al. 2019 (GAN dissection), for the units of a generator.
    Example: `with ablated(model, "1", [3]): z = model(x)`.
    """
    channels = torch.as_tensor(channels, dtype=torch.int64)

    def silence(module, inputs, output):
        if channels.numel() and not 0 <= channels.min() <= channels.max() < output.shape[1]:
            raise ValueError(f"channels: got {channels.tolist()}, want integers in [0, {output.shape[1] - 1}]")
        keep = torch.ones(output.shape[1], dtype=output.dtype, device=output.device)
        keep[channels.to(output.device)] = 0
        return output * keep.reshape(-1, *[1] * (output.dim() - 2))

    handle = layer_named(model, layer).register_forward_hook(silence)
    try:
        yield model
    finally:
        handle.remove()


def alignment(model, x: Tensor, y: Tensor) -> Tensor:
    """How much the gradient of an image's own logit looks like the image: |<x, g>| / (||x|| ||g||), g = grad z_y(x).

    x is taken about its own mean, so that a grey picture counts for nothing. 1 where the gradient is the picture itself,
    about 1 / sqrt(d) where it is noise. Robust networks have larger values on pictures that are not black and white.

    Args: x: images (N, ...) in [0, 1]; y: int64 labels (N,).
    Returns: (N,) in [0, 1]; 0 for a constant image or a zero gradient.
    Raises: TypeError, ValueError: bad input.
    Sources: Tsipras et al. 2019, who saw it; Etmann et al. 2019, who measured it.
    Example: `alignment(model, x, y).shape` is (8,).
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    g, centred = gradient(model, x, y).flatten(1), x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
    return F.cosine_similarity(g, centred, dim=1, eps=torch.finfo(x.dtype).tiny).abs()
