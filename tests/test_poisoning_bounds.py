"""Certified bounds for poisoning, against closed forms, scipy's solvers, brute force and the published curve."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tmlcourse import data
from tmlcourse.poisoning import (
    bounds,
    certified_bound,
    data_dependent,
    gradient,
    gradient_attack,
    kkt_attack,
    logistic,
    sanitizer,
    scores,
    sets,
)

PUBLISHED = {0: 0.029, 0.01: 0.050, 0.02: 0.059, 0.03: 0.062, 0.05: 0.063, 0.1: 0.063, 0.2: 0.063, 0.3: 0.063}


def two_clouds(n=60, d=5, apart=3.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, d, generator=gen, dtype=torch.float64)
    x[:, 0] += apart * (y - 0.5)
    return x, y


def ones_and_sevens(data_set):
    chosen = (data_set.y == 1) | (data_set.y == 7)
    return data_set.x[chosen], data_set.y[chosen]


@pytest.fixture(scope="module")
def digits():
    return ones_and_sevens(data.load("digits", "train"))


@pytest.fixture(scope="module")
def mnist_train(mnist):
    return ones_and_sevens(data.load("mnist", "train"))


# ---- feasible sets


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), box=st.booleans(), slab=st.booleans(), side=st.integers(0, 1))
def test_the_worst_point_is_a_solvers_optimum_and_the_bound_is_never_below_it(seed, box, slab, side):
    x, y = two_clouds(seed=seed)
    limits = (-1.2, 1.5) if box else None
    defense = sanitizer(x.clamp(-1.2, 1.5), y, slab=slab, quantile=0.6, box=limits)
    w = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    point, most = defense.worst(w, side)
    sign = sets.SIGNS[side]
    assert defense.keeps(point[None], torch.tensor([side])).all()
    value = -sign * float(w @ point)
    assert value <= most + 1e-9
    mu, r = defense.centroids[side].numpy(), float(defense.radii[side])
    rules = [{"type": "ineq", "fun": lambda p: r**2 - ((p - mu) ** 2).sum()}]
    if slab:
        axis, s = defense.axis.numpy(), float(defense.slabs[side])
        rules += [{"type": "ineq", "fun": lambda p, k=k: s + k * axis @ (p - mu)} for k in (1, -1)]
    best = minimize(lambda p: sign * w.numpy() @ p, np.clip(mu, -1.2, 1.5), constraints=rules, method="SLSQP",
                    bounds=[limits] * 5 if box else None, options={"ftol": 1e-12, "maxiter": 500})  # fmt: skip
    if best.success:
        assert most >= -best.fun - 1e-6
        assert value >= -best.fun - 1e-5


def test_a_slab_in_a_box_without_a_sphere_is_a_linear_program():
    from scipy.optimize import linprog

    x, y = two_clouds()
    x = (x / 8 + 0.5).clamp(0, 1)
    defense = sanitizer(x, y, sphere=False, box=(0, 1))
    w = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for side in (0, 1):
        point, most = defense.worst(w, side)
        axis, mu, s = defense.axis.numpy(), defense.centroids[side].numpy(), float(defense.slabs[side])
        rows, right = np.stack([axis, -axis]), np.array([s + axis @ mu, s - axis @ mu])
        best = -linprog(sets.SIGNS[side] * w.numpy(), rows, right, bounds=[(0, 1)] * 5).fun
        assert most == pytest.approx(best, abs=1e-5)
        assert most >= best - 1e-9
        assert defense.keeps(point[None], torch.tensor([side])).all()


def test_the_worst_hinge_over_a_sphere_is_the_closed_form():
    x, y = two_clouds()
    defense = sanitizer(x, y, slab=False)
    w = torch.arange(5, dtype=torch.float64) - 1
    for side, sign in enumerate((-1, 1)):
        most = defense.worst(w, side)[1]
        assert most == pytest.approx(float(-sign * w @ defense.centroids[side] + defense.radii[side] * w.norm()))


def test_quantile_radii_keep_that_share_and_percentiles_are_numpys():
    x, y = two_clouds(n=400)
    for options in ({"slab": False}, {"sphere": False, "box": (-9, 9)}):
        kept = sanitizer(x, y, **options).keeps(x, y)
        assert kept.double().mean() == pytest.approx(0.7, abs=0.01)
    far = (x[y == 1] - x[y == 1].mean(0)).norm(dim=1).numpy()
    assert float(sanitizer(x, y).radii[1]) == pytest.approx(np.percentile(far, 70))


def test_integer_points_pass_and_are_whole():
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2
    x = torch.poisson(torch.where(y[:, None] == 1, 4.0, 2.0) * torch.ones(80, 6), generator=gen)
    defense = sanitizer(x, y, quantile=0.8, box=(0, math.inf), integer=True)
    relaxed = sanitizer(x, y, quantile=0.8, box=(0, math.inf))
    bound = certified_bound(x, y, eps=0.1, defense=defense, steps=20)
    assert (bound.poison_x == bound.poison_x.round()).all()
    assert (bound.poison_x >= 0).all()
    assert defense.keeps(bound.poison_x, bound.poison_y).all()
    assert bound.lower <= bound.upper
    assert bound.upper == pytest.approx(certified_bound(x, y, eps=0.1, defense=relaxed, steps=20).upper, rel=0.02)


# ---- the learner


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_the_learner_is_the_constrained_optimum_and_its_dual_is_below(loss):
    x, y = two_clouds(n=40, d=3, apart=1.0)
    clean = certified_bound(x, y, eps=0, defense=sanitizer(x, y), loss=loss, rho=1.5, steps=50)
    rows = torch.cat([x, torch.ones(40, 1)], 1) * (2 * y[:, None] - 1)

    def objective(t):
        m = rows @ torch.as_tensor(t)
        return float(bounds._loss(m, loss).mean())

    ball = {"type": "ineq", "fun": lambda t: 1.5**2 - t @ t}
    starts = np.random.default_rng(0).normal(size=(6, 4)) / 3
    best = min(minimize(objective, t, constraints=ball, method="SLSQP", options={"maxiter": 300}).fun for t in starts)
    assert clean.lower <= best + 1e-9
    assert clean.attack_loss == pytest.approx(best, rel=2e-3)
    assert clean.attack_loss == pytest.approx(clean.clean_loss)
    assert clean.attack_loss - clean.lower <= 2e-3 * best
    assert clean.weight.norm() ** 2 + clean.bias**2 <= 1.5**2 + 1e-9


def test_rows_that_the_screen_leaves_out_never_matter(digits):
    x, y = digits
    rows, signs, _ = sets.examples(x, y)
    problem = bounds._Problem(torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * signs[:, None], signs, 2.0, "hinge")
    # From margins far above one down to zero: row after row begins to matter.
    direction = bounds._train(problem.rows, problem, torch.zeros(65, dtype=torch.float64)).theta
    screen = bounds._Screen(problem)
    left_out = 0
    for t in range(300):
        theta = (3 - t / 100) * direction
        value, g = screen(theta)
        m = problem.rows @ theta
        assert value == pytest.approx(float((1 - m).clamp_min(0).mean()), abs=1e-12)
        assert torch.allclose(g, -((m < 1).double() @ problem.rows) / len(rows), atol=1e-12)
        left_out += len(rows) - len(screen.kept)
    assert left_out > 0


# ---- the sandwich


KINDS = {
    "sphere": {"slab": False},
    "both": {},
    "box": {"box": (-6.0, 6.0)},
    "moving sphere": {"slab": False, "data_dependent": True},
    "moving": {"data_dependent": True},
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 10_000), eps=st.sampled_from([0.05, 0.2, 0.5]), apart=st.floats(0.5, 4), logistic=st.booleans()
)
def test_no_attack_that_passes_beats_the_upper_bound(kind, seed, eps, apart, logistic):
    x, y = two_clouds(n=60, d=6, apart=apart, seed=seed)
    loss = "logistic" if logistic and kind != "moving" else "hinge"
    defense = sanitizer(x, y, **KINDS[kind])
    bound = certified_bound(x, y, eps=eps, defense=defense, loss=loss, steps=25)
    assert len(bound.poison_x) <= eps * len(x) + 1e-9
    everything = torch.cat([x, bound.poison_x]), torch.cat([y, bound.poison_y])
    assert defense.refit(*everything).keeps(bound.poison_x, bound.poison_y).all()
    assert bound.lower <= bound.attack_loss + 1e-9
    assert bound.lower <= bound.upper + 1e-9
    for px, py in attacks(x, y, defense, int(eps * len(x)), seed):
        passed = defense.refit(torch.cat([x, px]), torch.cat([y, py])).keeps(px, py)
        if not passed.all():
            assert defense.data_dependent  # the others were projected into their fixed set
            continue
        assert trained(x, y, px, py, loss) <= bound.upper + 1e-9


def attacks(x, y, defense, m, seed):
    """Random points, label flips and random mixtures of worst points, as (points, labels) inside the clean defence's sets."""
    gen = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (m,), generator=gen)
    centre = defense.centroids[side]
    flips = x[torch.randint(0, len(x), (m,), generator=gen)]
    worst = []
    for i in range(m):
        w = torch.randn(x.shape[1], generator=gen, dtype=torch.float64) + torch.tensor([3.0] + [0.0] * (x.shape[1] - 1))
        worst.append(defense.worst(w, int(side[i]))[0])
    for target in (flips, centre + torch.randn(centre.shape, generator=gen, dtype=torch.float64), torch.stack(worst)):
        points, factor = target.clone(), torch.ones(m, 1, dtype=torch.float64)
        for _ in range(200):
            bad = ~defense.keeps(points, side, tol=0.0)
            factor[bad] *= 0.9
            points = centre + factor * (target - centre)
        yield points[~bad], side[~bad]


