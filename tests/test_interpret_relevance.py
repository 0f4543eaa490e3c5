"""Layer-wise relevance propagation: sums by hand on a small net, conservation on large ones, Captum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret.gradients import gradient_x_input
from tmlcourse.interpret.relevance import RULES, lrp, lrp_layers


@pytest.fixture(scope="module")
def digits():
    return data.load("digits-28x28", n=12)


def without_biases(model):
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.zero_()
    return model


def sums(heat):
    return heat.flatten(1).sum(1)


def leaks(found):
    """The largest |relevance in + kept - relevance out| of a layer, in units of the largest relevance."""
    return max(float((sums(a.relevance) + a.absorbed - sums(b.relevance)).abs().max() / sums(found[-1].relevance).abs().max())
               for a, b in zip(found, found[1:], strict=False))  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["digits-28x28-standard", "shapes-standard"])
def test_each_layer_conserves_relevance(rule, name, digits):
    model = pretrained.load(name)
    x = digits.x if name[0] == "d" else data.shapes(8).x
    found = lrp_layers(model, x, 3, rule=rule)
    assert [layer.name for layer in found] == [*(key for key, _ in model.named_children()), "output"]
    assert leaks(found) < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(sums(found[-1].relevance), model(x)[:, 3])
    torch.testing.assert_close(lrp(model, x, 3, rule=rule), found[0].relevance, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "composite"])
def test_without_biases_the_pixels_add_up_to_the_logit(rule):
    model, x = without_biases(models.small_cnn(seed=0)).double(), torch.rand(4, 1, 28, 28).double() + 1e-3
    x = x.clamp(max=1)
    with torch.no_grad():
        torch.testing.assert_close(sums(lrp(model, x, 1, rule=rule, eps=0.0)), model(x)[:, 1])


@given(seed=st.integers(0, 50))
def test_without_biases_the_zero_rule_is_gradient_times_input(seed):
    model = without_biases(models.mlp((1, 3, 4), 3, hidden=(7, 5), seed=seed)).double()
    x = torch.rand(3, 1, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(lrp(model, x, 2, eps=0.0), gradient_x_input(model, x, 2))


def by_hand(rule, a, W, b, R, eps=1e-6, gamma=0.25, alpha=2.0, beta=1.0):
    """The rules as loops over units, from the formulas."""
    out = torch.zeros_like(a)
    for n in range(len(a)):
        for k in range(len(b)):
            c, bias = a[n] * W[k], b[k]
            if rule == "gamma":
                c, bias = a[n] * (W[k] + gamma * W[k].clamp(min=0)), b[k] + gamma * b[k].clamp(min=0)
            if rule == "box":
                c, bias = a[n] * W[k] - W[k].clamp(max=0), 0.0
            if rule in ("epsilon", "gamma"):
                z = c.sum() + bias
                out[n] += c / (z + (eps if z >= 0 else -eps)) * R[n, k]
            elif rule == "box":
                out[n] += c / (c.sum() + eps) * R[n, k]
            else:
                p, q = (1.0, 0.0) if rule == "zplus" else (alpha, beta)
                up, down = c.clamp(min=0), c.clamp(max=0)
                out[n] += p * up / (up.sum() + bias.clamp(min=0) + eps) * R[n, k]
                out[n] -= q * down / (down.sum() + bias.clamp(max=0) - eps) * R[n, k]
    return out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaled", [False, True])
def test_two_layers_by_hand(rule, scaled):
    torch.manual_seed(1)
    norm = models.Normalize(0.0 if not scaled else 0.5, 1.0)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.rand(4, 1, 2, 3).double()
    first, last = model[2], model[4]
    with torch.no_grad():
        a = norm(x).flatten(1)
        h = first(a).relu()
        R = torch.zeros(4, 3).double()
        R[:, 1] = last(h)[:, 1]
        top, low = ("epsilon", "box") if rule == "composite" else (rule, rule)
        R = by_hand(top, h, last.weight, last.bias, R)
        if low == "box" and scaled:  # x w - l w+ - h w-, with pixels in [-1/2, 1/2]
            W = first.weight
            expected = torch.zeros_like(a)
            for n in range(4):
                c = a[n] * W + 0.5 * W.clamp(min=0) - 0.5 * W.clamp(max=0)
                expected[n] = (c / (c.sum(1, keepdim=True) + 1e-6) * R[n][:, None]).sum(0)
        else:
            expected = by_hand(low, a, first.weight, first.bias, R)
    torch.testing.assert_close(lrp(model, x, 1, rule=rule), expected.view_as(x))


def test_batch_norm_is_folded_and_pools_share():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AvgPool2d(2),
                          nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)).double()  # fmt: skip
    for norm in (model[1], model[-1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    model.eval()
    x = torch.rand(3, 2, 8, 10).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = lrp_layers(model, x, 4)
    with torch.no_grad():
        torch.testing.assert_close(sums(found[-1].relevance), model(x)[:, 4])
    assert leaks(found) < 1e-9
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Plain(nn.Module):
    """The same network for Captum, which knows no Flatten layer and wants each layer once."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in model if not isinstance(layer, nn.Flatten))
        self.flat = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x.flatten(1) if i == self.flat else x)
        return x


@pytest.mark.parametrize(
    "rule, theirs, biases",
    [
        ("epsilon", lambda r: r.EpsilonRule(1e-2), True),
        ("gamma", lambda r: r.GammaRule(0.25), False),
        ("zplus", lambda r: r.Alpha1_Beta0_Rule(), False),
    ],
)
def test_captum_agrees(rule, theirs, biases, digits):
    captum, rules = pytest.importorskip("captum.attr"), pytest.importorskip("captum.attr._utils.lrp_rules")
    model = pretrained.load("digits-28x28-standard").double()
    if not biases:  # Captum scales no bias by gamma and keeps negative ones beside positive weights
        without_biases(model)
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.rule = theirs(rules)
    x = digits.x.double()
    expected = captum.LRP(Plain(model)).attribute(x.clone(), target=digits.y).detach()
    found = lrp(model, x, digits.y, rule=rule, eps=1e-2 if rule == "epsilon" else 1e-9)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_types_batches_and_bad_input():
    model, x = models.small_cnn(seed=0), torch.rand(5, 1, 28, 28)
    found = lrp(model, x, 2, rule="composite")
    assert found.dtype == x.dtype and found.shape == x.shape
    torch.testing.assert_close(lrp(model, x, 2, rule="composite", batch_size=2), found, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(lrp(model, x), lrp(model, x, model(x).argmax(1)))
    assert not x.requires_grad
    gelu = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.GELU(), nn.Linear(5, 3))
    late = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    for call, message in [
        (lambda: lrp(gelu, x), r"got layer '2' \(GELU\).*integrated_gradients explains"),
        (lambda: lrp(late, x), r"got layer '3' \(BatchNorm1d\) after no Linear"),
        (lambda: lrp(models.resnet((1, 28, 28), depth=8, width=4), x), "got layer '3'"),
        (lambda: lrp(lambda x: x.flatten(1), x, 0), "want an nn.Sequential"),
        (lambda: lrp(model, x, rule="beta"), "rule: got 'beta'"),
        (lambda: lrp(model, x, rule="alphabeta", alpha=2.0, beta=2.0), "want alpha - beta = 1"),
        (lambda: lrp(model, x, eps=-1), "eps: got -1"),
        (lambda: lrp(model, x, 10), "target: got label 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
