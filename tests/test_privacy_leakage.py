"""Gradient leakage: exact leaks, the matching gradient against autograd, recovered digits, and what stops it."""

import functools

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, privacy
from tmlcourse.poisoning import federated_average
from tmlcourse.privacy.leakage import _gradient, lbfgs


def mse(a, b):
    return (a - b).square().flatten(1).mean(1)


@functools.cache
def digits(n=6):
    test = data.load("digits-28x28", n=n)
    net = privacy.leaky_lenet(seed=1)
    return net, test.x, test.y, privacy.per_example_gradients(net, test.x, test.y)


# ---- exact


@given(st.integers(0, 10**6))
def test_a_first_linear_layer_gives_its_input_away(seed):
    net = models.mlp((1, 4, 5), 3, hidden=(9,), seed=seed).double()
    x = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    g = privacy.shared_gradient(net, x, torch.tensor([seed % 3]))
    found, units = privacy.linear_leak(g["1.weight"][0], g["1.bias"][0])
    assert torch.allclose(found, x.flatten(1).expand_as(found), rtol=1e-6)
    assert set(units.tolist()) == set((g["1.bias"][0] != 0).nonzero()[:, 0].tolist())


def test_in_a_batch_units_that_saw_one_image_give_that_image():
    test = data.load("digits", n=6)
    net = models.mlp((1, 8, 8), hidden=(400,), seed=0)
    with torch.no_grad():
        net[1].bias -= 0.4  # few images wake a unit
    g = privacy.shared_gradient(net, test.x, test.y)
    found, units = privacy.linear_leak(g["1.weight"][0], g["1.bias"][0])
    alone = ((net[1](test.x.flatten(1)) > 0).sum(0) == 1)[units]
    gaps = torch.cdist(found, test.x.flatten(1)).min(1).values
    assert alone.sum() > 3 and gaps[alone].max() < 1e-3 < gaps[~alone].min()


@pytest.mark.parametrize("bias", [True, False])
def test_the_sign_of_the_gradient_is_the_label(bias):
    net, x, y, _ = digits(20)
    if not bias:
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Sigmoid(), nn.Linear(30, 10, bias=False))
    g = privacy.per_example_gradients(net, x, y)
    assert torch.equal(privacy.leaked_label(net, g), y)
    if bias:
        last = g["7.bias"]
        assert ((last < 0).sum(1) == 1).all() and torch.equal((last < 0).int().argmax(1), y)


def test_a_client_of_federated_averaging_sends_its_gradient():
    test = data.load("digits", n=1)
    net = models.mlp((1, 8, 8), hidden=(20,), seed=0).double()
    double = type("D", (), {"x": test.x.double(), "y": test.y})
    after, _ = federated_average(
        net, double, [torch.tensor([0])], rounds=1, sample=1, steps=1, batch_size=1, lr=0.1, seed=0
    )
    update = {k: (new - old).detach() / -0.1
              for (k, old), new in zip(net.named_parameters(), after.parameters(), strict=True)}  # fmt: skip
    g = privacy.shared_gradient(net, double.x, test.y)
    assert all(torch.allclose(update[k], g[k][0], atol=1e-9) for k in g)
    found, _ = privacy.linear_leak(update["1.weight"], update["1.bias"])
    assert mse(found[:1], double.x.flatten(1)).item() < 1e-12


# ---- the gradient that is matched


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["lenet", "cnn", "other"])
def test_the_gradient_is_autograds_and_so_is_its_derivative(n, kind):
    torch.manual_seed(0)
    net = {
        "lenet": lambda: privacy.leaky_lenet((2, 9, 7), 4),
        "cnn": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", dilation=2), nn.Softplus(), nn.Flatten(),
                                     nn.Linear(189, 4, bias=False)),
        "other": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(140, 4)),
    }[kind]().double()  # fmt: skip
    x, soft = torch.rand(2 * n, 2, 9, 7).double(), torch.rand(2 * n, 4).double().softmax(1)
    gradient = _gradient(net, 2, n)
    for group in range(2):
        rows = slice(group * n, (group + 1) * n)
        wanted = torch.autograd.grad(F.cross_entropy(net(x[rows]), soft[rows]), [*net.parameters()])
        for mine, theirs in zip(gradient(x.clone().requires_grad_(), soft), wanted, strict=True):
            assert torch.allclose(mine[group], theirs.flatten(), atol=1e-12)
    few = torch.rand(2 * n, 2, 9, 7, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: sum(g.square().sum() for g in gradient(v, soft)), few, fast_mode=True)


def test_the_search_minimises_each_row_and_agrees_with_scipy():
    def rosenbrock(v):
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            f = (100 * (v[:, 1:] - v[:, :-1] ** 2).square() + (1 - v[:, :-1]).square()).sum(1)
            return f.detach(), torch.autograd.grad(f.sum(), v)[0]

    start = torch.tensor([[-1.2, 1.0, 0.5], [0.0, 0.0, 0.0], [2.0, 2.0, -1.0]], dtype=torch.float64)
    found, value = lbfgs(rosenbrock, start, 200)
    alone = [lbfgs(rosenbrock, row[None], 200)[0][0] for row in start]
    assert torch.allclose(found, torch.stack(alone), atol=1e-6) and (value < 1e-12).all()
    theirs = scipy.optimize.minimize(lambda v: rosenbrock(torch.tensor(v)[None])[0].item(), start[0].numpy())
    assert torch.allclose(found[0], torch.tensor(theirs.x), atol=1e-3)
    once, less = lbfgs(rosenbrock, start, 3)
    assert (less <= rosenbrock(start)[0]).all()


