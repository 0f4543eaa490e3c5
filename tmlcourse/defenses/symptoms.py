"""Does a model resist, or has only the attack failed? The symptoms of obfuscated gradients, as a checklist that runs."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..attacks import fgsm, pgd
from ..attacks.losses import cross_entropy, fools
from ..attacks.square import square
from ..threat import L0, L1, L2, Linf


def obfuscation_checks(
    model,
    x: Tensor,
    y: Tensor,
    threat,
    *,
    steps: int = 20,
    queries: int = 100,
    points: int = 100,
    tolerance: float = 0.1,
    attack=None,
    verbose: bool = True,
    seed: int | None = None,
) -> pd.DataFrame:
    """Look for the symptoms of obfuscated gradients, on the images that the model reads correctly.

    | symptom | measured | flagged |
    |---|---|---|
    | no gradient | images whose loss gradient is 0, not finite, or not there at all | share > `tolerance` |
    | answers change between calls | images whose logits differ in a second call | any |
    | one step beats many | images broken by FGSM and not by the iterative attack | share > `tolerance` |
    | black box beats white box | images broken by Square, from scores alone, and not by the iterative attack | the same |
    | random search beats the gradient | images broken by random points of the ball, not by the iterative attack | the same |
    | an unbounded attack fails | images that stand when every image of the box is allowed | share > `tolerance` |
    | a larger ball does not help | images broken at radius r and not at 2 r, for some r | share > `tolerance` |

    A symptom is a reason to distrust the attack, not a measurement of robustness; a model without symptoms may still have
    fooled a weak attack. In a sound evaluation the iterative attack explains everything that the simpler ones find.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x, y: images (N, ...) in [0, 1] and int64 labels (N,), at least one of them read correctly; 30 to 100 are enough.
        threat: `Linf`, `L2`, `L1` or `L0`, with the radius at which the model is said to resist. Square runs for images
            (N, C, H, W) under `Linf` and `L2`.
        steps: of the iterative attack (>= 1).
        queries: of Square (>= 0).
        points: random points for each image (>= 0), half of them from the ball, half from its surface.
        tolerance: share of the images, in [0, 1), that may show a symptom by chance.
        attack: the iterative attack to be examined, (model, x, y, threat) -> x_adv; `pgd` from the clean image without it.
        verbose: print what was found, a line for each symptom.
        seed: makes the result reproducible and leaves torch's generator as it was.
    Returns:
        One row a symptom: symptom, share (of the correctly read images, NaN where it was not measured), flagged, found
        (a sentence).
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Athalye, Carlini & Wagner 2018, section 3.1; Carlini et al. 2019, section 5.
    Example: `obfuscation_checks(model, x, model(x).argmax(1), Linf(0.1), steps=5, queries=10, points=4, seed=0).flagged`.
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    checks.positive_int(steps, "steps")
    checks.positive_int(queries, "queries", least=0)
    checks.positive_int(points, "points", least=0)
    if checks.nonnegative(tolerance, "tolerance") >= 1:
        raise ValueError(f"tolerance: got {tolerance}, want a share in [0, 1)")
    if not isinstance(threat, (Linf, L2, L1, L0)) or threat.box is None:
        raise ValueError(f"threat: got {threat!r}, want Linf, L2, L1 or L0 with a box of valid pixels")
    if attack is None:

        def attack(model, x, y, threat):
            return pgd(model, x, y, threat, steps=steps, random_start=False)

    with randomness.seeded(seed, x.device), progress.bar(total=7, desc="symptoms", unit="symptom") as bar:
        with torch.no_grad():
            right = checks.logits(model(x), y).argmax(1) == y
        if not right.any():
            raise ValueError("x: got no image that the model reads correctly, want at least one")
        x, y = x[right].detach(), y[right]
        net = _WithGradient(model)

        def broken(x_adv: Tensor) -> Tensor:
            with torch.no_grad():
                return fools(model(x_adv), y)

        rows = []

        def note(symptom: str, share: float, most: float, sentence: str) -> None:
            rows.append({"symptom": symptom, "share": share, "flagged": share > most, "found": sentence})
            bar.update()

        useless = _useless_gradient(net, x, y)
        note("no gradient", useless, tolerance, f"{useless:.0%} of the images have a zero or non-finite gradient")
        with torch.no_grad():
            changed = (model(x) - model(x)).abs().amax(1).gt(1e-4 * (1 + model(x).abs().amax(1))).double().mean().item()
        note(
            "answers change between calls",
            changed,
            0.0,
            f"{changed:.0%} of the images get other logits the second time",
        )

        reached = broken(attack(net, x, y, threat))
        simpler = {"one step beats many": ("one step", broken(fgsm(net, x, y, threat)))}
        if x.dim() == 4 and isinstance(threat, (Linf, L2)):
            x_adv = square(model, x, y, threat, queries=queries)
            simpler["black box beats white box"] = (f"Square, {queries} queries,", broken(x_adv))
        else:
            simpler["black box beats white box"] = None
        simpler["random search beats the gradient"] = (
            f"{points} random points",
            _random_search(x, threat, points, broken),
        )
        for symptom, found in simpler.items():
            if found is None:
                note(
                    symptom, float("nan"), tolerance, f"not measured: Square needs Linf or L2 and images, not {threat}"
                )
                continue
            only = (found[1] & ~reached).double().mean().item()
            note(
                symptom,
                only,
                tolerance,
                f"{found[0]} breaks {only:.0%} of the images that {steps} gradient steps do not",
            )

        standing = (~broken(attack(net, x, y, _whole_box(threat, x)))).double().mean().item()
        note(
            "an unbounded attack fails",
            standing,
            tolerance,
            f"{standing:.0%} of the images stand though all is allowed",
        )
        saved, smaller = 0.0, None
        for factor in (0.5, 1, 2):
            now = reached if factor == 1 else broken(attack(net, x, y, _scaled(threat, factor)))
            if smaller is not None:
                saved = max(saved, (smaller & ~now).double().mean().item())
            smaller = now
        note(
            "a larger ball does not help",
            saved,
            tolerance,
            f"{saved:.0%} of the images fall at some radius, not at twice it",
        )
    table = pd.DataFrame(rows)
    if verbose:
        for row in rows:
            print(f"{'FLAGGED' if row['flagged'] else 'ok':8}{row['symptom']}: {row['found']}")
    return table


