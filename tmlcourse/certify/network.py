"""A network read as what certificates need: affine maps with activations between them.

`read(model, x)` turns an `nn.Sequential` into a `Network`: blocks of affine layers, each ended by a ReLU or a max-pooling
(the last one by nothing). Each affine layer z -> W z + b can do four things, and every bound is made of these:

    layer(z)        W z + b            an image forward
    layer.spread(r) |W| r              how wide an interval gets
    layer.back(a)   W^T a              a linear function of the output, as one of the input
    layer.shift(a)  a . b              and what the bias adds to it

Convolutions stay convolutions. A linear function of one neuron of a convolution looks at a small window of the layer
below only, so `Rows` keeps such functions as windows for as long as it can.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, kernels
from ..models import Normalize

READS = (
    "Linear, Conv2d (zero padding), AvgPool2d, AdaptiveAvgPool2d, MaxPool2d, BatchNorm in eval mode, Normalize, Flatten, "
    "Dropout in eval mode, Identity and ReLU in an nn.Sequential"
)


@dataclass(frozen=True)
class Windows:
    """G windows: of which image each is (G,), and where its upper left corner lies (G, 2), row and column of the layer.

    `row`: the window that each of R rows looks through, (R,). Rows of neurons at one place in different channels share one.
    """

    image: Tensor
    corner: Tensor
    row: Tensor


@dataclass(frozen=True)
class Rows:
    """R linear functions of one layer's values, each for one image: value = sum(a * z[image]) + const.

    `a`: (R, *shape of the layer), or with `windows` (R, C, h, w), what the function says about the neurons in its window
    (a window may reach over the edge; what `a` holds there means nothing, see `cut`). `size` sums |terms| of `const`: how
    much rounding it may hold.
    """

    a: Tensor
    image: Tensor
    const: Tensor
    size: Tensor
    windows: Windows | None = None

    def with_(self, a: Tensor, added: Tensor | float = 0.0, windows: Windows | None = None) -> Rows:
        """The same functions one layer further down; `added` joins the constant."""
        magnitude = added.detach().abs() if isinstance(added, Tensor) else abs(added)
        return Rows(a, self.image, self.const + added, self.size + magnitude, windows)

    def seen(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What of `values` (N, *shape) rows look at, each once, and which of it each row looks at, (R,).

        Images from the first to the last that a row belongs to, or their windows (zero beyond the edge).
        """
        image = self.image if self.windows is None else self.windows.image
        if not len(image):
            return values[:0].expand(0, *self.a.shape[1:]), self.image
        first, last = (v.item() for v in torch.aminmax(image))  # a chunk of rows looks at few images
        values = values[first : last + 1]
        if self.windows is None:
            return values, image - first
        h, w = self.a.shape[-2:]
        corner = self.windows.corner
        low, high = corner.amin(0).tolist(), corner.amax(0).tolist()
        top, left = max(0, -low[0]), max(0, -low[1])
        bottom, right = max(0, high[0] + h - values.shape[-2]), max(0, high[1] + w - values.shape[-1])
        cut = F.pad(values, (left, right, top, bottom)).unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5)
        return cut[image - first, corner[:, 0] + top, corner[:, 1] + left], self.windows.row

    def at(self, values: Tensor) -> Tensor:
        """What each row looks at, shaped like `a`."""
        values, which = self.seen(values)
        return values.index_select(0, which)

    def places(self, shape) -> tuple[Tensor, Tensor]:
        """Where the windows' members stand on a layer of this shape: rows (G, h) and columns (G, w), maybe beyond it."""
        corner = self.windows.corner
        y = corner[:, :1] + torch.arange(self.a.shape[-2], device=self.a.device)
        x = corner[:, 1:] + torch.arange(self.a.shape[-1], device=self.a.device)
        return y, x

    def cut(self, shape) -> Rows:
        """The same rows with zeros where a window reaches over the edge of the layer."""
        if self.windows is None:
            return self
        y, x = self.places(shape)
        y, x = (y >= 0) & (y < shape[-2]), (x >= 0) & (x < shape[-1])
        if y.all() and x.all():
            return self
        inside = (y[:, None, :, None] & x[:, None, None, :]).to(self.a.dtype).index_select(0, self.windows.row)
        return dataclasses.replace(self, a=self.a * inside)

    def dense(self, shape) -> Rows:
        """The same rows without windows: a of shape (R, *shape)."""
        if self.windows is None:
            return self
        y, x = self.places(shape)
        index = y.clamp(0, shape[-2] - 1)[:, :, None] * shape[-1] + x.clamp(0, shape[-1] - 1)[:, None, :]
        index = index.flatten(1)[self.windows.row][:, None].expand(-1, shape[0], -1)
        flat = self.a.new_zeros(len(self.a), shape[0], shape[-2] * shape[-1])
        flat = flat.scatter_add(2, index, self.cut(shape).a.flatten(2))
        return dataclasses.replace(self, a=flat.unflatten(2, tuple(shape[-2:])), windows=None)


