"""Losses that make a network robust: identities of the papers, formulas written out again, and what training reaches."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import attacks, data, kernels, models, training
from tmlcourse.attacks.losses import fools
from tmlcourse.threat import L1, L2, Linf
from tmlcourse.training import adversarial, ascent, early_stopped, fit, friendly, mart, mixture, single_step, trades

EPS = 0.15


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train", n=600)


@pytest.fixture(scope="module")
def test_set():
    return data.load("digits")


@pytest.fixture(scope="module")
def net(digits):
    model = cnn()
    fit(model, digits, epochs=8, lr=5e-3, batch_size=50, seed=0)
    return model


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(256, 10)).eval()  # fmt: skip


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(loss, digits, epochs=1, seed=0, **options):
    model = cnn()
    fit(model, digits, epochs=epochs, lr=5e-3, batch_size=50, loss=loss, seed=seed, **options)
    return model


THREAT = Linf(EPS)
LOSSES = {
    "cross_entropy": training.cross_entropy,
    "label_smoothing": training.label_smoothing(0.1),
    "adversarial": adversarial(THREAT, steps=3),
    "mixture": mixture(THREAT),
    "friendly": friendly(THREAT, steps=3, tau=1),
    "trades": trades(THREAT, steps=3),
    "mart": mart(THREAT, steps=3),
    "ensemble": training.ensemble(THREAT, [cnn(5)]),
    "cascade": training.cascade(THREAT, [cnn(6)], steps=3),
    "growing": training.growing(functools.partial(trades, steps=3), THREAT),
}


# --- identities ------------------------------------------------------------------------------------------------------


def test_friendly_training_with_tau_at_its_maximum_is_madrys_bit_for_bit(digits):
    madry = trained(adversarial(THREAT, steps=4, alpha=0.05), digits, epochs=2)
    full = trained(friendly(THREAT, steps=4, tau=4, alpha=0.05), digits, epochs=2)
    late = trained(friendly(THREAT, steps=4, tau=lambda done: 4, alpha=0.05), digits, epochs=2)
    assert torch.equal(weights(madry), weights(full)) and torch.equal(weights(madry), weights(late))
    assert not torch.equal(weights(madry), weights(trained(friendly(THREAT, steps=4, alpha=0.05), digits, epochs=2)))


@pytest.mark.parametrize(
    "loss",
    [trades(THREAT, beta=0.0), mixture(THREAT, weight=1), training.label_smoothing(0.0)],
    ids=["trades", "mixture", "smoothing"],
)
def test_the_end_of_the_scale_is_standard_training(digits, loss):
    assert torch.equal(weights(trained(loss, digits)), weights(trained(training.cross_entropy, digits)))


def test_mixture_without_clean_images_is_fgsm_training(digits):
    fgsm = adversarial(THREAT, single_step, random_start=False)
    torch.testing.assert_close(weights(trained(mixture(THREAT, weight=0.0), digits)), weights(trained(fgsm, digits)))


def test_growing_radius_is_zero_at_first_and_full_after_its_share(net, digits):
    x, y = digits.x[:40], digits.y[:40]
    loss = training.growing(functools.partial(adversarial, attack=single_step, random_start=False), THREAT, share=0.5)
    full = adversarial(THREAT, single_step, random_start=False)(net, x, y)[0]
    values = [loss(net, x, y, progress=p)[0].item() for p in (0.0, 0.25, 0.5, 0.9)]
    assert (
        values[0] == pytest.approx(training.cross_entropy(net, x, y)[0].item())
        and values[2] == values[3] == full.item()
    )
    assert values[0] < values[1] < values[2]


def test_goodfellow_on_a_linear_model_is_the_softplus_of_the_l1_norm():
    """alpha softplus(-m) + (1 - alpha) softplus(eps ||w||_1 - m), exactly."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 2).double(), 0.3 + 0.4 * torch.rand(30, 6).double(), torch.randint(0, 2, (30,))
    value, _ = mixture(Linf(0.1, box=None), weight=0.3)(model, x, y)
    w, b = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
    m = (2.0 * y - 1) * (x @ w + b)
    exact = (0.3 * F.softplus(-m) + 0.7 * F.softplus(0.1 * w.abs().sum() - m)).mean()
    torch.testing.assert_close(value, exact)
    found, expected = (torch.autograd.grad(v, model.weight)[0] for v in (value, exact))
    torch.testing.assert_close(found, expected)


