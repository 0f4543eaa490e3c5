"""Who is in which group, and what a classifier does to each: rates, criteria, calibration, and why they exclude each other.

Throughout A is the group, Y in {0, 1} the outcome, Y^ in {0, 1} the decision, S in [0, 1] the score. Y = 1 is what is
predicted (a new charge, a repaid loan); whether Y^ = 1 harms or helps is for the reader to say, not for the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from .. import checks
from ..data import Table
from ..intervals import clopper_pearson

RATES = ("prevalence", "selection_rate", "accuracy", "fpr", "fnr", "tpr", "ppv", "npv")


def _column(value, name: str) -> np.ndarray:
    """A one-dimensional, non-empty NumPy array of a tensor, array, Series or list."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name}: got shape {array.shape}, want (n,) with n >= 1")
    return array


def _sized(array: np.ndarray, name: str, n: int | None) -> np.ndarray:
    if n is not None and len(array) != n:
        raise ValueError(f"{name}: got {len(array)} rows, want {n}, as many as the other arguments")
    return array


def _numbers(value, name: str, n: int | None) -> np.ndarray:
    array = _column(value, name)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: got {array.dtype}, want numbers")
    array = array.astype(float)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    return _sized(array, name, n)


def binary(value, name: str, n: int | None = None) -> np.ndarray:
    """Require `n` zeros and ones; returns them as int64.

    Example: `binary([0, 1, 1], "y")`.
    """
    array = _numbers(value, name, n)
    if not np.isin(array, (0, 1)).all():
        odd = array[~np.isin(array, (0, 1))][0]
        raise ValueError(f"{name}: got {odd:g}, want only 0 and 1")
    return array.astype(np.int64)


def unit(value, name: str, n: int | None = None) -> np.ndarray:
    """Require `n` scores in [0, 1]; returns them as float64.

    Example: `unit([0.2, 1.0], "score")`.
    """
    array = _numbers(value, name, n)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"{name}: got values in [{array.min():.4g}, {array.max():.4g}], want [0, 1] (deciles: divide by 10)"
        )
    return array


def membership(group, n: int | None = None, *, least: int = 2) -> tuple[np.ndarray, list]:
    """Codes (n,) in 0 ... K - 1 and the K names of the groups, in sorted order; K >= `least`.

    A pandas Categorical says which groups there should be: one of them without a row is an error, as is a missing value.

    Example: `membership(["b", "a", "b"])[1]`.
    """
    if isinstance(group, torch.Tensor):
        group = group.detach().cpu().numpy()
    if not isinstance(getattr(group, "dtype", None), pd.CategoricalDtype):
        group = np.asarray(group)
        if group.ndim != 1:
            raise ValueError(f"group: got shape {group.shape}, want (n,), one group a row")
    if len(group) == 0 or pd.isna(group).any():
        raise ValueError("group: got no rows or a missing value, want one group a row")
    chosen = pd.Categorical(group)
    codes, names = np.asarray(chosen.codes, dtype=np.int64), [_plain(name) for name in chosen.categories]
    _sized(codes, "group", n)
    counts = np.bincount(codes, minlength=len(names))
    if empty := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        raise ValueError(f"group: {empty[0]!r} has no rows; a rate over nobody is no number")
    if len(names) < least:
        raise ValueError(f"group: got one value only, {names[0]!r}, want at least {least} groups to compare")
    return codes, names


def _plain(name):
    return name.item() if isinstance(name, np.generic) else name


def groups(table: Table, attribute: str) -> np.ndarray:
    """The value of a column of text of a table, row by row: "race" -> "Caucasian", "Hispanic", ...

    A table keeps a column of text as zeros and ones, "race=Caucasian" and so on; here they are one column again.

    Args: table of `data.load_table`; attribute: the column's name.
    Returns: array of text (n,).
    Raises: TypeError, ValueError: no such column.
    Example: `groups(tmlcourse.data.load_table("population"), "group")[:3]`.
    """
    _is_table(table)
    if not isinstance(attribute, str):
        raise TypeError(f"attribute: got {type(attribute).__name__}, want the name of a column of text")
    columns = [j for j, name in enumerate(table.feature_names) if name.startswith(f"{attribute}=")]
    if not columns:
        have = sorted({name.split("=")[0] for name in table.feature_names if "=" in name})
        raise ValueError(f"attribute: got {attribute!r}, a column that {table.name} lacks; of text are "
                         f"{', '.join(have) or 'none'}")  # fmt: skip
    values = np.array([table.feature_names[j].split("=", 1)[1] for j in columns])
    return values[table.X[:, columns].argmax(1).numpy()]