@pytest.mark.parametrize("kind", ["sphere", "both", "box"])
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.05, 0.2]), logistic_loss=st.booleans())
def test_no_gradient_attack_and_no_kkt_attack_beats_the_upper_bound(kind, seed, eps, logistic_loss):
    x, y = two_clouds(n=60, d=6, apart=2.0, seed=seed)
    loss = "logistic" if logistic_loss else "hinge"
    defense = sanitizer(x, y, **KINDS[kind])
    bound = certified_bound(x, y, eps=eps, defense=defense, loss=loss, steps=40)
    px, py = gradient_attack(x, y, eps=eps, defense=defense, loss=loss, steps=5, points=3)
    assert len(px) == int(eps * 60) and defense.keeps(px, py).all()
    assert trained(x, y, px, py, loss) <= bound.upper + 1e-9
    px, py = kkt_poison(x, y, int(eps * 60), defense)
    assert defense.keeps(px, py).all()
    assert trained(x, y, px, py, loss) <= bound.upper + 1e-9


def kkt_poison(x, y, m, defense):
    """Points that the KKT attack moves against logistic regression in the ball, then brought inside the defence."""
    side = torch.arange(m) % 2
    signs = 2.0 * torch.cat([y, side]) - 1
    risk = lambda model: -torch.nn.functional.softplus(-signs[: len(x)] * scores(model, x)).mean()  # noqa: E731
    frozen = torch.arange(len(x) + m) < len(x)
    found = kkt_attack(logistic(0.0, radius=1.0), torch.cat([x, defense.centroids[side]]), signs, risk,
                       frozen_rows=frozen, box=(-6.0, 6.0), effort=0.0, steps=4)  # fmt: skip
    return gradient._allowed(defense, found.X[len(x) :], side), side


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_the_gradient_attack_climbs_the_gradient_of_the_retrained_learner(loss):
    x, y = two_clouds(n=80, d=4, apart=2.0)
    clean = torch.cat([x, torch.ones(80, 1)], 1) * (2 * y[:, None] - 1)
    gen = torch.Generator().manual_seed(1)
    poison, way = (torch.randn(4, 5, generator=gen, dtype=torch.float64) for _ in range(2))
    weight = torch.full((4,), 3.0, dtype=torch.float64)

    def retrained(rows):
        theta = torch.zeros(5, dtype=torch.float64)
        for _ in range(2):
            theta = gradient._learn(clean, rows, weight, theta, 1.0, loss)
        return gradient._climb(clean, rows, weight, theta, 1.0, loss)

    slope = float((retrained(poison)[1] * way).sum())
    measured = (retrained(poison + 1e-4 * way)[0] - retrained(poison - 1e-4 * way)[0]) / 2e-4
    assert slope == pytest.approx(measured, rel=1e-3)


