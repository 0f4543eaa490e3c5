"""Attacks that know the defence: what has no gradient is given one, what is random is averaged, what detects is fooled too.

The rule behind all of them: an attack is only as good as the gradient it follows, so look at what the defence did to the
gradient, and repair that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..attacks import pgd
from ..attacks.gradient import _Best
from ..attacks.losses import fools, objective
from ..layout import images_at_once
from ..threat import Linf
from .detection import Detector
from .preprocessing import Thermometer


def bpda(g: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Backward pass differentiable approximation: forward g(x), exactly; backward the gradient of another function.

    d l(h(g(x))) / dx  is taken as  J(x)^T grad l at g(x), with J the Jacobian of `backward`. Because filters mean to change
    an image little, g(x) = x roughly, the identity is the first choice.

    Args:
        g: the part of the model with the unhelpful gradient, e.g. `BitDepth(1)`; it is called without gradient.
        backward: a differentiable function of the same input and output shape as g; the identity without it.
    Returns:
        A module to put in the place of g: `nn.Sequential(bpda(BitDepth(1)), h)` is the model for any gradient attack.
    Raises:
        ValueError: on the first call, when the shapes of g(x) and backward(x) differ.
    Source: Athalye, Carlini & Wagner 2018, section 4.1.
    Example: `pgd(nn.Sequential(bpda(tmlcourse.defenses.BitDepth(1)), model), x, y, Linf(0.3), steps=5)`.
    """
    for name, function in (("g", g), ("backward", backward)):
        if not callable(function) and not (name == "backward" and function is None):
            raise TypeError(f"{name}: got {type(function).__name__}, want a function of images")
    return _Replaced(g, backward)


class _Replaced(nn.Module):
    """g forward, the gradient of `smooth` (None: the identity) backward."""

    def __init__(self, g: Callable, smooth: Callable | None):
        super().__init__()
        self.g, self.smooth = g, smooth

    def forward(self, x: Tensor) -> Tensor:
        return _Bpda.apply(x, self.g, self.smooth)


class _Bpda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, smooth):
        ctx.save_for_backward(x)
        ctx.smooth = smooth
        out = g(x)
        if smooth is None and out.shape != x.shape:
            raise ValueError(f"backward: got the identity and g: {tuple(x.shape)} -> {tuple(out.shape)}, want a function "
                             "with g's output shape")  # fmt: skip
        return out.clone() if out is x else out

    @staticmethod
    def backward(ctx, grad):
        if ctx.smooth is None:
            return grad, None, None
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.smooth(x)
        if out.shape != grad.shape:
            raise ValueError(f"backward: got output {tuple(out.shape)}, want {tuple(grad.shape)}, as g gives")
        return torch.autograd.grad(out, x, grad)[0], None, None


def eot(model, samples: int = 30, *, seed: int | None = None) -> nn.Module:
    """Expectation over transformation: the mean of the logits over `samples` calls of a randomised model.

    z(x) = (1/s) sum_t h_t(x), so that its gradient is the mean gradient, and a point that was lucky once is no success. The
    cross-entropy of z is at most the mean cross-entropy (Jensen), so raising it raises the loss that the defence expects.

    Args:
        model: returns logits (N, K), other ones at each call; any layer of it may be a `bpda`.
        samples: calls (>= 1); an attack step costs that many.
        seed: every evaluation draws the same lots, which makes a deterministic function of it; fresh ones without.
    Returns:
        A module: the model for any attack of the course. Judge what it finds with the defence itself.
    Source: Athalye et al. 2018 (ICML, both papers: "Synthesizing robust adversarial examples" and section 4.2 of
        "Obfuscated gradients").
    Example: `eot(nn.Sequential(tmlcourse.defenses.RandomResizePad(24), model), 4)(x).shape` is (8, 10).
    """
    if not callable(model):
        raise TypeError(f"model: got {type(model).__name__}, want a callable that returns logits (N, K)")
    return _Mean(model, checks.positive_int(samples, "samples"), seed).eval()


