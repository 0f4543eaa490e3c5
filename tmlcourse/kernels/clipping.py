"""Per-example norms, clipping and sum: sum_i g_i min(1, C / ||g_i||), the step inside differentially private learning.

The gradients of all examples are the largest thing that a private step holds: N numbers for each parameter. Scaling them
first and adding then writes a second copy of that. Here they are read twice, once for the norms and once for the weighted
sum, whose partial sums stay in registers, and nothing of their size is written. One read could only do where an example's
whole gradient fits into registers, since no entry may be added before the last one has been squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dispatch import as_rows, checked, jit, on, takes_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 2048  # launched at once, about: enough to keep every part of a large GPU busy


def clip_and_sum(grads: Tensor | Sequence[Tensor], clip: float) -> tuple[Tensor | list[Tensor], Tensor]:
    """sum_i g_i min(1, clip / ||g_i||) and the norms ||g_i|| before clipping; ||g_i|| runs over all parameters together.

    An example whose norm is not finite counts nothing: one broken record must not break the guarantee.

    Args:
        grads: per-example gradients (N, ...), floating point; or a sequence of them, one a parameter.
        clip: C > 0; `math.inf` clips nothing.
    Returns:
        The sum (...), or a list of sums, and the norms (N,); dtype of the gradients. An empty batch sums to zero.
    Raises: ValueError for a clip that is not positive, batches of different sizes, or no gradients.
    Source: Abadi et al. 2016.
    Example: `clip_and_sum(torch.randn(8, 3, 5), 1.0)[0].shape` is (3, 5).
    """
    parts = [grads] if isinstance(grads, Tensor) else list(grads)
    if not (isinstance(clip, (int, float)) and clip > 0):
        raise ValueError(f"clip: got {clip}, want a number > 0")
    if not parts or any(g.dim() < 1 or len(g) != len(parts[0]) for g in parts):
        raise ValueError(
            f"grads: got shapes {[tuple(g.shape) for g in parts]}, want one or more (N, ...), all with one N"
        )
    if takes_kernel("clip_and_sum", tuple(parts), DTYPES) and all(g.numel() for g in parts):
        sums, norms = checked("clip_and_sum", parts[0], lambda: _launch(parts, clip), lambda: reference(parts, clip))
    else:
        sums, norms = reference(parts, clip)
    return sums[0] if isinstance(grads, Tensor) else sums, norms


def reference(grads: Sequence[Tensor], clip: float) -> tuple[list[Tensor], Tensor]:
    """The same in plain PyTorch.

    Example: `reference([torch.randn(8, 3), torch.randn(8, 2, 2)], 1.0)[1].shape` is (8).
    """
    norms = torch.stack([(g.flatten(1) if g.dim() > 1 else g[:, None]).norm(dim=1) for g in grads]).norm(dim=0)
    weights = scale(norms, clip)
    return [_weighted(g, weights) for g in grads], norms


def scale(norms: Tensor, clip: float) -> Tensor:
    """min(1, clip / norm) of each example, and 0 for a gradient that is not finite: (N,) -> (N,).

    Example: `scale(torch.tensor([0.5, 2.0]), 1.0).tolist() == [1.0, 0.5]`.
    """
    return torch.where(torch.isfinite(norms), (clip / norms.clamp_min(1e-30)).clamp_max(1.0), 0.0)


def squared_norms(grads: Tensor) -> Tensor:
    """||g_i||^2 of each example: (N, ...) -> (N,).

    Example: `squared_norms(torch.ones(8, 3, 5)).tolist() == [15.0] * 8`.
    """

    def plainly() -> Tensor:
        return (grads.flatten(1) if grads.dim() > 1 else grads[:, None]).square().sum(1)

    if takes_kernel("squared_norms", (grads,), DTYPES) and grads.numel():
        return checked("squared_norms", grads, lambda: _squares([grads]).to(grads.dtype), plainly)
    return plainly()


def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i g_i, weights (N,) >= 0; an example of weight 0 counts nothing even where it is not finite.

    Example: `weighted_sum(torch.ones(8, 3, 5), torch.ones(8)).shape` is (3, 5).
    """
    if takes_kernel("weighted_sum", (grads, weights), DTYPES) and grads.numel():
        return checked("weighted_sum", grads, lambda: _weigh(grads, weights.contiguous(), None),
                       lambda: _weighted(grads, weights))  # fmt: skip
    return _weighted(grads, weights)


