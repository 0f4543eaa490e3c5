"""Square: random search with square patches, on scores alone.

The attacker keeps one perturbation an image and proposes to repaint a random square of it. What the model answers decides:
the proposal stays if the loss rose. No gradient is used, not even an estimated one, so there is none to hide.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, progress, randomness
from ..threat import L2, Linf
from .gradient import _Best
from .losses import objective
from .queries import open_door

# After these shares of the budget the area of the square is halved once more.
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)

# How much more than its share the window gets under L2, at the expense of all other changes: 1 in the paper. With 2 small
# budgets break up to twice as many MNIST images, and large ones as many (3 does less).
_GAIN = 2.0


def square(
    predict,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    loss: str | Callable = "margin",
    target: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Random search: delta' is delta but for one square of side sqrt(p h w); keep it if l(x + delta') > l(x + delta).

    Under `Linf` a square is painted with +eps or -eps, one sign a channel, and clipped to [0, 1]; the search begins with
    vertical stripes. Under `L2` the budget of two windows moves into one, with some of the rest (more than in the paper),
    shaped by a fresh bump of opposite halves; the search begins with a grid of such bumps. p starts at `p_init` and is
    halved nine times on the way.

    The first query shows whether the clean image is right already; an image leaves the search when it falls. So queries
    counted here are one more than in the paper, which does not count that look.

    Args:
        predict: images -> scores (N, K), larger for likelier classes: logits, log-probabilities or probabilities; or a
            `Queries` around such a function, whose `count` then says what each image cost.
        x: images (N, C, H, W), floating point, in [0, 1].
        y: int64 labels (N,).
        threat: `Linf` or `L2`.
        queries: the budget of each image (>= 0); with 0 the images come back as they are.
        p_init: share of the pixels that the first squares cover, in (0, 1]: 0.8 in AutoAttack and for robust MNIST, 0.05 in
            the paper for ImageNet under `Linf` (0.1 under `L2`).
        loss: what is maximised, as for `pgd`. "margin" and "cross_entropy" differ only before an image falls.
        target: int64 labels (N,) that the attacker wants to see instead; untargeted without.
        seed: makes the search reproducible; without it torch's own generator is used.
    Returns:
        The best image met, for each: one that fools the model if there was one, else the one of highest loss.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Andriushchenko et al. 2020; the schedule scaled to the budget and p_init = 0.8 from Croce & Hein 2020.
    Example: `square(model, x, y, Linf(0.3), queries=1000, seed=0)`.
    """
    checks.labels(y, checks.images(x))
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W): a square needs rows and columns")
    if not isinstance(threat, (Linf, L2)):
        raise ValueError(f"threat: got {threat!r}, want Linf or L2")
    if not 0 < checks.nonnegative(p_init, "p_init") <= 1:
        raise ValueError(f"p_init: got {p_init}, want a share in (0, 1]")
    checks.positive_int(queries, "queries", least=0)
    if target is not None and (checks.labels(target, x, "target") == y).any():
        raise ValueError(f"target: got the true label for {int((target == y).sum())} images, want other classes")
    attacker = objective(loss, target)
    begin, propose = (_stripes, _paint) if isinstance(threat, Linf) else (_grid, _pour)
    generator = randomness.generator(seed, x.device)
    x = x.detach()
    oracle = open_door(predict, x, queries)
    left = oracle.left(len(x)).to(x.device)
    queries = int(left.max())
    now, value = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    best = _Best(x, y, target, attacker)

    def ask(active: Tensor, candidates: Tensor) -> Tensor:
        """Query the candidates, move where the loss rose, and return the images that have not fallen."""
        z = checks.logits(oracle(candidates, active), y[active])
        if target is not None:
            checks.logits(z, target[active], "target")
        new, fooled = best.offer(active, candidates, z)
        rose = new > value[active]
        now[active[rose]], value[active[rose]] = candidates[rose], new[rose].to(value.dtype)
        return active[~fooled]

    active = torch.arange(len(x), device=x.device)
    with progress.bar(total=queries, desc="Square", unit="query") as bar:
        for asked in range(queries):
            active = active[left[active] > asked]
            if not len(active):
                break
            if asked == 0:
                active = ask(active, x[active])
                value.fill_(-torch.inf)  # the search sets out from the first pattern, worse than the clean image or not
            elif asked == 1:
                active = ask(active, begin(x[active], threat, generator))
            else:
                p = p_init / 2 ** bisect.bisect_left(_HALVINGS, (asked - 2) / (queries - 1))
                active = ask(active, propose(now[active], x[active], p, threat, generator))
            bar.update()
    return best.x


