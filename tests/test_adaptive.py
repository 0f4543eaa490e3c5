"""Adaptive attacks: the substitute gradient is the one asked for, the averages are averages, and every defence falls."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained, training
from tmlcourse.attacks import cross_entropy, deepfool, fgsm, margin, pgd, robust_accuracy
from tmlcourse.defenses import (
    BitDepth,
    Detector,
    MeanFilter,
    MedianFilter,
    RandomResizePad,
    Thermometer,
    bpda,
    eot,
    evade,
    expected_accuracy,
    logit_space_ascent,
    obfuscation_checks,
    prune_activations,
    squeezing_detector,
)
from tmlcourse.threat import L0, L1, L2, Linf

SYMPTOMS = ["no gradient", "answers change between calls", "one step beats many", "black box beats white box",
            "random search beats the gradient", "an unbounded attack fails", "a larger ball does not help"]  # fmt: skip


def images(shape=(5, 1, 6, 6), seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(channels=1):
    """A convolutional network for 28 x 28 digits that trains in seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1568, 50), nn.ReLU(), nn.Linear(50, 10),
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """(50 test images, their labels, a plain network, one on thermometer codes); the plain one saw shifted digits."""
    train, test = data.load("digits-28x28", "train"), data.load("digits-28x28", n=50)
    plain, coded = small(), nn.Sequential(Thermometer(8), small(8)).eval()
    training.fit(plain, train, epochs=10, lr=2e-3, seed=0, augment=RandomResizePad(24))
    training.fit(coded, train, epochs=6, lr=2e-3, seed=0)
    return test.x, test.y, plain, coded


# ---- BPDA


@given(seed=st.integers(0, 99))
def test_bpda_is_g_forward_and_the_identity_backward(seed):
    x, g = images(seed=seed).requires_grad_(), BitDepth(1)
    out = bpda(g)(x)
    assert torch.equal(out, g(x))
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    (grad,) = torch.autograd.grad(out, x, up)
    assert torch.equal(grad, up)


def test_bpda_with_another_function_has_its_gradient_at_x():
    x = images(dtype=torch.float64).requires_grad_()
    out = bpda(lambda v: v.round(), lambda v: v**3)(x)
    assert torch.equal(out, x.round())
    up = torch.randn_like(x)
    (grad,) = torch.autograd.grad(out, x, up)
    assert torch.allclose(grad, 3 * x**2 * up)
    encoder = Thermometer(5)
    coded = bpda(encoder, encoder.soft)(x)
    assert torch.equal(coded, encoder(x)) and coded.shape == (5, 5, 6, 6)
    (ours,) = torch.autograd.grad(coded.sum(), x)
    (theirs,) = torch.autograd.grad(encoder.soft(x).sum(), x)
    assert torch.equal(ours, theirs)


def test_bpda_of_a_smooth_function_by_itself_changes_nothing():
    x, y, model = images(), torch.tensor([0, 1, 2, 0, 1]), models.mlp((1, 6, 6), 3, seed=0)
    plain = nn.Sequential(MeanFilter(3), model)
    repaired = nn.Sequential(bpda(MeanFilter(3), MeanFilter(3)), model)
    attacked = [pgd(m, x, y, Linf(0.1), steps=5, seed=0) for m in (plain, repaired)]
    assert torch.equal(*attacked)


def test_bpda_says_when_shapes_do_not_fit():
    x = images().requires_grad_()
    with pytest.raises(ValueError, match="^backward: got the identity"):
        bpda(Thermometer(3))(x)
    with pytest.raises(ValueError, match=r"^backward: got output \(5, 36\)"):
        bpda(Thermometer(3), lambda v: v.flatten(1))(x).sum().backward()
    with pytest.raises(TypeError, match="^g: got int"):
        bpda(3)
    with pytest.raises(TypeError, match="^backward: got int"):
        bpda(BitDepth(1), 3)


def test_bpda_of_the_identity_does_not_alias_its_input():
    x = images()
    out = bpda(lambda v: v)(x)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


# ---- EOT


