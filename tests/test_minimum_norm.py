"""Minimum-norm attacks: the exact distance on linear models, the box included, and what every attack owes."""

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import margin
from tmlcourse.attacks import minimum_norm as mn
from tmlcourse.attacks.minimum_norm import (
    carlini_wagner,
    deepfool,
    elastic_net,
    fab,
    fab_bounded,
    jsma,
    lbfgs,
    one_pixel,
)
from tmlcourse.threat import L0, L1, L2, Linf

NORMS = {"linf": Linf(0.0), "l2": L2(0.0), "l1": L1(0.0), "l0": L0(0)}
EACH = {
    "deepfool l2": (deepfool, "l2"),
    "deepfool linf": (functools.partial(deepfool, norm="linf"), "linf"),
    "deepfool l1": (functools.partial(deepfool, norm="l1"), "l1"),
    "fab linf": (functools.partial(fab, steps=20), "linf"),
    "fab l2": (functools.partial(fab, norm="l2", steps=20), "l2"),
    "fab l1": (functools.partial(fab, norm="l1", steps=20), "l1"),
    "lbfgs": (lbfgs, "l2"),
    "cw l2": (carlini_wagner, "l2"),
    "cw linf": (functools.partial(carlini_wagner, norm="linf"), "linf"),
    "cw l0": (functools.partial(carlini_wagner, norm="l0"), "l0"),
    "ead": (elastic_net, "l1"),
    "jsma": (jsma, "l0"),
    "one pixel": (functools.partial(one_pixel, population=10, steps=3, seed=0), "l0"),
}
EXACT = ["deepfool l2", "deepfool linf", "deepfool l1", "fab linf", "fab l2", "fab l1", "lbfgs", "cw l2", "cw linf"]


def linear_problem(classes=2, d=20, n=24, seed=0, edge=False, dtype=torch.float64):
    """A linear model that is right on every image; with `edge` a third of the entries lie on the box."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, classes)).to(dtype)
    x = torch.rand(n, 1, 4, d // 4, dtype=dtype)
    x = ((x - 0.5) * 3 + 0.5).clamp(0, 1) if edge else 0.5 + 0.2 * (x - 0.5)
    return model, x, model(x).argmax(1)


def exact_distance(model, x, y, norm):
    """min over the wrong classes k and over x' in the box with z_k >= z_y of the distance, by scipy, image by image."""
    w, b = (p.detach().numpy() for p in (model[1].weight, model[1].bias))
    out = []
    for xi, yi in zip(x.flatten(1).numpy(), y.tolist(), strict=True):
        d, best = len(xi), np.inf
        for k in set(range(len(w))) - {yi}:
            v, f = w[k] - w[yi], (w[k] - w[yi]) @ xi + b[k] - b[yi]
            if norm == "l2":  # bisection of the multiplier; the quadratic program itself is in the test of `_to_plane`
                room, low, high = np.where(v > 0, 1 - xi, xi), 0.0, 1e6
                if np.abs(v) @ room < -f:
                    continue
                for _ in range(200):
                    s = (low + high) / 2
                    low, high = (s, high) if np.abs(v) @ np.minimum(s * np.abs(v), room) < -f else (low, s)
                best = min(best, np.linalg.norm(np.minimum(high * np.abs(v), room)))
                continue
            cost, extra = (np.r_[np.zeros(2 * d), 1.0], 1) if norm == "linf" else (np.ones(2 * d), 0)
            up = [-np.r_[v, -v, np.zeros(extra)]]  # r = p - q
            up += [np.r_[row, row, -1.0] for row in np.eye(d)] if extra else []
            bound = [(0, 1 - t) for t in xi] + [(0, t) for t in xi] + [(0, None)] * extra
            found = linprog(cost, np.array(up), np.r_[f, np.zeros(len(up) - 1)], bounds=bound)
            best = min(best, found.fun if found.status == 0 else np.inf)
        out.append(best)
    return torch.tensor(out, dtype=x.dtype)


def reached(attack, norm, model, x, y, **options):
    x_adv = attack(model, x, y, **options)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    return x_adv, NORMS[norm].norm(x_adv - x)