def _windows(x: Tensor, side: int, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of one random square of `side` pixels in each image: `x[index]` is (N, C, side, side)."""
    n, c, h, w = x.shape
    images, channels, step = (torch.arange(k, device=x.device) for k in (n, c, side))
    top, left = (torch.randint(k - side + 1, (n, 1), generator=generator, device=x.device) for k in (h, w))
    rows, columns = (top + step)[:, None, :, None], (left + step)[:, None, None]
    return images[:, None, None, None], channels[:, None, None], rows, columns


def _signs(shape, like: Tensor, generator) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def _stripes(x: Tensor, threat, generator) -> Tensor:
    """Vertical stripes of +eps and -eps: one sign for each column and channel."""
    n, c, _, w = x.shape
    return threat.project(x + threat.eps * _signs((n, c, 1, w), x, generator), x)


def _paint(now: Tensor, x: Tensor, p: float, threat, generator) -> Tensor:
    """Repaint a square with +eps or -eps, a sign a channel; where that would change nothing, with the opposite signs."""
    n, c, h, w = x.shape
    side = min(max(round(math.sqrt(p * h * w)), 1), h, w)
    window, signs = _windows(x, side, generator), _signs((n, c, 1, 1), x, generator)
    paint, opposite = (threat.project(x[window] + s * threat.eps, x[window]) for s in (signs, -signs))
    idle = (paint == now[window]).flatten(1).all(1)
    candidates = now.clone()
    candidates[window] = torch.where(idle[:, None, None, None], opposite, paint)
    return candidates


def _bump(side: int, like: Tensor) -> Tensor:
    """A square of unit length whose upper half is a hill, sum over k >= d of 1/k^2 at ring d, and the lower half a valley."""

    def hill(rows: int) -> Tensor:
        away = [(torch.arange(k, device=like.device) - k // 2).abs() for k in (rows, side)]
        ring = torch.maximum(away[0][:, None], away[1])
        heights = torch.arange(1, side // 2 + 2, dtype=like.dtype, device=like.device).pow(-2).flip(0).cumsum(0).flip(0)
        return heights[ring] / heights[ring].norm().clamp_min(1e-30)

    bump = torch.cat([hill(side // 2), -hill(side - side // 2)])
    return bump / bump.norm()


def _bumps(n: int, side: int, like: Tensor, generator) -> Tensor:
    """n bumps (N, C, side, side), each upright or on its side, with a random sign a channel."""
    bump = _bump(side, like)
    upright = _signs((n, 1, 1, 1), like, generator) > 0
    return torch.where(upright, bump, bump.t()) * _signs((n, like.shape[1], 1, 1), like, generator)


def _grid(x: Tensor, threat, generator) -> Tensor:
    """A grid of bumps, five along the shorter side, with all of the budget."""
    n, _, h, w = x.shape
    side = max(min(h, w) // 5, 1)
    delta = torch.zeros_like(x)
    for top in range(h % side // 2, h - side + 1, side):
        for left in range(w % side // 2, w - side + 1, side):
            delta[:, :, top : top + side, left : left + side] = _bumps(n, side, x, generator)
    return _spend(delta, x, threat)


def _pour(now: Tensor, x: Tensor, p: float, threat, generator) -> Tensor:
    """Take the change out of two windows and put it, what is left of eps, and a little of all the rest into the first one.

    What goes there is the old change plus a bump, both of unit length in each channel.
    """
    n, c, h, w = x.shape
    side = min(max(round(math.sqrt(p * h * w)), 3) | 1, h, w)
    first, second = (_windows(x, side, generator) for _ in range(2))
    delta = now - x
    rest, old = delta.clone(), delta[first]
    rest[first] = rest[second] = 0
    energy = (delta.square() - rest.square()).sum((2, 3), keepdim=True)
    spare = (threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / c
    shape = _bumps(n, side, x, generator) + old / old.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    rest[first] = shape / shape.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12) * _GAIN * (energy + spare).sqrt()
    return _spend(rest, x, threat)


def _spend(delta: Tensor, x: Tensor, threat) -> Tensor:
    """x plus delta, scaled until its length inside the box is eps: what one pixel cannot take, the others get."""
    length = threat.norm(delta).clamp_min(1e-12).view(-1, 1, 1, 1)
    return threat.project(x + delta * (100 * threat.eps / length), x)
