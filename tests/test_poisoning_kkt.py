"""The KKT attack, against closed forms, scikit-learn, finite differences of the retrained learner and the referee."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.svm import SVC

from tmlcourse import data
from tmlcourse.poisoning import (
    Learner,
    SingularKKT,
    best_flips,
    best_responses,
    fit,
    flip_labels,
    implicit_gradient,
    implicit_jacobian,
    kkt,
    kkt_attack,
    logistic,
    naive_attack,
    ridge,
    scores,
    smooth_svm,
    svm,
)

# Weights that sum to one, by a multiplier: what a user would write.
portfolio = Learner(
    "weights that sum to one",
    lambda theta, X, y: (scores(theta, X) - y).square().sum() / 2,
    inequality=lambda theta, X, y: -theta[:-1],
    equality=lambda theta, X, y: (theta[:-1].sum() - 1).reshape(1),
    start=lambda X, y: torch.cat([torch.full_like(X[0], 1 / X.shape[1]), y.new_zeros(1)]),
)
LEARNERS = {
    "OLS": ridge(0.0),
    "ridge": ridge(2.0),
    "ridge, w >= 0": ridge(0.5, nonnegative=True),
    "logistic": logistic(0.5),
    "logistic in a ball": logistic(0.01, radius=0.8),
    "SVM": svm(1.0),
    "smooth SVM": smooth_svm(1.0, width=0.2),
    "portfolio": portfolio,
}


def problem(learner, n=20, d=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=gen, dtype=torch.float64)
    s = X @ torch.tensor([1.0, -1.0, 0.3][:d], dtype=torch.float64) + 0.5
    s += torch.randn(n, generator=gen, dtype=torch.float64)
    y = torch.where(s > 0, 1.0, -1.0).double() if learner.signs else s
    if learner.signs:
        y[:2] = torch.tensor([1.0, -1.0])
    return X, y


def standardised(table):
    return (table.X - table.X.mean(0)) / table.X.std(0, unbiased=False).clamp_min(1e-12)


# ---- the learners


@pytest.mark.parametrize("name", LEARNERS)
def test_a_solution_meets_the_kkt_conditions(name):
    learner = LEARNERS[name]
    solved = fit(learner, *problem(learner))
    assert solved.residual < 1e-8
    assert (solved.lam >= 0).all() and solved.model.shape == (4,)


def test_learners_are_those_of_scikit_learn_and_scipy():
    X, y = problem(ridge())
    for ours, theirs in ((ridge(0.0), LinearRegression()), (ridge(2.0), Ridge(2.0))):
        model = fit(ours, X, y).model.numpy()
        theirs.fit(X, y)
        np.testing.assert_allclose(model, [*theirs.coef_, theirs.intercept_], atol=1e-10)
    centred = X - X.mean(0), y - y.mean()
    weights = fit(ridge(0.0, nonnegative=True), X, y).model[:-1]
    np.testing.assert_allclose(weights, nnls(*map(np.asarray, centred))[0], atol=1e-8)
    assert (weights == 0).any() or (weights.abs() < 1e-12).any()
    X, y = problem(svm(), n=60)
    theirs = LogisticRegression(C=2.0, tol=1e-12, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(fit(logistic(0.5), X, y).model, [*theirs.coef_[0], *theirs.intercept_], atol=1e-6)
    for C in (0.1, 10.0):
        theirs = SVC(C=C, kernel="linear", tol=1e-9).fit(X, y)
        np.testing.assert_allclose(fit(svm(C), X, y).model, [*theirs.coef_[0], *theirs.intercept_], atol=2e-5)


def test_the_interior_point_finds_the_svm_that_the_guess_finds():
    import dataclasses

    X, y = problem(svm())
    slow = dataclasses.replace(svm(1.0), guess=None)
    np.testing.assert_allclose(fit(slow, X, y).model, fit(svm(1.0), X, y).model, atol=1e-8)
    np.testing.assert_allclose(fit(smooth_svm(width=1e-4), X, y).model, fit(svm(1.0), X, y).model, atol=2e-3)


# ---- the implicit function theorem


def retrained(learner, X, y, dX, dy, step=1e-5):
    """The central difference of the retrained model along a direction."""
    after = [fit(learner, X + k * step * dX, y + k * step * dy).model for k in (1, -1)]
    return (after[0] - after[1]) / (2 * step)


@pytest.mark.parametrize("name", LEARNERS)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_the_implicit_gradient_is_that_of_retraining(name, seed):
    learner = LEARNERS[name]
    X, y = problem(learner, seed=seed)
    solved = fit(learner, X, y)
    try:
        JX, Jy = implicit_jacobian(solved)
    except SingularKKT:
        return
    gen = torch.Generator().manual_seed(seed)
    dX = torch.randn(X.shape, generator=gen, dtype=torch.float64)
    dy = torch.zeros_like(y) if learner.signs else torch.randn(y.shape, generator=gen, dtype=torch.float64)
    solid = [fit(learner, X + k * 1e-5 * dX, y + k * 1e-5 * dy).active for k in (1, -1)]
    if not all(a.equal(solved.active) for a in solid):
        return  # a kink lies between
    predicted = torch.einsum("pnd,nd->p", JX, dX) + Jy @ dy
    measured = retrained(learner, X, y, dX, dy)
    assert (predicted - measured).norm() <= 1e-4 * measured.norm()


@pytest.mark.parametrize("name", ["ridge, w >= 0", "logistic in a ball", "SVM", "portfolio"])
def test_the_problems_above_have_active_constraints(name):
    learner = LEARNERS[name]
    assert any(fit(learner, *problem(learner, seed=s)).active.any() for s in range(3))


def test_labels_between_minus_one_and_one_have_their_gradient_too():
    for learner in (logistic(0.5), svm(1.0)):
        X, y = problem(learner, n=30, seed=1)
        y = 0.8 * y
        dy = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        predicted = implicit_jacobian(fit(learner, X, y))[1] @ dy
        measured = retrained(learner, X, y, torch.zeros_like(X), dy)
        assert (predicted - measured).norm() <= 1e-4 * measured.norm()


def test_ridge_has_the_closed_form():
    """dtheta/dy = A^-1 X^T and dtheta/dX_ij = A^-1 (r_i e_j - theta_j x_i)."""
    X, y = problem(ridge())
    rows = torch.cat([X, torch.ones(20, 1)], 1)
    A = rows.T @ rows + 2 * torch.diag(torch.tensor([1.0, 1, 1, 0]).double())
    theta = torch.linalg.solve(A, rows.T @ y)
    JX, Jy = implicit_jacobian(fit(ridge(2.0), X, y))
    assert torch.allclose(Jy, torch.linalg.solve(A, rows.T), atol=1e-10)
    r, eye = y - rows @ theta, torch.eye(4).double()
    for i, j in ((0, 0), (7, 2), (19, 1)):
        assert torch.allclose(JX[:, i, j], torch.linalg.solve(A, r[i] * eye[j] - theta[j] * rows[i]), atol=1e-10)


def test_the_adjoint_gradient_is_the_jacobian_product():
    X, y = problem(svm(), n=30, seed=1)
    solved = fit(svm(1.0), X, y)
    JX, Jy = implicit_jacobian(solved)
    dX, dy = implicit_gradient(solved, lambda model: model.square().sum() / 2)
    assert torch.allclose(dX, torch.einsum("p,pnd->nd", solved.model, JX), atol=1e-9)
    assert torch.allclose(dy, solved.model @ Jy, atol=1e-9)


def test_only_margin_points_and_errors_move_an_svm():
    X, y = problem(svm(), n=60)
    solved = fit(svm(1.0), X, y)
    JX = implicit_jacobian(solved)[0].abs().amax((0, 2))
    margins = y * scores(solved.model, X)
    assert (JX[margins > 1 + 1e-4] < 1e-12).all()
    assert (JX[margins < 1 - 1e-4] > 1e-6).all()


def test_singular_and_degenerate_systems_are_said():
    X, y = problem(ridge())
    doubled = torch.cat([X, X[:, :1]], 1)
    with pytest.raises(SingularKKT, match="singular KKT matrix.*duplicated"):
        implicit_jacobian(fit(ridge(0.0), doubled, y))
    with pytest.raises(SingularKKT, match="singular KKT matrix.*duplicated"):
        kkt_attack(ridge(0.0), doubled, y, torch.zeros(5))
    # Separable by far with a tiny C: all examples at their bound, none on the margin, the intercept not unique.
    X = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]).double()
    y = torch.tensor([-1.0, -1.0, 1.0, 1.0]).double()
    with pytest.raises(SingularKKT, match="degenerate|margin"):
        implicit_jacobian(fit(svm(0.01), X, y))
    # A weight of zero with multiplier zero: its correlation with the response vanishes.
    X = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    with pytest.raises(SingularKKT, match="degenerate: 1 constraint"):
        implicit_jacobian(fit(ridge(1.0, nonnegative=True), X, X[:, 0].clone()))


# ---- the attack


def wine():
    try:
        table = data.load_table("wine_quality")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return standardised(table), table.y, table.column("alcohol")


def test_the_label_attack_on_wine_is_the_least_norm_solution():
    X, y, alcohol = wine()
    target = fit(ridge(0.0), X, y).model
    assert float(target[alcohol]) == pytest.approx(0.294242883, abs=1e-9)
    target[alcohol] = 0
    found = kkt_attack(ridge(0.0), X, y, target, move="responses", effort=0.0)
    assert float((found.y - y).norm()) == pytest.approx(11.766036696, abs=1e-8)
    assert (found.model - target).abs().max() < 1e-9


def test_the_label_attack_on_an_embedded_table_is_the_least_norm_solution():
    table = data.load_table("diabetes")
    X, y = standardised(table), table.y / 100
    target = fit(ridge(0.0), X, y).model
    change = torch.zeros_like(target)
    change[table.column("bmi")] = -target[table.column("bmi")]
    found = kkt_attack(ridge(0.0), X, y, target + change, move="responses", effort=0.0)
    rows = torch.cat([X, torch.ones(len(X), 1)], 1)
    assert torch.allclose(found.y - y, rows @ change, atol=1e-8)


def test_the_gradient_of_features_weighs_risk_and_effort_as_the_program_says():
    """At the attack's end the projected gradient of R_A + effort C_A, by finite differences, vanishes."""
    X, y = problem(ridge())
    target = torch.zeros(4).double()
    found = kkt_attack(ridge(1.0), X, y, target, effort=0.05, tol=1e-12, steps=300)

    def objective(Z):
        return (
            float((fit(ridge(1.0), Z, y).model - target).square().sum()) / 2 + 0.05 * float((Z - X).square().sum()) / 2
        )

    assert found.objective == pytest.approx(objective(found.X))
    for seed in range(3):
        d = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (objective(found.X + 1e-4 * d) - objective(found.X - 1e-4 * d)) / 2e-4
        assert abs(slope) < 1e-3 * found.objective
    assert (found.trace.objective.diff().dropna() <= 0).all()


