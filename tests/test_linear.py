"""Linear classifiers: every closed form against enumeration, an optimiser, a simulation, or a published number."""

import copy
import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import nn

from tmlcourse import attacks, data, linear, models, training
from tmlcourse.linear import binary, robust_loss, worst_case
from tmlcourse.threat import L0, L1, L2, Linf

SETS = {"Linf": Linf(0.2), "L2": L2(0.7), "L1": L1(1.3), "L0": L0(3)}
OPEN = {"Linf": Linf(0.2, box=None), "L2": L2(0.7, box=None), "L1": L1(1.3, box=None)}
EVERY = [*SETS.values(), *OPEN.values()]
each_set = pytest.mark.parametrize("threat", EVERY, ids=str)


def problem(seed=0, n=24, shape=(1, 3, 5), classes=4):
    """A linear model in double precision, images partly on the edge of the box, labels that are mostly right."""
    g = torch.Generator().manual_seed(seed)
    model = (models.linear(shape, classes, seed=seed) if classes > 2 else binary(shape, seed=seed)).double()
    x = torch.rand(n, *shape, generator=g, dtype=torch.float64)
    x[x < 0.2], x[x > 0.8] = 0, 1
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return model, x, y


def two_digits(split, a, b, source="digits"):
    """The images of two digits, labels 0 (for a) and 1 (for b)."""
    d = data.load(source, split)
    d = d[(d.y == a) | (d.y == b)]
    return replace(d, y=(d.y == b).long(), classes=(str(a), str(b)))


def train(digits, threat, surrogate, lr, epochs, spread=None, seed=0):
    """A binary model by the settings of the article and the tutorial: plain SGD, batches of 100, a constant rate."""
    model = binary(digits.shape, spread=spread, seed=seed)
    loss = robust_loss(threat, surrogate)
    training.fit(model, digits, epochs=epochs, lr=lr, loss=loss, optimizer=torch.optim.SGD,
                 schedule=training.constant, seed=seed)  # fmt: skip
    return model


def gain_by_solver(g, x, threat):
    """max of <g, delta> over ball and box by a general solver: an LP (Linf, L1) or SLSQP (L2); L0 by enumeration."""
    d = len(g)
    low, high = (np.full(d, -np.inf), np.full(d, np.inf)) if threat.box is None else (-x, 1 - x)
    if isinstance(threat, L0):
        best = np.where(g > 0, g * high, g * low)
        return max(best[list(chosen)].sum() for chosen in itertools.combinations(range(d), threat.k))
    if isinstance(threat, Linf):
        bounds = list(zip(np.maximum(low, -threat.eps), np.minimum(high, threat.eps), strict=True))
        return -linprog(-g, bounds=bounds).fun
    if isinstance(threat, L1):  # delta = up - down
        bounds = [(0, None if np.isinf(v) else v) for v in (*high, *-low)]
        return -linprog(np.r_[-g, g], A_ub=np.ones((1, 2 * d)), b_ub=[threat.eps], bounds=bounds).fun
    ball = {"type": "ineq", "fun": lambda v: threat.eps**2 - v @ v, "jac": lambda v: -2 * v}
    options = {"ftol": 1e-14, "maxiter": 500}
    bounds = list(zip(low, high, strict=True))
    return -minimize(lambda v: -g @ v, np.zeros(d), jac=lambda v: -g, bounds=bounds, constraints=[ball], method="SLSQP",
                     options=options).fun  # fmt: skip


# --- the model as one W and one b ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [
    models.linear((2, 4, 3), 5, mean=[0.1, 0.3], std=[0.5, 2.0], seed=0),
    binary((2, 4, 3), mean=0.2, std=0.7, seed=1),
    nn.Sequential(nn.Sequential(models.Normalize(0.1, 0.5), models.Normalize(0.4, 3.0)), nn.Identity(), nn.Flatten(),
                  nn.Linear(24, 3, bias=False)),
], ids=["channels", "binary", "nested"])  # fmt: skip
def test_affine_is_the_model(model):
    x = torch.rand(6, 2, 4, 3, dtype=torch.float64)
    model = model.double()
    W, b = linear.affine(model, (2, 4, 3))
    torch.testing.assert_close(x.flatten(1) @ W.flatten(1).T + b, model(x), atol=1e-12, rtol=0)
    assert W.requires_grad


