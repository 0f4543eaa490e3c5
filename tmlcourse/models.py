"""Networks of the course: plain `nn.Sequential`s that take images in [0, 1] and return logits.

Every builder takes the shape of an image, (C, H, W), so that each model works on each data set. Normalisation is the
first layer, so attacks and certificates see pixels in [0, 1] and never a hidden scale. Models come in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks, randomness


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel. mean, std: numbers or one number a channel, std > 0."""

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1))
        if not (self.std > 0).all():
            raise ValueError(f"std: got {std}, want positive numbers")

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """relu(shortcut(x) + body(x)), the block of He et al. 2016; a 1x1 convolution is the shortcut where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.body(x))


def linear(shape=(1, 28, 28), classes: int = 10, *, mean=None, std=None, seed: int | None = None) -> nn.Sequential:
    """The linear classifier h(x) = W x + b.

    Args:
        shape: (C, H, W) of the images.
        classes: number of logits K (>= 2).
        mean, std: of a first `Normalize` layer; none without them.
        seed: of the initial weights; torch's own generator without it.
    Returns:
        `nn.Sequential` in evaluation mode: (N, C, H, W) in [0, 1] -> logits (N, K).
    Example: `linear((1, 28, 28))(torch.rand(5, 1, 28, 28)).shape` is (5, 10).
    """
    return _build(shape, classes, mean, std, seed, lambda c, h, w: [nn.Flatten(), nn.Linear(c * h * w, classes)])


def mlp(
    shape=(1, 28, 28),
    classes: int = 10,
    *,
    hidden: Sequence[int] = (200, 200),
    mean=None,
    std=None,
    seed: int | None = None,
) -> nn.Sequential:
    """Fully connected ReLU network with layers of the sizes `hidden`. Other arguments: see `linear`.

    Example: `mlp(hidden=(50,))` is 784-50-10.
    """

    def layers(c, h, w):
        sizes = [c * h * w, *hidden]
        body = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        return [nn.Flatten(), *body, nn.Linear(sizes[-1], classes)]

    return _build(shape, classes, mean, std, seed, layers)


def small_cnn(shape=(1, 28, 28), classes: int = 10, *, mean=None, std=None, seed: int | None = None) -> nn.Sequential:
    """The MNIST network of the adversarial-training literature: conv 32-32-pool-64-64-pool, fc 200-200-K.

    Convolutions are 3x3 without padding, as published; images smaller than 16 pixels get padding, or nothing would be left.
    Arguments: see `linear`.
    Source: Carlini & Wagner 2017, Table I; Zhang et al. 2019 (TRADES).
    Example: `sum(p.numel() for p in small_cnn().parameters())` is 312,202.
    """

    def layers(c, h, w):
        pad = int(min(h, w) < 16)
        body = []
        for inputs, outputs in ((c, 32), (32, 64)):
            body += [nn.Conv2d(inputs, outputs, 3, padding=pad), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=pad),
                     nn.ReLU(), nn.MaxPool2d(2)]  # fmt: skip
            h, w = (h - 4 * (1 - pad)) // 2, (w - 4 * (1 - pad)) // 2
        if min(h, w) < 1:
            raise ValueError(f"shape: got {tuple(shape)}, want images of at least 4 x 4 pixels")
        return [*body, nn.Flatten(), nn.Linear(64 * h * w, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
                nn.Linear(200, classes)]  # fmt: skip

    return _build(shape, classes, mean, std, seed, layers)


def gap_cnn(
    shape=(3, 32, 32), classes: int = 10, *, widths=(16, 32, 64), mean=None, std=None, seed: int | None = None
) -> nn.Sequential:
    """Pairs of 3x3 convolutions, pooling between them, then the mean of each feature map and one linear layer.

    logit_k = b_k + sum_c w_kc mean_ij A_c(i, j): what the class sees in feature map A_c can be read off, which class
    activation maps need.

    Args:
        widths: channels of each pair of convolutions (at least one pair).
        Others: see `linear`.
    Source: Lin, Chen & Yan 2014 (global average pooling); Zhou et al. 2016 (CAM).
    Example: `gap_cnn((3, 32, 32), 8)(torch.rand(5, 3, 32, 32)).shape` is (5, 8).
    """
    widths = [checks.positive_int(width, "widths") for width in widths]
    if not widths:
        raise ValueError("widths: got none, want at least one")

    def layers(c, h, w):
        if min(h, w) < 2 ** (len(widths) - 1):
            raise ValueError(f"shape: got {tuple(shape)}, want sides of at least {2 ** (len(widths) - 1)} pixels")
        body = []
        for inputs, outputs in zip((c, *widths), widths, strict=False):
            body += [nn.MaxPool2d(2)] if body else []
            body += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1),
                     nn.ReLU()]  # fmt: skip
        return [*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]

    return _build(shape, classes, mean, std, seed, layers)


def resnet(
    shape=(3, 32, 32),
    classes: int = 10,
    *,
    depth: int = 20,
    width: int = 16,
    mean=None,
    std=None,
    seed: int | None = None,
) -> nn.Sequential:
    """Residual network for small images: 3x3 convolution, three groups of blocks (width, 2 width, 4 width), mean, linear.

    Args:
        depth: 6 n + 2 layers (8, 14, 20, ...).
        width: channels of the first group.
        Others: see `linear`.
    Source: He et al. 2016, section 4.2.
    Example: `resnet(depth=8, width=8)`.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: got {depth}, want 6 n + 2 with n >= 1: 8, 14, 20, ...")
    checks.positive_int(width, "width")

    def layers(c, h, w):
        blocks, inputs = [], width
        for group, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range((depth - 2) // 6):
                blocks.append(Residual(inputs, outputs, stride=2 if group and not block else 1))
                inputs = outputs
        stem = [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return [*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]

    return _build(shape, classes, mean, std, seed, layers)


def _build(shape, classes, mean, std, seed, layers) -> nn.Sequential:
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(s, int) and s > 0 for s in shape):
        raise ValueError(f"shape: got {shape}, want (C, H, W), three positive integers")
    checks.positive_int(classes, "classes", least=2)
    if (mean is None) != (std is None):
        raise ValueError(f"mean, std: got {mean} and {std}, want both or neither")
    with randomness.seeded(seed):
        first = [] if mean is None else [Normalize(mean, std)]
        return nn.Sequential(*first, *layers(*shape)).eval()


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)
