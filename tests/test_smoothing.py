"""Randomised smoothing against the closed form of a linear model, simulated coverage, and the paper's formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.certify import Smoothed, certified_accuracy, predict_smoothed, smooth
from tmlcourse.intervals import clopper_pearson


def halfspaces(seed=0, d=16):
    """A linear model of two classes; its smoothed version is itself, with radius |w . x + b| / ||w|| in every direction."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, 2)).double().eval()


@torch.no_grad()
def distance(model, x):
    """Signed Euclidean distance to the boundary, positive on the side of class 1."""
    w, b = model[1].weight[1] - model[1].weight[0], model[1].bias[1] - model[1].bias[0]
    return (x.flatten(1) @ w + b) / w.norm(), w / w.norm()


def images(n, seed=0, d=16):
    return torch.rand(n, 1, 1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms ------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_a_linear_model_has_its_distance_as_radius(seed, sigma):
    """p_A = Phi(distance / sigma), so sigma Phi^-1(p_A) is the distance itself: approached from below as n grows."""
    model, x = halfspaces(seed), images(20, seed)
    signed, _ = distance(model, x)
    found = smooth(model, x, sigma, n=4000, alpha=1e-6, seed=seed)
    sure = found.label >= 0
    assert (found.label[sure] == (signed > 0).long()[sure]).all()
    assert (found.radius <= signed.abs() + 1e-12).all()
    inner = signed.abs() < 2 * sigma  # where 4,000 copies can tell the distance
    assert (found.radius[inner] >= signed.abs()[inner] - 0.35 * sigma).all()
    assert (found.radius[~sure] == 0).all() and (found.lower[~sure] <= 0.5).all()
    assert torch.allclose(found.radius[sure], sigma * torch.from_numpy(norm.ppf(found.lower[sure].numpy())))


def test_no_move_within_the_radius_changes_the_smoothed_class_and_one_beyond_does():
    model, x = halfspaces(3), images(40, 3)
    signed, towards = distance(model, x)
    found = smooth(model, x, 0.3, n=2000, seed=0)
    sure = (found.label >= 0).nonzero().flatten()
    assert len(sure) > 20
    step = -signed.sign()[sure, None] * towards  # straight to the boundary: the worst direction
    for share, same in ((0.999, True), (1.5, False)):
        length = (share * found.radius if same else signed.abs() * share)[sure, None]
        moved = (x[sure].flatten(1) + length * step).reshape(-1, *x.shape[1:])
        assert (((distance(model, moved)[0] > 0).long() == found.label[sure]) == same).all()


def test_a_band_whose_smoothed_class_differs_from_the_model():
    """h says 1 on a thin band through x only: the vote of the noise is 0, with p = 1 - P(|N(0, sigma)| < width)."""

    class Band(nn.Module):
        def forward(self, x):
            inside = (x.flatten(1)[:, 0] - 0.5).abs() < 0.05
            return torch.stack([~inside, inside], 1).to(x.dtype)

    x = torch.full((1, 1, 1, 4), 0.5)
    assert Band()(x).argmax(1).item() == 1
    found = smooth(Band(), x, 0.2, n=20_000, seed=0)
    truth = 2 * norm.cdf(-0.05 / 0.2)
    assert found.label.item() == 0 and found.lower.item() == pytest.approx(truth, abs=0.02)
    assert found.lower.item() < truth and predict_smoothed(Band(), x, 0.2, n=1000, seed=0).item() == 0


def lowest(k, n, alpha):
    """The one-sided bound that `smooth` uses."""
    return clopper_pearson(k, n, 1 - 2 * alpha)[0]


def test_published_values_of_the_bound_and_the_radius():
    """Cohen, Rosenfeld & Kolter 2019: all n copies equal give sigma Phi^-1(alpha^(1/n)); 990 of 1,000 at .5 give .989."""
    for n, expected in ((100, 1.5004752), (1000, 2.4632626), (10**5, 3.8114566)):
        assert lowest(n, n, 0.001) == pytest.approx(0.001 ** (1 / n), abs=1e-12)
        assert norm.ppf(lowest(n, n, 0.001)) == pytest.approx(expected, abs=1e-6)
    lower = lowest(990, 1000, 0.001)
    assert lower == pytest.approx(0.97603619, abs=1e-8) and 0.5 * norm.ppf(lower) == pytest.approx(0.98900479, abs=1e-7)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    constant[1].weight.data.zero_(), constant[1].bias.data.copy_(torch.tensor([0.0, 1, 0]))
    found = smooth(constant, images(2), 0.25, n=1000, seed=0)
    assert found.label.tolist() == [1, 1] and found.radius.tolist() == pytest.approx([0.25 * 2.4632626] * 2, abs=1e-6)


# --- the estimate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, n, alpha", [(0, 10, 0.05), (1, 10, 0.05), (7, 10, 0.01), (990, 1000, 0.001), (10, 10, 0.2)]
)
def test_clopper_pearson_equals_scipys(k, n, alpha):
    theirs = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert lowest(k, n, alpha) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("k, n", [(0, 1), (0, 7), (3, 10), (10, 10), (412, 5000)])