# --- the referee: linear models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("edge", [False, True])
def test_the_distance_on_a_linear_model_is_exact(name, classes, edge):
    attack, norm = EACH[name]
    model, x, y = linear_problem(classes, edge=edge)
    exact = exact_distance(model, x, y, norm)
    if not edge:  # where no pixel meets the box: |f_k - f_y| over the dual norm of w_k - w_y, smallest over k
        gaps = model[1].weight[None] - model[1].weight[y][:, None]
        dual = NORMS[norm].dual_norm(gaps.flatten(0, 1)).view(len(x), -1)
        z = model(x)
        formula = ((z.gather(1, y[:, None]) - z) / dual).scatter(1, y[:, None], torch.inf).amin(1).detach()
        inside = formula < (0.3 if norm == "linf" else 0.4)  # an entry is at least 0.4 away from the box
        assert inside.any()
        torch.testing.assert_close(exact[inside], formula[inside], rtol=1e-6, atol=1e-9)
    x_adv, distance = reached(attack, norm, model, x, y)
    possible = torch.isfinite(exact)
    assert possible.any()
    assert (margin(model(x_adv), y)[possible] > 0).all()
    assert torch.equal(x_adv[~possible], x[~possible])
    assert (distance[possible] >= exact[possible] * (1 - 1e-6)).all(), "nearer than is possible"
    assert (distance[possible] <= exact[possible] * 1.01).all()


@pytest.mark.parametrize("edge", [False, True])
def test_the_optimiser_of_carlini_wagner_finds_the_distance_from_the_clean_image_too(edge, monkeypatch):
    """Without the tangent's point as its start, which is the answer on a linear model."""
    model, x, y = linear_problem(edge=edge, n=8)
    tangent = mn._linear
    monkeypatch.setattr(mn, "_linear", lambda f, best, *a: (tangent(f, best, *a)[0], best.clean))
    exact = exact_distance(model, x, y, "l2")
    possible = torch.isfinite(exact)
    x_adv, distance = reached(carlini_wagner, "l2", model, x, y, steps=150, search=6, lr=0.01)
    ratio = (distance / exact)[possible]
    assert (margin(model(x_adv), y)[possible] > 0).all() and ratio.max() < 1.05 and ratio.mean() < 1.01
    if not edge:
        sure = carlini_wagner(model, x, y, kappa=0.2, steps=40, search=3, lr=0.02)
        assert (margin(model(sure), y) > 0.2).all()


def test_deepfool_is_the_slide_on_two_classes():
    """Algorithm 1: x - f(x) grad f / ||grad f||^2 once, times 1 + overshoot."""
    model, x, y = linear_problem(d=200, n=10)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    f = (model(x)[:, 1] - model(x)[:, 0]).detach()
    by_hand = x - 1.02 * f.view(-1, 1, 1, 1) * (w / w.square().sum()).view(1, *x.shape[1:])
    torch.testing.assert_close(deepfool(model, x, y, steps=1, refine=0), by_hand, atol=3e-5, rtol=0)


@given(seed=st.integers(0, 10**6), norm=st.sampled_from(["linf", "l2", "l1"]))
def test_the_step_to_a_plane_is_the_smallest_in_the_box(seed, norm):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(3, 6, generator=g, dtype=torch.float64), torch.randn(3, 6, generator=g, dtype=torch.float64)
    x[:, :2] = x[:, :2].round()
    f = -torch.rand(3, generator=g, dtype=torch.float64) * (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1)
    r = mn._to_plane(x, w, f, norm)
    assert ((x + r) >= -1e-12).all() and ((x + r) <= 1 + 1e-12).all()
    torch.testing.assert_close((w * r).sum(1), -f, atol=1e-8, rtol=1e-6)
    if norm == "l2":
        for xi, wi, fi, ri in zip(x.numpy(), w.numpy(), f.tolist(), r.numpy(), strict=True):
            line = {"type": "eq", "fun": lambda v, w=wi, f=fi: w @ v + f}
            qp = minimize(lambda v: v @ v, ri * 0, jac=lambda v: 2 * v, bounds=list(zip(-xi, 1 - xi, strict=True)),
                          constraints=line, method="SLSQP", options={"ftol": 1e-12})  # fmt: skip
            assert ri @ ri <= qp.fun * (1 + 1e-5) + 1e-8
        return
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for i in range(3):
            model[1].weight.copy_(torch.stack([torch.zeros(6), w[i]]))
            model[1].bias.copy_(torch.stack([torch.zeros(()), f[i] - w[i] @ x[i]]))
            exact = exact_distance(model, x[i : i + 1], torch.zeros(1, dtype=torch.int64), norm)
            torch.testing.assert_close(NORMS[norm].norm(r[i : i + 1]), exact, rtol=1e-6, atol=1e-9)