class _Mean(nn.Module):
    def __init__(self, model, samples: int, seed: int | None):
        super().__init__()
        self.model, self.samples, self.seed = model, samples, seed

    def train(self, mode: bool = True) -> nn.Module:
        """Its own flag only: the model inside stays in the mode in which it came."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        with randomness.seeded(self.seed, x.device):
            return torch.stack([self.model(x) for _ in range(self.samples)]).mean(0)


def logit_space_ascent(
    encoder: Thermometer,
    net,
    x: Tensor,
    y: Tensor,
    threat: Linf,
    *,
    steps: int = 20,
    xi: float = 0.5,
    anneal: float = 1.2,
    restarts: int = 1,
    loss: str | Callable = "cross_entropy",
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Logit-space projected gradient ascent: attack `net(encoder(x))` on a relaxation of the pixel's bucket.

    Each pixel holds one number u_b for each bucket b that the ball reaches, and is shown to the network as the mean column
    of softmax(u / T):

        u <- u + xi sign(grad_u l(net(tau(softmax(u / T))), y)),    T <- T / anneal,

    from a standard normal start. T falls, so the mixture hardens into one bucket a pixel. After each step the likeliest
    bucket of each pixel is turned into the nearest value inside the ball, and the true model judges the image.

    Args:
        encoder: the `Thermometer`.
        net: takes (N, C k, H, W) and returns logits; in evaluation mode. It is left exactly as it was.
        x, y: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        threat: `Linf`, the set for which the reachable buckets form a box.
        steps, restarts: steps of a walk, and walks (both >= 1).
        xi: step in units of u (> 0).
        anneal: factor by which the temperature, 1 at first, falls in each step (>= 1).
        loss, batch_size, seed: as for `tmlcourse.attacks.pgd`.
    Returns:
        The best images met, inside the threat set; the clean image is a candidate too.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Buckman et al. 2018, Algorithm 2.
    Example: `logit_space_ascent(Thermometer(4), models.linear((4, 28, 28)), x, y, Linf(0.2), steps=3, seed=0)`.
    """
    if not isinstance(encoder, Thermometer):
        raise TypeError(f"encoder: got {type(encoder).__name__}, want a Thermometer")
    if not isinstance(threat, Linf) or threat.box != (0.0, 1.0):
        raise ValueError(f"threat: got {threat!r}, want Linf with the box (0, 1)")
    checks.model(net, checks.images(x))
    checks.labels(y, x)
    checks.positive_int(steps, "steps")
    checks.positive_int(restarts, "restarts")
    if checks.nonnegative(xi, "xi") == 0:
        raise ValueError("xi: got 0, want a step > 0")
    if checks.nonnegative(anneal, "anneal") < 1:
        raise ValueError(f"anneal: got {anneal}, want a factor >= 1")
    x = x.detach()
    best = _Best(x, y, None, objective(loss, None))
    generator = randomness.generator(seed, x.device)
    values, reachable = _buckets(encoder, x, threat)

    def judge(index: Tensor, images: Tensor) -> None:
        with torch.no_grad():
            best.offer(index, images, checks.logits(net(encoder(images)), y[index]))

    batches = torch.arange(len(x), device=x.device).split(images_at_once(x, batch_size))
    for index in batches:
        judge(index, x[index])
    with progress.bar(total=restarts * steps * len(x), desc="LS-PGA", unit="step") as bar:
        for _ in range(restarts):
            for index in batches:
                closed = ~reachable[index]
                u = torch.randn(closed.shape, generator=generator, dtype=x.dtype, device=x.device)
                temperature = 1.0
                for _ in range(steps):
                    u.requires_grad_()
                    weight = (u / temperature).masked_fill(closed, -torch.inf).softmax(2)
                    value = best.objective(net(encoder.from_buckets(weight)), y[index], None)
                    (grad,) = torch.autograd.grad(value.sum(), u)
                    u = u.detach() + xi * grad.sign()
                    temperature /= anneal
                    chosen = u.masked_fill(closed, -torch.inf).argmax(2, keepdim=True)
                    judge(index, values[index].gather(2, chosen).squeeze(2))
                    bar.update(len(index))
    return best.x


def _buckets(encoder: Thermometer, x: Tensor, threat: Linf) -> tuple[Tensor, Tensor]:
    """For each pixel and bucket the nearest value in it, (N, C, k, H, W), and whether the ball reaches that value."""
    top = encoder.edges(x)
    bottom = torch.nextafter(torch.cat([-torch.ones_like(top[:1]), top[:-1]]), torch.ones_like(top)).clamp_min(0)
    values = torch.minimum(torch.maximum(x[:, :, None], bottom), top)
    low, high = (x - threat.eps).clamp_min(0), (x + threat.eps).clamp_max(1)
    return values, (values >= low[:, :, None]) & (values <= high[:, :, None])


def evade(detector: Detector, x: Tensor, y: Tensor, threat, *, attack: Callable = pgd, **options) -> Tensor:
    """The adaptive attack on a detector: images that the model gets wrong and the detector lets pass.

    The detector compares what the model says of x and of s_1(x), s_2(x), ... So the attacker makes all of them say the same
    wrong thing: it raises the margin of the mean log-probabilities (1/m) sum_i log softmax h(s_i(x)), with s_0(x) = x. The
    more sure they all are, the nearer the score comes to 0.

    Args:
        detector: what is to be evaded. Put `bpda` around squeezers without a gradient; that changes no score.
        x, y: images (N, ...) in [0, 1] and int64 labels (N,).
        threat: the feasible set.
        attack: (model, x, y, threat, loss=, **options) -> x_adv.
        options: passed to the attack: steps, restarts, seed, ...
    Returns:
        For each image one in the set that is misread and not flagged, and the clean image where none was found or needed.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Carlini & Wagner 2017b and He et al. 2017 (detectors fall to attacks that know them).
    Example: `evade(Detector(model, (tmlcourse.defenses.MedianFilter(2),), 0.5), x, y, Linf(0.1), steps=5, seed=0)`.
    """
    if not isinstance(detector, Detector):
        raise TypeError(f"detector: got {type(detector).__name__}, want a Detector")
    if not callable(attack):
        raise TypeError(f"attack: got {type(attack).__name__}, want a callable (model, x, y, threat) -> x_adv")
    checks.model(detector.model, checks.images(x))
    checks.labels(y, x)
    found = attack(_Views(detector), x, y, threat, **{"loss": "margin", **options})
    needed, passes = ~_wins(detector, x, y), _wins(detector, found, y)
    return torch.where((needed & passes).view(-1, *[1] * (x.dim() - 1)), found, x.detach())


class _Views(nn.Module):
    """Mean log-probabilities over the image and its squeezed versions."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.model, self.squeezers = detector.model, [lambda x: x, *detector.squeezers]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(s(x)).log_softmax(1) for s in self.squeezers]).mean(0)


@torch.no_grad()
def _wins(detector: Detector, x: Tensor, y: Tensor) -> Tensor:
    """Misread, and not flagged: bool (N,)."""
    z = torch.cat([checks.logits(detector.model(a), b) for a, b in zip(x.split(250), y.split(250), strict=True)])
    return fools(z, y) & ~detector.flags(x)
