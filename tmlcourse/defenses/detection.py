"""Detectors: do not answer an attacked image, flag it. Passive, since the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from .. import checks


@dataclass(frozen=True)
class Detector:
    """Feature squeezing as a detector: flag x where  max_i || f(x) - f(s_i(x)) ||_1 > threshold,  f the probabilities.

    Attributes:
        model: images -> logits (N, K), in evaluation mode.
        squeezers: functions s_i of images, e.g. `BitDepth(1)` and `MedianFilter(2)`.
        threshold: T, in [0, 2]; `squeezing_detector` finds it.
    Source: Xu, Evans & Qi 2018, section V.
    Example: `Detector(model, (tmlcourse.defenses.BitDepth(1),), 1.0).flags(x)`.
    """

    model: Callable
    squeezers: tuple[Callable, ...]
    threshold: float

    def __post_init__(self):
        if not self.squeezers or not all(callable(s) for s in self.squeezers):
            raise TypeError(f"squeezers: got {self.squeezers!r}, want one or more functions of images")
        checks.nonnegative(self.threshold, "threshold")

    def score(self, x: Tensor) -> Tensor:
        """max_i || f(x) - f(s_i(x)) ||_1 of each image, in [0, 2]: (N, ...) -> (N,). Gradients flow where they can."""
        p = self.model(x).softmax(1)
        return torch.stack([(p - self.model(s(x)).softmax(1)).abs().sum(1) for s in self.squeezers]).amax(0)

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """`score` without gradients, some images at a time."""
        checks.model(self.model, checks.images(x))
        return torch.cat([self.score(part) for part in x.split(100 if x.device.type == "cpu" else 1000)])

    def flags(self, x: Tensor) -> Tensor:
        """Which images look attacked: bool (N,)."""
        return self.scores(x) > self.threshold


def squeezing_detector(model, squeezers: Sequence[Callable], x: Tensor, *, fpr: float = 0.05) -> Detector:
    """The detector whose threshold flags at most a share `fpr` of the clean images x: the smallest such threshold.

    Args:
        model: images -> logits, in evaluation mode.
        squeezers: functions of images.
        x: clean images (N, ...) in [0, 1], none of those that it will be judged on.
        fpr: false-positive rate, in [0, 1).
    Raises:
        TypeError, ValueError: bad input.
    Source: Xu, Evans & Qi 2018, section V.B (5 %).
    Example: `squeezing_detector(model, [tmlcourse.defenses.BitDepth(1)], x).flags(x)`.
    """
    detector = Detector(model, tuple(squeezers), 0.0)
    if checks.nonnegative(fpr, "fpr") >= 1:
        raise ValueError(f"fpr: got {fpr}, want a rate in [0, 1)")
    score = detector.scores(x).sort(descending=True).values
    return Detector(model, tuple(squeezers), score[int(fpr * len(score))].item())


def roc(clean: Tensor, attacked: Tensor) -> tuple[pd.DataFrame, float]:
    """The detector's trade-off over all thresholds: (table of fpr, tpr, threshold; area under the curve).

    Args:
        clean, attacked: scores (n,), (m,), larger for more suspicious; finite, at least one each.
    Returns:
        The table, from the strictest threshold (nothing flagged) to the laxest, and the area in [0, 1]: the chance that an
        attacked image scores higher than a clean one.
    Raises:
        ValueError: empty or not finite.
    Example: `roc(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.9]))[1]`.
    """
    for name, scores in (("clean", clean), ("attacked", attacked)):
        if scores.dim() != 1 or not len(scores) or not torch.isfinite(scores).all():
            raise ValueError(f"{name}: got shape {tuple(scores.shape)}, want one or more finite scores (n,)")
    score = torch.cat([clean, attacked]).detach().double().cpu().numpy()
    is_attacked = [0] * len(clean) + [1] * len(attacked)
    fpr, tpr, threshold = roc_curve(is_attacked, score, drop_intermediate=False)
    return pd.DataFrame({"fpr": fpr, "tpr": tpr, "threshold": threshold}), float(roc_auc_score(is_attacked, score))