def test_both_ends_equal_scipys(k, n):
    theirs = binomtest(k, n).proportion_ci(0.9, method="exact")
    assert clopper_pearson(k, n, 0.9) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    low, high = clopper_pearson([k, 0], [n, n], 0.9)
    assert (low[0], high[0]) == clopper_pearson(k, n, 0.9) and low[1] == 0


@pytest.mark.parametrize("k, n", [(-1, 3), (4, 3), (0, 0)])
def test_counts_out_of_range(k, n):
    with pytest.raises(ValueError, match="k, n: got counts out of range"):
        clopper_pearson(k, n)


def test_the_bound_covers_as_promised_for_every_probability():
    """P(lower > p) summed over the binomial distribution exactly: at most alpha, and not far below it on average."""
    n, alpha = 60, 0.05
    lower, wrong = lowest(np.arange(n + 1), n, alpha), []
    for p in np.linspace(0.02, 0.98, 97):
        wrong.append(binom.pmf(np.arange(n + 1), n, p)[lower > p].sum())
    assert max(wrong) <= alpha + 1e-12 and np.mean(wrong) > 0.5 * alpha


def test_the_class_is_chosen_on_other_copies_than_it_is_counted_on():
    """Five sectors of equal probability: of copies that also chose the class, it would seem too frequent far too often."""

    class Sectors(nn.Module):
        def forward(self, x):
            a, b = x.flatten(1).sub(0.5).unbind(1)
            return nn.functional.one_hot(((torch.atan2(b, a) / torch.pi + 1) * 2.5).long().clamp_max(4), 5).to(x.dtype)

    x = torch.full((2000, 2), 0.5, dtype=torch.float64)
    found = smooth(Sectors(), x, 0.5, n0=60, n=60, alpha=0.1, seed=0)
    assert 0.03 < (found.lower > 0.2).double().mean().item() <= 0.1
    assert (found.label == -1).all()


def test_abstains_on_a_tie_and_predict_is_seldom_wrong():
    model = halfspaces(1)
    x = images(300, 1)
    signed, towards = distance(model, x)
    tied = (x.flatten(1) - signed[:, None] * towards).reshape(x.shape).clamp(0, 1)
    tied = tied[(distance(model, tied)[0].abs() < 1e-9)]
    assert len(tied) > 50
    for answer in (
        smooth(model, tied, 0.3, n0=20, n=100, alpha=0.05, seed=0).label,
        predict_smoothed(model, tied, 0.3, n=100, alpha=0.05, seed=0),
    ):
        assert (answer >= 0).double().mean().item() < 0.12
    sure = x[signed.abs() > 0.3]
    answer = predict_smoothed(model, sure, 0.3, n=200, alpha=0.001, seed=0)
    assert (answer == (signed > 0).long()[signed.abs() > 0.3]).all()


