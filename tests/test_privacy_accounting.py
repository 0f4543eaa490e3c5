"""Accounting against closed forms, dp-accounting, Opacus and published figures; never below the tight value."""

import itertools
import logging
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from tmlcourse.privacy import accounting as a
from tmlcourse.privacy.accounting import Accountant
from tmlcourse.privacy.mechanisms import gaussian_delta, gaussian_eps

OPACUS_ORDERS = [1 + i / 10 for i in range(1, 100)] + list(range(12, 64))
SETTINGS = list(itertools.product([0.7, 1.0, 1.5, 4.0], [0.004, 0.01, 0.05, 1.0], [1, 100, 1000], [1e-5, 1e-6]))


def spent(sigma, q, steps):
    return Accountant().add(sigma=sigma, q=q, steps=steps)


# ---- closed forms


@pytest.mark.parametrize("sigma, q, order", [(1.0, 0.01, 2), (0.7, 0.1, 5), (4.0, 0.004, 32), (1.1, 0.9, 63), (0.3, 0.01, 8)],
                         )  # fmt: skip
def test_renyi_of_whole_orders_is_the_binomial_sum(sigma, q, order):
    k = np.arange(order + 1)
    terms = np.log(special.comb(order, k)) + (order - k) * np.log1p(-q) + k * np.log(q) + (k**2 - k) / (2 * sigma**2)
    want = special.logsumexp(terms) / (order - 1)
    assert a.rdp_gaussian(sigma, q, [order])[0] == pytest.approx(want, rel=1e-9)


def test_renyi_of_fractional_orders_is_the_integral():
    for sigma, q, order in ((1.0, 0.1, 2.5), (0.8, 0.01, 7.3), (2.0, 0.5, 1.1)):

        def f(z, sigma=sigma, q=q, order=order):
            ratio = 1 - q + q * math.exp((2 * z - 1) / (2 * sigma**2))
            return stats.norm(0, sigma).pdf(z) * ratio**order

        area = integrate.quad(f, -12 * sigma, order + 12 * sigma, points=[0, order], limit=200)[0]
        assert a.rdp_gaussian(sigma, q, [order])[0] == pytest.approx(math.log(area) / (order - 1), rel=1e-6)


def test_renyi_at_the_ends_of_the_dial():
    orders = np.array([1.5, 4.0, 30.0])
    assert a.rdp_gaussian(2.0, 1.0, orders) == pytest.approx(orders / 8)
    assert (a.rdp_gaussian(2.0, 0.0, orders) == 0).all()
    assert a.rdp_gaussian(2.0, 0.9999999, orders) == pytest.approx(orders / 8, rel=1e-4)
    grows = [a.rdp_gaussian(s, q, [4])[0] for s, q in ((4, 0.01), (2, 0.01), (2, 0.1), (1, 0.1), (1, 1))]
    assert grows == sorted(grows)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_loss_distribution_of_gaussian_steps_is_one_gaussian(sigma, steps):
    """k steps of noise sigma are one of noise sigma / sqrt(k), whose delta is known."""
    tight = gaussian_eps(sigma / math.sqrt(steps), 1e-6)
    assert tight <= spent(sigma, 1.0, steps).eps(1e-6) <= 1.0005 * tight


@pytest.mark.parametrize("sigma, q", [(0.6, 0.01), (1.0, 0.2), (4.0, 0.001)])
@pytest.mark.parametrize("eps", [0.001, 0.1, 1.0])
def test_delta_of_one_sampled_step_is_never_below_the_exact_one(sigma, q, eps):
    """P = (1 - q) N(0) + q N(1) and Q = N(0): delta is P(L > eps) - e^eps Q(L > eps), the larger of both directions."""
    deltas = []
    cut = sigma**2 * math.log((math.exp(eps) - 1 + q) / q) + 0.5
    above, above_1 = stats.norm.sf(cut / sigma), stats.norm.sf((cut - 1) / sigma)
    deltas.append((1 - q) * above + q * above_1 - math.exp(eps) * above)
    if (odds := (math.exp(-eps) - 1 + q) / q) > 0:
        cut = sigma**2 * math.log(odds) + 0.5
        below, below_1 = stats.norm.cdf(cut / sigma), stats.norm.cdf((cut - 1) / sigma)
        deltas.append(below - math.exp(eps) * ((1 - q) * below + q * below_1))
    exact = max(deltas)
    assert exact <= spent(sigma, q, 1).delta(eps) <= exact * 1.003 + 1e-12


