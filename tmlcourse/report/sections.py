"""The eight sections of a report. Each is a function of the case that yields rows and leaves its evidence in a dict.

A section that does not apply to a network says so in a row of its own; nothing is left out in silence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import checks
from ..attacks import apgd, apgd_targeted, pgd, robust_accuracy, square
from ..certify import least_margin, margins
from ..certify.network import read
from ..fairness.rates import membership as group_codes
from ..interpret.common import gradient
from ..interpret.gradients import integrated_gradients
from ..interpret.sanity import cascading, rank_correlation
from ..intervals import clopper_pearson
from ..poisoning import neural_cleanse
from ..privacy.membership import compare_scores, membership_inference
from ..threat import L2, Linf

VERDICTS = ("measured", "fine", "caution", "alarm", "not measured")
_NEURONS = 10_000  # hidden neurons up to which CROWN bounds every one of them; beyond, those inside get interval bounds
_EXPLAINED, _CLEANSED, _CERTIFIED, _ANSWERS = 16, 100, 100, 5  # images of a section at most; the last is times n


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        section, what: where it belongs and what was measured.
        value, low, high: the number and its 95 % interval; NaN where there is none.
        n: images it rests on.
        verdict: "measured", "fine", "caution", "alarm" or "not measured"; the comment says by which rule.
        comment: one sentence.
    Example: `Row("clean", "accuracy", 0.9, 0.8, 1.0, 40, "measured", "without an attacker")`.
    """

    section: str
    what: str
    value: float
    low: float
    high: float
    n: int
    verdict: str
    comment: str


@dataclass(frozen=True, eq=False)
class Case:
    """What is on trial: the model, its images (`x`, `y` many, `few` of them for what costs gradients) and the question.

    groups: one entry an image of x, or None. train: (x, y) seen in training, or None. effort: multiplies steps and queries.
    Example: `Case(model, x, y, 4, None, None, Linf(0.1), ("a", "b"), 1, 0).few_x.shape[0]` is 4.
    """

    model: object
    x: Tensor
    y: Tensor
    few: int
    groups: np.ndarray | None
    train: tuple[Tensor, Tensor] | None
    threat: object
    classes: tuple[str, ...]
    effort: int
    seed: int

    @property
    def few_x(self) -> Tensor:
        return self.x[: self.few]

    @property
    def few_y(self) -> Tensor:
        return self.y[: self.few]


def _unmeasured(section: str, what: str, why: str) -> Row:
    return Row(section, what, math.nan, math.nan, math.nan, 0, "not measured", why)


def _share(hits: Tensor) -> tuple[float, float, float]:
    """A share with its exact interval."""
    k, n = int(hits.sum()), len(hits)
    return k / n, *clopper_pearson(k, n)


@torch.no_grad()
def answers(model, x: Tensor, y: Tensor) -> Tensor:
    """Logits (N, K), a hundred images at a time.

    Example: `answers(model, x, y).shape` is (8, 10).
    """
    return torch.cat([checks.logits(model(a), b) for a, b in zip(x.split(100), y.split(100), strict=True)])


def _clean(case: Case, seen: dict) -> Iterator[Row]:
    """How often the answer is right when nobody interferes."""
    seen["logits"] = answers(case.model, case.x, case.y)
    seen.update(x=case.few_x, y=case.few_y, classes=case.classes)
    right = seen["logits"].argmax(1) == case.y
    yield Row("clean", "accuracy", *_share(right), len(right), "measured", "Without an attacker; chapter 1.")


