"""The exact theory of robust learning: against other exact laws, against simulation, and against published figures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import ncx2

from tmlcourse import linear
from tmlcourse.threat import Linf
from tmlcourse.training import theory
from tmlcourse.training.theory import learned_risk, samples_needed, simulate, zero_sum


@pytest.mark.parametrize("n, d, sigma", [(2, 10, 1.5), (4, 50, 3.0), (30, 100, 6.0), (1.7, 20, 2.0)])
def test_without_an_attacker_the_error_is_a_doubly_noncentral_law(n, d, sigma):
    """<w, x> < 0 exactly when ||a + b|| < ||a - b||, two independent noncentral chi variables. Another route, same number."""
    both, apart = ((math.sqrt(n) + s) ** 2 * d / (2 * sigma**2) for s in (1, -1))
    low, high = ncx2.ppf([1e-14, 1 - 1e-14], d, apart)
    exact = quad(lambda u: ncx2.cdf(u, d, both) * ncx2.pdf(u, d, apart), low, high, epsabs=1e-13, limit=200)[0]
    assert learned_risk(n, d, sigma) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize(
    "n, d, sigma, eps", [(1, 100, 2.0, 0.25), (3, 1, 1.0, 0.2), (8, 30, 4.0, 0.6), (2, 400, 5.0, 0.1)]
)
def test_the_exact_error_lies_in_the_interval_of_the_simulation(n, d, sigma, eps):
    assert learned_risk(n, d, sigma, eps) in simulate(n, d, sigma, eps, trials=8000, seed=0)


def test_simulation_is_reproducible_and_an_error_of_a_tenth_would_be_seen():
    found = simulate(2, 50, 3.0, 0.3, trials=20_000, seed=1)
    assert found == simulate(2, 50, 3.0, 0.3, trials=20_000, seed=1)
    exact = learned_risk(2, 50, 3.0, 0.3)
    assert exact in found and 1.1 * exact not in found and 0.9 * exact not in found


def test_the_mean_of_exact_errors_of_learned_weights_is_the_exact_mean():
    d, sigma, eps, n = 60, 3.0, 0.3, 4
    w = 1 + sigma / math.sqrt(n) * torch.randn(4000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    risks = linear.gaussian_risk(w, torch.ones(d), sigma, Linf(eps, box=None))
    error = risks.std() / math.sqrt(len(risks))
    assert abs(risks.mean() - learned_risk(n, d, sigma, eps)) < 3.5 * error


@pytest.mark.parametrize("d", [100, 400, 1600])
def test_published_setting_one_example_is_enough_to_be_right_but_not_to_be_robust(d):
    """sigma = d^(1/4) / 2, eps = 1/4: means of 200 draws in the course's table of published figures, section 2.17."""
    known = {100: (0.0011, 0.027, 1.9e-4), 400: (0.0003, 0.040, 2.5e-5), 1600: (0.0001, 0.102, 1.9e-5)}[d]
    sigma = d**0.25 / 2
    found = learned_risk(1, d, sigma), learned_risk(1, d, sigma, 0.25), learned_risk(4, d, sigma, 0.25)
    np.testing.assert_allclose(found, known, rtol=0.25)


@given(st.floats(0.3, 200), st.integers(1, 300), st.floats(0.3, 10), st.floats(0, 1.5))
def test_risk_is_a_probability_that_grows_with_eps_and_falls_with_data(n, d, sigma, eps):
    risk = learned_risk(n, d, sigma, eps)
    assert 0 <= risk <= 1
    assert risk <= learned_risk(n, d, sigma, eps + 0.1) + 1e-4
    if eps < 1:
        assert learned_risk(4 * n, d, sigma, 0.0) <= learned_risk(n, d, sigma, 0.0) + 1e-4