def test_composition_of_unequal_steps():
    both = Accountant().add(sigma=1.0, steps=4).add(sigma=2.0, steps=16)
    assert both.events == ((1.0, 1.0, 4), (2.0, 1.0, 16))
    tight = gaussian_eps(1 / math.sqrt(4 + 16 / 4), 1e-5)
    assert tight <= both.eps(1e-5) <= 1.0005 * tight
    parts = Accountant().add(sigma=1.0, q=0.1, steps=30).add(sigma=1.0, q=0.1, steps=70)
    assert parts == spent(1.0, 0.1, 100)
    assert both.rdp([2.0])[0] == pytest.approx(2 * (4 / 2 + 16 / 8))


# ---- peers


@pytest.mark.parametrize("sigma, q", sorted({s[:2] for s in SETTINGS}))
def test_renyi_equals_opacus_and_dp_accounting(sigma, q):
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    privacy = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = analysis.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=OPACUS_ORDERS)
    ours = a.rdp_gaussian(sigma, q, OPACUS_ORDERS)
    assert ours == pytest.approx(theirs, rel=1e-5)
    for steps, delta in {s[2:] for s in SETTINGS}:
        eps = a.rdp_to_eps(steps * ours, OPACUS_ORDERS, delta)
        assert eps == pytest.approx(privacy.compute_epsilon(OPACUS_ORDERS, steps * ours, delta)[0], rel=1e-3, abs=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert eps == pytest.approx(
                max(analysis.get_privacy_spent(orders=OPACUS_ORDERS, rdp=steps * np.array(theirs), delta=delta)[0], 0),
                rel=1e-3, abs=1e-9)  # fmt: skip


@pytest.mark.parametrize("sigma, q, steps", sorted({s[:3] for s in SETTINGS if s[2] > 1}))
def test_loss_distribution_equals_dp_accounting(sigma, q, steps):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    interval = (
        1e-3 if q == 1 else 1e-4 if q > 0.005 or sigma < 1 else 4e-5
    )  # theirs is a bound too, loose on a coarse grid
    theirs = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=interval)
    theirs = theirs.self_compose(steps) if steps > 1 else theirs
    ours = spent(sigma, q, steps)
    for delta in (1e-5, 1e-6):
        assert ours.eps(delta) == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-3, abs=1e-7)
        assert ours.eps(delta) <= ours.eps(delta, "rdp") + 1e-12


