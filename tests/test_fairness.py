"""Fairness against closed forms, ProPublica's published tables, fairlearn, scikit-learn, and brute force."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import skip_or_fail
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binomtest, wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tmlcourse import data, fairness
from tmlcourse.fairness import rates


def table(name):
    try:
        return data.load_table(name)
    except FileNotFoundError as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="module")
def people():
    """The invented population: decisions from the score's upper six deciles."""
    made = data.population()
    score = made.X[:, made.column("decile_score")] / 10
    return made, made.y, (score > 0.4).long(), fairness.groups(made, "group"), score


def sample(seed, n=60, k=3, bend=1.0):
    """Random outcomes, scores with ties, and groups, each with both outcomes and both decisions."""
    rng = np.random.default_rng(seed)
    group = np.array(list("abcdef"))[rng.permutation(np.arange(n) % k)]
    y = rng.integers(0, 2, n)
    score = np.clip(np.round(0.5 + 0.25 * bend * (2 * y - 1) * rng.random() + 0.3 * rng.normal(size=n), 1), 0, 1)
    y_hat = (score > 0.5).astype(int)
    for name in np.unique(group):
        rows = np.flatnonzero(group == name)
        y[rows[:4]], y_hat[rows[:4]], score[rows[:4]] = (0, 0, 1, 1), (0, 1, 0, 1), (0.1, 0.7, 0.3, 0.9)
    return y, y_hat, group, score


seeds = st.integers(0, 10_000)

# ---- ProPublica, cell by cell

PUBLISHED = {
    # group, score counted as positive from: TN, FP, FN, TP, n, FPR, FNR, PPV, NPV, prevalence (%)
    ("all", 5): (2681, 1282, 1216, 2035, 7214, 32.35, 37.40, 61.35, 68.80, 45.07),
    ("African-American", 5): (990, 805, 532, 1369, 3696, 44.85, 27.99, 62.97, 65.05, 51.43),
    ("Caucasian", 5): (1139, 349, 461, 505, 2454, 23.45, 47.72, 59.13, 71.19, 39.36),
    ("African-American", 8): (1511, 284, 1160, 741, 3696, 15.82, 61.02, 72.29, 56.57, 51.43),
    ("Caucasian", 8): (1407, 81, 771, 195, 2454, 5.44, 79.81, 70.65, 64.60, 39.36),
}


def test_propublicas_tables_come_out_of_the_file_cell_by_cell():
    compas = table("compas")
    race, decile = fairness.groups(compas, "race"), compas.X[:, compas.column("decile_score")]
    for (group, least), (tn, fp, fn, tp, n, *percent) in PUBLISHED.items():
        report = fairness.group_report(compas.y, decile >= least, race, decile / 10, resamples=10, seed=0).loc[group]
        assert [report[c] for c in ("tn", "fp", "fn", "tp", "n")] == [tn, fp, fn, tp, n]
        got = [round(100 * report[c], 2) for c in ("fpr", "fnr", "ppv", "npv", "prevalence")]
        assert got == pytest.approx(percent, abs=1e-9)
        p, ppv, fnr = (report[c] for c in ("prevalence", "ppv", "fnr"))
        assert fairness.impossibility(p, ppv, fnr) == pytest.approx(report["fpr"], abs=1e-12)
    report = fairness.group_report(compas.y, decile >= 5, race, decile / 10, resamples=10, seed=0)
    assert report.loc["African-American", "auc"] == pytest.approx(0.6918, abs=5e-5)
    assert report.loc["Caucasian", "auc"] == pytest.approx(0.6931, abs=5e-5)
    assert report.index[report["small"]].tolist() == ["Asian", "Native American"]
    two = np.isin(race, ["African-American", "Caucasian"])
    kept = 1 - (decile[two] >= 5).long()  # the favourable outcome
    parity = fairness.demographic_parity(kept, race[two])
    assert parity.rates["selection_rate"].round(4).tolist() == [0.4118, 0.6520]
    assert parity.ratio == pytest.approx(0.632, abs=5e-4)


REGRESSION = {
    "sex=Female": 0.22127, "age_cat=Greater than 45": -1.35563, "age_cat=Less than 25": 1.30839,
    "race=African-American": 0.47721, "race=Asian": None, "race=Hispanic": -0.42839, "race=Native American": None,
    "race=Other": None, "priors_count": 0.26895, "c_charge_degree=M": -0.31124,
}  # fmt: skip


def test_propublicas_regression_and_its_rows():
    compas = table("compas_filtered")
    assert compas.X.shape == (6172, 19) and int(compas.y.sum()) == 2809
    race = pd.Series(fairness.groups(compas, "race")).value_counts()
    assert race.tolist() == [3175, 2103, 509, 343, 31, 11]
    decile = compas.X[:, compas.column("decile_score")]
    assert [int(v.sum()) for v in (decile < 5, (decile > 4) & (decile < 8), decile > 7)] == [3421, 1607, 1144]
    X = torch.cat([compas.X[:, [compas.column(name) for name in REGRESSION]], compas.y[:, None].double()], 1)
    y = (decile > 4).long()
    theta = fairness.logistic_regression(X, y)
    known = [i for i, value in enumerate(REGRESSION.values()) if value is not None]
    want = [v for v in REGRESSION.values() if v is not None]
    assert theta[known].tolist() == pytest.approx(want, abs=6e-6)
    assert theta[-2:].tolist() == pytest.approx([0.68586, -1.52554], abs=6e-6)
    z = X @ theta[:-1] + theta[-1]
    deviance = 2 * torch.nn.functional.softplus(-(2 * y - 1) * z).sum().item()
    assert deviance == pytest.approx(6168.4, abs=0.05)
    one = theta[-1].sigmoid()  # "45 % more likely", ProPublica's relative risk
    raised = theta[3].exp() / (1 - one + one * theta[3].exp())
    assert raised.item() == pytest.approx(1.452841, abs=1e-5)
    assert "name" not in compas.feature_names and "days_b_screening_arrest" not in compas.feature_names


