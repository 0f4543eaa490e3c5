"""Square: the search is the one described, its queries are exact, and it breaks no fewer images than its peers."""

import copy
import functools
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import margin, pgd, robust_accuracy
from tmlcourse.attacks.queries import Queries
from tmlcourse.attacks.square import _bump, square
from tmlcourse.threat import L1, L2, Linf


def small_net(seed, shape, classes):
    """A random convolutional network and five images, some pixels on the edge of the box."""
    torch.manual_seed(seed)
    c, h, w = shape
    net = nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * h * w, classes)).eval()
    x = torch.rand(5, *shape)
    x[x < 0.2], x[x > 0.8] = 0, 1
    return net, x, torch.randint(0, classes, (5,))


class Recorder:
    """Remembers every question and its answer; the images are told apart by the accounts of the `Queries` around it."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def __call__(self, x):
        z = self.model(x)
        self.asked.append((x.clone(), z.clone()))
        return z


def stubborn(shape, seed=0):
    """Scores that never let an image fall, but whose margin changes with every pixel; and one image."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g).double()

    def model(x):
        s = 0.01 * torch.tanh((x * w).flatten(1).sum(1) / 50)
        return torch.stack([torch.ones_like(s), s], 1)

    x = torch.rand(1, *shape, generator=g).double()
    x[x < 0.2] = 0
    return model, x, torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 12)])
def test_linf_repaints_one_square_at_a_time_with_plus_or_minus_eps_and_keeps_what_raises_the_loss(shape):
    model, x, y = stubborn(shape)
    recorder, eps, budget = Recorder(model), 0.1, 400
    x_adv = square(recorder, x, y, Linf(eps), queries=budget, seed=0)
    assert len(recorder.asked) == budget
    (clean, z0), (state, z) = recorder.asked[:2]
    assert torch.equal(clean, x)
    edges = torch.stack([(x - eps).clamp(0, 1), (x + eps).clamp(0, 1)])
    assert ((state - x).sign().amax((0, 2)) - (state - x).sign().amin((0, 2)) <= 1).all(), "a stripe has one sign"
    best, accepted, sides, idle = margin(z, y), [margin(z, y)], [], 0
    for tried, z in recorder.asked[2:]:
        assert (tried == edges).any(0).all(), "delta in {-eps, eps} before clipping"
        changed = (tried != state).any(1)[0]
        idle += not changed.any()
        if changed.any():
            rows, columns = changed.any(1).nonzero().squeeze(1), changed.any(0).nonzero().squeeze(1)
            sides.append(max(rows.max() - rows.min(), columns.max() - columns.min()).item() + 1)
        if margin(z, y) > best:
            state, best = tried, margin(z, y)
        accepted.append(best)
    assert idle <= 4, "hardly any query repaints a square with what is there"
    share = [min(0.8 / 2**k, 1) ** 0.5 * (shape[1] * shape[2]) ** 0.5 for k in (3, 9)]
    assert max(sides[60:]) <= max(round(share[0]), 1) and max(sides[-60:]) <= max(round(share[1]), 1)
    assert all(b >= a for a, b in zip(accepted, accepted[1:], strict=False)) and accepted[-1] > accepted[0]
    torch.testing.assert_close(margin(model(x_adv), y), torch.maximum(best, margin(z0, y)), atol=1e-12, rtol=0)


