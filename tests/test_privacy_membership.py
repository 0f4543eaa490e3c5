"""Membership inference: against closed forms, brute force, the bound of differential privacy, and each other."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tmlcourse import data, models, privacy

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def small():
    """Eight networks on small digits; two are attacked."""
    pool = data.load("digits", n=120)
    build = lambda seed: models.mlp((1, 8, 8), hidden=(8,), seed=seed)  # noqa: E731
    return pool, privacy.train_shadows(build, pool, n=10, epochs=15, batch_size=20, lr=1e-2, seed=0)


@given(SCORES, SCORES)
def test_accuracy_is_half_and_half_the_kolmogorov_smirnov_distance(members, others):
    found = privacy.compare_scores(members, others, fpr=0.5)
    one_sided = scipy.stats.ks_2samp(members, others, alternative="less").statistic
    assert found.advantage == pytest.approx(max(one_sided, 0.0))
    cuts = [-9, *sorted({*members, *others})]
    right = max(np.mean(np.array(members) > t) + np.mean(np.array(others) <= t) for t in cuts) / 2
    assert found.accuracy == pytest.approx(right)
    assert found.auc == pytest.approx(roc_auc_score([1] * len(members) + [0] * len(others), [*members, *others]))


@given(SCORES, SCORES, st.sampled_from([0.01, 0.1, 0.3, 1.0]))
def test_the_rate_at_few_false_alarms_is_that_of_the_best_threshold_allowed(members, others, fpr):
    found = privacy.compare_scores(members, others, fpr=fpr)
    allowed = [t for t in (-9, *members, *others) if np.mean(np.array(others) > t) <= fpr]
    assert found.tpr == pytest.approx(max([np.mean(np.array(members) > t) for t in allowed], default=0.0))
    assert found.low <= found.tpr <= found.high
    assert torch.equal(found.roc[0], torch.zeros(2).double()) and torch.equal(found.roc[-1], torch.ones(2).double())


def test_confidence_is_the_logit_of_the_probability_and_does_not_round():
    z, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    p = z.softmax(-1).gather(-1, y.expand(5, 4)[..., None])[..., 0]
    assert torch.allclose(privacy.confidence(z, y), (p / (1 - p)).log())
    sure = torch.tensor([[200.0, 0.0, 0.0]], dtype=torch.float64)
    assert privacy.confidence(sure, torch.tensor([0])).item() == pytest.approx(200 - np.log(2))


def test_lira_is_the_formula_one_example_at_a_time(small):
    pool, shadows = small
    target, others = shadows.model(8), shadows[:8]
    for variance in ("example", "global"):
        online = privacy.membership_inference(target, pool.x, pool.y, method="lira", shadows=others, variance=variance)
        offline = privacy.membership_inference(target, pool.x, pool.y, method="lira-offline", shadows=others,
                                               variance=variance)  # fmt: skip
        phi = privacy.confidence(target(pool.x).double().detach(), pool.y)
        theirs = privacy.confidence(others.logits(pool.x).double(), pool.y)
        within = [theirs[others.members[:, i], i] for i in range(120)]
        without = [theirs[~others.members[:, i], i] for i in range(120)]
        s_in, s_out = (torch.stack([v.var() for v in group]) for group in (within, without))
        if variance == "global":
            s_in, s_out = s_in.mean().expand(120), s_out.mean().expand(120)
        for i in (0, 17, 90):
            p_in = scipy.stats.norm.logpdf(phi[i], within[i].mean(), s_in[i].sqrt())
            p_out = scipy.stats.norm.logpdf(phi[i], without[i].mean(), s_out[i].sqrt())
            assert online[i].item() == pytest.approx(p_in - p_out, rel=1e-6)
            low = scipy.stats.norm.logcdf(phi[i], without[i].mean(), s_out[i].sqrt())
            assert offline[i].item() == pytest.approx(low, rel=1e-6, abs=1e-12)


def test_offline_lira_takes_strangers_and_online_does_not(small):
    _, shadows = small
    new = data.load("digits", "train", n=30)
    scores = privacy.membership_inference(shadows.model(0), new.x, new.y, method="lira-offline", shadows=shadows[2:])
    assert scores.shape == (30,) and (scores <= 0).all()
    with pytest.raises(ValueError, match="x: got other examples"):
        privacy.membership_inference(shadows.model(0), new.x, new.y, method="lira", shadows=shadows[2:])


def test_the_loss_attack_is_the_loss_and_the_learned_one_learns(small):
    pool, shadows = small
    target = shadows.model(8)
    scores = privacy.membership_inference(target, pool.x, pool.y)
    assert torch.allclose(scores, -F.cross_entropy(target(pool.x).double(), pool.y, reduction="none").detach())
    first, second = (
        privacy.membership_inference(target, pool.x, pool.y, method="shadow", shadows=shadows[:8], seed=1)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    mine = shadows.members[8]
    assert privacy.compare_scores(first[mine], first[~mine], fpr=0.1).auc > 0.55


def _many(x, y, targets, *, n, epochs, batch_size):
    """Scores of every attack on several overfitted networks: method -> (members', others')."""
    pool = SimpleNamespace(x=F.avg_pool2d(x, 2), y=y)
    build = lambda seed: models.mlp((1, 14, 14), hidden=(24,), seed=seed)  # noqa: E731
    shadows = privacy.train_shadows(build, pool, n=n + targets, epochs=epochs, batch_size=batch_size, seed=0)
    found = {}
    for method in ("loss", "lira"):
        scores = [privacy.membership_inference(shadows.model(n + i), pool.x, y, method=method, shadows=shadows[:n])
                  for i in range(targets)]  # fmt: skip
        rows, seen = torch.cat(scores), shadows.members[n:].flatten()
        found[method] = privacy.compare_scores(rows[seen], rows[~seen])
    return found


def test_lira_beats_the_threshold_where_false_alarms_are_rare():
    train, test = data.load("digits-28x28", "train"), data.load("digits-28x28")
    x, y = torch.cat([train.x, test.x])[:1200], torch.cat([train.y, test.y])[:1200]
    found = _many(x, y, 4, n=24, epochs=20, batch_size=50)
    assert found["lira"].negatives >= 2000
    assert found["lira"].low > found["loss"].high
    assert found["lira"].auc > found["loss"].auc + 0.02


def test_lira_beats_the_threshold_on_mnist(mnist):
    found = _many(mnist.x[:1200], mnist.y[:1200], 4, n=24, epochs=25, batch_size=50)
    assert found["lira"].negatives >= 2000
    assert found["lira"].tpr > 5 * found["loss"].tpr and found["lira"].low > found["loss"].high


def test_a_private_network_keeps_below_the_bound():
    pool = data.load("digits", "train")
    mine = torch.rand(len(pool), generator=torch.Generator().manual_seed(0)) < 0.5
    net = models.mlp((1, 8, 8), hidden=(32,), seed=0)
    run = privacy.dp_sgd(net, pool[mine], eps=1.0, clip=1.0, delta=1e-4, batch_size=100, epochs=15, lr=1.0, seed=0)
    scores = privacy.membership_inference(net, pool.x, pool.y)
    found = privacy.compare_scores(scores[mine], scores[~mine], fpr=0.01)
    assert run.eps <= 1 and found.advantage < privacy.advantage_bound(1.0, 1e-4) - 0.2


def test_the_network_is_left_as_it_was(small):
    pool, shadows = small
    target = shadows.model(8)
    before, state = [p.clone() for p in target.parameters()], torch.get_rng_state()
    privacy.membership_inference(target, pool.x, pool.y, method="shadow", shadows=shadows[:8], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in target.parameters())


def test_bad_input_is_named(small):
    pool, shadows = small
    target = shadows.model(0)
    with pytest.raises(ValueError, match="method: got 'guess'"):
        privacy.membership_inference(target, pool.x, pool.y, method="guess")
    with pytest.raises(TypeError, match="shadows: got NoneType"):
        privacy.membership_inference(target, pool.x, pool.y, method="lira")
    with pytest.raises(ValueError, match="shadow models without it, want at least 2"):
        privacy.membership_inference(target, pool.x, pool.y, method="lira", shadows=shadows[:2])
    with pytest.raises(ValueError, match="variance"):
        privacy.membership_inference(target, pool.x, pool.y, variance="none")
    with pytest.raises(ValueError, match="others: got shape"):
        privacy.compare_scores([1.0], [])
    with pytest.raises(ValueError, match="members"):
        privacy.compare_scores([float("nan")], [1.0])
    with pytest.raises(ValueError, match="fpr: got 0"):
        privacy.compare_scores([1.0], [1.0], fpr=0.0)