def test_carlini_wagner_l0_needs_at_most_one_entry_more_than_the_best():
    model, x, y = linear_problem(edge=True)
    w = (model[1].weight[1] - model[1].weight[0]).detach() * (1 - 2 * y[:, None])
    gain = (w.abs() * torch.where(w > 0, 1 - x.flatten(1), x.flatten(1))).sort(1, descending=True).values.cumsum(1)
    exact = (gain < -margin(model(x), y)[:, None]).sum(1) + 1
    possible = exact <= x[0].numel()
    x_adv, changed = reached(*EACH["cw l0"], model, x, y)
    assert (margin(model(x_adv), y)[possible] > 0).all() and possible.any()
    assert (changed[possible] >= exact[possible]).all() and (changed - exact)[possible].max() <= 1
    assert (changed - exact)[possible].mean() <= 0.2


def test_elastic_net_reaches_its_own_optimum_on_a_linear_model():
    """r_i = min(max(s |w_i| - beta / 2, 0), room_i), with s by bisection."""
    model, x, y = linear_problem(edge=True)
    w = ((model[1].weight[1] - model[1].weight[0]) * (1 - 2 * y[:, None])).detach()
    room = torch.where(w > 0, 1 - x.flatten(1), x.flatten(1))
    need = -margin(model(x), y).detach()
    possible = (w.abs() * room).sum(1) > need
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e5).double()
    for _ in range(200):
        s = (low + high) / 2
        short = (w.abs() * (s * w.abs() - 0.05).clamp_min(0).minimum(room)).sum(1, keepdim=True) < need[:, None]
        low, high = torch.where(short, s, low), torch.where(short, high, s)
    r = (high * w.abs() - 0.05).clamp_min(0).minimum(room)
    best = 0.1 * r.sum(1) + r.square().sum(1)
    x_adv = elastic_net(model, x, y, beta=0.1, rule="en", steps=100)
    delta = (x_adv - x).flatten(1)
    found = 0.1 * delta.abs().sum(1) + delta.square().sum(1)
    assert (margin(model(x_adv), y)[possible] > 0).all()
    assert (found >= best * (1 - 1e-6))[possible].all() and (found <= best * 1.01)[possible].all()


def test_shrinkage_is_its_closed_form():
    x = torch.full((1, 5), 0.5)
    z = torch.tensor([[0.9, 0.58, 0.5, 0.45, -0.9]])
    torch.testing.assert_close(mn._shrink_towards(z, x, 0.1), torch.tensor([[0.8, 0.5, 0.5, 0.5, 0.0]]))
    v = torch.linspace(0, 1, 1001)[:, None]
    brute = v[(0.1 * (v - x).abs() + (v - z).square() / 2).argmin(0)].T
    torch.testing.assert_close(mn._shrink_towards(z, x, 0.1), brute, atol=1e-3, rtol=0)


