"""Gradient attacks: the fast gradient step and projected gradient descent, for every threat set.

The attacker solves max over x' in B(x) of l(h(x'), y). Each step climbs in the steepest direction that the norm allows and
projects back:  x^{t+1} = P_B(x^t + argmax_{||v|| <= alpha} <v, grad l(h(x^t), y)>).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, kernels, progress, randomness
from ..kernels import graphs
from ..kernels.dispatch import on
from ..layout import fast_layout, images_at_once
from .losses import fools, objective

_WORTH_RECORDING = 10  # steps from which on a GPU's recording of one pays for itself


def fgsm(model, x: Tensor, y: Tensor, threat, *, loss="cross_entropy", target: Tensor | None = None) -> Tensor:
    """One steepest-ascent step of the full budget from the clean image: P_B(x + argmax_{||v|| <= eps} <v, grad l>).

    For `Linf` this is the fast gradient sign method, x + eps sign(grad l) clipped to [0, 1]; on a linear model it is the
    exact worst case. Where the step would lower the loss, the clean image is returned.

    Args, returns, errors: as for `pgd`.
    Source: Goodfellow, Shlens & Szegedy 2015.
    Example: `fgsm(model, x, y, Linf(0.1))`.
    """
    return pgd(model, x, y, threat, steps=1, alpha=threat.full_step, random_start=False, loss=loss, target=target)


def pgd(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    steps: int = 40,
    alpha: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    schedule: Callable[[float], float] | None = None,
    stop_early: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Projected gradient descent (ascent on the loss): x^{t+1} = P_B(x^t + alpha * steepest direction of grad l).

    Returns for each image the best point met: one that fools the model if there was one, and among those the one of
    highest loss. The clean image is a candidate too, so the answer is never worse than the start.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1].
        y: int64 labels (N,).
        threat: the feasible set: `Linf`, `L2`, `L1` or `L0` of `tmlcourse.threat`.
        steps: gradient steps (>= 1).
        alpha: step size in the set's own units (> 0); default 2.5 times the radius over `steps`.
        random_start: begin at a point drawn uniformly from the ball instead of at x.
        restarts: how many starts to try (needs `random_start` when more than one).
        loss: "cross_entropy", "margin", with a target also "difference"; or a callable (logits, y) -> (N,), with a target
            (logits, y, target) -> (N,). It is maximised.
        target: int64 labels (N,) that the attacker wants to see instead; untargeted without.
        schedule: multiplies alpha; a function of the fraction of steps already done, in [0, 1). Constant without.
        stop_early: let an image go as soon as it fools the model; cheaper when only success counts.
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
        seed: makes the random starts reproducible; without it torch's own generator is used.
    Returns:
        Adversarial images, shape, dtype and device of x, inside the threat set and [0, 1].
    Raises:
        TypeError, ValueError: bad input, before any work; the message names the argument, what came and what is wanted.
    Source: Madry et al. 2018, section 2.1; Kurakin et al. 2017 for the iteration without random start.
    Example: `pgd(model, x, y, Linf(0.3), steps=40, alpha=0.01, seed=0)`.
    """
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    checks.positive_int(steps, "steps")
    if checks.positive_int(restarts, "restarts") > 1 and not random_start:
        raise ValueError(f"restarts: got {restarts} with random_start=False, want 1: every restart would be the same")
    alpha = 2.5 * threat.full_step / steps if alpha is None else checks.nonnegative(alpha, "alpha")
    if target is not None:
        checks.labels(target, x, "target")
    attacker = objective(loss, target)
    batch_size = images_at_once(x, batch_size)
    generator = randomness.generator(seed, x.device)
    alphas = [alpha * (1.0 if schedule is None else schedule(t / steps)) for t in range(steps)]

    x = x.detach()
    forward = fast_layout(model, x)
    best = _Best(x, y, target, attacker)
    for chunk in torch.arange(len(x), device=x.device).split(batch_size):
        with torch.no_grad():
            z = checks.logits(forward(x[chunk]), y[chunk])
            if target is not None:
                checks.logits(z, target[chunk], "target")
            best.offer(chunk, x[chunk], z)

    with progress.bar(total=restarts * steps * len(x), desc="PGD", unit="step") as bar:
        for _ in range(restarts):
            queue = (~best.fooled).nonzero().squeeze(1) if stop_early else torch.arange(len(x), device=x.device)
            bar.update(steps * (len(x) - len(queue)))
            if not len(queue):
                break
            start = threat.random(x[queue], generator) if random_start else x[queue]
            if steps >= _WORTH_RECORDING and not stop_early and graphs.playable(model, x, threat, loss):
                _play(model, x, y, target, start, threat, loss, attacker, alphas, best, batch_size, bar)
            else:
                _climb(forward, x, start, queue, threat, alphas, best, stop_early, batch_size, bar)
    return best.x