class Noisy(nn.Module):
    """Logits W x + noise, drawn from torch's generator."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.inner = models.linear((1, 6, 6), 3, seed=0).to(dtype)

    def forward(self, x):
        return self.inner(x) * (1 + torch.randn(len(x), 1, dtype=x.dtype))


def test_eot_is_the_mean_of_logits_and_of_gradients():
    x, y, model = images(dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 2, 0, 1]), Noisy()
    torch.manual_seed(3)
    draws = torch.stack([model(x) for _ in range(7)])
    torch.manual_seed(3)
    z = eot(model, 7)(x)
    assert torch.allclose(z, draws.mean(0))
    weight = torch.randn_like(z)
    (mean,) = torch.autograd.grad((z * weight).sum(), x, retain_graph=True)
    each = [torch.autograd.grad((d * weight).sum(), x, retain_graph=True)[0] for d in draws]
    assert torch.allclose(mean, torch.stack(each).mean(0))
    below = torch.stack([cross_entropy(d, y) for d in draws]).mean(0)
    assert (cross_entropy(z, y) <= below + 1e-12).all()  # Jensen


def test_eot_with_a_seed_is_a_function_and_leaves_everything_as_it_was():
    x, model = images(dtype=torch.float64), Noisy().eval()
    torch.manual_seed(1)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fixed = eot(model, 4, seed=0)
    assert torch.equal(fixed(x), fixed(x)) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(eot(model, 4)(x), eot(model, 4)(x))
    y = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(pgd(fixed, x, y, Linf(0.1), steps=4, seed=0), pgd(fixed, x, y, Linf(0.1), steps=4, seed=0))
    assert not model.training and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.train()
    eot(model, 2)
    assert model.training
    for bad in (0, 1.5):
        with pytest.raises((TypeError, ValueError), match="^samples: got"):
            eot(model, bad)


# ---- logit-space ascent


@given(eps=st.floats(0, 0.6), levels=st.integers(2, 9), seed=st.integers(0, 30))
def test_logit_space_ascent_stays_in_the_set_and_is_never_worse(eps, levels, seed):
    x = images((4, 2, 5, 3), seed)
    x[0, 0, 0], x[1, 0, 0] = 0.0, 1.0
    y = torch.tensor([0, 1, 0, 1])
    encoder, net = Thermometer(levels), models.linear((2 * levels, 5, 3), 2, seed=seed)
    x_adv = logit_space_ascent(encoder, net, x, y, Linf(eps), steps=2, seed=0)
    assert Linf(eps).contains(x_adv, x, tolerance=1e-6).all() and x_adv.dtype == x.dtype
    before, after = (net(encoder(v)) for v in (x, x_adv))
    wrong = margin(before, y) > 1e-5 * (1 + before.abs().amax(1))
    assert ((margin(after, y) > 0) >= wrong).all()
    assert (cross_entropy(after, y) >= cross_entropy(before, y) - 1e-6)[~wrong & (margin(after, y) <= 0)].all()
    if eps == 0:
        assert torch.equal(x_adv, x)


def test_logit_space_ascent_is_exact_on_one_pixel():
    """One pixel, few levels: what it finds is the best of all buckets, by trying them all."""
    torch.manual_seed(0)
    encoder, x, y = Thermometer(6), torch.rand(40, 1, 1, 1), torch.randint(0, 2, (40,))
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)).eval()
    x_adv = logit_space_ascent(encoder, net, x, y, Linf(0.3), steps=40, restarts=4, loss="margin", seed=0)
    grid = (x + torch.linspace(-0.3, 0.3, 2001).view(1, -1, 1, 1)).clamp(0, 1)
    best = margin(net(encoder(grid.reshape(-1, 1, 1, 1))), y.repeat_interleave(2001)).view(40, 2001).amax(1)
    assert torch.allclose(margin(net(encoder(x_adv)), y), best, atol=1e-5)


def test_logit_space_ascent_is_reproducible_and_leaves_the_model_alone(digits):
    x, y, _, coded = digits
    encoder, net = coded
    torch.manual_seed(2)
    before = torch.get_rng_state()
    first, again = (logit_space_ascent(encoder, net, x[:8], y[:8], Linf(0.1), steps=3, seed=4) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    double = copy.deepcopy(net).double()
    x_adv = logit_space_ascent(encoder, double, x[:8].double(), y[:8], Linf(0.1), steps=3, seed=4)
    assert x_adv.dtype == torch.float64


@pytest.mark.parametrize("options, says", [
    (dict(encoder=BitDepth(1)), "encoder"), (dict(threat=L2(1.0)), "threat"), (dict(threat=Linf(0.1, box=None)), "threat"),
    (dict(steps=0), "steps"), (dict(restarts=0), "restarts"), (dict(xi=0), "xi"), (dict(anneal=0.9), "anneal"),
    (dict(x=images() * 255), "x"), (dict(y=torch.zeros(5)), "y"), (dict(y=torch.full((5,), 3)), "y"),
])  # fmt: skip
def test_logit_space_ascent_names_bad_input(options, says):
    encoder, net = Thermometer(3), models.linear((3, 6, 6), 3, seed=0)
    given = dict(encoder=encoder, net=net, x=images(), y=torch.tensor([0, 1, 2, 0, 1]), threat=Linf(0.1)) | options
    args = [given.pop(k) for k in ("encoder", "net", "x", "y", "threat")]
    with pytest.raises((TypeError, ValueError), match=f"^{says}: got"):
        logit_space_ascent(*args, **given)


# ---- the detector evaded


def test_what_evades_is_misread_and_passes_and_the_rest_is_clean(digits):
    x, y, plain, _ = digits
    detector = squeezing_detector(
        plain, [bpda(BitDepth(1)), MedianFilter(2)], data.load("digits-28x28", "train").x[-300:]
    )
    threat = Linf(0.3)
    found = evade(detector, x, y, threat, steps=15, seed=0)
    assert torch.equal(found, evade(detector, x, y, threat, steps=15, seed=0))
    moved = (found != x).flatten(1).any(1)
    assert threat.contains(found, x).all() and moved.double().mean() > 0.7
    assert (plain(found).argmax(1) != y)[moved].all() and not detector.flags(found)[moved].any()
    wrong = plain(x).argmax(1) != y
    assert not moved[wrong & ~detector.flags(x)].any()
    assert torch.equal(evade(detector, x, y, Linf(0.0), steps=2), x)
    naive = deepfool(plain, x, y)
    fooled = plain(naive).argmax(1) != y
    assert detector.flags(naive)[fooled].double().mean() > 0.4
    for bad, says in ((dict(detector=plain), "detector"), (dict(attack=3), "attack"), (dict(y=y[:3]), "y")):
        with pytest.raises((TypeError, ValueError), match=f"^{says}: got"):
            evade(bad.pop("detector", detector), x, bad.pop("y", y), threat, **bad)


def test_evasion_moves_what_all_views_see():
    """Two pixels: the heavier one convinces the model alone, the lighter one also convinces it behind the squeezer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [8.0, 5.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -0.3 * 13 - 1]))
    x, y = torch.full((3, 1, 1, 2), 0.3), torch.zeros(3, dtype=torch.int64)
    detector = Detector(model, (lambda v: v * torch.tensor([0.0, 1.0]) + torch.tensor([0.3, 0.0]),), 0.6)
    naive = pgd(model, x, y, L1(0.4), steps=10, random_start=False)
    assert (model(naive).argmax(1) == 1).all() and detector.flags(naive).all()
    found = evade(detector, x, y, L1(0.4), steps=10, random_start=False)
    assert (model(found).argmax(1) == 1).all() and (detector.scores(found) < 1e-4).all()
    assert L1(0.4).contains(found, x).all()


