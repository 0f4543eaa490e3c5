"""The audit: below what is true for a sound mechanism, above what is claimed for each broken one, twenty times of twenty."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tmlcourse import models
from tmlcourse.data import Dataset
from tmlcourse.privacy import (
    Accountant,
    advantage_bound,
    audit,
    clipped_gradient,
    clopper_pearson,
    dp_sgd,
    gaussian,
    laplace,
    lower_bound,
)

NOISE, STEPS, DELTA = 4.0, 4, 1e-5
CLAIMED = Accountant().add(sigma=NOISE, steps=STEPS).eps(DELTA)


def gradients(canary):
    """Gradients of eight records, and one more whose direction is its own and whose norm is far above the clip."""
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, -1] = 0
    extra = torch.tensor([[0, 0, 0, 0, 0, 25.0]], dtype=torch.float64)
    return torch.cat([rows, extra]) if canary else rows


def release(rows, seed, *, clip=True, noise=NOISE, reuse=False):
    """What an attacker sees of four noisy sums: its best guess about the canary."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1) if clip else rows
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1 if reuse else STEPS, 6, generator=generator, dtype=torch.float64).expand(STEPS, 6)
    if reuse:  # the same noise again: a sum with known records only gives it away
        return float(rows.sum(0)[-1] + noise * (z[0, -1] - z[1, -1]))
    return float((rows.sum(0) + noise * z)[:, -1].mean())


BROKEN = {
    "no clipping": {"clip": False},
    "wrong sensitivity": {"noise": NOISE / 9},  # the sum divided by the number of records, and the clip divided again
    "reused noise": {"reuse": True},
}


def run(seed, **how):
    mechanism = lambda rows, s: release(rows, s, **how)  # noqa: E731
    return audit(
        mechanism, gradients(True), gradients(False), delta=DELTA, trials=600, confidence=0.999, seed=10**6 * seed
    )


def test_a_sound_mechanism_is_never_refuted():
    found = [run(seed) for seed in range(20)]
    assert sum(a.eps <= CLAIMED for a in found) == 20 and not any(a.breaks(CLAIMED) for a in found)


@pytest.mark.parametrize("how", BROKEN)
def test_each_broken_mechanism_is_caught(how):
    assert sum(run(seed, **BROKEN[how]).breaks(CLAIMED) for seed in range(20)) == 20


@pytest.mark.parametrize("eps", [0.5, 1.5])
def test_the_bound_is_below_eps_and_near_it_where_the_mechanism_is_tight(eps):
    """Half the line is an event on which the Laplace mechanism loses all of its eps."""
    found = [
        audit(lambda d, s: laplace(d, sensitivity=1.0, eps=eps, seed=s), 1.0, 0.0, trials=4000, seed=9**7 * i)
        for i in range(2)
    ]  # noqa: E501
    assert all(0.6 * eps < a.eps < eps for a in found)


