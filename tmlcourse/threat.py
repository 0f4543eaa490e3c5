"""Threat models: the sets of images that an attacker may choose from.

Each set is {x' : ||x' - x|| <= eps, low <= x' <= high} around a clean image x: a ball of one norm, cut by the box of
valid pixels. The four objects share five methods (`project`, `random`, `steepest`, `norm`, `dual_norm`) and the step
that gradient attacks repeat (`ascend`). They are frozen values: compare, print and reuse them freely.

Images are batches (N, ...); every method works image by image. `box=None` lifts the box (for experiments, published
ones among them, that do not clip pixels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, ..., 1), so that it broadcasts against images."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _uniform(shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _kth_smallest_crossing(points: Tensor, values: Tensor, target: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two neighbouring breakpoints (rows sorted) between which a monotone function crosses `target`.

    `values` is non-increasing along each row; returns (left point, right point, left value, right value).
    """
    right = (values > target).sum(1, keepdim=True).clamp(1, points.shape[1] - 1)
    left = right - 1
    return points.gather(1, left), points.gather(1, right), values.gather(1, left), values.gather(1, right)


@dataclass(frozen=True)
class _Ball:
    eps: float
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self):
        object.__setattr__(self, "eps", checks.nonnegative(self.eps, "eps"))
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box: got {self.box}, want (low, high) with low < high, or None")

    def _room(self, x: Tensor, direction: Tensor) -> Tensor:
        """How far each coordinate of x can move along the sign of `direction` before it meets the box (>= 0)."""
        if self.box is None:
            return torch.full_like(x, torch.inf)
        low, high = self.box
        return torch.where(direction > 0, high - x, x - low).clamp_min(0)

    def _clip(self, x_adv: Tensor) -> Tensor:
        return x_adv if self.box is None else x_adv.clamp(*self.box)

    def contains(self, x_adv: Tensor, x: Tensor, *, tolerance: float = 1e-5) -> Tensor:
        """Whether each image of `x_adv` (N, ...) lies in the set around `x`, up to rounding: bool (N,)."""
        checks.same_shape(x_adv, x)
        inside = self.norm(x_adv - x) <= self.eps + tolerance * max(1.0, self.eps)
        if self.box is not None:
            flat = x_adv.flatten(1)
            inside &= (flat >= self.box[0] - 1e-6).all(1) & (flat <= self.box[1] + 1e-6).all(1)
        return inside

    def ascend(self, x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float | Tensor) -> Tensor:
        """One step of projected steepest ascent: P(x_adv + steepest(grad, alpha)), P the projection on the set.

        `alpha`: the step's size in the set's own norm, one number or one an image (N,).
        """
        return self.project(x_adv + self.steepest(grad, alpha), x)

    @property
    def full_step(self) -> float:
        """The step that crosses the set from its centre to its edge, in the units of `alpha`."""
        return self.eps


