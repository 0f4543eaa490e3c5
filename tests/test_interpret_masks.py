"""Occlusion, random masks and extremal masks: loops by hand, Captum, and the model's own score."""

import pytest
import torch
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret.activation import grad_cam
from tmlcourse.interpret.masks import blurred, extremal_perturbation, occlusion, rise, with_area


@pytest.fixture(scope="module")
def net():
    return pretrained.load("shapes-standard")


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(6)


def occluded_by_hand(model, x, target, window, stride, baseline):
    n, _, h, w = x.shape
    total, count = torch.zeros(n, 1, h, w, dtype=x.dtype), torch.zeros(h, w)
    with torch.no_grad():
        whole = model(x)[:, target]
        top = 0
        while True:
            left = 0
            while True:
                hidden = x.clone()
                hidden[:, :, top : top + window, left : left + window] = baseline
                fall = whole - model(hidden)[:, target]
                total[:, :, top : top + window, left : left + window] += fall[:, None, None, None]
                count[top : top + window, left : left + window] += 1
                if left + window >= w:
                    break
                left += stride
            if top + window >= h:
                break
            top += stride
    return total / count


@pytest.mark.parametrize("window, stride, baseline", [(3, 2, 0.0), (4, 4, 0.5), (5, 1, 0.0), (7, 7, 1.0)])
def test_occlusion_by_hand_on_an_oblong_image(window, stride, baseline):
    model, x = models.mlp((2, 7, 9), 4, hidden=(9,), seed=0).double(), torch.rand(3, 2, 7, 9).double()
    found = occlusion(model, x, 1, window=window, stride=stride, baseline=baseline)
    torch.testing.assert_close(found, occluded_by_hand(model, x, 1, window, stride, baseline))


def test_one_pixel_of_a_linear_model_is_gradient_times_input():
    model, x = models.linear((2, 4, 5), 3, seed=0).double(), torch.rand(3, 2, 4, 5).double()
    w = model[1].weight.detach().view(3, 2, 4, 5)
    found = occlusion(model, x, 2, window=1, stride=1, baseline=0.3)
    torch.testing.assert_close(found, ((x - 0.3) * w[2]).sum(1, keepdim=True))


