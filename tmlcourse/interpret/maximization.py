"""Activation maximisation: the image that a neuron, a channel, a layer or a class answers to most.

x* = argmax_x h(x) - lambda R(x), by gradient ascent on the image. What h is comes from small functions (`neuron`, `channel`,
`energy`, `direction`, `logit`, `probability`); what keeps x an image is the regulariser R and the way in which x is written
down: pixel by pixel, or as waves, in which the ascent prefers what is smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress
from ..layout import fast_layout
from ..randomness import generator
from .common import layer_named

# How red, green and blue go together in photographs: the root of their covariance, scaled (Olah et al. 2017, from ImageNet).
NATURAL_COLOURS = ((0.5628, 0.1948, 0.0433), (0.5844, 0.0, -0.1082), (0.5844, -0.1948, 0.0649))


@dataclass(frozen=True)
class Objective:
    """What is to be maximised: `value` of what comes out of `layer`, (N, ...) -> (N,); "" is the network's own output.

    `says` is a title for figures, `n` how many images it speaks of (None: any number). Made by `neuron`, `channel`, `energy`,
    `direction`, `logit`, `probability`.
    Example: `Objective("", lambda z: z[:, 3] - z[:, 5], "3 rather than 5")`.
    """

    layer: str
    value: Callable[[Tensor], Tensor]
    says: str
    n: int | None = None


def neuron(layer: str, c, y: int | None = None, x: int | None = None) -> Objective:
    """One neuron h_{c,y,x} of a layer, by default the one in the middle; of a layer without positions, h_c.

    c: a channel, or a list of channels, one an image. y, x: row and column. Source: Erhan et al. 2009.
    Example: `neuron("0", 5)`.
    """
    c = _indices(c, "c")

    def value(h: Tensor) -> Tensor:
        if h.dim() == 2 and (y, x) != (None, None):
            raise ValueError(f"y, x: got ({y}, {x}), want None: layer {layer!r} has no positions")
        h = _take(h, c, "c")
        if h.dim() == 1:
            return h
        place = tuple(size // 2 if i is None else i for i, size in zip((y, x), h.shape[1:], strict=True))
        if not all(0 <= i < size for i, size in zip(place, h.shape[1:], strict=True)):
            raise ValueError(f"y, x: got {place}, want a position of layer {layer!r}, which has {tuple(h.shape[1:])}")
        return h[:, place[0], place[1]]

    return Objective(layer, value, f"neuron of {layer}", _count(c))


def channel(layer: str, c) -> Objective:
    """One channel of a layer, its mean over all positions: (1 / HW) sum_{y,x} h_{c,y,x}.

    c: a channel, or a list of channels, one an image. Source: Olah et al. 2017.
    Example: `channel("0", [0, 1, 2])`.
    """
    c = _indices(c, "c")
    return Objective(layer, lambda h: _mean(_take(h, c, "c")), f"channel of {layer}", _count(c))


def energy(layer: str) -> Objective:
    """All of a layer: the mean of its squares, (1 / CHW) ||h||^2, which is what DeepDream climbs.

    Source: Mordvintsev et al. 2015.
    Example: `energy("0")`.
    """
    return Objective(layer, lambda h: h.flatten(1).square().mean(1), f"layer {layer}")


def direction(layer: str, v: Tensor, *, power: float = 0.0) -> Objective:
    """A direction of a layer, as good as its axes: <h, v> cos(h, v)^power, with h the mean over all positions.

    v: (C,), or (n, C), one an image. power: >= 0; with it the rest of h has to stay small (Carter et al. 2019).
    Source: Szegedy et al. 2014, section 3; Olah et al. 2018 for groups of neurons.
    Example: `direction("0", torch.randn(10))`.
    """
    if not isinstance(v, Tensor) or v.dim() not in (1, 2) or not v.is_floating_point():
        raise TypeError(f"v: got {getattr(v, 'shape', type(v).__name__)}, want a float tensor (C,) or (n, C)")
    checks.nonnegative(power, "power")

    def value(h: Tensor) -> Tensor:
        if v.shape[-1] != h.shape[1]:
            raise ValueError(f"v: got {v.shape[-1]} numbers, want {h.shape[1]}, the channels of layer {layer!r}")
        h, w = _mean(h), v.to(h).expand(len(h), -1)
        dot = (h * w).sum(1)
        return dot * F.cosine_similarity(h, w).clamp_min(0.1) ** power if power else dot

    return Objective(layer, value, f"direction of {layer}", len(v) if v.dim() == 2 else None)


def logit(k) -> Objective:
    """The logit of class k before the softmax, S_k(x) = z_k. k: a class, or a list of classes, one an image.

    Source: Simonyan et al. 2014.
    Example: `logit(3)`.
    """
    k = _indices(k, "k")
    return Objective("", lambda z: _take(z, k, "k"), "logit", _count(k))


def probability(k) -> Objective:
    """The probability of class k, as its logarithm, log softmax_k(z): the same maxima, and a gradient where it is near 0.

    k: a class, or a list of classes, one an image. It can also rise by pressing the other classes down, which need not
    show anything of class k: see Simonyan et al. 2014, section 2, who take the logit instead.
    Example: `probability([0, 1])`.
    """
    k = _indices(k, "k")
    return Objective("", lambda z: _take(z.log_softmax(1), k, "k"), "log probability", _count(k))


def _indices(index, name: str) -> Tensor:
    index = torch.as_tensor(index)
    if index.dtype != torch.int64 or index.dim() > 1 or index.numel() == 0:
        raise TypeError(f"{name}: got {index.dtype} {tuple(index.shape)}, want an integer or a list of integers")
    return index


def _count(index: Tensor) -> int | None:
    return len(index) if index.dim() else None


def _take(h: Tensor, index: Tensor, name: str) -> Tensor:
    """h (N, C, ...) -> (N, ...), channel index[i] of image i."""
    if index.min() < 0 or index.max() >= h.shape[1]:
        raise ValueError(f"{name}: got {index.tolist()}, want integers in [0, {h.shape[1] - 1}]")
    return h[torch.arange(len(h), device=h.device), index.to(h.device)]


def _mean(h: Tensor) -> Tensor:
    """The mean over positions, if there are any: (N, C, H, W) -> (N, C), or (N, H, W) -> (N,)."""
    return h.mean((-2, -1)) if h.dim() > 2 else h


def activations(model: nn.Module, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What comes out of each of the named layers for images x, with its graph; what lies behind them is not computed.

    Layers are called as in `model.named_modules()`; "" is the output. A layer that is used twice gives its first output.

    Raises: ValueError for a name that does not exist, or a layer that the images never reach.
    Example: `activations(model, x, ["1"])[0].shape` is (8, 10).
    """
    _check_layers(model, layers)
    return _activations(model, model, x, layers)