# --- the attacks inside ----------------------------------------------------------------------------------------------


def test_ascent_is_the_textbook_loop(net, digits):
    x, y = digits.x[:30], digits.y[:30]
    torch.manual_seed(3)
    found = ascent(net, x, y, THREAT, steps=5, alpha=0.04)
    torch.manual_seed(3)
    x_adv = THREAT.random(x)
    for _ in range(5):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
        x_adv = torch.max(torch.min(x_adv.detach() + 0.04 * g.sign(), x + EPS), x - EPS).clamp(0, 1)
    same = (found - x_adv).abs().flatten(1).amax(1) < 1e-5  # rounding of another layout may decide a sign
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_a_friendly_image_stops_tau_steps_after_it_was_first_seen_wrong(net, digits, tau):
    """Replayed image by image: the walk to the end, the first point on it that is wrong, and tau steps on."""
    x, y, exact = digits.x[:25].double(), digits.y[:25], cnn().double()
    exact.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    x_adv, taken = early_stopped(exact, x, y, THREAT, steps=6, tau=tau, alpha=0.05)
    assert THREAT.contains(x_adv, x).all()
    kinds = set()
    for i in range(len(x)):
        torch.manual_seed(1)
        point, seen = THREAT.random(x)[i : i + 1], 0
        for step in range(7):
            z = exact(point.requires_grad_())
            wrong = bool(fools(z.detach(), y[i : i + 1]))
            if step == 6 or (wrong and seen == tau):
                break
            seen += wrong
            (g,) = torch.autograd.grad(F.cross_entropy(z, y[i : i + 1]), point)
            point = THREAT.project(point.detach() + 0.05 * g.sign(), x[i : i + 1])
        assert taken[i] == step
        torch.testing.assert_close(x_adv[i : i + 1], point.detach())
        kinds.add(step)
    assert len(kinds) > 2


def test_friendly_points_cost_less_and_are_less_wrong(net, digits):
    x, y, losses, cost = digits.x[:200], digits.y[:200], [], []
    for tau in (0, 1, 2, 10):
        torch.manual_seed(0)
        x_adv, taken = early_stopped(net, x, y, THREAT, steps=10, tau=tau)
        losses.append(F.cross_entropy(net(x_adv), y).item())
        cost.append(taken.double().mean().item())
    assert losses == sorted(losses) and cost == sorted(cost) and cost[0] < 6 and cost[-1] == 10


@given(st.sampled_from([Linf(0.2), L2(0.8), L1(2.0), Linf(0.0)]), st.integers(1, 3), st.integers(0, 4), st.booleans())
def test_attacks_stay_in_the_set_for_any_batch(threat, n, tau, double):
    torch.manual_seed(n)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.rand(n, 1, 3, 4), torch.randint(0, 2, (n,))
    model, x = (model.double(), x.double()) if double else (model, x)
    for x_adv in (
        ascent(model, x, y, threat, steps=3),
        early_stopped(model, x, y, threat, steps=3, tau=tau)[0],
        single_step(model, x, y, threat),
    ):
        assert x_adv.dtype == x.dtype and x_adv.shape == x.shape and not x_adv.requires_grad
        assert threat.contains(x_adv, x).all()


# --- the losses, written out again -----------------------------------------------------------------------------------


def nearby(x):
    torch.manual_seed(7)
    return THREAT.project(x + 0.001 * torch.randn_like(x), x)


