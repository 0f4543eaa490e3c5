"""Auto-PGD, which chooses its own step size, and the parameter-free ensemble that is the standard evaluation today.

Auto-PGD (Croce & Hein 2020, algorithm 1) begins with steps as long as the ball and halves them, image by image, when the walk
stops paying. With alpha = 0.75:

    z^{t+1} = P_B(x^t + eta * steepest direction of grad l)
    x^{t+1} = P_B(x^t + alpha (z^{t+1} - x^t) + (1 - alpha) (x^t - x^{t-1}))
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks, kernels, progress, randomness
from ..layout import fast_layout, images_at_once
from ..threat import L0, L1
from .losses import fools, objective

MOMENTUM, RISING = 0.75, 0.75  # alpha, and the share of steps (rho) that must climb for the step size to stay


def apgd(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str | Callable = "cross_entropy",
    target: Tensor | None = None,
    stop_early: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Auto-PGD: gradient ascent with momentum whose step size starts at 2 eps and is halved for each image on its own.

    At the checkpoints w_j (see `checkpoints`) the step eta of an image is halved, and its walk goes on from its best point,
    if since the last checkpoint fewer than rho = 0.75 of the steps raised the loss, or neither eta nor the best loss changed.

    Returns for each image the best point met: one that fools the model if there was one, and among those the one of highest
    loss. The clean image is a candidate too; an image that fools the model as it is comes back unchanged.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1].
        y: int64 labels (N,).
        threat: the feasible set: `Linf`, `L2`, `L1` or `L0`. Under `L1` and `L0`, where a mean of two sparse points is less
            sparse, the walk goes without momentum.
        steps: gradient steps (>= 1).
        restarts: random starts to try (>= 1).
        loss: "cross_entropy", "margin", "dlr" (K >= 3), with a target also "difference" ("dlr" then needs K >= 4); or a
            callable (logits, y) -> (N,), with a target (logits, y, target) -> (N,). It is maximised.
        target: int64 labels (N,), none equal to y, that the attacker wants to see instead; untargeted without.
        stop_early: let an image go as soon as it fools the model; cheaper when only success counts.
        batch_size: images worked on at once; the default suits the caches of a CPU (64) or a GPU (1,000).
        seed: makes the random starts reproducible; without it torch's own generator is used.
    Returns:
        Adversarial images, shape, dtype and device of x, inside the threat set and [0, 1].
    Raises:
        TypeError, ValueError: bad input, before any work; the message names the argument, what came and what is wanted.
    Source: Croce & Hein 2020, section 3; without momentum under L1: Croce & Hein 2021.
    Example: `apgd(model, x, y, Linf(0.3), loss="dlr", seed=0)`.
    """
    _check(model, x, y, steps, restarts)
    if target is not None:
        checks.other_class(target, x, y)
    run = _Run(model, x, y, threat, steps, batch_size, stop_early, seed, goal=target)
    return run(objective(loss, target), [target] * restarts, "APGD")


def apgd_targeted(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    loss: str | Callable = "dlr",
    stop_early: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """APGD-T: Auto-PGD towards each of the `targets` most likely wrong classes in turn; any mistake counts as success.

    Walking towards one class at a time finds mistakes that the walk towards the currently nearest class passes by.

    Args:
        targets: how many classes to try, the likeliest on the clean image first (>= 1; at most K - 1 are there).
        loss: "dlr", "margin" (of the target, negated), "difference", "cross_entropy" (of the target, negated) or a callable
            (logits, y, target) -> (N,). "dlr" divides by the fourth largest logit: with fewer than four classes the plain
            "difference" takes its place.
        Others, returns, errors: as for `apgd`.
    Source: Croce & Hein 2020, section 4.
    Example: `apgd_targeted(model, x, y, Linf(0.3), stop_early=True, seed=0)`.
    """
    _check(model, x, y, steps, restarts)
    checks.positive_int(targets, "targets")
    run = _Run(model, x, y, threat, steps, batch_size, stop_early, seed)
    classes = run.logits.shape[1]
    others = run.logits.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, : min(targets, classes - 1)]
    loss = "difference" if loss == "dlr" and classes < 4 else loss
    return run(objective(loss, y), [*others.T] * restarts, "APGD-T")


