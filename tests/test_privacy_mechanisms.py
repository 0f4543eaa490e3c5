"""Mechanisms: their noise against its law, their ratios against e^eps, and the gaps that floating point would leave."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tmlcourse.privacy import mechanisms as m

SEEDS = [None, 0]


# ---- randomised response


def test_two_fair_coins_are_the_lecture():
    assert m.response_eps() == pytest.approx(math.log(3), abs=1e-12)
    for truth, share in ((True, 3 / 4), (False, 1 / 4)):
        reports = m.randomized_response(torch.full((40_000,), truth), seed=1)
        assert stats.binomtest(int(reports.sum()), 40_000, share).pvalue > 0.001
    found = m.estimate(torch.arange(1000) < 300)
    assert found.value == pytest.approx(2 * 0.3 - 0.5) and found.variance == pytest.approx(4 * 0.3 * 0.7 / 1000)


@pytest.mark.parametrize("n, share, variance", [(1000, 0.1, 8.40e-4), (10_000, 0.2, 9.10e-5)])
def test_the_estimator_is_unbiased_with_the_stated_variance(n, share, variance):
    people = torch.arange(n) < share * n
    answers = people.expand(400, n)
    reports = m.randomized_response(answers, seed=0)
    values = np.array([m.estimate(row).value for row in reports])
    coins = 3 / (4 * n)  # the people are fixed here, so only the coins vary
    assert abs(values.mean() - share) < 4 * math.sqrt(coins / 400)
    assert stats.chi2.cdf(399 * values.var(ddof=1) / coins, 399) == pytest.approx(0.5, abs=0.499)
    assert coins + share * (1 - share) / n == pytest.approx(variance, rel=1e-3)
    inside = [e.low <= share <= e.high for e in map(m.estimate, reports)]
    assert np.mean(inside) > 0.93


@given(st.floats(0, 0.999), st.floats(0.01, 0.99))
def test_eps_of_a_response_is_the_worst_of_its_four_ratios(truth, yes):
    of_yes = np.array([truth + (1 - truth) * yes, (1 - truth) * yes])
    ratios = [of_yes[0] / of_yes[1], (1 - of_yes[1]) / (1 - of_yes[0])]
    assert m.response_eps(truth, yes) == pytest.approx(math.log(max(*ratios, *(1 / r for r in ratios))), abs=1e-9)


def test_extremes_of_the_dial():
    answers = torch.tensor([True, False, True])
    assert torch.equal(m.randomized_response(answers, truth=1), answers) and m.response_eps(1) == math.inf
    assert m.response_eps(0) == 0
    same = m.randomized_response(torch.ones(3, dtype=torch.bool), truth=0, seed=5)
    assert torch.equal(same, m.randomized_response(torch.zeros(3, dtype=torch.bool), truth=0, seed=5))


# ---- noise


@pytest.mark.parametrize("sensitivity, eps", [(1.0, 1.0), (0.3, 2.5), (7.0, 0.1)])
def test_laplace_noise_has_its_law(sensitivity, eps):
    noise = np.array([m.laplace(5.0, sensitivity=sensitivity, eps=eps, seed=s).item() - 5 for s in range(3000)])
    assert stats.kstest(noise, stats.laplace(scale=sensitivity / eps).cdf).pvalue > 0.01
    many = m.laplace(torch.zeros(20_000), sensitivity=sensitivity, eps=eps, seed=1).numpy()
    wide = sensitivity * (1 + 20_000 * 2.0**-24) / eps  # the room that rounding takes; the grid's step is at most that
    assert stats.kstest(many, stats.laplace(scale=wide).cdf).pvalue > 0.01


@pytest.mark.parametrize("method, sigma", [("classical", 4.8448053), ("analytic", 3.7306316)])
def test_gaussian_noise_has_its_law(method, sigma):
    assert m.gaussian_sigma(eps=1, delta=1e-5, method=method) == pytest.approx(sigma, abs=1e-6)
    value = torch.full((20_000,), 3.0, dtype=torch.float64)
    noise = m.gaussian(value, sensitivity=2.0, eps=1.0, delta=1e-5, method=method, seed=0) - 3
    assert stats.kstest(noise.numpy(), stats.norm(scale=2 * sigma).cdf).pvalue > 0.01


def test_gaussian_delta_is_the_integral_over_the_likelihood_ratio():
    assert m.gaussian_eps(1.0, 1e-5) == pytest.approx(4.3771781, abs=1e-6)
    for sigma, eps in ((1.0, 0.5), (2.0, 1.0), (0.5, 3.0)):
        t = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001)
        p, q = stats.norm(1, sigma).pdf(t), stats.norm(0, sigma).pdf(t)
        area = np.trapezoid(np.maximum(p - math.exp(eps) * q, 0), t)
        assert m.gaussian_delta(sigma, eps) == pytest.approx(area, rel=1e-5)


@given(st.floats(0.01, 30), st.floats(1e-9, 0.5))
def test_analytic_noise_just_suffices(eps, delta):
    sigma = m.gaussian_sigma(eps=eps, delta=delta)
    assert m.gaussian_delta(sigma, eps) <= delta * (1 + 1e-12)
    assert m.gaussian_delta(0.999 * sigma, eps) > delta
    if eps <= 1 and delta < 0.05:
        assert sigma < m.gaussian_sigma(eps=eps, delta=delta, method="classical")


def test_naive_noise_gives_the_value_away_and_ours_does_not():
    """Mironov's attack: near 0 the answers from a true 1 are coarse multiples, those from a true 0 are not."""
    gen = torch.Generator().manual_seed(0)
    coarse = {}
    for value in (0.0, 1.0):
        u = torch.rand(50_000, generator=gen) - 0.5
        naive = torch.tensor(value) - u.sign() * torch.log1p(-2 * u.abs())
        near = naive[naive.abs() < 0.25].double() * 2**24
        ours = m.laplace(torch.full((50_000,), value), sensitivity=1.0, eps=1.0, seed=1)
        near_ours = m.laplace(torch.full((50_000,), value).double(), sensitivity=1.0, eps=1.0, seed=1) * 2**24
        coarse[value] = (near == near.round()).double().mean(), bool((near_ours == near_ours.round()).all())
        assert ours.dtype == torch.float32
    assert coarse[1.0][0] == 1 and coarse[0.0][0] < 0.2, "the naive mechanism is broken"
    assert coarse[0.0][1] and coarse[1.0][1], "ours answers on the same grid for both"