@dataclass(frozen=True)
class Dense:
    """z -> W z + b: weight (m, n), bias (m)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight, self.bias)

    def spread(self, r: Tensor) -> Tensor:
        return F.linear(r, self.weight.abs(), self.bias.abs() * slack(r))

    def interval(self, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """layer(c) and layer.spread(r) together."""
        return kernels.interval_linear(self.weight, self.bias, c, r, self.bias.abs() * slack(r))

    def back(self, rows: Rows, shape) -> Rows:
        return rows.with_(rows.a @ self.weight, rows.a @ self.bias)


@dataclass(frozen=True)
class Conv:
    """A convolution with zero padding: weight (O, I / groups, kh, kw), bias (O)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __call__(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def spread(self, r: Tensor) -> Tensor:
        weight, bias = self.weight.abs(), self.bias.abs() * slack(r)
        return F.conv2d(r, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def back(self, rows: Rows, shape) -> Rows:
        added = rows.a.sum((2, 3)) @ self.bias
        if rows.windows is None:
            return rows.with_(self._transpose(rows.a, shape, self.padding), added)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        size = [(n - 1) * s + r for n, s, r in zip(rows.a.shape[2:], self.stride, reach, strict=True)]
        inner, outer = math.prod(rows.a.shape[1:]), shape[0] * size[0] * size[1]
        if inner * outer <= 2**17 and inner < len(rows.a):  # a small window: one matrix for all of them
            units = torch.eye(outer, dtype=rows.a.dtype, device=rows.a.device).reshape(outer, shape[0], *size)
            matrix = F.conv2d(units, self.weight, None, self.stride, 0, self.dilation, self.groups).flatten(1)
            a = (rows.a.flatten(1) @ matrix.t()).reshape(-1, shape[0], *size)
        else:
            a = self._transpose(rows.a, (shape[0], *size), (0, 0))
        return self._settled(rows.with_(a, added, self._below(rows.windows)), shape)

    def filters(self, image: Tensor, channel: Tensor, sign: Tensor, windows: Windows, shape) -> Rows | None:
        """The rows sign * z[channel] at the places of `windows`, one layer down: the filters. None if they have gaps."""
        if self.groups > 1 or self.dilation != (1, 1):
            return None
        const = self.bias[channel] * sign
        both = torch.cat([self.weight, -self.weight])  # to take rows from as they are, with no product each
        a = both.index_select(0, torch.where(sign > 0, channel, channel + len(self.weight)))
        return self._settled(Rows(a, image, const, const.detach().abs(), self._below(windows)), shape)

    def _below(self, windows: Windows) -> Windows:
        """The windows of the layer below that these windows see."""
        step, pad = (torch.tensor(v, device=windows.corner.device) for v in (self.stride, self.padding))
        return dataclasses.replace(windows, corner=windows.corner * step - pad)

    def _settled(self, rows: Rows, shape) -> Rows:
        """Windows as large as the layer are of no use."""
        h, w = rows.a.shape[-2:]
        return rows.dense(shape) if h >= shape[-2] and w >= shape[-1] else rows

    def _transpose(self, a: Tensor, shape, padding) -> Tensor:
        """W^T a: (R, O, h, w) -> (R, *shape)."""
        size = self.weight.shape[2:]
        if self.groups == 1 and shape[0] <= 3:  # few channels: a matrix product, its results added where filters stood
            parts = self.weight.flatten(1).t() @ a.flatten(2)
            return F.fold(parts, shape[1:], tuple(size), self.dilation, padding, self.stride)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, size, strict=True)]
        extra = [(shape[1 + i] + 2 * padding[i] - reach[i]) % self.stride[i] for i in range(2)]
        return F.conv_transpose2d(a, self.weight, None, self.stride, padding, extra, self.groups, self.dilation)