def without(table: Table, *attributes: str) -> Table:
    """The table without these columns, of numbers or of text.

    Args: table of `data.load_table`; attributes: names of columns ("age", "race").
    Raises: TypeError, ValueError: a column that is not there.
    Example: `without(tmlcourse.data.load_table("population"), "group", "offence").feature_names`.
    """
    _is_table(table)
    sources = [name.split("=")[0] for name in table.feature_names]
    if unknown := [name for name in attributes if name not in sources]:
        raise ValueError(
            f"attributes: got {unknown[0]!r}, want columns of {table.name}: {', '.join(dict.fromkeys(sources))}"
        )
    keep = [j for j, source in enumerate(sources) if source not in attributes]
    return replace(table, X=table.X[:, keep], feature_names=tuple(table.feature_names[j] for j in keep))


def _is_table(table) -> None:
    if not isinstance(table, Table):
        raise TypeError(f"table: got {type(table).__name__}, want a Table of data.load_table")


# ---- rates


def _rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """All rates of the counts (..., 4) of tn, fp, fn, tp; NaN where a rate is over nobody."""
    tn, fp, fn, tp = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    n, positive, negative, selected = tn + fp + fn + tp, fn + tp, tn + fp, fp + tp
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"prevalence": positive / n, "selection_rate": selected / n, "accuracy": (tn + tp) / n,
                "fpr": fp / negative, "fnr": fn / positive, "tpr": tp / positive, "ppv": tp / selected,
                "npv": tn / (tn + fn)}  # fmt: skip


def _auc(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """P(S of a positive > S of a negative) + P(equal) / 2 from counts (..., scores in rising order)."""
    below = np.cumsum(negative, -1) - negative
    pairs = negative.sum(-1) * positive.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * (below + negative / 2)).sum(-1) / pairs


def confusion(y, y_hat, group=None) -> pd.DataFrame:
    """True and false negatives and positives: one row a group, and "all" as the last one.

    Args: y, y_hat: (n,) in {0, 1}; group: (n,) of any kind, or None.
    Returns: DataFrame with columns tn, fp, fn, tp.
    Raises: TypeError, ValueError: bad input.
    Example: `confusion([0, 1, 1], [1, 1, 0], ["a", "b", "b"])`.
    """
    y = binary(y, "y")
    y_hat = binary(y_hat, "y_hat", len(y))
    codes, names = (np.zeros(len(y), int), []) if group is None else membership(group, len(y), least=1)
    table = np.zeros((max(1, len(names)), 4), int)
    np.add.at(table, (codes, 2 * y + y_hat), 1)
    rows = [*table, table.sum(0)] if names else table
    return pd.DataFrame(rows, index=pd.Index([*names, "all"], name="group"), columns=["tn", "fp", "fn", "tp"])


