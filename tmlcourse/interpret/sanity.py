"""Sanity checks of explanations: a map that does not change when the network forgets all it learnt cannot explain it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, progress
from .common import per_pixel, targets

_LEARNT = (nn.Linear, nn.Conv2d)


def cascading(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the model with more and more layers forgotten: the last one, the last two, ... all of them.

    A forgotten layer has weights drawn from N(0, 2 / inputs) and biases 0, the start of a training (He et al. 2015).

    Args:
        model: with Linear or Conv2d layers; it is not touched.
        seed: of the random weights: layer i gets the same ones here and in `independent`.
    Yields: (name of the layer forgotten last, model).
    Raises: TypeError, ValueError: a model without such layers.
    Source: Adebayo et al. 2018, section 4.
    Example: `[name for name, _ in cascading(model)]` begins with the output layer.
    """
    changed = copy.deepcopy(_with_layers(model))
    for name in _names(model):
        _forget(changed, name, seed)
        yield name, copy.deepcopy(changed)


def independent(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the model in which one layer alone is forgotten, the last one first; otherwise as `cascading`.

    Example: `dict(independent(model))`.
    """
    _with_layers(model)
    for name in _names(model):
        changed = copy.deepcopy(model)
        _forget(changed, name, seed)
        yield name, changed


def rank_correlation(a: Tensor, b: Tensor, *, absolute: bool = False) -> Tensor:
    """Spearman's rank correlation of two maps, image by image: Pearson's correlation of the ranks, ties at their mean rank.

    Args:
        a, b: maps (N, ...), the same shape.
        absolute: of |a| and |b|: how strong, whatever the sign.
    Returns: (N,) in [-1, 1], float64.
    Raises: ValueError: other shapes, NaN, a map that is the same everywhere and so has no order.
    Example: `rank_correlation(x, x.square())`.
    """
    rho = _spearman(*_pair(a, b), absolute)
    if constant := int(rho.isnan().sum()):
        raise ValueError(
            f"a, b: got a constant map in {constant} of {len(rho)} pairs, want maps that vary: a constant has no order"
        )
    return rho


def ssim(a: Tensor, b: Tensor, *, window: int = 7) -> Tensor:
    """Structural similarity of two maps, the mean over windows of how well means, variances and correlation agree.

        SSIM = (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2)),  C1 = 0.01^2, C2 = 0.03^2

    Each map is first shifted and scaled to [0, 1]; a constant one becomes 0.

    Args:
        a, b: maps (N, 1, H, W), the same shape.
        window: side of the square windows, odd, at most H and W.
    Returns: (N,) in [-1, 1], float64.
    Raises: ValueError: other shapes, NaN, a window that does not fit.
    Source: Wang et al. 2004.
    Example: `ssim(x, 1 - x)`.
    """
    a, b = _pair(a, b)
    if a.dim() != 4 or a.shape[1] != 1:
        raise ValueError(f"a: got shape {tuple(a.shape)}, want (N, 1, H, W)")
    if checks.positive_int(window, "window", least=3) % 2 == 0 or window > min(a.shape[2:]):
        raise ValueError(f"window: got {window}, want an odd number of at most {min(a.shape[2:])}")
    a, b = (_to_unit(v.double()) for v in (a, b))
    n = window**2
    ma, mb, aa, bb, ab = (F.avg_pool2d(v, window, 1) for v in (a, b, a * a, b * b, a * b))
    va, vb, cov = ((v - m) * n / (n - 1) for v, m in ((aa, ma * ma), (bb, mb * mb), (ab, ma * mb)))
    index = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return index.mean((1, 2, 3))


def parameter_randomisation(model: nn.Module, x: Tensor, methods: dict[str, Callable], target: Tensor | int | None = None, *,
                            forget: Callable = cascading, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """How much each explanation still looks the same while the model forgets its layers.

    Args:
        model: as for `cascading`.
        x: images (N, C, H, W) in [0, 1].
        methods: dict name -> function(model, x, target) that returns maps (N, C, H, W); channels are summed.
        target: the class to explain, the same for all models; by default what the trained model predicts.
        forget: `cascading` or `independent`.
        seed: of the random weights.
    Returns: a table with columns method, layer, depth (layers forgotten so far, or the layer's place from the top), rank and
        rank of absolute values (Spearman), ssim of absolute values: means over the images. A map that has become constant
        keeps no order: its correlation counts as 0.
    Source: Adebayo et al. 2018.
    Example: `parameter_randomisation(model, x, {"the image": lambda model, x, target: x})`.
    """
    target = targets(model, x, target)
    if not isinstance(methods, dict) or not methods:
        raise TypeError(f"methods: got {type(methods).__name__}, want a dict name -> function, not empty")
    before = {name: per_pixel(method(model, x, target)) for name, method in methods.items()}
    rows = []
    forgotten = list(forget(model, seed=seed))
    for depth, (layer, changed) in enumerate(progress.bar(forgotten, desc="sanity check", unit="layer"), start=1):
        for name, method in methods.items():
            a, b = before[name], per_pixel(method(changed, x, target))
            rank, strength = (float(_spearman(a, b, absolute).nan_to_num(0).mean()) for absolute in (False, True))
            rows.append((name, layer, depth, rank, strength, float(ssim(a.abs(), b.abs()).mean())))
    return pd.DataFrame(rows, columns=["method", "layer", "depth", "rank", "rank of absolute values", "ssim"])


def _with_layers(model) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module: only that has layers to forget")
    if not _names(model):
        raise ValueError("model: got no Linear or Conv2d layer in it, want at least one to forget")
    return model


def _names(model: nn.Module) -> list[str]:
    """The layers with weights, the last one first."""
    return [name for name, layer in model.named_modules() if isinstance(layer, _LEARNT)][::-1]


def _forget(model: nn.Module, name: str, seed: int) -> None:
    layer = model.get_submodule(name)
    place = _names(model).index(name)
    generator = torch.Generator().manual_seed(checks.positive_int(seed, "seed", least=0) * 1000 + place)
    weight = torch.randn(layer.weight.shape, generator=generator) * (2 / layer.weight[0].numel()) ** 0.5
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for value, name in ((a, "a"), (b, "b")):
        if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() == 0:
            raise ValueError(f"{name}: got {getattr(value, 'shape', type(value).__name__)}, want maps (N, ...)")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    checks.same_shape(b, a, "b")
    return a.detach(), b.detach()


def _spearman(a: Tensor, b: Tensor, absolute: bool) -> Tensor:
    """(N,); NaN where a map is constant."""
    ranks = []
    for v in (a, b):
        v = v.abs() if absolute else v
        rows = []
        for row in v.flatten(1):
            _, place, count = row.unique(return_inverse=True, return_counts=True)
            last = count.cumsum(0).double()
            rows.append((last - (count - 1) / 2)[place])  # the mean rank of equal values
        r = torch.stack(rows)
        ranks.append(r - r.mean(1, keepdim=True))
    a, b = ranks
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def _to_unit(v: Tensor) -> Tensor:
    low, high = (end.view(-1, 1, 1, 1) for end in (v.flatten(1).amin(1), v.flatten(1).amax(1)))
    return torch.where(high > low, (v - low) / (high - low), 0)
