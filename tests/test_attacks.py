"""Gradient attacks: exact on linear models, inside their sets, never worse than the start, and leaving no trace."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from tmlcourse.attacks import cross_entropy, difference, fgsm, margin, pgd, robust_accuracy
from tmlcourse.layout import fast_layout
from tmlcourse.threat import L0, L1, L2, Linf

SETS = {"Linf": Linf(0.2), "L2": L2(0.7), "L1": L1(1.3), "L0": L0(3)}


def linear_problem(seed=0, n=40, d=20, dtype=torch.float64):
    """Two-class linear model: images on and off the edge of the box, and s = the direction in which the margin falls."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(d, 2).to(dtype)
    x = torch.rand(n, d, generator=g, dtype=dtype)
    x[x < 0.2], x[x > 0.8] = 0, 1
    y = torch.randint(0, 2, (n,), generator=g)
    w = (model.weight[1] - model.weight[0]).detach()
    return model, x, y, (1 - 2 * y[:, None]) * w


def largest_gain(threat, x, s):
    """max of <s, delta> over the set around x, in closed form (Linf, L1, L0) or by bisection of the multiplier (L2)."""
    room = torch.where(s > 0, 1 - x, x)
    if isinstance(threat, Linf):
        return (s.abs() * room.clamp_max(threat.eps)).sum(1)
    if isinstance(threat, L0):
        return (s.abs() * room).topk(threat.k, 1).values.sum(1)
    if isinstance(threat, L1):  # fill the pixels in the order of |s|
        order = s.abs().argsort(1, descending=True)
        room = room.gather(1, order)
        spent = (threat.eps - (room.cumsum(1) - room)).clamp_min(0).minimum(room)
        return (s.abs().gather(1, order) * spent).sum(1)
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), 1e6, dtype=x.dtype)
    for _ in range(200):
        t = (low + high) / 2
        inside = (t * s.abs()).minimum(room).norm(dim=1, keepdim=True) < threat.eps
        low, high = torch.where(inside, t, low), torch.where(inside, high, t)
    return (s.abs() * (low * s.abs()).minimum(room)).sum(1)