def test_two_logits_are_the_logistic_loss_of_one_score():
    model, x, y = problem(classes=2)
    f = model[:-1](x)[:, 0]
    torch.testing.assert_close(F.cross_entropy(model(x), y, reduction="none"), linear.logistic((2 * y - 1) * f))


# --- the exact worst case --------------------------------------------------------------------------------------------


@each_set
@pytest.mark.parametrize("classes", [2, 4])
def test_margins_are_what_a_solver_finds(threat, classes):
    model, x, y = problem(1, n=6, classes=classes)
    W, _ = linear.affine(model, x.shape[1:])
    W, found = W.detach().flatten(1).numpy(), linear.margins(model, x, y, threat)
    z = model(x).detach()
    for i, t in itertools.product(range(len(x)), range(classes)):
        if t == y[i]:
            assert found[i, t] == 0
            continue
        gain = gain_by_solver(W[t] - W[y[i]], x[i].flatten().numpy(), threat)
        assert found[i, t].item() == pytest.approx((z[i, y[i]] - z[i, t]).item() - gain, abs=1e-6)


@pytest.mark.parametrize("q, name", [(1, "Linf"), (2, "L2"), (math.inf, "L1")])
def test_without_the_box_the_price_is_the_dual_norm(q, name):
    model, x, y = problem(2, classes=2)
    w, b, sign = model[1].weight[0].detach(), model[1].bias.detach(), 2 * y - 1
    worst = sign * (x.flatten(1) @ w + b) - OPEN[name].eps * w.norm(q)
    found = linear.margins(model, x, y, OPEN[name]).gather(1, 1 - y[:, None])[:, 0]
    torch.testing.assert_close(found, worst, atol=1e-12, rtol=0)
    for surrogate in (linear.hinge, linear.logistic, linear.exponential):
        torch.testing.assert_close(
            linear.robust_risk(model, x, y, OPEN[name], surrogate), surrogate(worst).mean().item()
        )


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_no_vertex_of_the_cube_is_worse(box):
    """All 2^10 corners: the maximum of a linear function over a box is at one of them."""
    model, x, y = problem(3, n=8, shape=(1, 2, 5), classes=2)
    corners = torch.tensor(list(itertools.product((-0.3, 0.3), repeat=10)), dtype=torch.float64).view(-1, 1, 2, 5)
    reached = []
    for xi, yi in zip(x, y, strict=True):
        at = xi + corners
        f = model[:-1](at if box is None else at.clamp(*box))[:, 0]
        reached.append(((2 * yi - 1) * f).min())
    found = linear.margins(model, x, y, Linf(0.3, box=box)).gather(1, 1 - y[:, None])[:, 0]
    torch.testing.assert_close(found, torch.stack(reached).detach(), atol=1e-12, rtol=0)


@each_set
def test_the_worst_image_reaches_the_margin_and_stays_in_the_set(threat):
    model, x, y = problem(4)
    x_adv = worst_case(model, x, y, threat)
    assert threat.contains(x_adv, x, tolerance=1e-9).all()
    exact = linear.margins(model, x, y, threat).scatter(1, y[:, None], torch.inf).amin(1)
    torch.testing.assert_close(-attacks.margin(model(x_adv), y).detach(), exact, atol=1e-9, rtol=0)
    target = (y + 2) % 4
    z = model(worst_case(model, x, y, threat, target=target)).detach()
    aimed = -attacks.difference(z, y, target)
    torch.testing.assert_close(aimed, linear.margins(model, x, y, threat).gather(1, target[:, None])[:, 0], atol=1e-9,
                               rtol=0)  # fmt: skip