def test_empty_squares_are_not_asked_about():
    asked = []

    class Counting(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return x.flatten(1)[:, :4] * 2 + x.sum((1, 2, 3))[:, None]

    x = torch.zeros(2, 1, 12, 12)
    x[0, 0, 5, 5], x[1, 0, :3, :3] = 1.0, 0.5
    found = occlusion(Counting(), x, 0, window=3, stride=3)
    assert sum(asked) == 2 + 1 + 1  # the images themselves, then one square each
    torch.testing.assert_close(found, occluded_by_hand(Counting(), x, 0, 3, 3, 0.0))


def test_captum_agrees(net, shapes):
    captum = pytest.importorskip("captum.attr")
    x, y = shapes.x[:3], shapes.y[:3]
    for window, stride, baseline in ((9, 5, 0.0), (8, 8, 0.5)):
        theirs = captum.Occlusion(net).attribute(x, target=y, sliding_window_shapes=(3, window, window), baselines=baseline,
                                                 strides=(3, stride, stride), perturbations_per_eval=4)  # fmt: skip
        ours = occlusion(net, x, y, window=window, stride=stride, baseline=baseline)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_rise_finds_the_pixels_that_a_model_reads():
    class Corner(nn.Module):
        def forward(self, x):
            z = 4 * x[:, 0, :4, :4].mean((1, 2))
            return torch.stack([z, -z], 1)

    x = torch.ones(2, 1, 12, 12)
    heat = rise(Corner(), x, 0, n=300, cells=3, seed=0)
    assert heat.shape == (2, 1, 12, 12) and (heat >= 0).all()
    assert (heat[..., :4, :4].mean((1, 2, 3)) > heat[..., 6:, 6:].mean((1, 2, 3)) + 0.03).all()
    assert torch.equal(heat, rise(Corner(), x, 0, n=300, cells=3, seed=0))
    flat = models.linear((1, 12, 12), 2, seed=0)
    flat[1].weight.data.zero_()
    level = float(flat(x)[0].softmax(0)[0])
    assert (rise(flat, x, 0, n=2000, cells=3, seed=0) / level - 1).abs().max() < 0.15  # E m = keep everywhere


def probability(model, x, mask, start, y):
    with torch.no_grad():
        return model(start + mask * (x - start)).log_softmax(1).gather(1, y[:, None])[:, 0]


def cut_out(heat, area):
    """The pixels with the largest values, as many as `area` allows."""
    rank = heat.flatten(1).argsort(1, descending=True).argsort(1)
    return (rank < round(area * rank.shape[1])).view_as(heat).float()


@pytest.mark.parametrize("area", [0.05, 0.2])
def test_the_best_mask_keeps_its_area_and_beats_others(area, net, shapes):
    x, y = shapes.x, shapes.y
    before = torch.random.get_rng_state()
    masks = extremal_perturbation(net, x, y, area=area, steps=60, baseline=0.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert masks.shape == (6, 1, 32, 32) and masks.min() >= 0 and masks.max() <= 1
    assert (masks.mean((1, 2, 3)) - area).abs().max() < 0.01 * area
    assert ((masks < 0.1) | (masks > 0.9)).float().mean() > 0.75  # nearly binary
    start = torch.zeros_like(x)
    best = probability(net, x, masks, start, y)
    gen = torch.Generator().manual_seed(0)
    blobs = [
        nn.functional.interpolate(torch.rand(6, 1, 5, 5, generator=gen), size=32, mode="bilinear") for _ in range(5)
    ]
    random = torch.stack([probability(net, x, cut_out(blob, area), start, y) for blob in blobs])
    assert best.mean() > random.mean() + 0.5
    assert best.mean() > probability(net, x, cut_out(grad_cam(net, x, y), area), start, y).mean() + 0.1
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_extremal_masks_are_reproducible_and_finish_in_float64():
    model, x = models.mlp((1, 8, 10), 3, hidden=(8,), seed=0).double(), torch.rand(2, 1, 8, 10).double()
    one = extremal_perturbation(model, x, 1, steps=5, area=0.3)
    assert one.dtype == torch.float64 and torch.equal(one, extremal_perturbation(model, x, 1, steps=5, area=0.3))
    torch.testing.assert_close(extremal_perturbation(model, x[:1], 1, steps=5, area=0.3), one[:1])
    torch.testing.assert_close(extremal_perturbation(model, x, 1, steps=5, area=0.3, batch_size=1), one)


def test_areas_and_blur():
    heat = torch.randn(5, 1, 9, 7)
    for area in (0.01, 0.5, 0.97):
        masks = with_area(heat, area)
        torch.testing.assert_close(masks.mean((1, 2, 3)), torch.full((5,), area), atol=1e-4, rtol=0)
    x = torch.rand(2, 3, 9, 11)
    torch.testing.assert_close(blurred(torch.full_like(x, 0.3), 2.0), torch.full_like(x, 0.3))
    torch.testing.assert_close(blurred(x, 0.05), x)
    assert blurred(x, 4.0).std() < 0.2 * x.std()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n, x: occlusion(n, torch.zeros_like(x)), "x: got 6 of 6 images that equal the baseline"),
        (lambda n, x: occlusion(n, x, window=33), "window: got 33, want at most 32"),
        (lambda n, x: occlusion(n, x, window=3, stride=4), "stride: got 4, want at most the window, 3"),
        (lambda n, x: occlusion(n, x, 8), "target: got label 8"),
        (lambda n, x: rise(n, torch.zeros_like(x)), "images that equal the baseline"),
        (lambda n, x: rise(n, x, cells=1), "cells: got 1"),
        (lambda n, x: rise(n, x, keep=1.0), "keep: got 1"),
        (lambda n, x: extremal_perturbation(n, torch.full_like(x, 0.4)), "constant image"),
        (lambda n, x: extremal_perturbation(n, x, area=0.0), "area: got 0"),
        (lambda n, x: extremal_perturbation(n, x, sigma=0.0), "sigma: got 0"),
        (lambda n, x: extremal_perturbation(n, x, 99, steps=1), "target: got label 99"),
        (lambda n, x: occlusion(lambda a: n(a.view(6, 3, 32, 32)), x.flatten(1)), "want images"),
    ],
)
def test_bad_input_is_named(call, message, net, shapes):
    with pytest.raises(ValueError, match=message):
        call(net, shapes.x)