def test_l2_spends_the_whole_radius_and_moves_budget_between_two_windows():
    model, x, y = stubborn((3, 12, 16))
    recorder, threat = Recorder(model), L2(1.5)
    square(recorder, x, y, threat, queries=300, seed=0)
    (_, _), (state, z) = recorder.asked[:2]
    best, far = margin(z, y), 0
    for tried, z in recorder.asked[2:]:
        assert threat.norm(tried - x) == pytest.approx(1.5, abs=1e-6)
        changed = (tried - state).abs().gt(1e-9).any(1)[0]
        far += bool(changed.any())
        if margin(z, y) > best:
            state, best = tried, margin(z, y)
    assert far > 290 and best > margin(recorder.asked[1][1], y)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_a_bump_has_unit_length_and_two_opposite_halves(side):
    bump = _bump(side, torch.zeros(1, dtype=torch.float64))
    assert bump.shape == (side, side) and bump.norm() == pytest.approx(1)
    assert (bump[: side // 2] >= 0).all() and (bump[side // 2 :] <= 0).all()
    if side == 5:  # the lower half has 3 rows, its top in the middle: 1 + 1/4 + 1/9 there, then a ring of 1/4 + 1/9
        lower = bump[2:] / bump[3, 2]
        assert lower[1, 2] == 1 and lower[1, 1] == pytest.approx((1 / 4 + 1 / 9) / (1 + 1 / 4 + 1 / 9))


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 8, 8), (3, 6, 10), (2, 4, 3), (1, 1, 1)]),
    classes=st.sampled_from([2, 5]),
    kind=st.sampled_from([Linf, L2]),
    eps=st.sampled_from([0.0, 0.05, 0.5]),
    budget=st.integers(0, 30),
    outer=st.integers(0, 30),
    targeted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_stays_in_its_set_and_its_budget_and_never_ends_below_its_start(
    seed, shape, classes, kind, eps, budget, outer, targeted, dtype
):
    model, x, y = small_net(seed, shape, classes)
    model, x, threat = model.to(dtype), x.to(dtype), kind(eps)
    target = (y + 1) % classes if targeted else None
    asked = [0] * len(x)

    def predict(points):  # an own count, beside that of the door: each question is matched to the nearest image
        for i in torch.cdist(points.flatten(1), x.flatten(1)).argmin(1).tolist():
            asked[i] += 1
        return model(points)

    oracle = Queries(predict, budget=outer)
    x_adv = square(oracle, x, y, threat, queries=budget, seed=seed, target=target)
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert threat.contains(x_adv, x, tolerance=1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert sum(asked) == oracle.total
    counts = torch.cat([oracle.count, torch.zeros(5, dtype=torch.int64)])[:5]
    assert (counts <= min(budget, outer)).all()
    with torch.no_grad():
        before, after = model(x), model(x_adv)
    loss = (lambda z: margin(z, y)) if target is None else (lambda z: -margin(z, target))
    assert (loss(after) >= loss(before) - 1e-6).all()
    stands = loss(after) < -1e-4
    assert (counts[stands] == min(budget, outer)).all(), "what stands has spent its budget"
    started = loss(before) > 1e-3
    assert torch.equal(x_adv[started], x[started]) and (counts[started] <= 1).all()
    if eps == 0 or min(budget, outer) <= 1:
        assert torch.equal(x_adv, x)


@pytest.mark.parametrize("threat", [Linf(0.15), L2(2.0)])
def test_more_queries_break_more_images_and_counts_are_the_queries_to_success(threat):
    test, model = data.load("digits-28x28"), pretrained.load("digits-28x28-standard")
    x, y = test.x[:30], test.y[:30]
    oracle = Queries(model)
    x_adv = square(oracle, x, y, threat, queries=100, seed=0)
    fell = model(x_adv).argmax(1) != y
    assert 0.1 < fell.double().mean() < 1 and (oracle.count[~fell] == 100).all() and (oracle.count[fell] <= 100).all()
    assert oracle.count[fell].min() < 100
    again = square(Queries(model, budget=20), x, y, threat, queries=100, seed=0)
    assert (model(again).argmax(1) != y).sum() <= fell.sum()


def test_it_breaks_a_model_whose_gradient_is_hidden():
    """Logits times 10^4: the softmax saturates, cross-entropy PGD stands still, scores still order the candidates."""
    test, net = data.load("digits-28x28"), pretrained.load("digits-28x28-standard")
    x, y = test.x[:40], test.y[:40]

    def masked(x):
        return 1e4 * net(x)

    white = robust_accuracy(masked, x, y, Linf(0.3), [functools.partial(pgd, steps=20, random_start=False)])
    black = robust_accuracy(masked, x, y, Linf(0.3), [functools.partial(square, queries=200)], seed=0)
    assert black.accuracy < white.accuracy - 0.2


def test_images_with_unequal_accounts_each_get_what_is_left_to_them():
    model, x, y = stubborn((1, 6, 6))
    oracle, x, y = Queries(model, budget=30), x.repeat(3, 1, 1, 1), y.repeat(3)
    oracle(x[:1].repeat(25, 1, 1, 1), torch.zeros(25, dtype=torch.int64))
    oracle(x[1:2].repeat(30, 1, 1, 1), torch.ones(30, dtype=torch.int64))
    x_adv = square(oracle, x, y, Linf(0.1), queries=20, seed=0)
    assert oracle.count.tolist() == [30, 30, 20] and torch.equal(x_adv[1], x[1])


def test_on_a_linear_model_it_comes_close_to_the_exact_worst_case():
    torch.manual_seed(0)
    w = torch.randn(6, 6, dtype=torch.float64)

    def model(x):
        s = (x * w).flatten(1).sum(1)
        return torch.stack([torch.full_like(s, 100.0), s], 1)

    x, y = torch.full((3, 1, 6, 6), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    gain = margin(model(square(model, x, y, Linf(0.1), queries=1500, seed=0)), y) - margin(model(x), y)
    assert (gain <= 0.1 * w.abs().sum() + 1e-9).all() and (gain >= 0.95 * 0.1 * w.abs().sum()).all()


def test_seed_reproduces_and_the_model_is_left_alone():
    model, x, y = small_net(3, (1, 8, 8), 4)
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = square(model, x, y, Linf(0.05), queries=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert torch.equal(first, square(model, x, y, Linf(0.05), queries=20, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.manual_seed(0)
    a = square(model, x, y, L2(0.3), queries=20)
    torch.manual_seed(0)
    assert torch.equal(a, square(model, x, y, L2(0.3), queries=20))


def test_bad_input_is_refused_before_any_query():
    model, x, y = small_net(4, (1, 8, 8), 4)
    oracle = Queries(model)
    for match, call in {
        r"x: got shape \(5, 64\)": lambda: square(oracle, x.flatten(1), y, Linf(0.1)),
        "threat: got L1": lambda: square(oracle, x, y, L1(1.0)),
        "p_init: got 0": lambda: square(oracle, x, y, Linf(0.1), p_init=0),
        "p_init: got 1.5": lambda: square(oracle, x, y, Linf(0.1), p_init=1.5),
        "queries: got -1": lambda: square(oracle, x, y, Linf(0.1), queries=-1),
        "target: got the true label for 5 images": lambda: square(oracle, x, y, Linf(0.1), target=y),
        "loss: got 'no'": lambda: square(oracle, x, y, Linf(0.1), loss="no"),
        "x: got values": lambda: square(oracle, 255 * x, y, Linf(0.1)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert oracle.total == 0
    with pytest.raises(ValueError, match="y: got label 9"):
        square(oracle, x, y + 9 - y, Linf(0.1), queries=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("threat", [Linf(0.2), L2(2.0)])
@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_it_keeps_up_with_torchattacks(name, threat, request):
    """A small case that only notices a broken search; `benchmarks/square.py` compares with more images and seeds."""
    if not importlib.util.find_spec("torchattacks"):
        pytest.skip("torchattacks is not here; `course.py bench` has it")
    import square as contest  # benchmarks/square.py

    test = data.load(name) if name == "digits-28x28" else request.getfixturevalue("mnist")
    case = pretrained.load(f"{name}-standard"), test.x[:30], test.y[:30], threat, 80, 0
    (fell, spent), (theirs, their_spent) = contest.ours(*case), contest.torchattacks(*case)
    assert fell.double().mean() >= theirs.double().mean() - 0.1 and spent.mean() <= 1.1 * their_spent.mean()
    assert theirs.any()