def _attacked(case: Case, seen: dict) -> Iterator[Row]:
    """How often it is still right when somebody does: PGD, a black-box search, and both with Auto-PGD on top."""
    model, x, y, threat, seed = case.model, case.few_x, case.few_y, case.threat, case.seed
    steps, queries = 10 * case.effort, 50 * case.effort
    first = robust_accuracy(model, x, y, threat, [functools.partial(pgd, steps=steps)], seed=seed)
    standing, x_adv = first.standing.clone(), first.x_adv.clone()
    yield Row("attacked", f"PGD, {steps} steps", first.accuracy, *first.interval, first.n, "measured",
              f"Accuracy left under {threat}; chapter 3.")  # fmt: skip
    if x.dim() == 4 and isinstance(threat, (Linf, L2)):
        search = functools.partial(square, queries=queries)
        box = robust_accuracy(model, x, y, threat, [search], seed=seed)
        new = standing & ~box.standing
        masked = int(new.sum()) > 0.05 * len(x) and float(box) < float(first)
        standing, x_adv[new] = standing & box.standing, box.x_adv[new]
        say = ("Breaks more than the gradient does: gradients may be masked; chapter 7." if masked else
               "Needs scores only, and breaks no more than the gradient does; chapter 5.")  # fmt: skip
        yield Row("attacked", f"Square, {queries} queries", box.accuracy, *box.interval, box.n,
                  "alarm" if masked else "measured", say)  # fmt: skip
    else:
        yield _unmeasured("attacked", "Square", "Wants images (N, C, H, W) and an Linf or L2 threat; chapter 5.")
    if standing.any():
        strong = [functools.partial(apgd, steps=steps), functools.partial(apgd_targeted, steps=steps, targets=2)]
        left = standing.nonzero().squeeze(1)
        last = robust_accuracy(model, x[left], y[left], threat, strong, seed=seed)
        x_adv[left], standing[left] = last.x_adv, last.standing
    right = seen["logits"][: len(x)].argmax(1) == y
    seen.update(x_adv=x_adv, y_adv=answers(model, x_adv, y).argmax(1), standing=standing, broken=right & ~standing)
    value, low, high = _share(standing)
    unharmed = float(right.float().mean())
    verdict = "alarm" if high < unharmed / 2 else "caution" if value < 0.9 * unharmed else "fine"
    say = {"alarm": "Less than half of the clean accuracy is left: do not put it where anybody gains by an error.",
           "caution": "An attacker costs more than a tenth of the accuracy.",
           "fine": "At least nine tenths of the clean accuracy are left; a better attack may find more."}  # fmt: skip
    yield Row("attacked", "the worst of all, with Auto-PGD", value, low, high, len(standing), verdict,
              say[verdict] + " An upper bound of the truth; chapter 4.")  # fmt: skip


def _certified(case: Case, seen: dict) -> Iterator[Row]:
    """How often it is proved right, whatever the attacker does: interval bounds and CROWN."""
    if not isinstance(case.threat, Linf):
        kind = type(case.threat).__name__
        yield _unmeasured("certified", "share proved", f"These bounds are for Linf, the threat is {kind}; chapter 8.")
        return
    m = min(case.few, _CERTIFIED)
    x, y, eps, box = case.few_x[:m], case.few_y[:m], case.threat.eps, case.threat.box
    try:
        network = read(case.model, x)
    except (TypeError, ValueError) as limit:  # only reading: a layer that no bound is known for
        yield _unmeasured("certified", "share proved", f"Not certifiable by this method: {limit}; chapter 8.")
        return
    neurons = sum(math.prod(block.shape) for block in network.blocks[:-1])
    proved = torch.zeros(m, dtype=torch.bool, device=x.device)
    for method, name in (("ibp", "intervals"), ("crown" if neurons <= _NEURONS else "crown-ibp", "CROWN")):
        mine = least_margin(margins(case.model, x, y, eps, method=method, box=box), y) > 0
        proved |= mine
        inside = "" if method != "crown-ibp" else f" With {neurons:,} neurons, those inside get interval bounds."
        yield Row("certified", f"proved by {name}", *_share(mine), m, "measured",
                  f"A lower bound of the truth; chapter 9.{inside}")  # fmt: skip
    if "standing" in seen:
        standing = seen["standing"][:m]
        if bool((proved & ~standing).any()):
            raise RuntimeError("an image was both certified and broken: one of the two is wrong, please report it")
        between = standing & ~proved
        small = float(between.float().mean()) <= 0.1
        yield Row("certified", "neither proved nor broken", *_share(between), m, "fine" if small else "caution",
                  "At most a tenth is open." if small else
                  "Here nobody knows: the bounds are too loose, or the attack too weak; chapter 8.")  # fmt: skip