def two_halves(learner):
    """Two disjoint halves of an embedded table, and the feature whose weight is to vanish."""
    if learner.signs:
        table = data.load_table("breast_cancer")
        X, y, feature = standardised(table)[:, :10:2], 2.0 * table.y.double() - 1, 0
        X, y = X[:60], y[:60]
    else:
        table = data.load_table("diabetes")
        X, y, feature = standardised(table), table.y / 100, table.column("bmi")
    return [(X[::2], y[::2], feature), (X[1::2], y[1::2], feature)]


@pytest.mark.parametrize("name, move", [("OLS", "responses"), ("ridge", "features"), ("logistic", "features"),
                                        ("SVM", "features")])  # fmt: skip
def test_the_attack_costs_a_third_of_the_naive_one_on_both_halves(name, move):
    learner = LEARNERS[name]
    for X, y, feature in two_halves(learner):
        target = fit(learner, X, y).model
        target[feature] = 0
        ours = kkt_attack(learner, X, y, target, move=move, effort=1e-4, steps=6, tol=1e-2)
        naive = naive_attack(learner, X, y, target, move=move)
        assert ours.cost <= naive.cost / 3
        assert ours.risk <= max(naive.risk, 1e-3)
        assert torch.allclose(ours.model, fit(learner, ours.X, ours.y).model, atol=1e-6)


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), as_function=st.booleans())
def test_the_attack_keeps_to_what_it_may_touch(seed, as_function):
    learner = logistic(0.5) if seed % 2 else ridge(0.5)
    X, y = problem(learner, seed=seed)
    X = (2 * X).round()
    rows, columns = torch.arange(20) < 5, torch.tensor([False, True, False])
    integer = torch.tensor([True, False, False])
    target = (lambda model: model[0] ** 2) if as_function else torch.tensor([0.0, torch.nan, 0.5, torch.nan]).double()
    before = X.clone(), y.clone()
    found = kkt_attack(learner, X, y, target, box=(-7.0, torch.tensor([6.5, 9.0, 7.0])), frozen_rows=rows,
                       frozen_columns=columns, integer=integer, effort=1e-3, steps=15, move="both",
                       response_box=None if learner.signs else (float(y.min()), float(y.max())))  # fmt: skip
    assert torch.equal(X, before[0]) and torch.equal(y, before[1])
    assert torch.equal(found.X[:5], X[:5]) and torch.equal(found.X[:, 1], X[:, 1]) and torch.equal(found.y[:5], y[:5])
    assert torch.equal(found.X[:, 0], found.X[:, 0].round())
    assert found.X.min() >= -7 and (torch.tensor([6.5, 9.0, 7.0]) >= found.X).all()
    assert found.y.min() >= y.min() - 1e-12 and found.y.max() <= y.max() + 1e-12
    assert found.trace.objective.min() <= found.trace.objective[0]