@dataclass(frozen=True)
class Scale:
    """z -> factor * z + shift, neuron by neuron; factor and shift have the layer's shape."""

    factor: Tensor
    offset: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z * self.factor + self.offset

    def spread(self, r: Tensor) -> Tensor:
        return r * self.factor.abs() + self.offset.abs() * slack(r)

    def back(self, rows: Rows, shape) -> Rows:
        factor, offset = self.factor, self.offset
        if rows.windows is not None:
            first = dataclasses.replace(rows.windows, image=torch.zeros_like(rows.windows.image))
            alone = dataclasses.replace(rows, windows=first)
            factor, offset = alone.at(factor[None]), alone.at(offset[None])
        return rows.with_(rows.a * factor, (rows.a * offset).flatten(1).sum(1), rows.windows)


@dataclass(frozen=True)
class Reshape:
    """Flatten: (C, H, W) -> (C H W)."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.flatten(1)

    def spread(self, r: Tensor) -> Tensor:
        return r.flatten(1)

    def back(self, rows: Rows, shape) -> Rows:
        return rows.with_(rows.a.reshape(-1, *shape))


@dataclass(frozen=True)
class MaxPool:
    """The largest of each window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, z: Tensor) -> Tensor:
        return F.max_pool2d(z, self.kernel, self.stride, self.padding)

    def where(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of each window and the flat place (row * W + column) where it stands."""
        return F.max_pool2d(z, self.kernel, self.stride, self.padding, return_indices=True)

    def members(self, shape, device) -> Tensor:
        """Flat index into (C H W) of each member of each window, -1 in the padding: (number of windows, kernel size)."""
        count = shape[0] * shape[1] * shape[2]
        index = torch.arange(1, count + 1, dtype=torch.float64, device=device).reshape(shape[0], 1, *shape[1:])
        unfolded = F.unfold(index, self.kernel, padding=self.padding, stride=self.stride)  # (C, k, windows)
        return unfolded.permute(0, 2, 1).reshape(-1, unfolded.shape[1]).long() - 1


class Relu:
    """The activation max(0, z), entry by entry."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.relu()


def slack(like: Tensor) -> float:
    """What one sum may lose to rounding, relative to its terms' sizes (a wide estimate: 8 units in the last place)."""
    return 8 * torch.finfo(like.dtype).eps


@dataclass(frozen=True)
class Block:
    """Affine layers one after the other, then an activation (None for the last block). `shapes[i]`: input of layer i."""

    layers: tuple
    activation: Relu | MaxPool | None
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    def __call__(self, z: Tensor) -> Tensor:
        """The values before the activation."""
        for layer in self.layers:
            z = layer(z)
        return z

    @property
    def mixes(self) -> int:
        """How many layers add up several neurons; with one, interval bounds of the block lose nothing."""
        return sum(isinstance(layer, (Dense, Conv)) for layer in self.layers)


@dataclass(frozen=True)
class Network:
    """Blocks z -> activation(affine(z)), one after the other. The last one gives the logits."""

    blocks: tuple[Block, ...]
    shape: tuple[int, ...]
    classes: int

    def __call__(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x if block.activation is None else block.activation(x)
        return x


def on_cpu(part):
    """A network, or anything made of tensors, dataclasses and sequences, with all its tensors on the CPU."""
    if isinstance(part, Tensor):
        return part.cpu()
    if isinstance(part, (list, tuple)):
        return type(part)(map(on_cpu, part))
    if dataclasses.is_dataclass(part):
        return dataclasses.replace(part, **{f.name: on_cpu(getattr(part, f.name)) for f in dataclasses.fields(part)})
    return part


def read(model: nn.Module, x: Tensor) -> Network:
    """The blocks of an `nn.Sequential`, in the precision and on the device of the images x (N, ...).

    Weights stay connected to the model's parameters, so bounds can be differentiated with respect to them.

    Raises:
        TypeError: not an `nn.Sequential`. ValueError: an unsupported layer (named with its index), a layer that does not
            fit its input, or a model that computes something else than its layers one after the other.
    Example: `len(read(mlp(hidden=(50, 50)), x).blocks)` is 3.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"model: got {type(model).__name__}, want an nn.Sequential: certificates read its layers ({READS})"
        )
    checks.model(model, x)
    some = x[:2].detach()
    blocks, found = _blocks(model, some)
    with torch.no_grad():
        plain = next((p.dtype for p in model.parameters()), x.dtype)
        expected = model(some.to(plain)).to(x.dtype)
    if expected.shape != found.shape or (expected - found).abs().max() > 1e-3 * (1 + expected.abs().max()):
        raise ValueError("model: its output is not that of its layers one after the other (hooks?)")
    return Network(blocks, tuple(x.shape[1:]), blocks[-1].shape[0])


def _flat(model: nn.Sequential, prefix: str = ""):
    for name, layer in model.named_children():
        if type(layer) is nn.Sequential:
            yield from _flat(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer


def _blocks(model: nn.Sequential, z: Tensor) -> tuple[tuple[Block, ...], Tensor]:
    """The blocks, and what they make of the images z, from which layers learn their shapes."""
    blocks, layers, shapes = [], [], []
    for name, layer in _flat(model):
        if isinstance(layer, (nn.Identity, nn.modules.dropout._DropoutNd)):
            continue
        try:
            op = _translate(layer, tuple(z.shape[1:]), z)
            if op is None:
                raise ValueError(f"is not supported (certificates read {READS})")
            with torch.no_grad():
                after = op(z)
        except (RuntimeError, ValueError) as cause:
            raise ValueError(f"model: layer {name!r} ({type(layer).__name__}) {cause}".replace("\n", " ")) from None
        if isinstance(op, (Relu, MaxPool)):
            blocks.append(Block(tuple(layers), op, tuple(shapes), tuple(z.shape[1:])))
            layers, shapes = [], []
        else:
            layers.append(op)
            shapes.append(tuple(z.shape[1:]))
        z = after
    if z.dim() != 2 or z.shape[1] < 2:
        raise ValueError(f"model: got output {tuple(z.shape)}, want logits (N, K) with K >= 2")
    blocks.append(Block(tuple(layers), None, tuple(shapes), tuple(z.shape[1:])))
    return tuple(blocks), z


def _translate(layer: nn.Module, shape: tuple[int, ...], z: Tensor):
    """One torch layer as ours; None if there is none."""

    def number(p, fill: float, size: int) -> Tensor:
        return z.new_full((size,), fill) if p is None else p.to(z.dtype)

    if isinstance(layer, nn.ReLU):
        return Relu()
    if isinstance(layer, nn.Flatten):
        if layer.start_dim != 1 or layer.end_dim not in (-1, len(shape)):
            raise ValueError("must flatten everything behind the batch dimension")
        return Reshape()
    if isinstance(layer, nn.Linear):
        if len(shape) != 1:
            raise ValueError(f"wants flat input, got shape {shape}: put nn.Flatten() before it")
        return Dense(layer.weight.to(z.dtype), number(layer.bias, 0.0, layer.out_features))
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise ValueError(f"pads with {layer.padding_mode!r}, want 'zeros'")
        weight = layer.weight.to(z.dtype)
        padding = _padding(layer)
        return Conv(weight, number(layer.bias, 0.0, len(weight)), layer.stride, padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = _pair(layer.output_size)
        if any(s is None or n % s for s, n in zip(size, shape[1:], strict=True)):
            raise ValueError(f"cannot cut {shape[1:]} into {size} equal parts")
        kernel = tuple(n // s for s, n in zip(size, shape[1:], strict=True))
        return _mean(shape[0], kernel, kernel, (0, 0), kernel[0] * kernel[1], z)
    if isinstance(layer, nn.AvgPool2d):
        kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
        if layer.ceil_mode or (any(padding) and not layer.count_include_pad):
            raise ValueError("with ceil_mode=True or count_include_pad=False is not supported")
        return _mean(shape[0], kernel, stride, padding, layer.divisor_override or kernel[0] * kernel[1], z)
    if isinstance(layer, nn.MaxPool2d):
        if layer.ceil_mode or _pair(layer.dilation) != (1, 1):
            raise ValueError("with ceil_mode=True or dilation is not supported")
        return MaxPool(*(_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding)))
    if isinstance(layer, Normalize):
        std = layer.std.to(z.dtype).expand(shape)
        return Scale(1 / std, -layer.mean.to(z.dtype).expand(shape) / std)
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        if layer.running_var is None:
            raise ValueError("has no running statistics")
        size = layer.num_features
        wide = (size, *[1] * (len(shape) - 1))
        factor = number(layer.weight, 1.0, size) / (layer.running_var.to(z.dtype) + layer.eps).sqrt()
        offset = number(layer.bias, 0.0, size) - layer.running_mean.to(z.dtype) * factor
        return Scale(factor.reshape(wide).expand(shape), offset.reshape(wide).expand(shape))
    return None


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("pads unevenly (padding='same' with an even kernel)")
        return total[0] // 2, total[1] // 2
    return _pair(layer.padding)


def _mean(channels: int, kernel, stride, padding, divisor: int, z: Tensor) -> Conv:
    weight = z.new_full((channels, 1, *kernel), 1 / divisor)
    return Conv(weight, z.new_zeros(channels), stride, padding, (1, 1), channels)
