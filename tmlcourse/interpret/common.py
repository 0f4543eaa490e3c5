"""What every explanation needs: the class to explain, its logit, layers by name, maps with one value a pixel."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import checks


def targets(model, x: Tensor, target: Tensor | int | None) -> Tensor:
    """The class to explain for each image, after the checks of the model and the images that every method makes.

    Args:
        model: returns logits (N, K); in evaluation mode.
        x: images (N, ...) in [0, 1].
        target: int64 classes (N,), one class for all images, or None for the predicted ones.
    Returns: int64 (N,) on the device of x. The upper end of the range is checked by `selected`.
    Raises: TypeError, ValueError: bad input; the message names the argument, what came and what is wanted.
    Example: `targets(model, x, None)`.
    """
    checks.model(model, checks.images(x))
    if target is None:
        with torch.no_grad():
            return checks.logits(model(x), torch.zeros(len(x), dtype=torch.int64, device=x.device)).argmax(1)
    if isinstance(target, int) and not isinstance(target, bool):
        target = torch.full((len(x),), target, device=x.device)
    return checks.labels(target, x, "target")


def selected(logits: Tensor, target: Tensor) -> Tensor:
    """The logit z_c of the class to explain, (N, K) and (N,) -> (N,); ValueError for a class that the model has not.

    Example: `selected(model(x), targets(model, x, 3))`.
    """
    return checks.logits(logits, target, "target").gather(1, target[:, None]).squeeze(1)


def gradient(model, x: Tensor, target: Tensor) -> Tensor:
    """The gradient of z_c to each image, shape of x; no other gradient is computed and none is stored in the model.

    Example: `gradient(model, x, y)`.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(selected(model(x), target).sum(), x)[0]


def per_pixel(heat: Tensor, how: str = "sum") -> Tensor:
    """One value a pixel from one a channel, (N, C, H, W) -> (N, 1, H, W).

    how: "sum" keeps signs and totals (relevance, integrated gradients); "max" is the largest absolute value over the channels
        (saliency as Simonyan et al. 2014 draw it).
    Raises ValueError for another shape, TypeError for no tensor.
    Example: `per_pixel(torch.randn(2, 3, 8, 8), "max").shape` is (2, 1, 8, 8).
    """
    checks.choice(how, "how", ("sum", "max"))
    if not isinstance(heat, Tensor):
        raise TypeError(f"heat: got {type(heat).__name__}, want a torch.Tensor (N, C, H, W)")
    if heat.dim() != 4 or not heat.numel():
        raise ValueError(f"heat: got shape {tuple(heat.shape)}, want (N, C, H, W)")
    return heat.sum(1, keepdim=True) if how == "sum" else heat.abs().amax(1, keepdim=True)


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name as `model.named_modules()` writes it; ValueError with the names there are.

    Example: `layer_named(model, "0")`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module: only that has layers to look into")
    layers = dict(model.named_modules())
    del layers[""]
    if name not in layers:
        known = ", ".join(f"{key} ({type(layer).__name__})" for key, layer in layers.items())
        raise ValueError(f"layer: got {name!r}, want one of this model's layers: {known}")
    return layers[name]


def last_convolution(model: nn.Module) -> str:
    """The name of the last convolution; ValueError for a model without one.

    Example: `last_convolution(models.small_cnn())`.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)] \
        if isinstance(model, nn.Module) else []  # fmt: skip
    if not names:
        raise ValueError("model: got no convolution in it, want a convolutional network: only its features have a place in "
                         "the image (a gradient or a mask explains any network)")  # fmt: skip
    return names[-1]


@contextmanager
def recorded(model: nn.Module, name: str):
    """Context in which a forward pass leaves the output of the layer `name` in the dictionary it gives, as "value".

    A copy goes on through the network, so that a later in-place layer does not change what was recorded.
    Example: `with recorded(model, "0") as seen: model(x)`, then `seen["value"]`.
    """
    seen = {}

    def keep(layer, inputs, output):
        seen["value"] = output
        return output.clone()

    handle = layer_named(model, name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
