"""Membership inference: was this example among those that the model was trained on?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, models, randomness
from ..intervals import clopper_pearson
from ..training import fit
from .shadows import Shadows

_FEW = 64  # shadow models below which a variance of one example's own is too noisy (Carlini et al. 2022)
_ROWS = 10_000  # answers that the attack network of "shadow" learns from


def membership_inference(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: str = "loss",
    shadows: Shadows | None = None,
    variance: str | None = None,
    seed: int | None = None,
) -> Tensor:
    """A score for each example: the higher, the more it speaks for "this was in the training data".

    - "loss": -l(h(x), y), since training makes losses small (Yeom et al. 2018). Needs no shadow models.
    - "shadow": an attack network learns from the answers of the shadow models which look like a member's, and is then shown
      the model's answers: its logit for "member" (Shokri et al. 2017). It sees the sorted probabilities, p_y, and y.
    - "lira": with phi = log(p_y / (1 - p_y)), the log of N(phi; mu_in, s_in^2) / N(phi; mu_out, s_out^2), both normal laws
      fitted for each example to the shadow models that were trained with it and without (Carlini et al. 2022, online).
    - "lira-offline": log P(N(mu_out, s_out^2) <= phi), for which no shadow model has to have seen the example.

    Args:
        model: the attacked network; its logits are all that is used.
        x, y: examples (N, ...) in [0, 1] and their labels. For "lira" they must be the pool of the shadow models.
        shadows: from `train_shadows`, for every method but "loss". For "lira" each example needs two on either side.
        variance: of LiRA's normal laws: "example", one for each example, or "global", the mean over all examples; without,
            the second below 64 shadow models, as the paper advises.
        seed: of the attack network of "shadow".
    Returns: scores (N,), float64.
    Raises: TypeError, ValueError: bad input.
    Example: `membership_inference(model, x, y).shape` is (8,).
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    checks.choice(method, "method", ("loss", "shadow", "lira", "lira-offline"))
    if variance is not None:
        checks.choice(variance, "variance", ("example", "global"))
    if method != "loss" and not isinstance(shadows, Shadows):
        raise TypeError(f"shadows: got {type(shadows).__name__}, want Shadows for method={method!r} (train_shadows)")
    with torch.no_grad():
        z = torch.cat([checks.logits(model(a), b) for a, b in zip(x.split(1000), y.split(1000), strict=True)]).double()
    if method == "loss":
        return -F.cross_entropy(z, y, reduction="none")
    if method == "shadow":
        return _learned(z, y, shadows, seed)
    variance = ("global" if len(shadows) < _FEW else "example") if variance is None else variance
    pooled = shadows.x.shape == x.shape and bool((shadows.x == x).all())
    if method == "lira" and not pooled:
        raise ValueError("x: got other examples than shadows.x, want the pool itself, so that it is known which shadow "
                         "models saw them; method='lira-offline' needs none that did")  # fmt: skip
    seen = shadows.members if pooled else torch.zeros(len(shadows), len(x), dtype=torch.bool, device=x.device)
    phi, theirs = confidence(z, y), confidence(shadows.logits(x).double(), y)
    out = _normal(theirs, ~seen, variance, "without")
    if method == "lira":
        return _normal(theirs, seen, variance, "with").log_prob(phi) - out.log_prob(phi)
    return torch.special.log_ndtr((phi - out.mean) / out.stddev)


def confidence(z: Tensor, y: Tensor) -> Tensor:
    """phi = log(p_y / (1 - p_y)) = z_y - log sum_{k != y} exp z_k: logits (..., N, K), labels (N,) -> (..., N).

    Unlike the probability it does not round to 1, and its values over retrained networks look normal.

    Source: Carlini et al. 2022, section VI.
    Example: `confidence(torch.zeros(3, 2), torch.tensor([0, 1, 0]))` is all zeros.
    """
    own = y.expand(z.shape[:-1])[..., None]
    return z.gather(-1, own)[..., 0] - z.scatter(-1, own, -math.inf).logsumexp(-1)


def _normal(values: Tensor, chosen: Tensor, variance: str, what: str) -> torch.distributions.Normal:
    """The normal law of each column's chosen values (M, N) -> N laws."""
    count = chosen.sum(0)
    if count.min() < 2:
        raise ValueError(f"shadows: got an example with {count.min().item()} shadow models {what} it, want at least 2")
    mean = values.where(chosen, 0).sum(0) / count
    spread = (values - mean).where(chosen, 0).square().sum(0) / (count - 1)
    spread = spread if variance == "example" else spread.mean().expand_as(spread)
    return torch.distributions.Normal(mean, spread.clamp_min(1e-12).sqrt())


