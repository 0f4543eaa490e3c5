"""CROWN's step back through a ReLU: each coefficient takes one of the two lines around it, and is multiplied with its slope.

    below_i z <= relu(z_i) <= slope_i z + intercept_i:   a_i >= 0 takes the lower line, a_i < 0 the upper one
    a'_i = a_i below_i  or  a_i slope_i,                 added = sum_i min(a_i, 0) intercept_i

A network's bounds hold a row of coefficients a for every neuron of every image, thousands times as many numbers as there are
lines. PyTorch copies the lines out to the rows first, chooses into another tensor, multiplies into a third. The kernel looks
them up where they stand: it reads a once and writes a' once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dispatch import as_rows, checked, jit, on, takes_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32,)


def relu_backsubstitution(
    a: Tensor,
    below: Tensor,
    slope: Tensor,
    intercept: Tensor,
    image: Tensor | None = None,
    *,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(a', added): the coefficients behind the ReLU as coefficients before it, and what joins each row's constant.

    Args:
        a: coefficients (R, ...), one row a linear function.
        below: slopes of the lower lines, which go through 0: (N, ...), or (R, ...) without `image`.
        slope, intercept: of the upper lines, as many. Where both lines have the same slope, pass one tensor twice.
        image: the lines that each row looks at, int64 (R,); row r looks at lines r without.
        own: lower slopes (R, ...) of the rows' own, in place of `below`.
    Returns:
        a' (R, ...) and added (R,). The kernel has no backward pass: where a gradient is wanted, the reference computes.
    Raises: ValueError for shapes that do not fit.
    Source: Zhang et al. 2018; Xu et al. 2021 for slopes of the rows' own.
    Example: `relu_backsubstitution(torch.randn(8, 5), *torch.rand(3, 8, 5))[1].shape` is (8).
    """
    count = len(a) if image is None else len(slope)
    for name, lines, n in (("below", below, count), ("slope", slope, count), ("intercept", intercept, count),
                           ("own", a if own is None else own, len(a))):  # fmt: skip
        if lines.shape != (n, *a.shape[1:]):
            raise ValueError(f"{name}: got shape {tuple(lines.shape)}, want {(n, *a.shape[1:])}")
    parts = (a, below, slope, intercept) if own is None else (a, below, slope, intercept, own)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in parts)
    if wanted or not takes_kernel("relu_backsubstitution", parts, DTYPES):
        return reference(a, below, slope, intercept, image, own=own)
    return checked("relu_backsubstitution", a,
                   lambda: _launch(a, below if own is None else own, slope, intercept, image, own is not None),
                   lambda: reference(a, below, slope, intercept, image, own=own))  # fmt: skip


def reference(a, below, slope, intercept, image=None, *, own=None) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch.

    Example: `reference(torch.randn(8, 5), *torch.rand(3, 8, 5))[0].shape` is (8, 5).
    """

    def of_rows(lines: Tensor) -> Tensor:
        return lines if image is None else lines.index_select(0, image)

    if own is None and (apart := _apart(below, slope, intercept)) is not None:
        few = of_rows(apart)
        at = a.flatten(1).gather(1, few)
        lower, upper, offset = (of_rows(lines.flatten(1).gather(1, apart)) for lines in (below, slope, intercept))
        back = (a * of_rows(below)).flatten(1).scatter_(1, few, at * torch.where(at > 0, lower, upper))
        return back.view(a.shape), (at.clamp_max(0) * offset).sum(1)
    chosen = of_rows(slope)
    if own is not None or below is not slope:
        chosen = torch.where(a > 0, of_rows(below) if own is None else own, chosen)
    return a * chosen, (a.clamp_max(0) * of_rows(intercept)).flatten(1).sum(1)


def _apart(below: Tensor, slope: Tensor, intercept: Tensor) -> Tensor | None:
    """Where the two lines differ, and others to fill up: (N, most of an image); None if that is not few of them.

    Both lines are one where a neuron's sign is known, so there is nothing to choose there. Most signs are known.
    """
    apart = ((below != slope) | (intercept != 0)).flatten(1)
    most = int(apart.sum(1).amax()) if apart.numel() else 0
    return apart.to(below.dtype).topk(most, 1).indices if 4 * most < apart.shape[1] else None


def traffic(a: Tensor, slope: Tensor) -> int:
    """Bytes that must move: a read once, a' written once, the three lines read once.

    Example: `traffic(torch.zeros(8, 5), torch.zeros(2, 5))` is 472.
    """
    return (2 * a.numel() + len(a) + 3 * slope.numel()) * a.element_size()


def _launch(a, below, slope, intercept, image, own: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    added = torch.zeros(len(a), dtype=a.dtype, device=a.device)
    size = math.prod(a.shape[1:])
    if len(a) and size:
        flat = [as_rows(t) for t in (out, a, below, slope, intercept)]
        with on(a):
            _back[(len(a),)](
                *flat, added, added if image is None else image, *(f.stride(0) for f in flat), size,
                LOOK=image is not None, OWN=own, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out, added


@jit
def _back(
    out, a, below, slope, intercept, added, image, row_out, row_a, row_below, row_slope, row_intercept, size,
    LOOK: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lines = row
    if LOOK:
        lines = tl.load(image + row)
    low = lines
    if OWN:
        low = row
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        coefficient = tl.load(a + row * row_a + at, mask=inside, other=0.0)
        lower = tl.load(below + low * row_below + at, mask=inside, other=0.0)
        upper = tl.load(slope + lines * row_slope + at, mask=inside, other=0.0)
        offset = tl.load(intercept + lines * row_intercept + at, mask=inside, other=0.0)
        tl.store(out + row * row_out + at, coefficient * tl.where(coefficient > 0, lower, upper), mask=inside)
        total += tl.minimum(coefficient, 0.0) * offset
    tl.store(added + row, tl.sum(total))
