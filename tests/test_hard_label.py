"""OPT and Sign-OPT: labels only, exact boundary distances on linear models, and budgets kept to the query."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks.hard_label import _finite_differences, _Rays, _signs, _unit, opt_attack, sign_opt
from tmlcourse.attacks.queries import Queries, open_door

ATTACKS = [opt_attack, sign_opt]


def linear_problem(d, n=12, classes=2, seed=0):
    """A linear model in double precision, images, its own answers as labels, and the exact distances to the boundary."""
    torch.manual_seed(seed)
    model, x = nn.Linear(d, classes).double(), torch.rand(n, d).double()
    z, w = model(x).detach(), model.weight.detach()
    y = z.argmax(1)
    gap = z.gather(1, y[:, None]) - z
    slope = (w[y][:, None] - w[None]).norm(dim=2)
    return model, x, y, (gap / slope.clamp_min(1e-12)).scatter(1, y[:, None], torch.inf).amin(1)


def rays_of(model, x, y, budget=10**6, box=None):
    return _Rays(open_door(model, x, budget, answers="labels"), x, y, None, box)


def test_the_distance_along_a_ray_is_the_closed_form_on_a_linear_model():
    """g(theta) = -m(x) / (w theta / ||theta||) where w theta has the right sign, else infinity."""
    model, x, y, _ = linear_problem(6, n=200)
    w = (model.weight[1] - model.weight[0]).detach()
    m = (model(x)[:, 1] - model(x)[:, 0]).detach()
    theta = _unit(torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).double())
    along = theta @ w
    exact = torch.where(along * m < 0, -m / along, torch.inf)
    found = rays_of(model, x, y).cross(torch.arange(200), theta, torch.full_like(m, 0.3), precision=1e-7)
    crosses = exact.isfinite() & (exact < 1e6)
    assert 0.3 < crosses.double().mean() < 0.7 and (found[exact.isinf()] == torch.inf).all()
    torch.testing.assert_close(found[crosses], exact[crosses], rtol=2e-7, atol=0)
    assert (found[crosses] >= exact[crosses]).all(), "the end of the bracket that is kept is adversarial"


@pytest.mark.parametrize("estimate", [_finite_differences, _signs])
def test_the_estimates_point_along_the_gradient_of_the_distance(estimate):
    """grad g(theta) = -g w / (w theta) on the unit sphere, up to the radial part."""
    model, x, y, _ = linear_problem(8, n=1)
    w = (model.weight[1] - model.weight[0]).detach()
    m = (model(x)[:, 1] - model(x)[:, 0]).detach()
    theta = _unit(
        -m.sign() * w + 0.5 * w.norm() * torch.randn(1, 8, generator=torch.Generator().manual_seed(2)).double()
    )
    g, beta = -m / (theta @ w), torch.tensor([0.01], dtype=torch.float64)
    gradient = -g[:, None] * w / (theta @ w)[:, None]
    gradient = gradient - (gradient * theta).sum(1, keepdim=True) * theta
    generator, index = torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.int64)
    rays = rays_of(model, x, y)
    v = estimate(rays, index, theta, g, beta, generator, q=3000)
    v = v - (v * theta).sum(1, keepdim=True) * theta
    assert torch.cosine_similarity(v, gradient) > 0.97
    if estimate is _finite_differences:  # E[d u (u . grad)] = grad, and its values are differences, not yet over beta
        torch.testing.assert_close(8 * v / 0.01, gradient, atol=0.15 * gradient.norm().item(), rtol=0)
    else:
        assert rays.oracle.total == 3000, "one query a sign"


@pytest.mark.parametrize(("attack", "budget"), [(opt_attack, 4000), (sign_opt, 1000)])
def test_the_distance_found_on_a_linear_model_is_the_exact_one(attack, budget):
    model, x, y, exact = linear_problem(20)
    oracle = Queries(model)
    x_adv = attack(oracle, x, y, queries=budget, q=20, box=None, seed=0)
    found = (x_adv - x).norm(dim=1)
    assert (model(x_adv).argmax(1) != y).all() and (oracle.count == budget).all()
    assert (found >= exact - 1e-9).all() and (found <= 1.02 * exact).all()


def test_with_several_classes_it_ends_at_the_foot_on_one_of_the_boundaries():
    """The minimum of a minimum: descent finds the distance to one rival's boundary, not always that of the nearest rival."""
    model, x, y, exact = linear_problem(20, classes=4)
    x_adv = sign_opt(model, x, y, queries=1000, q=20, box=None, seed=0)
    z, w, found = model(x).detach(), model.weight.detach(), (x_adv - x).norm(dim=1)
    feet = (z.gather(1, y[:, None]) - z) / (w[y][:, None] - w[None]).norm(dim=2).clamp_min(1e-12)
    ratio = found[:, None] / feet.scatter(1, y[:, None], torch.inf)
    assert ((ratio >= 1 - 1e-9) & (ratio <= 1.02)).any(1).all() and (found <= 1.02 * exact).double().mean() > 0.5


