"""Class activation maps: where in the image the last features that spoke for a class were."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layout import images_at_once
from .common import last_convolution, layer_named, recorded, selected, targets
from .gradients import guided_backprop


def cam(model, x: Tensor, target: Tensor | int | None = None, *, upsample: bool = True) -> Tensor:
    """Class activation map of a network that ends in global average pooling and one linear layer: M_c = sum_k w_ck A_k.

    A_k are the features before the pooling, so z_c = mean over places of M_c + b_c: the map shares out the logit itself.

    Args:
        model: `nn.Sequential` that ends in AdaptiveAvgPool2d(1), Flatten, Linear; in evaluation mode. It is left as it was.
        x: images (N, C, H, W), floating point, in [0, 1].
        target: the class c to explain: int64 (N,), one number for all images, or None for the predicted classes.
        upsample: bilinearly to the size of the image; without, as many places as the features have.
    Returns: signed, (N, 1, H, W) or (N, 1, h, w).
    Raises: TypeError, ValueError: bad input, a model that ends otherwise (`grad_cam` explains any convolutional one).
    Source: Zhou et al. 2016.
    Example: `cam(models.gap_cnn(), torch.rand(2, 3, 32, 32)).shape` is (2, 1, 32, 32).
    """
    target = targets(model, x, target)
    last_convolution(model)
    tail = list(model)[-3:] if isinstance(model, nn.Sequential) else []
    pooled = len(tail) == 3 and isinstance(tail[0], nn.AdaptiveAvgPool2d) and tail[0].output_size in (1, (1, 1))
    if not (pooled and isinstance(tail[1], nn.Flatten) and isinstance(tail[2], nn.Linear)):
        ends = ", ".join(type(layer).__name__ for layer in tail) or type(model).__name__
        raise ValueError(f"model: got one that ends in {ends}, want an nn.Sequential that ends in AdaptiveAvgPool2d(1), "
                         "Flatten, Linear; grad_cam explains other convolutional networks")  # fmt: skip
    with torch.no_grad():
        features = model[:-3](x)
        selected(model[-3:](features), target)
        heat = torch.einsum("nkhw,nk->nhw", features, tail[2].weight[target])[:, None]
    return _as_large_as(heat, x) if upsample else heat


def grad_cam(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    layer: str | None = None,
    relu: bool = True,
    upsample: bool = True,
    batch_size: int | None = None,
) -> Tensor:
    """Grad-CAM: L = ReLU(sum_k alpha_k A_k), with alpha_k the mean over places of dz_c / dA_k.

    At the last features of a network with global average pooling it is the class activation map divided by the number of
    places (and cut at 0).

    Args:
        model: any network with a layer whose output is (N, k, h, w); in evaluation mode. It is left exactly as it was.
        x: images (N, C, H, W), floating point, in [0, 1].
        target: the class c to explain: int64 (N,), one number for all images, or None for the predicted classes.
        layer: the name of that layer in `model.named_modules()`; the last convolution without it.
        relu: keep only what speaks for the class.
        upsample: bilinearly to the size of the image; without, as many places as the features have.
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
    Returns: (N, 1, H, W) or (N, 1, h, w).
    Raises: TypeError, ValueError: bad input, no such layer, a layer without places, a model without a convolution.
    Source: Selvaraju et al. 2017.
    Example: `grad_cam(models.gap_cnn(), torch.rand(2, 3, 32, 32), layer="8").shape` is (2, 1, 32, 32).
    """
    target = targets(model, x, target)
    name = last_convolution(model) if layer is None else layer
    layer_named(model, name)
    size, parts = images_at_once(x, batch_size), []
    for a, t in zip(x.detach().split(size), target.split(size), strict=True):
        # The images need no gradient, but the features must have a history even where the weights are frozen.
        with recorded(model, name) as seen, torch.enable_grad():
            z = selected(model(a.clone().requires_grad_()), t)
            features = seen.get("value")
            if not isinstance(features, Tensor) or features.dim() != 4:
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"layer: got {name!r}, whose output is {got}, want one with places, (N, k, h, w)")
            (grad,) = torch.autograd.grad(z.sum(), features)
        heat = (grad.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True)
        parts.append(heat.clamp(min=0) if relu else heat)
    heat = torch.cat(parts)
    return _as_large_as(heat, x) if upsample else heat


def guided_grad_cam(model, x: Tensor, target: Tensor | int | None = None, *, layer: str | None = None) -> Tensor:
    """Guided backpropagation times Grad-CAM, pixel by pixel: fine lines, where the class is. It inherits the former's fault.

    Args, errors: as for `grad_cam`. Returns: signed, shape of x.
    Source: Selvaraju et al. 2017.
    Example: `guided_grad_cam(models.gap_cnn(), torch.rand(2, 3, 32, 32))`.
    """
    target = targets(model, x, target)
    return guided_backprop(model, x, target) * grad_cam(model, x, target, layer=layer)


def _as_large_as(heat: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(heat, size=x.shape[-2:], mode="bilinear", align_corners=False)