def test_trades_is_cross_entropy_plus_beta_times_the_largest_divergence(net, digits):
    x, y = digits.x[:30], digits.y[:30]
    exact = cnn().double()
    exact.load_state_dict(net.state_dict())
    x = x.double()
    torch.manual_seed(7)
    value, z = trades(THREAT, beta=3.0, steps=4, alpha=0.05)(exact, x, y)
    p, x_adv = exact(x).softmax(1).detach(), nearby(x)
    for _ in range(4):
        x_adv.requires_grad_()
        kl = F.kl_div(exact(x_adv).log_softmax(1), p, reduction="sum")
        x_adv = THREAT.ascend(x_adv.detach(), torch.autograd.grad(kl, x_adv)[0], x, 0.05)
    expected = F.cross_entropy(exact(x), y) + 3 * F.kl_div(
        exact(x_adv).log_softmax(1), exact(x).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(z, exact(x))
    found, wanted = (torch.autograd.grad(v, exact[0].weight)[0] for v in (value, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("last, passes", [(nn.Identity(), 5), (nn.Dropout(0.5), 6), (nn.LogSoftmax(1), 6)])
def test_trades_asks_again_for_clean_logits_only_of_a_model_that_may_change_outside_training(digits, last, passes):
    model, modes = nn.Sequential(*cnn(), last).train(), []
    model.register_forward_hook(lambda module, inputs, z: modes.extend([module.training] * (len(z) == 8)))
    trades(THREAT, steps=3)(model, digits.x[:8], digits.y[:8])
    assert modes == [True, *[False] * (passes - 2), True]


def test_mart_is_the_papers_formula(net, digits):
    x, y = digits.x[:30].double(), digits.y[:30]
    exact = cnn().double()
    exact.load_state_dict(net.state_dict())
    torch.manual_seed(7)
    value, _ = mart(THREAT, beta=5.0, steps=4, alpha=0.05)(exact, x, y)
    x_adv = nearby(x)
    for _ in range(4):
        x_adv.requires_grad_()
        loss = F.cross_entropy(exact(x_adv), y, reduction="sum")
        x_adv = THREAT.ascend(x_adv.detach(), torch.autograd.grad(loss, x_adv)[0], x, 0.05)
    p, q, rows = exact(x).softmax(1), exact(x_adv).softmax(1), torch.arange(30)
    rival = q.clone()
    rival[rows, y] = -1
    bce = -q[rows, y].log() - (1 - rival.amax(1)).log()
    kl = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(value, (bce + 5 * kl * (1 - p[rows, y])).mean())


def test_mart_stays_finite_where_the_network_is_certain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data *= 1000
    x, y = torch.rand(20, 1, 8, 8), torch.randint(0, 10, (20,))
    value, _ = mart(THREAT, steps=2)(model, x, y)
    (grad,) = torch.autograd.grad(value, model[1].weight)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_ensemble_draws_every_network_and_attacks_that_one(net, digits, monkeypatch):
    x, y, others, seen = digits.x[:10], digits.y[:10], [cnn(1), cnn(2)], []

    def attack(model, x, y, threat):
        seen.append(model)
        return x

    loss = training.ensemble(THREAT, others, weight=0.25, attack=attack)
    torch.manual_seed(0)
    for _ in range(60):
        torch.testing.assert_close(loss(net, x, y)[0], training.cross_entropy(net, x, y)[0])
    assert all(12 < sum(m is candidate for m in seen) < 28 for candidate in (net, *others))


def test_cascade_uses_the_defended_networks_images_and_pulls_the_embeddings_together(net, digits):
    x, y, other = digits.x[:20], digits.y[:20], cnn(3)
    loss = training.cascade(THREAT, [other], weight=0.5, similarity=0.2, steps=3)
    images = {
        0: single_step(net, x, y, THREAT, random_start=False),
        1: ascent(other, x, y, THREAT, steps=3, random_start=False),
    }
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        which = int(torch.randint(2, ()))
        torch.manual_seed(seed)
        value, z = loss(net, x, y)
        z_adv = net(images[which])
        expected = (F.cross_entropy(z, y) + F.cross_entropy(z_adv, y)) / 2 + 0.2 * (z - z_adv).pow(2).sum(1).mean()
        torch.testing.assert_close(value, expected)
        drawn.add(which)
    assert drawn == {0, 1}
    pivot = training.cascade(THREAT, [other], weight=1.0, similarity=1.0, pivot=True, steps=3)
    both = training.cascade(THREAT, [other], weight=1.0, similarity=1.0, steps=3)
    grads = []
    for candidate in (pivot, both):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(candidate(net, x, y)[0], net[5].bias)[0])
    assert not torch.allclose(*grads)


# --- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_leaves_modes_gradients_and_statistics_and_runs_on_one_image(name, digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10)).train()
    model[2].eval()  # a frozen batch norm stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0)
    value, z = LOSSES[name](model, digits.x[:1], digits.y[:1])
    assert value.dim() == 0 and z.shape == (1, 10) and torch.isfinite(value)
    assert model.training and not model[2].training and model[3].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_modes_come_back_when_the_attack_fails(digits):
    def attack(*_):
        raise KeyboardInterrupt

    model = cnn().train()
    model[1].eval()
    with pytest.raises(KeyboardInterrupt):
        adversarial(THREAT, attack)(model, digits.x[:2], digits.y[:2])
    assert model.training and not model[1].training


@pytest.fixture(scope="module")
def standing(test_set):
    def left(model):
        attack = functools.partial(attacks.pgd, steps=10)
        return attacks.robust_accuracy(model, test_set.x, test_set.y, THREAT, [attack], seed=0).accuracy

    return left


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("cross_entropy", "label_smoothing")])
def test_every_method_withstands_more_than_standard_training(name, net, digits, standing):
    """Eight epochs on 600 digits of 8 x 8: at least twice the robust accuracy of standard training."""
    assert standing(trained(LOSSES[name], digits, epochs=8)) > 2 * standing(net)