def _backdoor(case: Case, seen: dict) -> Iterator[Row]:
    """Is there one small change that sends every image to the same class? Neural Cleanse, for every class."""
    classes = seen["logits"].shape[1]
    if case.x.dim() != 4 or classes < 4:
        got = f"images {tuple(case.x.shape[1:])} and {classes} classes"
        why = f"Wants images (C, H, W) and four classes or more to compare, got {got}; chapter 12."
        yield _unmeasured("backdoor", "classes flagged", why)
        return
    x = case.x[:_CLEANSED]
    found = neural_cleanse(case.model, x, steps=100 * case.effort, lr=0.3, lam=1e-2, batch_size=6, seed=case.seed)
    seen["cleansed"] = found
    named = ", ".join(case.classes[k] for k in found.flagged)
    unreached = [case.classes[k] for k in found.table["label"][found.table["success"] < 0.8]]
    verdict = "alarm" if named else "caution" if unreached else "fine"
    say = (f"A trigger far smaller than the others leads to: {named}." if named else
           f"No small trigger stands out, but none was found at all for: {', '.join(unreached)}." if unreached else
           "No class is much easier to reach than the others; large or moving triggers hide from this.")  # fmt: skip
    yield Row(
        "backdoor", "classes flagged", len(found.flagged), math.nan, math.nan, len(x), verdict, say + " Chapter 12."
    )
    norms = found.table["norm"]
    yield Row("backdoor", "smallest trigger / median", float(norms.min() / norms.median()), math.nan, math.nan, len(x),
              "measured", f"Sizes in pixels: {norms.min():.0f} and {norms.median():.0f}.")  # fmt: skip


def _leakage(case: Case, seen: dict) -> Iterator[Row]:
    """Does the loss tell who was in the training data?"""
    if case.train is None:
        yield _unmeasured(
            "leakage", "membership", "No training data were given (the argument named train); see chapter 16."
        )
        return
    members = membership_inference(case.model, *case.train)
    others = membership_inference(case.model, case.x, case.y)
    fpr = 0.01 if len(others) >= 100 else 0.1
    found = compare_scores(members, others, fpr=fpr)
    seen["membership"] = found
    low, high = _auc_interval(found.auc, found.positives, found.negatives)
    n = found.positives + found.negatives
    verdict = "fine" if low <= 0.5 else "alarm" if low > 0.6 else "caution"
    say = {"fine": "No better than guessing, as far as this attack sees; shadow models see more.",
           "caution": "Members are told from others a little better than by guessing.",
           "alarm": "Whoever holds a record can tell whether it was trained on."}  # fmt: skip
    yield Row("leakage", "AUC of the loss attack", found.auc, low, high, n, verdict, say[verdict] + " Chapter 16.")
    verdict = "fine" if found.low <= fpr else "alarm" if found.low > 10 * fpr else "caution"
    yield Row("leakage", f"members found at {fpr:.0%} false alarms", found.tpr, found.low, found.high, found.positives,
              verdict, f"Guessing finds {fpr:.0%} of them.")  # fmt: skip


def _auc_interval(auc: float, n: int, m: int) -> tuple[float, float]:
    """Of the area under a ROC curve from n positives and m negatives (Hanley & McNeil 1982), cut to [0, 1]."""
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (one - auc**2) + (m - 1) * (two - auc**2)
    away = 1.96 * math.sqrt(max(variance, 0) / (n * m))
    return max(0.0, auc - away), min(1.0, auc + away)


