"""Defences: each layer is the published one, the randomised ones are unbiased, the detector keeps its false-positive rate."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from tmlcourse import data, models
from tmlcourse.attacks import pgd
from tmlcourse.defenses import (
    ActivationPruning,
    BitDepth,
    Detector,
    FeatureMask,
    MeanFilter,
    MedianFilter,
    RandomResizePad,
    Thermometer,
    deep_cloak,
    expected_accuracy,
    prune_activations,
    roc,
    squeezing_detector,
)
from tmlcourse.defenses.preprocessing import _middle
from tmlcourse.defenses.randomised import _drawn
from tmlcourse.randomness import seeded
from tmlcourse.threat import Linf

needs_art = pytest.mark.skipif(not importlib.util.find_spec("art"), reason="needs adversarial-robustness-toolbox")


def images(shape=(5, 2, 7, 6), seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(shape=(1, 8, 8), classes=3, seed=0):
    return models.mlp(shape, classes, hidden=(12,), seed=seed)


# ---- filters


@given(bits=st.integers(1, 16), seed=st.integers(0, 99))
def test_bit_depth_keeps_2_to_the_i_values_the_nearest_of_them(bits, seed):
    x = images((3, 1, 4, 5), seed, torch.float64)
    out, top = BitDepth(bits)(x), 2**bits - 1
    assert torch.allclose(out * top, (out * top).round(), atol=1e-9)
    assert ((out - x).abs() <= 0.5 / top + 1e-12).all() and out.dtype == x.dtype
    assert torch.equal(BitDepth(bits)(out), out)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(4, 1, 9, 9), (2, 3, 5, 8), (1, 1, 2, 3)])
def test_median_and_mean_filter_are_scipys(size, shape):
    x = images(shape)
    window = (1, 1, size, size)
    expected = ndimage.median_filter(x.numpy(), size=window, mode="reflect")
    assert np.array_equal(MedianFilter(size)(x).numpy(), expected)
    expected = ndimage.uniform_filter(x.double().numpy(), size=window, mode="reflect")
    assert np.allclose(MeanFilter(size)(x.double()).numpy(), expected, atol=1e-12)


@given(n=st.integers(1, 17), seed=st.integers(0, 99))
def test_forgetful_selection_finds_the_upper_median_ties_included(n, seed):
    values = torch.randint(0, 4, (n, 50), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(_middle(list(values)), values.sort(0).values[n // 2])


def test_the_median_filter_lets_the_gradient_through_to_the_median():
    x = images((1, 1, 5, 5)).requires_grad_()
    out = MedianFilter(3)(x)[0, 0, 2, 2]
    (grad,) = torch.autograd.grad(out, x)
    assert grad.sum() == 1 and (grad != 0).sum() == 1 and x[grad != 0] == out


@given(levels=st.integers(2, 20), seed=st.integers(0, 99))
def test_thermometer_lights_the_lamps_below_the_value(levels, seed):
    x = images((2, 3, 4, 5), seed, torch.float64)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 1 / levels, 0.5, 1e-9])
    tau = Thermometer(levels)(x).unflatten(1, (3, levels))
    for lamp in range(levels):
        assert torch.equal(tau[:, :, lamp], (x > (lamp + 1) / levels).double())


def test_thermometer_of_the_papers_example_and_its_soft_version():
    encoder = Thermometer(10)
    tau = encoder(torch.full((1, 1, 1, 1), 0.66)).flatten()
    assert "".join(str(int(v)) for v in tau) == "1111110000"
    x = images((2, 1, 3, 3), dtype=torch.float64).requires_grad_()
    soft, steps = encoder.soft(x, width=0.5), torch.arange(1, 11).double() / 10
    assert torch.allclose(soft, ((x - steps.view(1, -1, 1, 1)) / 0.5 + 0.5).clamp(0, 1))
    assert torch.equal(encoder.soft(x, width=1e-9), encoder(x))
    (grad,) = torch.autograd.grad(soft.sum(), x)
    near = ((x - steps.view(1, -1, 1, 1)).abs() < 0.25).sum(1, keepdim=True)
    assert torch.allclose(grad, near.double() / 0.5)
    (grad,) = torch.autograd.grad(encoder(x).sum(), x)
    assert (grad == 0).all()


@given(levels=st.integers(2, 12), seed=st.integers(0, 99))
def test_a_pixel_in_one_bucket_has_that_buckets_column(levels, seed):
    x, encoder = images((2, 2, 3, 4), seed), Thermometer(levels)
    bucket = encoder(x).unflatten(1, (2, levels)).sum(2).long()
    one_hot = F.one_hot(bucket, levels).movedim(-1, 2).float()
    assert torch.equal(encoder.from_buckets(one_hot), encoder(x))


@needs_art
def test_filters_agree_with_art():
    from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing, ThermometerEncoding

    x = images((6, 1, 9, 9))
    for bits in (1, 3, 8):
        theirs, _ = FeatureSqueezing(clip_values=(0, 1), bit_depth=bits)(x.numpy().copy())
        assert np.allclose(BitDepth(bits)(x).numpy(), theirs, atol=1e-6)
    theirs, _ = SpatialSmoothing(window_size=3, channels_first=True)(x.numpy().copy())
    assert np.allclose(MedianFilter(3)(x).numpy(), theirs, atol=1e-6)
    theirs, _ = ThermometerEncoding(clip_values=(0, 1), num_space=10, channels_first=True)(x.numpy().copy())
    # They keep a first lamp that is always lit, where the paper's example has a last one that never is.
    assert np.array_equal(Thermometer(10)(x)[:, :-1].numpy(), theirs[:, 1:])


@pytest.mark.parametrize("layer", [MeanFilter(3), MedianFilter(2), Thermometer(4), RandomResizePad(2)])
def test_layers_that_need_rows_and_columns_say_so(layer):
    with pytest.raises(ValueError, match=r"x: got shape \(4, 5\), want images"):
        layer(torch.rand(4, 5))


@pytest.mark.parametrize("make, says", [
    (lambda: BitDepth(0), "bits"), (lambda: BitDepth(17), "bits"), (lambda: BitDepth(1.5), "bits"),
    (lambda: MedianFilter(0), "size"), (lambda: Thermometer(1), "levels"), (lambda: RandomResizePad(0), "low"),
    (lambda: Thermometer(4).soft(torch.rand(1, 1, 8, 8), width=0), "width"),
    (lambda: RandomResizePad(9, (8, 8)), "low"), (lambda: RandomResizePad(9)(torch.rand(1, 1, 8, 8)), "low"),
    (lambda: ActivationPruning(0), "share"), (lambda: ActivationPruning(-1), "share"),
    (lambda: prune_activations(nn.ReLU()), "model"), (lambda: prune_activations(models.linear()), "after"),
    (lambda: prune_activations(models.linear(), after=[5]), "after"),
])  # fmt: skip
def test_bad_settings_are_named(make, says):
    with pytest.raises((TypeError, ValueError), match=f"^{says}: got"):
        make()


# ---- randomised


@pytest.mark.parametrize("shape, size", [((6, 2, 8, 8), None), ((6, 1, 9, 6), None), ((6, 1, 7, 7), (11, 12))])
def test_resize_and_pad_is_torchs_resize_at_a_random_place(shape, size):
    x, layer = images(shape, dtype=torch.float64), RandomResizePad(5, size)
    height, width = size or shape[2:]
    places = set()
    for seed in range(20):
        with seeded(seed):
            out = layer(x)
        assert out.shape == (*shape[:2], height, width)
        for image, result in zip(x, out, strict=True):
            rows, columns = result[0].any(1).nonzero().squeeze(1), result[0].any(0).nonzero().squeeze(1)
            top, left, r = rows[0].item(), columns[0].item(), len(rows)
            assert 5 <= r <= height and len(columns) == max(1, round(r * width / height))
            small = F.interpolate(image[None], (r, len(columns)), mode="bilinear", align_corners=False)
            edges = (left, width - left - len(columns), top, height - top - r)
            assert torch.allclose(F.pad(small, edges)[0], result)
            places.add((r, top, left))
    assert {r for r, _, _ in places} == set(range(5, height + 1)) and len(places) > 20


def test_every_size_and_corner_is_as_likely_as_the_others():
    """Sides uniform on {low, ..., size}; given the side, the corner uniform: chi-squared tests at one in a thousand."""
    from scipy.stats import chisquare

    x = torch.ones(6000, 1, 6, 6)
    with seeded(0):
        out = RandomResizePad(5)(x)[:, 0]
    tall = out.any(2).sum(1)
    assert chisquare(torch.bincount(tall)[5:].numpy()).pvalue > 1e-3
    corner = 2 * (out.any(2).float().argmax(1)) + out.any(1).float().argmax(1)
    assert chisquare(torch.bincount(corner[tall == 5]).numpy()).pvalue > 1e-3


def test_pruned_activations_have_the_right_mean():
    """E[SAP(a)] = a: the mean of 20,000 draws lies within five standard errors, for each activation."""
    a = torch.tensor([[3.0, -1.0, 0.5, 0.1, 0.0, 2.0]], dtype=torch.float64)
    layer, n = ActivationPruning(0.5), 20000
    with seeded(0):
        out = layer(a.expand(n, -1))
    p = a.abs() / a.abs().sum()
    chance = 1 - (1 - p) ** 3  # half of six: three draws
    error = (a.square() * (1 / chance.clamp_min(1e-9) - 1) / n).sqrt()
    assert ((out.mean(0) - a).abs() <= 5 * error + 1e-12).all()
    kept = (out != 0).double().mean(0)
    assert ((kept - chance).abs() <= 5 * (chance * (1 - chance) / n).sqrt() + 1e-12).all()
    assert torch.allclose(out[out != 0], (a / chance.clamp_min(1e-9)).expand(n, -1)[out != 0])


def test_the_draws_are_multinomial_not_independent():
    """Three draws keep at most three activations, and two equal activations are both kept as often as draws say."""
    n, layer = 20000, ActivationPruning(0.75)
    a = torch.ones(n, 4, dtype=torch.float64)
    with seeded(0):
        kept = layer(a) != 0
    assert kept.sum(1).max() == 3 and kept.sum(1).min() == 1
    both = (kept[:, 0] & kept[:, 1]).double().mean().item()
    expected = 1 - 2 * 0.75**3 + 0.5**3  # inclusion and exclusion
    assert abs(both - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


@pytest.mark.parametrize("a", [torch.zeros(3, 5), torch.eye(4), torch.rand(2, 3, 4, 4), torch.rand(2, 5).double()])
def test_pruning_keeps_shape_dtype_zeros_and_a_lone_activation(a):
    out = ActivationPruning(2.0)(a)
    assert out.shape == a.shape and out.dtype == a.dtype and torch.isfinite(out).all()
    assert (out[a == 0] == 0).all()
    if a.shape == (4, 4):
        assert torch.allclose(out, a)


@given(zeros=st.integers(0, 60), draws=st.sampled_from([0.05, 1.0, 5.0]), seed=st.integers(0, 99))
def test_pruning_never_draws_what_is_not_active(zeros, draws, seed):
    """The end of the last share is 1 up to rounding: no draw may fall behind it, onto an activation of 0."""
    a = images((300, 100), seed)
    a[:, 100 - zeros :] = 0
    with seeded(seed):
        out = ActivationPruning(draws)(a)
    assert torch.isfinite(out).all() and (out[a == 0] == 0).all() and (out != 0).any(1).all()
    with seeded(seed):  # shares whose sum came out at 0.9
        drawn = _drawn(0.9 * a / a.sum(1, keepdim=True), 20)
    assert drawn.any(1).all() and not drawn[a == 0].any()


def test_pruning_goes_behind_the_chosen_layers_and_shares_them():
    model = models.mlp((1, 4, 4), 3, hidden=(5, 6), seed=0)
    pruned = prune_activations(model, 0.5)
    kinds = [type(layer).__name__ for layer in pruned]
    assert kinds == ["Flatten", "Linear", "ReLU", "ActivationPruning", "Linear", "ReLU", "ActivationPruning", "Linear"]
    assert pruned[1] is model[1] and not pruned.training
    last = prune_activations(model, 0.5, after=[-2])
    assert [isinstance(layer, ActivationPruning) for layer in last] == [False] * 5 + [True, False]
    many = prune_activations(model, 1e4)  # with very many draws everything is kept, divided by one
    x = images((3, 1, 4, 4))
    assert torch.allclose(many(x), model(x), atol=1e-4)


def test_deep_cloak_masks_the_features_that_move_most():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    x, x_adv = images((6, 1, 3, 3)), images((6, 1, 3, 3), 1)
    cloaked = deep_cloak(model, x, x_adv, share=0.3)
    moved = (model[:3](x) - model[:3](x_adv)).abs().mean(0)
    mask = cloaked[-2].mask
    assert isinstance(cloaked[-2], FeatureMask) and int((mask == 0).sum()) == 3
    assert moved[mask == 0].min() >= moved[mask == 1].max()
    assert torch.allclose(cloaked(x), (model[:3](x) * mask) @ model[3].weight.T + model[3].bias)
    assert torch.equal(deep_cloak(model, x, x_adv, share=0.0)(x), model(x))
    for wrong, says in ((dict(share=1.0), "share"), (dict(x_adv=x_adv[:2]), "x_adv")):
        with pytest.raises(ValueError, match=says):
            deep_cloak(model, x, **{"x_adv": x_adv, **wrong})
    with pytest.raises(TypeError, match="model"):
        deep_cloak(model[:3], x, x_adv)


def test_randomness_is_reproducible_and_leaves_torchs_generator_alone():
    test = data.load("digits", n=30)
    model = nn.Sequential(RandomResizePad(4), net(test.shape, 10)).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (expected_accuracy(model, test.x, test.y, draws=4, seed=1) for _ in range(2))
    assert first == again and torch.equal(before, torch.get_rng_state())
    with pytest.raises(RuntimeError, match="stop"), seeded(3):
        torch.rand(2)
        raise RuntimeError("stop")
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(model(test.x), model(test.x))


def test_expected_accuracy_is_the_mean_over_draws():
    x = images((40, 1, 8, 8))

    def coin(x):  # right with chance 0.3, anew each time
        right = torch.rand(len(x)) < 0.3
        return torch.stack([right.float(), 1 - right.float()], 1)

    y = torch.zeros(40, dtype=torch.int64)
    got = expected_accuracy(coin, x, y, draws=200, seed=0)
    assert abs(got - 0.3) < 5 * (0.3 * 0.7 / 8000) ** 0.5
    sure = net()
    assert expected_accuracy(sure, x, sure(x).argmax(1), draws=2) == 1


# ---- the detector


def test_the_score_is_the_largest_l1_distance_between_answers():
    x, model = images((7, 1, 8, 8)), net()
    squeezers = (BitDepth(1), MedianFilter(2))
    p = model(x).softmax(1)
    by_hand = torch.stack([(p - model(s(x)).softmax(1)).abs().sum(1) for s in squeezers]).max(0).values
    detector = Detector(model, squeezers, 0.1)
    assert torch.allclose(detector.score(x), by_hand) and torch.equal(detector.scores(x), detector.score(x).detach())
    assert torch.equal(detector.flags(x), by_hand > 0.1)
    assert (Detector(model, (lambda x: x,), 0.0).scores(x) == 0).all()


@given(n=st.integers(1, 60), fpr=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.99]), seed=st.integers(0, 9))
def test_the_threshold_is_the_smallest_that_keeps_the_false_positive_rate(n, fpr, seed):
    x, model = images((n, 1, 8, 8), seed), net()
    detector = squeezing_detector(model, [BitDepth(1)], x, fpr=fpr)
    scores = detector.scores(x)
    assert detector.flags(x).double().mean() <= fpr
    smaller = scores[scores < detector.threshold]
    if len(smaller):
        assert (scores > smaller.max()).double().mean() > fpr


def test_the_area_under_the_curve_is_the_chance_of_the_right_order():
    clean, attacked = images((40,), 0), images((30,), 1) + 0.3
    table, area = roc(clean, attacked)
    pairs = (attacked[:, None] > clean).double() + 0.5 * (attacked[:, None] == clean).double()
    assert abs(area - pairs.mean().item()) < 1e-12
    assert (table.fpr.diff().dropna() >= 0).all() and (table.tpr.diff().dropna() >= 0).all()
    for _, row in table.iloc[1:].iterrows():
        assert row.fpr == (clean.double() >= row.threshold).double().mean()
        assert row.tpr == (attacked.double() >= row.threshold).double().mean()
    with pytest.raises(ValueError, match="attacked: got shape"):
        roc(clean, torch.zeros(0))


@pytest.mark.parametrize("options, says", [
    (dict(squeezers=()), "squeezers"), (dict(squeezers=(1,)), "squeezers"), (dict(fpr=1.0), "fpr"),
    (dict(fpr=-0.1), "fpr"), (dict(x=images((2, 1, 8, 8)) * 255), "x"), (dict(x=images((2, 1, 8, 8)).long()), "x"),
])  # fmt: skip
def test_the_detector_names_bad_input(options, says):
    given = {"squeezers": (BitDepth(1),), "x": images((2, 1, 8, 8)), "fpr": 0.05, **options}
    with pytest.raises((TypeError, ValueError), match=f"^{says}: got"):
        squeezing_detector(net(), given["squeezers"], given["x"], fpr=given["fpr"])


@pytest.mark.parametrize("layer", [BitDepth(2), MeanFilter(3), MedianFilter(2), MedianFilter(3), RandomResizePad(6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_defended_model_is_an_ordinary_model_for_the_attacks(layer, dtype):
    x, y = images((4, 1, 8, 8), dtype=dtype), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(layer, nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).to(dtype).eval()
    x_adv = pgd(model, x, y, Linf(0.2), steps=3, seed=0)
    assert x_adv.dtype == dtype and Linf(0.2).contains(x_adv, x).all()
    assert all(p.grad is None for p in model.parameters())
