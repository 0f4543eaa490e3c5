"""Auto-PGD and the ensemble: exact on linear models, inside their sets, at least as strong as PGD and as every member."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import SETS, largest_gain, linear_problem, random_net
from torch import nn

from tmlcourse import data, kernels, pretrained
from tmlcourse.attacks import difference, margin, pgd, robust_accuracy
from tmlcourse.attacks.auto import apgd, apgd_targeted, autoattack, checkpoints
from tmlcourse.attacks.losses import dlr, fools, targeted_dlr
from tmlcourse.threat import L0, L1, L2, Linf


@pytest.fixture(params=["digits-28x28", "mnist"])
def robust(request):
    """A robust network, 30 of its images and the radius it was trained for."""
    name = request.param
    test = data.load(name) if name == "digits-28x28" else request.getfixturevalue("mnist")
    return pretrained.load(f"{name}-robust"), test.x[:30], test.y[:30], pretrained.manifest()[f"{name}-robust"]["eps"]


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_the_published_ones():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 10, 37, 1000):
        w, p = checkpoints(steps), [0.0, 0.22]
        while p[-1] + max(p[-1] - p[-2] - 0.03, 0.06) < 1:
            p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        assert w == sorted({math.ceil(round(v * steps, 9)) for v in p} - {steps})
        assert w[0] == 0 and w[-1] < steps


@given(st.integers(0, 10**6), st.integers(4, 12), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_dlr_does_not_see_shift_and_scale(seed, classes, a, b):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(20, classes, generator=g, dtype=torch.float64), torch.randint(0, classes, (20,), generator=g)
    t = (y + 1) % classes
    torch.testing.assert_close(dlr(a * z + b, y), dlr(z, y), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(targeted_dlr(a * z + b, y, t), targeted_dlr(z, y, t), atol=1e-7, rtol=1e-7)
    assert torch.equal(dlr(z, y) > 0, margin(z, y) > 0)
    right = z.argmax(1) == y
    assert (dlr(z, y)[right] >= -1 - 1e-12).all() and (dlr(z, y)[right] <= 0).all()


def test_dlr_by_hand():
    z, y = torch.tensor([[1.0, 4.0, 2.0, 0.0]] * 2), torch.tensor([1, 2])
    torch.testing.assert_close(dlr(z, y), torch.tensor([-2 / 3, 2 / 3]))
    t = torch.tensor([0, 0])
    torch.testing.assert_close(targeted_dlr(z, y, t), torch.tensor([-3 / 3.5, -1 / 3.5]))


@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_dlr_needs_three_classes_and_the_targeted_one_four(loss):
    model, x, y = random_net(0, (1, 6, 6), 2)
    if loss == "dlr":
        with pytest.raises(ValueError, match="want K >= 3; with fewer use 'margin'"):
            apgd(model, x, y, Linf(0.1), steps=2, loss=loss)
    else:
        assert apgd(model, x, y, Linf(0.1), steps=2, loss=loss).shape == x.shape
    model, x, y = random_net(0, (1, 6, 6), 3)
    apgd(model, x, y, Linf(0.1), steps=2, loss=loss)
    if loss == "dlr":
        with pytest.raises(ValueError, match="want K >= 4; with fewer use 'difference'"):
            apgd(model, x, y, Linf(0.1), steps=2, loss=loss, target=(y + 1) % 3)


def test_a_near_tie_fools_nobody():
    z, y = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2e-6], [1.0, 1.1], [1.1, 1.0]]), torch.zeros(4, dtype=torch.int64)
    assert fools(z, y).tolist() == [False, False, True, False]
    assert fools(z, y, 1 - y).tolist() == [False, False, True, False]


def published_algorithm(model, x, y, start, eps, steps):
    """Algorithm 1 of Croce & Hein for one image, written out: the highest loss of the walk."""
    w = checkpoints(steps)

    def look(v):
        v = v.clone().requires_grad_()
        value = nn.functional.cross_entropy(model(v), y)
        return value.item(), torch.autograd.grad(value, v)[0]

    def project(v):
        return v.clamp(x - eps, x + eps).clamp(0, 1)

    points, eta, halved = [start], 2 * eps, False
    values, slopes, visited = [look(start)[0]], [look(start)[1]], [start]
    since, known, stuck = 0, None, 0
    for k in range(1, steps + 1):
        now, slope, before = points[-1], slopes[-1], visited[-1] if k > 1 else None
        z = project(now + eta * slope.sign())
        new = z if before is None else project(now + 0.75 * (z - now) + 0.25 * (now - before))
        visited.append(now)
        value, slope = look(new)
        points, values, slopes = [*points, new], [*values, value], [*slopes, slope]
        since += value > values[-2]
        if k in w:
            j = w.index(k)
            best = max(range(len(values)), key=values.__getitem__)
            few = since < 0.75 * (w[j] - w[j - 1])
            stuck += not few and not halved and values[best] == known
            if few or (not halved and values[best] == known):
                eta, halved = eta / 2, True
                points[-1], slopes[-1] = points[best], slopes[best]
            else:
                halved = False
            since, known = 0, values[best]
    return max(values), stuck


# --- exactness -------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_apgd_reaches_the_optimum_on_a_linear_model(name, loss, seed):
    threat = SETS[name]
    model, x, y, s = linear_problem(seed)
    x_adv = apgd(model, x, y, threat, loss=loss, seed=0)
    attacked = ~fools(model(x).detach(), y)
    gain = (margin(model(x_adv), y) - margin(model(x), y))[attacked]
    torch.testing.assert_close(gain, largest_gain(threat, x, s)[attacked], atol=1e-6, rtol=0)
    assert torch.equal(x_adv[~attacked], x[~attacked]), "what is wrong already comes back unchanged"
    assert threat.contains(x_adv, x, tolerance=1e-9).all()


def test_apgd_targeted_reaches_the_worst_class_of_a_linear_model():
    """Per-target closed form z_t - z_y + eps ||w_t - w_y||_1; the worst class wins where any can."""
    torch.manual_seed(0)
    model, x = nn.Linear(15, 5).double(), 0.5 + 0.05 * torch.randn(30, 15, dtype=torch.float64)
    y, w = model(x).argmax(1), model.weight.detach()
    gaps = (w[None] - w[y][:, None]).abs().sum(2)
    reach = (model(x) - model(x).gather(1, y[:, None]) + 0.05 * gaps).scatter(1, y[:, None], -torch.inf)
    x_adv = apgd_targeted(model, x, y, Linf(0.05), loss="difference", seed=0)
    assert torch.equal(fools(model(x_adv).detach(), y), reach.amax(1) > 1e-3)
    assert 3 < (reach.amax(1) > 1e-3).sum() < 27, "an easy or hopeless problem would show nothing"
    t = (y + 1) % 5
    found = difference(model(apgd(model, x, y, Linf(0.05), loss="difference", target=t, seed=0)), y, t)
    torch.testing.assert_close(found, reach.gather(1, t[:, None]).squeeze(1), atol=1e-9, rtol=0)


def test_one_step_from_anywhere_is_exact_under_linf():
    model, x, y, s = linear_problem(2)
    right = ~fools(model(x).detach(), y)
    x_adv = apgd(model, x, y, Linf(0.2), steps=1, seed=3)
    torch.testing.assert_close(x_adv[right], (x + 0.2 * s.sign()).clamp(0, 1)[right], atol=1e-12, rtol=0)


def test_it_is_the_published_algorithm_image_by_image():
    """Small radius, so that no image falls and the best point is the one of highest loss."""
    test = data.load("digits-28x28")
    model, x = copy.deepcopy(pretrained.load("digits-28x28-robust")).double(), test.x[:4].double()
    y = model(x).argmax(1)
    ball = Linf(0.05)
    start = ball.random(x, torch.Generator().manual_seed(3))
    x_adv = apgd(model, x, y, ball, steps=40, seed=3)
    assert not fools(model(x_adv).detach(), y).any()
    ours = nn.functional.cross_entropy(model(x_adv), y, reduction="none")
    theirs = [published_algorithm(model, *(v[i : i + 1] for v in (x, y, start)), 0.05, 40)[0] for i in range(4)]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-7, rtol=1e-5)


def test_a_best_point_that_stays_the_same_halves_the_step_too():
    """On waves three steps of four can rise without a new record: the second condition, which flat landscapes never meet."""
    torch.manual_seed(0)
    waves, heights = 10 * torch.randn(2, 30, dtype=torch.float64), torch.rand(30, dtype=torch.float64) / 8

    def model(x):  # always right: the first logit stays above the second
        return torch.stack([5 + torch.sin(x @ waves) @ heights, torch.zeros_like(x[:, 0])], 1)

    x, y, ball = torch.rand(150, 2, dtype=torch.float64), torch.zeros(150, dtype=torch.int64), Linf(0.4)
    start = ball.random(x, torch.Generator().manual_seed(3))
    ours = nn.functional.cross_entropy(model(apgd(model, x, y, ball, steps=20, seed=3)), y, reduction="none")
    theirs, stuck = zip(
        *(published_algorithm(model, *(v[i : i + 1] for v in (x, y, start)), 0.4, 20) for i in range(150)), strict=True
    )
    assert sum(stuck) >= 3, "the condition must decide somewhere"
    clean = nn.functional.cross_entropy(model(x), y, reduction="none")  # a candidate too
    theirs = torch.tensor(theirs, dtype=torch.float64).maximum(clean)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


# --- what every attack owes ------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 8, 8), (3, 6, 10), (2, 5, 4)]),
    classes=st.sampled_from([2, 3, 5]),
    name=st.sampled_from([*SETS]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    kind=st.sampled_from(["untargeted", "targeted", "all targets"]),
    stop_early=st.booleans(),
    double=st.booleans(),
)
def test_it_stays_in_the_set_and_never_ends_below_its_start(
    seed, shape, classes, name, scale, kind, stop_early, double
):
    model, x, y = random_net(seed, shape, classes)
    if double:
        model, x = model.double(), x.double()
    base = SETS[name]
    threat = L0(int(scale * base.k)) if name == "L0" else type(base)(scale * base.eps)
    target = (y + 1) % classes if kind == "targeted" else None
    options = dict(steps=6, restarts=2, seed=seed, stop_early=stop_early)
    if kind == "all targets":
        x_adv = apgd_targeted(model, x, y, threat, targets=3, **options)
    else:
        x_adv = apgd(model, x, y, threat, loss="margin", target=target, **options)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert threat.contains(x_adv, x, tolerance=1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if scale == 0:
        assert torch.equal(x_adv, x)
    with torch.no_grad():
        before, after = model(x), model(x_adv)
    there, now = fools(before, y, target), fools(after, y, target)
    assert (now >= there).all()
    assert torch.equal(x_adv[there], x[there])
    if kind != "all targets":
        value = {None: margin}.get(target, lambda z, y: -margin(z, target))
        assert (value(after, y) >= value(before, y) - 1e-5).all()


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
def test_the_answer_does_not_depend_on_the_batch_size(attack, stop_early):
    model, x, y = random_net(8, (1, 8, 8), 5)
    x, y = x.repeat(5, 1, 1, 1) * torch.linspace(0.8, 1, 25).view(-1, 1, 1, 1), y.repeat(5)
    options = dict(steps=12, seed=0, stop_early=stop_early)
    runs = [attack(model.double(), x.double(), y, Linf(0.1), batch_size=b, **options) for b in (4, 7, 100)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-9, rtol=0)


def test_seed_reproduces_and_the_model_is_left_as_it_was():
    model, x, y = random_net(6, (1, 8, 8), 5)
    y = model(x).argmax(1)
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones_like(model[5].bias)
    state, kept = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    for attack in (apgd, apgd_targeted):
        first = attack(model, x, y, Linf(0.1), steps=5, seed=7)
        assert torch.equal(first, attack(model, x, y, Linf(0.1), steps=5, seed=7))
        assert not torch.equal(first, attack(model, x, y, Linf(0.1), steps=5, seed=8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in kept.items())
    assert not model[0].weight.requires_grad and model[0].weight.grad is None and (model[5].bias.grad == 1).all()
    assert not model.training and model[5].weight.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(steps=0), ValueError, "steps: got 0"),
        (dict(restarts=0), ValueError, "restarts: got 0"),
        (dict(batch_size=0), ValueError, "batch_size: got 0"),
        (dict(loss="hinge"), ValueError, "loss: got 'hinge', want one of 'cross_entropy', 'margin', 'dlr'"),
        (dict(loss=lambda z, y: z), ValueError, r"loss: got shape \(5, 5\)"),
        (dict(target="label"), ValueError, "target: got the label itself for 5 of 5"),
        (dict(target="large"), ValueError, r"target: got label 9, want labels in \[0, 4\]"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    model, x, y = random_net(0, (1, 6, 6), 5)
    change = {"label": dict(target=y), "large": dict(target=torch.full_like(y, 9))}.get(change.get("target"), change)
    with pytest.raises(error, match=message):
        apgd(model, x, y, Linf(0.1), **change)
    with pytest.raises(ValueError, match="targets: got 0"):
        apgd_targeted(model, x, y, Linf(0.1), targets=0)


# --- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", [Linf, L2])
def test_apgd_is_at_least_as_strong_as_pgd_at_the_same_budget(robust, ball):
    model, x, y, eps = robust
    threat = ball(eps if ball is Linf else 2.0)
    right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    walks = (apgd, partial(pgd, alpha=threat.eps / 10))
    with torch.no_grad():
        ours, theirs = (model(walk(model, x, y, threat, steps=40, seed=0)) for walk in walks)
    assert nn.functional.cross_entropy(ours, y) > nn.functional.cross_entropy(theirs, y)
    assert (ours.argmax(1) == y).sum() <= (theirs.argmax(1) == y).sum()


def test_dlr_breaks_what_hides_behind_saturated_logits():
    """Logits times 1e4: cross-entropy is flat, DLR does not notice."""
    test = data.load("digits-28x28")
    net, x, y = pretrained.load("digits-28x28-standard"), test.x[:30], test.y[:30]

    def masked(x):
        return 1e4 * net(x)

    left = [
        robust_accuracy(masked, x, y, Linf(0.2), [partial(apgd, steps=20, loss=loss)], seed=0).accuracy
        for loss in ("cross_entropy", "dlr")
    ]
    assert left[1] < 0.1 and left[0] > left[1] + 0.3


def test_the_ensemble_is_never_weaker_than_a_member(robust):
    """Whatever a member breaks when it runs alone with the seed the ensemble gives it, the ensemble breaks."""
    model, x, y, eps = robust
    small = {"APGD-CE": dict(steps=10), "APGD-T": dict(steps=5, targets=2), "FAB-T": dict(steps=5, targets=2),
             "Square": dict(queries=60)}  # fmt: skip
    members = []
    for member in autoattack():
        quick = partial(member, **small[member.__name__])
        quick.__name__ = member.__name__
        members.append(quick)
    assert [m.__name__ for m in members] == [*small]
    threat = Linf(1.3 * eps)
    whole = robust_accuracy(model, x, y, threat, members, seed=0)
    assert {*whole.broken_by} <= {"", "clean", *small} and "APGD-CE" in whole.broken_by
    broken = whole.standing.logical_not()
    with torch.no_grad():
        assert torch.equal(model(whole.x_adv).argmax(1) != y, broken)
    assert threat.contains(whole.x_adv, x).all()
    first = robust_accuracy(model, x, y, threat, members[:1], seed=0)
    assert (broken >= ~first.standing).all()
    for last in range(1, 5):  # each further member can only break more
        part = robust_accuracy(model, x, y, threat, members[:last], seed=0)
        assert (broken >= ~part.standing).all()


def test_the_ensemble_takes_its_published_settings():
    settings = {a.__name__: a.keywords for a in autoattack()}
    assert settings["APGD-CE"] == {"steps": 100}
    assert settings["APGD-T"] == {"steps": 100, "targets": 9}
    assert settings["FAB-T"]["targets"] == 9 and settings["Square"] == {"queries": 5000}


def test_apgd_is_as_strong_as_torchattacks(robust):
    library = pytest.importorskip("torchattacks", reason="torchattacks is not here; `course.py bench` has it")
    model, x, y, eps = robust
    theirs = library.APGD(model, eps=eps, steps=40, seed=0)(x, y)
    ours = apgd(model, x, y, Linf(eps), steps=40, seed=0)
    with torch.no_grad():
        left = [(model(v).argmax(1) == y).sum() for v in (ours, theirs)]
    assert left[0] <= left[1] + 1


def test_the_fast_network_falls_below_its_pgd_figure(published, mnist):
    """Published: 88.77 % under PGD-50-10 and 82.93 % under AutoAttack; the first images are harder than the average."""
    net, x, y = published("fast-at-mnist-0.3"), mnist.x[:100], mnist.y[:100]
    walk = robust_accuracy(net, x, y, Linf(0.3), [partial(pgd, steps=50, alpha=0.01)], seed=0)
    both = robust_accuracy(net, x, y, Linf(0.3), [apgd, partial(apgd_targeted, targets=2, steps=40)], seed=0)
    assert both.accuracy <= walk.accuracy - 0.02
    assert both.low < 0.8293 < both.high + 0.03


def test_auto_pgd_takes_its_l1_steps_where_a_gpu_has_a_kernel_for_them(monkeypatch):
    model, x, _ = random_net(0, (1, 6, 6), 3)
    y = model(x).argmax(1)
    taken, found = [], apgd(model, x, y, L1(3.0), steps=10, seed=0)
    monkeypatch.setattr(
        kernels, "ascent_step", lambda a, grad, x, t, alpha: taken.append(t) or t.ascend(a, grad, x, alpha)
    )
    assert torch.equal(apgd(model, x, y, L1(3.0), steps=10, seed=0), found) and taken
