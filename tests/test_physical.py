"""Physical attacks: nothing outside the mask changes, the gradient is the expectation's, and penalties do their work."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks.physical import Patch, Sticker, Views, non_printability, patch, sticker, total_variation


def net(seed, shape=(1, 8, 9), classes=3, n=10):
    torch.manual_seed(seed)
    c, h, w = shape
    model = (
        nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * h * w, classes))
        .double()
        .eval()
    )
    x = torch.rand(n, *shape, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def square(h, w, top, left, size):
    mask = torch.zeros(1, h, w)
    mask[:, top : top + size, left : left + size] = 1
    return mask


@given(seed=st.integers(0, 10**6), rotation=st.sampled_from([0.0, 30.0]), scale=st.sampled_from([(1.0, 1.0), (0.7, 1.4)]),
       shift=st.sampled_from([0.0, 3.0]), disc=st.booleans())  # fmt: skip
def test_a_patch_changes_only_what_it_covers(seed, rotation, scale, shift, disc):
    g = torch.Generator().manual_seed(seed)
    x, pattern = torch.rand(4, 3, 12, 10, generator=g), torch.rand(3, 5, 4, generator=g)
    mask = (torch.rand(1, 5, 4, generator=g) > 0.5).float() if disc else torch.ones(1, 5, 4)
    p = Patch(pattern, mask, Views(rotation, scale, shift))
    out = p.apply(x, seed=seed)
    ones = Patch(torch.ones(1, 5, 4), mask, p.views).apply(torch.zeros(4, 1, 12, 10), seed=seed)  # the mask, as seen
    assert torch.equal(out, p.apply(x, seed=seed))
    assert torch.equal(torch.where(ones > 0, x, out), x)
    assert out.min() >= 0 and out.max() <= 1
    assert (ones.sum((1, 2, 3)) <= mask.sum() * scale[1] ** 2 + 8).all()


def test_a_patch_without_movement_is_pasted_in_the_middle():
    x, pattern = torch.rand(2, 1, 8, 8), torch.rand(1, 4, 4)
    out = Patch(pattern, torch.ones(1, 4, 4), Views()).apply(x)
    torch.testing.assert_close(out[:, :, 2:6, 2:6], pattern.expand(2, 1, 4, 4), atol=1e-6, rtol=0)
    moved = Patch(pattern, torch.ones(1, 4, 4), Views()).apply(x, poses=torch.tensor([[0.0, 1, 2, -1]] * 2))
    torch.testing.assert_close(moved[:, :, 1:5, 4:8], pattern.expand(2, 1, 4, 4), atol=1e-6, rtol=0)


def test_the_gradient_of_the_expectation_agrees_with_finite_differences():
    model, x, y = net(0)
    views, mask = Views(25, (0.8, 1.2), 2, 0.1), torch.ones(1, 3, 3, dtype=torch.float64)

    def pasted(pattern):
        return F.cross_entropy(model(Patch(pattern, mask, views).apply(x, seed=3)), y)

    def stuck(delta):
        return F.cross_entropy(model(views.see(Sticker(delta, square(8, 9, 2, 2, 4).double()).apply(x), seed=3)), y)

    inner = 0.3 + 0.4 * torch.rand(1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(pasted, inner.requires_grad_(), atol=1e-6)
    delta = 0.001 * torch.randn(1, 8, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(stuck, delta.requires_grad_(), atol=1e-6)


def test_views_stay_within_their_ranges_and_fill_them():
    poses = Views(30, (0.5, 2), 4).poses(4000, seed=0)
    low, high = poses.aminmax(dim=0)
    assert (low >= torch.tensor([-30, 0.5, -4, -4])).all() and (high <= torch.tensor([30, 2.0, 4, 4])).all()
    assert (low < torch.tensor([-29, 0.51, -3.9, -3.9])).all() and (high > torch.tensor([29, 1.98, 3.9, 3.9])).all()
    x = torch.full((500, 1, 3, 3), 0.5)
    light = Views(brightness=0.2).see(x, seed=0) - 0.5
    assert light.abs().max() <= 0.2 and light.std() > 0.1 and (light.amax((1, 2, 3)) == light.amin((1, 2, 3))).all()


def test_the_best_patch_of_a_linear_model():
    """On a linear model each pixel of the patch goes to the end of its range that its weight asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    x, y = torch.rand(20, 1, 8, 8, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    p = patch(model, x, y, target=1, size=4, rotation=0, scale=(1, 1), shift=0, steps=60, alpha=0.2, seed=0)
    w = (model[1].weight[1] - model[1].weight[0]).view(1, 8, 8)
    torch.testing.assert_close(p.pattern, (w > 0).double()[:, 2:6, 2:6], atol=1e-3, rtol=0)
    s = sticker(model, x, y, square(8, 8, 1, 1, 3), target=1, steps=60, alpha=0.2, seed=0)
    torch.testing.assert_close(
        s.apply(x)[:, :, 1:4, 1:4], (w > 0).double()[:, 1:4, 1:4].expand(20, 1, 3, 3), atol=1e-3, rtol=0
    )


@given(seed=st.integers(0, 10**5), target=st.sampled_from([None, 1]), shape=st.sampled_from([(1, 8, 9), (3, 7, 6)]))
def test_what_every_attack_owes(seed, target, shape):
    model, x, y = net(seed, shape)
    y[0] = 0
    mask, views = square(*shape[1:], 1, 2, 3), Views(20, shift=1, brightness=0.1)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    p, q = (patch(model, x, y, target=target, size=3, steps=4, tv=0.1, nps=0.1, seed=seed) for _ in range(2))
    s, r = (
        sticker(model, x, y, mask, target=target, views=views, lam=0.1, p=2, steps=4, nps=0.1, seed=seed)
        for _ in range(2)
    )
    assert torch.equal(p.pattern, q.pattern) and torch.equal(s.delta, r.delta)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(w.grad is None and w.requires_grad for w in model.parameters())
    assert p.pattern.dtype == x.dtype and p.pattern.min() >= 0 and p.pattern.max() <= 1
    out = s.apply(x)
    assert torch.equal(torch.where(mask > 0, x, out), x) and out.min() >= 0 and out.max() <= 1
    assert s.delta.abs().max() <= 1 and not (s.delta * (1 - mask)).any()


def test_the_penalties_by_hand():
    image = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]])
    steps = (1 + 0) ** 0.5 + (0 + 1) ** 0.5 + (0 + 1) ** 0.5 + (1 + 1) ** 0.5
    assert total_variation(image).item() == pytest.approx(steps, abs=1e-4)
    black_white = torch.tensor([[0.0], [1.0]])
    assert non_printability(image, black_white).item() < 1e-4
    assert non_printability(torch.full((1, 1, 1), 0.25), black_white).item() == pytest.approx(0.25 * 0.75)