class _WithGradient(nn.Module):
    """The model, with a gradient of 0 where it has none at all, so that gradient attacks run on it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        if x.requires_grad and not z.requires_grad:
            z = z + 0 * x.flatten(1).sum(1, keepdim=True)
        return z


def _useless_gradient(net, x: Tensor, y: Tensor) -> float:
    """Share of the images whose cross-entropy gradient is zero in every pixel, or not finite in some."""
    bad = 0
    for a, b in zip(x.split(100), y.split(100), strict=True):
        a = a.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(net(a), b).sum(), a)
        grad = grad.flatten(1)
        bad += int(((grad == 0).all(1) | ~torch.isfinite(grad).all(1)).sum())
    return bad / len(x)


def _random_search(x: Tensor, threat, points: int, broken) -> Tensor:
    """Which images some random point breaks: half of them drawn from the ball, half pushed to its surface."""
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for i in range(points):
        if i % 2:
            found |= broken(threat.random(x))
        else:
            found |= broken(threat.project(x + threat.steepest(torch.randn_like(x), threat.full_step), x))
    return found


def _whole_box(threat, x: Tensor):
    """The smallest ball of the same norm that holds every image of the box."""
    d = x[0].numel()
    if isinstance(threat, L0):
        return dataclasses.replace(threat, k=d)
    side = threat.box[1] - threat.box[0]
    return dataclasses.replace(threat, eps=side * {Linf: 1.0, L2: d**0.5, L1: float(d)}[type(threat)])


def _scaled(threat, factor: float):
    if isinstance(threat, L0):
        return dataclasses.replace(threat, k=max(1, round(threat.k * factor)))
    return dataclasses.replace(threat, eps=threat.eps * factor)