def group_report(
    y, y_hat, group, score=None, *, resamples: int = 1000, level: float = 0.95, small: int = 30, seed: int | None = None
) -> pd.DataFrame:
    """Every rate of every group, with its bootstrap interval; groups that are too small to judge are flagged.

        prevalence P(Y=1), selection_rate P(Y^=1), accuracy P(Y^=Y), fpr P(Y^=1|Y=0), fnr P(Y^=0|Y=1), tpr = 1 - fnr,
        ppv P(Y=1|Y^=1), npv P(Y=0|Y^=0); with a score also auc and brier E (S - Y)^2

    Each is within A = a. The interval is the percentile bootstrap within the group: its rows are drawn again, with
    replacement, `resamples` times. A rate over nobody (ppv where nobody is selected) is NaN. Where a group has few rows,
    its interval is too short rather than too long, hence the flag.

    Args:
        y, y_hat: (n,) in {0, 1}. group: (n,) of any kind. score: (n,) in [0, 1], higher for Y = 1.
        resamples: >= 10. level: of the intervals, in (0, 1).
        small: a group with fewer than this many rows of y = 1, or of y = 0, has `small` True.
        seed: of the bootstrap; NumPy's own entropy without it.
    Returns:
        DataFrame, one row a group and "all": n, tn, fp, fn, tp, small, each rate, and with _low and _high its interval.
    Raises: TypeError, ValueError: bad input, an empty group, one group only.
    Source: Angwin et al. 2016; Efron 1979; Barocas, Hardt & Narayanan 2023, chapter 3.
    Example: `group_report([0, 1, 0, 1], [0, 1, 1, 1], ["a", "a", "b", "b"], seed=0)[["fpr", "fpr_high"]]`.
    """
    y = binary(y, "y")
    y_hat = binary(y_hat, "y_hat", len(y))
    codes, names = membership(group, len(y))
    score = None if score is None else unit(score, "score", len(y))
    checks.positive_int(resamples, "resamples", least=10)
    checks.positive_int(small, "small", least=0)
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, want a number in (0, 1)")
    rng = np.random.default_rng(seed)
    counts = confusion(y, y_hat, group)
    rows = []
    for k, name in enumerate([*names, "all"]):
        mine = codes == k if k < len(names) else np.ones(len(y), bool)
        cells = counts.loc[name].to_numpy() if k < len(names) else counts.iloc[-1].to_numpy()
        row = {"n": int(mine.sum()), **dict(zip(counts.columns, cells, strict=True)),
               "small": bool(min(cells[:2].sum(), cells[2:].sum()) < small)}  # fmt: skip
        value = {rate: float(v) for rate, v in _rates(cells).items()}
        # The rates see the four counts only, so drawing the counts again is drawing the rows again.
        drawn = _rates(rng.multinomial(mine.sum(), cells / mine.sum(), size=resamples))
        if score is not None:
            of_score, again = _score_bootstrap(y[mine], score[mine], resamples, rng)
            value, drawn = value | of_score, drawn | again
        row |= value
        for rate, values in drawn.items():
            known = values[np.isfinite(values)]
            ends = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
            row[f"{rate}_low"], row[f"{rate}_high"] = map(float, ends)
        rows.append(row)
    return pd.DataFrame(rows, index=counts.index)