# --- measures --------------------------------------------------------------------------------------------------------


def test_boundary_thickness_of_a_logistic_model_is_its_closed_form():
    """p_1 - p_0 = tanh(m / 2), and m is linear along the line: the zone is where 2 atanh(alpha) < m < 2 atanh(beta)."""
    torch.manual_seed(0)
    model, x, x_adv = nn.Linear(5, 2).double(), torch.rand(40, 5).double(), torch.rand(40, 5).double()
    model.weight.data *= 4
    model.bias.data = -(model.weight.data.sum(1)) / 2
    with torch.no_grad():
        m, m_adv = ((z[:, 1] - z[:, 0]) for z in (model(x), model(x_adv)))
    found = training.boundary_thickness(model, x, x_adv, alpha=0.0, beta=0.5, points=2000)
    same = m.sign() == m_adv.sign()
    assert torch.equal(found.isnan(), same) and 5 < same.sum() < 35
    start, end = m.abs(), -m_adv.abs()
    ceiling = torch.minimum(start, torch.full_like(m, 2 * torch.atanh(torch.tensor(0.5)).item()))
    exact = (x - x_adv).norm(dim=1) * ceiling / (start - end)
    torch.testing.assert_close(found[~same], exact[~same], atol=2e-3, rtol=0)


def test_boundary_of_a_robust_network_is_thicker(net, digits, test_set):
    robust = trained(adversarial(THREAT, steps=3), digits, epochs=8)
    thickness = []
    for model in (net, robust):
        x_adv = attacks.pgd(model, test_set.x, test_set.y, Linf(0.5), steps=10, seed=0)
        thickness.append(training.boundary_thickness(model, test_set.x, x_adv).nanmean())
    assert thickness[1] > 1.2 * thickness[0]


