"""An interval through an affine layer: centre W c + b and radius |W| r, in one pass over the weights.

PyTorch needs |W| as a matrix of its own: W is read, |W| written and read again, beside the W of the centre. With few images
that traffic is all the time there is. The kernel loads each piece of W once and multiplies it with the centre; the absolute
value is taken in registers, and multiplied with the radius. The backward pass does the same for the gradients to centre and
radius, and writes the weight's in one pass:

    dc = gc W      dr = gr |W|      dW = gc^T c + sign(W) * (gr^T r)

Products are exact float32: the matrix units' short formats would round away more than a certificate's slack allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import checked, jit, on, takes_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32,)
TILE = (32, 64, 16)  # rows and columns of a program's result, and how deep a piece it multiplies: fits the registers


def interval_linear(
    weight: Tensor, bias: Tensor, centre: Tensor, radius: Tensor, spread: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W c + b, |W| r + s) of each image: what an affine layer makes of the interval c +- r.

    Args:
        weight: W (m, n). bias: b (m,).
        centre, radius: (N, n), radius >= 0.
        spread: s (m,), added to the radius (a certificate's slack for rounding); nothing without.
    Returns:
        Two tensors (N, m). Differentiable in all arguments; |W| has the gradient sign(W), 0 where W is 0.
    Raises: ValueError for shapes that do not fit.
    Source: Gowal et al. 2018.
    Example: `interval_linear(torch.randn(3, 5), torch.zeros(3), torch.rand(8, 5), torch.rand(8, 5))[1].shape` is (8, 3).
    """
    m, n = weight.shape
    if centre.shape != radius.shape or centre.dim() != 2 or centre.shape[1] != n or bias.shape != (m,):
        raise ValueError(f"weight, bias, centre, radius: got shapes {tuple(weight.shape)}, {tuple(bias.shape)}, "
                         f"{tuple(centre.shape)}, {tuple(radius.shape)}, want (m, n), (m,), (N, n), (N, n)")  # fmt: skip
    parts = (weight, bias, centre, radius) if spread is None else (weight, bias, centre, radius, spread)
    if takes_kernel("interval_linear", parts, DTYPES, backward=True):
        z, r = IntervalLinear.apply(weight, centre, radius)
        return z + bias, r if spread is None else r + spread
    return reference(weight, bias, centre, radius, spread)