def test_the_penalties_do_their_work():
    model, x, y = net(1, (1, 12, 12))
    mask = square(12, 12, 2, 2, 7)
    plain, smooth, small, printable = (
        sticker(model, x[:1], y[:1], mask, steps=60, seed=0, **options)
        for options in ({}, {"tv": 3.0}, {"lam": 30.0}, {"nps": 30.0})
    )
    palette = torch.tensor([[0.0], [1.0]])
    inside = lambda s: s.apply(x[:1])[0][:, 2:9, 2:9]  # noqa: E731
    assert total_variation(inside(smooth)) < 0.6 * total_variation(inside(plain))
    assert small.delta.abs().sum() < 0.3 * plain.delta.abs().sum()
    assert non_printability(inside(printable), palette) < 0.8 * non_printability(x[0][:, 2:9, 2:9], palette)


@pytest.mark.parametrize("options, message", [
    (dict(), "size, mask"), (dict(size=3, mask=torch.ones(1, 2, 2)), "size, mask"), (dict(size=99), "size, mask"),
    (dict(size=0), "size"), (dict(mask=torch.rand(1, 3, 3)), "mask"), (dict(mask=torch.zeros(1, 3, 3)), "mask"),
    (dict(size=3, target=9), "target"), (dict(size=3, target=0), "target"), (dict(size=3, rotation=-1), "rotation"),
    (dict(size=3, scale=(0, 1)), "scale"), (dict(size=3, tv=-1.0), "tv"), (dict(size=3, alpha=0.0), "alpha"),
    (dict(size=3, steps=0), "steps"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    model, x, y = net(2)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        patch(model, x, torch.zeros_like(y), **options)


def test_a_mask_of_another_size_is_named():
    model, x, y = net(2)
    with pytest.raises(ValueError, match="^mask"):
        sticker(model, x, y, torch.ones(1, 3, 3))
    with pytest.raises(TypeError, match="^views"):
        sticker(model, x, y, torch.ones(1, 8, 9), views=3)


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_a_patch_beats_a_random_one_and_a_sticker_survives_its_views(name, request):
    test = request.getfixturevalue("mnist")[:120] if name == "mnist" else data.load(name, n=120)
    model, k = pretrained.load(f"{name}-standard"), test.y[60:] != 8
    p = patch(model, test.x[:60], test.y[:60], target=8, size=9, shift=4, steps=40, seed=0)
    noise = Patch(torch.rand(p.pattern.shape, generator=torch.Generator().manual_seed(0)), p.mask, p.views)
    hit = [(model(q.apply(test.x[60:], seed=1)).argmax(1) == 8)[k].float().mean() for q in (p, noise)]
    assert hit[0] > hit[1]
    views, mask = Views(10, shift=1, brightness=0.2), square(28, 28, 7, 8, 10)
    one = int((test.y == 1).nonzero()[0])
    s = sticker(model, test.x[one : one + 1], test.y[one : one + 1], mask, views=views, steps=40, seed=0)
    seen = views.see(s.apply(test.x[one : one + 1]).repeat(100, 1, 1, 1), seed=9)
    assert (model(seen).argmax(1) != 1).float().mean() > 0.6
