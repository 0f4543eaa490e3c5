"""Gradient explanations against closed forms, a fine sum and Captum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret import common, gradients
from tmlcourse.interpret.gradients import (
    gradient_x_input,
    guided_backprop,
    integrated_gradients,
    quadrature,
    saliency,
    sensitivity,
    smoothgrad,
)

METHODS = {
    "sensitivity": sensitivity,
    "saliency": saliency,
    "gradient x input": gradient_x_input,
    "guided": guided_backprop,
    "smooth": lambda *a, **k: smoothgrad(*a, n=3, seed=0, **k),
    "integrated": lambda *a, **k: integrated_gradients(*a, steps=4, **k),
}


@pytest.fixture(scope="module")
def net():
    return pretrained.load("shapes-standard")


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(6)


class Quadratic(nn.Module):
    """z_c = <w_c, x> + x^T A x / 2 for c = 0, its negative for c = 1."""

    def __init__(self, d=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(d, d, generator=generator, dtype=torch.float64)
        self.A, self.w = A + A.T, torch.randn(d, generator=generator, dtype=torch.float64)

    def forward(self, x):
        z = x @ self.w + (x @ self.A * x).sum(1) / 2
        return torch.stack([z, -z], 1)


def sums(heat):
    return heat.flatten(1).sum(1)


def rise(model, x, start, target):
    with torch.no_grad():
        return (model(x) - model(start)).gather(1, target[:, None])[:, 0]


def test_gradients_of_a_linear_model_are_its_weights():
    model, x = models.linear((2, 4, 5), 3, seed=0), torch.rand(4, 2, 4, 5)
    w = model[1].weight.detach().view(3, 2, 4, 5)
    y = torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(saliency(model, x, y), w[y].abs())
    torch.testing.assert_close(gradient_x_input(model, x, y), w[y] * x)
    torch.testing.assert_close(smoothgrad(model, x, y, n=2, seed=1), w[y])
    torch.testing.assert_close(sums(sensitivity(model, x, y)), w[y].square().flatten(1).sum(1))
    for method in ("midpoint", "gausslegendre"):
        torch.testing.assert_close(integrated_gradients(model, x, y, steps=1, method=method, calibrate=False), w[y] * x)


def test_sensitivity_does_not_see_a_constant_that_is_added():
    model, x = models.mlp((1, 4, 4), 3, hidden=(8,), seed=0), torch.rand(3, 1, 4, 4)
    before = sensitivity(model, x, 1)
    model[-1].bias.data += 7
    assert torch.equal(sensitivity(model, x, 1), before)


@given(steps=st.integers(2, 6), t=st.integers(0, 1))
def test_integrated_gradients_of_a_quadratic_are_exact(steps, t):
    model, x, start = Quadratic(), torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    target = torch.full((3,), t)
    for method in ("midpoint", "gausslegendre"):
        found = integrated_gradients(model, x, target, baseline=start, steps=steps, method=method, calibrate=False)
        mean_gradient = (model.w + (x + start) / 2 @ model.A) * (1 - 2 * t)
        torch.testing.assert_close(found, (x - start) * mean_gradient)
    back = integrated_gradients(model, start, target, baseline=x, steps=steps)
    torch.testing.assert_close(sums(back), -rise(model, x, start, target))


@pytest.mark.parametrize("steps", [3, 10, 50])
def test_calibrated_integrated_gradients_are_complete(net, shapes, steps):
    target = shapes.y.roll(1)
    found = integrated_gradients(net, shapes.x, target, baseline=0.5, steps=steps)
    change = rise(net, shapes.x, torch.full_like(shapes.x, 0.5), target)
    torch.testing.assert_close(sums(found), change, atol=1e-3, rtol=1e-4)


def test_calibration_changes_the_sum_and_hardly_the_map(net, shapes):
    x, y = shapes.x[:2], shapes.y[:2]
    fine, raw, tilted = (integrated_gradients(net, x, y, steps=n, calibrate=c) for n, c in ((300, 0), (20, 0), (20, 1)))
    off = [float((heat - fine).abs().sum() / fine.abs().sum()) for heat in (raw, tilted)]
    assert off[1] < 1.2 * off[0]
    change = rise(net, x, torch.zeros_like(x), y)
    errors = [float((sums(heat) - change).abs().max()) for heat in (raw, fine, tilted)]
    assert errors[0] > errors[1] > errors[2] and errors[1] < 3e-3 * float(change.abs().max())


def test_uncalibrated_completeness_at_200_steps():
    model, x = models.mlp((1, 8, 8), 10, hidden=(40,), seed=0), data.load("digits", n=20).x
    y = torch.arange(20) % 10
    for method in ("midpoint", "gausslegendre", "trapezoid"):
        error = sums(integrated_gradients(model, x, y, steps=200, method=method, calibrate=False))
        assert (error - rise(model, x, torch.zeros_like(x), y)).abs().max() < 1e-3


@pytest.mark.parametrize("method, degree", [("gausslegendre", 9), ("midpoint", 1), ("trapezoid", 1)])
def test_quadrature_is_exact_up_to_its_degree(method, degree):
    nodes, weights = (np.array(v) for v in quadrature(5, method))
    assert (nodes >= 0).all() and (nodes <= 1).all() and abs(weights.sum() - 1) < 1e-14
    for k in range(degree + 1):
        assert abs((weights * nodes**k).sum() - 1 / (k + 1)) < 1e-14
    assert abs((weights * nodes ** (degree + 2)).sum() - 1 / (degree + 3)) > 1e-9


def test_smoothgrad_is_the_gradient_of_the_smoothed_logit():
    model, x = Quadratic(), torch.rand(2, 6, dtype=torch.float64)
    found = smoothgrad(model, x, 0, n=4000, sigma=0.5, seed=0)
    error = 0.5 * model.A.square().sum(1).sqrt() / 4000**0.5  # its standard deviation: the smoothed gradient is w + A x
    assert ((found - model.w - x @ model.A).abs() < 5 * error).all()
    assert torch.equal(
        smoothgrad(model, x, 0, sigma=0.0, n=1), common.gradient(model, x, torch.zeros(2, dtype=torch.int64))
    )
    assert torch.equal(smoothgrad(model, x, 0, n=3, seed=5), smoothgrad(model, x, 0, n=3, seed=5))
    assert not torch.equal(smoothgrad(model, x, 0, n=3, seed=5), smoothgrad(model, x, 0, n=3, seed=6))


def test_the_guided_signal_is_positive_at_every_hidden_unit():
    """One hidden layer by hand: sum_k max(w_ck, 0) [a_k > 0] v_k; functions are seen as modules are."""
    torch.manual_seed(0)
    first, last, x = nn.Linear(6, 9), nn.Linear(9, 3), torch.rand(4, 6)
    with torch.no_grad():
        signal = last.weight[1].clamp(min=0) * (first(x) > 0)
        expected = signal @ first.weight
    for relu in (nn.ReLU(), nn.ReLU(inplace=True), torch.relu, torch.relu_, lambda a: a.relu(), nn.functional.relu):
        model = lambda x, relu=relu: last(relu(first(x)))  # noqa: E731
        torch.testing.assert_close(guided_backprop(model, x, 1), expected)
    assert not torch.allclose(gradient_x_input(model, x, 1), expected * x)


def test_captum_agrees(net, shapes):
    captum = pytest.importorskip("captum.attr")
    net, x, y = pretrained.load("shapes-standard").double(), shapes.x.double(), shapes.y.roll(1)
    peers = [
        (saliency(net, x, y), captum.Saliency(net).attribute(x.clone().requires_grad_(), y)),
        (gradient_x_input(net, x, y), captum.InputXGradient(net).attribute(x.clone().requires_grad_(), y)),
        (guided_backprop(net, x, y), captum.GuidedBackprop(net).attribute(x.clone().requires_grad_(), y)),
    ]
    ig = captum.IntegratedGradients(net)
    for method, theirs in (("gausslegendre", "gausslegendre"), ("midpoint", "riemann_middle")):
        ours = integrated_gradients(net, x, y, steps=7, method=method, calibrate=False)
        peers.append((ours, ig.attribute(x, target=y, n_steps=7, method=theirs)))
    # The trapezoid asks at the baseline itself; a black one is all ties for max pooling, and any winner would do.
    dark = 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    ours = integrated_gradients(net, x, y, baseline=dark, steps=7, method="trapezoid", calibrate=False)
    # Captum's trapezoid weights add to (n - 1) / n instead of 1.
    theirs = ig.attribute(x, target=y, baselines=dark, n_steps=7, method="riemann_trapezoid")
    peers.append((ours, theirs * 7 / 6))
    for ours, theirs in peers:
        assert (ours - theirs.detach()).abs().max() < 1e-5 * theirs.abs().max()


def test_gradients_of_mnist_agree_with_captum(mnist):
    captum = pytest.importorskip("captum.attr")
    net, x, y = pretrained.load("mnist-standard"), mnist.x[:20], mnist.y[:20]
    theirs = captum.Saliency(net).attribute(x.clone().requires_grad_(), y)
    assert (saliency(net, x, y) - theirs).abs().max() < 1e-5 * theirs.max()


@pytest.mark.parametrize("name", METHODS)
def test_shapes_types_batches_and_the_model_left_alone(name, net, shapes):
    method, x = METHODS[name], shapes.x
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    found = method(net, x)
    assert found.shape == x.shape and found.dtype == x.dtype
    torch.testing.assert_close(found, method(net, x, net(x).argmax(1)))
    if name != "smooth":  # whose noise is drawn batch by batch
        torch.testing.assert_close(method(net, x, 2, batch_size=4), method(net, x, 2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(method(net, x[:1], 2), method(net, x, 2)[:1], atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not x.requires_grad
    wide = method(models.linear((1, 3, 5), 2, seed=0).double(), torch.rand(1, 1, 3, 5, dtype=torch.float64))
    assert wide.dtype == torch.float64 and wide.shape == (1, 1, 3, 5)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_named(name, net, shapes):
    method, x = METHODS[name], shapes.x
    for call, error, message in [
        (lambda: method(net, x, 8), ValueError, r"target: got label 8, want labels in \[0, 7\]"),
        (lambda: method(net, x, -1), ValueError, "target: got label -1"),
        (lambda: method(net, x, torch.zeros(3, dtype=torch.int64)), ValueError, "target: got shape"),
        (lambda: method(net, x, torch.zeros(6)), TypeError, "target: got dtype"),
        (lambda: method(net, x * 255), ValueError, "x: got values"),
        (lambda: method(net, (x * 255).byte()), TypeError, "x: got dtype"),
        (lambda: method(net, x, batch_size=0), ValueError, "batch_size"),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n, x: integrated_gradients(n, x, steps=0), "steps: got 0"),
        (lambda n, x: integrated_gradients(n, x, method="simpson"), "method: got 'simpson'"),
        (lambda n, x: integrated_gradients(n, x, method="trapezoid", steps=1), "steps: got 1, want at least 2"),
        (lambda n, x: integrated_gradients(n, x, baseline=2), "baseline: got 2"),
        (lambda n, x: integrated_gradients(n, x, baseline=torch.zeros(3, 5, 5)), "baseline: got shape"),
        (lambda n, x: integrated_gradients(n, x, baseline=torch.full_like(x, 3)), "baseline: got values"),
        (lambda n, x: smoothgrad(n, x, n=0), "n: got 0"),
        (lambda n, x: smoothgrad(n, x, sigma=-1), "sigma: got -1"),
        (lambda n, x: common.per_pixel(x, "mean"), "how: got 'mean'"),
        (lambda n, x: common.per_pixel(x[0]), "heat: got shape"),
        (lambda n, x: common.layer_named(n, "99"), r"layer: got '99', want one of this model's layers: 0 \("),
        (lambda n, x: common.last_convolution(models.mlp()), "model: got no convolution in it"),
        (lambda n, x: gradients.starting_point(-0.1, x), "baseline: got -0.1"),
    ],
)
def test_bad_options_are_named(call, message, net, shapes):
    with pytest.raises(ValueError, match=message):
        call(net, shapes.x)


def test_channels_are_joined_by_sum_or_maximum():
    heat = torch.tensor([1.0, -3.0, 1.0]).view(1, 3, 1, 1)
    assert common.per_pixel(heat).item() == -1 and common.per_pixel(heat, "max").item() == 3