def test_jsma_paints_the_fewest_white_pixels_on_a_linear_model():
    """Rows of opposite weights, black images: the best k entries are those of largest weight; pairs may cost one more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 2)).double()
    with torch.no_grad():
        model[1].weight[1] = -model[1].weight[0]
        model[1].bias.copy_(torch.tensor([0.4, -0.4]))
    x, y = torch.zeros(1, 1, 5, 6).double(), torch.zeros(1, dtype=torch.int64)
    gain = (2 * model[1].weight[1]).clamp_min(0).sort(descending=True).values.cumsum(0)
    exact = int((gain < 0.8).sum()) + 1
    x_adv = jsma(model, x, y, budget=1.0)
    assert model(x_adv).argmax(1) == 1
    assert exact <= (x_adv != x).sum() <= exact + 1


@given(seed=st.integers(0, 10**6))
def test_the_pair_of_the_saliency_map_is_the_best_one(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 12, generator=g), torch.randn(4, 12, generator=g)
    usable = torch.rand(4, 12, generator=g) > 0.2
    pair, gain = mn._best_pair(a, b, usable)
    for i in range(4):
        best = 0.0
        for p in range(12):
            for q in range(p):
                if usable[i, p] and usable[i, q] and a[i, p] + a[i, q] > 0 and b[i, p] + b[i, q] > 0:
                    best = max(best, ((a[i, p] + a[i, q]) * (b[i, p] + b[i, q])).item())
        assert gain[i].item() == pytest.approx(best, rel=1e-5)
        if best > 0:
            p, q = pair[i].tolist()
            assert p != q and usable[i, p] and usable[i, q]


def test_one_pixel_finds_the_pixel_that_matters_and_asks_for_scores_only():
    x, y = torch.zeros(6, 1, 5, 7), torch.zeros(6, dtype=torch.int64)
    asked = []

    def predict(v):
        assert not torch.is_grad_enabled() and not v.requires_grad
        asked.append(len(v))
        lead = v[:, 0, 3, 4] - 0.6
        return torch.stack([-lead, lead + 0.01 * v.sum((1, 2, 3))], 1)

    x_adv = one_pixel(predict, x, y, population=60, steps=20, seed=0)
    assert (predict_without_grad(predict, x_adv).argmax(1) == 1).all()
    assert ((x_adv != x).flatten(1).sum(1) == 1).all() and (x_adv[:, 0, 3, 4] > 0.6).all()
    assert sum(asked) <= 6 * 60 * 21 + 12
    assert torch.equal(x_adv, one_pixel(predict, x, y, population=60, steps=20, seed=0))


@torch.no_grad()
def predict_without_grad(predict, x):
    return predict(x)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["digits-28x28", "mnist"])
def case(request):
    """A standard network and 6 of the images that it gets right."""
    test = data.load("digits-28x28") if request.param == "digits-28x28" else request.getfixturevalue("mnist")
    model = pretrained.load(f"{request.param}-standard")
    x, y = test.x[:20], test.y[:20]
    right = model(x).argmax(1) == y
    return model, x[right][:6], y[right][:6]


def test_on_a_network_carlini_wagner_always_succeeds_and_beats_deepfool(case):
    model, x, y = case
    less = {"cw l2": dict(steps=30, search=3), "lbfgs": dict(search=5), "deepfool l2": {}}
    found = {name: reached(*EACH[name], model, x, y, **options) for name, options in less.items()}
    for x_adv, _ in found.values():
        assert (model(x_adv).argmax(1) != y).all()
    mean = {name: distance.mean().item() for name, (_, distance) in found.items()}
    assert mean["cw l2"] <= mean["deepfool l2"] and mean["lbfgs"] <= mean["deepfool l2"]
    fgsm = next(e for e in torch.linspace(1, 20, 20).tolist() if _fooled_by_one_step(model, x, y, e) >= 0.9)
    assert mean["deepfool l2"] < fgsm


def _fooled_by_one_step(model, x, y, eps):
    from tmlcourse.attacks import fgsm

    return (model(fgsm(model, x, y, L2(eps), loss="margin")).argmax(1) != y).float().mean().item()


def test_kappa_is_the_least_lead(case):
    model, x, y = (v[:4] if isinstance(v, torch.Tensor) else v for v in case)
    plain, sure = (carlini_wagner(model, x, y, kappa=k, steps=20, search=3) for k in (0.0, 2.0))
    assert (margin(model(sure), y) >= 2 - 1e-4).all()
    assert (L2(0.0).norm(sure - x) >= L2(0.0).norm(plain - x)).all()
    sure = elastic_net(model, x[:3], y[:3], kappa=1.0, steps=10, search=2)
    assert (margin(model(sure), y[:3])[(sure != x[:3]).flatten(1).any(1)] >= 1 - 1e-4).all()


def test_targeted_attacks_reach_their_target(case):
    model, x, y = (v[:3] if isinstance(v, torch.Tensor) else v for v in case)
    target = (y + 1) % 10
    _, any_class = reached(carlini_wagner, "l2", model, x, y, steps=20, search=2)
    less = {"cw l2": dict(steps=20, search=2), "lbfgs": dict(search=4), "fab l2": dict(steps=20), "deepfool l2": {}}
    for name, options in less.items():
        x_adv, distance = reached(*EACH[name], model, x, y, target=target, **options)
        hit = model(x_adv).argmax(1) == target
        assert torch.equal(x_adv[~hit], x[~hit])
        assert hit.float().mean() >= (0.3 if name == "fab l2" else 1)  # a walk need not meet its target's boundary
        assert distance[hit].mean() > 0.9 * any_class[hit].mean()


def test_fab_within_a_budget(case):
    model, x, y = case
    nearest = NORMS["linf"].norm(fab(model, x, y, steps=8, candidates=3) - x)
    threat = Linf(round(nearest.median().item(), 3))
    x_adv = fab_bounded(model, x, y, threat, steps=8, targets=3, seed=0)
    moved = (x_adv != x).flatten(1).any(1)
    assert threat.contains(x_adv, x, tolerance=1e-6).all()
    assert torch.equal(moved, model(x_adv).argmax(1) != y) and 0 < moved.float().mean() < 1
    more = fab_bounded(model, x, y, threat, steps=8, targets=3, restarts=2, seed=0)
    assert (model(more).argmax(1) != y)[moved].all()
    assert torch.equal(fab_bounded(model, x, y, Linf(0.0), steps=2), x)
    with pytest.raises(TypeError, match="threat: got L0"):
        fab_bounded(model, x, y, L0(3))


# --- what every attack owes ------------------------------------------------------------------------------------------


def random_net(seed, shape, classes):
    torch.manual_seed(seed)
    c, h, w = shape
    net = nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(4 * h * w, classes)).eval()  # fmt: skip
    return net, torch.rand(5, *shape), torch.randint(0, classes, (5,))


QUICK = {"fab": dict(steps=3), "fab_bounded": dict(steps=3), "carlini_wagner": dict(steps=4, search=2),
         "elastic_net": dict(steps=4, search=2), "lbfgs": dict(steps=4, search=2),
         "one_pixel": dict(population=5, steps=2, seed=0)}  # fmt: skip


def quick(name):
    attack, norm = EACH[name]
    bare = attack.func if isinstance(attack, functools.partial) else attack
    kept = {k: v for k, v in getattr(attack, "keywords", {}).items() if k == "norm"}
    return functools.partial(bare, **kept, **QUICK.get(bare.__name__, {})), norm


@given(
    seed=st.integers(0, 10**6), shape=st.sampled_from([(1, 8, 8), (3, 4, 6), (2, 5, 4)]),
    classes=st.sampled_from([2, 5]), name=st.sampled_from([*EACH]), targeted=st.booleans(), n=st.sampled_from([1, 5]),
)  # fmt: skip
def test_attacks_stay_in_the_box_and_return_a_success_or_the_clean_image(seed, shape, classes, name, targeted, n):
    model, x, y = random_net(seed, shape, classes)
    x, y = x[:n], y[:n]
    target = (y + 1) % classes if targeted else None
    state = copy.deepcopy(model.state_dict())
    attack, _ = quick(name)
    x_adv = attack(model, x, y, target=target)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    with torch.no_grad():
        before, after = model(x).argmax(1), model(x_adv).argmax(1)
    success = (lambda p: p != y) if target is None else (lambda p: p == target)
    moved = (x_adv != x).flatten(1).any(1)
    assert not moved[success(before)].any(), "an image that was wrong from the start must come back as it was"
    assert success(after)[moved].all(), "what comes back fools the model or is the clean image"
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in EACH if name != "one pixel"])  # it draws for a batch at once
def test_the_answer_does_not_depend_on_the_batch_size_nor_on_the_global_generator(name):
    model, x, y = random_net(3, (1, 6, 6), 4)
    model, x = model.double(), x.double().repeat(2, 1, 1, 1)
    y = model(x).argmax(1)
    attack, _ = quick(name)
    state = torch.get_rng_state()
    runs = [attack(model, x, y, batch_size=b) for b in (3, 100)]
    assert torch.equal(state, torch.get_rng_state())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-7, rtol=0)


def test_an_image_on_the_boundary_and_a_model_that_cannot_be_moved():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        model[1].bias.zero_()
    x, y = torch.full((1, 1, 2, 2), 0.5).double(), torch.zeros(1, dtype=torch.int64)
    for name in EXACT:
        x_adv, distance = reached(*EACH[name], model, x, y)
        assert model(x_adv).argmax(1) == 1 and distance < 0.02, name

    def constant(v):
        return torch.tensor([[1.0, 0.0]], dtype=v.dtype).repeat(len(v), 1) + 0 * v.flatten(1).sum(1, keepdim=True)

    for name in EACH:
        attack, _ = quick(name)
        assert torch.equal(attack(constant, x, y), x), name


class _Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(16, 3), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 4:
            raise KeyboardInterrupt
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("name", EACH)
def test_the_model_is_returned_as_it_came_also_when_interrupted(name):
    model = _Interrupted()
    model.layer.weight.grad = torch.full_like(model.layer.weight, 3.0)
    model.layer.bias.requires_grad_(False)
    model.train()
    x = torch.rand(6, 1, 4, 4)
    y = model.layer(x.flatten(1)).argmax(1)
    state = torch.get_rng_state()
    attack, _ = quick(name)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        for _ in range(4):
            attack(model, x, y)
    assert model.training and model.layer.weight.requires_grad and not model.layer.bias.requires_grad
    assert (model.layer.weight.grad == 3).all() and model.layer.bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", EACH)
def test_bad_input_is_named(name):
    attack, _ = quick(name)
    model, x, y = random_net(0, (1, 4, 4), 3)
    cases = [
        (dict(x=x * 255), ValueError, r"want \[0, 1\] \(divide by 255\?\)"),
        (dict(x=x * float("nan")), ValueError, "x: got NaN"),
        (dict(x=x[:0], y=y[:0]), ValueError, r"x: got shape \(0"),
        (dict(y=y.float()), TypeError, "y: got dtype"),
        (dict(y=y + 3), ValueError, r"y: got label \d, want labels in \[0, 2\]"),
        (dict(target=y), ValueError, "target: got the label itself for 5 of 5 images"),
        (dict(target=y + 3), ValueError, r"target: got label \d, want labels in \[0, 2\]"),
        (dict(batch_size=0), ValueError, "batch_size: got 0"),
        (dict(model=nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout())), ValueError, "Dropout"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            attack(**{"model": model, "x": x, "y": y, **change})


def test_bad_options():
    model, x, y = random_net(0, (1, 4, 4), 3)
    cases = [
        (deepfool, dict(norm="l0"), ValueError, "norm: got 'l0'"),
        (deepfool, dict(steps=0), ValueError, "steps: got 0"),
        (deepfool, dict(overshoot=-1), ValueError, "overshoot: got -1"),
        (fab, dict(alpha_max=2), ValueError, "alpha_max: got 2"),
        (fab, dict(eta=0.5), ValueError, "eta: got 0.5"),
        (fab, dict(beta=1), ValueError, "beta: got 1"),
        (carlini_wagner, dict(norm="l1"), ValueError, "norm: got 'l1'"),
        (carlini_wagner, dict(kappa=-1), ValueError, "kappa: got -1"),
        (carlini_wagner, dict(lr=0), ValueError, "lr: got 0"),
        (elastic_net, dict(rule="l2"), ValueError, "rule: got 'l2'"),
        (elastic_net, dict(lr=0), ValueError, "lr: got 0"),
        (lbfgs, dict(memory=0), ValueError, "memory: got 0"),
        (jsma, dict(theta=0), ValueError, "theta: got 0"),
        (jsma, dict(budget=0), ValueError, "budget: got 0"),
        (one_pixel, dict(population=3), ValueError, "population: got 3"),
        (one_pixel, dict(x=x.flatten(1)), ValueError, r"x: got shape \(5, 16\), want \(N, C, H, W\)"),
    ]
    for attack, options, error, message in cases:
        with pytest.raises(error, match=message):
            attack(**{"model": model, "x": x, "y": y, **options})


def test_the_quasi_newton_direction_is_that_of_the_explicit_bfgs_matrix():
    """H <- V^T H V + rho s s^T with V = I - rho q s^T, oldest pair first; a slot of zeros is no pair."""
    g = torch.Generator().manual_seed(0)
    s, grad = torch.randn(4, 2, 5, generator=g).double(), torch.randn(2, 5, generator=g).double()
    q = s + 0.3 * torch.randn(4, 2, 5, generator=g).double()
    s[0], q[0] = 0, 0
    curved = (s * q).sum(2)
    rho = torch.where(curved > 0, 1 / curved, 0)
    found = mn._two_loops(grad, s, q, rho, torch.tensor([0.7, 2.0]).double())
    for row, scale in enumerate((0.7, 2.0)):
        h = scale * torch.eye(5).double()
        for i in range(4):
            v = torch.eye(5).double() - rho[i, row] * torch.outer(q[i, row], s[i, row])
            h = v.T @ h @ v + rho[i, row] * torch.outer(s[i, row], s[i, row])
        torch.testing.assert_close(found[row], h @ grad[row])


def test_the_search_for_c_narrows_its_bracket():
    c, low, high = torch.tensor([4.0]), torch.zeros(1), torch.full((1,), torch.inf)
    seen = []
    for _ in range(8):  # every c from 30 on succeeds
        seen.append(c.item())
        c, low, high = mn._next_c(c, low, high, c >= 30)
        assert low < c < high and low < 30 <= high
    assert seen[:3] == [4, 40, 22] and high - low < 1
