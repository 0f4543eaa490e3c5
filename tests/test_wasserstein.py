"""Wasserstein attack: certified by an exact linear programme, and its projection is nearly the exact one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import cross_entropy
from tmlcourse.attacks.wasserstein import _columns, project_wasserstein, wasserstein, wasserstein_distance


def images(seed, n=3, shape=(1, 5, 6), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g, dtype=dtype)
    x[x < 0.4], x[x > 0.8] = 0, 1
    return x, x + torch.randn(x.shape, generator=g, dtype=dtype) * 0.4


def plans(x, kernel):
    """The local moves of a grey image (H, W): sources, destinations, costs."""
    h, w = x.shape
    place = np.stack(np.unravel_index(np.arange(h * w), (h, w)), 1)
    i, j = (v.ravel() for v in np.meshgrid(np.arange(h * w), np.arange(h * w), indexing="ij"))
    gap = np.abs(place[i] - place[j])
    near = gap.max(1) <= kernel // 2
    return i[near], j[near], np.hypot(*gap[near].T)


def best_direction(x, g, eps, kernel):
    """max of <g, z> over the ball around x cut by z <= 1, by linear programming over the plans."""
    a = x.numpy().ravel()
    i, j, cost = plans(x, kernel)
    rows = np.zeros((a.size, len(i)))
    rows[i, np.arange(len(i))] = 1
    columns = np.zeros((a.size, len(i)))
    columns[j, np.arange(len(i))] = 1
    answer = linprog(-g.numpy().ravel()[j], A_eq=rows, b_eq=a, A_ub=np.vstack([cost, columns]),
                     b_ub=np.concatenate([[eps * a.sum()], np.ones(a.size)]))  # fmt: skip
    return -answer.fun


def test_the_distance_of_moved_dots_is_known():
    x, z = torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 6, 6)
    x[0, 0, 1, 1], z[0, 0, 4, 5] = 1, 1  # one dot, by (3, 4)
    x[1, 0, 0, 0], x[1, 0, 5, 5], z[1, 0, 0, 1], z[1, 0, 5, 5] = 1, 1, 1, 1  # one of two dots, by one pixel
    torch.testing.assert_close(wasserstein_distance(x, z), torch.tensor([5.0, 0.5], dtype=torch.float64))
    assert wasserstein_distance(x, z, kernel=3).tolist() == [float("inf"), 0.5]
    assert wasserstein_distance(x, x).tolist() == [0, 0]


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.01, 0.1, 0.5, 3.0]), shape=st.sampled_from([(1, 5, 6), (2, 4, 4)]),
       lam=st.sampled_from([3.0, 60.0]), iterations=st.sampled_from([1, 5, 50]), kernel=st.sampled_from([3, 5]))  # fmt: skip
def test_whatever_the_solver_reached_the_answer_is_in_the_ball(seed, eps, shape, lam, iterations, kernel):
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        x, w = images(seed, 2, shape, dtype)
        z = project_wasserstein(w, x, eps, kernel=kernel, lam=lam, iterations=iterations)
        assert z.dtype == dtype and z.min() >= 0 and z.max() <= 1
        torch.testing.assert_close(z.sum((2, 3)), x.sum((2, 3)), atol=1e-4, rtol=0)
        assert (wasserstein_distance(x, z, kernel=kernel) <= eps * (1 + tolerance) + tolerance).all()


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.5])
def test_the_projection_is_nearly_the_exact_one(eps):
    """By convexity 1/2 |w - z|^2 exceeds its minimum by at most max over z' in the ball of <w - z, z' - z>."""
    x, w = images(1)
    z = project_wasserstein(w, x, eps, kernel=3)
    for a, b, c in zip(x, w.clamp(-0.5, 1.5), z, strict=True):
        g = b[0] - c[0]
        gap = best_direction(a[0], g, eps, 3) - (g * c[0]).sum().item()
        moved = 0.5 * ((b - a).square().sum() - (b - c).square().sum()).item()
        assert -1e-6 <= gap < 0.1 * moved, (gap, moved)


def test_a_point_of_the_ball_hardly_moves_and_a_wide_ball_gives_the_nearest_image_of_equal_mass():
    x, w = images(2)
    z = project_wasserstein(w, x, 0.1, kernel=3)
    again = project_wasserstein(z, x, 0.1, kernel=3)
    assert (again - z).abs().max() < 0.1
    wide = project_wasserstein(w, x, 1e3, kernel=11, lam=60.0, iterations=300)
    low, high = torch.full((3, 1, 1, 1), -5.0, dtype=x.dtype), torch.full((3, 1, 1, 1), 5.0, dtype=x.dtype)
    for _ in range(100):  # clip(w + t), t such that the mass agrees
        t = (low + high) / 2
        more = ((w.clamp(-0.5, 1.5) + t).clamp(0, 1) - x).sum((1, 2, 3), keepdim=True) < 0
        low, high = torch.where(more, t, low), torch.where(more, high, t)
    torch.testing.assert_close(wide, (w.clamp(-0.5, 1.5) + t).clamp(0, 1), atol=0.1, rtol=0)


def test_the_columns_solve_their_equation():
    g = torch.Generator().manual_seed(0)
    s = 10 ** (8 * torch.rand(500, generator=g, dtype=torch.float64) - 6)
    w = 2 * torch.rand(500, generator=g, dtype=torch.float64) - 0.5
    for lam in (3.0, 60.0):
        b = _columns(s, w, lam)
        torch.testing.assert_close(b * s, (w - b.log() / lam).clamp_max(1), atol=1e-4, rtol=0)


def test_full_pixels_do_not_keep_the_others_from_moving():
    x, w = images(7, 20)
    z = project_wasserstein(w, x, 0.5, iterations=1)
    assert ((z - x).abs().amax((1, 2, 3)) > 0.05).all() and z.max() <= 1


def linear(seed, shape=(1, 5, 6), classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes)).double()


def test_the_attack_on_a_linear_model_comes_close_to_the_linear_programme():
    model, (x, _) = linear(0, classes=2), images(3, 4)
    y = model(x).argmax(1)
    w = model[1].weight.detach()
    z = wasserstein(model, x, y, 0.2, kernel=3, steps=60, alpha=1.0, loss="margin")
    for a, b, label in zip(x, z, y, strict=True):
        g = (w[1 - label] - w[label]).view(5, 6)
        best = best_direction(a[0], g, 0.2, 3) - (g * a[0]).sum().item()
        reached = (g * (b - a)[0]).sum().item()
        assert 0.98 * best <= reached <= best + 1e-6


def test_special_cases():
    model, (x, _) = linear(1), images(4)
    y = model(x).argmax(1)
    assert torch.equal(wasserstein(model, x, y, 0.0), x)
    wrong = (y + 1) % 3
    stay = wasserstein(model, x, wrong, 0.3, steps=3)
    assert (cross_entropy(model(stay), wrong) >= cross_entropy(model(x), wrong) - 1e-9).all()
    blank = torch.zeros_like(x)
    assert torch.equal(wasserstein(model, blank, model(blank).argmax(1), 0.3, steps=2), blank)
    full = torch.ones_like(x)
    torch.testing.assert_close(wasserstein(model, full, model(full).argmax(1), 0.3, steps=2), full, atol=1e-5, rtol=0)
    one = wasserstein(model, x[:1], y[:1], 0.3, steps=5)
    torch.testing.assert_close(one, wasserstein(model, x, y, 0.3, steps=5)[:1], atol=1e-9, rtol=0)
    assert wasserstein(model.float(), x.float(), y, 0.1, steps=2).dtype == torch.float32


def test_targets_are_reached_and_the_model_is_left_alone():
    model, (x, _) = linear(2), images(5)
    y = model(x).argmax(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z = wasserstein(model, x, y, 3.0, target=(y + 1) % 3, steps=20, stop_early=True)
    assert (model(z).argmax(1) == (y + 1) % 3).any()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options, message", [
    (dict(eps=-1.0), "eps"), (dict(kernel=4), "kernel"), (dict(lam=0.0), "lam"), (dict(alpha=0.0), "alpha"),
    (dict(steps=0), "steps"), (dict(iterations=0), "iterations"), (dict(target="label"), "target"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    model, (x, _) = linear(3), images(6)
    y = model(x).argmax(1)
    options = {"eps": 0.1} | {k: y if v == "label" else v for k, v in options.items()}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        wasserstein(model, x, y, **options)


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_digits_fall_to_moved_ink(name, request):
    test = request.getfixturevalue("mnist")[:16] if name == "mnist" else data.load(name, n=16)
    model = pretrained.load(f"{name}-standard")
    z = wasserstein(model, test.x, test.y, 0.5, steps=15, stop_early=True)
    assert (model(z).argmax(1) == test.y).float().mean() < 0.6
    assert (wasserstein_distance(test.x[:2], z[:2], kernel=5) <= 0.5 + 1e-4).all()