def random_net(seed, shape, classes):
    """A small network with convolution, pooling and batch normalisation in evaluation mode."""
    torch.manual_seed(seed)
    c, h, w = shape
    net = nn.Sequential(
        nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * (h // 2) * (w // 2), classes),
    ).eval()  # fmt: skip
    x = torch.rand(5, *shape)
    return net, x, torch.randint(0, classes, (5,))


# --- exactness -------------------------------------------------------------------------------------------------------


def test_fgsm_is_the_closed_form_on_a_linear_model():
    model, x, y, s = linear_problem()
    x_adv = fgsm(model, x, y, Linf(0.2))
    torch.testing.assert_close(x_adv, (x + 0.2 * s.sign()).clamp(0, 1), atol=1e-12, rtol=0)
    unboxed = fgsm(model, x, y, Linf(0.2, box=None))
    z = margin(model(unboxed), y)
    torch.testing.assert_close(z, margin(model(x), y) + 0.2 * s.abs().sum(1), atol=1e-9, rtol=0)
    for threat, q in ((L2(0.2, box=None), 2), (L1(0.2, box=None), float("inf"))):
        z = margin(model(fgsm(model, x, y, threat)), y)
        torch.testing.assert_close(z, margin(model(x), y) + 0.2 * s.norm(q, dim=1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_reaches_the_optimum_on_a_linear_model(name, random_start):
    threat = SETS[name]
    model, x, y, s = linear_problem(1)
    alpha = 1.0 if name == "L0" else threat.eps / 2
    x_adv = pgd(model, x, y, threat, steps=80, alpha=alpha, random_start=random_start, loss="margin", seed=0)
    gain = margin(model(x_adv), y) - margin(model(x), y)
    torch.testing.assert_close(gain, largest_gain(threat, x, s), atol=1e-6, rtol=0)
    assert threat.contains(x_adv, x, tolerance=1e-9).all()


def test_pgd_reaches_the_multiclass_optimum_on_a_linear_model():
    """Per-target closed form z_y - z_t - eps ||w_y - w_t||_1, exact for the worst target."""
    torch.manual_seed(0)
    model, x = nn.Linear(15, 4).double(), torch.full((30, 15), 0.5, dtype=torch.float64)
    x = x + 0.05 * torch.randn_like(x)
    y = model(x).argmax(1)
    w = model.weight.detach()
    gaps = (w[None] - w[y][:, None]).abs().sum(2)  # (N, K): dual norm of w_t - w_y
    exact = (model(x) - model(x).gather(1, y[:, None]) + 0.05 * gaps).scatter(1, y[:, None], -torch.inf).amax(1)
    found = torch.stack(
        [difference(model(pgd(model, x, y, Linf(0.05), steps=5, alpha=0.1, loss="difference", random_start=False,
                              target=torch.full_like(y, t))), y, torch.full_like(y, t)) for t in range(4)], 1,
    )  # fmt: skip
    torch.testing.assert_close(found.scatter(1, y[:, None], -torch.inf).amax(1), exact, atol=1e-9, rtol=0)


def test_targeted_cross_entropy_difference_is_the_difference_of_logits():
    z, y, t = torch.randn(50, 7), torch.randint(0, 7, (50,)), torch.randint(0, 7, (50,))
    torch.testing.assert_close(cross_entropy(z, y) - cross_entropy(z, t), difference(z, y, t), atol=1e-5, rtol=0)


def test_one_long_step_from_anywhere_in_the_ball_is_fgsm():
    model, x, y, _ = linear_problem(2)
    step = pgd(model, x, y, Linf(0.2), steps=1, alpha=0.4, seed=3)
    torch.testing.assert_close(step, fgsm(model, x, y, Linf(0.2)), atol=1e-12, rtol=0)


# --- what every attack owes ------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 8, 8), (3, 6, 10), (2, 5, 4)]),
    classes=st.sampled_from([2, 5]),
    name=st.sampled_from([*SETS]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    loss=st.sampled_from(["cross_entropy", "margin"]),
    targeted=st.booleans(),
    stop_early=st.booleans(),
)
def test_attacks_stay_in_the_set_and_never_end_below_their_start(
    seed, shape, classes, name, scale, loss, targeted, stop_early
):
    model, x, y = random_net(seed, shape, classes)
    base = SETS[name]
    threat = L0(int(scale * base.k)) if name == "L0" else type(base)(scale * base.eps)
    target = (y + 1) % classes if targeted else None
    options = dict(loss=loss, target=target)
    for x_adv in (
        fgsm(model, x, y, threat, **options),
        pgd(model, x, y, threat, steps=4, restarts=2, seed=seed, stop_early=stop_early, **options),
    ):
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert threat.contains(x_adv, x, tolerance=1e-6).all()
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        if scale == 0:
            assert torch.equal(x_adv, x)
        value = {"cross_entropy": cross_entropy, "margin": margin}[loss]
        value = (
            functools.partial(lambda z, y, f: f(z, y), f=value)
            if target is None
            else lambda z, y, f=value: -f(z, target)
        )
        success = (lambda z: z.argmax(1) != y) if target is None else (lambda z: z.argmax(1) == target)
        with torch.no_grad():
            before, after = model(x), model(x_adv)
        kept = success(after) >= success(before)
        assert kept.all(), "an image that was fooled at the start must stay fooled"
        not_worse = value(after, y) >= value(before, y) - 1e-5
        newly = success(after) & ~success(before)
        assert (not_worse | newly).all()


@pytest.mark.parametrize("name", SETS)
def test_more_restarts_and_more_budget_never_hurt(name):
    model, x, y = random_net(5, (1, 8, 8), 5)
    y = model(x).argmax(1)
    value = [margin(model(pgd(model, x, y, SETS[name], steps=5, restarts=r, loss="margin", seed=0)), y) for r in (1, 3)]
    assert (value[1] >= value[0] - 1e-6).all()


def test_seed_reproduces_and_leaves_the_global_generator_alone():
    model, x, y = random_net(6, (1, 8, 8), 5)
    state = torch.get_rng_state()
    first = pgd(model, x, y, Linf(0.1), steps=2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, pgd(model, x, y, Linf(0.1), steps=2, seed=7))
    assert not torch.equal(first, pgd(model, x, y, Linf(0.1), steps=2, seed=8))
    torch.manual_seed(0)
    a = pgd(model, x, y, Linf(0.1), steps=2)
    torch.manual_seed(0)
    assert torch.equal(a, pgd(model, x, y, Linf(0.1), steps=2))


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_answer_does_not_depend_on_the_batch_size(stop_early):
    model, x, y = random_net(8, (1, 8, 8), 5)
    x, y = x.repeat(5, 1, 1, 1), y.repeat(5)
    runs = [
        pgd(model.double(), x.double(), y, Linf(0.1), steps=6, seed=0, batch_size=b, stop_early=stop_early)
        for b in (1, 4, 7, 100)
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], atol=1e-9, rtol=0)


class _Counts(nn.Module):
    """A linear model that raises on its n-th call."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        super().__init__()
        self.layer, self.calls, self.fail_at, self.error = nn.Linear(4, 3), 0, fail_at, error

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        return self.layer(x)


@given(
    channels=st.integers(1, 3), filters=st.integers(1, 5), size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.sampled_from([1, 2]), bias=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_fast_convolution_has_the_gradient_of_the_library(
    channels, filters, size, stride, padding, dilation, bias, seed
):
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, filters, size, stride, padding, dilation, bias=bias).double()
    net = nn.Sequential(layer, nn.Tanh())
    x = torch.rand(2, channels, 9, 11, dtype=torch.float64, requires_grad=True)
    fast = fast_layout(net, x)
    torch.testing.assert_close(fast(x.detach()), net(x.detach()), rtol=1e-10, atol=1e-12)
    (theirs,) = torch.autograd.grad(net(x).square().sum(), x)
    (ours,) = torch.autograd.grad(fast(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_returned_as_it_came_also_when_interrupted(error):
    model = _Counts(None if error is None else 5, error)
    model.layer.weight.grad = torch.full_like(model.layer.weight, 3.0)
    model.layer.bias.requires_grad_(False)
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = torch.rand(6, 4), torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    if error is None:
        pgd(model, x, y, Linf(0.1), seed=0)
    else:
        with pytest.raises(error):
            pgd(model, x, y, Linf(0.1), seed=0)
    assert model.training and model.layer.weight.requires_grad and not model.layer.bias.requires_grad
    assert (model.layer.weight.grad == 3).all() and model.layer.bias.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_attack_works_under_no_grad_and_with_a_plain_function():
    model, x, y, _ = linear_problem(4)
    with torch.no_grad():
        inside = fgsm(model, x, y, Linf(0.2))
    torch.testing.assert_close(inside, fgsm(lambda z: model(z), x, y, Linf(0.2)))


def test_a_model_that_flattens_with_view_is_attacked_too():
    """Channels last is tried first; `view` refuses it, and the plain layout must give the same answer."""

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 4)

        def forward(self, x):
            h = self.conv(x)
            return self.head(h.view(len(x), -1))

    torch.manual_seed(0)
    model, x = Viewed().double().eval(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    reshaped = nn.Sequential(model.conv, nn.Flatten(), model.head)
    torch.testing.assert_close(
        pgd(model, x, y, Linf(0.1), seed=0), pgd(reshaped, x, y, Linf(0.1), seed=0), atol=1e-9, rtol=0
    )


def test_step_schedule_and_own_loss():
    model, x, y, _ = linear_problem(5)
    seen = []

    def schedule(done):
        seen.append(done)
        return 1 - done

    pgd(model, x, y, Linf(0.2), steps=4, alpha=0.1, schedule=schedule, random_start=False)
    assert seen == [0, 0.25, 0.5, 0.75]
    own = pgd(model, x, y, Linf(0.2), loss=lambda z, y: F.cross_entropy(z, y, reduction="none"), seed=0)
    torch.testing.assert_close(own, pgd(model, x, y, Linf(0.2), seed=0))
    with pytest.raises(ValueError, match=r"loss: got shape \(\)"):
        pgd(model, x, y, Linf(0.2), loss=lambda z, y: F.cross_entropy(z, y))


# --- robust accuracy -------------------------------------------------------------------------------------------------


def test_robust_accuracy_is_exact_on_a_linear_model():
    model, x, y, s = linear_problem(6, n=400)
    exact = (margin(model(x), y) + largest_gain(Linf(0.05), x, s) <= 0).double().mean().item()
    assert 0 < exact < (model(x).argmax(1) == y).double().mean()
    found = robust_accuracy(model, x, y, Linf(0.05), [fgsm], seed=0)
    assert found.accuracy == pytest.approx(exact, abs=1e-12) and float(found) == found.accuracy
    assert found.low < exact < found.high and found.interval == (found.low, found.high) and found.n == 400
    k = round(exact * 400)  # Clopper & Pearson: the ends at which k successes or more (fewer) have probability 2.5 %
    assert binom.sf(k - 1, 400, found.low) == pytest.approx(0.025) == binom.cdf(k, 400, found.high)


def test_robust_accuracy_is_the_worst_case_and_asks_only_about_survivors():
    model, x, y, _ = linear_problem(7, n=200)
    asked = []

    def spy(model, x, y, threat):
        asked.append(len(x))
        return x

    both = robust_accuracy(model, x, y, Linf(0.05), [spy, fgsm, spy], seed=0)
    alone = robust_accuracy(model, x, y, Linf(0.05), [fgsm], seed=0)
    assert torch.equal(both.standing, alone.standing)
    assert asked == [round(both.clean * 200), round(both.accuracy * 200)]
    broken = ~both.standing
    assert (model(both.x_adv[broken]).argmax(1) != y[broken]).all() and torch.equal(
        both.x_adv[both.standing], x[both.standing]
    )
    assert {both.broken_by[i] for i in broken.nonzero().squeeze(1)} == {"clean", "fgsm"}
    assert all(both.broken_by[i] == "" for i in both.standing.nonzero().squeeze(1))


def test_robust_accuracy_refuses_an_attack_that_leaves_the_set():
    model, x, y, _ = linear_problem(8)
    with pytest.raises(ValueError, match=r"attacks: cheat left Linf\(eps=0.05.*\) on \d+ of \d+ images"):
        robust_accuracy(
            model,
            x,
            y,
            Linf(0.05),
            [lambda *a: None, pgd][:0] + [_named("cheat", lambda m, x, y, t: (x + 0.2).clamp(0, 1))],
        )


def _named(name, function):
    function.__name__ = name
    return function


def test_robust_accuracy_of_a_model_that_is_always_wrong_and_of_one_that_cannot_be_moved():
    x, y = torch.rand(10, 4), torch.zeros(10, dtype=torch.int64)
    wrong = robust_accuracy(
        lambda x: torch.tensor([[0.0, 1.0]]).repeat(len(x), 1) + 0 * x.sum(1, keepdim=True), x, y, Linf(0.1)
    )
    right = robust_accuracy(
        lambda x: torch.tensor([[1.0, 0.0]]).repeat(len(x), 1) + 0 * x.sum(1, keepdim=True), x, y, Linf(0.1)
    )
    assert (wrong.accuracy, wrong.low, wrong.clean) == (0, 0, 0) and (right.accuracy, right.high, right.clean) == (
        1,
        1,
        1,
    )
    assert str(right) == "100.0 % robust (69.2 to 100.0), n = 10"


# --- bad input -------------------------------------------------------------------------------------------------------


def _nan(x):
    x = x.clone()
    x[0, 0] = float("nan")
    return x


BAD_IMAGES = {
    "a NaN pixel": (_nan, ValueError, "x: got NaN or infinite values"),
    "pixels in [0, 255]": (lambda x: x * 255, ValueError, r"x: got values in \[.*want \[0, 1\] \(divide by 255\?\)"),
    "negative pixels": (lambda x: x - 0.5, ValueError, r"x: got values in \[-0"),
    "integers": (lambda x: (x * 255).to(torch.uint8), TypeError, "x: got dtype torch.uint8, want floating point"),
    "an empty batch": (lambda x: x[:0], ValueError, r"x: got shape \(0, 4\), want a non-empty batch"),
    "a list": (lambda x: x.tolist(), TypeError, "x: got list, want a torch.Tensor"),
}
BAD_LABELS = {
    "too many": (lambda y: torch.cat([y, y]), ValueError, r"y: got shape \(12,\), want \(6,\)"),
    "out of range": (lambda y: y + 7, ValueError, r"y: got label \d, want labels in \[0, 2\]"),
    "negative": (lambda y: y - 5, ValueError, "y: got label -5, want labels >= 0"),
    "float": (lambda y: y.float(), TypeError, "y: got dtype torch.float32, want torch.int64"),
}


@pytest.mark.parametrize("attack", [fgsm, pgd, robust_accuracy])
def test_bad_images_labels_models(attack):
    model, x, y = nn.Linear(4, 3), torch.rand(6, 4), torch.zeros(6, dtype=torch.int64)
    for change, error, message in BAD_IMAGES.values():
        with pytest.raises(error, match=message):
            attack(model, change(x), y, Linf(0.1))
    for change, error, message in BAD_LABELS.values():
        with pytest.raises(error, match=message):
            attack(model, x, change(y), Linf(0.1))
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\) in train mode"):
        attack(nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train(), x, y, Linf(0.1))
    with pytest.raises(ValueError, match="x: got device cpu, want meta"):
        attack(nn.Linear(4, 3, device="meta"), x, y, Linf(0.1))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        attack(lambda x: model(x) * float("nan"), x, y, Linf(0.1))
    with pytest.raises(ValueError, match=r"want logits \(6, K\)"):
        attack(lambda x: model(x).argmax(1), x, y, Linf(0.1))
    with pytest.raises(TypeError, match="model: got str"):
        attack("model", x, y, Linf(0.1))


def test_bad_options():
    model, x, y = nn.Linear(4, 3), torch.rand(6, 4), torch.zeros(6, dtype=torch.int64)
    cases = [
        (dict(steps=0), ValueError, "steps: got 0"),
        (dict(steps=1.5), TypeError, "steps: got 1.5"),
        (dict(alpha=-0.1), ValueError, "alpha: got -0.1"),
        (dict(restarts=2, random_start=False), ValueError, "restarts: got 2 with random_start=False"),
        (dict(loss="hinge"), ValueError, "loss: got 'hinge', want one of 'cross_entropy', 'margin'"),
        (dict(loss="difference"), ValueError, "loss: got 'difference'"),
        (dict(target=y + 9), ValueError, "target: got label 9"),
        (dict(target=y[:2]), ValueError, "target: got shape"),
        (dict(batch_size=0), ValueError, "batch_size: got 0"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            pgd(model, x, y, Linf(0.1), **options)
    with pytest.raises(TypeError, match="attacks: got"):
        robust_accuracy(model, x, y, Linf(0.1), pgd)
    with pytest.raises(TypeError, match="attacks: got"):
        robust_accuracy(model, x, y, Linf(0.1), [])