@given(st.integers(0, 2**31), st.sampled_from(EVERY), st.sampled_from([2, 3]))
def test_nothing_random_is_worse_than_the_worst_case(seed, threat, classes):
    model, x, y = problem(seed % 1000, n=16, shape=(2, 2, 3), classes=classes)
    worst = linear.margins(model, x, y, threat).scatter(1, y[:, None], torch.inf).amin(1)
    tried = model(threat.random(x, torch.Generator().manual_seed(seed)))
    assert (-attacks.margin(tried, y) >= worst - 1e-9).all()


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_more_budget_is_worse_and_the_box_protects(kind):
    model, x, y = problem(5)
    grid = [linear.margins(model, x, y, kind(eps)) for eps in (0.0, 0.1, 0.3, 1.0, 100.0)]
    assert all((b <= a + 1e-12).all() for a, b in itertools.pairwise(grid))
    z = model(x).detach()
    torch.testing.assert_close(grid[0], z.gather(1, y[:, None]) - z, atol=1e-12, rtol=0)
    assert (linear.margins(model, x, y, kind(0.3, box=None)) <= grid[2] + 1e-12).all()
    accuracies = [linear.robust_accuracy(model, x, y, kind(eps)) for eps in (0.0, 0.1, 0.3)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == training.accuracy(model, x, y)


@each_set
def test_an_attack_that_searches_finds_no_more(threat):
    """PGD reaches the exact robust accuracy from above, up to its last steps, and never goes below it."""
    for classes in (2, 4):
        model, x, y = problem(6, n=200, classes=classes)
        attack = functools.partial(attacks.pgd, steps=80, loss="margin")
        searched = attacks.robust_accuracy(model, x, y, threat, [attack], seed=0).accuracy
        exact = linear.robust_accuracy(model, x, y, threat)
        assert exact <= searched
        assert classes > 2 or isinstance(threat, L0) or searched <= exact + 0.02
        assert attacks.robust_accuracy(model, x, y, threat, [worst_case]).accuracy == exact


# --- the minimum norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
@pytest.mark.parametrize("classes", [2, 4])
def test_at_the_distance_the_margin_is_zero(kind, box, classes):
    model, x, y = problem(7, classes=classes)
    far = linear.distance(model, x, y, kind(0.0, box=box))
    wrong = model(x).argmax(1) != y
    assert (far[wrong] == 0).all() and wrong.any()
    assert far[~wrong].isfinite().all() and (far[~wrong] > 0).all()
    for i in (~wrong).nonzero()[:, 0]:
        one = slice(int(i), int(i) + 1)
        worst = linear.margins(model, x[one], y[one], kind(far[i].item(), box=box)).scatter(1, y[one, None], 1.0)
        assert worst.amin().item() == pytest.approx(0, abs=1e-9)


def test_the_distance_is_infinite_where_the_box_lets_nothing_succeed():
    model = binary((1, 1, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
        model[1].bias.fill_(0.5)
    x, y = torch.tensor([[[[0.4, 0.2]]]], dtype=torch.float64), torch.tensor([1])
    for kind in (Linf, L2, L1):
        assert linear.distance(model, x, y, kind(1.0)).item() == math.inf
        assert linear.distance(model, x, y, kind(1.0, box=None)).isfinite().all()
    assert linear.robust_accuracy(model, x, y, Linf(5.0)) == 1


def test_equal_rows_are_a_tie_and_no_distance_is_negative():
    model = models.linear((1, 2, 2), 3, seed=0).double()
    with torch.no_grad():
        model[1].weight[1] = model[1].weight[0]
        model[1].bias[:] = torch.tensor([0.3, 0.1, -9.0])
    x = torch.rand(4, 1, 2, 2, dtype=torch.float64)
    for y, expected in ((0, "positive"), (1, "zero")):
        for threat in (Linf(0.1), L2(0.1), L1(0.1), Linf(0.1, box=None)):
            far = linear.distance(model, x, torch.full((4,), y), threat)
            assert ((far > 0) if expected == "positive" else (far == 0)).all()


# --- losses and their gradients --------------------------------------------------------------------------------------


def test_surrogates_bound_the_error_and_the_natural_logarithm_does_not():
    m = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    error = linear.zero_one(m)
    for surrogate in (linear.hinge, linear.exponential, functools.partial(linear.logistic, base=2)):
        assert (surrogate(m) >= error - 1e-12).all()
        assert (surrogate(m).diff() <= 0).all()
    zero = torch.zeros(1, dtype=torch.float64)
    assert linear.logistic(zero).item() == pytest.approx(math.log(2), abs=1e-12)
    assert linear.logistic(zero).item() < linear.zero_one(zero).item() == 1


def test_the_robust_hinge_gradient_is_the_formula():
    """-y' x + eps sign(w) where the margin is below 1 + eps ||w||_1, nothing elsewhere."""
    model, x, y = problem(8, classes=2)
    with torch.no_grad():
        model[1].weight.mul_(6)
    w, sign = model[1].weight[0], (2 * y - 1).double()
    value, z = robust_loss(Linf(0.1, box=None))(model, x, y)
    torch.testing.assert_close(z, model(x))
    gw, gb = torch.autograd.grad(value, (model[1].weight, model[1].bias))
    active = sign * (z[:, 1] - z[:, 0]) < 1 + 0.1 * w.abs().sum()
    assert active.any() and not active.all()
    each = (-sign[:, None] * x.flatten(1) + 0.1 * w.sign()) * active[:, None]
    torch.testing.assert_close(gw[0], each.mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(gb[0], (-sign * active).mean(), atol=1e-12, rtol=0)


@each_set
@pytest.mark.parametrize("surrogate", [linear.hinge, linear.logistic])
def test_danskin_by_finite_differences(threat, surrogate):
    """The gradient of the maximum, at the maximiser, is the slope of the maximum itself."""
    model, x, y = problem(9, classes=3)
    loss = robust_loss(threat, surrogate)
    value, _ = loss(model, x, y)
    grads = torch.autograd.grad(value, list(model.parameters()))
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in model.parameters()]
        ends = []
        for h in (-1e-6, 1e-6):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, v in zip(moved.parameters(), directions, strict=True):
                    p.add_(v, alpha=h)
            ends.append(loss(moved, x, y)[0].item())
        slope = (ends[1] - ends[0]) / 2e-6
        assert slope == pytest.approx(
            sum((a * v).sum().item() for a, v in zip(grads, directions, strict=True)), abs=1e-6
        )


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_the_robust_loss_is_convex_in_the_weights(seed, a):
    _, x, y = problem(10, classes=2)
    p, q, mid = (binary((1, 3, 5), seed=seed % 1000 + k).double() for k in range(3))
    with torch.no_grad():
        for m, u, v in zip(mid.parameters(), p.parameters(), q.parameters(), strict=True):
            m.copy_(a * u + (1 - a) * v)
    for threat in OPEN.values():
        f = [robust_loss(threat, linear.logistic)(m, x, y)[0].item() for m in (p, q, mid)]
        assert f[2] <= a * f[0] + (1 - a) * f[1] + 1e-12


def test_the_exact_loss_is_the_loss_of_the_exact_attack():
    model, x, y = problem(11, classes=2)
    for threat in EVERY:
        attacked = F.cross_entropy(model(worst_case(model, x, y, threat)), y)
        torch.testing.assert_close(robust_loss(threat, linear.logistic)(model, x, y)[0], attacked, atol=1e-9, rtol=0)


# --- the theorems ----------------------------------------------------------------------------------------------------


def phi(t):
    return 0.5 * math.erfc(-t / math.sqrt(2))


def test_gaussian_risk_is_the_published_closed_form():
    for d, sigma, eps in ((100, 5.0, 0.25), (400, 3.0, 0.5)):
        one = torch.ones(d)
        assert linear.gaussian_risk(one, one, sigma, Linf(0.0, box=None)).item() == pytest.approx(
            phi(-math.sqrt(d) / sigma)
        )
        found = linear.gaussian_risk(one, one, sigma, Linf(eps, box=None)).item()
        assert found == pytest.approx(phi(-(1 - eps) * math.sqrt(d) / sigma), rel=1e-9)


@pytest.mark.parametrize("threat", OPEN.values(), ids=str)
def test_gaussian_risk_is_what_a_simulation_finds(threat):
    g = torch.Generator().manual_seed(0)
    w, mean = torch.randn(2, 12, generator=g, dtype=torch.float64)
    mean = mean + w
    y = torch.randint(0, 2, (200_000, 1), generator=g) * 2 - 1
    x = y * mean + 3 * torch.randn(200_000, 12, generator=g, dtype=torch.float64)
    error = ((y * x) @ w - threat.eps * threat.dual_norm(w[None]) <= 0).double().mean().item()
    assert linear.gaussian_risk(w, mean, 3.0, threat).item() == pytest.approx(error, abs=0.004)


@pytest.mark.parametrize("d, natural, robust", [(100, 0.0011, 0.027), (400, 0.0003, 0.040), (1600, 0.0001, 0.102)])
def test_one_sample_is_enough_for_accuracy_and_not_for_robustness(d, natural, robust):
    """Learn from one example: w = y x. The gap widens with d (the reference values are means of 200 other draws)."""
    g, sigma = torch.Generator().manual_seed(0), d**0.25 / 2
    w = 1 + sigma * torch.randn(400, d, generator=g)
    found = [linear.gaussian_risk(w, torch.ones(d), sigma, Linf(eps, box=None)).mean().item() for eps in (0.0, 0.25)]
    assert found[0] == pytest.approx(natural, abs=0.0006)
    assert found[1] == pytest.approx(robust, rel=0.25)


def test_robustness_at_odds_with_accuracy():
    d, p = 400, 0.95
    for c, accuracy, attacked in ((3, 0.9986501, 0.0013499), (4, 0.9999683, 3.17e-5)):
        eta, average = c / math.sqrt(d), torch.tensor([0.0] + [1 / d] * d)
        right = [1 - linear.two_feature_risk(average, p, eta, Linf(k * eta, box=None)).item() for k in (0, 1, 2)]
        assert right == pytest.approx([accuracy, 0.5, attacked], abs=1e-6)
    strong = torch.tensor([1.0] + [0.0] * d)
    assert linear.two_feature_risk(strong, p, 0.2, Linf(0.9, box=None)).item() == pytest.approx(0.05)
    assert linear.two_feature_risk(strong, p, 0.2, Linf(1.0, box=None)).item() == 1
    assert linear.no_free_lunch(0.95, 0.01) == pytest.approx(0.19)


@given(st.floats(0.5, 0.99), st.floats(0.05, 0.6), st.lists(st.floats(-1, 1), min_size=6, max_size=6).filter(any))
def test_no_linear_classifier_breaks_the_theorem(p, eta, w):
    w = torch.tensor(w, dtype=torch.float64)
    if w.abs().amax() < 1e-6:
        return
    natural = linear.two_feature_risk(w, p, eta, Linf(0.0, box=None)).item()
    robust = 1 - linear.two_feature_risk(w, p, eta, Linf(2 * eta, box=None)).item()
    assert robust <= linear.no_free_lunch(p, natural) + 1e-9


# --- published experiments, on MNIST and in small on the embedded digits ---------------------------------------------

ARTICLE = {
    0.0: (99.90, (0.25, 0.0)),
    0.1: (99.85, (0.99, 0.91)),
    0.2: (99.90, (0.99, 0.96)),
    0.3: (99.76, (0.99, 0.95)),
}


@pytest.mark.parametrize("eps", ARTICLE)
def test_the_article_comes_out_on_mnist(eps, mnist):
    published, attacked = ARTICLE[eps]
    glorot, lr = math.sqrt(6 / 785), 0.01 if eps else 0.1
    model = train(two_digits("train", 0, 1, "mnist"), Linf(eps, box=None), linear.hinge, lr, 10, glorot)
    test = two_digits("test", 0, 1, "mnist")
    assert 100 * training.accuracy(model, test.x, test.y) == pytest.approx(published, abs=0.1)
    for budget, value in zip((0.1, 0.2), attacked, strict=True):
        assert linear.robust_accuracy(model, test.x, test.y, Linf(budget, box=None)) == pytest.approx(value, abs=0.05)


def test_the_tutorial_comes_out_on_mnist(mnist):
    digits, test, threat = two_digits("train", 0, 1, "mnist"), two_digits("test", 0, 1, "mnist"), Linf(0.2, box=None)
    assert (len(digits), len(test)) == (12_665, 2_115)
    model = train(digits, Linf(0.0, box=None), linear.logistic, 1.0, 10)
    assert linear.robust_risk(model, test.x, test.y, Linf(0.0), linear.zero_one) == pytest.approx(0.000473, abs=0.001)
    assert linear.robust_risk(model, test.x, test.y, threat, linear.zero_one) == pytest.approx(0.840, abs=0.05)
    assert linear.robust_risk(model, test.x, test.y, threat, linear.logistic) == pytest.approx(3.244, abs=0.25)
    robust = train(digits, threat, linear.logistic, 0.1, 20)
    assert linear.robust_risk(robust, test.x, test.y, threat, linear.zero_one) == pytest.approx(0.0236, abs=0.004)
    assert linear.robust_risk(robust, test.x, test.y, threat, linear.logistic) == pytest.approx(0.0984, abs=0.006)
    assert linear.robust_risk(robust, test.x, test.y, Linf(0.0), linear.zero_one) == pytest.approx(0.00378, abs=0.001)


def test_three_against_seven_comes_out_on_mnist(mnist):
    model = train(two_digits("train", 3, 7, "mnist"), Linf(0.0), linear.logistic, 0.3, 10)
    test = two_digits("test", 3, 7, "mnist")
    assert linear.robust_risk(model, test.x, test.y, Linf(0.0), linear.zero_one) == pytest.approx(0.016, abs=0.003)
    assert linear.robust_risk(model, test.x, test.y, Linf(0.25, box=None), linear.zero_one) >= 0.99


def test_robust_training_pays_on_the_embedded_digits():
    digits, test, threat = two_digits("train", 0, 1), two_digits("test", 0, 1), Linf(0.2, box=None)
    regular = train(digits, Linf(0.0), linear.hinge, 0.1, 40)
    robust = binary(digits.shape, spread=0.0)
    training.fit(robust, digits, epochs=800, batch_size=300, lr=1.0, loss=robust_loss(threat), optimizer=torch.optim.SGD,
                 seed=0)  # fmt: skip
    risk = [linear.robust_risk(m, digits.x, digits.y, threat) for m in (regular, robust)]
    assert risk[1] < 0.7 * risk[0]
    assert training.accuracy(robust, test.x, test.y) > 0.97
    optimum = smallest_robust_hinge(digits, 0.2)
    assert optimum - 1e-6 <= risk[1] <= 1.15 * optimum


def smallest_robust_hinge(digits, eps):
    """min over w, b of the mean robust hinge, as a linear program: xi_i >= 1 - y'(w^T x_i + b) + eps sum u, u >= |w|."""
    x, sign = digits.x.flatten(1).numpy().astype(float), (2 * digits.y - 1).numpy().astype(float)
    (n, d), eye = x.shape, np.eye(x.shape[1])
    cost = np.r_[np.zeros(2 * d + 1), np.full(n, 1 / n)]
    rows = [
        np.c_[-sign[:, None] * x, np.full((n, d), eps), -sign, -np.eye(n)],
        np.c_[eye, -eye, np.zeros((d, n + 1))],
        np.c_[-eye, -eye, np.zeros((d, n + 1))],
    ]
    bounds = [(None, None)] * (2 * d + 1) + [(0, None)] * n
    return linprog(cost, A_ub=np.vstack(rows), b_ub=np.r_[-np.ones(n), np.zeros(2 * d)], bounds=bounds).fun


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_weight_whose_pixel_is_always_dark_stays_where_it_started(spread):
    """Regular training gives it no gradient; robust training pulls it in. Its start alone decides its fragility."""
    digits = two_digits("train", 0, 1)
    dark = digits.x.amax(0).flatten() == 0
    assert dark.any()
    layer = binary(digits.shape, spread=spread, seed=0)[1]
    start = layer.weight[0].detach()
    assert layer.bias.item() == 0 and start.abs().max() <= spread
    regular, robust = (train(digits, t, linear.hinge, 0.05, 10, spread)[1].weight[0] for t in (Linf(0.0), OPEN["Linf"]))
    assert torch.equal(regular[dark], start[dark])
    if spread:
        assert robust[dark].abs().mean() < 0.5 * start[dark].abs().mean()


# --- what every function owes ----------------------------------------------------------------------------------------

CALLS = {
    "worst_case": worst_case,
    "margins": linear.margins,
    "robust_accuracy": linear.robust_accuracy,
    "robust_risk": linear.robust_risk,
    "distance": linear.distance,
}


@pytest.mark.parametrize("name", CALLS)
def test_it_leaves_no_trace_and_keeps_the_precision(name):
    model, x, y = problem(12)
    model, x = model.float().train(), x.float()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    images = x.clone()
    for threat in (L2(0.5), L1(0.5, box=None)):
        out = CALLS[name](model, x, y, threat)
        assert isinstance(out, float) or (out.dtype == torch.float32 and not out.requires_grad)
    assert torch.equal(x, images) and model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("threat", [*EVERY, Linf(0.0), L2(0.0), L1(0.0), L0(0), L0(1000), L1(1e6), L2(1e6)], ids=str)
def test_single_precision_stays_in_the_set_and_one_image_is_enough(threat):
    model, x, y = problem(13, n=30)
    model, x = model.float(), x.float()
    x_adv = worst_case(model, x, y, threat)
    assert threat.contains(x_adv, x).all()
    assert x_adv.isfinite().all()
    single = torch.cat([worst_case(model, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))])
    torch.testing.assert_close(single, x_adv, atol=1e-6, rtol=0)
    if threat.eps == 0:
        assert torch.equal(x_adv, x)


def test_a_flat_image_and_a_constant_model_are_fine():
    model, x, y = nn.Linear(5, 2), torch.rand(3, 5), torch.tensor([0, 1, 0])
    assert worst_case(model, x, y, Linf(0.1)).shape == x.shape
    flat = models.linear((1, 2, 2), 2, seed=0)
    nn.init.zeros_(flat[1].weight), nn.init.zeros_(flat[1].bias)
    x = torch.rand(3, 1, 2, 2)
    for threat in EVERY:
        assert torch.equal(worst_case(flat, x, y, threat), x)
        value, _ = robust_loss(threat)(flat, x, y)
        value.backward()
        assert value.item() == 1
        assert flat[1].weight.grad.isfinite().all()
    assert linear.robust_accuracy(flat, x, y, Linf(0.1)) == 0, "a tie is an error"


MODEL, X, Y = problem(14, n=4)
W = torch.ones(3)
GAUSS = Linf(0.1, box=None)
BAD = [
    (lambda: linear.margins(MODEL, X * 300, Y, GAUSS), ValueError, "x: got values"),
    (lambda: linear.margins(MODEL, X, Y + 7, GAUSS), ValueError, "y: got label"),
    (lambda: linear.margins(MODEL, X, Y.float(), GAUSS), TypeError, "y: got dtype"),
    (lambda: linear.margins(models.mlp((1, 3, 5), 4, hidden=(3,)), X, Y, GAUSS), ValueError, "got 2 nn.Linear"),
    (
        lambda: linear.margins(nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.ReLU()), X.float(), Y, GAUSS),
        ValueError,
        "model: got layer ReLU",
    ),
    (
        lambda: linear.margins(
            nn.Sequential(nn.Flatten(), nn.Linear(15, 4), models.Normalize(0, 1)), X.float(), Y, GAUSS
        ),
        ValueError,
        "model: got layer Normalize",
    ),
    (lambda: linear.affine(lambda x: x, (1, 3, 5)), TypeError, "model: got function"),
    (lambda: linear.affine(MODEL, (1, 3, 4)), ValueError, "shape: got"),
    (lambda: worst_case(MODEL, X, Y, GAUSS, target=Y), ValueError, "target: got the true label of 4 images"),
    (lambda: worst_case(MODEL, X, Y, GAUSS, target=Y + 9), ValueError, "target: got label"),
    (lambda: linear.distance(MODEL, X, Y, L0(3)), TypeError, "threat: got L0"),
    (lambda: robust_loss(0.1), TypeError, "threat: got float"),
    (lambda: binary((0, 2)), ValueError, "shape: got"),
    (lambda: binary((1, 2, 2), mean=0.1), ValueError, "mean, std"),
    (lambda: binary((1, 2, 2), spread=-1.0), ValueError, "spread: got"),
    (lambda: linear.gaussian_risk(W, W, 1.0, Linf(0.1)), ValueError, "threat: got box"),
    (lambda: linear.gaussian_risk(W, W[:2], 1.0, GAUSS), ValueError, "mean: got"),
    (lambda: linear.gaussian_risk(W, W, 0.0, GAUSS), ValueError, "sigma: got 0"),
    (lambda: linear.gaussian_risk(0 * W, W, 1.0, GAUSS), ValueError, "w: got"),
    (lambda: linear.gaussian_risk([1.0], W, 1.0, GAUSS), TypeError, "w: got list"),
    (lambda: linear.two_feature_risk(W, 0.2, 0.1, GAUSS), ValueError, "p: got"),
    (lambda: linear.no_free_lunch(1.0, 0.1), ValueError, "p: got"),
    (lambda: linear.no_free_lunch(0.9, 2.0), ValueError, "delta: got"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