def ranking(x, y, rho, steps):
    """Clean loss of the learner after the game's attack, the gradient attack and flipped labels, and with no poison."""
    defense, m = sanitizer(x, y), int(0.05 * len(x))
    game = certified_bound(x, y, eps=0.05, defense=defense, rho=rho, steps=150)
    px, py = gradient_attack(x, y, eps=0.05, defense=defense, rho=rho, steps=steps)
    flips = defense.keeps(x, 8 - y).nonzero().squeeze(1)
    index = flips.repeat(m)[:m]

    def clean_loss(points, labels):
        both = torch.cat([x, points]), torch.cat([y, labels])
        bound = certified_bound(*both, eps=0, defense=sanitizer(*both, quantile=1.0), rho=rho, steps=50)
        return bound.test(x, y)[0]

    return game.clean_loss, clean_loss(px, py), clean_loss(x[index], 8 - y[index]), clean_loss(x[:0], y[:0])


def test_the_games_attack_is_above_the_gradient_attack_above_flips(mnist_train):
    x, y = (v[:1500] for v in mnist_train)
    game, by_gradient, flips, none = ranking(x, y, math.sqrt(0.8), steps=5)
    assert game > by_gradient > flips >= 0.99 * none


def test_the_gradient_attack_hurts_the_embedded_digits_too(digits):
    game, by_gradient, _, none = ranking(*digits, 1.0, steps=5)
    assert game > 0.99 * by_gradient > none