# ---- images


def test_dlg_recovers_digits_and_their_labels():
    net, x, y, g = digits()
    leak = privacy.gradient_leakage(net, g, shape=(1, 28, 28), steps=250, seed=0)
    assert torch.equal(leak.y, y) and leak.x.dtype == torch.float32
    assert (mse(leak.x, x) < 1e-3).sum() >= 5


def test_dlg_recovers_mnist_in_most_of_ten_tries(mnist):
    net = privacy.leaky_lenet(seed=1)
    x, y = mnist.x[:10], mnist.y[:10]
    leak = privacy.gradient_leakage(net, privacy.per_example_gradients(net, x, y), shape=(1, 28, 28), seed=0)
    assert (mse(leak.x, x) < 1e-3).sum() >= 8 and torch.equal(leak.y, y)


def test_the_label_read_first_saves_the_search_of_it():
    net, x, y, g = digits()
    few = {k: v[:2] for k, v in g.items()}
    leak = privacy.gradient_leakage(net, few, shape=(1, 28, 28), method="idlg", steps=220, seed=0)
    assert torch.equal(leak.y, y[:2]) and (mse(leak.x, x[:2]) < 1e-3).all()


def test_two_images_leak_from_one_gradient():
    net, x, y, _ = digits()
    g = privacy.shared_gradient(net, x[1:3], y[1:3])
    leak = privacy.gradient_leakage(net, g, shape=(1, 28, 28), n=2, steps=220, seed=0)
    nearest, similar = privacy.nearest(leak.x, x)
    assert set(nearest.tolist()) == {1, 2} and similar.min() > 0.9 and set(leak.y.tolist()) == set(y[1:3].tolist())


def test_cosine_brings_the_image_out_of_a_relu_network():
    _, x, y, _ = digits()
    net = models.small_cnn((1, 28, 28), seed=0)
    g = privacy.shared_gradient(net, x[:1], y[:1])
    leak = privacy.gradient_leakage(net, g, shape=(1, 28, 28), method="cosine", steps=150, tv=1e-2, seed=0)
    start = privacy.gradient_leakage(net, g, shape=(1, 28, 28), method="cosine", steps=1, tv=1e-2, seed=0)
    assert leak.distance < start.distance / 3
    assert privacy.nearest(leak.x, x)[0] == 0 and privacy.nearest(leak.x, x)[1] > 0.8
    assert leak.x.min() >= 0 and leak.x.max() <= 1


def test_noise_and_clipping_stop_it():
    net, x, y, g = digits()
    few = {k: v[:2] for k, v in g.items()}
    generator = torch.Generator().manual_seed(0)
    noisy = {s: {k: v + s * torch.randn(v.shape, generator=generator) for k, v in few.items()} for s in (1e-4, 1e-1)}
    found = {s: mse(privacy.gradient_leakage(net, t, shape=(1, 28, 28), method="idlg", steps=150, seed=0).x, x[:2])
             for s, t in noisy.items()}  # fmt: skip
    assert (found[1e-4] < 0.02).all() and (found[1e-1] > 0.05).all()


def test_more_tries_are_never_further_away():
    net, _, _, g = digits()
    few = {k: v[:1] for k, v in g.items()}
    leak = privacy.gradient_leakage(net, few, shape=(1, 28, 28), tries=3, steps=40, seed=0)
    assert leak.x.shape == (1, 1, 28, 28) and leak.distance.shape == (1,)
    again = privacy.gradient_leakage(net, few, shape=(1, 28, 28), tries=3, steps=40, seed=0)
    assert torch.equal(leak.x, again.x)


def test_the_network_is_left_as_it_was():
    net, _, _, g = digits()
    few, state = {k: v[:1] for k, v in g.items()}, torch.get_rng_state()
    net.train()
    before = [p.clone() for p in net.parameters()]
    for method in ("dlg", "cosine"):
        privacy.gradient_leakage(net, few, shape=(1, 28, 28), method=method, steps=2, seed=0)
    after = [*net.parameters()]
    assert net.training and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.dtype == torch.float32 for p in after)
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and torch.equal(
        state, torch.get_rng_state()
    )
    net.eval()


def test_bad_input_is_named():
    net, x, y, g = digits()
    attack = functools.partial(privacy.gradient_leakage, net, shape=(1, 28, 28), steps=1, seed=0)
    with pytest.raises(ValueError, match="gradients: none for 0.weight"):
        attack({})
    with pytest.raises(ValueError, match=r"gradients\['0.bias'\]: got shape \(12,\)"):
        attack(g | {"0.bias": torch.zeros(12)})
    with pytest.raises(ValueError, match="NaN"):
        attack(g | {"0.bias": g["0.bias"] * float("nan")})
    with pytest.raises(ValueError, match="method"):
        attack(g, method="guess")
    with pytest.raises(ValueError, match="labels: got None with n = 2"):
        attack(privacy.shared_gradient(net, x[:2], y[:2]), n=2, method="cosine")
    with pytest.raises(ValueError, match="labels: got 10"):
        attack({k: v[:1] for k, v in g.items()}, labels=torch.tensor([10]))
    with pytest.raises(ValueError, match="weight, bias"):
        privacy.linear_leak(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="mixes the examples"):
        privacy.shared_gradient(models.resnet((1, 28, 28), depth=8), x, y)