# ---- each defence of the package: holds against the attack of its time, falls to the adaptive one


def test_bit_depth_holds_against_plain_pgd_and_falls_to_bpda(digits):
    x, y, plain, _ = digits
    defended, repaired = (nn.Sequential(layer, plain) for layer in (BitDepth(3), bpda(BitDepth(3))))
    clean = training.accuracy(defended, x, y)
    transferred = training.accuracy(defended, deepfool(plain, x, y), y)
    naive = robust_accuracy(defended, x, y, Linf(0.3), [pgd], seed=0).accuracy
    adaptive = training.accuracy(defended, pgd(repaired, x, y, Linf(0.3), seed=0), y)
    assert clean > 0.9 and naive > 0.8 * clean and transferred > 0.3 and adaptive < 0.05


def test_thermometer_holds_against_plain_pgd_and_falls_to_bpda_and_logit_space_ascent(digits):
    x, y, _, coded = digits
    encoder, net = coded
    naive = robust_accuracy(coded, x, y, Linf(0.3), [pgd], seed=0).accuracy
    relaxed = logit_space_ascent(encoder, net, x, y, Linf(0.3), seed=0)
    replaced = pgd(nn.Sequential(bpda(encoder, encoder.soft), net), x, y, Linf(0.3), seed=0)
    assert naive > 0.5
    assert training.accuracy(coded, relaxed, y) < 0.05 and training.accuracy(coded, replaced, y) < 0.05


