"""Filters before the model: what an attacker painted is squeezed out, or so the hope was.

Each is a layer g to put in front of a network h, `nn.Sequential(BitDepth(1), h)`, and the result h(g(x)) is an ordinary
model for every attack and measurement of the course.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks


class BitDepth(nn.Module):
    """Round every pixel to `bits` bits: g(x) = round(x (2^i - 1)) / (2^i - 1). Its gradient is 0 wherever it has one.

    Args:
        bits: i, an integer in [1, 16]; 1 leaves black and white, 8 is what files hold.
    Shape: (N, ...) in [0, 1] -> the same.
    Source: Xu, Evans & Qi 2018, section II.A.
    Example: `BitDepth(1)(torch.tensor([[0.2, 0.7]])).int().tolist()[0]` is [0, 1].
    """

    def __init__(self, bits: int = 1):
        super().__init__()
        self.bits = checks.positive_int(bits, "bits")
        if bits > 16:
            raise ValueError(f"bits: got {bits}, want an integer in [1, 16]")

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.bits - 1
        return (x * top).round() / top

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _Window(nn.Module):
    """A filter that sees each pixel's neighbourhood of size x size; beyond the edge the image is mirrored, edge included."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.size = checks.positive_int(size, "size")

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def _padded(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
        return x[:, :, self._mirrored(x.shape[2], x)[:, None], self._mirrored(x.shape[3], x)]

    def _mirrored(self, length: int, x: Tensor) -> Tensor:
        before = self.size // 2
        place = torch.arange(-before, length + self.size - 1 - before, device=x.device) % (2 * length)
        return torch.minimum(place, 2 * length - 1 - place)


class MeanFilter(_Window):
    """Every pixel becomes the mean of its neighbourhood of `size` x `size` pixels (>= 1), channel by channel.

    The filter is linear: it hides no gradient, and an attacker just attacks the composition h(g(x)).

    Shape: (N, C, H, W) -> the same.
    Source: Li & Li 2017 (as a detector).
    Example: `MeanFilter(3)(x).shape == x.shape`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self._padded(x), self.size, stride=1)


class MedianFilter(_Window):
    """Every pixel becomes the median of its neighbourhood of `size` x `size` pixels (>= 1), channel by channel.

    An even number of pixels has two middle ones; the larger is taken, as SciPy does. The neighbourhood of even size
    reaches one pixel further up and left. The gradient goes to the pixel that is the median, shared where several are equal.

    Shape: (N, C, H, W) -> the same.
    Source: Xu, Evans & Qi 2018, section II.B (size 2 on MNIST and CIFAR-10).
    Example: `MedianFilter(3)(x).shape == x.shape`.
    """

    def forward(self, x: Tensor) -> Tensor:
        x, k = self._padded(x), self.size
        rows, columns = x.shape[2] - k + 1, x.shape[3] - k + 1
        shifts = [x[:, :, i : i + rows, j : j + columns] for i in range(k) for j in range(k)]
        return _middle(shifts)


def _middle(values: list[Tensor]) -> Tensor:
    """The element of rank n // 2 (from 0) among n tensors, entry by entry.

    Of n // 2 + 2 values the smallest and the largest cannot be it, since more than half of all lie on their other side. So
    both are dropped, one new value comes in, and so on: comparisons of whole images, quicker than sorting each window.
    """
    values = list(values)
    if len(values) % 2 == 0:
        values.append(
            torch.full_like(values[0], torch.inf)
        )  # the larger of two middle values is the middle of one more
    window, rest = values[: len(values) // 2 + 2], values[len(values) // 2 + 2 :]
    while len(window) > 2:
        for i in range(len(window) - 1):  # the largest goes to the end
            window[i], window[i + 1] = torch.minimum(window[i], window[i + 1]), torch.maximum(window[i], window[i + 1])
        window.pop()
        for i in range(len(window) - 1, 0, -1):  # the smallest goes to the front
            window[i - 1], window[i] = torch.minimum(window[i - 1], window[i]), torch.maximum(window[i - 1], window[i])
        window.pop(0)
        if rest:
            window.append(rest.pop())
    return window[0]


class Thermometer(nn.Module):
    """Replace every pixel by a column of k lamps, lit up to its value: tau(x)_l = 1[x > l / k], l = 1, ..., k.

    With ten levels 0.66 becomes 1111110000. The k channels of a pixel take the place of its one: a network behind it has
    k C input channels and is trained on them. A small change of x changes no lamp, or some lamp completely; the gradient
    is 0 everywhere.

    Args:
        levels: k >= 2.
    Shape: (N, C, H, W) in [0, 1] -> (N, C k, H, W), the lamps of a channel side by side.
    Source: Buckman et al. 2018, section 3; the form with 1[x > l / k] is that of Athalye et al. 2018, section 5.2.
    Example: `int(Thermometer(10)(torch.full((1, 1, 1, 1), 0.66)).sum())` is 6.
    """

    def __init__(self, levels: int = 16):
        super().__init__()
        self.levels = checks.positive_int(levels, "levels", least=2)

    def forward(self, x: Tensor) -> Tensor:
        # ceil(x - l / k) is the step 1[x > l / k] on [0, 1], and autograd knows that its slope is 0.
        return self._over(x).ceil().clamp(0, 1).flatten(1, 2)

    def soft(self, x: Tensor, *, width: float = 0.25) -> Tensor:
        """The same column with ramps for steps, clip((x - l / k) / width + 1/2, 0, 1): a gradient for the attacker to use.

        Wide ramps let a pixel feel the lamps above it as well as those below. Athalye et al. 2018, section 5.2, use
        min(max(x - l / k, 0), 1), which has no gradient from the lamps above.
        """
        if checks.nonnegative(width, "width") == 0:
            raise ValueError("width: got 0, want a width > 0")
        return (self._over(x) / width + 0.5).clamp(0, 1).flatten(1, 2)

    def from_buckets(self, weight: Tensor) -> Tensor:
        """The mean column of a pixel that is spread over buckets: tau_l = sum_{b >= l} w_b.

        Bucket b = 0, ..., k - 1 holds the values in (b / k, (b + 1) / k], and bucket 0 also 0.

        Args:
            weight: (N, C, k, H, W), non-negative, summing to 1 over the buckets.
        Returns:
            (N, C k, H, W), as `forward` gives.
        """
        at_least = weight.flip(2).cumsum(2).flip(2)
        return torch.cat([at_least[:, :, 1:], torch.zeros_like(at_least[:, :, :1])], 2).flatten(1, 2)

    def edges(self, x: Tensor) -> Tensor:
        """The k thresholds l / k, in the dtype and on the device of x, shaped (k, 1, 1)."""
        return (torch.arange(1, self.levels + 1, dtype=x.dtype, device=x.device) / self.levels).view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def _over(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
        return x[:, :, None] - self.edges(x)