def _score_bootstrap(y, score, resamples, rng):
    """AUC and Brier score, and both of bootstrap samples: drawn again as counts of each value of (score, y)."""
    values, place = np.unique(score, return_inverse=True)
    cells = np.bincount(2 * place + y, minlength=2 * len(values))

    def measures(table):
        negative, positive = table[..., 0::2], table[..., 1::2]
        brier = (negative * values**2 + positive * (1 - values) ** 2).sum(-1) / len(y)
        return {"auc": _auc(negative, positive), "brier": brier}

    once, parts = measures(cells), []
    for chunk in np.array_split(np.arange(resamples), 1 + resamples * len(cells) // 2_000_000):
        parts.append(measures(rng.multinomial(len(y), cells / len(y), size=len(chunk))))
    return ({k: float(v) for k, v in once.items()}, {k: np.concatenate([p[k] for p in parts]) for k in once})


# ---- criteria


@dataclass(frozen=True, eq=False)
class Criterion:
    """How far a criterion of group fairness is from being met: the rates that should agree, group by group.

    rates: DataFrame, one row a group, one column a rate that the criterion wants equal in all groups.
    """

    name: str
    rates: pd.DataFrame

    @property
    def difference(self) -> float:
        """The largest difference of one rate between two groups; 0 where the criterion holds."""
        return float((self.rates.max() - self.rates.min()).max())

    @property
    def ratio(self) -> float:
        """The smallest ratio of one rate between two groups; 1 where the criterion holds (also where all are 0)."""
        top = self.rates.max()
        return float((self.rates.min() / top).where(top > 0, 1.0).min())

    def __repr__(self) -> str:
        return f"{self.name}: difference {self.difference:.4f}, ratio {self.ratio:.4f}"


def _criterion(name: str, y, y_hat, group, *columns: str) -> Criterion:
    table = confusion(y, y_hat, group).iloc[:-1]
    rates = pd.DataFrame(_rates(table.to_numpy()), index=table.index)[list(columns)]
    if rates.isna().any(axis=None):
        where = rates.isna().any(axis=1).idxmax()
        rate = rates.columns[rates.loc[where].isna()][0]
        over = {"tpr": "y = 1", "fpr": "y = 0", "ppv": "y_hat = 1"}[rate]
        raise ValueError(f"group: {where!r} has no row with {over}, so its {rate} is not defined")
    return Criterion(name, rates)


def demographic_parity(y_hat, group) -> Criterion:
    """Independence: P(Y^=1 | A=a) is the same in every group. Parity is the equality; the lecture's slide shows its failure.

    Args: y_hat: (n,) in {0, 1}; group: (n,), at least two values.
    Returns: `Criterion` with the selection rates; `ratio` below 0.8 breaks the four-fifths rule of US employment law.
    Raises: TypeError, ValueError: bad input.
    Source: Barocas, Hardt & Narayanan 2023, chapter 3; Calders, Kamiran & Pechenizkiy 2009.
    Example: `demographic_parity([1, 0, 1, 1], ["a", "a", "b", "b"]).difference`.
    """
    y_hat = binary(y_hat, "y_hat")
    membership(group, len(y_hat))
    return _criterion("demographic parity", y_hat, y_hat, group, "selection_rate")


def equal_opportunity(y, y_hat, group) -> Criterion:
    """P(Y^=1 | Y=1, A=a) is the same in every group: those with the outcome are found at equal rates.

    Args: y, y_hat: (n,) in {0, 1}; group: (n,), at least two values, each with a row of y = 1.
    Returns: `Criterion` with the true-positive rates.
    Raises: TypeError, ValueError: bad input.
    Source: Hardt, Price & Srebro 2016.
    Example: `equal_opportunity([1, 1, 1, 1], [1, 0, 1, 1], ["a", "a", "b", "b"]).rates`.
    """
    _both(y, y_hat, group)
    return _criterion("equal opportunity", y, y_hat, group, "tpr")


def equalized_odds(y, y_hat, group) -> Criterion:
    """Separation: P(Y^=1 | Y=y, A=a) is the same in every group, for y = 0 and for y = 1.

    Args: y, y_hat: (n,) in {0, 1}; group: (n,), at least two values, each with rows of y = 0 and of y = 1.
    Returns: `Criterion` with true- and false-positive rates.
    Raises: TypeError, ValueError: bad input.
    Source: Hardt, Price & Srebro 2016.
    Example: `equalized_odds([1, 0, 1, 0], [1, 0, 1, 1], ["a", "a", "b", "b"])`.
    """
    _both(y, y_hat, group)
    return _criterion("equalized odds", y, y_hat, group, "tpr", "fpr")


def predictive_parity(y, y_hat, group) -> Criterion:
    """P(Y=1 | Y^=1, A=a) is the same in every group: the same decision means the same chance.

    Args: y, y_hat: (n,) in {0, 1}; group: (n,), at least two values, each with a row of y_hat = 1.
    Returns: `Criterion` with the positive predictive values.
    Raises: TypeError, ValueError: bad input.
    Source: Chouldechova 2017.
    Example: `predictive_parity([1, 0, 1, 1], [1, 1, 1, 1], ["a", "a", "b", "b"]).ratio`.
    """
    _both(y, y_hat, group)
    return _criterion("predictive parity", y, y_hat, group, "ppv")


def _both(y, y_hat, group) -> None:
    binary(y_hat, "y_hat", len(binary(y, "y")))
    membership(group, len(_column(y, "y")))


@dataclass(frozen=True, eq=False)
class Calibration:
    """What happened to people with the same score: `table` with columns group, score, observed, low, high, n.

    `errors`: of each group, the mean over its rows of |observed - mean score| in the row's bin.
    """

    table: pd.DataFrame
    errors: pd.Series

    @property
    def difference(self) -> float:
        """Sufficiency: the largest difference of `observed` between two groups in one bin with 30 rows or more of each."""
        known = self.table[self.table["n"] >= 30].groupby("bin")["observed"]
        return float((known.max() - known.min()).max()) if len(known) else float("nan")


def calibration(y, score, group, *, bins: int = 10, level: float = 0.95) -> Calibration:
    """Calibration by group: is P(Y=1 | S=s, A=a) = s? And sufficiency: is it at least the same for every a?

    Scores with at most `bins` different values are taken as they are, others are cut into `bins` parts of equal size.
    The interval of each share is Clopper and Pearson's.

    Args: y: (n,) in {0, 1}; score: (n,) in [0, 1]; group: (n,), at least two values; bins >= 1; level in (0, 1).
    Returns: `Calibration`.
    Raises: TypeError, ValueError: bad input.
    Source: Chouldechova 2017; Clopper & Pearson 1934.
    Example: `calibration([0, 1, 0, 1], [0.2, 0.8, 0.2, 0.8], ["a", "a", "b", "b"]).errors`.
    """
    y = binary(y, "y")
    score = unit(score, "score", len(y))
    codes, names = membership(group, len(y))
    checks.positive_int(bins, "bins")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, want a number in (0, 1)")
    values, place = np.unique(score, return_inverse=True)
    if len(values) > bins:
        place = np.searchsorted(np.unique(np.quantile(score, np.linspace(0, 1, bins + 1)[1:-1])), score, side="right")
    frame = pd.DataFrame({"group": np.array(names, dtype=object)[codes], "bin": place, "score": score, "y": y})
    table = frame.groupby(["group", "bin"], sort=True).agg(score=("score", "mean"), k=("y", "sum"), n=("y", "size"))
    table = table.reset_index()
    k, n = table.pop("k").to_numpy(), table["n"].to_numpy()
    table["observed"] = k / n
    table["low"], table["high"] = clopper_pearson(k, n, level)
    off = (table["observed"] - table["score"]).abs() * table["n"]
    errors = off.groupby(table["group"]).sum() / table.groupby("group")["n"].sum()
    return Calibration(table[["group", "bin", "score", "observed", "low", "high", "n"]], errors)


def impossibility(prevalence, ppv, fnr):
    """The false-positive rate that a group must have, given its prevalence p, PPV and FNR: an identity, not a law of taste.

        FPR = p / (1 - p) * (1 - PPV) / PPV * (1 - FNR)

    Two groups with the same PPV and FNR and different p have different FPR, whatever the classifier (unless PPV = 1).

    Args: prevalence in (0, 1), ppv in (0, 1], fnr in [0, 1]: numbers, arrays or tensors that go together.
    Returns: float64 of the arguments' shape, a float for numbers. Above 1: no classifier has these three.
    Raises: ValueError: values outside.
    Source: Chouldechova 2017, equation 2.6.
    Example: `impossibility(0.5143, 0.6297, 0.2799)`.
    """
    p, ppv, fnr = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (prevalence, ppv, fnr)))
    limits = (("prevalence", p, (p > 0) & (p < 1), "(0, 1)"), ("ppv", ppv, (ppv > 0) & (ppv <= 1), "(0, 1]"),
              ("fnr", fnr, (fnr >= 0) & (fnr <= 1), "[0, 1]"))  # fmt: skip
    for name, value, good, want in limits:
        if not good.all():
            raise ValueError(f"{name}: got {value[~good].flat[0]:g}, want numbers in {want}")
    fpr = p / (1 - p) * (1 - ppv) / ppv * (1 - fnr)
    return float(fpr) if fpr.ndim == 0 else fpr


