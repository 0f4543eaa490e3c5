"""Losses of certified training: their formula from reference bounds, gradients, schedules, and what they are for."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tmlcourse import data, models, training
from tmlcourse.attacks import pgd
from tmlcourse.certify import margins
from tmlcourse.certify.training import crown_ibp, dual, interval
from tmlcourse.threat import Linf

LOSSES = {"interval": interval, "crown_ibp": crown_ibp, "dual": dual}


def tiny(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).to(dtype)


def images(n=4, seed=0, dtype=torch.float64):
    return torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def robust(model, x, y, eps, method, box=(0.0, 1.0)):
    """log sum_j exp(z_j - z_y) with every difference at its worst."""
    low = margins(model, x, y, eps, method=method, box=box)
    return torch.logsumexp(-low, 1).mean()


# --- values ------------------------------------------------------------------------------------------------------------


def test_each_loss_is_the_mixture_that_its_formula_says():
    model, x, y = tiny().eval(), images(), torch.tensor([0, 1, 2, 0])
    clean = F.cross_entropy(model(x), y)
    low = {m: margins(model, x, y, 0.1, method=m) for m in ("ibp", "crown-ibp")}
    for loss, kappa, worst in (
        (interval(0.1), 0.5, robust(model, x, y, 0.1, "ibp")),
        (interval(0.1, kappa=0.2), 0.2, robust(model, x, y, 0.1, "ibp")),
        (interval(0.1, box=None), 0.5, robust(model, x, y, 0.1, "ibp", None)),
        (crown_ibp(0.1), 0.5, robust(model, x, y, 0.1, "ibp")),
        (crown_ibp(0.1, beta=(1.0, 1.0), kappa=0.0), 0.0, robust(model, x, y, 0.1, "crown-ibp")),
        (crown_ibp(0.1, beta=(1, 0.25)), 0.5, torch.logsumexp(-0.75 * low["ibp"] - 0.25 * low["crown-ibp"], 1).mean()),
        (dual(0.1), 0.0, robust(model, x, y, 0.1, "dual")),
        (dual(0.1, kappa=0.3), 0.3, robust(model, x, y, 0.1, "dual")),
    ):
        value, z = loss(model, x, y)
        assert value.item() == pytest.approx((kappa * clean + (1 - kappa) * worst).item(), abs=1e-12)
        assert torch.equal(z, model(x))


@pytest.mark.parametrize("name, eps", [("mlp", "0.01"), ("wong-kolter-mnist-0.1", "0.1")])
def test_losses_equal_those_of_auto_lirpas_bounds(name, eps, mnist, published):
    """Its bounds on 16 images (stored, float32), put into the formula of the papers."""
    path = Path(os.environ.get("TMLCOURSE_DATA", ".")) / "reference" / "crown.npz"
    if not path.exists():
        pytest.skip("needs reference/crown.npz in $TMLCOURSE_DATA")
    reference = np.load(path)
    model = models.mlp(hidden=(60, 40)) if name == "mlp" else published(name)
    for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear) and name == "mlp"):
        layer.weight.data = torch.from_numpy(reference[f"mlp/{i}.weight"])
        layer.bias.data = torch.from_numpy(reference[f"mlp/{i}.bias"])
    x, y = mnist.x[:16].double(), mnist.y[:16]
    model = model.double()
    for loss, theirs in (
        (interval(float(eps), kappa=0.0), "IBP"),
        (crown_ibp(float(eps), kappa=0.0, beta=(1, 1)), "CROWN-IBP"),
    ):
        low = np.pad(reference[f"{name}/{eps}/{theirs}"].astype(float), ((0, 0), (0, 1)))  # the label's own margin is 0
        expected = np.log(np.exp(-low).sum(1)).mean()
        assert loss(model, x, y)[0].item() == pytest.approx(expected, rel=1e-4), theirs
    model.float()


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_above_that_of_every_attack(name):
    for seed in range(3):
        model, x, y = tiny(seed).eval(), images(seed=seed), torch.tensor([0, 1, 2, 0])
        options = {} if name == "dual" else {"kappa": 0.0}
        value = LOSSES[name](0.15, **options)(model, x, y)[0]
        x_adv = pgd(model, x, y, Linf(0.15), steps=20, seed=0)
        assert value >= F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)
        tied = LOSSES[name](0.0, **options)(model, x, y)[0]
        assert tied.item() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    x, y = images(2, 1), torch.tensor([0, 2])

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny(1).eval()

        def forward(self):
            return LOSSES[name](0.08)(self.net, x, y)[0]

    module = Loss()
    names, values = zip(*module.named_parameters(), strict=True)
    given = tuple(v.detach().clone().requires_grad_() for v in values)
    value = lambda *tensors: functional_call(module, dict(zip(names, tensors, strict=True)), ())  # noqa: E731
    assert torch.autograd.gradcheck(value, given, eps=1e-6, atol=1e-6)


# --- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_eps_and_the_clean_share_move_on_a_line(name):
    """Warm-up: the clean loss; then eps from 0 to its end and the clean weight from 1 to kappa; then both stay."""
    model, x, y = tiny().eval(), images(), torch.tensor([0, 1, 2, 0])
    loss = LOSSES[name](0.2, kappa=0.4, warm_up=0.1, ramp=0.5)
    clean = F.cross_entropy(model(x), y).item()
    for progress in (0.0, 0.05, 0.1):
        assert loss(model, x, y, progress=progress)[0].item() == pytest.approx(clean, abs=1e-12)
    for progress, done in ((0.2, 0.2), (0.35, 0.5), (0.6, 1.0), (0.9, 1.0)):
        weight = 1 - 0.6 * done
        if name == "crown_ibp":
            low = [margins(model, x, y, 0.2 * done, method=m) for m in ("ibp", "crown-ibp")]
            worst = torch.logsumexp(-(done * low[0] + (1 - done) * low[1]), 1).mean()
        else:
            worst = robust(model, x, y, 0.2 * done, "ibp" if name == "interval" else "dual")
        expected = weight * clean + (1 - weight) * worst.item()
        assert loss(model, x, y, progress=progress)[0].item() == pytest.approx(expected, abs=1e-9), progress
    at_once = LOSSES[name](0.2, warm_up=0.0, ramp=0.0)
    assert torch.equal(at_once(model, x, y, progress=0.0)[0], at_once(model, x, y, progress=1.0)[0])
    slow = LOSSES[name](0.2, warm_up=0.0, ramp=0.5)
    assert slow(model, x, y, progress=0.0)[0].item() == pytest.approx(clean, abs=1e-12)


def test_the_mode_of_every_layer_is_put_back_and_batch_norm_learns_from_clean_images_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    model.train()
    model[2].eval()
    x, y = images(8, dtype=torch.float32), torch.tensor([0, 1, 2, 0] * 2)
    interval(0.1)(model, x, y)[0].backward()
    assert [m.training for m in model] == [True, True, False, True, True, True]
    assert all(p.grad is not None for p in model.parameters())
    model[2].train()
    interval(0.1)(model, x, y)
    with torch.no_grad():
        mean = model[1](x.flatten(1)).mean(0)
    assert torch.allclose(model[2].running_mean, 0.1 * mean, atol=1e-6)

    class Broken(nn.Module):
        def forward(self, x):
            return x

    odd = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), Broken()).train()
    with pytest.raises(ValueError, match="Broken"):
        interval(0.1)(odd, x, y)
    assert all(m.training for m in odd.modules())


# --- what they are for -------------------------------------------------------------------------------------------------


def certified(model, test, eps, methods=("ibp", "crown", "dual")):
    """The best share that a bound certifies."""
    low = [margins(model, test.x, test.y, eps, method=m).scatter(1, test.y[:, None], torch.inf) for m in methods]
    return max((m > 0).all(1).double().mean().item() for m in low)


def test_certified_training_certifies_more_than_adversarial_training():
    train, test, eps = data.load("digits", "train"), data.load("digits"), 0.1
    losses = {"adversarial": training.adversarial(Linf(eps), steps=5, alpha=eps / 2), "interval": interval(eps)}
    losses["dual"] = dual(eps, kappa=0.2)
    share, clean = {}, {}
    for name, loss in losses.items():
        model = models.mlp((1, 8, 8), hidden=(40,) if name == "dual" else (40, 40), seed=0)
        training.fit(model, train, epochs=12 if name == "dual" else 20, lr=5e-3, loss=loss, seed=0)
        share[name], clean[name] = certified(model, test, eps), training.accuracy(model, test.x, test.y)
        x_adv = pgd(model, test.x, test.y, Linf(eps), steps=20, seed=0)
        assert share[name] <= training.accuracy(model, x_adv, test.y)
        if name == "interval":
            own = certified(model, test, eps, ("ibp",))
    assert share["dual"] > share["adversarial"] + 0.02 and own > 0.3, (share, own)
    assert min(clean.values()) > 0.85


def test_two_runs_are_the_same_bit_for_bit():
    train, weights = data.load("digits", "train", n=200), []
    for _ in range(2):
        model = models.mlp((1, 8, 8), hidden=(10,), seed=0)
        training.fit(model, train, epochs=1, loss=crown_ibp(0.05), seed=0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("change, message", [
    ({"eps": -0.1}, "eps: got -0.1"),
    ({"eps": float("nan")}, "eps: got nan"),
    ({"kappa": 1.5}, "kappa: got 1.5"),
    ({"warm_up": 0.6, "ramp": 0.5}, "warm_up, ramp: got 0.6 and 0.5"),
    ({"ramp": -0.1}, "ramp: got -0.1"),
])  # fmt: skip
def test_bad_input_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**({"eps": 0.1} | change))


def test_bad_mixtures_and_boxes_are_named():
    with pytest.raises(ValueError, match="beta: got"):
        crown_ibp(0.1, beta=(1.5, 0.0))
    with pytest.raises(ValueError, match="box: got"):
        interval(0.1, box=(1.0, 0.0))(tiny().eval(), images(), torch.tensor([0, 1, 2, 0]))
