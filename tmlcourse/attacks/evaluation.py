"""How many images are left standing: the worst case over several attacks, with an interval."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, progress
from ..intervals import clopper_pearson
from .gradient import pgd


@dataclass(frozen=True)
class RobustAccuracy:
    """What `robust_accuracy` found. `float(result)` is the accuracy.

    Attributes:
        accuracy: share of images that every attack left classified as labelled, in [0, 1].
        low, high: its 95 % Clopper-Pearson interval over the draw of the images.
        n: number of images.
        clean: accuracy before any attack.
        standing: bool (N,), the images that no attack broke.
        x_adv: for each broken image a point of the threat set that breaks it; for the others the clean image.
        broken_by: the name of the attack that broke each image; "clean" where the model was wrong from the start, ""
            for the images that stand.
    """

    accuracy: float
    low: float
    high: float
    n: int
    clean: float
    standing: Tensor
    x_adv: Tensor
    broken_by: tuple[str, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.low, self.high

    def __float__(self) -> float:
        return self.accuracy

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} % robust ({100 * self.low:.1f} to {100 * self.high:.1f}), n = {self.n}"


def robust_accuracy(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    attacks: Sequence[Callable] = (pgd,),
    *,
    batch_size: int = 1000,
    seed: int | None = None,
) -> RobustAccuracy:
    """Share of images that stay correctly classified under every attack: (1/n) sum_i min_a 1[h(a(x_i)) = y_i].

    The attacks run one after the other on the images still standing. A fall counts only when the adversarial image lies in
    the threat set and the model, called plainly on it, is wrong; an attack that leaves the set is an error, not a success.

    Args:
        model, x, y, threat: as for `pgd`.
        attacks: callables (model, x, y, threat) -> x_adv. Those that know `stop_early` are told to stop at the first
            success, those that know `seed` are given one.
        batch_size: images handed to an attack at once.
        seed: makes the result reproducible, for attacks that know `seed`.
    Returns:
        `RobustAccuracy`, an upper bound of the true robust accuracy: a better attack may find more.
    Raises:
        TypeError, ValueError: bad input, or an attack whose answer lies outside the threat set.
    Source: Croce & Hein 2020 (worst case over an ensemble); Clopper & Pearson 1934.
    Example: `print(robust_accuracy(model, x, y, Linf(0.1), [fgsm, partial(pgd, steps=100, restarts=5)]))`.
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    checks.positive_int(batch_size, "batch_size")
    if callable(attacks) or not attacks or not all(callable(a) for a in attacks):
        raise TypeError(f"attacks: got {attacks!r}, want a non-empty list of callables (model, x, y, threat) -> x_adv")
    x_adv = x.detach().clone()
    standing = _right(model, x, y)
    clean = standing.float().mean().item()
    broken_by = ["" if right else "clean" for right in standing.tolist()]
    with progress.bar(total=len(attacks) * len(x), desc="robust accuracy", unit="image") as bar:
        for number, attack in enumerate(attacks):
            name = getattr(attack, "__name__", None) or getattr(
                getattr(attack, "func", attack), "__name__", str(attack)
            )
            known = inspect.signature(attack).parameters
            bar.update(len(x) - int(standing.sum()))
            todo = standing.nonzero().squeeze(1)
            for index in todo.split(batch_size) if len(todo) else ():
                options = {"stop_early": True} if "stop_early" in known else {}
                if "seed" in known and seed is not None:
                    options["seed"] = seed + 1000 * number + int(index[0])
                candidate = attack(model, x[index], y[index], threat, **options).detach()
                outside = ~threat.contains(candidate, x[index])
                if outside.any():
                    raise ValueError(f"attacks: {name} left {threat} on {int(outside.sum())} of {len(index)} images")
                fell = ~_right(model, candidate, y[index])
                x_adv[index[fell]], standing[index[fell]] = candidate[fell], False
                for i in index[fell].tolist():
                    broken_by[i] = name
                bar.update(len(index))
    k, n = int(standing.sum()), len(x)
    return RobustAccuracy(k / n, *clopper_pearson(k, n), n, clean, standing, x_adv, tuple(broken_by))


@torch.no_grad()
def _right(model, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified as labelled: bool (N,). Small batches keep the activations in a CPU's caches."""
    size = 100 if x.device.type == "cpu" else 1000
    batches = zip(x.split(size), y.split(size), strict=True)
    return torch.cat([checks.logits(model(a), b).argmax(1) == b for a, b in batches])