def test_limits():
    assert learned_risk(math.inf, 100, 5.0, 0.25) == pytest.approx(ndtr(-0.75 * 10 / 5))
    assert learned_risk(1e9, 100, 5.0, 0.25) == pytest.approx(ndtr(-0.75 * 10 / 5), abs=1e-6)
    assert learned_risk(5, 1, 2.0, 0.0) == pytest.approx(ndtr(-0.5) * ndtr(math.sqrt(5) / 2)
                                                      + ndtr(0.5) * ndtr(-math.sqrt(5) / 2), abs=1e-4)  # fmt: skip


def test_samples_needed_is_the_first_n_that_suffices():
    for eps in (0.0, 0.25):
        n = samples_needed(1600, 1600**0.25, eps, 0.01)
        assert learned_risk(n, 1600, 1600**0.25, eps) <= 0.01
        assert n == 1 or learned_risk(n - 1, 1600, 1600**0.25, eps) > 0.01
    standard = [samples_needed(4**k, 4 ** (k / 4), 0.0) for k in (6, 8, 10)]
    robust = [samples_needed(4**k, 4 ** (k / 4), 0.5) for k in (6, 8, 10)]
    assert max(standard) - min(standard) <= 1
    assert robust[0] < robust[1] < robust[2] and robust[2] > 3 * robust[0]  # while sqrt(d) grows by 4
    with pytest.raises(ValueError, match="risk: got 0.01, want more than"):
        samples_needed(16, 2.0, 0.9)


def test_two_feature_samples_have_the_closed_forms_errors():
    p, d = 0.95, 100
    eta = 3 / math.sqrt(d)
    x, y = theory.strong_and_weak(20_000, d, p, eta, seed=0)
    for w in (torch.tensor([1.0] + [0.0] * d), torch.tensor([0.0] + [1.0] * d), torch.tensor([2.0] + [0.3] * d)):
        for eps in (0.0, eta, 2 * eta):
            exact = float(linear.two_feature_risk(w, p, eta, Linf(eps, box=None)))
            assert exact in theory.estimate(theory.falls(w, x, y, eps))


def test_gaussian_samples_have_the_closed_forms_errors():
    x, y = theory.gaussians(20_000, 100, 5.0, seed=0)
    w = torch.ones(100)
    for eps in (0.0, 0.25):
        exact = float(linear.gaussian_risk(w, torch.ones(100), 5.0, Linf(eps, box=None)))
        assert exact in theory.estimate(theory.falls(w, x, y, eps))
    assert theory.averaged(x, y).sub(1).abs().max() < 5 * 5 / math.sqrt(20_000)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_two_by_two_games_have_the_textbook_value(entries):
    a, b, c, d = entries
    value, p, q = zero_sum([[a, b], [c, d]])
    saddle = max(min(a, b), min(c, d))
    if saddle == min(max(a, c), max(b, d)):
        assert value == pytest.approx(saddle, abs=1e-7)
    else:
        assert value == pytest.approx((a * d - b * c) / (a + d - b - c), abs=1e-6)
    A = np.array([[a, b], [c, d]])
    assert (p @ A).min() == pytest.approx(value, abs=1e-6) and (A @ q).max() == pytest.approx(value, abs=1e-6)
    assert p.sum() == pytest.approx(1) and q.sum() == pytest.approx(1) and min(p.min(), q.min()) >= -1e-12


def test_bad_input():
    for call, error, message in [
        (lambda: learned_risk(0, 10, 1.0), ValueError, "n, sigma: got 0"),
        (lambda: learned_risk(1, 0, 1.0), ValueError, "d: got 0"),
        (lambda: learned_risk(1, 10, 1.0, -0.1), ValueError, "eps: got -0.1"),
        (lambda: theory.gaussians(0, 3, 1.0), ValueError, "n: got 0"),
        (lambda: theory.strong_and_weak(2, 3, 0.2, 1.0), ValueError, "p: got 0.2"),
        (lambda: theory.estimate(torch.ones(3)), TypeError, "hits: got torch.float32"),
        (lambda: zero_sum([[1, float("nan")]]), ValueError, "payoff"),
        (lambda: samples_needed(10, 1.0, 0.0, 0.7), ValueError, "risk: got 0.7"),
    ]:
        with pytest.raises(error, match=message):
            call()
