"""Spatial attack: the poses are torchvision's, the search is the brute-force maximum, and staying put is always allowed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import cross_entropy
from tmlcourse.attacks.spatial import affine, spatial


def net(seed, shape, classes=4):
    torch.manual_seed(seed)
    c, h, w = shape
    model = nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * h * w, classes))
    return model.double().eval(), torch.rand(6, *shape, dtype=torch.float64), torch.randint(0, classes, (6,))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
def test_affine_is_torchvisions(shape):
    vision = pytest.importorskip("torchvision.transforms.functional")
    bilinear = pytest.importorskip("torchvision.transforms").InterpolationMode.BILINEAR
    x = torch.rand(2, *shape, dtype=torch.float64)
    for angle, scale, right, down in itertools.product((0, 17, -30), (1.0, 1.3), (0, 2), (0, -1)):
        theirs = vision.affine(x, float(angle), [right, down], scale, [0.0, 0.0], interpolation=bilinear)
        ours = affine(x, torch.tensor([[angle, scale, right, down]], dtype=torch.float64))
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_affine_by_hand():
    x = torch.rand(3, 2, 5, 5, dtype=torch.float64)
    poses = torch.tensor([[0.0, 1, 0, 0], [90, 1, 0, 0], [0, 1, 2, -1]], dtype=torch.float64)
    out = affine(x, poses)
    torch.testing.assert_close(out[0], x[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(out[1], x[1].rot90(-1, (1, 2)), atol=1e-12, rtol=0)  # clockwise
    torch.testing.assert_close(out[2, :, :4, 2:], x[2, :, 1:, :3], atol=1e-12, rtol=0)
    assert out[2, :, :, :2].abs().max() < 1e-12 and out[2, :, 4].abs().max() < 1e-12


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_grid_search_is_the_brute_force_maximum(batch_size):
    model, x, y = net(0, (2, 7, 9))
    y = model(x).argmax(1)
    found = spatial(model, x, y, rotation=20, shift=2, grid=(5, 3, 3), batch_size=batch_size)
    angles, moves = torch.linspace(-20, 20, 5).tolist(), (-2.0, 0.0, 2.0)
    losses, fooled = [], []
    for pose in itertools.product(angles, (1.0,), moves, moves):
        z = model(affine(x, torch.tensor([pose], dtype=torch.float64)))
        losses.append(cross_entropy(z, y)), fooled.append(z.argmax(1) != y)
    losses, fooled = torch.stack(losses).detach(), torch.stack(fooled)
    worst = torch.where(fooled.any(0), losses.where(fooled, -torch.inf).amax(0), losses.amax(0))
    torch.testing.assert_close(cross_entropy(model(found), y).detach(), worst, atol=1e-9, rtol=0)


@given(seed=st.integers(0, 10**6), grid=st.sampled_from([(1, 1, 1), (2, 2, 2), (3, 1, 2)]),
       tries=st.sampled_from([None, 1, 4]), targeted=st.booleans(), stop_early=st.booleans())  # fmt: skip
def test_never_worse_than_the_start(seed, grid, tries, targeted, stop_early):
    model, x, y = net(seed, (1, 6, 8))
    target = (y + 1) % 4 if targeted else None
    found = spatial(model, x, y, grid=grid, tries=tries, target=target, stop_early=stop_early, seed=seed)
    assert found.shape == x.shape and found.dtype == x.dtype and found.min() >= 0 and found.max() <= 1
    with torch.no_grad():
        before, after = model(x), model(found)
    hit = (lambda z: z.argmax(1) != y) if target is None else (lambda z: z.argmax(1) == target)
    better = cross_entropy(after, y) >= cross_entropy(before, y) - 1e-12 if target is None else (
        cross_entropy(after, target) <= cross_entropy(before, target) + 1e-12)  # fmt: skip
    assert (hit(after) >= hit(before)).all()
    assert (better | (hit(after) & ~hit(before))).all()


def test_no_movement_returns_the_image_and_seeds_repeat():
    model, x, y = net(1, (1, 6, 6))
    assert torch.equal(spatial(model, x, y, rotation=0, shift=0), x)
    assert torch.equal(spatial(model, x, y, grid=(1, 1, 1)), x)
    state = torch.get_rng_state()
    one, two, other = (spatial(model, x, y, tries=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options, message", [
    (dict(rotation=-1), "rotation"), (dict(shift=float("nan")), "shift"), (dict(grid=(3, 3)), "grid"),
    (dict(grid=(0, 1, 1)), "grid"), (dict(tries=0), "tries"), (dict(target="label"), "target"),
])  # fmt: skip
def test_bad_input_is_named(options, message):
    model, x, y = net(2, (1, 6, 6))
    options = {k: y if v == "label" else v for k, v in options.items()}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        spatial(model, x, y, **options)


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_a_digit_that_withstands_noise_falls_to_a_turn(name, request):
    test = request.getfixturevalue("mnist")[:40] if name == "mnist" else data.load(name, n=40)
    model = pretrained.load(f"{name}-robust")
    worst_of_ten = spatial(model, test.x, test.y, tries=10, stop_early=True, seed=0)
    grid = spatial(model, test.x, test.y, stop_early=True)
    clean, random, full = ((model(v).argmax(1) == test.y).float().mean().item() for v in (test.x, worst_of_ten, grid))
    assert full <= random < clean - 0.1 and full < 0.5