def _features(z: Tensor, y: Tensor) -> Tensor:
    """What the attack network sees, all in [0, 1]: sorted probabilities, the label's own, and the label as a unit vector."""
    p = z.softmax(-1)
    own = p.gather(-1, y[..., None])
    return torch.cat([p.sort(dim=-1, descending=True).values, own, F.one_hot(y, z.shape[-1])], -1).float().clamp(0, 1)


def _learned(z: Tensor, y: Tensor, shadows: Shadows, seed: int | None) -> Tensor:
    theirs = shadows.logits(shadows.x).double()
    if theirs.shape[-1] != z.shape[-1]:
        raise ValueError(f"shadows: got {theirs.shape[-1]} logits, want {z.shape[-1]}, as many as the model's")
    generator = randomness.generator(seed)
    some = torch.randperm(shadows.members.numel(), generator=generator)[:_ROWS].to(z.device)
    labels = shadows.y.expand(len(shadows), -1).flatten()[some]
    rows = _features(theirs.flatten(0, 1)[some], labels)
    attack = models.mlp((1, 1, rows.shape[1]), 2, hidden=(32,), seed=seed).to(z.device)
    seen = shadows.members.flatten()[some].long()
    fit(attack, SimpleNamespace(x=rows, y=seen), epochs=5, batch_size=200, lr=1e-2, seed=seed)
    with torch.no_grad():
        answer = attack(_features(z, y)).double()
    return answer[:, 1] - answer[:, 0]


# ---- how well did it go


@dataclass(frozen=True, eq=False)
class Membership:
    """How well scores tell members from others.

    Args:
        roc: (T, 2), false- and true-positive rates of all thresholds from (0, 0) to (1, 1).
        auc: area under it. advantage: the largest TPR - FPR. accuracy: of the best threshold, with as many members as
            others: 1/2 + advantage / 2.
        fpr, tpr: the true-positive rate at the strictest threshold whose false-positive rate is at most `fpr`.
        low, high: interval of tpr (Clopper-Pearson); it takes the threshold as given.
        positives, negatives: how many members and others there were.
    Example: `compare_scores([2.0, 3.0], [0.0, 1.0], fpr=0.5).tpr` is 1.0.
    """

    roc: Tensor
    auc: float
    advantage: float
    accuracy: float
    fpr: float
    tpr: float
    low: float
    high: float
    positives: int
    negatives: int

    def __str__(self) -> str:
        return (
            f"TPR {self.tpr:.2%} [{self.low:.2%}, {self.high:.2%}] at FPR {self.fpr:.2%}, "
            f"advantage {self.advantage:.3f}, AUC {self.auc:.3f}"
        )


def compare_scores(members, others, *, fpr: float = 0.001, confidence: float = 0.95) -> Membership:
    """The ROC of a membership attack, and its true-positive rate where false alarms are rare.

    Average accuracy hides what matters: an attack that is sure about one person in a hundred, and knows it, is worse for
    that person than one that is a little better than a coin about everybody. So look at the left end of the ROC.

    The best threshold's accuracy is 1/2 + D/2, with D = max_t (P(member's score > t) - P(other's score > t)), the one-sided
    Kolmogorov-Smirnov distance of the two kinds of scores.

    Args:
        members, others: finite scores, tensors or sequences; equal scores fall on the same side of each threshold.
        fpr: false-positive rate in (0, 1]; meaningful only with more than 1 / fpr others.
        confidence: of the interval, in (0, 1).
    Returns: `Membership`.
    Raises: ValueError: bad input.
    Source: Carlini et al. 2022; Yeom et al. 2018 for the advantage.
    Example: `print(compare_scores(torch.randn(50) + 1, torch.randn(50), fpr=0.1))`.
    """
    checks.probability(fpr, "fpr", one=True)
    checks.probability(confidence, "confidence")
    sides = []
    for name, scores in (("members", members), ("others", others)):
        scores = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
        if scores.dim() != 1 or not len(scores) or not torch.isfinite(scores).all():
            raise ValueError(f"{name}: got shape {tuple(scores.shape)}, want at least one score, all finite, in a row")
        sides.append(scores)
    cuts, back = torch.cat(sides).unique(return_inverse=True)
    hits = [torch.bincount(part, minlength=len(cuts)).flip(0).cumsum(0) for part in back.split([*map(len, sides)])]
    tp, fp = (F.pad(h, (1, 0)) for h in hits)
    n, m = map(len, sides)
    tprs, fprs = tp.double() / n, fp.double() / m
    advantage = float((tprs - fprs).max())
    hit = int(tp[fp <= fpr * m + 1e-9].max())
    return Membership(torch.stack([fprs, tprs], 1), float(torch.trapezoid(tprs, fprs)), advantage, 0.5 + advantage / 2,
                      fpr, hit / n, *clopper_pearson(hit, n, confidence), n, m)  # fmt: skip