def test_rounding_to_the_grid_is_paid_for():
    """Two values whose true distance is the sensitivity may round to one step more: the noise is wider by that."""
    step = 2.0**-24
    a, b = 0.5 * step, 1 + 0.5 * step + 1e-12
    zero = [m._on_grid(v, 1.0)[0] for v in (a, b)]
    assert abs(float(zero[1] - zero[0])) <= 1 + step
    narrow = m.laplace(torch.zeros(1 << 16), sensitivity=1.0, eps=1.0, seed=0).abs().mean()
    single = 1 + (1 << 16) * step
    assert float(narrow) == pytest.approx(single, rel=0.02)


# ---- choosing


@pytest.mark.parametrize("choose", [m.exponential, m.report_noisy_max])
def test_choices_keep_their_ratio(choose):
    """Frequencies of each index on neighbouring scores, each within e^eps of the other, and not far from it somewhere."""
    eps, n = 1.0, 60_000
    a = torch.tensor([1.0, 0.0, 0.0]).expand(n, 3)
    b = torch.tensor([0.0, 1.0, 1.0]).expand(n, 3)  # every score moved by the sensitivity
    p, q = (torch.bincount(choose(s, sensitivity=1.0, eps=eps, seed=i), minlength=3) / n for i, s in enumerate((a, b)))
    ratio = (p / q).log().abs()
    assert ratio.max() < eps + 0.05 and ratio.max() > 0.45 * eps


def test_exponential_has_its_probabilities():
    scores = torch.tensor([0.0, 1.0, 3.0, -2.0])
    drawn = m.exponential(scores.expand(50_000, 4), sensitivity=2.0, eps=1.5, seed=0)
    want = torch.softmax(1.5 * scores / 4, 0).double().numpy()
    assert stats.chisquare(np.bincount(drawn, minlength=4), 50_000 * want / want.sum()).pvalue > 0.001