def test_coverage_is_at_least_what_is_promised():
    """Randomised response, whose eps is known: of 300 bounds at confidence 0.9, few exceed it."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        wrong += lower_bound(rng.random(200) < 0.75, rng.random(200) < 0.25, confidence=0.9).eps > math.log(3)
    assert stats.binomtest(wrong, 300, 0.1, alternative="greater").pvalue > 0.01


def test_direction_does_not_matter_and_delta_is_used():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
    assert lower_bound(a, b).eps > 0.5 and lower_bound(-a, -b).eps > 0.5
    assert lower_bound(a, b, delta=0.2).eps < lower_bound(a, b).eps
    assert lower_bound(b, rng.normal(0, 1, 2000)).eps < 0.1
    rates = lower_bound(a, b)
    assert rates.tpr - rates.fpr <= advantage_bound(9.0) and 0 <= rates.fpr <= rates.tpr <= 1


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_the_bound_is_its_formula(delta):
    """Ninety per cent hits and ten per cent alarms in both halves."""
    present, absent = (np.repeat(np.arange(50) < hits, 2) for hits in (45, 5))
    (low, _), (_, high) = clopper_pearson(45, 50, 0.95), clopper_pearson(5, 50, 0.95)
    found = lower_bound(present, absent, delta=delta)
    assert found.eps == pytest.approx(math.log((low - delta) / high))
    assert (found.tpr, found.fpr) == (pytest.approx(0.9), pytest.approx(0.1))


def test_threshold_and_rates_come_from_different_runs():
    """Scores that separate perfectly on the even runs alone prove nothing."""
    even = np.arange(200) % 2 == 0
    noise = np.random.default_rng(1).normal(size=(2, 200))
    assert lower_bound(np.where(even, 5 + noise[0], noise[0]), np.where(even, -5, noise[1])).eps < 0.5


def canary_scores(trials, noise):
    """The weight that only the canary's one white pixel moves, after a private training with it and one without it."""
    torch.manual_seed(0)
    x = torch.rand(12, 1, 3, 3)
    x[:, 0, 0, 0] = 0
    white = torch.zeros(1, 1, 3, 3)
    white[0, 0, 0, 0] = 1
    y = torch.arange(12) % 2
    scores = []
    for present in (True, False):
        records = Dataset(
            torch.cat([x, white]) if present else x, torch.cat([y, y[:1]]) if present else y, ("0", "1"), "toy"
        )
        out = []
        for seed in range(trials):
            model = models.linear((1, 3, 3), 2, seed=0)
            dp_sgd(model, records, noise=noise, clip=0.3, delta=DELTA, batch_size=12, epochs=2, lr=1.0,
                   seed=seed + trials * present)  # fmt: skip
            out.append(float(model[1].weight[:, 0].diff().detach()))
        scores.append(out)
    return scores


def test_dp_sgd_itself_passes_and_fails_when_its_noise_is_for_a_smaller_clip():
    claimed = Accountant().add(sigma=1.0, steps=2).eps(DELTA)
    assert lower_bound(*canary_scores(120, 1.0), delta=DELTA, confidence=0.999).eps < claimed
    assert lower_bound(*canary_scores(120, 0.05), delta=DELTA, confidence=0.999).breaks(
        Accountant().add(sigma=4.0, steps=2).eps(DELTA)
    )


def test_the_advantage_bound_is_met_by_randomised_response():
    assert advantage_bound(math.log(3)) == pytest.approx(0.5)
    assert advantage_bound(0.0) == 0 and advantage_bound(0.0, 0.1) == pytest.approx(0.1)
    for eps, delta in ((0.5, 1e-3), (2.0, 0.0)):
        assert advantage_bound(eps, delta) == pytest.approx((math.exp(eps) - 1 + 2 * delta) / (math.exp(eps) + 1))


@pytest.mark.parametrize("call, message", [
    (lambda: audit(3, 1, 0), "mechanism: got int"),
    (lambda: audit(lambda d, s: math.nan, 1, 0, trials=20), "present: got 20 scores"),
    (lambda: audit(lambda d, s: 1.0, 1, 0, trials=5), "trials: got 5"),
    (lambda: lower_bound([1.0] * 20, [0.0] * 19), "absent: got 19"),
    (lambda: lower_bound([1.0] * 20, [0.0] * 20, delta=1.0), "delta: got 1.0"),
    (lambda: lower_bound([1.0] * 20, [0.0] * 20, confidence=1.0), "confidence: got 1.0"),
    (lambda: lower_bound(range(20), range(20)).breaks(0), "claimed: got 0"),
    (lambda: advantage_bound(-1.0), "eps: got -1"),
    (lambda: gaussian(1.0, sensitivity=1.0, eps=1.0, delta=2.0), "delta: got 2.0"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_gradients_of_the_audited_kind_are_clipped_by_the_package():
    model = models.linear((1, 3, 3), 2, seed=0)
    total, norms = clipped_gradient(model, torch.ones(1, 1, 3, 3), torch.zeros(1, dtype=torch.int64), 0.1)
    assert norms.item() > 0.1 and torch.stack([g.norm() for g in total.values()]).norm() == pytest.approx(0.1, rel=1e-4)