def roc(y, score) -> pd.DataFrame:
    """Every threshold rule Y^ = 1[S >= t] and what it does, from "nobody" (t = inf) down to "everybody" (t = -inf).

    Args: y: (n,) in {0, 1}, both there; score: (n,), any finite numbers.
    Returns: DataFrame with columns threshold, fpr, tpr, selection_rate; one row a value of the score, and two ends.
    Raises: TypeError, ValueError: bad input.
    Example: `roc([0, 1, 1], [0.1, 0.6, 0.9])`.
    """
    y = binary(y, "y")
    score = _numbers(score, "score", len(y))
    positive, negative = int(y.sum()), int((1 - y).sum())
    if not positive or not negative:
        raise ValueError(f"y: got only {y[0]}, want rows of both outcomes")
    values, place = np.unique(-score, return_inverse=True)
    tp = np.cumsum(np.bincount(place, weights=y, minlength=len(values)))
    fp = np.cumsum(np.bincount(place, weights=1 - y, minlength=len(values)))
    # Below the lowest score everybody is selected: the same rule as t = -inf, kept once.
    thresholds = np.concatenate([[np.inf], -values[:-1], [-np.inf]])
    tp, fp = np.concatenate([[0], tp]), np.concatenate([[0], fp])
    return pd.DataFrame(
        {"threshold": thresholds, "fpr": fp / negative, "tpr": tp / positive, "selection_rate": (tp + fp) / len(y)}
    )
