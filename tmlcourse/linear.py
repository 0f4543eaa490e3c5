"""Linear classifiers: the worst case in a threat set, exactly, and what follows from having it.

For h(x) = W x + b the margin z_y - z_t changes under a perturbation delta by <w_y - w_t, delta>, and the attacker's best
delta has a closed form. Without the box of valid pixels it costs eps ||w_y - w_t||_*, with the dual norm of the threat set:

    min over ||delta|| <= eps of z_y(x + delta) - z_t(x + delta)  =  z_y - z_t - eps ||w_y - w_t||_*.

With the box (0 <= x + delta <= 1) it is a sum over sorted pixels, exact as well. No function here searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, randomness
from .models import Normalize
from .threat import L0, L1, L2, Linf

# --- losses of a margin ----------------------------------------------------------------------------------------------


def zero_one(margin: Tensor) -> Tensor:
    """1[m <= 0]: an error, or a tie. Any shape -> same, in {0, 1}."""
    return (margin <= 0).to(margin.dtype)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - m): zero beyond a margin of 1, a line before it; at least 1[m <= 0]. Source: Cortes & Vapnik 1995."""
    return (1 - margin).clamp_min(0)


def exponential(margin: Tensor) -> Tensor:
    """exp(-m), at least 1[m <= 0]."""
    return torch.exp(-margin)


def logistic(margin: Tensor, base: float = math.e) -> Tensor:
    """log_base(1 + exp(-m)), the cross-entropy of two classes.

    In base 2 it is at least 1[m <= 0]; with the natural logarithm it is not: at m = 0 it is ln 2 < 1.

    Args:
        margin: any shape.
        base: of the logarithm (> 1).
    Source: Bartlett, Jordan & McAuliffe 2006 (surrogate losses).
    Example: `logistic(torch.zeros(1), base=2)`, which is 1, where the natural logarithm gives 0.69.
    """
    return F.softplus(-margin) / math.log(base)


# --- models ----------------------------------------------------------------------------------------------------------


class TwoLogits(nn.Module):
    """A score f (N, 1) as the logits (0, f) of two classes: class 1 wins where f > 0, and z_1 - z_0 = f."""

    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(f), f], 1)


def binary(
    shape=(1, 28, 28), *, mean=None, std=None, spread: float | None = None, seed: int | None = None
) -> nn.Sequential:
    """The binary linear classifier f(x) = w^T x + b with one vector w, as logits (0, f) of the labels 0 and 1.

    In the symbols of the textbook y' = 2 y - 1 is -1 or +1, and the margin is y' f(x).

    Args:
        shape: (C, H, W) of the images.
        mean, std: of a first `Normalize` layer; none without them.
        spread: weights start uniform in [-spread, spread] and b at 0 (>= 0; Glorot's choice, Keras' default, is
            sqrt(6 / (d + 1))); without it both start as `nn.Linear` does, with 1 / sqrt(d). It matters: a weight whose pixel
            is dark in every image gets no gradient from a regular loss and stays where it started.
        seed: of the initial weights; torch's own generator without it.
    Returns:
        `nn.Sequential` in evaluation mode: (N, C, H, W) in [0, 1] -> logits (N, 2).
    Example: `binary((1, 8, 8), seed=0)(torch.rand(5, 1, 8, 8)).shape` is (5, 2).
    """
    shape = tuple(shape)
    if not shape or not all(isinstance(s, int) and s > 0 for s in shape):
        raise ValueError(f"shape: got {shape}, want (C, H, W), positive integers")
    if (mean is None) != (std is None):
        raise ValueError(f"mean, std: got {mean} and {std}, want both or neither")
    if spread is not None:
        checks.nonnegative(spread, "spread")
    with randomness.seeded(seed):
        first, layer = [] if mean is None else [Normalize(mean, std)], nn.Linear(math.prod(shape), 1)
        if spread is not None:
            nn.init.uniform_(layer.weight, -spread, spread)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*first, nn.Flatten(), layer, TwoLogits()).eval()


