"""Unlearnable data: closed form on a linear model, inside the ball, and what it does to those who train on it."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, training
from tmlcourse.poisoning import unlearnable
from tmlcourse.poisoning.unlearnable import _slope
from tmlcourse.threat import Linf


def tiny(seed=0, dtype=torch.float32, shape=(1, 4, 3), classes=3):
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.rand(30, *shape, generator=gen, dtype=dtype), torch.arange(30) % classes
    return SimpleNamespace(x=x, y=y), models.mlp(shape, classes, hidden=(8,), seed=seed).to(dtype)


@settings(max_examples=25)
@given(
    st.integers(0, 10**4),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_protected_data_keeps_labels_ball_and_model(seed, eps, class_wise, dtype):
    original, model = tiny(seed, dtype)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = {"eps": eps, "class_wise": class_wise, "rounds": 2, "train_steps": 2, "noise_steps": 3, "seed": seed}
    found = unlearnable(original, model, **options)
    assert found.y.equal(original.y) and found.x.dtype == dtype and found.x.shape == original.x.shape
    assert Linf(eps).contains(found.x, original.x).all() and found.noise.abs().max() <= eps + 1e-7
    assert found.noise.shape == (3 if class_wise else 30, 1, 4, 3)
    noise = found.noise[original.y] if class_wise else found.noise
    assert torch.allclose(found.x, (original.x + noise).clamp(0, 1), atol=1e-6) and 0 <= found.error <= 1
    assert unlearnable(original, model, **options).x.equal(found.x)
    assert all(a.equal(b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert before[1].equal(torch.get_rng_state()) and not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("class_wise", [True, False])
def test_for_two_classes_and_a_fixed_linear_model_the_noise_is_its_closed_form(class_wise):
    """The loss falls along sign(w_y - w_other), so the least loss is at that corner of the ball."""
    original, _ = tiny(classes=2)
    original.x = 0.4 + 0.2 * original.x  # so that the box does not bind
    model = models.linear((1, 4, 3), 2, seed=0)
    found = unlearnable(
        original, model, eps=0.1, class_wise=class_wise, rounds=1, train_steps=1, noise_steps=12, lr=1e-12
    )
    w = model[-1].weight.detach()
    corner = 0.1 * torch.stack([w[0] - w[1], w[1] - w[0]]).sign().view(2, 1, 4, 3)
    assert torch.allclose(found.noise, corner if class_wise else corner[original.y], atol=1e-6)


def test_the_slope_is_the_sum_over_the_images_of_each_noise():
    original, model = tiny(dtype=torch.float64)
    noise = 0.1 * torch.randn(3, 1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = _slope(model, Linf(0.2), original.x, original.y, noise, original.y)
    want = torch.zeros_like(noise)
    for x, y in zip(original.x, original.y, strict=True):
        moved = Linf(0.2).project(x[None] + noise[y], x[None]).requires_grad_()
        want[y] += torch.autograd.grad(F.cross_entropy(model(moved), y[None]), moved)[0][0]
    assert torch.allclose(got, want, atol=1e-12)


def test_the_search_lowers_the_loss_of_its_own_network():
    """Error-minimising: with the noise, an untrained network's loss is below that without; with the wrong sign, above."""
    original, model = tiny()
    found = unlearnable(original, model, eps=0.3, rounds=1, train_steps=1, noise_steps=10, lr=1e-12, seed=0)
    with torch.no_grad():
        less, plain, more = (F.cross_entropy(model(x), original.y) for x in (
            found.x, original.x, (original.x - found.noise[original.y]).clamp(0, 1)))  # fmt: skip
    assert less < plain < more


def small_cnn(seed):
    torch.manual_seed(seed)
    first = [nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(128, 10)).eval()


def strangers(train, test, eps=0.2):
    """Test accuracy after training on clean, randomly noisy and protected images, and adversarially on the last."""
    with torch.random.fork_rng():
        protected = unlearnable(train, small_cnn(7), eps=eps, rounds=6, noise_steps=15, stop=0.0, seed=0)
        signs = 2 * torch.randint(2, protected.noise.shape, generator=torch.Generator().manual_seed(0)) - 1
        control = SimpleNamespace(x=(train.x + eps * signs[train.y]).clamp(0, 1), y=train.y)
        robust = training.adversarial(Linf(eps / 2), training.single_step, alpha=0.625 * eps)
        runs = {"clean": train, "noise": control, "protected": protected, "robust": protected}
        found = {}
        for name, images in runs.items():
            model, loss = small_cnn(0), robust if name == "robust" else training.cross_entropy
            training.fit(model, images, epochs=12, lr=3e-3, batch_size=50, loss=loss, seed=0)
            found[name] = training.accuracy(model, test.x, test.y)
            if name == "protected":
                assert training.accuracy(model, protected.x, protected.y) > 0.98
    return found


def test_who_trains_on_protected_digits_learns_less_unless_adversarially():
    found = strangers(data.load("digits-28x28", "train")[:1000], data.load("digits-28x28"))
    assert found["protected"] < found["clean"] - 0.1 and found["protected"] < found["noise"] - 0.03
    assert found["robust"] > found["protected"] + 0.02


def test_who_trains_on_protected_mnist_learns_little_unless_adversarially(mnist):
    found = strangers(mnist[:1000], mnist[5000:6000])
    assert found["protected"] < found["clean"] - 0.25 and found["protected"] < found["noise"] - 0.1
    assert found["robust"] > found["protected"] + 0.1


ORIGINAL, MODEL = tiny()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"eps": -0.1}, ValueError, "eps"),
    ({"eps": float("inf")}, ValueError, "eps"),
    ({"rounds": 0}, ValueError, "rounds"),
    ({"train_steps": 0}, ValueError, "train_steps"),
    ({"noise_steps": 1.5}, TypeError, "noise_steps"),
    ({"batch_size": 0}, ValueError, "batch_size"),
    ({"lr": 0.0}, ValueError, "lr"),
    ({"stop": 1.5}, ValueError, "stop"),
    ({"seed": -1}, ValueError, "seed"),
    ({"model": lambda x: x}, TypeError, "model"),
    ({"data": SimpleNamespace(x=ORIGINAL.x * 255, y=ORIGINAL.y)}, ValueError, "data.x"),
    ({"data": SimpleNamespace(x=ORIGINAL.x, y=ORIGINAL.y + 1)}, ValueError, "label 3"),
    ({"lr": 1e30, "train_steps": 30}, FloatingPointError, "lower lr"),
])  # fmt: skip
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        unlearnable(**{"data": ORIGINAL, "model": MODEL, "eps": 0.1, "rounds": 1, "seed": 0, **change})