def test_adult_and_german_are_as_published():
    adult = table("adult")
    rates = fairness.demographic_parity(adult.y[:32561], fairness.groups(adult, "sex")[:32561])
    assert rates.rates["selection_rate"].round(5).tolist() == [0.10946, 0.30574]
    german = table("german")
    assert int(german.y.sum()) == 700 and len(np.unique(fairness.groups(german, "personal status and sex"))) == 4


# ---- rates, against fairlearn, scikit-learn and counting


@settings(max_examples=8)
@given(seeds, st.integers(2, 5))
def test_rates_and_criteria_are_fairlearns(seed, k):
    metrics = pytest.importorskip("fairlearn.metrics")
    y, y_hat, group, _ = sample(seed, k=k)
    report = fairness.group_report(y, y_hat, group, resamples=10, seed=0)
    theirs = {"selection_rate": metrics.selection_rate, "fpr": metrics.false_positive_rate,
              "fnr": metrics.false_negative_rate, "tpr": metrics.true_positive_rate}  # fmt: skip
    frame = metrics.MetricFrame(metrics=theirs, y_true=y, y_pred=y_hat, sensitive_features=group)
    for rate in theirs:
        np.testing.assert_allclose(report[rate].iloc[:-1], frame.by_group[rate].to_numpy(float), atol=1e-12)
        assert report[rate].iloc[-1] == pytest.approx(frame.overall[rate], abs=1e-12)
    own, options = fairness, {"sensitive_features": group}
    pairs = [
        (own.demographic_parity(y_hat, group), metrics.demographic_parity_difference, metrics.demographic_parity_ratio),
        (own.equalized_odds(y, y_hat, group), metrics.equalized_odds_difference, metrics.equalized_odds_ratio),
        (own.equal_opportunity(y, y_hat, group), metrics.equal_opportunity_difference, metrics.equal_opportunity_ratio),
    ]
    for criterion, difference, ratio in pairs:
        assert criterion.difference == pytest.approx(difference(y, y_hat, **options), abs=1e-12)
        assert criterion.ratio == pytest.approx(ratio(y, y_hat, **options), abs=1e-12)


@given(seeds)
def test_every_rate_is_what_counting_gives(seed):
    y, y_hat, group, score = sample(seed)
    report = fairness.group_report(y, y_hat, group, score, resamples=10, seed=0)
    for name in [*np.unique(group), "all"]:
        mine = group == name if name != "all" else group == group
        a, b, s, row = y[mine], y_hat[mine], score[mine], report.loc[name]
        want = {"prevalence": a.mean(), "selection_rate": b.mean(), "accuracy": (a == b).mean(), "fpr": b[a == 0].mean(),
                "fnr": 1 - b[a == 1].mean(), "tpr": b[a == 1].mean(), "ppv": a[b == 1].mean(), "npv": 1 - a[b == 0].mean(),
                "auc": roc_auc_score(a, s), "brier": ((s - a) ** 2).mean()}  # fmt: skip
        assert {key: row[key] for key in want} == pytest.approx(want, abs=1e-12)
        assert all(row[f"{key}_low"] - 1e-9 <= row[f"{key}_high"] for key in want)
    assert fairness.predictive_parity(y, y_hat, group).rates["ppv"].to_list() == report["ppv"].iloc[:-1].to_list()


