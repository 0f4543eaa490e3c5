"""Influence functions: closed forms, training again, the poisoning package's derivative, and bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmlcourse import data
from tmlcourse.interpret.influence import (
    influence,
    leverages,
    modification,
    poison,
    regression,
    relabelling,
    removal,
    retrain,
)  # fmt: skip
from tmlcourse.poisoning import fit, implicit_gradient, logistic, ridge


def table(n=40, d=4, seed=0, kind="logistic"):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "squared":
        return X, X @ torch.arange(1.0, d + 1).double() + noise
    if kind == "softmax":
        return X, (X[:, :3] + noise[:, None] * torch.tensor([1.0, 0.0, -1.0])).argmax(1)
    return X, (X[:, 0] + noise > 0).long()


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# ---- the model


def test_the_optimum_is_that_of_the_poisoning_package_and_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    X, y = table()
    model = regression(X, y, lam=0.05)
    same = fit(logistic(0.05 * len(X)), X, y.double() * 2 - 1).model
    assert torch.allclose(model.theta[:, 0], same, atol=1e-9)
    theirs = LogisticRegression(C=1 / (0.05 * len(X)), tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
    assert torch.allclose(model.theta[:-1, 0], torch.from_numpy(theirs.coef_[0]), atol=1e-5)
    X, y = table(kind="squared")
    assert torch.allclose(regression(X, y, loss="squared", lam=0.05).theta[:, 0], fit(ridge(0.05 * len(X)), X, y).model)
    X, y = table(kind="softmax")
    model = regression(X, y, loss="softmax", lam=0.05)
    theirs = LogisticRegression(C=1 / (0.05 * len(X)), tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
    assert torch.allclose(model.theta[:-1].T, torch.from_numpy(theirs.coef_), atol=1e-5)
    assert (model.predict(X) == torch.from_numpy(theirs.predict(X.numpy()))).all()


# ---- closed forms


@given(st.integers(0, 50), st.floats(0, 1))
def test_ridge_is_exact_for_removals_with_leverage_and_for_labels_without(seed, lam):
    X, y = table(seed=seed, kind="squared")
    model, test, dummy = regression(X, y, loss="squared", lam=lam), X[:3] + 1, y[:3]
    i = torch.tensor([seed % len(X)])
    gone = retrain(model, i).scores(test) - model.scores(test)
    assert torch.allclose(removal(model, test, dummy, of="score")[:, i[0]], gone, atol=1e-9)
    first = removal(model, test, dummy, of="score", leverage=False)[:, i[0]]
    assert torch.allclose(first / (1 - leverages(model)[i]), gone, atol=1e-9)
    assert torch.allclose(-influence(model, test, dummy, of="score")[:, i[0]] / len(X), first)
    moved = retrain(model, i, y=y[i] + 3).scores(test) - model.scores(test)
    assert torch.allclose(relabelling(model, test, dummy, i, y[i] + 3, of="score")[:, 0], moved, atol=1e-9)


def test_leverages_sum_to_the_number_of_parameters():
    wine = data.load_table("wine")
    X, y = wine.X[:, 1:], wine.X[:, 0]
    X = (X - X.mean(0)) / X.std(0)
    h = leverages(regression(X, y, loss="squared", lam=0.0))
    Z = torch.cat([X, torch.ones(len(X), 1)], 1)
    assert abs(float(h.sum()) - 13) < 1e-9
    assert torch.allclose(h, (Z @ torch.linalg.inv(Z.T @ Z) * Z).sum(1))


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_influence_is_the_derivative_by_a_weight(kind):
    X, y = table(kind=kind)
    model = regression(X, y, loss=kind, lam=0.1)
    # Among 500 copies of the table one more copy of a point is a small weight.
    up = regression(
        torch.cat([X.repeat(500, 1), X[5:6]]), torch.cat([y.repeat(500), y[5:6]]), loss=kind, lam=0.1 * 20000 / 20001
    )
    change = (up.losses(X[:4], y[:4]) - model.losses(X[:4], y[:4])) * 500 * len(X)
    assert torch.allclose(influence(model, X[:4], y[:4])[:, 5], change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_removal_with_leverage_is_one_newton_step_of_the_problem_without_the_point(kind):
    X, y = table(kind=kind)
    model = regression(X, y, loss=kind, lam=0.02)
    keep = torch.arange(len(X)) != 7
    theta = model.theta.clone().requires_grad_()
    rows, codes = model.X[keep], model.y[keep]

    def objective(flat):
        z = rows @ flat.view_as(theta)
        one = (
            z.logsumexp(1) - (z * codes).sum(1)
            if kind == "softmax"
            else torch.nn.functional.softplus(z[:, 0]) - codes[:, 0] * z[:, 0]
        )
        return one.sum() + model.pull / 2 * flat.view_as(theta)[:-1].square().sum()

    flat = theta.detach().flatten()
    H, g = torch.func.hessian(objective)(flat), torch.func.grad(objective)(flat)
    step = -(torch.linalg.pinv(H, rtol=1e-12) @ g).view_as(theta)
    test = torch.cat([X[:3], torch.ones(3, 1)], 1).double()
    z = test @ model.theta
    code = (y[:3, None] == model.labels).double()
    residual = z.softmax(1) - code if kind == "softmax" else z.sigmoid() - code[:, 1:]
    expected = ((test @ step) * residual).sum(1)
    assert torch.allclose(removal(model, X[:3], y[:3])[:, 7], expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["logistic", "softmax", "squared"])
def test_modification_is_the_derivative_by_the_features(kind):
    X, y = table(kind=kind)
    model = regression(X, y, loss=kind, lam=0.05)
    point, step = torch.tensor([3]), 1e-5
    slope = modification(model, X[:2] + 0.5, y[:2], point)[:, 0] / len(X)
    for k in range(X.shape[1]):
        ends = []
        for sign in (1, -1):
            x = X[point].clone()
            x[0, k] += sign * step
            ends.append(retrain(model, point, X=x).losses(X[:2] + 0.5, y[:2]))
        assert torch.allclose((ends[0] - ends[1]) / (2 * step), slope[:, k], rtol=1e-4, atol=1e-7)


def test_modification_is_the_derivative_of_the_poisoning_package():
    X, y = table()
    model = regression(X, y, lam=0.05)
    solved = fit(logistic(0.05 * len(X)), X, y.double() * 2 - 1)
    by_kkt = implicit_gradient(solved, lambda w: w[:-1] @ X[0] + w[-1])[0]
    ours = modification(model, X[:1], torch.tensor([1]), torch.arange(len(X)), of="score")[0] / len(X)
    assert torch.allclose(by_kkt, ours, atol=1e-9)


# ---- solvers


@pytest.mark.parametrize("kind", ["logistic", "softmax", "squared"])
def test_conjugate_gradients_and_lissa_agree_with_cholesky(kind):
    X, y = table(n=200, kind=kind)
    model = regression(X, y, loss=kind, lam=0.1)
    exact = influence(model, X[:5], y[:5])
    assert torch.allclose(influence(model, X[:5], y[:5], solver="cg"), exact, atol=1e-6 * float(exact.abs().max()))
    noisy = influence(model, X[:5], y[:5], solver="lissa", seed=0, batch=50)
    assert pearson(noisy, exact) > 0.99 and abs(float(noisy.norm() / exact.norm()) - 1) < 0.1
    assert torch.equal(noisy, influence(model, X[:5], y[:5], solver="lissa", seed=0, batch=50))
    state = torch.get_rng_state()
    influence(model, X[:1], y[:1], solver="lissa", seed=0, steps=3)
    assert torch.equal(state, torch.get_rng_state())


# ---- images


def ones_and_sevens(full):
    two = full[(full.y == 1) | (full.y == 7)]
    return two.x, two.y


def check_against_retraining(X, y, x_test, y_test):
    model = regression(X, y, lam=0.01)
    hardest = model.losses(x_test, y_test).topk(1).indices
    test, label = x_test[hardest], y_test[hardest]
    effect = influence(model, test, label)[0]
    points = torch.cat([effect.abs().topk(10).indices, torch.arange(0, len(X), len(X) // 9)]).unique()
    before = model.losses(test, label)
    actual = torch.cat([retrain(model, i[None]).losses(test, label) - before for i in points])
    assert pearson(removal(model, test, label)[0, points], actual) > 0.999
    return pearson(removal(model, test, label, leverage=False)[0, points], actual)


def test_influence_predicts_training_again_on_digits():
    train, test = data.load("digits", "train"), data.load("digits")
    assert check_against_retraining(*ones_and_sevens(train), *ones_and_sevens(test)) > 0.98


def test_influence_predicts_training_again_on_mnist(mnist):
    """At lambda .01, the setting of the figures of peers: Pearson .999 and better."""
    X, y = ones_and_sevens(data.load("mnist", "train"))
    assert check_against_retraining(X[:6000], y[:6000], *ones_and_sevens(mnist)) > 0.999


def test_one_changed_training_image_changes_a_prediction():
    (X, y), (x_test, y_test) = (ones_and_sevens(data.load("digits", split)) for split in ("train", "test"))
    X, y = X[:40], y[:40]
    model = regression(X, y, lam=0.001)
    right = model.predict(x_test) == y_test
    victim = torch.where(right, model.losses(x_test, y_test), 0).topk(1).indices
    point = modification(model, x_test[victim], y_test[victim], torch.arange(40)).abs().sum(2)[0].argmax()[None]
    attack = poison(model, x_test[victim], y_test[victim], point, eps=1.0, alpha=0.1, steps=30)
    assert model.predict(x_test[victim]) == y_test[victim] and attack.model.predict(x_test[victim]) != y_test[victim]
    assert attack.X.min() >= 0 and attack.X.max() <= 1 and attack.losses[-1] > attack.losses[0]
    small = poison(model, x_test[victim], y_test[victim], point, eps=0.05, steps=3)
    assert (small.X - X[point].flatten(1)).abs().max() <= 0.05 + 1e-12
    assert torch.equal(small.model.y, model.y)
    none = poison(model, x_test[victim], y_test[victim], point, eps=0.0)
    assert torch.equal(none.X, X[point].flatten(1).double()) and len(none.losses) == 1


# ---- bad input


def test_bad_input_is_named():
    X, y = table()
    model = regression(X, y)
    with pytest.raises(ValueError, match="singular"):
        regression(torch.cat([X, X[:, :1]], 1), y.double(), loss="squared", lam=0.0)
    with pytest.raises(ValueError, match="singular"):
        regression(X[:3], y[:3].double(), loss="squared", lam=0.0)
    with pytest.raises(ValueError, match="lam: got 0"):
        regression(X, (X[:, 0] > 0).long(), lam=0.0)
    with pytest.raises(ValueError, match="different labels"):
        regression(X, torch.zeros(len(X), dtype=torch.int64))
    with pytest.raises(ValueError, match="lam"):
        regression(X, y, lam=-1.0)
    with pytest.raises(ValueError, match="NaN"):
        regression(X / 0, y)
    with pytest.raises(TypeError, match="X: got torch.int64"):
        regression(y[:, None], y)
    with pytest.raises(ValueError, match="want int64 among"):
        influence(model, X[:1], torch.tensor([4]))
    with pytest.raises(ValueError, match="got 2 features, want 4"):
        influence(model, X[:1, :2], y[:1])
    with pytest.raises(ValueError, match="solver"):
        influence(model, X[:1], y[:1], solver="magic")
    with pytest.raises(ValueError, match="of: got"):
        influence(model, X[:1], y[:1], of="pixels")
    with pytest.raises(TypeError, match="model: got Linear"):
        influence(torch.nn.Linear(4, 2), X[:1], y[:1])
    with pytest.raises(ValueError, match="points"):
        retrain(model, torch.tensor([40]))
    with pytest.raises(ValueError, match="points"):
        modification(model, X[:1], y[:1], torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="points"):
        relabelling(model, X[:1], y[:1], [1], y[:1])
    with pytest.raises(ValueError, match="box"):
        poison(model, X[:1], y[:1], torch.tensor([0]), eps=0.1)