def test_scorecard_is_ordered_and_two_classes_have_one(net, test_set):
    x, y = test_set.x[:60], test_set.y[:60]
    row = training.scorecard(net, x, y, Linf(0.08), steps=5)
    assert list(row) == ["clean", "fgsm", "pgd", "cw", "ensemble"]
    assert row["clean"] == pytest.approx(training.accuracy(net, x, y))
    assert row["clean"] >= row["fgsm"] and min(row["fgsm"], row["pgd"], row["cw"]) >= row["ensemble"]
    assert row == training.scorecard(net, x, y, Linf(0.08), steps=5)
    two = training.scorecard(models.linear((1, 8, 8), 2, seed=0), x, y % 2, Linf(0.05), steps=3)
    assert two["clean"] >= two["ensemble"]


def test_the_shipped_table_is_whole_and_in_the_published_order():
    """On MNIST at 0.3: standard < single steps < Madry, friendly, TRADES and MART; FGSM flatters the single-step methods."""
    table = training.shipped_table("mnist").set_index("method")
    assert (
        len(table) == 12
        and table.index.is_unique
        and table[["images", "epochs", "steps", "network"]].nunique().eq(1).all()
    )
    attacked = table[["fgsm", "pgd", "cw"]].min(axis=1)
    assert (table.clean > 0.9).all() and (table.ensemble <= attacked).all() and (attacked <= table.clean).all()
    iterative = ["Madry", "Madry, averaged", "friendly", "TRADES", "MART"]
    assert table.ensemble[iterative].min() > table.ensemble.drop(iterative).max()
    assert table.ensemble[["standard", "label smoothing"]].max() < 0.02 and table.fgsm["FGSM"] > table.pgd["FGSM"] + 0.2
    with pytest.raises(ValueError, match="name: got 'cifar', want one of mnist"):
        training.shipped_table("cifar")


def test_bad_input(net, digits):
    x, y = digits.x[:4], digits.y[:4]
    for call, error, message in [
        (lambda: ascent(net, x * 255, y, THREAT), ValueError, "x: got values in"),
        (lambda: ascent(net, x, y, THREAT, steps=0), ValueError, "steps: got 0"),
        (lambda: early_stopped(net, x, y, THREAT, tau=-1), ValueError, "tau: got -1"),
        (lambda: early_stopped(net, x, y.int(), THREAT), TypeError, "y: got dtype"),
        (lambda: friendly(THREAT, tau=1.5), TypeError, "tau: got 1.5"),
        (lambda: trades(THREAT, beta=-1), ValueError, "beta: got -1"),
        (lambda: mart(THREAT, steps=0), ValueError, "steps: got 0"),
        (lambda: mixture(THREAT, weight=1.1), ValueError, "weight: got 1.1"),
        (lambda: training.label_smoothing(1.0), ValueError, "share: got 1.0"),
        (lambda: training.ensemble(THREAT, []), TypeError, "sources: got list"),
        (lambda: training.cascade(THREAT, net), TypeError, "sources: got Sequential"),
        (lambda: training.growing(adversarial, THREAT, share=0), ValueError, "share: got 0"),
        (lambda: training.boundary_thickness(net, x, x, alpha=0.5, beta=0.5), ValueError, "alpha, beta: got 0.5 and 0.5"),
        (lambda: training.boundary_thickness(net, x, x[:2]), ValueError, "x_adv: got shape"),
        (lambda: training.scorecard(net, x, y, THREAT, steps=0), ValueError, "steps: got 0"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0), L1(5.0)])
def test_training_takes_its_steps_where_a_gpu_has_a_kernel_for_them(net, test_set, threat, monkeypatch):
    """On a CPU that is the threat's own step, bit for bit."""
    some, taken = test_set[:20], []

    def found():
        torch.manual_seed(0)
        losses = (adversarial(threat, steps=2), friendly(threat, steps=2, tau=1), adversarial(threat, single_step))
        return [loss(net, some.x, some.y)[1].detach() for loss in losses]

    expected = found()
    monkeypatch.setattr(
        kernels, "ascent_step", lambda x_adv, grad, x, t, alpha: taken.append(t) or t.ascend(x_adv, grad, x, alpha)
    )
    for ours, own in zip(expected, found(), strict=True):
        assert torch.equal(ours, own)
    assert taken == [threat] * len(taken) and len(taken) == 5