class _Reached(Exception):
    """Every layer that was asked for has been computed."""


def _activations(model: nn.Module, forward: Callable, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
    modules, wanted, found = dict(model.named_modules()), set(layers), {}

    def keep(name: str) -> Callable:
        def hook(module, inputs, output):
            found.setdefault(name, output)
            if len(found) == len(wanted):
                raise _Reached

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in wanted]
    try:
        forward(x)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := wanted - set(found):
        raise ValueError(f"layer: {missing.pop()!r} is in the model, but its forward pass does not come there")
    return [found[name] for name in layers]


def _check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Require a module with the named layers; the output, "", is always there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module, whose layers have names")
    for name in layers:
        if name:
            layer_named(model, name)


def measure(model: nn.Module, x: Tensor, objective: Objective) -> Tensor:
    """The objective's value at each image, without any regulariser: (N, C, H, W) -> (N,).

    Raises: TypeError, ValueError: bad input, a layer that does not exist.
    Example: `measure(model, x, logit(3)).shape` is (8,).
    """
    checks.model(model, checks.images(x))
    _check_layers(model, [objective.layer])
    with torch.no_grad():
        return _value(objective, _activations(model, model, x, [objective.layer])[0])


def _value(objective: Objective, h: Tensor) -> Tensor:
    if objective.n not in (None, len(h)):
        raise ValueError(f"objective: speaks of {objective.n} images, got {len(h)}")
    value = objective.value(h)
    if value.shape != h.shape[:1]:
        raise ValueError(f"objective: got values {tuple(value.shape)}, want ({len(h)},), one an image")
    return value