@pytest.mark.parametrize("change, message", [
    ({"eps": 1.0}, "eps: got 1.0"),
    ({"defense": None}, "defense: want"),
    ({"loss": "squared"}, "loss: got"),
    ({"rho": 0}, "rho: got 0"),
    ({"steps": 0}, "steps: got 0"),
])  # fmt: skip
def test_the_gradient_attack_names_bad_input(change, message):
    x, y = two_clouds()
    with pytest.raises(ValueError, match=message):
        gradient_attack(**({"x": x, "y": y, "eps": 0.1, "defense": sanitizer(x, y)} | change))


def trained(x, y, px, py, loss):
    """A lower bound of what the learner must lose on both, over the number of clean examples."""
    signed = [torch.cat([a, torch.ones_like(a[:, :1])], 1) * (2 * b[:, None] - 1) for a, b in ((x, y), (px, py))]
    problem = bounds._Problem(signed[0], 2.0 * y - 1, 1.0, loss)
    return bounds._train(torch.cat(signed), problem, torch.zeros(x.shape[1] + 1, dtype=torch.float64)).lower


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), loss=st.sampled_from(["hinge", "logistic"]), rho=st.sampled_from([0.3, 1.0, 5.0]))
def test_the_gap_is_at_most_the_regret_and_closes(seed, loss, rho):
    x, y = two_clouds(seed=seed)
    bound = certified_bound(x, y, eps=0.2, defense=sanitizer(x, y), loss=loss, rho=rho, steps=200)
    last = bound.trace.iloc[-1]
    assert last.upper - last.lower <= bound.regret + 1e-12
    assert (bound.trace.upper.diff().dropna() <= 0).all()
    assert bound.trace.lower.max() <= bound.upper + 1e-9
    early = bound.trace.iloc[9]
    assert last.upper - last.lower < early.upper - early.lower


def test_the_regret_bound_holds_for_the_whole_game(digits):
    """Mean of U(theta_t) minus what the played points force: Regret/T, at most the rule's promise, which falls with T."""
    x, y = digits
    rows, signs, _ = sets.examples(x, y)
    problem = bounds._Problem(torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * signs[:, None], signs, 1.0, "hinge")
    promised = []
    for steps in (50, 400):
        _, _, values, offsets, sums, *_, regret = bounds._game(problem, sanitizer(x, y), 0.1, steps)
        assert np.mean(values) - bounds._forced(offsets, sums, 1.0, 0, steps) <= regret
        promised.append(regret * math.sqrt(steps))
    assert promised[1] <= 2 * promised[0]


def test_upper_bounds_grow_with_eps_and_start_at_the_clean_loss(digits):
    x, y = digits
    found = certified_bound(x, y, eps=[0, 0.02, 0.1, 0.3], defense=sanitizer(x, y), rho=1.0, n_jobs=2)
    upper = [b.upper for b in found]
    assert upper == sorted(upper)
    assert found[0].upper == pytest.approx(found[0].clean_loss, rel=2e-3)
    assert len(found[0].poison_x) == 0
    assert all(b.gap <= 0.02 * b.upper for b in found)
    assert all(b.lower >= found[0].lower - 1e-9 for b in found)
    assert all(b.poison_x.shape[1:] == x.shape[1:] and b.poison_x.dtype == x.dtype for b in found)
    assert set(found[-1].poison_y.tolist()) <= {1, 7}


