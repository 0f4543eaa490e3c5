"""Sanity checks and scores: SciPy and scikit-image beside ours, verdicts, sums by hand."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret.activation import grad_cam
from tmlcourse.interpret.common import gradient
from tmlcourse.interpret.gradients import guided_backprop
from tmlcourse.interpret.sanity import cascading, independent, parameter_randomisation, rank_correlation, ssim
from tmlcourse.interpret.scores import deletion, deletion_curve, insertion, mass_accuracy, pointing_game
from tmlcourse.intervals import clopper_pearson


@pytest.fixture(scope="module")
def net():
    return pretrained.load("shapes-standard")


@pytest.fixture(scope="module")
def shapes():
    return data.shapes(8)


@given(seed=st.integers(0, 1000), levels=st.sampled_from([2, 5, 1000]))
def test_rank_correlation_is_scipys(seed, levels):
    gen = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-levels, levels, (3, 1, 4, 5), generator=gen).float() for _ in range(2))
    for absolute in (False, True):
        va, vb = ((v.abs() if absolute else v) for v in (a, b))
        expected = [scipy.stats.spearmanr(p.flatten(), q.flatten()).statistic for p, q in zip(va, vb, strict=True)]
        if np.isnan(expected).any():
            with pytest.raises(ValueError, match="constant map"):
                rank_correlation(a, b, absolute=absolute)
        else:
            np.testing.assert_allclose(rank_correlation(a, b, absolute=absolute), expected, atol=1e-12)


def test_rank_correlation_sees_order_only():
    a = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(rank_correlation(a, a.exp()), torch.ones(4).double())
    torch.testing.assert_close(rank_correlation(a, -a), -torch.ones(4).double())
    torch.testing.assert_close(rank_correlation(a, -a, absolute=True), torch.ones(4).double())


def test_ssim_is_its_formula_window_by_window():
    a, b = torch.rand(1, 1, 6, 7, dtype=torch.float64), torch.rand(1, 1, 6, 7, dtype=torch.float64)
    p, q = (((v - v.min()) / (v.max() - v.min()))[0, 0].numpy() for v in (a, b))
    values = []
    for i in range(4):
        for j in range(5):
            u, v = p[i : i + 3, j : j + 3].ravel(), q[i : i + 3, j : j + 3].ravel()
            (su, suv), (_, sv) = np.cov(u, v)
            values.append((2 * u.mean() * v.mean() + 1e-4) * (2 * suv + 9e-4)
                          / ((u.mean() ** 2 + v.mean() ** 2 + 1e-4) * (su + sv + 9e-4)))  # fmt: skip
    np.testing.assert_allclose(ssim(a, b, window=3), [np.mean(values)], atol=1e-12)


@pytest.mark.parametrize("window", [7, 11])
def test_ssim_is_scikit_images(window):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.rand(3, 1, 24, 30), torch.rand(3, 1, 24, 30)
    b[1] = a[1] + 0.1 * b[1]
    unit = [(v - v.amin((1, 2, 3), keepdim=True)) / (v.amax((1, 2, 3), keepdim=True) - v.amin((1, 2, 3), keepdim=True))
            for v in (a.double(), b.double())]  # fmt: skip
    expected = []
    for p, q in zip(*unit, strict=True):
        _, picture = metrics.structural_similarity(
            p[0].numpy(), q[0].numpy(), win_size=window, data_range=1.0, full=True
        )
        edge = window // 2
        expected.append(picture[edge:-edge, edge:-edge].mean())
    np.testing.assert_allclose(ssim(a, b, window=window), expected, atol=1e-9)
    torch.testing.assert_close(ssim(a, a), torch.ones(3).double())


def learnt(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def changed(a, b):
    return {name for name in learnt(a) if not torch.equal(a.get_submodule(name).weight, b.get_submodule(name).weight)}


def test_layers_are_forgotten_from_the_top_or_one_alone(net):
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    names = learnt(net)[::-1]
    one_by_one = list(cascading(net, seed=3))
    assert [name for name, _ in one_by_one] == names
    for depth, (_, copied) in enumerate(one_by_one, start=1):
        assert changed(net, copied) == set(names[:depth])
    alone = list(independent(net, seed=3))
    for name, copied in alone:
        assert changed(net, copied) == {name}
    for (name, copied), (_, other) in zip(alone, one_by_one, strict=True):
        assert torch.equal(copied.get_submodule(name).weight, other.get_submodule(name).weight)
    weight = alone[3][1].get_submodule(names[3]).weight
    assert abs(float(weight.std() / (2 / weight[0].numel()) ** 0.5) - 1) < 0.1
    assert changed(dict(cascading(net, seed=3))[names[0]], dict(cascading(net, seed=4))[names[0]]) == {names[0]}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_published_verdicts(net, shapes):
    """The gradient depends on what was learnt, guided backpropagation hardly does (Adebayo et al. 2018)."""
    methods = {"gradient": gradient, "guided": guided_backprop, "Grad-CAM": grad_cam}
    table = parameter_randomisation(net, shapes.x, methods, shapes.y, seed=0)
    assert list(table.columns) == ["method", "layer", "depth", "rank", "rank of absolute values", "ssim"]
    last = table[table.depth == table.depth.max()].set_index("method")
    rank = table[table.depth == 3].set_index("method")["rank"]
    assert rank["guided"] > rank["gradient"] + 0.25 and rank["gradient"] < 0.3
    strength = table.set_index(["method", "depth"])["rank of absolute values"]
    assert all(strength["guided", d] > strength["gradient", d] + 0.1 for d in (2, 3))
    assert last["rank"]["gradient"] < 0.2


def test_maps_that_do_not_depend_on_the_model_never_change(net, shapes):
    methods = {"edges": lambda model, x, target: (x - x.roll(1, -1)).abs(), "constant": lambda model, x, target: x * 0}
    table = parameter_randomisation(net, shapes.x, methods, 1, forget=independent).set_index("method")
    assert np.allclose(table.loc["edges", ["rank", "ssim"]], 1)
    assert np.allclose(table.loc["constant", "rank"], 0)


def test_the_pointing_game_by_hand():
    heat, masks = torch.zeros(4, 1, 5, 6), torch.zeros(4, 1, 5, 6, dtype=torch.bool)
    masks[..., 1:3, 1:3] = True
    heat[0, 0, 2, 2] = 1.0  # inside
    heat[1, 0, 4, 2] = 1.0  # two pixels below
    heat[2, 0, 1, 1] = heat[2, 0, 4, 5] = 1.0  # two largest values, one of them outside
    score = pointing_game(heat, masks)  # the last one says nothing at all
    assert score.each.tolist() == [True, False, False, False] and score.value == 0.25
    assert (score.low, score.high) == clopper_pearson(1, 4)
    assert pointing_game(heat, masks, tolerance=2).each.tolist() == [True, True, False, False]
    assert pointing_game(heat, masks, tolerance=1.9).each.tolist() == [True, False, False, False]
    assert pointing_game(heat, masks, tolerance=9).value == 1


def test_mass_in_the_mask_by_hand():
    masks = torch.rand(5, 1, 6, 6) < 0.3
    masks[..., 0, 0] = True
    share = masks.double().mean((1, 2, 3))
    torch.testing.assert_close(mass_accuracy(torch.full((5, 1, 6, 6), 0.2), masks).each, share)
    heat = torch.randn(5, 1, 6, 6)
    expected = [(h.clamp(min=0) * m).sum() / h.clamp(min=0).sum() for h, m in zip(heat, masks, strict=True)]
    torch.testing.assert_close(mass_accuracy(heat, masks).each, torch.stack(expected).double())
    score = mass_accuracy(heat, masks)
    assert score.low <= score.value <= score.high and score.low < score.high
    assert mass_accuracy(-torch.rand(5, 1, 6, 6), masks).value == 0
    assert mass_accuracy(masks.float(), masks).value == 1


def test_a_bootstrap_interval_covers_like_a_normal_one():
    masks = torch.zeros(200, 1, 1, 10, dtype=torch.bool)
    masks[..., 0] = True
    heat = torch.rand(200, 1, 1, 10, generator=torch.Generator().manual_seed(0))
    score = mass_accuracy(heat, masks)
    error = score.each.std() / 200**0.5
    assert abs(score.low - (score.value - 1.96 * error)) < 0.3 * error
    assert abs(score.high - (score.value + 1.96 * error)) < 0.3 * error


def test_deletion_and_insertion_by_hand(net, shapes):
    x, y = shapes.x[:3], shapes.y[:3]
    heat = torch.rand(3, 1, 32, 32)
    curve = deletion_curve(net, x, heat, y, steps=4, baseline=0.5)
    with torch.no_grad():
        p = net(x).softmax(1).gather(1, y[:, None])[:, 0]
        nothing = net(torch.full_like(x, 0.5)).softmax(1).gather(1, y[:, None])[:, 0]
        half = x.clone()
        for image, h in zip(half, heat, strict=True):
            image[:, h[0] >= h[0].flatten().sort(descending=True).values[511]] = 0.5
        p_half = net(half).softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(curve[:, [0, 2, 4]], torch.stack([p, p_half, nothing], 1), atol=1e-5, rtol=1e-4)
    back = deletion_curve(net, x, -heat, y, steps=4, baseline=0.5, insert=True)
    torch.testing.assert_close(back.flip(1), curve, atol=1e-5, rtol=1e-4)  # what is not yet in is what is already out
    area = (curve[:, 0] / 2 + curve[:, 1:4].sum(1) + curve[:, 4] / 2) / 4
    torch.testing.assert_close(
        deletion(net, x, heat, y, steps=4, baseline=0.5).each, area.double(), atol=1e-6, rtol=1e-5
    )


def test_a_map_that_knows_the_model_beats_its_opposite():
    model = models.linear((1, 6, 6), 2, seed=0)
    model[1].weight.data *= 20
    x = torch.rand(20, 1, 6, 6)
    heat = gradient(model, x, torch.zeros(20, dtype=torch.int64)) * x
    assert insertion(model, x, heat, 0, steps=36).low > insertion(model, x, -heat, 0, steps=36).high
    assert deletion(model, x, heat, 0, steps=36).high < deletion(model, x, -heat, 0, steps=36).low


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda n, d: rank_correlation(torch.ones(2, 4), torch.rand(2, 4)), ValueError, "constant map in 2 of 2"),
        (lambda n, d: rank_correlation(torch.rand(2, 4), torch.rand(3, 4)), ValueError, "b: got shape"),
        (lambda n, d: rank_correlation(torch.full((2, 4), torch.nan), torch.rand(2, 4)), ValueError, "a: got NaN"),
        (lambda n, d: ssim(torch.rand(2, 1, 5, 5), torch.rand(2, 1, 5, 5)), ValueError, "window: got 7"),
        (lambda n, d: ssim(d.x, d.x), ValueError, r"want \(N, 1, H, W\)"),
        (lambda n, d: next(cascading(lambda x: x)), TypeError, "model: got function"),
        (lambda n, d: next(independent(nn.Sequential(nn.ReLU()))), ValueError, "no Linear or Conv2d"),
        (lambda n, d: parameter_randomisation(n, d.x, {}), TypeError, "methods: got dict"),
        (lambda n, d: parameter_randomisation(n, d.x, {"g": gradient}, 8), ValueError, "target: got label 8"),
        (lambda n, d: pointing_game(d.x, d.masks), ValueError, "heat: got .*per_pixel"),
        (lambda n, d: pointing_game(d.x[:, :1], d.masks[:3]), ValueError, "masks: got"),
        (lambda n, d: mass_accuracy(d.x[:, :1], torch.zeros_like(d.masks)), ValueError, "masks: got 8 without"),
        (lambda n, d: mass_accuracy(d.x[:, :1] / 0, d.masks), ValueError, "heat: got NaN"),
        (lambda n, d: deletion(n, d.x, d.x[:3, :1]), ValueError, "heat: got shape"),
        (lambda n, d: deletion(n, d.x, d.x[:, :1], steps=2000), ValueError, "steps: got 2000"),
        (lambda n, d: deletion(n, d.x, d.x[:, :1], confidence=1.0), ValueError, "confidence: got 1"),
    ],
)
def test_bad_input_is_named(call, error, message, net, shapes):
    with pytest.raises(error, match=message):
        call(net, shapes)