def total_variation(x: Tensor) -> Tensor:
    """TV(x) = sum of |x_{i+1,j} - x_{i,j}| + |x_{i,j+1} - x_{i,j}|, per image: 0 for a constant image and for no other.

    x: (N, C, H, W), any finite numbers. Returns (N,). Source: Rudin, Osher & Fatemi 1992; Mahendran & Vedaldi 2015 for images
    of features.
    Example: `total_variation(x).shape` is (8,).
    """
    return x.diff(dim=-1).abs().flatten(1).sum(1) + x.diff(dim=-2).abs().flatten(1).sum(1)


def colour_basis(x: Tensor) -> Tensor:
    """The root of the covariance of the channels over all pixels of x, scaled so that its longest column has length 1.

    Ascent in these coordinates moves colours as the images x do. x: (N, C, H, W) in [0, 1]. Returns (C, C).
    Source: Olah et al. 2017, where it comes from ImageNet (`NATURAL_COLOURS`).
    Example: `colour_basis(torch.rand(4, 3, 8, 8)).shape` is (3, 3).
    """
    pixels = checks.images(x).double().movedim(1, 0).flatten(1)
    values, vectors = torch.linalg.eigh(pixels.cov().reshape(len(pixels), -1))
    root = vectors * values.clamp_min(1e-8).sqrt()
    return (root / root.norm(dim=0).max()).to(x.dtype)


@dataclass(frozen=True)
class _Waves:
    """Images written as waves: x = sigmoid(A F^-1(s w)), with the unknown w, the scale s = f^-decay and the colours A."""

    size: tuple[int, int]
    scale: Tensor
    colours: Tensor | None

    @classmethod
    def of(cls, x: Tensor, decay: float, colours: Tensor | None) -> _Waves:
        h, w = x.shape[-2:]
        kind = {"dtype": x.dtype, "device": x.device}
        f = torch.hypot(torch.fft.fftfreq(h, **kind)[:, None], torch.fft.rfftfreq(w, **kind))
        return cls((h, w), f.clamp_min(1 / max(h, w)) ** -decay, colours)

    def sum(self, waves: Tensor) -> Tensor:
        z = torch.fft.irfft2(torch.view_as_complex(waves) * self.scale, s=self.size, norm="ortho")
        return self._mix(z, self.colours)

    def image(self, waves: Tensor) -> Tensor:
        return self.sum(waves).sigmoid()

    def waves(self, x: Tensor) -> Tensor:
        z = self._mix(x.clamp(0.01, 0.99).logit(), None if self.colours is None else torch.linalg.inv(self.colours))
        return torch.view_as_real(torch.fft.rfft2(z, norm="ortho") / self.scale).contiguous()

    @staticmethod
    def _mix(z: Tensor, colours: Tensor | None) -> Tensor:
        return z if colours is None else torch.einsum("dc,nchw->ndhw", colours, z)