def test_ten_points_by_brute_force():
    """One poison point on a line: a grid over points and parameters agrees with both bounds."""
    x = torch.tensor([[-1.2], [-1.0], [-0.8], [-1.1], [-0.9], [1.2], [1.0], [0.8], [1.1], [0.9]], dtype=torch.float64)
    y = torch.tensor([0] * 5 + [1] * 5)
    defense = sanitizer(x, y, slab=False, quantile=1.0)
    defense = dataclasses.replace(defense, radii=torch.tensor([1.5, 1.5], dtype=torch.float64))
    bound = certified_bound(x, y, eps=0.1, defense=defense, rho=1.0, steps=2000)
    angle = np.linspace(0, 2 * np.pi, 1441)
    theta = np.stack([np.cos(angle), np.sin(angle)])[:, None] * np.linspace(0, 1, 41)[None, :, None]
    theta = theta.reshape(2, -1)
    sign = 2.0 * y.numpy() - 1
    clean = np.maximum(0, 1 - sign[:, None] * (x.numpy() * theta[0] + theta[1])).sum(0)
    worst = max((clean + np.maximum(0, 1 - s * (p * theta[0] + theta[1]))).min() / 10
                for s, mu in ((-1, -1.0), (1, 1.0)) for p in np.linspace(mu - 1.5, mu + 1.5, 61))  # fmt: skip
    assert bound.lower <= worst + 1e-3
    assert bound.upper >= worst - 1e-3
    assert bound.lower == pytest.approx(worst, rel=0.05)


# ---- data-dependent defences


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), m=st.integers(2, 4))
def test_each_program_bounds_feasible_points_and_nearly_reaches_them(seed, m):
    rng = np.random.default_rng(seed)
    d = m + 4
    w, v, h = rng.normal(size=d), 3 * rng.normal(size=d), 0.3 * rng.normal(size=m)
    tilt, radius = rng.normal(size=(1, m)), rng.uniform(0.5, 2, (1, m))
    width = radius * rng.uniform(0.2, 0.9)
    value, u = data_dependent._program(tilt, radius, width, h, np.array([[w @ w, w @ v], [w @ v, v @ v]]))
    basis = np.linalg.qr(np.c_[w, v, rng.normal(size=(d, m))])[0][:, 2:]
    points = u[0, :, :2] @ np.stack([w, v]) + u[0, :, 2:] @ basis.T
    climbed = climb(points, tilt[0], w, v, h, radius[0], width[0])
    assert tilt[0] @ (climbed @ w) >= 0.97 * value[0]
    points = climbed
    for candidate in (points, *(radius[0][:, None] * rng.normal(size=(200, m, d)))):
        while not feasible(candidate, v, h, radius[0], width[0]):
            candidate = 0.97 * candidate
        assert tilt[0] @ (candidate @ w) <= value[0] + 1e-9


def climb(start, tilt, w, v, h, radius, width):
    """The same program by sequential quadratic programming on the points themselves."""
    shape = start.shape

    def room(z):
        u = z.reshape(shape)
        axis = v + h @ u
        return np.r_[radius**2 - (u**2).sum(1), width**2 * (axis @ axis) - (u @ axis) ** 2]

    found = minimize(lambda z: -tilt @ (z.reshape(shape) @ w), start.ravel(), method="SLSQP",
                     constraints={"type": "ineq", "fun": room}, options={"maxiter": 100})  # fmt: skip
    return found.x.reshape(shape)


def feasible(u, v, h, radius, width):
    axis = v + h @ u
    return (np.linalg.norm(u, axis=1) <= radius).all() and (abs(u @ axis) <= width * np.linalg.norm(axis)).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_slab_bound_is_above_every_poison_found_and_close(seed):
    x, y = two_clouds(n=200, d=8, apart=4.0, seed=seed)
    rows, signs, _ = sets.examples(x, y)
    problem = bounds._Problem(torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * signs[:, None], signs, 1.0, "hinge")
    defense = sanitizer(x, y, data_dependent=True)
    theta = bounds._train(problem.rows, problem, torch.zeros(9, dtype=torch.float64)).theta
    for eps in (0.05, 0.3):
        setting = data_dependent._setting(problem, defense, eps, theta)
        found = data_dependent._slab_worst(setting)[0]
        assert found <= data_dependent._slab_bound(setting) <= 1.05 * found


