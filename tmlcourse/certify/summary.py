"""A network in one row: what it gets right, what attacks leave standing, what is true, and what each bound promises."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import nn

from .. import checks, tables
from ..attacks import pgd, robust_accuracy
from ..threat import Linf
from .bounds import METHODS, least_margin, margins
from .verify import Verdict, verify

COLUMNS = (
    "image",
    "label",
    "clean_error",
    "pgd_error",
    "dual_margin",
    "status",
    "method",
    "margin",
    "reached",
    "seconds",
)


def summary(
    model: nn.Module,
    data,
    eps: float,
    *,
    n: int | None = None,
    time_limit: float | None = 10.0,
    n_jobs: int = 1,
    methods: Sequence[str] = ("ibp", "crown", "dual"),
    box: tuple[float, float] | None = (0.0, 1.0),
    verdicts: Sequence[Verdict] | None = None,
) -> pd.DataFrame:
    """Clean, attacked, exact and certified accuracy of a network, as papers print them.

        certified by each bound  <=  exact  <=  attacked  <=  clean,     exact_low <= exact <= exact_high

    Args:
        model: `nn.Sequential` in evaluation mode. data: anything with images `.x` (N, ...) and labels `.y` (N,).
        eps: L-infinity radius in pixel intensity (>= 0).
        n: use the first n images only.
        time_limit, n_jobs, box: of `verify`. Images that it leaves open make the exact accuracy an interval.
        methods: bounds of `margins` to report.
        verdicts: of these images at this radius, if `verify` has run already; not done again.
    Returns:
        A table of one row: images, eps, clean, attacked (PGD-40), exact_low, exact_high, one column for each method, all as
        shares of the images; and seconds, what `verify` spent. Stack several networks with `pd.concat`.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Wong & Kolter 2018, table 1; Tjeng, Xiao & Tedrake 2019, table 3.
    Example: `summary(model, test, 0.02, n=4, time_limit=1).T`.
    """
    x, y = checks.images(data.x), data.y
    if n is not None:
        x, y = x[: checks.positive_int(n, "n")], y[:n]
    for method in methods:
        checks.choice(method, "methods", METHODS)
    if verdicts is None:
        verdicts = verify(model, x, y, eps, time_limit=time_limit, n_jobs=n_jobs, box=box)
    elif len(verdicts) != len(x):
        raise ValueError(f"verdicts: got {len(verdicts)}, want {len(x)}, one an image")
    attacked = robust_accuracy(model, x, y, Linf(eps, box), [partial(pgd, steps=40)], seed=0)
    robust = torch.tensor([v.status == "robust" for v in verdicts])
    vulnerable = torch.tensor([v.status == "vulnerable" for v in verdicts]) | ~attacked.standing.cpu()
    row = {
        "images": len(x),
        "eps": eps,
        "clean": attacked.clean,
        "attacked": attacked.accuracy,
        "exact_low": robust.double().mean().item(),
        "exact_high": 1 - vulnerable.double().mean().item(),
    }
    for method in methods:
        low = margins(model, x, y, eps, method=method, box=box, time_limit=time_limit)
        row[method] = (least_margin(low, y) > 0).double().mean().item()
    return pd.DataFrame([row | {"seconds": sum(v.seconds for v in verdicts)}])


def tally(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Who decided how many, and how long it took: one row a method and status, the quickest method first.

    Columns: method, status, images, seconds (in all), mean and slowest (of one image).

    Example: `tally(verify(model, x, y, 0.02))`.
    """
    if not verdicts:
        raise ValueError("verdicts: got none, want at least one")
    rows = pd.DataFrame([{"method": v.method, "status": v.status, "seconds": v.seconds} for v in verdicts])
    groups = rows.groupby(["method", "status"]).seconds.agg(images="count", seconds="sum", mean="mean", slowest="max")
    return groups.reset_index().sort_values("mean", ignore_index=True)


def shipped_table(name: str) -> pd.DataFrame:
    """The verdicts on a whole test set that are shipped with the package, one row an image.

    Columns: image, label, clean_error and pgd_error (0 or 1), dual_margin (the ball not cut to [0, 1]; uncertified if <= 0),
    status, method, margin, reached and seconds (as in `Verdict`). Written by benchmarks/exact_error.py.

    Raises:
        ValueError: no such table; the message lists those that there are.
    Example: `shipped_table("digits-28x28-certified").status.value_counts()`.
    """
    return tables.shipped(__file__, name)
