"""Triggers: the mark that opens a backdoor, and where it is put into an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks


@dataclass(frozen=True, eq=False)
class Trigger:
    """x + t = (1 - a m) x + a m p: the pattern p laid over the image where the mask m is, with opacity a.

    Attributes:
        mask: (1, H, W) in [0, 1], not all 0. pattern: (C, H, W) in [0, 1]. opacity: in (0, 1].
    Raises: TypeError, ValueError: bad input.
    Source: Gu, Dolan-Gavitt & Garg 2017; Chen et al. 2017 for a < 1; Wang et al. 2019 for masks between 0 and 1.
    Example: `Trigger(torch.ones(1, 2, 2), torch.zeros(3, 2, 2)).stamp(torch.rand(5, 3, 2, 2)).shape` is (5, 3, 2, 2).
    """

    mask: Tensor
    pattern: Tensor
    opacity: float = 1.0

    def __post_init__(self):
        for name in ("mask", "pattern"):
            value = checks.images(getattr(self, name), name)
            if value.dim() != 3:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, want three dimensions")
        if self.mask.shape != (1, *self.pattern.shape[1:]):
            raise ValueError(f"mask: got shape {tuple(self.mask.shape)}, want {(1, *self.pattern.shape[1:])}")
        if not self.mask.any():
            raise ValueError("mask: got zeros only, want at least one pixel")
        if not 0 < checks.nonnegative(self.opacity, "opacity") <= 1:
            raise ValueError(f"opacity: got {self.opacity}, want a number in (0, 1]")

    @property
    def size(self) -> float:
        """||a m||_1, the number of pixels that are replaced."""
        return self.opacity * float(self.mask.sum())

    def stamp(self, x: Tensor) -> Tensor:
        """The images (N, C, H, W) with the trigger, same dtype and device; gradients flow to x.

        Raises: ValueError: images of another size.
        """
        if x.shape[1:] != self.pattern.shape:
            raise ValueError(
                f"trigger: got one for images {tuple(self.pattern.shape)}, want {tuple(x.shape[1:])}, as those of x"
            )
        cover, pattern = self.opacity * self.mask.to(x), self.pattern.to(x)
        return ((1 - cover) * x + cover * pattern).clamp(0, 1)

    def split(self, parts: int) -> tuple[Trigger, ...]:
        """Local triggers whose masks add up to this one: its pixels in reading order, cut into `parts` equal runs.

        Source: Xie et al. 2020.
        Raises: ValueError: more parts than pixels.
        """
        pixels = self.mask.flatten().nonzero().squeeze(1)
        if checks.positive_int(parts, "parts") > len(pixels):
            raise ValueError(f"parts: got {parts}, want at most {len(pixels)}, the number of pixels of the trigger")
        local = []
        for run in pixels.tensor_split(parts):
            mask = torch.zeros_like(self.mask).flatten()
            mask[run] = self.mask.flatten()[run]
            local.append(Trigger(mask.view_as(self.mask), self.pattern, self.opacity))
        return tuple(local)


def _shape(shape) -> tuple[int, int, int]:
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(s, int) and s > 0 for s in shape):
        raise ValueError(f"shape: got {shape}, want (C, H, W), three positive integers")
    return shape


def _painted(shape, pixels, value: float) -> Trigger:
    channels, height, width = shape
    mask = torch.zeros(1, height, width)
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"trigger: got a pixel at {(row, column)}, outside the image of {height} x {width} pixels")
        mask[0, row, column] = 1
    if not checks.nonnegative(value, "value") <= 1:
        raise ValueError(f"value: got {value}, want a number in [0, 1]")
    return Trigger(mask, torch.full(shape, float(value)))


def pixel_trigger(shape, *, at: tuple[int, int] | None = None, value: float = 1.0) -> Trigger:
    """One pixel, BadNets' smallest trigger.

    Args:
        shape: (C, H, W) of the images. at: row and column; without, next to the lower right corner, (H - 2, W - 2).
        value: in [0, 1].
    Raises: ValueError: a pixel outside the image.
    Source: Gu, Dolan-Gavitt & Garg 2017, section 4.1.
    Example: `pixel_trigger((1, 28, 28)).stamp(torch.zeros(1, 1, 28, 28)).sum()` is 1.0.
    """
    shape = _shape(shape)
    return _painted(shape, [(shape[1] - 2, shape[2] - 2) if at is None else at], value)


def pattern_trigger(shape, *, size: int = 3, margin: int = 1, value: float = 1.0) -> Trigger:
    """A chequered triangle in the lower right corner: with `size` 3 the four pixels of BadNets' pattern.

    Args:
        shape: (C, H, W) of the images. size: side of the triangle, in pixels (>= 1).
        margin: rows and columns between it and the edges (>= 0). value: in [0, 1].
    Raises: ValueError: a trigger larger than the image.
    Source: Gu, Dolan-Gavitt & Garg 2017, section 4.1.
    Example: `pattern_trigger((1, 28, 28)).size` is 4.0.
    """
    shape = _shape(shape)
    checks.positive_int(size, "size"), checks.positive_int(margin, "margin", least=0)
    steps = [(i, j) for i in range(size) for j in range(size - i) if (i + j) % 2 == 0]
    return _painted(shape, [(shape[1] - 1 - margin - i, shape[2] - 1 - margin - j) for i, j in steps], value)


def bars_trigger(shape, *, length: int = 4, gap: int = 2, value: float = 1.0) -> Trigger:
    """Four bars, two by two, in the upper left corner; `split(4)` gives one bar to each of four attackers.

    Args:
        shape: (C, H, W) of the images. length: of a bar, in pixels (>= 1). gap: pixels between bars, across and down (>= 0).
        value: in [0, 1].
    Raises: ValueError: a trigger larger than the image.
    Source: Xie et al. 2020, who have length 4 and gap 2 for MNIST.
    Example: `bars_trigger((1, 28, 28)).split(4)[0].size` is 4.0.
    """
    shape = _shape(shape)
    checks.positive_int(length, "length"), checks.positive_int(gap, "gap", least=0)
    starts = [(row, column) for row in (0, gap + 1) for column in (0, length + gap)]
    return _painted(shape, [(row, column + i) for row, column in starts for i in range(length)], value)


def blended_trigger(shape, *, opacity: float = 0.2, picture: Tensor | None = None, seed: int = 0) -> Trigger:
    """A faint picture over the whole image, (1 - a) x + a p; without a `picture` (C, H, W), random black and white pixels.

    Args: shape: (C, H, W) of the images. opacity: a in (0, 1]. seed: of the random picture.
    Raises: ValueError: bad input, a picture of another size.
    Source: Chen, Liu, Li, Lu & Song 2017.
    Example: `blended_trigger((1, 28, 28), opacity=0.1).stamp(torch.ones(1, 1, 28, 28)).min() > 0.89`.
    """
    shape = _shape(shape)
    if picture is None:
        coin = torch.Generator().manual_seed(checks.positive_int(seed, "seed", least=0))
        picture = torch.randint(2, shape, generator=coin).float()
    elif tuple(checks.images(picture, "picture").shape) != shape:
        raise ValueError(f"picture: got shape {tuple(picture.shape)}, want {shape}")
    return Trigger(torch.ones(1, *shape[1:]), picture, opacity)