def test_a_moving_sphere_is_a_larger_fixed_one():
    """All poison in class y: the loss of a fixed sphere of radius (1 + eps n / n_y) r_y, and the attack reaches it."""
    x, y = two_clouds(n=400, d=4)
    defense = sanitizer(x, y, slab=False, data_dependent=True)
    theta = torch.tensor([0.5, 0.1, 0, 0, 0.1], dtype=torch.float64)
    rows, signs, _ = sets.examples(x, y)
    problem = bounds._Problem(torch.cat([rows, torch.ones_like(rows[:, :1])], 1) * signs[:, None], signs, 1.0, "hinge")
    s = data_dependent._setting(problem, defense, 0.1, theta)
    gain, side = data_dependent._sphere_worst(s, lambda m: bounds._loss(m, "hinge"))
    larger = dataclasses.replace(defense, radii=1.2 * defense.radii, data_dependent=False)
    assert gain == pytest.approx(1 - bounds._worst(larger, theta)[2])
    offset = torch.zeros(4, 4, dtype=torch.float64)
    offset[2 * side] = -sets.SIGNS[side] * defense.radii[side] * theta[:-1] / theta[:-1].norm()
    share = np.zeros(4)
    share[2 * side] = 1
    points, _ = data_dependent._poison(problem, defense, 0.1, share, offset)
    margins = sets.SIGNS[side] * (points @ theta[:-1] + theta[-1])
    assert float((1 - margins).mean()) == pytest.approx(gain, rel=1e-6)


def test_a_defender_who_moves_with_the_poison_loses_more():
    x, y = two_clouds(n=200, d=8, apart=4.0)
    for options in ({"slab": False}, {}):
        fixed = certified_bound(x, y, eps=0.2, defense=sanitizer(x, y, **options))
        moving = certified_bound(x, y, eps=0.2, defense=sanitizer(x, y, data_dependent=True, **options), steps=60)
        assert moving.upper >= fixed.upper * (1 - 1e-2)
        assert moving.lower > fixed.upper


# ---- published


def test_the_published_curve_of_mnist_1_against_7(mnist_train):
    x, y = mnist_train
    assert len(x) == 13_007
    defense = sanitizer(x, y)
    found = certified_bound(x, y, eps=[0.0, 0.01, 0.03, 0.3], defense=defense, rho=0.8**0.5, steps=300, n_jobs=2)
    for bound in found:
        assert bound.upper == pytest.approx(PUBLISHED[bound.eps], rel=0.1)
        assert bound.attack_loss == pytest.approx(PUBLISHED[bound.eps], rel=0.1)
        assert bound.gap <= 0.02 * bound.upper
        assert bound.lower <= bound.attack_loss <= bound.upper * (1 + 1e-9)
        assert defense.keeps(bound.poison_x, bound.poison_y).all()


# ---- sweeps


def test_an_interrupted_sweep_returns_what_it_has(monkeypatch):
    x, y = two_clouds()
    plain = bounds._bound

    def impatient(problem, defense, eps, *rest):
        if eps == 0.3:
            raise KeyboardInterrupt
        return plain(problem, defense, eps, *rest)

    monkeypatch.setattr(bounds, "_bound", impatient)
    with pytest.warns(UserWarning, match="2 of 4 bounds"):
        found = certified_bound(x, y, eps=[0.0, 0.1, 0.3, 0.4], defense=sanitizer(x, y), steps=20)
    assert [b.eps for b in found] == [0.0, 0.1]


