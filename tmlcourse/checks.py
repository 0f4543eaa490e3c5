"""Input checks shared by every public function: the argument, what came, what is wanted, before any work."""

from __future__ import annotations

import math
import numbers
import os

import torch
from torch import Tensor, nn

# Layers whose output in train mode is not the function that is deployed (or whose buffers a forward pass would change).
_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.modules.instancenorm._InstanceNorm,
                   nn.RReLU)  # fmt: skip


def images(x: Tensor, name: str = "x") -> Tensor:
    """Require a floating-point batch of at least one image with finite values in [0, 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, want a torch.Tensor of images")
    if not x.is_floating_point():
        raise TypeError(
            f"{name}: got dtype {x.dtype}, want floating point in [0, 1] (for 8-bit images: x.float() / 255)"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want a non-empty batch (N, C, H, W) or (N, d)")
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: got NaN or infinite values, want finite values in [0, 1]")
    if low < 0 or high > 1:
        hint = " (divide by 255?)" if low >= 0 and 1.5 < high <= 255 else ""
        raise ValueError(f"{name}: got values in [{low:.4g}, {high:.4g}], want [0, 1]{hint}")
    return x


def same_shape(x_adv: Tensor, x: Tensor, name: str = "x_adv") -> None:
    """Require two tensors of one shape on one device."""
    if x_adv.shape != x.shape:
        raise ValueError(f"{name}: got shape {tuple(x_adv.shape)}, want {tuple(x.shape)}")
    if x_adv.device != x.device:
        raise ValueError(f"{name}: got device {x_adv.device}, want {x.device}")


def labels(y: Tensor, x: Tensor, name: str = "y") -> Tensor:
    """Require one int64 label an image, on the images' device. The upper end of the range is checked by `logits`."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name}: got {type(y).__name__}, want a torch.Tensor of int64 labels")
    if y.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {y.dtype}, want torch.int64 labels")
    if y.shape != x.shape[:1]:
        raise ValueError(f"{name}: got shape {tuple(y.shape)}, want ({len(x)},), one label an image")
    if y.device != x.device:
        raise ValueError(f"{name}: got device {y.device}, want {x.device}, the device of the images")
    if y.min() < 0:
        raise ValueError(f"{name}: got label {y.min().item()}, want labels >= 0")
    return y


def other_class(target: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Require `target` to be labels, none of them the image's own."""
    labels(target, x, "target")
    if same := int((target == y).sum()):
        raise ValueError(f"target: got the label itself for {same} of {len(y)} images, want another class")
    return target


def logits(z: Tensor, y: Tensor, name: str = "y") -> Tensor:
    """Require finite logits (N, K) with K >= 2, and labels below K."""
    if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(y) or z.shape[1] < 2:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"model: got output {got}, want logits ({len(y)}, K) with K >= 2")
    if y.max() >= z.shape[1]:
        raise ValueError(f"{name}: got label {y.max().item()}, want labels in [0, {z.shape[1] - 1}]")
    if not torch.isfinite(z).all():
        raise ValueError("model: got NaN or infinite logits, want finite logits (are the weights finite?)")
    return z


def model(model, x: Tensor) -> None:
    """Require a callable whose parameters are on the images' device and whose answer does not depend on train mode."""
    if not callable(model):
        raise TypeError(f"model: got {type(model).__name__}, want a callable that returns logits (N, K)")
    if not isinstance(model, nn.Module):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != x.device:
            raise ValueError(f"x: got device {x.device}, want {tensor.device}, where the model's {name} is")
    for name, layer in model.named_modules():
        if layer.training and isinstance(layer, _MODE_DEPENDENT):
            raise ValueError(f"model: got layer {name or type(layer).__name__!r} ({type(layer).__name__}) in train mode, "
                             "want evaluation mode: call model.eval() first")  # fmt: skip


def positive_int(value, name: str, *, least: int = 1) -> int:
    """Require an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r}, want an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, want an integer >= {least}")
    return int(value)


def nonnegative(value, name: str) -> float:
    """Require a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, want a number >= 0")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: got {value}, want a finite number >= 0")
    return float(value)


def positive(value, name: str) -> float:
    """Require a finite number > 0."""
    if nonnegative(value, name) == 0:
        raise ValueError(f"{name}: got 0, want a number > 0")
    return float(value)


def probability(value, name: str, *, zero: bool = False, one: bool = False) -> float:
    """Require a number in (0, 1); 0 and 1 themselves only where asked for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, want a number between 0 and 1")
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise ValueError(f"{name}: got {value}, want a number in {'[' if zero else '('}0, 1{']' if one else ')'}")
    return float(value)


def choice(value, name: str, options) -> str:
    """Require one of the named options."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, options))}")
    return value


def switch(variable: str) -> bool:
    """Whether an environment variable is set, to anything but "0"."""
    return os.environ.get(variable, "0") not in ("", "0")