def autoattack() -> tuple[Callable, ...]:
    """The parameter-free ensemble: APGD-CE, APGD-T, FAB-T and Square, for `robust_accuracy(..., attacks=autoattack())`.

    Four attacks that fail for different reasons: cross-entropy climbs fast but saturates; targeted DLR does not care about
    the scale of the logits; FAB looks for the nearest error instead of the highest loss; Square asks for no gradient. Each
    attacks what the ones before left standing.

    Returns:
        Four callables (model, x, y, threat, ...) -> x_adv, named as they appear in `RobustAccuracy.broken_by`: "APGD-CE"
        (100 steps), "APGD-T" (9 targets, 100 steps each), "FAB-T" (9 targets), "Square" (5,000 queries). For `Linf` and `L2`.
    Source: Croce & Hein 2020.
    Example: `robust_accuracy(model, x, y, Linf(0.3), autoattack(), seed=0)`.
    """
    from .minimum_norm import fab_bounded
    from .square import square

    return (
        _named("APGD-CE", apgd, steps=100),
        _named("APGD-T", apgd_targeted, steps=100, targets=9),
        _named("FAB-T", fab_bounded, targets=9),
        _named("Square", square, queries=5000),
    )


def _named(name: str, attack: Callable, **options) -> Callable:
    """The attack with its options set, under the name that tables show."""
    attack = functools.partial(attack, **options)
    attack.__name__ = name
    return attack