def test_a_sweep_with_a_folder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    x, y = two_clouds()
    first = certified_bound(x, y, eps=[0.0, 0.1], defense=sanitizer(x, y), steps=20, folder=tmp_path)
    asked, plain = [], bounds._bound

    def counted(problem, defense, eps, *rest):
        asked.append(eps)
        return plain(problem, defense, eps, *rest)

    monkeypatch.setattr(bounds, "_bound", counted)
    again = certified_bound(x, y, eps=[0.0, 0.1, 0.2], defense=sanitizer(x, y), steps=20, folder=tmp_path)
    assert asked == [0.2]
    assert [b.upper for b in again[:2]] == [b.upper for b in first]
    assert torch.equal(again[1].poison_x, first[1].poison_x)
    certified_bound(x, y, eps=[0.1], defense=sanitizer(x, y, slab=False), steps=20, folder=tmp_path)
    assert asked == [0.2, 0.1]


def test_a_call_is_reproducible_and_touches_no_global_state():
    x, y = two_clouds()
    before = torch.get_rng_state()
    a, b = (certified_bound(x, y, eps=0.2, defense=sanitizer(x, y), steps=50) for _ in range(2))
    assert torch.equal(a.weight, b.weight) and a.upper == b.upper
    assert torch.equal(a.poison_x, b.poison_x)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_minus_one_and_one_are_welcome():
    x, y = two_clouds()
    a = certified_bound(x, y, eps=0.1, defense=sanitizer(x, y), steps=30)
    b = certified_bound(x, 2 * y - 1, eps=0.1, defense=sanitizer(x, 2 * y - 1), steps=30)
    assert a.upper == b.upper
    assert set(b.poison_y.tolist()) <= {-1, 1}


# ---- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"eps": 1.0}, ValueError, r"eps: got 1.0, want a share in \[0, 1\)"),
        ({"eps": -0.1}, ValueError, r"eps: got -0.1"),
        ({"eps": float("nan")}, TypeError, "eps: got nan"),
        ({"eps": []}, ValueError, "eps: got no value"),
        ({"loss": "square"}, ValueError, "loss: got 'square'"),
        ({"rho": 0.0}, ValueError, "rho: got 0"),
        ({"steps": 1}, ValueError, "steps: got 1"),
        ({"defense": "sphere"}, TypeError, "defense: got str"),
        ({"y": torch.zeros(60, dtype=torch.int64)}, ValueError, r"y: got the classes \[0\]"),
        ({"x": torch.full((60, 5), math.nan)}, ValueError, "x: got NaN"),
        ({"x": torch.ones(60, 5)}, ValueError, "x: got only constant features"),
        ({"x": torch.ones(60, 5, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"x": torch.randn(60, 4)}, ValueError, "defense: made for classes"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, y = two_clouds()
    arguments = {"x": x, "y": y, "eps": 0.1, "defense": sanitizer(x, y), "steps": 10} | change
    with pytest.raises(error, match=message):
        certified_bound(arguments.pop("x"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"box": (50.0, 60.0)}, "infeasible: class 0: the box"),
        ({"sphere": False}, "unbounded"),
        ({"quantile": 0.0}, "quantile: got 0.0"),
        ({"integer": True}, "infeasible: class 0: no integer example"),
        ({"box": (1.0, 0.0)}, "box: got"),
        ({"centroids": torch.ones(2, 5)}, "centroids coincide"),
        ({"centroids": torch.ones(3, 5)}, r"centroids: got torch.Size\(\[3, 5\]\)"),
        ({"data_dependent": True, "box": (-9.0, 9.0)}, "data_dependent: got True with a box"),
    ],
)
def test_infeasible_sets_are_named(options, message):
    x, y = two_clouds()
    with pytest.raises(ValueError, match=message):
        sanitizer(x, y, **options)


def test_a_class_without_samples_is_named():
    x, _ = two_clouds()
    with pytest.raises(ValueError, match="exactly two classes"):
        sanitizer(x, torch.ones(60, dtype=torch.int64))


def test_a_learner_that_does_not_converge_says_so(monkeypatch):
    x, y = two_clouds()
    monkeypatch.setattr(bounds, "_newton", lambda rows, theta, *rest: theta)
    with pytest.raises(RuntimeError, match="learner: did not converge, duality gap"):
        certified_bound(x, y, eps=0.1, defense=sanitizer(x, y), steps=10)


def test_features_of_other_sizes_still_converge():
    x, y = two_clouds(n=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1e-3, 255.0):
            bound = certified_bound(scale * x, y, eps=0.1, defense=sanitizer(scale * x, y), steps=100)
            assert bound.lower <= bound.upper