def expected_calibration_error(confidence, right, *, bins: int = 10) -> tuple[float, pd.DataFrame]:
    """Does "90 % sure" mean right in nine cases of ten?  ECE = sum_b n_b / N |share right in b - mean confidence in b|.

    Args:
        confidence: (N,) in [0, 1], the probability of the predicted class. right: (N,) of bool, whether it was the label.
        bins: of equal width, (0, 1/B], (1/B, 2/B], ..., the first with its lower end (>= 1).
    Returns:
        (ECE, table): one row a bin that is not empty, with columns group, score (mean confidence), observed (share right),
        low, high (Clopper and Pearson) and n, as `plot.calibration` wants it.
    Raises: TypeError, ValueError: bad input.
    Source: Guo et al. 2017, section 2.
    Example: `expected_calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False])[0]`.
    """
    checks.positive_int(bins, "bins")
    p, hit = (np.asarray(v.cpu() if isinstance(v, Tensor) else v) for v in (confidence, right))
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"confidence: got shape {p.shape}, want (N,) numbers in [0, 1], at least one")
    if hit.shape != p.shape or not np.isin(hit, (0, 1)).all():
        raise ValueError(f"right: got shape {hit.shape}, want {p.shape} of True and False")
    frame = pd.DataFrame({"bin": _bin(p, bins), "score": p.astype(float), "right": hit.astype(int)})
    table = frame.groupby("bin").agg(score=("score", "mean"), k=("right", "sum"), n=("right", "size")).reset_index()
    k = table.pop("k").to_numpy()
    table["observed"] = k / table["n"]
    table["low"], table["high"] = clopper_pearson(k, table["n"].to_numpy())
    error = float((table["n"] * (table["observed"] - table["score"]).abs()).sum() / len(p))
    return error, table.assign(group="all")[["group", "score", "observed", "low", "high", "n"]]


def _bin(p: np.ndarray, bins: int) -> np.ndarray:
    return (np.ceil(p * bins - 1e-9).clip(1) - 1).astype(int)


def _calibration(case: Case, seen: dict) -> Iterator[Row]:
    """Does the network know how sure it may be?"""
    z = seen["logits"]
    confidence, right = z.double().softmax(1).amax(1).cpu().numpy(), (z.argmax(1) == case.y).cpu().numpy()
    error, seen["calibration"] = expected_calibration_error(confidence, right)
    ideal = _ideal_errors(confidence, case.seed)
    verdict = "caution" if error > ideal else "fine"
    n = len(right)
    yield Row("calibration", "expected calibration error", error, math.nan, math.nan, n, verdict,
              f"With honest probabilities it would stay below {ideal:.3f} in 39 of 40 such samples. Chapter 13.")  # fmt: skip
    share, low, high = _share(torch.as_tensor(right))
    mean = float(confidence.mean())
    over = mean - high > 0
    sense = ("Surer than it is right." if over else "Less sure than it is right." if mean < low else
             "As sure as it is right, on average.")  # fmt: skip
    yield Row("calibration", "mean confidence - accuracy", mean - share, mean - high, mean - low, n,
              "caution" if over else "fine", sense)  # fmt: skip


def _ideal_errors(confidence: np.ndarray, seed: int, samples: int = 400, bins: int = 10) -> float:
    """The 97.5 % quantile of the ECE if each answer were right with exactly the probability that it claims."""
    rng, place = np.random.default_rng(seed), _bin(confidence, bins)
    hits = rng.random((samples, len(confidence))) < confidence
    gaps = [np.abs((hits - confidence)[:, place == b].sum(1)) for b in np.unique(place)]
    return float(np.quantile(np.sum(gaps, 0) / len(confidence), 0.975))


def _gaps(case: Case, seen: dict) -> Iterator[Row]:
    """Is it right for some more often than for others? By class, and by `groups`."""
    right = (seen["logits"].argmax(1) == case.y).cpu().numpy()
    labels = pd.Categorical(
        [case.classes[k] for k in case.y.tolist()], categories=case.classes
    ).remove_unused_categories()
    kinds = {"class": labels} | ({} if case.groups is None else {"group": case.groups})
    for kind, group in kinds.items():
        codes, names = group_codes(group, len(right), least=1)
        if len(names) < 2:
            yield _unmeasured("gaps", f"accuracy by {kind}", f"Only one {kind} among the images: {names[0]}.")
            continue
        n, k = np.bincount(codes), np.bincount(codes, weights=right)
        low, high = clopper_pearson(k, n)
        table = pd.DataFrame({"row": [str(v) for v in names], "value": k / n, "low": low, "high": high, "n": n})
        seen[f"by {kind}"] = table.assign(group="accuracy", small=n < 10)
        for end, name in ((table["value"].idxmin(), "lowest"), (table["value"].idxmax(), "highest")):
            v = table.loc[end]
            yield Row("gaps", f"{name} accuracy of a {kind}", v["value"], v["low"], v["high"], int(v["n"]), "measured",
                      f"{kind.capitalize()} {v['row']}.")  # fmt: skip
        gap, p = _gap_by_chance(codes, right, case.seed)
        yield Row("gaps", f"largest gap between two {'classes' if kind == 'class' else 'groups'}", gap, math.nan, math.nan,
                  len(right), "caution" if p < 0.05 else "fine",
                  f"With names drawn by lot a gap as large comes up in {p:.1%} of the draws. Chapter 17.")  # fmt: skip
    if case.groups is None:
        yield _unmeasured(
            "gaps", "accuracy by group", "No groups were given (the argument named groups); see chapter 17."
        )