def activation_maximization(
    model: nn.Module,
    objective: Objective,
    *,
    shape: Sequence[int] | None = None,
    start: Tensor | None = None,
    n: int | None = None,
    steps: int = 100,
    lr: float = 0.05,
    l2: float = 0.0,
    tv: float = 0.0,
    jitter: int = 0,
    frequency: bool = True,
    decay: float = 1.0,
    colours: Tensor | None = None,
    diversity: tuple[str, float] | None = None,
    bounded: bool = True,
    seed: int | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images that maximise h(x) - l2 ||x||^2 - tv TV(x), by Adam: argmax_x h(x) - lambda R(x).

    With `frequency` the unknown is the image's spectrum, divided by frequency^decay, and a sigmoid keeps it in (0, 1);
    without, the unknown is the pixels, clipped to [0, 1] (not clipped with bounded=False). Where the end is worse than the
    start, the start is returned.

    Args:
        model: evaluation mode; left exactly as it was.
        objective: what to maximise: `neuron`, `channel`, `energy`, `direction`, `logit`, `probability`, or your own.
        shape: (C, H, W) of the images, with noise about mid-grey to start from; or
        start: images (N, C, H, W) in [0, 1] to start from.
        n: how many images; default 1, or as many as the objective or `start` speaks of.
        steps: gradient steps (>= 1).
        lr: step size of Adam (> 0).
        l2, tv: weights of the two regularisers (>= 0).
        jitter: each step looks at the images moved around by up to so many pixels (>= 0), the same for all of them.
        frequency: write images as waves, which makes them smooth, instead of as pixels, which makes them rough.
        decay: how strongly (>= 0); 0 prefers no frequency.
        colours: (C, C), for waves: the basis in which colours move, `colour_basis(x)` of images or `NATURAL_COLOURS`.
        diversity: (layer, weight): keep the Gram matrices of the images' features in this layer apart, for n >= 2.
        bounded: whether pixels must lie in [0, 1].
        seed: of the noise and the jitter; without it torch's own generator is used.
        watch: called with (step, images, values) before each step and, with step = steps, at the end.
    Returns:
        Images (n, C, H, W), of the dtype and on the device of the model's parameters (or of `start`).
    Raises:
        TypeError, ValueError: bad input, before any work; a layer, channel, class or position that does not exist.
    Sources: Erhan et al. 2009; Simonyan et al. 2014 (l2); Mordvintsev et al. 2015 (jitter); Olah et al. 2017 (waves, colours,
    diversity).
    Example: `activation_maximization(model, logit([3, 5]), shape=(1, 28, 28), steps=5, seed=0).shape` is (2, 1, 28, 28).
    """
    wanted = [objective.layer] + ([diversity[0]] if diversity else [])
    _check_layers(model, wanted)
    checks.positive_int(steps, "steps")
    checks.positive(lr, "lr")
    checks.positive_int(jitter, "jitter", least=0)
    l2, tv, decay = (checks.nonnegative(v, name) for v, name in ((l2, "l2"), (tv, "tv"), (decay, "decay")))
    if frequency and not bounded:
        raise ValueError("bounded: got False with frequency=True, want frequency=False: waves end in a sigmoid")
    draw = _generator(model, start, seed)
    x = _start(model, objective, shape, start, n, draw)
    checks.model(model, x)
    if diversity and (checks.nonnegative(diversity[1], "diversity") and len(x) < 2):
        raise ValueError(f"diversity: got n = {len(x)}, want at least 2 images to keep apart")

    basis = _Waves.of(x, decay, _basis(colours, x) if frequency else None)
    theta = (basis.waves(x) if frequency else x.clone()).requires_grad_()
    image = basis.image if frequency else lambda pixels: pixels
    forward = fast_layout(model, x)

    def score(x: Tensor, roll: tuple[int, int]) -> tuple[Tensor, Tensor]:
        h, *others = _activations(model, forward, x.roll(roll, (-2, -1)) if any(roll) else x, wanted)
        value = _value(objective, h)
        penalty = (l2 * x.square().flatten(1).sum(1) if l2 else 0) + (tv * total_variation(x) if tv else 0)
        apart = diversity[1] * _likeness(others[0], diversity[0]) if diversity else 0
        return value, value - penalty - apart

    optimizer = torch.optim.Adam([theta], lr=lr, maximize=True)
    for step in progress.bar(range(steps), desc="activation maximisation"):
        roll = torch.randint(-jitter, jitter + 1, (2,), generator=draw, device=x.device).tolist() if jitter else (0, 0)
        with torch.enable_grad():
            now = image(theta)
            value, total = score(now, roll)
            (theta.grad,) = torch.autograd.grad(total.sum(), theta)
        if watch is not None:
            watch(step, now.detach().clone(), value.detach())
        optimizer.step()
        if bounded and not frequency:
            theta.detach().clamp_(0, 1)
    with torch.no_grad():
        end = image(theta)
        (first, before), (last, after) = score(x, (0, 0)), score(end, (0, 0))
        better = after >= before
        x = torch.where(better[:, None, None, None], end, x)
    if watch is not None:
        watch(steps, x.clone(), torch.where(better, last, first))
    return x


def _generator(model: nn.Module, start: Tensor | None, seed: int | None) -> torch.Generator | None:
    device = start.device if start is not None else next((p.device for p in model.parameters()), "cpu")
    return generator(seed, device)


def _start(model, objective, shape, start, n, draw) -> Tensor:
    """The images to start from, as many as are spoken of: given ones, or noise about mid-grey."""
    if (shape is None) == (start is None):
        raise ValueError(
            f"shape, start: got {shape} and {'images' if start is not None else None}, want one of the two"
        )
    if start is not None and checks.images(start, "start").dim() != 4:
        raise ValueError(f"start: got shape {tuple(start.shape)}, want (N, C, H, W)")
    counts = {"n": n, "objective": objective.n, "start": None if start is None or len(start) == 1 else len(start)}
    if n is not None:
        checks.positive_int(n, "n")
    if len(set(counts.values()) - {None}) > 1:
        raise ValueError(f"n: got {', '.join(f'{v} from {k}' for k, v in counts.items() if v)}, want one number")
    count = next((v for v in counts.values() if v), 1)
    if start is not None:
        return start.detach().expand(count, -1, -1, -1).clone()
    if len(shape := tuple(shape)) != 3 or not all(isinstance(s, int) and s > 0 for s in shape):
        raise ValueError(f"shape: got {shape}, want (C, H, W), three positive integers")
    like = next(model.parameters(), torch.zeros(()))
    noise = torch.randn(count, *shape, generator=draw, dtype=like.dtype, device=like.device)
    smooth = _Waves.of(noise, 1.0, None).sum(torch.view_as_real(torch.fft.rfft2(noise, norm="ortho")))
    return (0.5 + 0.05 * smooth / smooth.std((1, 2, 3), keepdim=True)).clamp(0, 1)


def _basis(colours, x: Tensor) -> Tensor | None:
    if colours is None:
        return None
    colours = torch.as_tensor(colours, dtype=x.dtype, device=x.device)
    c = x.shape[1]
    if colours.shape != (c, c) or torch.linalg.matrix_rank(colours) < c:
        raise ValueError(
            f"colours: got {tuple(colours.shape)}, want an invertible matrix ({c}, {c}), one row a channel"
        )
    return colours


def _likeness(h: Tensor, layer: str) -> Tensor:
    """The mean cosine between an image's Gram matrix of features and those of the others: (N, C, H, W) -> (N,)."""
    if h.dim() != 4:
        raise ValueError(f"diversity: layer {layer!r} gives {tuple(h.shape)}, want a layer with positions (N, C, H, W)")
    h = h.flatten(2)
    gram = F.normalize((h @ h.mT).flatten(1), dim=1)
    return ((gram @ gram.T).sum(1) - 1) / (len(h) - 1)


def on_sphere(
    model: nn.Module,
    objective: Objective,
    *,
    shape: Sequence[int],
    norm: float = 1.0,
    steps: int = 50,
    n: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """argmax h(x) subject to ||x||_2 = norm, by x <- norm * grad h(x) / ||grad h(x)||: no step size, no regulariser.

    For h(x) = <w, x> one step is exact, x* = norm * w / ||w||. For h(x) = ||Wx||^2 it is power iteration, which ends at the
    first right singular vector of W; each step climbs wherever h is convex. For other h it is a heuristic, and the best
    point met is returned. The pixels are not confined to [0, 1].

    Args: as for `activation_maximization`; norm > 0.
    Returns: (n, C, H, W), each of the given norm.
    Raises: TypeError, ValueError: bad input; a start at which the gradient is zero.
    Source: Erhan et al. 2009, section 4.1, for the problem; Journee et al. 2010 for the iteration.
    Example: `on_sphere(model, logit(3), shape=(1, 28, 28), norm=5.0, steps=1).norm()`.
    """
    _check_layers(model, [objective.layer])
    checks.positive_int(steps, "steps")
    checks.positive(norm, "norm")
    draw = _generator(model, None, seed)
    x = _start(model, objective, shape, None, n, draw)
    checks.model(model, x)
    x = torch.randn(x.shape, generator=draw, dtype=x.dtype, device=x.device)
    forward = fast_layout(model, x)
    best, highest = x, x.new_full((len(x),), -torch.inf)
    for step in range(steps + 1):
        x = norm * x / x.flatten(1).norm(dim=1)[:, None, None, None]
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = _value(objective, _activations(model, forward, point, [objective.layer])[0])
            (grad,) = torch.autograd.grad(value.sum(), point)
        better = value.detach() > highest
        best, highest = torch.where(better[:, None, None, None], x, best), torch.where(better, value.detach(), highest)
        flat = grad.flatten(1).norm(dim=1) == 0
        if step == 0 and flat.any():
            raise ValueError(f"objective: its gradient is zero at {int(flat.sum())} of {len(x)} random starts")
        x = torch.where(flat[:, None, None, None], x, grad)
    return best


def deep_dream(
    model: nn.Module,
    x: Tensor,
    layer: str | Objective,
    *,
    octaves: int = 4,
    ratio: float = 1.4,
    steps: int = 10,
    lr: float = 0.01,
    jitter: int = 8,
    seed: int | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """DeepDream: let a photograph grow whatever a layer already sees in it, from coarse to fine.

    At each of `octaves` sizes, each `ratio` times the one before, x climbs ||h||^2 in steps lr * grad / mean |grad|; what it
    gained (the detail) is enlarged and added to the photograph of the next size. A layer of convolutions takes any size.

    Args:
        x: images (N, C, H, W) in [0, 1].
        layer: its name, for `energy` of it, or an objective.
        octaves, steps: how many sizes (>= 1), and steps at each (>= 1).
        ratio: > 1.
        lr: mean change of a pixel in a step (> 0).
        jitter: as for `activation_maximization`.
        watch: called with (step, images, values) before each step, the images in their present size.
    Returns: images in [0, 1], shape, dtype and device of x.
    Raises: TypeError, ValueError: bad input; a layer that does not exist; a smallest size below 8 pixels.
    Source: Mordvintsev, Olah & Tyka 2015.
    Example: `deep_dream(model, x, "1", octaves=1, steps=2, seed=0).shape` is (8, 1, 28, 28).
    """
    objective = energy(layer) if isinstance(layer, str) else layer
    _check_layers(model, [objective.layer])
    if checks.images(x).dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (N, C, H, W)")
    checks.model(model, x)
    for value, name in ((octaves, "octaves"), (steps, "steps")):
        checks.positive_int(value, name)
    checks.positive_int(jitter, "jitter", least=0)
    checks.positive(lr, "lr")
    if checks.positive(ratio, "ratio") <= 1:
        raise ValueError(f"ratio: got {ratio}, want a number > 1")
    sizes = [tuple(round(s / ratio**k) for s in x.shape[-2:]) for k in reversed(range(octaves))]
    if min(sizes[0]) < 8 and octaves > 1:
        raise ValueError(f"octaves: got {octaves}, want fewer: the smallest picture would have {sizes[0]} pixels")
    draw = _generator(model, x, seed)

    def resized(x: Tensor, size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)

    x = x.detach()
    detail = torch.zeros_like(resized(x, sizes[0]))
    bar = progress.bar(total=octaves * steps, desc="DeepDream")
    with bar:
        for size in sizes:
            photograph, detail = resized(x, size), resized(detail, size)
            dream = (photograph + detail).clamp(0, 1)
            forward = fast_layout(model, dream)
            for _ in range(steps):
                roll = torch.randint(-jitter, jitter + 1, (2,), generator=draw, device=x.device).tolist()
                with torch.enable_grad():
                    point = dream.detach().requires_grad_()
                    h = _activations(model, forward, point.roll(roll, (-2, -1)), [objective.layer])[0]
                    value = _value(objective, h)
                    (grad,) = torch.autograd.grad(value.sum(), point)
                if watch is not None:
                    watch(bar.n, dream.clone(), value.detach())
                grad = grad / grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
                dream = (dream + lr * grad).clamp(0, 1)
                bar.update()
            detail = dream - photograph
    return dream
