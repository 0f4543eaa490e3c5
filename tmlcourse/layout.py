"""How a model is run on a CPU so that its convolutions and their gradients come fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import checks


def images_at_once(x: Tensor, batch_size: int | None) -> int:
    """The given batch size, checked, or one that suits the caches of a CPU (64) or a GPU (1,024)."""
    if batch_size is None:
        return 64 if x.device.type == "cpu" else 1024
    return checks.positive_int(batch_size, "batch_size")


@functools.cache
def keep_pages() -> None:
    """Spare glibc from mapping every large block of memory anew, which costs a page fault per 4 KiB.

    That is a fifth of the time of CROWN, or of a step of TRADES. glibc keeps blocks up to the size of the largest mapped one
    that was freed so far, 32 MiB at most: this one, which is never touched. Functions that work for long ask for it, not the
    import: it is a setting of the whole process.

    Example: `keep_pages()`.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def channels_last(x: Tensor) -> Tensor:
    """The same images (N, C, H, W), channels last in memory: the layout in which a CPU computes convolutions fastest.

    Example: `channels_last(torch.rand(2, 3, 8, 8)).stride()` is (192, 1, 24, 3).
    """
    n, c, h, w = x.shape
    if c > 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous().as_strided(x.shape, (h * w, 1, w, 1))  # one channel: the same memory, said differently


def convolutional(model, x: Tensor) -> bool:
    """Whether these images are on a CPU and meet convolutions there.

    Example: `convolutional(small_cnn(), x)`.
    """
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and isinstance(model, torch.nn.Module)
        and any(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    )


def fast_layout(model, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`model`, run the way in which this device computes its convolutions and their gradients to the input fastest.

    On a CPU that is channels last, with `_InputConvolution` for the first layer. A model that cannot take that layout (one
    that calls `view` on its features) gets images as they are. The weights are not touched.
    """
    if not convolutional(model, x):
        return model

    def run(x: Tensor, layout: Callable) -> Tensor:
        with _FewChannels():
            return model(layout(x))

    try:
        with torch.no_grad():
            model(channels_last(x[:1]))
    except RuntimeError:
        return lambda x: run(x, Tensor.contiguous)
    return lambda x: run(x, channels_last)


class _FewChannels(TorchFunctionMode):
    """Inside this context a convolution of grey or colour images takes `_InputConvolution` for its gradient."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and not kwargs and len(args) == 7 and args[0].requires_grad:
            x, weight, bias, stride, padding, dilation, groups = args
            plain = weight.shape[1] <= 3 and groups == 1 and tuple(dilation) == (1, 1) and not isinstance(padding, str)
            if plain and x.dim() == 4:
                return _InputConvolution.apply(
                    x, weight.detach(), None if bias is None else bias.detach(), stride, padding
                )
        return function(*args, **(kwargs or {}))


class _InputConvolution(torch.autograd.Function):
    """A convolution whose gradient goes to its input only, several times faster than the library's for few channels.

    With few input channels the backward pass is a small matrix product per offset (i, j) of the filter, whose results are
    added where the filter stood: dx[p + (i, j)] += W_ij^T dy[p].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        (n, c, h, w), (sy, sx), (py, px) = ctx.shape, ctx.stride, ctx.padding
        k, _, fy, fx = weight.shape
        oh, ow = dy.shape[2:]
        parts = weight.reshape(k, -1).t() @ dy.permute(0, 2, 3, 1).reshape(-1, k).t()
        parts = parts.view(c, fy, fx, n, oh, ow)
        dx = dy.new_zeros(c, n, h + 2 * py, w + 2 * px)
        for i in range(fy):
            for j in range(fx):
                dx[:, :, i : i + sy * oh : sy, j : j + sx * ow : sx] += parts[:, i, j]
        return dx[:, :, py : py + h, px : px + w].transpose(0, 1), None, None, None, None