@settings(max_examples=10)
@given(seeds)
def test_order_and_names_of_rows_do_not_matter(seed):
    y, y_hat, group, score = sample(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    one = fairness.group_report(y, y_hat, group, score, resamples=20, seed=1)
    for kind in (np.asarray, list, torch.from_numpy, pd.Series):
        arguments = [kind(v[order]) for v in (y, y_hat)]
        two = fairness.group_report(*arguments, group[order], score[order], resamples=20, seed=1)
        pd.testing.assert_frame_equal(one, two)
    codes = torch.from_numpy(np.unique(group, return_inverse=True)[1])
    numbered = fairness.group_report(y, y_hat, codes, score, resamples=20, seed=1)
    np.testing.assert_array_equal(one.to_numpy(float), numbered.to_numpy(float))


def test_the_bootstrap_is_that_of_rows_and_reproducible():
    y, y_hat, group, score = sample(3, n=300, k=2)
    report = fairness.group_report(y, y_hat, group, score, resamples=2000, seed=0)
    again = fairness.group_report(y, y_hat, group, score, resamples=2000, seed=0)
    pd.testing.assert_frame_equal(report, again)
    rng, mine = np.random.default_rng(1), group == "a"
    drawn = {"fpr": [], "auc": [], "ppv": []}
    for _ in range(600):
        rows = rng.choice(np.flatnonzero(mine), mine.sum())
        drawn["fpr"].append(y_hat[rows][y[rows] == 0].mean())
        drawn["ppv"].append(y[rows][y_hat[rows] == 1].mean())
        drawn["auc"].append(roc_auc_score(y[rows], score[rows]))
    for rate, values in drawn.items():
        low, high = np.quantile(values, [0.025, 0.975])
        width = high - low
        assert report.loc["a", f"{rate}_low"] == pytest.approx(low, abs=0.12 * width)
        assert report.loc["a", f"{rate}_high"] == pytest.approx(high, abs=0.12 * width)
    narrow = fairness.group_report(y, y_hat, group, resamples=2000, level=0.5, seed=0).loc["a"]
    assert narrow["fpr_high"] - narrow["fpr_low"] < 0.5 * (report.loc["a", "fpr_high"] - report.loc["a", "fpr_low"])


def test_a_rate_over_nobody_is_nan_in_the_report_and_an_error_in_a_criterion():
    y, y_hat, group = [0, 1, 0, 1], [0, 0, 1, 1], ["a", "a", "b", "b"]
    report = fairness.group_report(y, y_hat, group, seed=0)
    assert math.isnan(report.loc["a", "ppv"]) and math.isnan(report.loc["a", "ppv_low"])
    assert report["small"].all() and not fairness.group_report(y, y_hat, group, small=0, seed=0)["small"].any()
    with pytest.raises(ValueError, match="'a' has no row with y_hat = 1, so its ppv"):
        fairness.predictive_parity(y, y_hat, group)
    assert fairness.demographic_parity([0, 0], ["a", "b"]).ratio == 1


@given(seeds)
def test_chouldechovas_identity_holds_for_every_classifier(seed):
    y, y_hat, group, _ = sample(seed)
    report = fairness.group_report(y, y_hat, group, resamples=10, seed=0)
    forced = fairness.impossibility(report["prevalence"], report["ppv"], report["fnr"])
    np.testing.assert_allclose(forced, report["fpr"], atol=1e-12)


def test_equal_ppv_and_fnr_force_unequal_fpr():
    low, high = fairness.impossibility([0.39, 0.51], 0.6, 0.4)
    assert high / low == pytest.approx((0.51 / 0.49) / (0.39 / 0.61))
    assert fairness.impossibility(0.3, 1.0, 0.2) == 0 and isinstance(fairness.impossibility(0.3, 1.0, 0.2), float)


def test_calibration_by_counting_and_its_intervals():
    rng = np.random.default_rng(0)
    score = rng.choice([0.1, 0.4, 0.8], 30_000)
    y, group = (rng.random(30_000) < score).astype(int), rng.choice(["a", "b"], 30_000)
    found = fairness.calibration(y, score, group)
    assert len(found.table) == 6 and found.errors.max() < 0.02 and found.difference < 0.04
    for row in found.table.itertuples():
        mine = (group == row.group) & (score == row.score)
        test = binomtest(int(y[mine].sum()), int(mine.sum())).proportion_ci(method="exact")
        assert (row.n, row.observed) == (mine.sum(), pytest.approx(y[mine].mean()))
        assert (row.low, row.high) == (pytest.approx(test.low), pytest.approx(test.high))
    skewed = fairness.calibration(y, np.where(group == "a", score, score**2), group, bins=5)
    assert skewed.errors["a"] < 0.02 < 0.1 < skewed.errors["b"]
    assert len(fairness.calibration(y, rng.random(30_000), group, bins=7).table) == 14


# ---- individual fairness


def test_two_people_get_what_the_closed_form_says():
    """One would be chosen, the other not: total variation allows a gap of d, relative infinity tanh(d / 2)."""
    loss = torch.tensor([[0.0, -1], [0, 1]], dtype=torch.float64)
    for gap in (0.0, 0.3, 1.0, 5.0):
        d = torch.tensor([[0, gap], [gap, 0]], dtype=torch.float64)
        p = fairness.individual(d, loss).probability[:, 1]
        assert (p[0] - p[1]).item() == pytest.approx(min(gap, 1), abs=1e-8)
        p = fairness.individual(d, loss, kind="relative infinity").probability[:, 1]
        assert (p[0] - p[1]).item() == pytest.approx(math.tanh(gap / 2), abs=1e-8)  # randomised response at eps = d


@given(seeds, st.integers(2, 4), st.sampled_from(["total variation", "relative infinity"]))
def test_the_program_is_dworks(seed, k, kind):
    """The optimum equals that of the program written out for another solver, and the map keeps its distance."""
    rng = np.random.default_rng(seed)
    n = 4
    points = rng.random((n, 2)) * rng.choice([0.2, 1, 3])
    d = np.linalg.norm(points[:, None] - points[None], axis=2)
    cost = rng.normal(size=(n, k))
    found = fairness.individual(torch.from_numpy(d), torch.from_numpy(cost), kind=kind)
    rows, right = [], []
    for x in range(n):
        for y in range(n):
            if x == y:
                continue
            if kind == "relative infinity":
                for a in range(k):
                    row = np.zeros((n, k))
                    row[x, a], row[y, a] = 1, -math.exp(d[x, y])
                    rows.append(row.ravel())
                    right.append(0)
            else:  # every event: P_x(S) - P_y(S) <= d
                for event in range(1, 2**k - 1):
                    row = np.zeros((n, k))
                    inside = [a for a in range(k) if event >> a & 1]
                    row[x, inside], row[y, inside] = 1, -1
                    rows.append(row.ravel())
                    right.append(d[x, y])
    whole = np.kron(np.eye(n), np.ones(k))
    want = linprog(cost.ravel(), A_ub=rows, b_ub=right, A_eq=whole, b_eq=np.ones(n), bounds=(0, 1))
    assert found.loss == pytest.approx(want.fun / n, abs=1e-7)
    assert found.violation < 1e-8 and (found.probability >= 0).all()
    torch.testing.assert_close(found.probability.sum(1), torch.ones(n, dtype=torch.float64))


def test_without_similarity_all_get_their_best_and_with_identity_all_the_same():
    loss = torch.tensor([[0.0, 1], [1, 0], [0.2, 0]])
    free = torch.full((3, 3), math.inf).fill_diagonal_(0)
    assert fairness.individual(free, loss).loss == pytest.approx(0)
    for kind in fairness.similar.DIVERGENCES:
        alike = fairness.individual(torch.zeros(3, 3), loss, kind=kind)
        assert alike.probability.dtype == torch.float32 and alike.violation < 1e-6
        assert alike.loss == pytest.approx(float(loss.mean(0).min()), abs=1e-7)


def test_lipschitz_maps_are_as_unequal_to_groups_as_the_groups_are_apart():
    """Dwork's theorem: the difference of selection rates is at most the earthmover distance of the groups under d."""
    rng = np.random.default_rng(0)
    place = np.concatenate([rng.normal(0.4, 0.1, 15), rng.normal(0.6, 0.1, 15)])
    d = torch.from_numpy(np.abs(place[:, None] - place[None]))
    loss = torch.from_numpy(np.stack([np.zeros(30), np.where(np.arange(30) < 15, 1.0, -1.0)], 1))
    p = fairness.individual(d, loss).probability[:, 1]
    gap = float(p[15:].mean() - p[:15].mean())
    assert 0.1 < gap <= wasserstein_distance(place[:15], place[15:]) + 1e-8


def test_divergences_are_those_of_the_definition():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert fairness.divergence(p, q).item() == pytest.approx(0.25)
    assert fairness.divergence(p, q, "relative infinity") == math.inf
    assert fairness.divergence(p[:2], torch.tensor([0.2, 0.8]), "relative infinity").item() == pytest.approx(
        math.log(2.5)
    )


# ---- thresholds


def brute_force(y, score, group, cost=(1.0, 1.0)):
    """The least cost over all points that every group reaches, two groups: the upper hulls' lower envelope, finely."""
    curves = {}
    for name in np.unique(group):
        points = fairness.roc(y[group == name], score[group == name])[["fpr", "tpr"]].to_numpy()
        curves[name] = points

    def reach(points, x):
        """The highest TPR of any mixture of two rules with FPR x."""
        best = -1.0
        for a in points:
            for b in points:
                if a[0] <= x <= b[0]:
                    t = 0 if a[0] == b[0] else (x - a[0]) / (b[0] - a[0])
                    best = max(best, a[1] + t * (b[1] - a[1]), max(a[1], b[1]) if a[0] == b[0] else -1.0)
        return best

    negative, positive = (y == 0).mean(), (y == 1).mean()
    breaks = np.unique(np.concatenate([points[:, 0] for points in curves.values()]))
    fine = np.unique(
        np.concatenate([breaks, *(np.linspace(a, b, 40) for a, b in zip(breaks, breaks[1:], strict=False))])
    )
    envelope = [min(reach(points, x) for points in curves.values()) for x in fine]
    return min(cost[0] * negative * x + cost[1] * positive * (1 - t) for x, t in zip(fine, envelope, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cost", [(1.0, 1.0), (3.0, 1.0)])
def test_equalised_odds_meets_its_constraint_at_the_optimum_of_brute_force(seed, cost):
    y, _, group, score = sample(seed, n=80, k=2)
    found = fairness.equalize(y, score, group, cost=cost)
    assert np.ptp(found.rates[["fpr", "tpr"]].to_numpy(), axis=0).max() < 1e-9
    best = brute_force(y, score, group, cost)
    assert found.loss <= best + 1e-9 and found.loss >= best - 0.02 * best  # the grid is fine, not exact


@given(seeds, st.sampled_from(["equalized odds", "equal opportunity", "demographic parity", "none"]))
def test_the_rules_do_what_the_rates_say_and_no_mixture_is_better(seed, constraint):
    y, _, group, score = sample(seed, n=70, k=3)
    found = fairness.equalize(y, score, group, constraint=constraint)
    p = found.probability(score, group).numpy()
    assert found.loss == pytest.approx(np.where(y == 1, 1 - p, p).mean(), abs=1e-9)
    for name, row in found.rates.iterrows():
        mine = group == name
        assert p[mine & (y == 0)].mean() == pytest.approx(row["fpr"], abs=1e-9)
        assert p[mine & (y == 1)].mean() == pytest.approx(row["tpr"], abs=1e-9)
        assert p[mine].mean() == pytest.approx(row["selection_rate"], abs=1e-9)
    columns = list(fairness.thresholds.CONSTRAINTS[constraint])
    if columns:
        assert np.ptp(found.rates[columns].to_numpy(), axis=0).max() < 1e-9
    assert found.loss <= min(y.mean(), 1 - y.mean()) + 1e-9  # "nobody" and "everybody" are fair to groups, too
    # The same linear program over every rule, not only the hulls' corners, by another solver.
    rules = [fairness.roc(y[group == a], score[group == a]) for a in np.unique(group)]
    shares = (
        [((group == a) & (y == 0)).mean() for a in np.unique(group)],
        [((group == a) & (y == 1)).mean() for a in np.unique(group)],
    )  # noqa: E501
    size = [len(r) for r in rules]
    cost = np.concatenate([shares[0][k] * r["fpr"] + shares[1][k] * (1 - r["tpr"]) for k, r in enumerate(rules)])
    starts, equal, right = np.cumsum([0, *size]), [], []
    for k in range(3):
        row = np.zeros(sum(size))
        row[starts[k] : starts[k + 1]] = 1
        equal.append(row)
        right.append(1)
        for column in columns if k else ():
            row = np.zeros(sum(size))
            row[starts[k] : starts[k + 1]], row[: size[0]] = rules[k][column], -rules[0][column]
            equal.append(row)
            right.append(0)
    want = linprog(cost, A_eq=equal, b_eq=right, bounds=(0, 1))
    assert found.loss == pytest.approx(want.fun, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_hardts_program_of_four_variables(seed):
    """For decisions instead of scores: P(Y~=1 | Y^=y, A=a) = p_ya, four numbers, written out."""
    y, y_hat, group, _ = sample(seed, n=90, k=2)
    if seed == 2:
        y_hat = np.where(group == "b", 1 - y_hat, y_hat)  # worse than chance in one group: lies must be turned round
    names, cost, rows = np.unique(group), [], {"fpr": [], "tpr": []}
    for k, name in enumerate(names):
        mine = group == name
        for value in (0, 1):  # the part of the mean loss that p_{value, name} has
            at = mine & (y_hat == value)
            cost.append(((y[at] == 0).sum() - (y[at] == 1).sum()) / len(y))
            for rate, label in (("fpr", 0), ("tpr", 1)):
                rows[rate].append((-1) ** k * (at & (y == label)).sum() / (mine & (y == label)).sum())
    want = linprog(cost, A_eq=list(rows.values()), b_eq=[0, 0], bounds=(0, 1))
    found = fairness.equalize(y, y_hat, group, flip=True)
    assert found.loss == pytest.approx(want.fun + y.mean(), abs=1e-8)
    assert fairness.equalize(y, y_hat, group).loss >= found.loss - 1e-9


@pytest.mark.parametrize("constraint, theirs", [
    ("equalized odds", "equalized_odds"), ("demographic parity", "demographic_parity"),
    ("equal opportunity", "true_positive_rate_parity"),
])  # fmt: skip
def test_it_is_at_least_as_good_as_fairlearns_threshold_optimizer(people, constraint, theirs):
    post = pytest.importorskip("fairlearn.postprocessing")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Score(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            self.classes_, self.fitted_ = np.array([0, 1]), True
            return self

        def predict(self, X):
            return np.asarray(X)[:, 0]

    _, y, _, group, score = people
    two = group != "C"
    y, group, score = y.numpy()[two], group[two], score.numpy()[two]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rival = post.ThresholdOptimizer(
            estimator=Score(), constraints=theirs, objective="accuracy_score", prefit=False, predict_method="predict",
            grid_size=2000,
        )  # fmt: skip
        rival.fit(score[:, None], y, sensitive_features=group)
        p = rival._pmf_predict(score[:, None], sensitive_features=group)[:, 1]
    loss = np.where(y == 1, 1 - p, p).mean()
    ours = fairness.equalize(y, score, group, constraint=constraint).loss
    assert ours <= loss + 1e-9 and ours == pytest.approx(loss, abs=2e-3)


def test_tolerance_buys_accuracy_and_lots_are_reproducible(people):
    _, y, _, group, score = people
    losses = [fairness.equalize(y, score, group, tolerance=t).loss for t in (0.0, 0.05, 0.1, 1.0)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert losses[-1] == pytest.approx(fairness.equalize(y, score, group, constraint="none").loss)
    rule = fairness.equalize(y, score, group)
    one, two = (rule.predict(score, group, seed=1) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, rule.predict(score, group, seed=2))
    assert (one.double() - rule.probability(score, group)).abs().mean() < 0.5
    assert rule.probability([2.0, -2.0], ["A", "A"]).tolist()[0] == 1
    with pytest.raises(ValueError, match="group: got 'D', want one of 'A', 'B', 'C'"):
        rule.probability([0.5], ["D"])


def test_the_roc_has_every_rule_once():
    curve = fairness.roc([0, 1, 0, 1], [0.2, 0.2, 0.5, 0.9])
    assert curve["threshold"].tolist() == [math.inf, 0.9, 0.5, -math.inf]
    assert curve["fpr"].tolist() == [0, 0, 0.5, 1] and curve["tpr"].tolist() == [0, 0.5, 0.5, 1]


# ---- repair before and in training


@given(seeds)
def test_reweighing_makes_outcome_and_group_independent(seed):
    y, _, group, _ = sample(seed, k=3)
    w = fairness.reweigh(y, group)
    assert w.sum().item() == pytest.approx(len(y)) and (w > 0).all()
    rates = [float(w.numpy()[group == a] @ y[group == a]) / float(w[group == a].sum()) for a in np.unique(group)]
    assert rates == pytest.approx([y.mean()] * 3)
    shares = [float(w[group == a].sum()) for a in np.unique(group)]
    assert shares == pytest.approx([(group == a).sum() for a in np.unique(group)])


def test_weights_of_the_worked_example():
    w = fairness.reweigh([1, 1, 1, 0, 1, 0, 0, 0], ["m"] * 4 + ["f"] * 4)
    torch.testing.assert_close(w, torch.tensor([2 / 3, 2 / 3, 2 / 3, 2, 2, 2 / 3, 2 / 3, 2 / 3], dtype=torch.float64))


def test_newton_finds_scikit_learns_minimum(people):
    made, y, *_ = people
    X = fairness.without(made, "group", "offence", "decile_score", "district").X[:1500, :2]
    y = y[:1500]
    theta = fairness.logistic_regression(X, y, reg=0.7)
    theirs = LogisticRegression(C=1 / 0.7, tol=1e-10, max_iter=2000).fit(X.numpy(), y.numpy())
    assert theta.tolist() == pytest.approx([*theirs.coef_[0], theirs.intercept_[0]], abs=1e-4)
    twice = fairness.logistic_regression(torch.cat([X, X[:500]]), torch.cat([y, y[:500]]))
    weight = torch.where(torch.arange(1500) < 500, 2.0, 1.0)
    torch.testing.assert_close(fairness.logistic_regression(X, y, weight=weight), twice, atol=1e-8, rtol=1e-8)
    with pytest.raises(RuntimeError, match="separated"):
        fairness.logistic_regression(torch.tensor([[0.0], [1.0]]), [0, 1])
    half = torch.cat([X, (y[:, None] > 0) & (X[:, 1:] > 2)], 1).double()  # one column is 1 for some of one class only
    with pytest.raises(RuntimeError, match="separated"):
        fairness.logistic_regression(half, y)
    with pytest.raises(RuntimeError, match="redundant"):
        fairness.logistic_regression(torch.ones(4, 1), [0, 1, 0, 1])


def test_debiasing_hides_the_group_at_a_small_price_and_is_reproducible(people):
    made, y, _, group, _ = people
    two = torch.from_numpy(group != "C")
    X, y, group = fairness.without(made, "offence", "group", "decile_score").X[two].float(), y[two], group[two.numpy()]
    state = torch.random.get_rng_state()
    model = fairness.debias(X, y, group, steps=300, seed=0)
    assert torch.equal(state, torch.random.get_rng_state()) and not model.training
    again = fairness.debias(X, y, group, steps=300, seed=0)
    assert torch.equal(model(X), again(X)) and all(p.grad is None for p in model.parameters())
    assert model(X).shape == (len(X), 2) and model(X).dtype == torch.float32
    theta = fairness.logistic_regression((X - X.mean(0)) / X.std(0), y, reg=1.0)
    plain = ((X - X.mean(0)).double() / X.std(0) @ theta[:-1] + theta[-1] > 0).long()
    fair = model(X).argmax(1)
    before, after = (fairness.demographic_parity(v, group).difference for v in (plain, fair))
    assert after < 0.5 * before
    assert (fair == y).double().mean() > (plain == y).double().mean() - 0.06
    odds = fairness.debias(X, y, group, criterion="equalized odds", steps=300, hidden=8, seed=0)(X).argmax(1)
    before, after = (fairness.equalized_odds(y, v, group).difference for v in (plain, odds))
    assert after < 0.6 * before


def test_a_step_does_not_help_the_adversary():
    g, h = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([0.0, 1.0]), torch.tensor([-1.0])]
    flat = torch.cat(fairness.repair.against_adversary(g, h, 0.0))
    assert (flat @ torch.cat(h)).abs() < 1e-6 and flat.tolist() == [1.0, 2.5, 2.5]
    assert torch.cat(fairness.repair.against_adversary(g, h, 2.0)) @ torch.cat(h) == pytest.approx(-2.0 * 2)


def test_where_nothing_tells_the_group_debiasing_costs_nothing():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(800, 3))).float()
    y, group = (X[:, 0] + 0.3 * X[:, 1] > 0).long(), np.where(rng.random(800) < 0.5, "a", "b")
    model = fairness.debias(X, y, group, steps=200, seed=0)
    assert (model(X).argmax(1) == y).double().mean() > 0.93


def test_proxies_are_ranked_by_what_they_give_away(people):
    made, _, _, group, _ = people
    two = torch.from_numpy(group != "C")
    rest = fairness.without(made, "group", "offence")
    found = fairness.proxies(rest.X[two], group[two.numpy()], feature_names=rest.feature_names)
    assert found.index[0] == "all columns" and found.iloc[1:].is_monotonic_decreasing and (found.iloc[1:] >= 0.5).all()
    assert found["all columns"] > found.iloc[1] - 0.01 > 0.6 and found["age"] < 0.55
    alone = roc_auc_score(group[two.numpy()] == "B", rest.X[two, rest.column("priors_count")])
    assert found["priors_count"] == pytest.approx(max(alone, 1 - alone), abs=1e-12)
    leak = torch.cat([torch.rand(200, 1), torch.from_numpy(np.arange(200) % 2.0)[:, None]], 1)
    assert fairness.proxies(leak, np.arange(200) % 2)["all columns"] == pytest.approx(1)


# ---- proportional fairness


def agents(counts, seed=0, d=3):
    generator = torch.Generator().manual_seed(seed)
    X = [torch.randn(n, d, generator=generator, dtype=torch.float64) for n in counts]
    truth = torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64)
    return X, [(x @ truth + 0.3 > torch.randn(len(x), generator=generator)).long() for x in X]


@pytest.mark.parametrize("counts, levels", [([30, 30, 30], [1, 1, 1]), ([10, 10, 70], [1, 1, 2])])
def test_with_one_step_a_round_the_top_model_is_gradient_descent_on_all_rows(counts, levels):
    X, y = agents(counts)
    federation = fairness.hierarchical(X, y, levels, rounds=40, lr=0.5, reg=0.01)
    A, target = torch.cat([torch.cat(X), torch.ones(90, 1, dtype=torch.float64)], 1), torch.cat(y).double()
    theta = torch.zeros(4, dtype=torch.float64)
    for _ in range(40):
        shrink = 0.01 * theta * torch.tensor([1, 1, 1, 0])
        theta = theta - 0.5 * (A.T @ ((A @ theta).sigmoid() - target) / 90 + shrink)
    torch.testing.assert_close(federation.models[max(levels)], theta, atol=1e-12, rtol=0)


def test_it_converges_to_the_minimum():
    X, y = agents([30, 30, 30])
    long = fairness.hierarchical(X, y, [1, 1, 1], rounds=1000, lr=2.0, reg=0.01)
    want = fairness.logistic_regression(torch.cat(X), torch.cat(y), reg=0.9)
    torch.testing.assert_close(long.models[1], want, atol=1e-6, rtol=0)


def test_a_model_sees_what_was_agreed_and_nothing_else():
    counts, levels = [10, 12, 30, 31, 90], [1, 1, 2, 2, 3]
    X, y = agents(counts)
    federation = fairness.hierarchical(X, y, levels, rounds=20, local_steps=2)
    assert federation.given.to_numpy().tolist() == [[10] * 3, [10] * 3, [10, 30, 30], [10, 30, 30], [10, 30, 90]]
    assert torch.equal(federation.reward(4), federation.models[3])
    # What the others add beyond a level's agreement leaves the level's model as it is.
    cut = fairness.hierarchical(X[:4] + [X[4][:60]], y[:4] + [y[4][:60]], [1, 1, 2, 2, 2], rounds=20, local_steps=2)
    assert cut.given[1].tolist() == federation.given[1].tolist()
    assert torch.equal(cut.models[1][:0], federation.models[1][:0]) and set(cut.models) == {1, 2}
    again = fairness.hierarchical(X, y, levels, rounds=20, local_steps=2)
    assert all(torch.equal(again.models[k], federation.models[k]) for k in (1, 2, 3))


def test_who_gives_more_gets_the_better_model():
    X_test, y_test = (v[0] for v in agents([4000], seed=99))
    losses = {1: 0.0, 2: 0.0, 3: 0.0}
    for seed in range(6):
        X, y = agents([6] * 4 + [25] * 3 + [120] * 3, seed)
        federation = fairness.hierarchical(X, y, [1] * 4 + [2] * 3 + [3] * 3, rounds=100, reg=0.02, seed=seed)
        for level, theta in federation.models.items():
            z = X_test @ theta[:-1] + theta[-1]
            losses[level] += torch.nn.functional.softplus(-(2 * y_test - 1) * z).mean().item()
    assert losses[1] > losses[2] > losses[3]


# ---- the invented population


def test_the_population_acts_alike_and_is_watched_differently(people):
    made, y, _, group, score = people
    offence = made.X[:, made.column("offence")]
    true = {a: offence[torch.from_numpy(group == a)].mean().item() for a in "AB"}
    seen = {a: y[torch.from_numpy(group == a)].double().mean().item() for a in "AB"}
    assert abs(true["A"] - true["B"]) < 0.03 and seen["A"] - seen["B"] > 0.1
    assert (y.double() <= offence).all() and sorted(set((score * 10).tolist())) == list(range(1, 11))
    assert 20 <= (group == "C").sum() <= 45
    again = data.population()
    assert torch.equal(again.X, made.X) and torch.equal(again.y, y)
    other = data.population(seed=1)
    assert not torch.equal(other.X, made.X)
    with pytest.raises(ValueError, match="n: got 10"):
        data.population(10)


def test_it_stands_in_for_a_missing_table_with_one_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TMLCOURSE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("compas", "compas_filtered", "adult", "german"):
        with pytest.raises(FileNotFoundError, match=r"Three ways"):
            data.load_table(name)
        assert data.load_table(name, fallback="population").name == "population"
        assert capsys.readouterr().out.count("\n") == 1


def test_columns_of_text_come_back_and_can_be_left_out(people):
    made = people[0]
    district = fairness.groups(made, "district")
    assert set(district) == set("12345")
    assert (made.X[:, made.column("district=3")].numpy() == (district == "3")).all()
    rest = fairness.without(made, "district", "age")
    assert "age" not in rest.feature_names and not any(n.startswith("district") for n in rest.feature_names)
    assert torch.equal(rest.X[:, rest.column("group=B")], made.X[:, made.column("group=B")]) and torch.equal(
        rest.y, made.y
    )


# ---- bad input

Y, H, G, S = [0, 1, 0, 1], [0, 1, 1, 1], ["a", "a", "b", "b"], [0.1, 0.9, 0.6, 0.7]
X4 = torch.rand(4, 2)
D2, L2 = torch.tensor([[0.0, 1], [1, 0]]), torch.zeros(2, 2)


@pytest.mark.parametrize("call, error, message", [
    (lambda: fairness.group_report([0, 2], [0, 1], ["a", "b"]), ValueError, "y: got 2, want only 0 and 1"),
    (lambda: fairness.group_report(Y, H[:3], G), ValueError, "y_hat: got 3 rows, want 4"),
    (lambda: fairness.group_report(Y, H, G[:3]), ValueError, "group: got 3 rows, want 4"),
    (lambda: fairness.group_report(Y, H, ["a"] * 4), ValueError, "group: got one value only, 'a'"),
    (lambda: fairness.group_report(Y, H, G, [0.1, 0.2, 3, 0.1]), ValueError, r"score: got values in \[0.1, 3\]"),
    (lambda: fairness.group_report(Y, H, G, [0.1, 0.2, math.nan, 0.1]), ValueError, "score: got NaN"),
    (lambda: fairness.group_report(Y, H, G, level=1.0), ValueError, "level: got 1.0"),
    (lambda: fairness.group_report([], [], []), ValueError, r"y: got shape \(0,\)"),
    (lambda: fairness.group_report(["x"] * 4, H, G), TypeError, "y: got"),
    (lambda: fairness.group_report(Y, H, pd.Categorical(G, ["a", "b", "c"])), ValueError, "group: 'c' has no rows"),
    (lambda: fairness.group_report(Y, H, ["a", None, "b", "b"]), ValueError, "group: .*missing value"),
    (lambda: fairness.demographic_parity(H, G[:2]), ValueError, "group: got 2 rows"),
    (lambda: fairness.equal_opportunity([0, 0, 1, 1], H, G), ValueError, "'a' has no row with y = 1"),
    (lambda: fairness.equalized_odds([1, 1, 0, 1], H, G), ValueError, "'a' has no row with y = 0"),
    (lambda: fairness.calibration(Y, S, G, bins=0), ValueError, "bins"),
    (lambda: fairness.calibration(Y, [1, 2, 3, 4], G), ValueError, "deciles: divide by 10"),
    (lambda: fairness.impossibility(1.0, 0.5, 0.5), ValueError, "prevalence: got 1"),
    (lambda: fairness.impossibility(0.5, 0.0, 0.5), ValueError, "ppv: got 0"),
    (lambda: fairness.impossibility(0.5, 0.5, [0.1, 1.2]), ValueError, "fnr: got 1.2"),
    (lambda: fairness.roc([1, 1], [0.1, 0.2]), ValueError, "y: got only 1"),
    (lambda: fairness.equalize([1, 1, 0, 1], S, G), ValueError, "'a' has only rows of y = 1"),
    (lambda: fairness.equalize(Y, S, G, constraint="fair"), ValueError, "constraint: got 'fair'"),
    (lambda: fairness.equalize(Y, S, G, cost=(1, 2, 3)), ValueError, "cost: got"),
    (lambda: fairness.equalize(Y, S, G, cost=(-1, 2)), ValueError, "cost: got -1"),
    (lambda: fairness.equalize(Y, S, G, tolerance=-0.1), ValueError, "tolerance: got -0.1"),
    (lambda: fairness.individual(D2.long(), L2), TypeError, "distance"),
    (lambda: fairness.individual(torch.rand(2, 3), L2), ValueError, r"distance: got shape \(2, 3\)"),
    (lambda: fairness.individual(torch.tensor([[0.0, 1], [2, 0]]), L2), ValueError, "asymmetry"),
    (lambda: fairness.individual(D2, torch.zeros(3, 2)), ValueError, "loss: got shape"),
    (lambda: fairness.individual(D2, L2, kind="euclid"), ValueError, "kind: got 'euclid'"),
    (lambda: fairness.divergence(torch.ones(2), torch.ones(2)), ValueError, "p: got numbers that are no probabilities"),
    (lambda: fairness.reweigh([1, 1, 0, 1], G), ValueError, "'a' has no row of y = 0"),
    (lambda: fairness.logistic_regression(X4, Y[:3]), ValueError, "X: got 4 rows, want 3"),
    (lambda: fairness.logistic_regression(X4, Y, weight=-torch.ones(4)), ValueError, "weight: got negative"),
    (lambda: fairness.logistic_regression(X4.long(), Y), TypeError, "X: got torch.int64"),
    (lambda: fairness.debias(X4 * math.nan, Y, G), ValueError, "X: got shape .* not finite"),
    (lambda: fairness.debias(X4, Y, G, criterion="luck"), ValueError, "criterion: got 'luck'"),
    (lambda: fairness.debias(X4, Y, G, alpha=-1.0), ValueError, "alpha: got -1"),
    (lambda: fairness.proxies(X4, ["a", "b", "c", "c"]), ValueError, "group: got 3 values, want two"),
    (lambda: fairness.proxies(X4, G), ValueError, "want at least 5"),
    (lambda: fairness.hierarchical([X4], [Y], [1, 2]), ValueError, "1, 1 and 2 agents"),
    (lambda: fairness.hierarchical([X4, X4[:2]], [Y, Y[:2]], [1, 2]), ValueError, "level 2 gives 2 rows"),
    (lambda: fairness.groups(data.population(1000), "race"), ValueError, "attribute: got 'race', a column that"),
    (lambda: fairness.groups(data.population(1000), 3), TypeError, "attribute: got int"),
    (lambda: fairness.groups("compas", "race"), TypeError, "table: got str"),
    (lambda: fairness.without(data.population(1000), "race"), ValueError, "attributes: got 'race'"),
])  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_about_single_people_is_printed(people, capsys):
    _, y, y_hat, group, score = people
    fairness.group_report(y, y_hat, group, score, seed=0)
    rule = fairness.equalize(y, score, group)
    assert capsys.readouterr().out == "" and len(repr(rule.rules)) < 2000
    assert set(rates.RATES) <= set(fairness.group_report(y, y_hat, group, resamples=10).columns)