def test_pruning_resists_one_step_and_falls_to_expectation(digits):
    x, y, plain, _ = digits
    x, y = x[:30], y[:30]
    defended = prune_activations(plain, 0.3)
    torch.manual_seed(0)
    accuracy, many = partial(expected_accuracy, defended, y=y, seed=0), partial(pgd, steps=15, seed=0)
    undefended = training.accuracy(plain, fgsm(plain, x, y, Linf(0.1)), y)
    naive = accuracy(fgsm(defended, x, y, Linf(0.1)))
    adaptive = accuracy(many(eot(defended, 5), x, y, Linf(0.1)))
    assert naive > undefended + 0.05 and adaptive < naive - 0.05
    assert accuracy(many(eot(defended, 5), x, y, Linf(0.3))) < 0.05


def test_resizing_resists_what_was_made_without_it_and_falls_to_expectation(digits):
    x, y, plain, _ = digits
    defended = nn.Sequential(RandomResizePad(24), plain).eval()
    torch.manual_seed(0)
    naive = expected_accuracy(defended, deepfool(plain, x, y), y, seed=0)
    attacked = pgd(eot(defended, 5), x, y, Linf(0.3), steps=15, seed=0)
    assert expected_accuracy(defended, x, y, seed=0) > 0.85
    assert naive > 0.3 and expected_accuracy(defended, attacked, y, seed=0) < 0.05


# ---- the checklist


def report(model, x, y, threat, **options):
    return obfuscation_checks(
        model, x, y, threat, **{"queries": 60, "points": 20, "verbose": False, "seed": 0, **options}
    )


def test_the_checklist_flags_every_defence_that_hides_its_gradient(digits):
    x, y, plain, coded = digits
    x, y = x[:25], y[:25]
    expected = {
        "no gradient": [nn.Sequential(BitDepth(1), plain), nn.Sequential(BitDepth(3), plain), coded,
                        lambda v: 1e4 * plain(v), lambda v: plain(v).detach()],
        "answers change between calls": [nn.Sequential(RandomResizePad(24), plain), prune_activations(plain, 0.5)],
    }  # fmt: skip
    for symptom, defended in expected.items():
        for model in defended:
            table = report(model, x, y, Linf(0.2)).set_index("symptom")
            assert table.flagged[symptom], (symptom, model, table)


@pytest.mark.parametrize("name", ["digits-28x28-standard", "digits-28x28-robust"])
def test_the_checklist_does_not_flag_the_standard_and_the_robust_network(name):
    test = data.load("digits-28x28", n=20)
    table = report(pretrained.load(name), test.x, test.y, Linf(0.2))
    assert table.symptom.tolist() == SYMPTOMS and not table.flagged.any(), table


@pytest.mark.parametrize("name", ["mnist-standard", "mnist-robust"])
def test_the_checklist_does_not_flag_the_networks_on_mnist(name, mnist):
    table = report(pretrained.load(name), mnist.x[:15], mnist.y[:15], Linf(0.3))
    assert not table.flagged.any(), table


