"""LIME, Shapley values and anchors: exact on linear models, axioms, brute force, a peer."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmlcourse import data, models
from tmlcourse.interpret.lime import (
    anchor,
    grid,
    image_game,
    kernel_shap,
    lime,
    lime_table,
    shapley,
    slic,
    table_game,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits-28x28", n=3)


@pytest.fixture(scope="module")
def rows():
    return torch.rand(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]).double()


def linear_predict(rows):
    return rows @ WEIGHTS + 2


def contributions(model, x, segments, target, baseline):
    """sum over a superpixel of weight (pixel - baseline), at each pixel."""
    weight = model[1].weight.detach()[target].view(x.shape[1:])
    each = (weight * (x - baseline)).sum(1)
    flat = segments.expand(len(x), *x.shape[2:]).flatten(1)
    sums = each.new_zeros(len(x), int(segments.max()) + 1).scatter_add_(1, flat, each.flatten(1))
    return sums.gather(1, flat).view(len(x), 1, *x.shape[2:])


# ---- LIME


@pytest.mark.parametrize("kernel", [0.1, 0.25, 5.0])
@pytest.mark.parametrize("n", [512, 60])
def test_lime_is_exact_on_a_linear_model(digits, kernel, n):
    """All coalitions and a random part of them; any kernel; any baseline; float64 in, float64 out."""
    model, segments = models.linear(digits.shape, seed=0).double(), grid(digits.shape, 10)
    x = digits.x.double()
    for baseline in (0.0, 0.3, torch.rand(1, 28, 28, dtype=torch.float64)):
        w = lime(model, x, 3, segments=segments, n=n, width=kernel, baseline=baseline, seed=0)
        assert w.dtype == torch.float64 and w.shape == (3, 1, 28, 28)
        assert torch.allclose(w, contributions(model, x, segments, 3, baseline), atol=1e-9)


def test_lime_with_superpixels_of_each_image(digits):
    model, segments = models.linear(digits.shape, seed=0), slic(digits.x, cell=7)
    w = lime(model, digits.x, 3, segments=segments, n=200, seed=0)
    assert torch.allclose(w, contributions(model, digits.x, segments, 3, 0.0), atol=1e-4)


def test_lime_asks_about_the_predicted_class_and_repeats_itself(digits):
    model = models.mlp(digits.shape, hidden=(20,), seed=1)
    state = torch.get_rng_state()
    w = lime(model, digits.x, n=80, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(w, lime(model, digits.x, model(digits.x).argmax(1), n=80, seed=3))
    assert not torch.equal(w, lime(model, digits.x, n=80, seed=4))
    one = lime(model, digits.x[1:2], n=80, seed=3)
    assert torch.allclose(one, w[1:2], atol=1e-5)
    wide = data.load("digits-28x28", n=1).x[..., 4:24]  # not square
    assert lime(models.linear((1, 28, 20)), wide, segments=grid(wide.shape, 9), n=99).shape == (1, 1, 28, 20)


def test_a_patch_hidden_by_its_own_mean_is_invisible():
    x = torch.rand(1, 1, 8, 8)
    x[..., 4:, 4:] = 0.7
    model = models.linear((1, 8, 8), seed=0)
    segments = grid(x.shape, 4)
    assert abs(float(lime(model, x, 0, segments=segments, n=16, baseline="mean")[0, 0, 7, 7])) < 1e-6
    assert abs(float(lime(model, x, 0, segments=segments, n=16)[0, 0, 7, 7])) > 1e-3


def test_probability_and_logit_differ_and_ridge_shrinks(digits):
    model, segments = models.mlp(digits.shape, hidden=(20,), seed=1), grid(digits.shape, 10)
    logit = lime(model, digits.x, 0, segments=segments, n=512)
    chance = lime(model, digits.x, 0, segments=segments, n=512, of="probability")
    assert chance.abs().max() < 1 and not torch.allclose(logit, chance)
    assert lime(model, digits.x, 0, segments=segments, n=512, ridge=100.0).norm() < 0.8 * logit.norm()


def test_superpixels():
    assert grid((1, 5, 7), 3).tolist()[0] == [0, 0, 0, 1, 1, 1, 2] and int(grid((1, 5, 7), 3).max()) == 5
    x = torch.zeros(2, 3, 12, 12)
    x[:, :, :, 5:] = 1.0  # an edge that the grid of 4 does not follow
    owner = slic(x, cell=4, compactness=0.1)
    assert owner.shape == (2, 12, 12)
    left, right = set(owner[0, :, :5].flatten().tolist()), set(owner[0, :, 5:].flatten().tolist())
    assert not left & right


def test_lime_on_a_table_finds_the_slopes_of_a_linear_model(rows):
    found = lime_table(linear_predict, rows[0], rows, kind="standardised", n=300, seed=0)
    assert torch.allclose(found.weights, WEIGHTS * rows.std(0), atol=1e-9)
    assert found.fidelity > 1 - 1e-9 and abs(found.intercept - float(linear_predict(rows[:1]))) < 1e-9
    binned = lime_table(linear_predict, rows[0], rows, seed=0)
    assert 0 <= binned.fidelity <= 1 and abs(float(binned.weights[3])) < 0.1
    same = lime_table(lambda r: (r[:, 4] <= 2).double(), rows[0], rows, seed=0)  # a constant
    assert same.fidelity == 1.0 and same.weights.abs().max() < 1e-9


# ---- Shapley values


def random_game(M, seed):
    worth = torch.randn(2**M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda s: worth[(s.long() * 2 ** torch.arange(M)).sum(1)]


@given(st.integers(0, 100), st.integers(2, 5))
def test_shapley_is_the_mean_over_all_orders(seed, M):
    v, total = random_game(M, seed), torch.zeros(M, dtype=torch.float64)
    orders = list(permutations(range(M)))
    for order in orders:
        seen = torch.zeros(1, M, dtype=torch.bool)
        for player in order:
            before = float(v(seen))
            seen[0, player] = True
            total[player] += float(v(seen)) - before
    assert torch.allclose(shapley(v, M), total / len(orders))
    assert torch.allclose(kernel_shap(v, M), total / len(orders), atol=1e-8)


def test_the_axioms_on_a_game_of_four():
    def v(s):  # 0 and 1 are alike, 3 adds nothing
        return 2.0 * (s[:, 0] & s[:, 1]) + 3.0 * s[:, 2] + 1.5 * (s[:, 0] & s[:, 1] & s[:, 2])

    def u(s):
        return 1.0 * (s[:, 3] | s[:, 0])

    phi = shapley(v, 4)
    assert abs(float(phi.sum()) - 6.5) < 1e-12  # efficiency
    assert abs(float(phi[0] - phi[1])) < 1e-12  # symmetry
    assert phi[3] == 0  # dummy
    assert torch.allclose(shapley(lambda s: v(s) + u(s), 4), phi + shapley(u, 4))  # additivity


def test_sampled_values_are_efficient_and_near():
    v, exact = random_game(6, 1), shapley(random_game(6, 1), 6)
    sampled = shapley(v, 6, n=3000, seed=0)
    assert abs(float(sampled.sum() - exact.sum())) < 1e-9 and (sampled - exact).abs().max() < 0.1
    by_kernel = kernel_shap(v, 6, n=4000, seed=0)
    assert abs(float(by_kernel.sum() - exact.sum())) < 1e-9 and (by_kernel - exact).abs().max() < 0.2
    assert torch.equal(sampled, shapley(v, 6, n=3000, seed=0))


def test_shapley_values_of_linear_models(rows, digits):
    phi = shapley(table_game(linear_predict, rows[0], rows), 5)
    assert torch.allclose(phi, WEIGHTS * (rows[0] - rows.mean(0)))
    model, segments = models.linear(digits.shape, seed=0), grid(digits.shape, 14)
    phi = shapley(image_game(model, digits.x[:1], 3, segments=segments), 4)
    expected = contributions(model, digits.x[:1], segments, 3, 0.0)[0, 0, ::27, ::27].flatten().double()
    assert torch.allclose(phi, expected, atol=1e-5)


def test_shapley_agrees_with_captum(digits):
    attr = pytest.importorskip("captum.attr")
    model, segments = models.mlp(digits.shape, hidden=(20,), seed=0), grid(digits.shape, 14)
    ours = shapley(image_game(model, digits.x[:1], 3, segments=segments), 4)
    theirs = attr.ShapleyValues(model).attribute(digits.x[:1], target=3, feature_mask=segments[None, None])
    assert torch.allclose(ours, theirs[0, 0, ::27, ::27].flatten().double(), atol=1e-5)


# ---- anchors


def test_the_anchor_is_the_feature_that_decides(rows):
    x = rows[int(rows[:, 2].argmax())]
    rule = anchor(lambda r: r[:, 2] > 0.5, x, rows, seed=0)
    assert rule.features == (2,) and rule.precision == 1.0 and rule.low > 0.95
    assert 0.15 < rule.coverage < 0.35
    both = rows[int((rows[:, 0] + rows[:, 1]).argmax())]
    assert set(anchor(lambda r: (r[:, 0] > 0.5) & (r[:, 1] > 0.5), both, rows, seed=0).features) == {0, 1}
    assert anchor(lambda r: r.sum(1) > float(x.sum()) - 1e-9, x, rows, most=1, seed=0) is None


# ---- bad input


def test_bad_input_is_named(digits, rows):
    model = models.linear(digits.shape)
    with pytest.raises(ValueError, match="target: got label 10"):
        lime(model, digits.x, 10)
    with pytest.raises(ValueError, match="n: got 20, want more than 49"):
        lime(model, digits.x, n=20)
    with pytest.raises(ValueError, match="segments: got shape"):
        lime(model, digits.x, segments=grid((8, 8)))
    with pytest.raises(TypeError, match="segments"):
        lime(model, digits.x, segments=torch.zeros(28, 28))
    with pytest.raises(ValueError, match="baseline"):
        lime(model, digits.x, baseline="blur")
    with pytest.raises(ValueError, match="baseline"):
        lime(model, digits.x, baseline=2.0)
    with pytest.raises(ValueError, match="width"):
        lime(model, digits.x, width=0.0)
    with pytest.raises(ValueError, match="x: got 3 images"):
        image_game(model, digits.x, segments=grid(digits.shape))
    with pytest.raises(ValueError, match="at most 20"):
        shapley(lambda s: s.sum(1), 30)
    with pytest.raises(ValueError, match="value: got"):
        shapley(lambda s: s.double(), 3)
    with pytest.raises(ValueError, match="background"):
        lime_table(linear_predict, rows[0], rows[:, :3])
    with pytest.raises(ValueError, match="predict"):
        lime_table(lambda r: r, rows[0], rows)
    with pytest.raises(ValueError, match="tau"):
        anchor(lambda r: r[:, 0] > 0, rows[0], rows, tau=1.5)