def test_where_the_box_binds_the_nearest_point_of_the_box_is_found():
    """min ||delta|| with w (x + delta) + c = 0 and x + delta in [0, 1]: delta = clip(t w), t by bisection."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(10, generator=g).double()
    x = torch.rand(8, 10, generator=g).double()
    x[:, :4] = (w[:4] < 0).double()  # these pixels cannot move the way that helps
    c = -(x @ w).max() - 1.0

    def model(v):
        return torch.stack([torch.zeros(len(v), dtype=v.dtype), v @ w + c], 1)

    low, high = torch.zeros(8, 1, dtype=torch.float64), torch.full((8, 1), 1e3, dtype=torch.float64)
    for _ in range(100):
        t = (low + high) / 2
        falls = (model((x + t * w).clamp(0, 1))[:, 1:] > 0).expand_as(t)
        low, high = torch.where(falls, low, t), torch.where(falls, t, high)
    reachable = (high < 999).squeeze(1)
    exact = ((x + high * w).clamp(0, 1) - x).norm(dim=1)
    x_adv = sign_opt(model, x, torch.zeros(8, dtype=torch.int64), queries=1500, q=20, tries=200, seed=0)
    found = (x_adv - x).norm(dim=1)
    fell = model(x_adv)[:, 1] > 0
    assert reachable.sum() >= 4 and (fell <= reachable).all() and fell[reachable].all()
    assert (x_adv >= 0).all() and (x_adv <= 1).all() and torch.equal(x_adv[~reachable], x[~reachable])
    assert (found[fell] >= exact[fell] - 1e-9).all() and (found[fell] <= 1.03 * exact[fell]).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_labels_are_all_it_takes_and_more_queries_never_find_a_farther_image(attack):
    model, x, y, _ = linear_problem(15)
    seen = []

    def labels(v):
        seen.append(len(v))
        return model(v).argmax(1)

    runs = [attack(labels, x, y, queries=b, q=10, box=None, seed=0) for b in (40, 300)]
    assert sum(seen) <= 340 * len(x)
    for run, b in zip(runs, (40, 300), strict=True):  # labels and scores are the same to it
        assert torch.equal(run, attack(model, x, y, queries=b, q=10, box=None, seed=0))
    rays = rays_of(model, x, y, budget=300)
    everyone, best = torch.arange(len(x)), []
    for seed in range(20):  # whatever is asked, the nearest only gets nearer
        theta = _unit(torch.randn(len(x), 15, generator=torch.Generator().manual_seed(seed)).double())
        rays.cross(everyone, theta, torch.full((len(x),), 5.0).double())
        best.append(rays.distance.clone())
    assert all((b <= a).all() for a, b in zip(best, best[1:], strict=False)) and best[-1].isfinite().all()
    torch.testing.assert_close((rays.nearest - x).norm(dim=1), rays.distance)
    assert (model(rays.nearest).argmax(1) != y).all()


def test_of_several_points_asked_at_once_the_nearest_adversarial_one_of_each_image_is_kept():
    model, x, y, _ = linear_problem(5, n=2)
    rays, index = rays_of(model, x, y), torch.tensor([0, 1, 0, 1, 0])
    w = (model.weight[1] - model.weight[0]).detach()
    towards = _unit(-(model(x)[:, 1] - model(x)[:, 0]).detach().sign()[:, None] * w)[index]
    reach = torch.tensor([900.0, 700.0, 500.0, 800.0, 0.0]).double()
    assert rays.adversarial(index, towards, reach).tolist() == [True, True, True, True, False]
    torch.testing.assert_close(rays.distance, torch.tensor([500.0, 700.0]).double())
    rays.adversarial(index[:2], towards[:2], torch.tensor([400.0, 750.0]).double())
    torch.testing.assert_close((rays.nearest - x).norm(dim=1), torch.tensor([400.0, 700.0]).double())


@given(
    seed=st.integers(0, 10**6),
    attack=st.sampled_from(ATTACKS),
    shape=st.sampled_from([(1, 4, 4), (2, 3, 5), (7,)]),
    classes=st.sampled_from([2, 5]),
    budget=st.integers(0, 60),
    outer=st.integers(0, 60),
    n=st.integers(1, 4),
    targeted=st.booleans(),
    given_starts=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_stays_in_the_box_and_its_budget_and_returns_only_what_it_has_seen_to_work(
    seed, attack, shape, classes, budget, outer, n, targeted, given_starts, dtype
):
    torch.manual_seed(seed)
    d = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, classes)).to(dtype)
    x, y = torch.rand(n, *shape, dtype=dtype), torch.randint(0, classes, (n,))
    target = (y + 1) % classes if targeted else None
    adversarial = (lambda a: a != y) if target is None else (lambda a: a == target)
    rows = []

    def predict(v):
        a = model(v).argmax(1)
        rows.append((v.clone(), a))
        return a

    oracle = Queries(predict, budget=outer, answers="labels")
    starts = torch.rand(6, *shape, dtype=dtype) if given_starts else None
    x_adv = attack(oracle, x, y, queries=budget, q=4, target=target, starts=starts, seed=seed)
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    counts = torch.cat([oracle.count, torch.zeros(n, dtype=torch.int64)])[:n]
    assert (counts <= min(budget, outer)).all() and sum(len(v) for v, _ in rows) == counts.sum()
    right = ~adversarial(model(x).argmax(1))
    assert torch.equal(x_adv[~right], x[~right]) and (counts[~right] <= 1).all()
    for i in range(n):
        if not torch.equal(x_adv[i], x[i]):
            answers = torch.cat([a[(v == x_adv[i]).flatten(1).all(1)] for v, a in rows])
            assert len(answers), "the attacker has asked about the image that it returns"
            assert (answers != y[i]).any() if target is None else (answers == target[i]).any()
    if min(budget, outer) == 0:
        assert torch.equal(x_adv, x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_seed_reproduces_and_the_model_is_left_alone(attack):
    model, x, y, _ = linear_problem(9)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = attack(model, x, y, queries=80, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, attack(model, x, y, queries=80, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bad_input_is_refused_before_any_query():
    model, x, y, _ = linear_problem(9)
    oracle = Queries(model)
    for match, options in {
        "queries: got -1": {"queries": -1},
        "q: got 0": {"q": 0},
        "beta: got 0": {"beta": 0},
        "tries: got 0": {"tries": 0},
        "target: got the true label for 12": {"target": y},
        r"starts: got shape \(12, 3\)": {"starts": x[:, :3]},
        "box: got": {"box": (1.0, 0.0)},
    }.items():
        for attack in ATTACKS:
            with pytest.raises(ValueError, match=match):
                attack(oracle, x, y, **options)
    assert oracle.total == 0


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_it_comes_near_the_white_box_distance_on_a_network(name, request):
    from tmlcourse.attacks.minimum_norm import deepfool

    test = data.load(name) if name == "digits-28x28" else request.getfixturevalue("mnist")
    model, x, y = pretrained.load(f"{name}-standard"), test.x[:3], test.y[:3]
    y = model(x).argmax(1)
    white = (deepfool(model, x, y) - x).flatten(1).norm(dim=1)
    oracle = Queries(model)
    x_adv = sign_opt(oracle, x, y, queries=500, q=20, starts=test.x[4:40], seed=0)
    black = (x_adv - x).flatten(1).norm(dim=1)
    start = sign_opt(model, x, y, queries=60, q=20, starts=test.x[4:40], seed=0)
    assert (model(x_adv).argmax(1) != y).all() and (oracle.count == 500).all()
    assert black.mean() < 3 * white.mean() and black.mean() < 0.85 * (start - x).flatten(1).norm(dim=1).mean()
