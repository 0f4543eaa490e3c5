"""Feature adversaries: the exact optimum for a linear layer, inside the set, nearer to the guide, leaving no trace."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, minimize
from test_attacks import random_net
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks.feature import feature_adversary, features
from tmlcourse.threat import L0, L1, L2, Linf


def linear_layer(inputs, outputs, seed=0):
    """A linear layer in double precision, five images and five guides."""
    torch.manual_seed(seed)
    x, guide = torch.rand(2, 5, inputs, dtype=torch.float64)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, 3)).double(), x, guide


def apart(phi, a, b):
    return (phi(a) - phi(b)).square().sum(1).detach()


@pytest.mark.parametrize(("inputs", "outputs"), [(30, 10), (10, 30)])
@pytest.mark.parametrize("eps", [0.05, 0.2, 1.0])
def test_a_linear_layer_is_matched_as_well_as_the_box_allows(inputs, outputs, eps):
    """The referee is a bounded least-squares solver, one image at a time."""
    model, x, guide = linear_layer(inputs, outputs)
    phi = features(model, 0)
    found = apart(phi, feature_adversary(model, x, guide, Linf(eps), layer=0, steps=300), guide)
    w = model[0].weight.detach().numpy()
    for f, a, b in zip(found, x.numpy(), guide.numpy(), strict=True):
        bounds = np.maximum(a - eps, 0), np.minimum(a + eps, 1)
        best = lsq_linear(w, w @ b, bounds=bounds, tol=1e-14)
        assert abs(f.item() - 2 * best.cost) < 1e-8


def test_a_linear_layer_under_l2_equals_slsqp():
    model, x, guide = linear_layer(6, 4)
    found = apart(features(model, 0), feature_adversary(model, x, guide, L2(0.3), layer=0, steps=300), guide)
    w = model[0].weight.detach().numpy()
    for f, a, b in zip(found, x.numpy(), guide.numpy(), strict=True):
        ball = {"type": "ineq", "fun": lambda v, a=a: 0.09 - ((v - a) ** 2).sum()}
        best = minimize(lambda v, b=b: ((w @ (v - b)) ** 2).sum(), a, bounds=[(0, 1)] * 6, constraints=[ball],
                        method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
        assert abs(f.item() - best.fun) < 1e-6


def test_a_guide_inside_the_ball_is_matched_exactly():
    model, x, _ = linear_layer(30, 10)
    guide = Linf(0.1).random(x, torch.Generator().manual_seed(1))
    found = feature_adversary(model, x, guide, Linf(0.1), layer=0)
    assert apart(features(model, 0), found, guide).max() < 1e-16


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 8, 8), (3, 6, 10)]),
    threat=st.sampled_from([Linf(0.0), Linf(0.1), L2(0.7), L1(2.0), Linf(5.0)]),
    layer=st.sampled_from([0, 2, -1, "2", "5"]),
    double=st.booleans(),
)
def test_it_stays_in_the_set_and_never_moves_away_from_the_guide(seed, shape, threat, layer, double):
    model, x, _ = random_net(seed, shape, 4)
    if double:
        model, x = model.double(), x.double()
    guide = x.flip(0)
    x_adv = feature_adversary(model, x, guide, threat, layer=layer, steps=8, batch_size=3)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert threat.contains(x_adv, x, tolerance=1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    phi = features(model, layer)
    assert (apart(phi, x_adv, guide) <= apart(phi, x, guide) * (1 + 1e-5)).all()
    if threat.eps == 0:
        assert torch.equal(x_adv, x)


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_a_network_takes_the_image_for_its_guide(name, request):
    """Far more of the distance goes than plain projected gradient descent with the same number of gradients takes."""
    test = data.load(name) if name == "digits-28x28" else request.getfixturevalue("mnist")
    net, x, guide = pretrained.load(f"{name}-standard"), test.x[:12], test.x[12:24]
    phi, threat = features(net, -3), Linf(0.3)
    ours = feature_adversary(net, x, guide, threat, layer=-3, steps=40)
    plain = x
    for _ in range(40):
        plain = plain.detach().requires_grad_()
        (grad,) = torch.autograd.grad((phi(plain) - phi(guide)).square().sum(), plain)
        plain = threat.ascend(plain.detach(), -grad, x, 0.03)
    assert apart(phi, ours, guide).mean() < apart(phi, plain, guide).mean()
    with torch.no_grad():
        assert (net(ours).argmax(1) == net(guide).argmax(1)).float().mean() >= 0.8


def test_a_name_and_an_index_mean_the_same_layer_and_leave_no_hook():
    model, x, _ = random_net(0, (1, 8, 8), 4)
    before = copy.deepcopy(model.state_dict())
    by_index = feature_adversary(model, x, x.flip(0), Linf(0.1), layer=2, steps=5)
    by_name = feature_adversary(model, x, x.flip(0), Linf(0.1), layer="2", steps=5)
    torch.testing.assert_close(by_index, by_name, atol=1e-6, rtol=0)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class _Raises(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_an_interrupt_leaves_no_hook():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), _Raises())
    with pytest.raises(KeyboardInterrupt):
        feature_adversary(model, torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), Linf(0.1), layer="1")
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(layer=6), ValueError, r"layer: got 6, want an index in \[-6, 5\]"),
        (dict(layer="body"), ValueError, "layer: got 'body', want an index or one of '0'"),
        (dict(steps=0), ValueError, "steps: got 0"),
        (dict(threat=L0(3)), TypeError, "threat: got L0"),
        (dict(guide=torch.rand(4, 1, 8, 8)), ValueError, r"guide: got shape \(4, 1, 8, 8\), want \(5, 1, 8, 8\)"),
        (dict(guide=torch.full((5, 1, 8, 8), 2.0)), ValueError, "guide: got values in"),
        (dict(model=lambda x: x), TypeError, "model: got function"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    model, x, _ = random_net(0, (1, 8, 8), 4)
    call = {"model": model, "x": x, "guide": x.flip(0), "threat": Linf(0.1), "layer": 2} | change
    with pytest.raises(error, match=message):
        feature_adversary(call.pop("model"), call.pop("x"), call.pop("guide"), call.pop("threat"), **call)


def test_more_steps_never_end_farther_away():
    """The walk may rise for a while; what comes back is its best point, and a longer walk begins with the shorter one."""
    model, x, guide = linear_layer(30, 20, seed=1)
    phi = features(model, 2)
    left = [apart(phi, feature_adversary(model, x, guide, Linf(0.3), layer=2, steps=k), guide) for k in range(1, 25)]
    assert all((b <= a).all() for a, b in zip(left, left[1:], strict=False))