def _launch(parts: Sequence[Tensor], clip: float) -> tuple[list[Tensor], Tensor]:
    norms = _squares(parts).sqrt()
    return [_weigh(g, norms, float(clip)) for g in parts], norms.to(parts[0].dtype)


def traffic(grads: Tensor) -> int:
    """Bytes that norms, clipping and sum must move: the gradients read twice, the sum written once.

    Example: `traffic(torch.zeros(8, 3, 5))` is 1020.
    """
    return (2 * grads.numel() + grads[0].numel()) * grads.element_size()


def _weighted(grads: Tensor, weights: Tensor) -> Tensor:
    if bool((weights == 0).any()):
        grads = grads[weights > 0]
    return torch.tensordot(weights[weights > 0] if len(grads) < len(weights) else weights, grads, 1)


def _squares(grads: list[Tensor]) -> Tensor:
    """||g_i||^2 over all parameters, (N,) in float32. Long gradients are cut, so that few examples keep a GPU busy."""
    flat, block = [as_rows(g) for g in grads], 1024
    n = len(flat[0])
    cuts = [min(-(-f.shape[1] // (4 * block)), -(-PROGRAMS // n)) for f in flat]
    out = torch.empty(n, sum(cuts), dtype=torch.float32, device=flat[0].device)
    first = 0
    with on(out):
        for f, cut in zip(flat, cuts, strict=True):
            piece = -(-f.shape[1] // (cut * block)) * block
            part = out[:, first : first + cut]
            _norm[(n, cut)](part, f, out.stride(0), f.stride(0), f.shape[1], piece, BLOCK=block, num_warps=4,
                                  enable_fp_fusion=True)  # fmt: skip
            first += cut
    return out.sum(1)


def _weigh(grads: Tensor, weights: Tensor, clip: float | None) -> Tensor:
    """The weighted sum; with `clip`, `weights` are norms, and min(1, clip / norm) is computed on the way."""
    flat = as_rows(grads)
    n, size = flat.shape
    tall, wide = 8, 512
    blocks = -(-size // wide)
    cut = max(1, min(-(-n // (4 * tall)), PROGRAMS // blocks))
    each = -(-n // (cut * tall)) * tall
    out = torch.empty(cut, size, dtype=torch.float32, device=grads.device)
    with on(out):
        _sum[(blocks, cut)](
            out, flat, weights, flat.stride(0), n, size, each, 0.0 if clip is None else clip,
            CLIP=clip is not None, TALL=tall, WIDE=wide, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return (out[0] if cut == 1 else out.sum(0)).to(grads.dtype).view(grads.shape[1:])


@jit
def _norm(out, grads, row_out, row, size, piece, BLOCK: tl.constexpr):
    example, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(part * piece, tl.minimum((part + 1) * piece, size), BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        g = tl.load(grads + example * row + at, mask=at < size, other=0.0).to(tl.float32)
        total += g * g
    tl.store(out + example * row_out + part, tl.sum(total))


@jit
def _sum(
    out, grads, weights, row, n, size, each, clip,
    CLIP: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros([TALL, WIDE], tl.float32)
    for start in range(part * each, tl.minimum((part + 1) * each, n), TALL):
        example = start + tl.arange(0, TALL).to(tl.int64)
        weight = tl.load(weights + example, mask=example < n, other=0.0).to(tl.float32)
        if CLIP:  # a norm that is NaN is not below infinity either
            weight = tl.where(weight < float("inf"), tl.minimum(clip / tl.maximum(weight, 1e-30), 1.0), 0.0)
        counts = (weight > 0) & (example < n)
        g = tl.load(grads + example[:, None] * row + at[None], mask=counts[:, None] & (at < size)[None], other=0.0)
        total += tl.where(counts, weight, 0.0)[:, None] * g.to(tl.float32)
    tl.store(out + part * size + at, tl.sum(total, axis=0), mask=at < size)
