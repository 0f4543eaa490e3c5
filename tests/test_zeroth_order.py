"""Zeroth order: estimators against their closed forms, optimisers against known minima, attacks against exact answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.attacks import fgsm, margin
from tmlcourse.attacks import zeroth_order as zo
from tmlcourse.attacks.queries import Queries
from tmlcourse.threat import L0, L1, L2, Linf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(n=3, d=7, seed=0):
    """f_i(x) = x^T A_i x / 2 + b_i^T x with A_i positive definite, its gradient, and points x."""
    g = generator(seed)
    root = torch.randn(n, d, d, generator=g, dtype=torch.float64)
    a = root @ root.transpose(1, 2) / d + 0.5 * torch.eye(d, dtype=torch.float64)
    b, x = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))

    def f(points, index):
        return ((points[:, None] @ a[index] @ points[:, :, None]).flatten() / 2) + (points * b[index]).sum(1)

    return f, (a @ x[:, :, None]).squeeze(2) + b, x, a, b


def linear_f(n=3, d=7, seed=0):
    w = torch.randn(n, d, generator=generator(seed), dtype=torch.float64)
    return (lambda points, index: (points.flatten(1) * w[index]).sum(1)), w


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


# --- estimators ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.floats(1e-3, 10), st.integers(0, 9))
def test_symmetric_differences_are_exact_on_quadratics(d, beta, seed):
    f, gradient, x, _, _ = quadratic(d=d, seed=seed)
    g, queries = zo.coordinates(beta=beta)(f, x)
    torch.testing.assert_close(g, gradient, atol=1e-8, rtol=1e-8)
    assert queries == 2 * d == zo.coordinates().queries(d)


def test_the_error_of_symmetric_differences_is_beta_squared_over_six_times_the_third_derivative():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
    errors = []
    for beta in (0.2, 0.1, 0.05):
        g, _ = zo.coordinates(beta=beta)(lambda p, i: p.exp().sum(1), x)
        error = (g - x.exp()).abs()
        assert (error <= beta**2 / 6 * (x + beta).exp()).all() and (error >= beta**2 / 6 * (x - beta).exp()).all()
        errors.append(error.mean().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02) == errors[1] / errors[2]


def test_random_coordinates_are_the_full_estimate_in_k_places():
    f, gradient, x, _, _ = quadratic(n=200, d=6)
    g, queries = zo.coordinates(2)(f, x, generator())
    chosen = g != 0
    assert queries == 4 and (chosen.sum(1) == 2).all()
    torch.testing.assert_close(g[chosen], gradient[chosen], atol=1e-8, rtol=1e-8)
    assert (chosen.float().mean(0) - 1 / 3).abs().max() < 0.12, "every coordinate gets its turn"


@given(st.integers(1, 11), st.integers(1, 12), st.integers(0, 5))
def test_groups_give_each_coordinate_the_mean_of_its_group(d, size, seed):
    f, w = linear_f(d=d, seed=seed)
    x = torch.zeros(3, d, dtype=torch.float64)
    estimator = zo.groups(size)
    u = estimator.draw(x, generator(seed))
    assert torch.equal((u != 0).sum(1), torch.ones(3, d, dtype=torch.int64)), "a partition"
    assert (u != 0).sum(2).max() <= size and u.shape[1] == math.ceil(d / size)
    torch.testing.assert_close(u @ u.transpose(1, 2), torch.eye(u.shape[1]).double().expand(3, -1, -1))
    g, queries = estimator(f, x, generator(seed))
    member = (u != 0).double()
    means = (member @ w[:, :, None]) / member.sum(2, keepdim=True)
    torch.testing.assert_close(g, (member.transpose(1, 2) @ means).squeeze(2), atol=1e-8, rtol=1e-8)
    assert queries == 2 * math.ceil(d / size)
    torch.testing.assert_close(zo.groups(1)(f, x, generator(seed))[0], w, atol=1e-8, rtol=1e-8)


def test_components_project_the_gradient_on_their_span():
    x = torch.rand(30, 1, 3, 4, generator=generator(), dtype=torch.float64)
    basis = zo.principal_components(x, 5)
    centred = x.flatten(1) - x.flatten(1).mean(0)
    values = torch.linalg.eigvalsh(centred.t() @ centred)
    torch.testing.assert_close((centred @ basis.t()).square().sum(0), values.flip(0)[:5], atol=1e-9, rtol=1e-9)
    f, w = linear_f(d=12)
    g, queries = zo.components(basis)(f, x[:3])
    torch.testing.assert_close(g.flatten(1), w @ basis.t() @ basis, atol=1e-9, rtol=1e-9)
    assert queries == 10
    with pytest.raises(ValueError, match="orthonormal"):
        zo.components(2 * basis)
    with pytest.raises(ValueError, match="k: got 31"):
        zo.principal_components(x, 31)


@pytest.mark.parametrize("antithetic", [True, False])
def test_d_u_u_t_is_the_identity_on_average_and_exactly_over_a_basis(antithetic):
    d = 7
    f, w = linear_f(d=d)
    x = torch.zeros(3, d, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator(1), dtype=torch.float64)).Q
    over_a_basis = zo.Estimator(lambda x, g: q[None], lambda d: d, 0.1, antithetic, lambda d: d / d)
    torch.testing.assert_close(over_a_basis(f, x)[0], w, atol=1e-10, rtol=1e-10)
    many = 40_000
    for kind in ("sphere", "gaussian"):
        g, queries = zo.random_directions(many, antithetic=antithetic, kind=kind)(f, x, generator(2))
        spread = w.norm(dim=1, keepdim=True) * math.sqrt(d / many)  # about one standard deviation of a coordinate
        assert ((g - w).abs() < 5 * spread).all()
        assert queries == (2 * many if antithetic else many + 1)


@pytest.mark.parametrize("b", [1.0, 3.5, None])
def test_autozooms_estimate_is_b_over_d_times_the_gradient(b):
    d, many = 6, 40_000
    f, w = linear_f(d=d)
    g, _ = zo.random_directions(many, antithetic=False, b=b)(f, torch.zeros(3, d, dtype=torch.float64), generator(0))
    factor = 1 if b is None else b / d
    assert ((g - factor * w).abs() < 5 * factor * w.norm(dim=1, keepdim=True) * math.sqrt(d / many)).all()


def test_antithetic_pairs_cancel_every_even_order_and_single_sides_do_not():
    even = lambda p, i: p.square().sum(1) + p.pow(4).sum(1)  # noqa: E731
    x = torch.zeros(2, 5, dtype=torch.float64)
    paired, _ = zo.random_directions(8, beta=0.5, kind="gaussian")(even, x, generator())
    assert paired.abs().max() == 0
    single, _ = zo.random_directions(8, beta=0.5, kind="gaussian", antithetic=False)(even, x, generator())
    assert single.abs().max() > 0.1


def test_one_sided_estimates_are_off_by_beta():
    f, gradient, x, _, _ = quadratic()
    q = torch.eye(7, dtype=torch.float64)
    error = [
        (zo.Estimator(lambda x, g: q[None], lambda d: d, beta, False)(f, x)[0] - gradient).norm() for beta in (0.2, 0.1)
    ]
    assert error[0] / error[1] == pytest.approx(2, rel=1e-6)


def test_a_known_base_saves_its_query_and_changes_nothing():
    f, _, x, _, _ = quadratic()
    asked = []

    def counted(points, index):
        asked.append(len(points))
        return f(points, index)

    estimator = zo.random_directions(4, antithetic=False)
    a, costs = estimator(counted, x, generator())
    assert costs == 5 and sum(asked) == 5 * len(x)
    asked.clear()
    b, costs = estimator(counted, x, generator(), f(x, torch.arange(3)))
    assert costs == 4 and sum(asked) == 4 * len(x) and torch.equal(a, b)


def test_several_numbers_a_point_give_the_jacobian_for_the_same_queries():
    w = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    for estimator in (zo.coordinates(), zo.components(torch.eye(6, dtype=torch.float64))):
        jacobian, queries = estimator(lambda p, i: p.flatten(1) @ w.t(), x)
        assert queries == 12 and jacobian.shape == (2, 4, 1, 2, 3)
        torch.testing.assert_close(jacobian.flatten(2), w.expand(2, -1, -1), atol=1e-9, rtol=1e-9)


def test_slices_of_directions_do_not_change_the_estimate():
    """More numbers than are worked on at once: 1,000 images of 100 pixels, 100 directions each."""
    f, w = linear_f(n=1000, d=100)
    g, _ = zo.coordinates()(f, torch.zeros(1000, 1, 10, 10, dtype=torch.float64))
    torch.testing.assert_close(g.flatten(1), w, atol=1e-9, rtol=1e-9)


# --- optimisers ------------------------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": zo.sgd(0.1),
    "sign": zo.sign(0.01),
    "adam": zo.adam(0.05),
    "adamm": zo.adam(0.05, beta2=0.9, largest=True),
    "svrg": zo.svrg(zo.sgd(0.1), every=5, anchor=zo.coordinates()),
}


@pytest.mark.parametrize("estimator", ["coordinates", "groups", "sphere", "one-sided", "gaussian"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_come_down_to_the_minimum_of_a_quadratic(name, estimator):
    if (name, estimator) == ("sign", "groups"):
        pytest.skip("the signs of group means are no descent direction of a quadratic that couples its coordinates")
    f, _, x, a, b = quadratic(d=4)
    estimators = {
        "coordinates": zo.coordinates(), "groups": zo.groups(2), "sphere": zo.random_directions(4),
        "one-sided": zo.random_directions(4, antithetic=False, beta=1e-3),
        "gaussian": zo.random_directions(4, kind="gaussian"),
    }  # fmt: skip
    least = f(-torch.linalg.solve(a, b), torch.arange(3))
    w, trace = zo.minimise(f, x, estimator=estimators[estimator], optimiser=OPTIMISERS[name], steps=400, seed=0)
    gap = trace - least
    assert (gap >= -1e-9).all() and (gap[-1] < 0.02 * gap[0]).all()
    assert torch.equal(
        w, zo.minimise(f, x, estimator=estimators[estimator], optimiser=OPTIMISERS[name], steps=400, seed=0)[0]
    )


def test_newton_ends_a_separable_quadratic_in_one_step():
    h = torch.tensor([0.5, 1.0, 4.0, 20.0], dtype=torch.float64)
    f = lambda p, i: (h * (p - 1).square()).sum(1) / 2  # noqa: E731
    w, _ = zo.minimise(
        f, torch.zeros(2, 4, dtype=torch.float64), estimator=zo.coordinates(), optimiser=zo.newton(1.0), steps=1
    )
    torch.testing.assert_close(w, torch.ones_like(w), atol=1e-7, rtol=0)
    w, _ = zo.minimise(lambda p, i: -p.square().sum(1) + p.sum(1), torch.zeros(1, 3, dtype=torch.float64),
                       estimator=zo.coordinates(), optimiser=zo.newton(0.1), steps=1)  # fmt: skip
    torch.testing.assert_close(w, torch.full_like(w, -0.1), atol=1e-7, rtol=0)  # h < 0: a gradient step


def test_adam_moves_only_what_was_asked_about():
    """A coordinate that is asked about for the first time at step t moves by lr, whatever t is."""
    f = lambda p, i: p.sum(1) * 3  # noqa: E731
    w = torch.zeros(1, 50, dtype=torch.float64)
    w, _ = zo.minimise(f, w, estimator=zo.coordinates(1), optimiser=zo.adam(0.1), steps=20, seed=0)
    moves = w / -0.1
    torch.testing.assert_close(moves, moves.round(), atol=1e-6, rtol=0)
    assert (moves.sum() - 20).abs() < 1e-5 and 1 < (moves > 0.5).sum() < 20


def least_squares(n=200, d=10):
    g = generator(5)
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    t = a @ torch.randn(d, generator=g, dtype=torch.float64) + torch.randn(n, generator=g, dtype=torch.float64)
    terms = lambda p, i, which: ((a[which] * p[:, None]).sum(2) - t[which]).square().mean(1)  # noqa: E731
    return zo.Mean(terms, n, 10), torch.linalg.lstsq(a, t[:, None]).solution[:, 0]


def test_svrg_has_less_variance_than_sgd_and_stays_unbiased():
    f, best = least_squares()
    anchor = best + 0.05
    w = (best + 0.08).expand(3000, -1)  # 3,000 estimates at one point near the anchor
    draws = {}
    for name in ("sgd", "svrg"):
        seen = []
        spy = lambda problem, w, memory: seen.append(problem.gradient(w)) or w  # noqa: E731, B023
        for seed in range(300):
            problem = zo.Problem(f, zo.random_directions(2, beta=1e-3), generator(seed))
            if name == "svrg":
                memory = {
                    "svrg_t": torch.ones(1),
                    "svrg_w": anchor[None],
                    "svrg_g": zo.coordinates()(f, anchor[None])[0],
                }
                zo.svrg(spy, every=10, anchor=zo.coordinates())(problem, w[:1], memory)
            else:
                spy(problem, w[:1], {})
        draws[name] = torch.cat(seen)
    truth = zo.coordinates()(f, w[:1])[0]
    variance = {name: g.var(0).sum().item() for name, g in draws.items()}
    assert variance["svrg"] < 0.3 * variance["sgd"]
    for name, g in draws.items():
        assert ((g.mean(0) - truth).abs() < 5 * (g.var(0) / 300).sqrt()).all(), name


def test_svrg_ends_nearer_to_the_least_squares_solution_than_sgd():
    f, best = least_squares()
    start = torch.zeros(8, 10, dtype=torch.float64)
    estimator = zo.random_directions(5, beta=1e-3)
    gaps = {}
    for name, optimiser in {
        "sgd": zo.sgd(0.03),
        "svrg": zo.svrg(zo.sgd(0.03), every=10, anchor=zo.coordinates()),
    }.items():
        w, _ = zo.minimise(f, start, estimator=estimator, optimiser=optimiser, steps=300, seed=1)
        gaps[name] = (w - best).norm(dim=1).mean().item()
    assert gaps["svrg"] < 0.3 * gaps["sgd"]


def test_the_natural_gradient_is_the_fisher_matrix_solved():
    d, classes, n = 20, 4, 5
    torch.manual_seed(3)
    w = torch.randn(classes, d, dtype=torch.float64)
    x, y = torch.rand(n, d, dtype=torch.float64), torch.randint(0, classes, (n,))
    ask = lambda points, index: points @ w.t()  # noqa: E731
    loss = lambda z, index: nn.functional.cross_entropy(z, y[index], reduction="none")  # noqa: E731
    problem = zo.Problem(None, zo.coordinates(), generator(), scores=(ask, loss))
    problem.answer = ask(x, None)
    got = zo.natural_gradient(problem, x, damping=0.3)
    for i in range(n):
        p = problem.answer[i].softmax(0)
        scores = w - (p[:, None] * w).sum(0)  # row k: the gradient of log p_k
        fisher = scores.t() @ (p[:, None] * scores)
        gamma = 0.3 * fisher.trace() / classes
        gradient = (p - nn.functional.one_hot(y[i], classes)) @ w
        want = torch.linalg.solve(fisher + gamma * torch.eye(d), gradient)
        torch.testing.assert_close(got[i], want, atol=1e-7, rtol=1e-7)


def test_admm_finds_the_minimum_of_the_penalised_problem():
    """min |w|^2 + a^T w: at w = -a / 2, z = w."""
    a = torch.randn(3, 6, generator=generator(), dtype=torch.float64)
    w, _ = zo.minimise(lambda p, i: (p * a[i]).sum(1), torch.zeros_like(a), estimator=zo.coordinates(),
                       optimiser=zo.admm(1.0, eta=2.0), steps=200)  # fmt: skip
    torch.testing.assert_close(w, -a / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threat", [L2(0.6), L1(1.2), L2(0.6, box=None), L1(1.2, box=None), Linf(0.2)])
def test_the_projection_in_adams_metric_is_the_constrained_minimum(threat):
    g = generator(4)
    x = torch.rand(4, 6, generator=g, dtype=torch.float64)
    w = x + 0.7 * torch.randn(4, 6, generator=g, dtype=torch.float64)
    metric = torch.rand(4, 6, generator=g, dtype=torch.float64) + 0.05
    z = zo.mahalanobis(threat, w, x, metric)
    assert threat.contains(z, x).all()
    box = threat.box or (-9, 9)
    for i in range(4):
        if isinstance(threat, Linf):
            want = threat.project(w[i : i + 1], x[i : i + 1])[0]
        else:  # split z - x = p - m with p, m >= 0, so that both norms are smooth
            p = 2 if isinstance(threat, L2) else 1
            c, s = x[i].numpy(), metric[i].numpy()
            radius = {"type": "ineq", "fun": lambda v, p=p: threat.eps**p - ((v[:6] + v[6:]) ** p).sum()}
            room = [(0, box[1] - v) for v in c] + [(0, v - box[0]) for v in c]
            found = minimize(lambda v, c=c, s=s, i=i: (s * (c + v[:6] - v[6:] - w[i].numpy()) ** 2).sum(), [0.01] * 12,
                             bounds=room, constraints=radius, options={"maxiter": 500, "ftol": 1e-14})  # fmt: skip
            want = torch.tensor(c + found.x[:6] - found.x[6:])
        objective = lambda v, i=i: (metric[i] * (v - w[i]).square()).sum()  # noqa: E731
        assert objective(z[i]) <= objective(want) + 1e-5
        torch.testing.assert_close(z[i], want, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        zo.mahalanobis(threat, w, x, torch.ones_like(w)), threat.project(w, x), atol=1e-5, rtol=0
    )
    inside = threat.random(x, g)
    torch.testing.assert_close(zo.mahalanobis(threat, inside, x, metric), inside, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="want Linf, L2 or L1"):
        zo.mahalanobis(L0(3), w, x, metric)


# --- attacks ---------------------------------------------------------------------------------------------------------


def linear_attack(n=30, d=20, classes=2, seed=0):
    """A linear model and images in the middle of the box that it gets right, with distances in closed form."""
    torch.manual_seed(seed)
    model = nn.Linear(d, classes).double()
    x = 0.5 + 0.05 * torch.randn(n, d, dtype=torch.float64)
    return model, x, model(x).argmax(1).detach()


@pytest.mark.parametrize("classes", [2, 5])
def test_finite_difference_fgsm_is_fgsm_on_a_linear_model(classes):
    model, x, y = linear_attack(classes=classes)
    for threat in (Linf(0.05), L2(0.3), L1(0.5)):
        oracle = Queries(model)
        # the margin is piecewise linear: its differences are exact where no other class takes the lead within beta
        exact = fgsm(model, x, y, threat, loss="margin")
        ours = zo.finite_difference(oracle, x, y, threat, loss="margin", estimator=zo.coordinates(beta=1e-6))
        torch.testing.assert_close(ours, exact, atol=1e-6, rtol=0)
        assert (oracle.count == 2 * x.shape[1] + 2).all()
    one = zo.finite_difference(model, x, y, Linf(0.05), loss="margin", estimator=zo.groups(1, beta=1e-6), seed=0)
    torch.testing.assert_close(one, fgsm(model, x, y, Linf(0.05), loss="margin"), atol=1e-9, rtol=0)


def test_finite_difference_too_poor_for_a_step_returns_the_input():
    model, x, y = linear_attack()
    assert torch.equal(zo.finite_difference(model, x, y, Linf(0.05), queries=41), x)
    assert not torch.equal(zo.finite_difference(model, x, y, Linf(0.05), queries=42), x)


@pytest.mark.parametrize(
    ("name", "classes"), [("zo_admm", 2), ("zo_admm", 4), ("zoo", 2), ("zoo", 4), ("newton", 4), ("autozoom", 2)]
)
def test_the_nearest_point_of_a_linear_model(name, classes):
    model, x, y = linear_attack(n=12, classes=classes)
    w = model.weight.detach()
    gaps = model(x).detach().gather(1, y[:, None]) - model(x).detach()
    length = (w[y][:, None] - w[None]).norm(dim=2)
    exact = (gaps / length.clamp_min(1e-30)).scatter(1, y[:, None], math.inf).amin(1)
    x = x.view(-1, 1, 4, 5)
    attacks = {
        "zo_admm": lambda **k: zo.zo_admm(model_, x, y, q=20, beta=1e-3, c=0.3, eta=100.0, **k),
        "zoo": lambda **k: zo.zoo(model_, x, y, k=20, lr=5e-3, **k),
        "newton": lambda **k: zo.zoo(model_, x, y, solver="newton", k=20, lr=0.02, **k),
        "autozoom": lambda **k: zo.autozoom(model_, x, y, q=20, beta=1e-3, lr=5e-3,
                                            decoder=zo.Decoder((20,), lambda v: v.view(-1, 1, 4, 5)), **k),
    }  # fmt: skip
    model_ = nn.Sequential(nn.Flatten(), model)
    x_adv = attacks[name](queries=10_000 if name == "autozoom" else 6000, seed=0)
    found = (x_adv - x).flatten(1).norm(dim=1)
    assert (model_(x_adv).argmax(1) != y).all()
    assert (found >= exact - 1e-9).all(), "nearer than the boundary is impossible"
    assert (found / exact).mean() < 1.01 and (found / exact).max() < 1.05


@pytest.mark.parametrize("decoder", [zo.resize((1, 28, 28), 14), None])
def test_the_box_and_the_margin_asked_for(decoder):
    test = data.load("digits-28x28", n=8)
    net = pretrained.load("digits-28x28-standard")
    x, y = test.x, net(test.x).argmax(1)
    x_adv = zo.autozoom(net, x, y, decoder=decoder, queries=300, kappa=0.5, c=10.0, lr=0.1, seed=0)
    moved = (x_adv != x).flatten(1).any(1)
    assert moved.float().mean() >= 0.5 and (margin(net(x_adv[moved]), y[moved]) > 0.5).all()
    assert (x_adv >= 0).all() and (x_adv <= 1).all()


def test_more_queries_fool_more_images_on_a_network():
    test = data.load("digits-28x28", n=12)
    net = models.mlp(test.shape, hidden=(32,), seed=0)
    from tmlcourse import training

    training.fit(net, data.load("digits-28x28", "train")[:800], epochs=8, seed=0)
    x, y = test.x, net(test.x).argmax(1)
    for attack in (zo.nes, zo.zo_signsgd, zo.zo_svrg, zo.zo_adam, zo.zo_ngd):
        fooled = [(net(attack(net, x, y, L2(2.5), queries=b, seed=0)).argmax(1) != y).float().mean() for b in (0, 800)]
        assert fooled[0] == 0 and fooled[1] >= 0.5, attack.__name__


def test_a_trained_decoder_reconstructs_and_costs_no_gradient():
    x = data.load("digits-28x28", "train").x[:500]
    rng = torch.get_rng_state()
    decoder = zo.train_decoder(x, steps=15, seed=0)
    assert torch.equal(rng, torch.get_rng_state()) and decoder.shape == (1, 14, 14)
    again = zo.train_decoder(x, steps=15, seed=0)
    v = torch.randn(3, 1, 14, 14)
    assert torch.equal(decoder.decode(v), again.decode(v)) and not decoder.decode(v).requires_grad
    with pytest.raises(ValueError, match="even H and W"):
        zo.train_decoder(x[:, :, 1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: zo.coordinates(beta=0), "beta: got 0"),
        (lambda m, x, y: zo.coordinates(0), "k: got 0"),
        (lambda m, x, y: zo.groups(0), "size: got 0"),
        (lambda m, x, y: zo.random_directions(3, kind="cube"), "kind: got 'cube'"),
        (lambda m, x, y: zo.nes(m, x, y, Linf(0.1), q=3), "q: got 3, want an even"),
        (lambda m, x, y: zo.nes(m, x, y, Linf(0.1), alpha=-1.0), "alpha: got -1"),
        (lambda m, x, y: zo.zoo(m, x, y, solver="lbfgs"), "solver: got 'lbfgs'"),
        (lambda m, x, y: zo.zoo(m, x, y, c=0.0), "c: got 0"),
        (lambda m, x, y: zo.zo_admm(m, x, y, kappa=-1.0), "kappa: got -1"),
        (lambda m, x, y: zo.zo_signsgd(m, x, y + 7, Linf(0.1)), "y: got label"),
        (lambda m, x, y: zo.finite_difference(m, x, y, Linf(0.1), steps=0), "steps: got 0"),
        (lambda m, x, y: zo.svrg(zo.sgd(0.1), every=0, anchor=zo.coordinates()), "every: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    model, x, y = linear_attack(n=3)
    with pytest.raises(ValueError, match=message):
        call(model, x, y)
