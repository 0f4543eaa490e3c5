"""`trust_report` checks its input, runs the eight sections one after the other and keeps what they found."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tmlcourse

from .. import checks, plot, progress, randomness
from ..fairness.rates import membership as group_codes
from ..threat import L0, L1, L2, Linf
from . import page
from .sections import _ANSWERS, SECTIONS, Case, Row, answers

COLUMNS = [field.name for field in fields(Row)]


@dataclass(frozen=True, eq=False)
class TrustReport:
    """What `trust_report` found.

    Attributes:
        rows: of all sections, in order. seconds: what each row took.
        settings: everything that produced it: the call, versions, seed, data, device, a checksum of the weights.
        seen: the evidence behind the rows: tables, maps, adversarial images.
    Example: `trust_report(model, test, n=4).table` has one line a row.
    """

    rows: tuple[Row, ...]
    seconds: tuple[float, ...]
    settings: dict[str, str]
    seen: dict

    @property
    def table(self) -> pd.DataFrame:
        """One line a row: section, what, value, low, high, n, verdict, comment, seconds."""
        return pd.DataFrame([astuple(row) for row in self.rows], columns=COLUMNS).assign(seconds=self.seconds)

    def __getitem__(self, what: str) -> Row:
        """The row whose `what` is this, or the only one that begins so; KeyError otherwise."""
        found = [row for row in self.rows if row.what == what] or [r for r in self.rows if r.what.startswith(what)]
        if len(found) != 1:
            raise KeyError(f"{what!r}: {len(found)} rows begin so, want one of {[row.what for row in self.rows]}")
        return found[0]

    def figures(self) -> dict[str, Figure]:
        """The figures that the sections gave rise to, by name."""
        return {name: figure for name, (figure, _) in page.figures(self).items()}

    def html(self, path: str | Path | None = None, *, date: str | None = None) -> str:
        """One page that needs nothing but itself: rows, figures, settings. Written to `path`, where there is one.

        date: what the page says; the day of the call without.
        """
        text = page.page(self, date or time.strftime("%Y-%m-%d"))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return page.fragment(self)

    def __repr__(self) -> str:
        counts = pd.Series([row.verdict for row in self.rows]).value_counts()
        return f"TrustReport({self.settings['model']} on {self.settings['data']}: " + ", ".join(
            f"{n} {verdict}" for verdict, n in counts.items()
        ) + ")"  # fmt: skip


def trust_report(
    model,
    test,
    *,
    train=None,
    threat=None,
    groups=None,
    n: int = 200,
    effort: int = 1,
    sections: Sequence[str] | None = None,
    seed: int = 0,
    name: str = "",
) -> TrustReport:
    """How far can this classifier be trusted? Eight answers, each with its interval, its images and its limits.

    Clean accuracy; under PGD, Square and Auto-PGD; certified by intervals and CROWN; backdoors (Neural Cleanse); membership
    leakage; calibration; gaps between classes and groups; sanity of explanations. What does not apply to this model says so.

    Args:
        model: returns logits (N, K) and can be differentiated; in evaluation mode. It is left exactly as it was.
        test: images the model has not seen, `.x` (N, C, H, W) in [0, 1] and `.y` (N,); `.classes` and `.name` if there.
        train: images it was trained on, likewise: without them leakage cannot be measured.
        threat: what the attacker may do; without, `Linf(0.1)`.
        groups: one value an image of `test`, for gaps between groups.
        n: images that are attacked, drawn from `test`; what needs answers only sees up to 5 n (>= 2).
        effort: multiplies the attacks' steps and queries and the steps of the backdoor scan (>= 1).
        sections: some of `SECTIONS`, to save time: "attacked", "certified", "backdoor", "leakage", "calibration", "gaps",
            "explanations"; "clean" always comes first. All without.
        seed: makes everything but the seconds reproducible.
        name: what the report calls the model.
    Returns: `TrustReport`.
    Raises: TypeError, ValueError: bad input, before any work. A limitation of a method is a row; a bug is an error.
    Source: Mitchell et al. 2019 (model cards) for the idea of a page that travels with a model.
    Example: `trust_report(model, test, n=4).table`.
    """
    threat = Linf(0.1) if threat is None else threat
    _check(model, test, "test")
    if not isinstance(threat, (Linf, L2, L1, L0)):
        raise TypeError(f"threat: got {type(threat).__name__}, want Linf, L2, L1 or L0")
    checks.positive_int(n, "n", least=2), checks.positive_int(effort, "effort")
    checks.positive_int(seed, "seed", least=0)
    asked = tuple(SECTIONS) if sections is None else ("clean", *sections)
    if isinstance(sections, str) or not set(asked) <= set(SECTIONS):
        raise ValueError(f"sections: got {sections!r}, want names out of {', '.join(SECTIONS)}")
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, want text")
    if groups is not None:
        codes, names = group_codes(groups, len(test.x))
        groups = np.array([str(v) for v in names], dtype=object)[codes]
    classes = answers(model, test.x[:1], test.y[:1]).shape[1]
    for data, what in ((test, "test"), (train, "train")):
        if data is None:
            continue
        _check(model, data, what)
        if data.x.shape[1:] != test.x.shape[1:]:
            raise ValueError(f"{what}: got images {tuple(data.x.shape[1:])}, want {tuple(test.x.shape[1:])} as in test")
        if data.y.max() >= classes:
            raise ValueError(f"{what}: got label {data.y.max().item()}, want labels in [0, {classes - 1}]")
    named = tuple(str(c) for c in getattr(test, "classes", ()))
    named = named if len(named) == classes else tuple(str(k) for k in range(classes))
    chosen = _draw(len(test.x), _ANSWERS * n, seed)
    seen_in_training = None
    if train is not None:
        members = _draw(len(train.x), _ANSWERS * n, seed + 1)
        seen_in_training = (train.x[members], train.y[members])
    case = Case(model, test.x[chosen], test.y[chosen], min(n, len(chosen)), None if groups is None else groups[chosen],
                seen_in_training, threat, named, effort, seed)  # fmt: skip
    rows, seconds, seen = [], [], {}
    chosen_ones = [section for key, section in SECTIONS.items() if key in asked]
    for section in progress.bar(chosen_ones, desc="trust report", unit="section"):
        began = time.perf_counter()
        for row in section(case, seen):
            rows.append(row)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    who = None if groups is None else f"<{len(set(groups))} groups>"
    call = {"train": None if train is None else _called(train), "threat": threat, "groups": who, "n": n, "effort": effort,
            "sections": sections, "seed": seed, "name": name}  # fmt: skip
    return TrustReport(tuple(rows), tuple(seconds), _settings(case, call, test), seen)


def _check(model, data, what: str) -> None:
    for part in ("x", "y"):
        if not hasattr(data, part):
            raise TypeError(f"{what}: got {type(data).__name__}, want data with .x (images) and .y (labels)")
    checks.model(model, checks.images(data.x, f"{what}.x"))
    checks.labels(data.y, data.x, f"{what}.y")


def _draw(available: int, wanted: int, seed: int) -> Tensor:
    """Which images: all of them, or as many as wanted at random."""
    return torch.randperm(available, generator=randomness.generator(seed))[:wanted]


def _called(data) -> str:
    return f"<{getattr(data, 'name', '') or 'data'}, {len(data.x)} images>"


def _settings(case: Case, call: dict, test) -> dict[str, str]:
    model, digest = case.model, hashlib.sha256()
    label = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)
    settings = {"model": call["name"] or label, "data": getattr(test, "name", "") or "unnamed data"}
    if isinstance(model, nn.Module):
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        parameters = sum(p.numel() for p in model.parameters())
        settings["network"] = f"{label}, {parameters:,} parameters, SHA-256 of the weights {digest.hexdigest()[:16]}"
    given = ", ".join(f"{key}={value if key in ('train', 'groups') else repr(value)}" for key, value in call.items())
    return settings | {
        "images": f"{case.few} attacked, {len(case.x)} answered, of {len(test.x)}",
        "threat": repr(case.threat),
        "call": f"trust_report(model, {_called(test)}, {given})",
        "seed": str(case.seed),
        "device": case.x.device.type,
        "versions": f"tmlcourse {tmlcourse.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
                    f"Python {platform.python_version()}",
    }  # fmt: skip


def side_by_side(reports: dict[str, TrustReport]) -> pd.DataFrame:
    """The rows of several reports beside each other: one line a measurement, one column a report, with its verdict.

    Example: `side_by_side({"a": trust_report(model, test, n=4)})`.
    """
    if not isinstance(reports, dict) or not reports or not all(isinstance(r, TrustReport) for r in reports.values()):
        raise TypeError(f"reports: got {type(reports).__name__}, want a dict name -> TrustReport, not empty")
    columns = {}
    for name, report in reports.items():
        index = pd.MultiIndex.from_tuples([(r.section, r.what) for r in report.rows], names=["section", "what"])
        columns[name] = pd.Series([page.written(r) for r in report.rows], index)
    order = pd.MultiIndex.from_tuples(dict.fromkeys(i for c in columns.values() for i in c.index),
                                      names=["section", "what"])  # fmt: skip
    return pd.DataFrame({name: column.reindex(order) for name, column in columns.items()}).fillna("")


def shares(reports: dict[str, TrustReport]) -> Figure:
    """The accuracies of several reports in one figure: clean, attacked, certified, in percent with their intervals.

    Example: `shares({"a": trust_report(model, test, n=4)})`.
    """
    names = " and ".join(dict.fromkeys(report.settings["data"] for report in reports.values()))
    return plot.group_intervals(page.accuracies(reports), title="Right answers", data_name=names)