def test_the_checklist_does_not_flag_filters_that_hide_nothing(digits):
    x, y, plain, _ = digits
    for layer in (MeanFilter(3), MedianFilter(2)):
        table = report(nn.Sequential(layer, plain), x[:25], y[:25], Linf(0.2))
        assert not table.flagged.any(), table


def test_each_symptom_is_measured_on_a_model_that_has_it(digits):
    """Hand-made attacks and models, one a symptom, for which the share is known."""
    x, y, plain, _ = digits
    right = plain(x).argmax(1) == y
    x, y = x[right][:30], y[right][:30]

    def idle(model, x, y, threat):
        return x

    table = report(plain, x, y, Linf(0.3), attack=idle).set_index("symptom")
    for symptom in ("one step beats many", "black box beats white box", "an unbounded attack fails"):
        assert table.share[symptom] > 0.5 and table.flagged[symptom]
    assert table.share["an unbounded attack fails"] == 1

    def only_small(model, x, y, threat):
        return pgd(model, x, y, threat, steps=10, seed=0) if threat.eps < 0.45 else x

    table = report(plain, x, y, Linf(0.3), attack=only_small).set_index("symptom")
    assert table.share["a larger ball does not help"] > 0.9 and table.flagged["a larger ball does not help"]
    assert table.share["one step beats many"] == 0

    fragile = nn.Sequential(BitDepth(3), plain)  # random points do something, the zero gradient nothing
    table = report(fragile, x, y, Linf(0.6), attack=idle, points=60).set_index("symptom")
    assert table.share["random search beats the gradient"] > 0.1

    def broken_backward(v):
        return plain(v) + 0 * (v.flatten(1)[:, :1] - v.flatten(1)[:, :1]).sqrt()

    table = report(broken_backward, x, y, Linf(0.3)).set_index("symptom")
    assert table.share["no gradient"] == 1, "a gradient that is not a number"


@pytest.mark.parametrize("threat", [L2(1.0), L1(3.0), L0(5)])
def test_the_checklist_knows_the_other_threats(digits, threat):
    x, y, plain, _ = digits
    table = report(plain, x[:10], y[:10], threat, steps=5, tolerance=0.9)
    measured = table.share.notna()
    assert measured.sum() == 7 - (not isinstance(threat, L2)) and not table.flagged[~measured].any()


def test_the_checklist_prints_is_reproducible_and_leaves_the_model_alone(digits, capsys):
    x, y, plain, _ = digits
    model = prune_activations(plain, 0.5)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first = obfuscation_checks(model, x[:10], y[:10], Linf(0.1), steps=3, queries=5, points=4, seed=1)
    lines = capsys.readouterr().out.splitlines()
    again = report(model, x[:10], y[:10], Linf(0.1), steps=3, queries=5, points=4, seed=1)
    assert first.equals(again) and torch.equal(before, torch.get_rng_state())
    assert len(lines) == 7 and lines[1].startswith("FLAGGED answers change") and capsys.readouterr().out == ""
    assert all(p.grad is None and p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("options, says", [
    (dict(steps=0), "steps"), (dict(queries=-1), "queries"), (dict(points=-1), "points"), (dict(tolerance=1), "tolerance"),
    (dict(threat=Linf(0.1, box=None)), "threat"), (dict(threat=0.1), "threat"), (dict(x=images() * 255), "x"),
    (dict(y=torch.full((5,), 7)), "y"), (dict(wrong=True), "x"),
])  # fmt: skip
def test_the_checklist_names_bad_input(options, says):
    model, x = models.linear((1, 6, 6), 3, seed=0), images()
    y = model(x).argmin(1) if options.pop("wrong", False) else model(x).argmax(1)
    given = dict(x=x, y=y, threat=Linf(0.1)) | options
    with pytest.raises((TypeError, ValueError), match=f"^{says}: got"):
        report(model, given.pop("x"), given.pop("y"), given.pop("threat"), **given)
