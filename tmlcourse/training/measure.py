"""What training achieved: one row of a table, and how thick the boundary between two classes is."""

from __future__ import annotations

import functools

import pandas as pd
import torch
from torch import Tensor

from .. import checks, tables


def scorecard(model, x: Tensor, y: Tensor, threat, *, steps: int = 20, seed: int = 0) -> dict[str, float]:
    """Accuracy on the clean images and under attacks of growing strength, as papers on adversarial training print it.

    clean >= fgsm, pgd, cw >= ensemble (the share that stands under all of them and the parameter-free APGD together).

    Args:
        model, x, y, threat: as for `attacks.pgd`.
        steps: of PGD on the cross-entropy ("pgd") and on the margin loss of Carlini & Wagner ("cw"); APGD takes 1.5 times as
            many on the cross-entropy and as many on DLR (the margin, with two classes).
        seed: of the random starts.
    Returns:
        Shares in [0, 1] by name: clean, fgsm, pgd, cw, ensemble.
    Raises:
        TypeError, ValueError: bad input.
    Source: Zhang et al. 2020, table 1 (natural, FGSM, PGD-20, C&W-30); Croce & Hein 2020 for the ensemble.
    Example: `scorecard(model, x, y, Linf(0.1), steps=5)["clean"] >= 0`.
    """
    from ..attacks import apgd, fgsm, pgd, robust_accuracy

    checks.positive_int(steps, "steps")
    with torch.no_grad():
        classes = checks.logits(model(checks.images(x)[:1]), checks.labels(y, x)[:1]).shape[1]
    single = {
        "fgsm": fgsm,
        "pgd": functools.partial(pgd, steps=steps),
        "cw": functools.partial(pgd, steps=steps, loss="margin"),
    }
    found = {name: robust_accuracy(model, x, y, threat, [attack], seed=seed) for name, attack in single.items()}
    standing = torch.stack([result.standing for result in found.values()]).all(0)
    if standing.any():
        strong = [functools.partial(apgd, steps=steps + steps // 2),
                  functools.partial(apgd, steps=steps, loss="dlr" if classes > 2 else "margin")]  # fmt: skip
        left = robust_accuracy(model, x[standing], y[standing], threat, strong, seed=seed)
        standing[standing.clone()] = left.standing
    row = {"clean": found["fgsm"].clean} | {name: result.accuracy for name, result in found.items()}
    return row | {"ensemble": standing.double().mean().item()}


@torch.no_grad()
def boundary_thickness(
    model, x: Tensor, x_adv: Tensor, *, alpha: float = 0.0, beta: float = 0.75, points: int = 128
) -> Tensor:
    """How long the way from x to x_adv runs through the zone where the model hesitates between the two answers.

    Theta = ||x - x_adv||_2 int_0^1 1[alpha < p_i(x(t)) - p_j(x(t)) < beta] dt along x(t) = x + t (x_adv - x), p the softmax,
    i the model's answer at x and j at x_adv. With alpha = 0 and beta = 1 it is the distance of x to the boundary on this
    line, the margin; a thin boundary is one that a small step crosses from sure to wrong.

    Args:
        model: returns logits (N, K); in evaluation mode.
        x: images (N, ...) in [0, 1].
        x_adv: others of the same shape that the model answers differently, e.g. from `attacks.pgd`.
        alpha, beta: the zone, -1 <= alpha < beta <= 1.
        points: of the midpoint rule (>= 1).
    Returns:
        (N,), in the units of pixels; NaN where the model gives both ends the same answer.
    Raises:
        TypeError, ValueError: bad input.
    Source: Yang et al. 2020 ("Boundary thickness and robustness in learning models"), definition 1.
    Example: `boundary_thickness(model, x, x.flip(0)).shape` is (8,).
    """
    checks.model(model, checks.images(x))
    checks.same_shape(checks.images(x_adv, "x_adv"), x)
    checks.positive_int(points, "points")
    if not -1 <= alpha < beta <= 1:
        raise ValueError(f"alpha, beta: got {alpha} and {beta}, want -1 <= alpha < beta <= 1")
    own, other = (
        checks.logits(model(a), torch.zeros(len(a), dtype=torch.int64)).argmax(1)[:, None] for a in (x, x_adv)
    )
    inside = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for k in range(points):
        p = model(torch.lerp(x, x_adv, (k + 0.5) / points)).softmax(1)
        gap = (p.gather(1, own) - p.gather(1, other)).squeeze(1)
        inside += ((alpha < gap) & (gap < beta)).to(x.dtype)
    length = (x_adv - x).flatten(1).norm(dim=1)
    return torch.where((own == other).squeeze(1), torch.nan, length * inside / points)


def shipped_table(name: str = "mnist") -> pd.DataFrame:
    """The comparison of all methods that is shipped with the package, one row a method.

    Columns: method; clean, fgsm, pgd, cw and ensemble as in `scorecard`; seconds an epoch on the machine that made it and
    cpu_seconds of the whole training; images, epochs, steps, tested, network, device. Written by benchmarks/training.py.

    Raises:
        ValueError: no such table; the message lists those that there are.
    Example: `shipped_table("mnist").set_index("method").clean`.
    """
    return tables.shipped(__file__, name)