@pytest.mark.parametrize("sigma, q, steps", [(1.5, 0.04, 2249), (1.1, 256 / 60000, 3515)])
def test_loss_distribution_lies_in_opacus_prv_interval(sigma, q, steps):
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(sigma, q, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = prv.get_epsilon(1e-5, eps_error=0.01)  # an upper end; its interval is 0.02 wide
    assert theirs - 0.02 <= spent(sigma, q, steps).eps(1e-5) <= theirs


# ---- published figures


def test_published_figures_come_out_and_name_their_conversion():
    assert spent(1.5, 0.04, 2250).eps(1e-5, "rdp") == pytest.approx(7.32911117143, abs=1e-9)  # Opacus's own test
    for sigma, q, steps, classic in ((1.3, 256 / 60000, 3515, 1.19), (1.1, 256 / 60000, 14062, 3.01),
                                     (0.7, 256 / 60000, 10546, 7.10), (0.7, 0.004, 11250, 6.86),
                                     (1.1, 0.004, 15000, 2.91), (1.3, 0.004, 3750, 1.16)):  # fmt: skip
        orders = [1 + i / 10 for i in range(1, 100)] + list(range(12, 64))
        rdp = spent(sigma, q, steps).rdp(orders)
        assert a.rdp_to_eps(rdp, orders, 1e-5, conversion="classic") == pytest.approx(classic, abs=0.0055)
    assert spent(1.1, 256 / 60000, 3515).eps(1e-5, "rdp") == pytest.approx(1.281144, abs=1e-5)
    assert spent(1.1, 256 / 60000, 3515).eps(1e-5) == pytest.approx(1.133707, rel=1e-4)
    assert spent(4.0, 0.01, 10_000).eps(1e-5, "rdp", conversion="classic") == pytest.approx(1.26, abs=0.005)
    assert a.noise_for(8.0, 1e-5, q=0.04, steps=2000, method="rdp") == pytest.approx(1.35613, rel=2e-4)


def test_small_closed_figures():
    assert a.advanced_composition(0.1, 0.0, 100, 1e-5)[0] == pytest.approx(5.85023509, abs=1e-7)
    assert a.advanced_composition(0.1, 1e-8, 3, 1e-5) == (pytest.approx(0.3), pytest.approx(3e-8))
    assert spent(1.0, 1.0, 1).eps(1e-5, "zcdp") == pytest.approx(5.2985259, abs=1e-6)
    assert a.amplify(1.0, 1e-5, 0.01) == (pytest.approx(math.log(1 + 0.01 * (math.e - 1))), pytest.approx(1e-7))
    assert a.for_groups(0.5, 0.0, 4) == (2.0, 0.0)
    assert a.for_groups(1.0, 1e-6, 3)[1] == pytest.approx(1e-6 * (math.exp(3) - 1) / (math.e - 1))


# ---- invariants


@settings(max_examples=8)
@given(st.floats(0.6, 5), st.floats(0.001, 1.0), st.integers(1, 100), st.floats(1e-7, 0.01))
def test_tight_is_below_loose_and_more_costs_more(sigma, q, steps, delta):
    account = spent(sigma, q, steps)
    tight = account.eps(delta)
    assert tight <= account.eps(delta, "rdp") + 1e-9 and tight <= account.eps(delta, "advanced") + 1e-9
    assert account.eps(delta, "rdp") <= account.eps(delta, "rdp", conversion="classic") + 1e-12
    assert tight <= account.add(sigma=sigma, q=q).eps(delta) + 1e-9
    assert tight <= spent(0.9 * sigma, q, steps).eps(delta) + 1e-9
    assert account.delta(tight) <= delta * (1 + 1e-6)


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize("eps", [0.1, 1.0, 20.0])
def test_noise_for_just_meets_its_budget(method, eps):
    sigma = a.noise_for(eps, 1e-5, q=0.05, steps=50, method=method)
    assert spent(sigma, 0.05, 50).eps(1e-5, method) <= eps
    assert spent(0.999 * sigma, 0.05, 50).eps(1e-5, method) > eps


def test_large_losses_do_not_overflow():
    tight = gaussian_eps(0.8 / math.sqrt(1000), 1e-5)
    assert tight <= spent(0.8, 1.0, 1000).eps(1e-5) <= 1.001 * tight
    assert gaussian_delta(0.1, 100.0) < 1


def test_nothing_spent_is_nothing():
    assert Accountant().eps(1e-5) == Accountant().delta(1.0) == 0
    assert spent(0.01, 0.1, 9).eps(1e-5) == math.inf and spent(0.01, 0.1, 9).delta(1.0) == 1


@pytest.mark.parametrize("call, message", [
    (lambda: Accountant().add(sigma=0), "sigma: got 0"),
    (lambda: Accountant().add(sigma=1.0, q=0.0), "q: got 0.0"),
    (lambda: Accountant().add(sigma=1.0, q=1.5), "q: got 1.5"),
    (lambda: Accountant().add(sigma=1.0, steps=0), "steps: got 0"),
    (lambda: spent(1.0, 0.1, 9).eps(0.0), "delta: got 0.0"),
    (lambda: spent(1.0, 0.1, 9).eps(1.0), "delta: got 1.0"),
    (lambda: spent(1.0, 0.1, 9).eps(1e-5, "gdp"), "method: got 'gdp'"),
    (lambda: spent(1.0, 0.1, 9).eps(1e-5, "rdp", conversion="new"), "conversion: got 'new'"),
    (lambda: spent(1.0, 0.1, 9).eps(1e-5, "zcdp"), "method: got 'zcdp' with q < 1"),
    (lambda: spent(1.0, 0.1, 9).eps(1e-15), "delta: got 1e-15, want more than"),
    (lambda: spent(1.0, 0.1, 9).delta(-1.0), "eps: got -1.0"),
    (lambda: a.noise_for(0, 1e-5), "eps: got 0"),
    (lambda: a.rdp_gaussian(1.0, 0.1, [1.0]), "orders: got"),
    (lambda: a.advanced_composition(1.0, 0.0, 3, 0.0), "slack: got 0.0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
