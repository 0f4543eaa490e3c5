"""Universal perturbations: one v in its ball, exact on a linear model, better than noise, and good for unseen images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, kernels, pretrained
from tmlcourse.attacks import cross_entropy
from tmlcourse.attacks.universal import data_free, fooling_rate, universal
from tmlcourse.threat import L0, L1, L2, Linf


def net(seed, shape=(1, 6, 7), classes=3, n=12):
    torch.manual_seed(seed)
    c, h, w = shape
    model = nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * h * w, classes)).eval()
    x = torch.rand(n, *shape)
    return model, x, model(x).argmax(1)


def two_classes():
    """A linear model whose images are all of class 0: the best v is known, because all share one normal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 2)).double()
    x = 0.4 + 0.2 * torch.rand(40, 1, 4, 5, dtype=torch.float64)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    with torch.no_grad():
        z = model(x)
        model[1].bias[1] += (z[:, 0] - z[:, 1]).min() - 0.3  # every image has margin 0.3 or more
    return model, x, torch.zeros(40, dtype=torch.int64), w


@pytest.mark.parametrize("threat", [Linf(0.13), L2(0.4)])
def test_the_best_v_of_a_linear_model(threat):
    model, x, y, w = two_classes()
    v = universal(model, x, y, threat, passes=5, rate=1.0, seed=0)
    best = threat.steepest(w.view(1, 1, 4, 5), threat.eps)[0]
    assert 0 < fooling_rate(model, x, best) == fooling_rate(model, x, v)
    torch.testing.assert_close(v, best, atol=1e-6, rtol=0)


def test_deepfool_steps_stop_at_the_boundary_of_the_furthest_image():
    model, x, y, w = two_classes()
    v = universal(model, x, y, L2(10.0), method="deepfool", passes=3, seed=0)
    furthest = (model(x)[:, 0] - model(x)[:, 1]).max().item() / w.norm().item()
    assert fooling_rate(model, x, v) == 1
    assert furthest <= v.norm().item() <= 1.2 * furthest
    torch.testing.assert_close(v.flatten() / v.norm(), w / w.norm(), atol=0.05, rtol=0)


@given(seed=st.integers(0, 10**5), threat=st.sampled_from([Linf(0.0), Linf(0.2), L2(0.8), L1(3.0)]),
       method=st.sampled_from(["gradient", "deepfool"]), target=st.sampled_from([None, 1]),
       shape=st.sampled_from([(1, 6, 7), (3, 5, 4)]))  # fmt: skip
def test_v_stays_in_its_ball_and_fools_no_fewer_than_nothing_does(seed, threat, method, target, shape):
    model, x, y = net(seed, shape)
    y[0] = (y[0] + 1) % 3 if target is None else 0
    v = universal(model, x, y, threat, method=method, target=target, passes=2, batch_size=5, seed=seed)
    assert v.shape == x.shape[1:] and v.dtype == x.dtype and not v.requires_grad
    assert threat.norm(v[None]) <= threat.eps + 1e-5
    if threat.eps == 0:
        assert not v.any()
    rate = [fooling_rate(model, x, u, y=y, target=target) for u in (torch.zeros_like(v), v)]
    assert rate[1] >= rate[0]


def test_passes_that_make_it_worse_are_not_returned():
    model, x, y = net(5)
    y = (y + 1) % 3
    v = universal(model, x, y, Linf(0.3), loss=lambda z, y: -cross_entropy(z, y), passes=4, seed=0)
    assert fooling_rate(model, x, v, y=y) == 1 and not v.any()


def test_fooling_rate_by_hand():
    model, x, y = net(1)
    v = 0.3 * torch.randn(x.shape[1:])
    seen = model((x + v).clamp(0, 1)).argmax(1)
    assert fooling_rate(model, x, v) == pytest.approx((seen != y).double().mean().item())
    assert fooling_rate(model, x, v, target=2) == pytest.approx((seen == 2)[y != 2].double().mean().item())
    assert fooling_rate(model, x, torch.zeros_like(v)) == 0