def affine(model: nn.Module, shape) -> tuple[Tensor, Tensor]:
    """The W and b with model(x) = W x + b on pixels in [0, 1]; normalisation is folded in, gradients flow through.

    Args:
        model: `nn.Linear`, or a `nn.Sequential` of one `nn.Linear` and any of `Flatten`, `Identity`, before it `Normalize`,
            after it `TwoLogits`.
        shape: (C, H, W) of an image, or (d,).
    Returns:
        W (K, C, H, W), one picture a class, and b (K,).
    Raises:
        TypeError, ValueError: another layer, none or two linear ones, or another number of pixels.
    Example: `W, b = affine(binary((1, 8, 8)), (1, 8, 8)); w = W[1] - W[0]`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a linear nn.Module")
    layers = list(_layers(model))
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linears) != 1:
        raise ValueError(f"model: got {len(linears)} nn.Linear layers, want one")
    weight, bias = linears[0].weight, linears[0].bias
    shape, pixels = tuple(shape), math.prod(shape)
    if weight.shape[1] != pixels:
        raise ValueError(
            f"shape: got {shape}, {pixels} numbers, want {weight.shape[1]}, the inputs of the linear layer"
        )
    scale, shift = weight.new_ones(shape), weight.new_zeros(shape)
    W = b = None
    for layer in layers:
        if isinstance(layer, Normalize) and W is None:
            scale, shift = scale / layer.std, (shift - layer.mean) / layer.std
        elif isinstance(layer, nn.Linear):
            W = weight * scale.reshape(-1)
            b = weight @ shift.reshape(-1) + (0 if bias is None else bias)
        elif isinstance(layer, TwoLogits) and W is not None and len(W) == 1:
            W, b = torch.cat([torch.zeros_like(W), W]), torch.cat([torch.zeros_like(b), b])
        elif not isinstance(layer, (nn.Flatten, nn.Identity)):
            raise ValueError(f"model: got layer {type(layer).__name__} here, want one nn.Linear, Flatten, Identity, "
                             "Normalize before it or TwoLogits after it")  # fmt: skip
    return W.reshape(-1, *shape), b


def _layers(model: nn.Module):
    if isinstance(model, nn.Sequential):
        for layer in model:
            yield from _layers(layer)
    else:
        yield model


# --- the worst case --------------------------------------------------------------------------------------------------


@torch.no_grad()
def worst_case(model, x: Tensor, y: Tensor, threat, *, target: Tensor | None = None) -> Tensor:
    """The exact attack: argmin over Delta(x) of z_y - z_t, for the target t whose worst margin is the smallest.

    Binary, without the box, delta* = -y' eps sign(w) under `Linf`, -y' eps w / ||w||_2 under `L2`, and under `L1` all of eps
    at the largest |w_i|. With the box, pixels that reach it stay there and the rest of the budget goes to the others.

    Args:
        model: linear, see `affine`.
        x: images (N, ...), floating point, in [0, 1].
        y: int64 labels (N,).
        threat: `Linf`, `L2`, `L1` or `L0` of `tmlcourse.threat`, with or without the box.
        target: int64 labels (N,), other than y, that the attacker wants to see; the worst one without.
    Returns:
        The worst image of each threat set, shape and dtype of x. It is an attack like those of `tmlcourse.attacks`, except
        that it is the maximiser also for images that are misclassified already.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Goodfellow et al. 2015, section 5; Kolter & Madry 2018, chapter 2.
    Example: `training.accuracy(model, worst_case(model, x, y, Linf(0.1)), y)` is the exact robust accuracy.
    """
    W, b = _checked(model, x, y)
    if target is not None:
        checks.labels(target, x, "target")
        if target.max() >= len(W):
            raise ValueError(f"target: got label {target.max().item()}, want labels in [0, {len(W) - 1}]")
        if (target == y).any():
            raise ValueError(f"target: got the true label of {int((target == y).sum())} images, want another class")
    rival = _rivals(_margins(W, b, x.double(), y, threat), y).argmin(1) if target is None else target
    delta = _best_step(W[rival] - W[y], x.double(), threat)
    return threat.project((x.double() + delta).to(x.dtype), x.detach())


@torch.no_grad()
def margins(model, x: Tensor, y: Tensor, threat) -> Tensor:
    """The exact worst margins: min over Delta(x) of z_y - z_t, for each class t by itself.

    Without the box it is z_y - z_t - eps ||w_y - w_t||_*. An image is robust exactly when all of them (t != y) are positive.

    Args, errors: as for `worst_case`.
    Returns:
        (N, K), dtype of x; column y is 0.
    Source: Hein & Andriushchenko 2017, section 2 (linear case).
    Example: `margins(models.linear(seed=0), x, y, L2(1.0, box=None))`.
    """
    W, b = _checked(model, x, y)
    return _margins(W, b, x.double(), y, threat).to(x.dtype)


@torch.no_grad()
def robust_accuracy(model, x: Tensor, y: Tensor, threat) -> float:
    """Share of images that no perturbation in the threat set breaks: the truth, where attacks only bound it from above.

    Each target is a maximisation of its own, so "all worst margins are positive" is exact for any number of classes.

    Args, errors: as for `worst_case`.
    Returns: a share in [0, 1]; a tie counts as an error.
    Example: `robust_accuracy(model, x, y, Linf(0.1))`.
    """
    W, b = _checked(model, x, y)
    worst = _rivals(_margins(W, b, x.double(), y, threat), y).amin(1)
    return (worst > 0).double().mean().item()


@torch.no_grad()
def robust_risk(model, x: Tensor, y: Tensor, threat, surrogate: Callable[[Tensor], Tensor] = hinge) -> float:
    """The empirical adversarial risk (1/n) sum_i max over Delta(x_i) of L(margin), exactly, for a non-increasing L.

    Args, errors: as for `worst_case`; surrogate: margins (N,) -> losses (N,), non-increasing.
    Example: `robust_risk(model, x, y, Linf(0.2), logistic)`.
    """
    W, b = _checked(model, x, y)
    return surrogate(_rivals(_margins(W, b, x.double(), y, threat), y).amin(1)).mean().item()


@torch.no_grad()
def distance(model, x: Tensor, y: Tensor, threat) -> Tensor:
    """The exact minimum norm: the smallest eps at which the image is no longer safe, min_t (z_y - z_t) / ||w_y - w_t||_*.

    Args, errors: as for `worst_case`; of the threat set, an `Linf`, `L2` or `L1`, only the norm and the box are used. With
        the box the closed form above is replaced by an exact one over sorted pixels.
    Returns:
        (N,), dtype of x: 0 where the model is wrong already, infinite where the box lets nothing succeed.
    Source: Moosavi-Dezfooli et al. 2016, section 2 (without the box).
    Example: `distance(model, x, y, L2(0.0, box=None))`.
    """
    if not isinstance(threat, (Linf, L2, L1)):
        raise TypeError(f"threat: got {type(threat).__name__}, want Linf, L2 or L1")
    W, b = _checked(model, x, y)
    pixels = x.double().flatten(1)
    z = pixels @ W.flatten(1).T + b
    lead = z.gather(1, y[:, None]) - z
    nearest = torch.full_like(z, torch.inf)
    for t in range(len(W)):
        g = (W[t] - W[y]).flatten(1)
        if threat.box is None:
            nearest[:, t] = lead[:, t].clamp_min(0) / threat.dual_norm(g)
        else:
            nearest[:, t] = _smallest_radius(g.abs(), threat._room(pixels, g), lead[:, t : t + 1].clamp_min(0), threat)
    return _rivals(nearest.nan_to_num(nan=0.0, posinf=torch.inf), y).amin(1).to(x.dtype)


def robust_loss(threat, surrogate: Callable[[Tensor], Tensor] = hinge) -> Callable:
    """The robust loss of a linear model, solved instead of attacked: mean_i L(y' f(x_i) - eps ||w||_*), for `training.fit`.

    The penalty stands inside the loss: an example whose margin is large enough pays nothing, whatever the weights. For more
    than two classes L is taken of the smallest worst margin. With the box, gradients are those at the maximiser (Danskin).

    Args:
        threat: `Linf`, `L2`, `L1` or `L0`; `Linf(0.0)` gives the regular loss.
        surrogate: non-increasing, margins (N,) -> losses (N,): `hinge`, `logistic`, `exponential`.
    Returns:
        A loss (model, x, y) -> (scalar, logits).
    Source: Goodfellow et al. 2015, section 5; Xu, Caramanis & Mannor 2009.
    Example: `training.fit(binary(seed=0), zeros_and_ones, loss=robust_loss(Linf(0.1, box=None)), lr=0.01)`.
    """
    if not isinstance(threat, (Linf, L2, L1, L0)):
        raise TypeError(f"threat: got {type(threat).__name__}, want Linf, L2, L1 or L0")

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        W, b = affine(model, x.shape[1:])
        checks.logits(z := x.flatten(1) @ W.flatten(1).T + b, y)
        return surrogate(_rivals(_margins(W, b, x, y, threat), y).amin(1)).mean(), z

    return loss


def _checked(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W and b in double precision, after the checks that every function makes."""
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    W, b = (value.double() for value in affine(model, x.shape[1:]))
    checks.logits(x.double().flatten(1) @ W.flatten(1).T + b, y)
    return W, b


def _rivals(values: Tensor, y: Tensor) -> Tensor:
    """`values` (N, K) with column y out of the way of a minimum."""
    return values.scatter(1, y[:, None], torch.inf)


def _margins(W: Tensor, b: Tensor, x: Tensor, y: Tensor, threat) -> Tensor:
    """Worst margins (N, K), differentiable in W and b."""
    z = x.flatten(1) @ W.flatten(1).T + b
    lead = z.gather(1, y[:, None]) - z
    if threat.box is None:
        cost = threat.dual_norm((W[:, None] - W[None]).flatten(0, 1)).view(len(W), len(W))
        return lead - threat.eps * cost[y]
    gains = []
    for t in range(len(W)):
        g = W[t] - W[y]
        gains.append((g * _best_step(g.detach(), x, threat)).flatten(1).sum(1))
    return lead - torch.stack(gains, 1)


def _best_step(g: Tensor, x: Tensor, threat) -> Tensor:
    """argmax of <g, delta> over ||delta|| <= eps, low <= x + delta <= high: (N, ...) -> (N, ...)."""
    if threat.box is None:
        return threat.steepest(g, threat.eps)
    size = _sizes(g.flatten(1).abs(), threat._room(x, g).flatten(1), threat)
    return g.sign() * size.view_as(g)


def _sizes(g: Tensor, room: Tensor, threat) -> Tensor:
    """|delta_i| that maximise sum_i g_i |delta_i| inside the ball with |delta_i| <= room_i; g, room >= 0 (N, d)."""
    if isinstance(threat, Linf):
        return room.clamp_max(threat.eps)
    if isinstance(threat, L0):
        where = (g * room).topk(min(threat.k, g.shape[1]), 1).indices
        return torch.zeros_like(room).scatter(1, where, room.gather(1, where))
    if isinstance(threat, L1):  # fill the pixels in the order of g
        order = g.argsort(1, descending=True)
        room = room.gather(1, order)
        spent = (threat.eps - (room.cumsum(1) - room)).clamp_min(0).minimum(room)
        return torch.zeros_like(g).scatter(1, order, spent)
    # L2: min(t g_i, room_i) with the t at which the norm is eps; below each breakpoint room_i / g_i pixel i is free.
    breaks, order = (room / g).nan_to_num(nan=torch.inf, posinf=torch.inf).sort(1)
    room_sorted, g_sorted = room.gather(1, order), g.gather(1, order)
    clipped, free = _sums(room_sorted.square() * breaks.isfinite(), g_sorted.square())
    reached = clipped[:, :-1] + (breaks.square() * free[:, :-1]).nan_to_num(nan=torch.inf)
    k = (reached <= threat.eps**2).sum(1, keepdim=True)
    t = ((threat.eps**2 - clipped.gather(1, k)).clamp_min(0) / free.gather(1, k)).sqrt()
    rank = torch.arange(g.shape[1], device=g.device)
    size = torch.where(rank < k, room_sorted, (t * g_sorted).nan_to_num(nan=0.0, posinf=0.0).minimum(room_sorted))
    return torch.zeros_like(g).scatter(1, order, size)


def _sums(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """For k = 0..d: the sum of the first k of `before`, and of all but the first k of `after`; (N, d) -> (N, d + 1)."""
    zero = torch.zeros_like(before[:, :1])
    return torch.cat([zero, before.cumsum(1)], 1), torch.cat([after.flip(1).cumsum(1).flip(1), zero], 1)


def _smallest_radius(g: Tensor, room: Tensor, wanted: Tensor, threat) -> Tensor:
    """The least eps at which max sum_i g_i |delta_i| reaches `wanted` (N, 1) inside the box: (N,)."""
    if isinstance(threat, L1):
        order = g.argsort(1, descending=True)
        g, room = g.gather(1, order), room.gather(1, order)
        gain = g * room
        taken = (wanted - (gain.cumsum(1) - gain)).clamp_min(0).minimum(gain)
        radius = (taken / g).nan_to_num(nan=0.0).sum(1)
    else:  # sizes min(t rate_i, room_i): the t at which the gain is as wanted
        rate = torch.ones_like(g) if isinstance(threat, Linf) else g
        breaks, order = (room / rate).nan_to_num(nan=torch.inf, posinf=torch.inf).sort(1)
        rooms, rates, gs = (values.gather(1, order) for values in (room, rate, g))
        clipped, free = _sums(gs * rooms, gs * rates)
        reached = clipped[:, :-1] + (breaks * free[:, :-1]).nan_to_num(nan=torch.inf)
        k = (reached < wanted).sum(1, keepdim=True)
        t = (wanted - clipped.gather(1, k)).clamp_min(0) / free.gather(1, k)
        radius = threat.norm((t.nan_to_num(nan=0.0, posinf=0.0) * rate).minimum(room))
    return torch.where((g * room).sum(1) >= wanted[:, 0], radius, torch.inf)


# --- two theorems in closed form -------------------------------------------------------------------------------------


def gaussian_risk(w: Tensor, mean: Tensor, sigma: float, threat) -> Tensor:
    """Exact robust error of sign(w^T x) where x ~ N(y' mean, sigma^2 I), y' = -1 or +1 with equal chance.

    Phi((eps ||w||_* - <w, mean>) / (sigma ||w||_2)), Phi the normal distribution function; eps = 0 gives the natural error.

    Args:
        w: weights (d,) or (M, d), not zero.
        mean: (d,), the centre of class +1.
        sigma: standard deviation of a coordinate (> 0).
        threat: a threat set with `box=None`: Gaussian data have no box.
    Returns:
        () or (M,), double precision, in [0, 1].
    Source: Schmidt et al. 2018, section 3.
    Example: `gaussian_risk(torch.ones(100), torch.ones(100), 5.0, Linf(0.25, box=None))` is Phi(-1.5).
    """
    w, one = _weights(w, mean, threat)
    if checks.nonnegative(sigma, "sigma") == 0:
        raise ValueError("sigma: got 0, want a positive number")
    shift = threat.eps * threat.dual_norm(w) - w @ mean.to(w)
    risk = torch.special.ndtr(shift / (sigma * w.norm(dim=1)))
    return risk[0] if one else risk


def two_feature_risk(w: Tensor, p: float, eta: float, threat) -> Tensor:
    """Exact robust error of sign(w^T x) in the model where robustness costs accuracy.

    x_1 = y' with probability p, else -y'; x_2, ..., x_{d+1} ~ N(eta y', 1): one strong feature that is sometimes wrong, and
    many weak ones that together are never wrong. With v = (w_2, ..., w_{d+1}) and a = eps ||w||_*:
    p Phi((a - w_1 - eta sum v) / ||v||_2) + (1 - p) Phi((a + w_1 - eta sum v) / ||v||_2).

    Args:
        w: weights (d + 1,) or (M, d + 1), not zero.
        p: reliability of the strong feature, in [1/2, 1].
        eta: mean of a weak feature (>= 0).
        threat: a threat set with `box=None`.
    Returns:
        () or (M,), double precision, in [0, 1]. Where v = 0 the limit is taken, and a tie is an error.
    Source: Tsipras et al. 2019, section 2.1.
    Example: `two_feature_risk(torch.tensor([0.0] + [1.0] * 100), 0.95, 0.3, Linf(0.0, box=None))` is Phi(-3).
    """
    w, one = _weights(w, None, threat)
    if not 0.5 <= checks.nonnegative(p, "p") <= 1:
        raise ValueError(f"p: got {p}, want a probability in [0.5, 1]")
    checks.nonnegative(eta, "eta")
    cost, weak = threat.eps * threat.dual_norm(w), w[:, 1:]
    risk = torch.zeros_like(cost)
    for chance, sign in ((p, 1), (1 - p, -1)):
        shift, spread = cost - sign * w[:, 0] - eta * weak.sum(1), weak.norm(dim=1)
        risk += chance * torch.where(spread > 0, torch.special.ndtr(shift / spread), (shift >= 0).to(shift))
    return risk[0] if one else risk


def no_free_lunch(p: float, delta: float) -> float:
    """Upper bound p delta / (1 - p) on the robust accuracy of any classifier whose natural error is at most delta.

    In the model of `two_feature_risk`, under `Linf` with eps >= 2 eta. p in [1/2, 1), delta in [0, 1]; at most 1 comes back.
    Source: Tsipras et al. 2019, theorem 2.1.
    Example: `no_free_lunch(0.95, 0.01)` is 0.19.
    """
    if not 0.5 <= checks.nonnegative(p, "p") < 1:
        raise ValueError(f"p: got {p}, want a probability in [0.5, 1)")
    if checks.nonnegative(delta, "delta") > 1:
        raise ValueError(f"delta: got {delta}, want an error in [0, 1]")
    return min(1.0, p * delta / (1 - p))


def _weights(w: Tensor, mean: Tensor | None, threat) -> tuple[Tensor, bool]:
    """w as (M, d) in double precision, and whether it came as one vector."""
    if not isinstance(w, Tensor) or not w.is_floating_point() or w.dim() not in (1, 2) or w.shape[-1] == 0:
        got = f"{w.dtype} {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"w: got {got}, want a floating-point tensor (d,) or (M, d)")
    if not torch.isfinite(w).all() or not w.abs().amax(-1).all():
        raise ValueError("w: got NaN, infinite or all-zero weights, want finite weights that are not all zero")
    if mean is not None and (not isinstance(mean, Tensor) or mean.shape != w.shape[-1:]):
        got = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
        raise ValueError(f"mean: got {got}, want a tensor ({w.shape[-1]},)")
    if threat.box is not None:
        raise ValueError(f"threat: got box={threat.box}, want box=None: Gaussian data have no box")
    return torch.atleast_2d(w.detach().double()), w.dim() == 1