@dataclass(frozen=True)
class Linf(_Ball):
    """{x' : max_i |x'_i - x_i| <= eps} cut by the box. Dual norm: L1.

    Args:
        eps: radius, in units of pixel intensity (>= 0; 8/255 is usual for CIFAR-10, 0.3 for MNIST).
        box: (low, high) of valid pixels, or None.
    Source: Goodfellow, Shlens & Szegedy 2015; Madry et al. 2018.
    Example: `Linf(0.3).project(x + 1.0, x)` is x + 0.3, clipped to [0, 1].
    """

    def norm(self, delta: Tensor) -> Tensor:
        """max_i |delta_i| of each image: (N, ...) -> (N,)."""
        return delta.flatten(1).abs().amax(1)

    def dual_norm(self, grad: Tensor) -> Tensor:
        """max of <v, grad> over ||v||_inf <= 1, which is sum_i |grad_i|: (N, ...) -> (N,)."""
        return grad.flatten(1).abs().sum(1)

    def steepest(self, grad: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """argmax of <v, grad> over ||v||_inf <= alpha: alpha sign(grad)."""
        return grad.sign() * (_per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the set (in every L_p at once): clip to [x - eps, x + eps], then to the box."""
        return self._clip(torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps))

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus a point drawn uniformly from the ball, then clipped to the box."""
        return self.project(x + (2 * _uniform(x.shape, x, generator) - 1) * self.eps, x)


@dataclass(frozen=True)
class L2(_Ball):
    """{x' : sqrt(sum_i (x'_i - x_i)^2) <= eps} cut by the box. Dual norm: L2.

    Args:
        eps: radius (>= 0), Euclidean, over all channels and pixels.
        box: (low, high) of valid pixels, or None.
    Example: `L2(1.0).norm(L2(1.0).random(x) - x)` is at most 1.
    """

    def norm(self, delta: Tensor) -> Tensor:
        """sqrt(sum_i delta_i^2) of each image: (N, ...) -> (N,)."""
        return torch.linalg.vector_norm(delta.flatten(1), dim=1)

    def dual_norm(self, grad: Tensor) -> Tensor:
        """max of <v, grad> over ||v||_2 <= 1, which is ||grad||_2: (N, ...) -> (N,)."""
        return self.norm(grad)

    def steepest(self, grad: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """argmax of <v, grad> over ||v||_2 <= alpha: alpha grad / ||grad||_2 (0 where the gradient is 0)."""
        # Dividing by the largest entry first keeps the squares of tiny gradients from underflowing to zero.
        grad = grad / _per_image(grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny), grad)
        length = _per_image(self.norm(grad).clamp_min(torch.finfo(grad.dtype).tiny), grad)
        return grad / length * (_per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the set: x + clip(s delta, box), with the largest s <= 1 that keeps the norm at eps.

        ||clip(s delta)||^2 = s^2 sum_free delta_i^2 + sum_clipped room_i^2 grows with s. Solved with too few pixels clipped,
        it gives an s that is too small, at which only the right pixels can be clipped: s rises to its value in few steps.
        """
        delta = x_adv - x
        if self.box is None:
            return x + delta * _per_image((self.eps / self.norm(delta).clamp_min(1e-30)).clamp_max(1), delta)
        room, size = self._room(x, delta).flatten(1), delta.flatten(1).abs()
        room_squared, size_squared = room.square(), size.square()
        s = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        while True:
            clipped = (s.to(size.dtype) * size > room).to(size.dtype)  # as numbers: products are quicker than choices
            held = (room_squared * clipped).sum(1, keepdim=True, dtype=torch.float64)
            free = (size_squared * (1 - clipped)).sum(1, keepdim=True, dtype=torch.float64)
            higher = ((self.eps**2 - held).clamp_min(0) / free.clamp_min(1e-60)).sqrt().clamp_max(1)
            if (higher <= s).all():
                break
            s = torch.maximum(s, higher)
        z = self._clip(x + delta * _per_image(s.squeeze(1).to(x.dtype), delta))
        return self._pull_back(z, x)

    def _pull_back(self, z: Tensor, x: Tensor) -> Tensor:
        """Undo what rounding added: shrink towards x the images whose norm came out above eps."""
        over = self.norm(z - x)
        shrunk = self._clip(x + (z - x) * _per_image(self.eps / over.clamp_min(1e-30), z))
        return torch.where(_per_image(over > self.eps, z), shrunk, z)

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus a point drawn uniformly from the ball (direction of a Gaussian, radius eps U^(1/d)), then clipped."""
        direction = _normal(x, generator)
        radius = self.eps * _uniform(len(x), x, generator).pow(1 / x[0].numel())
        return self._clip(x + direction * _per_image(radius / self.norm(direction).clamp_min(1e-30), x))


@dataclass(frozen=True)
class L1(_Ball):
    """{x' : sum_i |x'_i - x_i| <= eps} cut by the box. Dual norm: Linf.

    Args:
        eps: radius (>= 0), the total change summed over channels and pixels.
        box: (low, high) of valid pixels, or None.
    Source: Duchi et al. 2008 (projection on the ball); Croce & Hein 2021 (ball and box together).
    Example: `(L1(5.0).random(x) - x).abs().flatten(1).sum(1)` is at most 5.
    """

    def norm(self, delta: Tensor) -> Tensor:
        """sum_i |delta_i| of each image: (N, ...) -> (N,)."""
        return delta.flatten(1).abs().sum(1)

    def dual_norm(self, grad: Tensor) -> Tensor:
        """max of <v, grad> over ||v||_1 <= 1, which is max_i |grad_i|: (N, ...) -> (N,)."""
        return grad.flatten(1).abs().amax(1)

    def steepest(self, grad: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """argmax of <v, grad> over ||v||_1 <= alpha: the whole step on the pixel of largest |grad_i|."""
        flat = grad.flatten(1)
        best = flat.abs().argmax(1, keepdim=True)
        step = torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign())
        return step.view_as(grad) * (_per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha)

    def ascend(self, x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float | Tensor) -> Tensor:
        """One step of projected steepest ascent on the best pixel that the box still lets move.

        Better pixels that already touch the box are pushed against it as well, which moves nothing but keeps the
        projection, which takes the same amount from every pixel, from pulling them back. On a linear model the optimum is
        therefore a fixed point, also where the box binds.
        """
        size = grad.flatten(1).abs()
        movable = torch.where(self._room(x_adv, grad).flatten(1) > 0, size, -1.0)
        best, where = movable.max(1, keepdim=True)
        push = (size > best).to(grad.dtype).scatter_(1, where, 1.0) * (best >= 0)
        step = grad.sign() * push.view_as(grad)
        return self.project(x_adv + step * (_per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha), x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the set (Euclidean): x + sign(delta) min(max(|delta| - t, 0), room), t >= 0 with sum = eps.

        The sum is piecewise linear in t with breakpoints |delta_i| and |delta_i| - room_i; sorting them finds t exactly.
        """
        delta = x_adv - x
        size = delta.flatten(1).abs().double()  # sums over thousands of pixels lose digits in single precision
        room = torch.minimum(self._room(x, delta).flatten(1).double(), size)
        # Slopes: a pixel starts to lose at t = size - room and stops at t = size, where nothing of it is left.
        points = torch.cat([size - room, size], 1)
        points, order = points.sort(1)
        slope = torch.cat([-torch.ones_like(size), torch.ones_like(size)], 1).gather(1, order).cumsum(1)
        total = room.sum(1, keepdim=True)
        drops = slope[:, :-1] * (points[:, 1:] - points[:, :-1])
        values = torch.cat([total, total + drops.cumsum(1)], 1)
        left, right, high, low = _kth_smallest_crossing(points, values, self.eps)
        t = left + (right - left) * ((high - self.eps) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        t = torch.where(total > self.eps, t, torch.zeros_like(t))
        kept = torch.minimum((size - t).clamp_min(0), room)
        kept = kept * (self.eps / kept.sum(1, keepdim=True).clamp_min(1e-30)).clamp_max(1)  # what rounding added
        return self._clip(x + delta.sign() * kept.view_as(delta).to(x.dtype))

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus a point drawn uniformly from the ball, then clipped.

        d + 1 exponential variables divided by their sum are uniform on the simplex; d of them, with random signs, are
        uniform in the ball.
        """
        n, d = len(x), x[0].numel()
        parts = -torch.log1p(-_uniform((n, d + 1), x, generator))
        signs = _uniform((n, d), x, generator).sub_(0.5).sign_()
        delta = self.eps * signs * parts[:, :d] / parts.sum(1, keepdim=True)
        return self._clip(x + delta.view_as(x))


@dataclass(frozen=True)
class L0:
    """{x' : at most k entries of x' differ from x} cut by the box.

    An entry is one number of the tensor: one channel of one pixel. The set has no radius, so its "dual norm" and its
    steepest direction are taken over v with at most k non-zero entries of size at most 1.

    Args:
        k: how many entries may change (integer >= 0).
        box: (low, high) of valid pixels; needed here, because a changed entry may take any valid value.
    Source: Papernot et al. 2016 (JSMA); Croce & Hein 2019 (PGD_0).
    Example: `L0(10).norm(L0(10).random(x) - x)` is at most 10.
    """

    k: int
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        checks.positive_int(self.k, "k", least=0)
        if self.box is None or not self.box[0] < self.box[1]:
            raise ValueError(f"box: got {self.box}, want (low, high) with low < high")

    _room = _Ball._room
    contains = _Ball.contains

    @property
    def eps(self) -> float:
        """The budget under the name that the other sets use."""
        return float(self.k)

    def _keep(self, values: Tensor, score: Tensor) -> Tensor:
        """`values` (N, ...) at the k entries of largest positive score (N, d), zero elsewhere."""
        score, where = score.topk(min(self.k, score.shape[1]), dim=1)
        mask = torch.zeros_like(values.flatten(1)).scatter_(1, where, (score > 0).to(values.dtype))
        return values * mask.view_as(values)

    def norm(self, delta: Tensor) -> Tensor:
        """The number of non-zero entries of each image: (N, ...) -> (N,)."""
        return (delta.flatten(1) != 0).sum(1).to(delta.dtype)

    def dual_norm(self, grad: Tensor) -> Tensor:
        """max of <v, grad> over ||v||_0 <= k, ||v||_inf <= 1: the sum of the k largest |grad_i|. (N, ...) -> (N,)."""
        flat = grad.flatten(1).abs()
        return flat.topk(min(self.k, flat.shape[1]), dim=1).values.sum(1)

    def steepest(self, grad: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """argmax of <v, grad> over ||v||_0 <= k, ||v||_inf <= alpha: alpha sign(grad) at the k largest |grad_i|."""
        step = self._keep(grad.sign(), grad.flatten(1).abs())
        return step * (_per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha)

    def ascend(self, x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float | Tensor) -> Tensor:
        """Move every entry by alpha uphill, then keep the k changes delta_i of largest linearised gain grad_i delta_i.

        The Euclidean projection would keep the largest changes instead, whatever they gain; with this rule one step of
        alpha = 1 is exact on a linear model.
        """
        alpha = _per_image(alpha, grad) if isinstance(alpha, Tensor) else alpha
        delta = (x_adv + alpha * grad.sign()).clamp(*self.box) - x
        return self._put(x, self._keep(delta, (delta * grad).flatten(1)))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the set (Euclidean): clip to the box, keep the k entries where that brings most."""
        asked = (x_adv - x).flatten(1)
        delta = x_adv.clamp(*self.box) - x
        gain = asked.square() - (asked - delta.flatten(1)).square()
        return self._put(x, self._keep(delta, gain))

    def _put(self, x: Tensor, delta: Tensor) -> Tensor:
        # x + 0 is x exactly, so unchanged entries stay equal bit for bit.
        return (x + delta).clamp(*self.box)

    def random(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """k entries chosen at random, each with a value drawn uniformly from the box."""
        low, high = self.box
        where = self._keep(torch.ones_like(x), _uniform((len(x), x[0].numel()), x, generator) + 1)
        return torch.where(where > 0, low + (high - low) * _uniform(x.shape, x, generator), x)

    @property
    def full_step(self) -> float:
        """The step that takes a pixel from one end of the box to the other, in the units of `alpha`."""
        return self.box[1] - self.box[0]