def checkpoints(steps: int) -> list[int]:
    """The steps w_j = ceil(p_j steps) at which Auto-PGD looks back: p_0 = 0, p_1 = 0.22, then shorter and shorter stretches.

    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06). `checkpoints(100)` is [0, 22, 41, 57, 70, 80, 87, 93, 99].
    Source: Croce & Hein 2020, section 3.1.
    """
    hundredths = [0, 22]  # whole numbers, so that no rounding of p_j moves a checkpoint
    while hundredths[-1] < 100:
        hundredths.append(hundredths[-1] + max(hundredths[-1] - hundredths[-2] - 3, 6))
    return sorted({-(-p * steps // 100) for p in hundredths if p < 100} - {steps})


def _check(model, x, y, steps, restarts) -> None:
    checks.model(model, x=checks.images(x))
    checks.labels(y, x)
    checks.positive_int(steps, "steps")
    checks.positive_int(restarts, "restarts")


class _Run:
    """What the walks on one batch of images share: the model, the threat set and the best point of each image so far."""

    def __init__(self, model, x, y, threat, steps, batch_size, stop_early, seed, goal=None):
        self.x, self.y, self.goal = x.detach(), y, goal
        self.threat, self.steps, self.stop_early = threat, steps, stop_early
        self.batch_size = images_at_once(x, batch_size)
        self.generator = randomness.generator(seed, x.device)
        self.model = fast_layout(model, self.x)
        with torch.no_grad():
            parts = zip(self.x.split(self.batch_size), y.split(self.batch_size), strict=True)
            self.logits = torch.cat([checks.logits(self.model(a), b) for a, b in parts])
        if goal is not None:
            checks.logits(self.logits, goal, "target")
        self.fooled = fools(self.logits, y, goal)
        self.found = self.x.clone()
        # How far each step of a walk lies from its last checkpoint, for the steps that are checkpoints; 0 for the others.
        w = checkpoints(steps)
        self.stretch = torch.zeros(steps + 1, dtype=torch.int64, device=x.device)
        self.stretch[w[1:]] = torch.tensor(w, device=x.device).diff()

    def __call__(self, attacker: Callable, targets: list, name: str) -> Tensor:
        """Walk once for each entry of `targets`; the best points of all walks."""
        with torch.no_grad():
            clean = [attacker(self.logits, self.y, t) for t in targets]
        if any(value.shape != self.y.shape for value in clean):
            raise ValueError(
                f"loss: got shape {tuple(clean[0].shape)} from it, want ({len(self.y)},), one number an image"
            )
        self.value = torch.stack(clean).amax(0)
        wrong = self.fooled.clone()
        with progress.bar(total=len(targets) * self.steps * len(self.x), desc=name, unit="step") as bar:
            for target in targets:
                queue = (~(self.fooled if self.stop_early else wrong)).nonzero().squeeze(1)
                bar.update(self.steps * (len(self.x) - len(queue)))
                # Drawn for all images, so that the start of one does not depend on the fate of the others.
                start = self.threat.random(self.x, self.generator)
                self.walk(attacker, target, queue, start, bar)
        return self.found

    def walk(self, attacker, target, queue, start, bar) -> None:
        """Take the queued images from their starts through all steps, `batch_size` at a time.

        An image that is done leaves the batch and the next one in the queue takes its place. `s` holds the state of the
        images at work: now = x^t, before = x^{t-1}; best and its loss, gradient and success; eta; and since the last
        checkpoint the number of rises, and whether eta was halved and what the best loss was there.
        """
        s, waiting = self.enter(queue[:0], start), 0
        while waiting < len(queue) or len(s["image"]):
            room = self.batch_size - len(s["image"])
            if room and waiting < len(queue):
                fresh = self.enter(queue[waiting : waiting + room], start)
                s = {key: torch.cat([s[key], fresh[key]]) for key in s}
                waiting += room

            image, step = s["image"], s["step"]
            now = s["now"].requires_grad_()
            with torch.enable_grad():
                z = self.model(now)
                value = attacker(z, self.y[image], None if target is None else target[image])
                (grad,) = torch.autograd.grad(value.sum(), now)
            s["now"], value = now.detach(), value.detach()
            hit = fools(z.detach(), self.y[image], None if self.goal is None else self.goal[image])

            better = torch.where(hit == s["hit"], value > s["value"], hit)
            self.put(s, better, best=s["now"], slope=grad, value=value, hit=hit)
            s["rises"] += value > s["last"]
            s["last"] = value
            self.look_back(s, grad)

            done = (step == self.steps) | (s["hit"] if self.stop_early else False)
            if done.any():
                self.leave({key: part[done] for key, part in s.items()})
                bar.update(int((self.steps - step)[done].sum()))
                s = {key: part[~done] for key, part in s.items()}
            if len(s["image"]):
                self.advance(s)
                bar.update(len(s["image"]))

    def enter(self, image: Tensor, start: Tensor) -> dict[str, Tensor]:
        """The state of images at their starts."""
        begin = start[image]
        low = torch.full((len(image),), -torch.inf, dtype=begin.dtype, device=begin.device)
        none = torch.zeros(len(image), dtype=torch.int64, device=begin.device)
        return {
            "image": image, "x": self.x[image], "step": none, "now": begin, "before": begin, "best": begin,
            "slope": torch.zeros_like(begin), "grad": torch.zeros_like(begin), "value": low, "hit": none > 0, "last": low,
            "eta": torch.full_like(low, 2 * self.threat.full_step), "rises": none - 1, "known": low, "halved": none > 0,
        }  # fmt: skip

    @staticmethod
    def put(s: dict[str, Tensor], where: Tensor, **new: Tensor) -> None:
        """Replace parts of the state for the images `where`."""
        for key, part in new.items():
            mask = where.reshape(-1, *[1] * (part.dim() - 1))
            s[key] = torch.where(mask, part, s[key])

    def look_back(self, s: dict[str, Tensor], grad: Tensor) -> None:
        """At a checkpoint, halve the step of the images whose walk no longer pays, and send them back to their best point."""
        s["grad"] = grad
        stretch = self.stretch[s["step"]]
        here = stretch > 0
        if not here.any():
            return
        few = s["rises"] < RISING * stretch
        stuck = ~s["halved"] & (s["value"] == s["known"])
        halve = here & (few | stuck)
        self.put(s, halve, eta=s["eta"] / 2, now=s["best"], grad=s["slope"])
        self.put(s, here, halved=halve, known=s["value"], rises=torch.zeros_like(s["rises"]))

    def advance(self, s: dict[str, Tensor]) -> None:
        """One step with momentum (none in the first).

        In the first third of the walk a step is cut to the box before it is pulled back to the ball. Under L2 that finds more
        on networks, because no pixel rushes to its end; afterwards the nearest point is taken, whose fixed point is the
        optimum of a linear model.
        """
        now, threat = s["now"], self.threat
        if isinstance(threat, (L0, L1)):
            z = kernels.ascent_step(now, s["grad"], s["x"], threat, s["eta"])
        else:

            def rows(v: Tensor) -> Tensor:
                return v.reshape(-1, *[1] * (now.dim() - 1))

            z = now + threat.steepest(s["grad"], s["eta"])
            z = threat.project(torch.where(rows(3 * s["step"] < self.steps), threat._clip(z), z), s["x"])
            alpha = rows(torch.where(s["step"] > 0, MOMENTUM, 1.0).to(now.dtype))
            z = threat.project(now + alpha * (z - now) + (1 - alpha) * (now - s["before"]), s["x"])
        s["now"], s["before"], s["step"] = z, now, s["step"] + 1

    def leave(self, s: dict[str, Tensor]) -> None:
        """Keep what a finished walk found where it beats what was known of its image."""
        image = s["image"]
        better = torch.where(s["hit"] == self.fooled[image], s["value"] > self.value[image], s["hit"])
        won = image[better]
        self.found[won], self.value[won], self.fooled[won] = s["best"][better], s["value"][better], s["hit"][better]