def test_a_function_as_target_finds_what_the_target_model_finds():
    X, y = problem(ridge())
    target = torch.tensor([0.2, -0.4, 0.3, 0.5]).double()
    newton = kkt_attack(ridge(1.0), X, y, target, effort=0.01, tol=1e-10)
    gradient = kkt_attack(
        ridge(1.0), X, y, lambda m: (m - target).square().sum() / 2, effort=0.01, tol=1e-10, steps=300
    )
    assert gradient.objective == pytest.approx(newton.objective, rel=1e-3)
    assert len(newton.trace) < len(gradient.trace)


def test_biggios_attack_point_raises_the_loss_on_other_data():
    """One point moves in a box, its label wrong; the rest is frozen."""
    X, y = problem(svm(), n=40)
    fresh, theirs = problem(svm(), n=200, seed=7)
    X, y = torch.cat([X, X[:1]]), torch.cat([y, -y[:1]])
    risk = lambda model: -(1 - theirs * scores(model, fresh)).clamp_min(0).mean()  # noqa: E731
    frozen = torch.arange(41) < 40
    found = kkt_attack(svm(1.0), X, y, risk, frozen_rows=frozen, box=(-4.0, 4.0), effort=0.0, steps=20)
    assert found.risk < float(risk(found.clean))
    assert torch.equal(found.X[:40], X[:40]) and not torch.equal(found.X[40], X[40])