def _play(model, x, y, target, start, threat, loss, attacker, alphas, best, batch_size, bar) -> None:
    """`_climb` for all images on a GPU; a batch whose step was recorded earlier is played back."""
    for chunk in torch.arange(len(x), device=x.device).split(batch_size):
        aim = None if target is None else target[chunk]
        with on(x):
            found = graphs.climb(model, x[chunk], y[chunk], aim, threat, loss, attacker, fools)
        if found is None:
            _climb(model, x, start[chunk], chunk, threat, alphas, best, False, batch_size, bar)
            continue
        climb, replay = found
        climb.load(x=x[chunk], y=y[chunk], x_adv=start[chunk], best=best.x[chunk], value=best.value[chunk],
                   fooled=best.fooled[chunk], **({} if aim is None else {"target": aim}))  # fmt: skip
        with on(x):
            for alpha in alphas:
                climb.alpha.fill_(alpha)
                replay()
        best.x[chunk], best.value[chunk], best.fooled[chunk] = climb.best, climb.value, climb.fooled
        with torch.no_grad():
            best.offer(chunk, climb.x_adv, model(climb.x_adv))
        bar.update(len(alphas) * len(chunk))


def _climb(forward, x, start, queue, threat, alphas, best, stop_early, batch_size, bar) -> None:
    """Take the queued images from their starts through all steps, `batch_size` at a time.

    An image that is done (all steps taken, or fooled with `stop_early`) leaves the batch and the next one in the queue takes
    its place, so every forward and backward pass works on a full batch of images that still need it.
    """
    steps = len(alphas)
    alphas = torch.tensor(alphas, dtype=x.dtype)
    active, x_adv, step = queue[:0], start[:0], torch.zeros(0, dtype=torch.int64)
    waiting = 0
    while waiting < len(queue) or len(active):
        enter = slice(waiting, waiting + batch_size - len(active))
        active, x_adv = torch.cat([active, queue[enter]]), torch.cat([x_adv, start[enter]])
        step = torch.cat([step, step.new_zeros(len(active) - len(step))])
        waiting = min(enter.stop, len(queue))

        done = step == steps
        climb = not bool(done.all())
        x_adv = x_adv.detach().requires_grad_(climb)
        with torch.set_grad_enabled(climb):
            value, fooled = best.offer(active, x_adv.detach(), forward(x_adv))
            grad = torch.autograd.grad(value.sum(), x_adv)[0] if climb else x_adv
        x_adv = x_adv.detach()
        if stop_early:
            done = done | fooled.cpu()
        if done.any():
            bar.update(int((steps - step)[done].sum()))
            stay = (~done).to(x.device)
            active, x_adv, grad, step = active[stay], x_adv[stay], grad[stay], step[~done]
        if len(active):
            x_adv = kernels.ascent_step(x_adv, grad, x[active], threat, alphas[step].to(x.device))
            step = step + 1
            bar.update(len(active))


class _Best:
    """The best point met so far for each image: one that fools before one that does not, then the higher loss."""

    def __init__(self, x: Tensor, y: Tensor, target: Tensor | None, objective: Callable):
        self.x, self.y, self.target, self.objective = x.clone(), y, target, objective
        self.value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def offer(self, index: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the points `x` of the images `index` that beat what is known; z are their logits.

        Returns the objective (with its graph, if z has one) and whether each point fools the model.
        """
        y, target = self.y[index], None if self.target is None else self.target[index]
        value = self.objective(z, y, target)
        if value.shape != y.shape:
            raise ValueError(f"loss: got shape {tuple(value.shape)} from it, want ({len(y)},), one number an image")
        fooled = fools(z.detach(), y, target)
        now, known = value.detach(), self.value[index]
        better = torch.where(fooled == self.fooled[index], now > known, fooled)
        won = index[better]
        self.x[won], self.value[won], self.fooled[won] = x[better], now[better].to(known.dtype), fooled[better]
        return value, fooled