def _gap_by_chance(codes: np.ndarray, right: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, float]:
    """The largest difference of two groups' accuracy, and how often shuffled names give one as large."""
    rng, n = np.random.default_rng(seed), np.bincount(codes)

    def gap(order) -> float:
        share = np.bincount(codes, weights=right[order]) / n
        return float(share.max() - share.min())

    seen = gap(slice(None))
    more = sum(gap(rng.permutation(len(right))) >= seen - 1e-12 for _ in range(draws))
    return seen, (more + 1) / (draws + 1)


def _explanations(case: Case, seen: dict) -> Iterator[Row]:
    """Do the usual maps speak about this network at all?"""
    x = case.few_x[:_EXPLAINED]
    target = answers(case.model, x, case.few_y[: len(x)]).argmax(1)
    before = gradient(case.model, x, target)
    layers = isinstance(case.model, nn.Module) and any(
        isinstance(m, (nn.Linear, nn.Conv2d)) for m in case.model.modules()
    )
    if layers:
        *_, (_, stranger) = cascading(case.model, seed=case.seed)
        after = gradient(stranger, x, target)
        seen["maps"] = {"image": x, "trained": before, "forgotten": after}
        varies = torch.stack([v.flatten(1).abs().amax(1) > v.flatten(1).abs().amin(1) for v in (before, after)]).all(0)
        for absolute, what in ((True, "gradient map, strengths"), (False, "gradient map, signed")):
            if not varies.any():
                yield _unmeasured("explanations", what, "The gradient is the same at every pixel: nothing to rank.")
                continue
            rho = rank_correlation(before[varies], after[varies], absolute=absolute)
            stale = float(rho.mean()) > 0.5
            say = ("The map stays much the same when all weights are forgotten: it shows the image more than the network."
                   if stale else "The map changes when the weights are forgotten, as it must.")  # fmt: skip
            yield Row("explanations", f"{what}: trained against forgotten", *_mean(rho), len(rho),
                      "caution" if stale else "fine", say + " Rank correlation; chapter 13.")  # fmt: skip
    else:
        why = "Wants an nn.Module with Linear or Conv2d layers to forget; chapter 13."
        yield _unmeasured("explanations", "gradient map, strengths: trained against forgotten", why)
    total = integrated_gradients(case.model, x, target, steps=20, calibrate=False).flatten(1).sum(1).double()
    with torch.no_grad():
        rise = case.model(x) - case.model(torch.zeros_like(x))
    rise = rise.gather(1, target[:, None]).squeeze(1).double()
    error = (total - rise).abs() / rise.abs().clamp_min(1e-3)
    off = float(error.median())
    yield Row("explanations", "integrated gradients: median missing share", off, math.nan, math.nan, len(x),
              "fine" if off <= 0.05 else "caution",
              "Sum of the map against the rise of the logit from a black image, 20 steps; chapter 13.")  # fmt: skip


def _mean(v: Tensor) -> tuple[float, float, float]:
    """A mean with its normal interval; no interval from one value."""
    mean = float(v.mean())
    away = 1.96 * float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else math.nan
    return mean, mean - away, mean + away


SECTIONS = {"clean": _clean, "attacked": _attacked, "certified": _certified, "backdoor": _backdoor, "leakage": _leakage,
            "calibration": _calibration, "gaps": _gaps, "explanations": _explanations}  # fmt: skip