def test_dtype_is_kept_and_a_call_is_reproducible():
    X, y = (v.float() for v in problem(ridge()))
    state = torch.get_rng_state()
    runs = [kkt_attack(ridge(), X, y, torch.zeros(4), steps=5) for _ in range(2)]
    assert runs[0].X.dtype == runs[0].y.dtype == torch.float32
    assert torch.equal(runs[0].X, runs[1].X)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kink_on_the_way_is_counted_and_said():
    X = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    target = torch.tensor([0.1, 0.0, 0.0]).double()
    with pytest.warns(UserWarning, match="degenerate in 1|degenerate in [0-9]+ of"):
        found = kkt_attack(ridge(1.0, nonnegative=True), X, X[:, 0].clone(), target, move="responses", steps=5)
    assert found.singular >= 1


# ---- the referee


def gain(clean, value, best):
    return (clean - value) / (clean - best)


@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_the_gradient_attack_on_responses_never_beats_the_optimum_and_comes_near(seed):
    learner = ridge(1.0, nonnegative=True)
    X, y = problem(learner, n=10, seed=seed)
    c = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = best_responses(X, y, c, radius=1.0)
    found = kkt_attack(learner, X, y, lambda m: c @ m, move="responses", effort=0.0, response_box=(y - 1, y + 1))
    clean = float(c @ found.clean)
    assert best.high == pytest.approx(float(c @ fit(learner, X, best.y).model), abs=1e-5)  # the program tells the truth
    assert found.risk >= best.low - 1e-6
    assert gain(clean, found.risk, best.low) >= 0.95


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_flips_never_beat_the_optimum_and_come_near(seed):
    gen = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0).double()
    X = torch.randn(10, 2, generator=gen, dtype=torch.float64)
    X[:, 0] += y
    best = best_flips(X, y, torch.tensor([1.0, 0, 0]), count=2)
    labels = flip_labels(X, (y > 0).long(), count=2, tries=4, learner=svm(1.0), risk=lambda model: model[0])
    clean, value, optimum = (float(fit(svm(1.0), X, v).model[0]) for v in (y, 2.0 * labels - 1, best.y))
    assert best.high == pytest.approx(optimum, abs=1e-5)
    assert value >= best.low - 1e-5
    assert gain(clean, value, best.low) >= 0.95


# ---- label flips