def test_seed_repeats_and_the_model_is_left_alone():
    model, x, y = net(2)
    model.train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    one, two = (universal(model, x, y, L2(0.5), passes=3, batch_size=4, seed=5) for _ in range(2))
    free = [data_free(model, x.shape[1:], Linf(0.2), steps=5, seed=s) for s in (0, 0, 1)]
    assert torch.equal(one, two) and torch.equal(free[0], free[1]) and not torch.equal(free[0], free[2])
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_data_free_climbs_the_product_of_the_norms():
    model, x, _ = net(3)
    ball, zero = Linf(0.2, box=None), torch.zeros(200, *x.shape[1:])
    v = data_free(model, x.shape[1:], Linf(0.2), steps=60, seed=0)
    product = lambda v: model[:2](0.5 + v).flatten(1).norm(dim=1)  # noqa: E731
    assert ball.norm(v[None]) <= 0.2 + 1e-6
    corners = 0.2 * ball.random(zero, torch.Generator().manual_seed(0)).sign()
    assert product(v[None]).item() > product(corners).max().item()
    hooked = nn.Sequential(nn.ReLU(), _Fails())
    with pytest.raises(RuntimeError, match="on purpose"):
        data_free(hooked, (1, 2, 2), Linf(0.1))
    assert not hooked[0]._forward_hooks


class _Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("options, message", [
    (dict(method="best"), "method"), (dict(threat=L0(3)), "threat"), (dict(passes=0), "passes"), (dict(rate=0.0), "rate"),
    (dict(batch_size=0), "batch_size"), (dict(target=7), "target"), (dict(target=-1), "target"),
    (dict(y=1, target=1), "target"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    model, x, y = net(4)
    options = {"threat": Linf(0.1)} | options
    y = torch.full_like(y, options.pop("y")) if "y" in options else torch.zeros_like(y)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        universal(model, x, y, options.pop("threat"), **options)


def test_a_model_without_relus_has_no_data_free_perturbation():
    with pytest.raises(ValueError, match="ReLU"):
        data_free(nn.Linear(3, 2), (3,), Linf(0.1))


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_unseen_digits_are_fooled_far_more_often_than_by_noise(name, request):
    test = request.getfixturevalue("mnist")[:200] if name == "mnist" else data.load(name, n=200)
    model, threat = pretrained.load(f"{name}-standard"), Linf(0.3)
    seen, unseen = test[:100], test[100:]
    y = model(seen.x).argmax(1)
    v = universal(model, seen.x, y, threat, passes=6, seed=0)
    noise = 0.3 * torch.randn(seen.x.shape[1:], generator=torch.Generator().manual_seed(0)).sign()
    assert fooling_rate(model, seen.x, v) > 0.3
    assert fooling_rate(model, unseen.x, v) > fooling_rate(model, unseen.x, noise) + 0.2
    w = universal(model, seen.x, y, threat, target=8, passes=6, seed=0)
    assert fooling_rate(model, unseen.x, w, target=8) > 0.3
    free = data_free(model, test.x.shape[1:], threat, steps=40, seed=0)
    assert fooling_rate(model, unseen.x, free) > fooling_rate(model, unseen.x, noise)


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)])
def test_the_data_free_attack_takes_its_steps_where_a_gpu_has_a_kernel_for_them(threat, monkeypatch):
    model, x, _ = net(0)
    taken, found = [], data_free(model, x.shape[1:], threat, steps=4, seed=0)
    monkeypatch.setattr(
        kernels, "ascent_step", lambda v, grad, x, t, alpha: taken.append(t) or t.ascend(v, grad, x, alpha)
    )
    assert torch.equal(data_free(model, x.shape[1:], threat, steps=4, seed=0), found) and len(taken) == 4