@pytest.mark.parametrize("first, alpha", [(9, 0.001), (9, 0.005), (8, 0.03), (8, 0.05), (5, 0.9), (6, 0.3)])
def test_predict_is_the_two_sided_binomial_test(first, alpha):
    class Votes(nn.Module):
        def forward(self, x):
            return torch.eye(3)[[1] * first + [2] * (9 - first)]

    answer = predict_smoothed(Votes(), torch.rand(1, 4), 0.1, n=9, alpha=alpha, batch_size=9).item()
    assert answer == (1 if binomtest(first, 9, 0.5).pvalue <= alpha else -1)


def test_certified_accuracy_counts():
    smoothed = Smoothed(torch.tensor([0, 1, -1, 2]), torch.tensor([0.5, 0.2, 0.0, 0.9]).double(), torch.zeros(4))
    table = certified_accuracy(smoothed, torch.tensor([0, 1, 1, 0]), [0, 0.2, 0.3, 0.6])
    assert table.certified_accuracy.tolist() == [0.5, 0.5, 0.25, 0.0] and table.radius.tolist() == [0, 0.2, 0.3, 0.6]


def test_digits_and_what_a_call_leaves_behind():
    test = data.load("digits-28x28", n=6)
    model = pretrained.load("digits-28x28-standard")
    state, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    runs = [smooth(model, test.x, 0.5, n0=30, n=120, seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), seed) and not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(runs[0].lower, runs[1].lower) and not torch.equal(runs[0].lower, runs[2].lower)
    assert (runs[0].label == test.y).sum() >= 3 and runs[0].label.dtype == torch.int64
    table = certified_accuracy(runs[0], test.y, [0.0, 0.2, 0.5, 2.0])
    assert table.certified_accuracy.is_monotonic_decreasing and table.certified_accuracy.iloc[-1] == 0
    odd = smooth(
        model, test.x, 0.5, n0=7, n=53, batch_size=10, seed=0
    )  # batches that cut through images count all copies
    assert (odd.lower <= lowest(53, 53, 0.001) + 1e-12).all() and (odd.label == runs[0].label).sum() >= 3


@pytest.mark.parametrize("change, error, message", [
    ({"sigma": 0}, ValueError, "sigma: got 0"),
    ({"sigma": -1.0}, ValueError, "sigma: got -1"),
    ({"sigma": float("nan")}, ValueError, "sigma: got nan"),
    ({"alpha": 0.0}, ValueError, "alpha: got 0"),
    ({"alpha": 1.5}, ValueError, "alpha: got 1.5"),
    ({"n": 0}, ValueError, "n: got 0"),
    ({"n0": 0}, ValueError, "n0: got 0"),
    ({"n0": 2.5}, TypeError, "n0: got 2.5"),
    ({"batch_size": 0}, ValueError, "batch_size: got 0"),
    ({"x": images(2) * 255}, ValueError, "divide by 255"),
    ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout()).double()}, ValueError, "train mode"),
    ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double().eval()}, ValueError, "K >= 2"),
])  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"model": halfspaces(), "x": images(2), "sigma": 0.25, "n": 10} | change
    with pytest.raises(error, match=message):
        smooth(**arguments)
    if "n0" not in change:
        with pytest.raises(error, match=message):
            predict_smoothed(**arguments)
    broken = models.mlp((1, 4, 4), hidden=(3,), seed=0).double()
    broken[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        smooth(broken, images(1).reshape(1, 1, 4, 4), 0.1, n=5)


def test_radii_and_labels_are_checked():
    smoothed = Smoothed(torch.tensor([0, 1]), torch.zeros(2).double(), torch.zeros(2))
    with pytest.raises(ValueError, match="radii: got -1"):
        certified_accuracy(smoothed, torch.tensor([0, 1]), [-1])
    with pytest.raises(ValueError, match="y: got shape"):
        certified_accuracy(smoothed, torch.tensor([0]), [0])