def test_noisy_max_has_its_probability():
    """Two options at distance d: the difference of two Laplace variables of scale b exceeds -d."""
    b, d, n = 2.0, 1.5, 50_000
    right = int((m.report_noisy_max(torch.tensor([d, 0.0]).expand(n, 2), sensitivity=1.0, eps=1.0, seed=0) == 0).sum())
    want = 1 - 0.5 * math.exp(-d / b) * (1 + d / (2 * b))
    assert stats.binomtest(right, n, want).pvalue > 0.001


# ---- tables and averages


def test_histograms_and_means_cover_the_truth():
    labels, values = torch.arange(100) % 4, torch.linspace(-1, 2, 50)
    inside = []
    for seed in range(400):
        table = m.histogram(labels, 4, eps=0.5, confidence=0.9, seed=seed)
        inside.append(bool((table.low[0] <= 25) & (table.high[0] >= 25)))
        average = m.mean(values, low=0.0, high=1.0, eps=1.0, confidence=0.9, seed=seed)
        inside.append(average.low <= float(values.clamp(0, 1).mean()) <= average.high)
    assert stats.binomtest(sum(inside), len(inside), 0.9).pvalue > 0.001
    assert average.variance == pytest.approx(2 / 50**2)


# ---- what all keep

CALLS = {
    "laplace": lambda **k: m.laplace(torch.ones(3), **{"sensitivity": 1.0, "eps": 1.0, **k}),
    "gaussian": lambda **k: m.gaussian(torch.ones(3), **{"sensitivity": 1.0, "eps": 1.0, "delta": 0.1, **k}),
    "exponential": lambda **k: m.exponential(torch.ones(3), **{"sensitivity": 1.0, "eps": 1.0, **k}),
    "noisy_max": lambda **k: m.report_noisy_max(torch.ones(3), **{"sensitivity": 1.0, "eps": 1.0, **k}),
    "response": lambda **k: m.randomized_response(torch.ones(99, dtype=torch.bool), **k),
    "histogram": lambda **k: m.histogram(torch.zeros(3, dtype=torch.int64), 2, **{"eps": 1.0, **k}).value,
    "mean": lambda **k: m.mean(torch.ones(3), **{"low": 0.0, "high": 1.0, "eps": 1.0, **k}).value,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_repeats_the_draw_and_leaves_the_global_generator(name):
    state = torch.get_rng_state()
    first, second = (torch.as_tensor(CALLS[name](seed=3)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"response", "histogram", "mean"}))
def test_sensitivity_is_never_a_default(name):
    function = {"noisy_max": m.report_noisy_max}.get(name) or getattr(m, name)
    with pytest.raises(TypeError, match="sensitivity"):
        function(torch.ones(3), eps=1.0, **({"delta": 0.1} if name == "gaussian" else {}))


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"response"}))
@pytest.mark.parametrize("eps", [0, -1.0, math.nan, math.inf])
def test_eps_must_be_positive(name, eps):
    with pytest.raises(ValueError, match="eps: got"):
        CALLS[name](eps=eps)


@pytest.mark.parametrize("call, message", [
    (lambda: CALLS["gaussian"](delta=0), r"delta: got 0, want a number in \(0, 1\)"),
    (lambda: CALLS["gaussian"](delta=1.0), "delta: got 1.0"),
    (lambda: CALLS["gaussian"](eps=1.5, method="classical"), "eps: got 1.5, want at most 1"),
    (lambda: CALLS["gaussian"](method="exact"), "method: got 'exact'"),
    (lambda: CALLS["laplace"](sensitivity=0), "sensitivity: got 0"),
    (lambda: m.laplace(math.nan, sensitivity=1, eps=1), "value: got NaN"),
    (lambda: m.laplace(1e12, sensitivity=1, eps=1), "value: got more than"),
    (lambda: m.randomized_response(torch.ones(3)), "answers: got torch.float32"),
    (lambda: CALLS["response"](truth=1.2), "truth: got 1.2"),
    (lambda: m.estimate(torch.ones(3, dtype=torch.bool), truth=0), "truth: got 0"),
    (lambda: m.mean(torch.ones(3), low=1.0, high=1.0, eps=1), "low, high: got"),
    (lambda: m.histogram(torch.tensor([4]), 3, eps=1), "labels: got labels outside"),
    (lambda: m.exponential(torch.tensor([math.inf]), sensitivity=1, eps=1), "scores: got NaN"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