def test_adversarial_flips_hurt_more_than_random_ones():
    test = data.load("digits", "train")
    chosen = (test.y == 1) | (test.y == 7)
    x, y = test.x[chosen][:120], test.y[chosen][:120]

    def loss(labels):
        rows, signs = x.flatten(1).double(), torch.where(y == 7, 1.0, -1.0).double()
        model = fit(logistic(1.0), rows, torch.where(labels == 7, 1.0, -1.0).double()).model
        return float(torch.nn.functional.softplus(-signs * scores(model, rows)).mean())

    worst = flip_labels(x, y, count=6, tries=2)
    assert 0 < int((worst != y).sum()) <= 6 and set(worst.unique().tolist()) == {1, 7} and worst.dtype == torch.int64
    random = [flip_labels(x, y, count=6, how="random", seed=s) for s in range(4)]
    assert all(int((r != y).sum()) == 6 for r in random)
    assert loss(worst) > max(loss(r) for r in random) > loss(y)
    assert torch.equal(flip_labels(x, y, count=0), y)
    assert torch.equal(random[1], flip_labels(x, y, count=6, how="random", seed=1))


# ---- bad input


X0, Y0 = problem(ridge())
GOOD = {"learner": ridge(), "X": X0, "y": Y0, "target": torch.zeros(4)}


@pytest.mark.parametrize("change, error, message", [
    ({"learner": "ridge"}, TypeError, "learner: got str"),
    ({"X": X0[:, 0]}, ValueError, "X: got shape"),
    ({"X": X0.long()}, TypeError, "X: got torch.int64"),
    ({"X": X0 * torch.nan}, ValueError, "X: got NaN"),
    ({"y": Y0[:5]}, ValueError, "y: got shape"),
    ({"y": Y0.long()}, TypeError, "y: got torch.int64"),
    ({"learner": logistic(), "y": 3 * Y0}, ValueError, "labels -1 and 1"),
    ({"learner": svm(), "y": torch.ones(20)}, ValueError, "one class"),
    ({"target": torch.zeros(3)}, ValueError, "target: got torch.float32"),
    ({"target": torch.full((4,), torch.nan)}, ValueError, "nothing but NaN"),
    ({"target": 3}, TypeError, "target: got int"),
    ({"target": lambda m: m}, ValueError, "not a finite scalar"),
    ({"move": "all"}, ValueError, "move: got 'all'"),
    ({"effort": -1.0}, ValueError, "effort"),
    ({"steps": 0}, ValueError, "steps"),
    ({"box": (0.0, 1.0)}, ValueError, "box: .* outside"),
    ({"box": (1.0, 0.0)}, ValueError, "low end above"),
    ({"box": 3}, ValueError, "box: got 3"),
    ({"frozen_rows": torch.ones(20, dtype=torch.bool)}, ValueError, "everything is frozen"),
    ({"frozen_rows": torch.ones(3, dtype=torch.bool)}, ValueError, "frozen_rows: got"),
    ({"integer": [0]}, ValueError, "integer: got list"),
])  # fmt: skip
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kkt_attack(**(GOOD | change))


@pytest.mark.parametrize("call, message", [
    (lambda: ridge(-1.0), "reg"),
    (lambda: svm(0), "C: got 0"),
    (lambda: smooth_svm(width=0), "width: got 0"),
    (lambda: logistic(radius=0), "radius: got 0"),
    (lambda: naive_attack(ridge(), X0, Y0, torch.ones(4)), "no weight of zero"),
    (lambda: best_responses(X0, Y0, torch.ones(3), radius=1.0), "risk: got"),
    (lambda: best_responses(X0, Y0, torch.ones(4), radius=1.0, reg=0), "reg: got 0"),
    (lambda: best_flips(X0, Y0.sign() * 0.5, torch.ones(4)), "between -1 and 1"),
    (lambda: flip_labels(X0, (Y0 > 0).long(), count=21), "count: got 21"),
    (lambda: flip_labels(X0, (Y0 > 0).long(), count=2, how="worst"), "how: got 'worst'"),
])  # fmt: skip
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_learner_without_a_solution_says_so():
    unbounded = Learner("unbounded", lambda theta, X, y: theta.sum() + 1e-9 * theta.square().square().sum())
    with pytest.raises(RuntimeError, match="unbounded"):
        fit(unbounded, X0, Y0)
    outside = Learner("outside", ridge().objective, inequality=lambda theta, X, y: theta[:1] + 1)
    with pytest.raises(ValueError, match="not strictly inside"):
        fit(outside, X0, Y0)
    assert kkt._solve(torch.zeros(2, 2), torch.ones(2)) is None