def reference(
    weight: Tensor, bias: Tensor, centre: Tensor, radius: Tensor, spread: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch.

    Example: `reference(torch.randn(3, 5), torch.zeros(3), torch.rand(8, 5), torch.rand(8, 5))[0].shape` is (8, 3).
    """
    return F.linear(centre, weight, bias), F.linear(radius, weight.abs(), spread)


def traffic(weight: Tensor, centre: Tensor) -> int:
    """Bytes that must move: the weights read once, centre and radius read and written once.

    Example: `traffic(torch.zeros(3, 5), torch.zeros(8, 5))` is 572.
    """
    (m, n), images = weight.shape, len(centre)
    return (m * n + 2 * images * (n + m)) * weight.element_size()


class IntervalLinear(torch.autograd.Function):
    """(c W^T, r |W|^T), with a backward pass that does not store |W| either."""

    @staticmethod
    def forward(ctx, weight, centre, radius):
        ctx.save_for_backward(weight, centre, radius)
        return _products(centre, radius, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, to_centre, to_radius):
        weight, centre, radius = ctx.saved_tensors
        of_weight, of_images = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        dw = _outer(to_centre, centre, to_radius, radius, weight) if of_weight else None
        return dw, *(_products(to_centre, to_radius, weight) if of_images else (None, None))


def _products(first: Tensor, second: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(first @ matrix, second @ |matrix|) for (N, k), (N, k) and (k, m)."""

    def plainly() -> tuple[Tensor, Tensor]:
        return first @ matrix, second @ matrix.abs()

    if not takes_kernel("interval_linear", (first, second, matrix), DTYPES, backward=True):
        return plainly()
    return checked("interval_linear", first, lambda: _launch_pair(first, second, matrix), plainly)


def _launch_pair(first: Tensor, second: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    (n, k), m = first.shape, matrix.shape[1]
    one, two = (torch.empty(n, m, dtype=first.dtype, device=first.device) for _ in range(2))
    if not k:
        return one.zero_(), two.zero_()
    if n and m:
        rows, columns, depth = TILE
        with on(first):
            _pair[(-(-n // rows), -(-m // columns))](
                one, two, first, second, matrix, n, k, m, *first.stride(), *second.stride(), *matrix.stride(),
                ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return one, two


def _outer(to_centre: Tensor, centre: Tensor, to_radius: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    """to_centre^T centre + sign(W) * (to_radius^T radius), (m, n)."""

    def plainly() -> Tensor:
        return to_centre.t() @ centre + weight.sign() * (to_radius.t() @ radius)

    parts = (to_centre, centre, to_radius, radius, weight)
    if not takes_kernel("interval_linear's gradient", parts, DTYPES, backward=True):
        return plainly()
    return checked("interval_linear's gradient", weight, lambda: _launch_outer(*parts), plainly)


def _launch_outer(to_centre: Tensor, centre: Tensor, to_radius: Tensor, radius: Tensor, weight: Tensor) -> Tensor:
    (images, m), n = to_centre.shape, centre.shape[1]
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if images and m and n:
        rows, columns, depth = TILE
        with on(weight):
            _outer_pair[(-(-m // rows), -(-n // columns))](
                out, to_centre, centre, to_radius, radius, weight, images, m, n, *to_centre.stride(), *centre.stride(),
                *to_radius.stride(), *radius.stride(), *weight.stride(),
                ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@jit
def _pair(
    one, two, first, second, matrix, n, k, m, row_1, column_1, row_2, column_2, row_m, column_m,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None]
    sum_1, sum_2 = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, k, DEPTH):
        d = start + tl.arange(0, DEPTH).to(tl.int64)
        here = (i < n) & (d < k)[None]
        a = tl.load(first + i * row_1 + d[None] * column_1, mask=here, other=0.0)
        b = tl.load(second + i * row_2 + d[None] * column_2, mask=here, other=0.0)
        w = tl.load(matrix + d[:, None] * row_m + j * column_m, mask=(d < k)[:, None] & (j < m), other=0.0)
        sum_1 = tl.dot(a, w, sum_1, input_precision="ieee")
        sum_2 = tl.dot(b, tl.abs(w), sum_2, input_precision="ieee")
    tl.store(one + i * m + j, sum_1, mask=(i < n) & (j < m))
    tl.store(two + i * m + j, sum_2, mask=(i < n) & (j < m))


@jit
def _outer_pair(
    out, to_centre, centre, to_radius, radius, weight, images, m, n, row_a, column_a, row_c, column_c,
    row_b, column_b, row_r, column_r, row_w, column_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None]
    of_centre, of_radius = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, images, DEPTH):
        d = start + tl.arange(0, DEPTH).to(tl.int64)
        left, right = (i < m) & (d < images)[None], (d < images)[:, None] & (j < n)
        a = tl.load(to_centre + d[None] * row_a + i * column_a, mask=left, other=0.0)
        c = tl.load(centre + d[:, None] * row_c + j * column_c, mask=right, other=0.0)
        of_centre = tl.dot(a, c, of_centre, input_precision="ieee")
        b = tl.load(to_radius + d[None] * row_b + i * column_b, mask=left, other=0.0)
        r = tl.load(radius + d[:, None] * row_r + j * column_r, mask=right, other=0.0)
        of_radius = tl.dot(b, r, of_radius, input_precision="ieee")
    w = tl.load(weight + i * row_w + j * column_w, mask=(i < m) & (j < n), other=0.0)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    tl.store(out + i * n + j, of_centre + sign * of_radius, mask=(i < m) & (j < n))
