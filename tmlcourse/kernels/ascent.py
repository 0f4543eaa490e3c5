"""One step of projected gradient ascent, x' <- P(x' + argmax_{||v|| <= alpha} <v, g>), in one pass over memory.

Written with PyTorch's own operations a step reads and writes the batch a dozen times, and a GPU does nothing but wait for its
memory. A kernel reads x', g and x once, does everything in registers, and writes x' once: four numbers of traffic a pixel.

    Linf    every pixel on its own: sign, step, clip to [x - eps, x + eps], clip to [0, 1]
    L2      one program an image, the image in its registers: the gradient's norm, then the scale s <= 1 at which the clipped
            step has norm eps, by the same rising iteration as in the reference
    L1      one program an image: the best pixel that may still move, then the threshold t at which the shrunken step has norm
            eps. The reference finds t by sorting the breakpoints of a piecewise linear function; sorting needs memory, so the
            kernel looks for the root of that function instead, by Newton's steps kept inside a bracket. On the right piece
            one step is exact.

Sums are taken in double precision, as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..threat import L1, L2, Linf
from .dispatch import as_rows, checked, jit, on, power_of_two, takes_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**14  # numbers in an image that a program's registers hold (3 x 64 x 64 are 12,288)


def ascent_step(x_adv: Tensor, grad: Tensor, x: Tensor, threat, alpha: float | Tensor) -> Tensor:
    """P(x_adv + steepest(grad, alpha)), P the projection on the threat set around x: one step of every gradient attack.

    Args:
        x_adv: the points to move (N, ...), floating point.
        grad: gradients of what is climbed (N, ...).
        x: the clean images (N, ...), the sets' centres.
        threat: `Linf`, `L2` or `L1`; any other set of `tmlcourse.threat` is left to its own `ascend`.
        alpha: the step's size in the set's own norm, one number or one an image (N,).
    Returns:
        The new points (N, ...), dtype of x_adv. The kernel takes float32, and bfloat16 and float16 (computed in float32);
        images of more than 16,384 numbers are left to the reference unless the norm is Linf.
    Raises: ValueError for shapes or devices that differ.
    Source: Madry et al. 2018 (the step); Duchi et al. 2008 (the threshold of the L1 projection).
    Example: `ascent_step(x, torch.randn_like(x), x, Linf(0.1), 0.02).shape` is (8, 1, 28, 28).
    """
    checks.same_shape(x_adv, x)
    checks.same_shape(grad, x, "grad")
    kernel = _KERNELS.get(type(threat))
    if kernel is None:
        return reference(x_adv, grad, x, threat, alpha)
    large = ""
    if kernel is not _linf and x.numel() > LARGEST * len(x):
        large = f"got images of {x[0].numel()} numbers, the kernel holds {LARGEST}"
    name = f"ascent_step ({type(threat).__name__})"
    if not takes_kernel(name, (x_adv, grad, x), DTYPES, problem=large):
        return reference(x_adv, grad, x, threat, alpha)
    return checked(name, x, lambda: _launch(kernel, x_adv, grad, x, threat, alpha),
                   lambda: reference(x_adv, grad, x, threat, alpha))  # fmt: skip


def reference(x_adv: Tensor, grad: Tensor, x: Tensor, threat, alpha: float | Tensor) -> Tensor:
    """The same in plain PyTorch: what `tmlcourse.threat` says.

    Example: `reference(x, torch.randn_like(x), x, Linf(0.1), 0.02).shape` is (8, 1, 28, 28).
    """
    return threat.ascend(x_adv, grad, x, alpha)


def traffic(x: Tensor) -> int:
    """Bytes that a step must move: x', its gradient and x read once, x' written once.

    Example: `traffic(x)` is 100352.
    """
    return 4 * x.numel() * x.element_size()


def _launch(kernel, x_adv: Tensor, grad: Tensor, x: Tensor, threat, alpha: float | Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x_adv.dtype, device=x.device)
    if not x.numel():
        return out
    each = isinstance(alpha, Tensor)
    alphas = alpha.to(device=x.device, dtype=torch.float32).expand(len(x)).contiguous() if each else x
    low, high = threat.box if threat.box is not None else (0.0, 0.0)
    parts, size = [as_rows(t) for t in (out, x_adv, grad, x)], x[0].numel()
    if kernel is _linf:
        block, warps = 1024, 4
        grid = (len(x) * -(-size // block),)
    else:
        block = max(128, power_of_two(size))
        grid, warps = (len(x),), min(16, max(4, block // 256))
    with on(x):
        kernel[grid](
            *parts, alphas, *(p.stride(0) for p in parts), size, float("nan") if each else float(alpha), threat.eps,
            float(low), float(high), EACH=each, BOX=threat.box is not None, BLOCK=block, num_warps=warps,
            enable_fp_fusion=False,  # a product and a sum are rounded one after the other, as in the reference
        )  # fmt: skip
    return out


@jit
def _linf(
    out, x_adv, grad, x, alphas, row_out, row_adv, row_grad, row_x, size, alpha, eps, low, high,
    EACH: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits from here on: a batch may hold over 2^31 numbers
    blocks = (size + BLOCK - 1) // BLOCK
    image = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if EACH:
        alpha = tl.load(alphas + image)
    here = tl.load(x_adv + image * row_adv + at, mask=inside).to(tl.float32)
    g = tl.load(grad + image * row_grad + at, mask=inside).to(tl.float32)
    centre = tl.load(x + image * row_x + at, mask=inside).to(tl.float32)
    moved = here + tl.where(g > 0, alpha, tl.where(g < 0, -alpha, 0.0))
    moved = tl.minimum(tl.maximum(moved, centre - eps), centre + eps)
    if BOX:
        moved = tl.minimum(tl.maximum(moved, low), high)
    tl.store(out + image * row_out + at, moved.to(out.dtype.element_ty), mask=inside)


@jit
def _l2(
    out, x_adv, grad, x, alphas, row_out, row_adv, row_grad, row_x, size, alpha, eps: tl.float64, low, high,
    EACH: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    if EACH:
        alpha = tl.load(alphas + image)
    here = tl.load(x_adv + image * row_adv + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + image * row_grad + at, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(x + image * row_x + at, mask=inside, other=0.0).to(tl.float32)

    g = g / tl.maximum(tl.max(tl.abs(g)), 1.1754943508222875e-38)  # the largest first: squares do not underflow
    length = tl.sqrt(tl.sum((g * g).to(tl.float64))).to(tl.float32)
    delta = here + g / tl.maximum(length, 1.1754943508222875e-38) * alpha - centre
    if BOX:
        room = tl.maximum(tl.where(delta > 0, high - centre, centre - low), 0.0)
        step = tl.abs(delta)
        s = tl.sum(tl.zeros([BLOCK], tl.float64))
        rising = True
        while rising:
            clipped = s.to(tl.float32) * step > room
            held = tl.sum(tl.where(clipped, room * room, 0.0).to(tl.float64))
            free = tl.sum(tl.where(clipped, 0.0, step * step).to(tl.float64))
            higher = tl.minimum(tl.sqrt(tl.maximum(eps * eps - held, 0.0) / tl.maximum(free, 1e-60)), 1.0)
            rising = higher > s
            s = tl.maximum(s, higher)
        z = tl.minimum(tl.maximum(centre + delta * s.to(tl.float32), low), high)
        over = tl.sqrt(tl.sum(tl.where(inside, (z - centre) * (z - centre), 0.0).to(tl.float64)))
        if over > eps:  # what rounding added
            shrink = (eps / tl.maximum(over, 1e-30)).to(tl.float32)
            z = tl.minimum(tl.maximum(centre + (z - centre) * shrink, low), high)
    else:
        length = tl.sqrt(tl.sum((delta * delta).to(tl.float64)))
        z = centre + delta * tl.minimum(eps / tl.maximum(length, 1e-30), 1.0).to(tl.float32)
    tl.store(out + image * row_out + at, z.to(out.dtype.element_ty), mask=inside)


@jit
def _l1(
    out, x_adv, grad, x, alphas, row_out, row_adv, row_grad, row_x, size, alpha, eps: tl.float64, low, high,
    EACH: tl.constexpr, BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    if EACH:
        alpha = tl.load(alphas + image)
    here = tl.load(x_adv + image * row_adv + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + image * row_grad + at, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(x + image * row_x + at, mask=inside, other=0.0).to(tl.float32)

    # The best pixel that the box still lets move; better ones are pushed against the box.
    movable = inside
    if BOX:
        movable = inside & (tl.where(g > 0, high - here, here - low) > 0)
    score = tl.where(movable, tl.abs(g), -1.0)
    best, place = tl.max(score), tl.argmax(score, axis=0)
    push = inside & ((tl.abs(g) > best) | (at == place))
    length = tl.where(best >= 0, alpha, 0.0)  # no pixel may move: no step
    step = tl.where(g > 0, length, tl.where(g < 0, -length, 0.0))
    delta = here + tl.where(push, step, 0.0) - centre

    # The threshold: t >= 0 with sum_i min(max(|delta_i| - t, 0), room_i) = eps, a sum that falls as t grows.
    width = tl.where(inside, tl.abs(delta), 0.0).to(tl.float64)
    room = width
    if BOX:
        room = tl.minimum(tl.maximum(tl.where(delta > 0, high - centre, centre - low), 0.0).to(tl.float64), width)
    value = tl.sum(room)
    left, right, t = value * 0.0, tl.max(width), value * 0.0
    rounds = 0
    while (value - eps > 1e-13 * eps) | (eps - value > 1e-13 * eps) & (t > 0):
        too_large = value > eps
        left, right = tl.where(too_large, t, left), tl.where(too_large, right, t)
        up = (width - room <= t) & (t < width)
        down = (width - room < t) & (t <= width)
        slope = tl.sum(tl.where(too_large, up, down).to(tl.float64))
        newton = t + (value - eps) / tl.maximum(slope, 0.5)
        good = (slope > 0) & (newton > left) & (newton <= right)
        t = tl.where(good, newton, 0.5 * (left + right))
        value = tl.sum(tl.minimum(tl.maximum(width - t, 0.0), room))
        rounds += 1
        if rounds == 100:  # t is as near as doubles come
            value = eps
    kept = tl.minimum(tl.maximum(width - t, 0.0), room)
    kept = kept * tl.minimum(eps / tl.maximum(tl.sum(kept), 1e-30), 1.0)  # what rounding added
    z = centre + tl.where(delta > 0, kept, -kept).to(tl.float32)
    if BOX:
        z = tl.minimum(tl.maximum(z, low), high)
    tl.store(out + image * row_out + at, z.to(out.dtype.element_ty), mask=inside)


_KERNELS = {Linf: _linf, L2: _l2, L1: _l1}
