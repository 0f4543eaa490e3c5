"""Federated averaging and its backdoors: the rules against brute force, the rounds against plain SGD, and who stops whom."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean
from torch.nn.utils import parameters_to_vector

from tmlcourse import data, models, training
from tmlcourse.poisoning import (
    Attacker,
    attack_success,
    bars_trigger,
    federated_average,
    federated_backdoor,
    split_clients,
)
from tmlcourse.poisoning.federated import krum, mean, median, norm_clipped, trimmed_mean

TRAIN, TEST = data.load("digits", "train"), data.load("digits")
BARS = bars_trigger(TRAIN.shape, length=2, gap=1)
RULES = [mean, median, trimmed_mean, norm_clipped, krum]


@st.composite
def updates(draw, least=1):
    m, d = draw(st.integers(least, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.randn(m, d, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


@given(updates())
def test_the_rules_equal_numpy(u):
    a = u.double().numpy()
    for rule, expected in [
        (mean, a.mean(0)),
        (median, np.median(a, 0)),
        (partial(norm_clipped, limit=0.7), np.mean([v * min(1, 0.7 / np.linalg.norm(v)) for v in a], 0)),
        (norm_clipped, np.mean([v * min(1, np.median(np.linalg.norm(a, axis=1)) / np.linalg.norm(v)) for v in a], 0)),
        *((partial(trimmed_mean, trim=k), trim_mean(a, (k + 1e-9) / len(a), 0)) for k in range((len(a) - 1) // 2 + 1)),
    ]:
        out = rule(u)
        assert out.dtype == u.dtype and out.shape == u.shape[1:]
        np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-6)


@given(updates(least=4), st.integers(0, 3))
def test_krum_equals_brute_force(u, attackers):
    m = len(u)
    attackers = min(attackers, m - 3)

    def score(i):
        others = [float((u[i].double() - u[j].double()).square().sum()) for j in range(m) if j != i]
        return min(sum(c) for c in itertools.combinations(others, m - attackers - 2))

    best = min(score(i) for i in range(m))
    out = krum(u, attackers)
    mine = next(i for i in range(m) if torch.equal(u[i], out))
    assert score(mine) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(updates(least=5), st.sampled_from(RULES), st.randoms())
def test_the_rules_know_no_names_and_move_with_the_updates(u, rule, random):
    order = list(range(len(u)))
    random.shuffle(order)
    torch.testing.assert_close(rule(u[order]), rule(u), rtol=1e-5, atol=1e-6)
    if rule is not norm_clipped:
        torch.testing.assert_close(rule(u + 3), rule(u) + 3, rtol=1e-5, atol=1e-5)


def test_one_liar_moves_the_mean_anywhere_and_no_other_rule():
    honest = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    lie = torch.full((1, 4), 1e6)
    u = torch.cat([honest, lie])
    assert mean(u).min() > 9e4
    for rule in RULES[1:]:
        assert rule(u).abs().max() <= max(honest.abs().max(), honest.norm(dim=1).max())


@given(st.integers(2, 40), st.sampled_from([None, 0.05, 0.5, 100.0]), st.integers(0, 5))
def test_every_example_has_one_owner(clients, concentration, seed):
    parts = split_clients(TRAIN.y, clients, concentration=concentration, seed=seed)
    assert len(parts) == clients and all(len(p) for p in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(TRAIN)))
    again = split_clients(TRAIN.y, clients, concentration=concentration, seed=seed)
    assert all(map(torch.equal, parts, again))
    if concentration is None:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_small_concentration_makes_clients_one_sided():
    def largest(c):
        parts = split_clients(TRAIN.y, 10, concentration=c, seed=0)
        return np.mean([TRAIN.y[p].bincount(minlength=10).max() / len(p) for p in parts])

    assert largest(0.05) > largest(0.5) > largest(None) + 0.1


def test_a_round_is_plain_sgd_of_each_client():
    """The referee trains one client after the other, on the batches that the same coin draws."""
    net = models.mlp(TRAIN.shape, hidden=(7,), seed=0).double()
    few = TRAIN[:60]
    x, y = few.x.double(), few.y
    parts = split_clients(y, 3, seed=0)
    liar = Attacker(1, BARS, 2, share=0.5, scale=4.0)
    double = type("Data", (), {"x": x, "y": y})
    ours, _ = federated_average(
        net, double, parts, rounds=1, sample=3, steps=2, batch_size=8, lr=0.3, attackers=[liar], seed=5
    )

    coin = torch.Generator().manual_seed(5)
    chosen = torch.randperm(3, generator=coin).tolist()
    batches = [[p[torch.randint(len(p), (8,), generator=coin)] for p in (parts[i] for i in chosen)] for _ in range(2)]
    theta, found = parameters_to_vector(net.parameters()).detach(), []
    for place, i in enumerate(chosen):
        local = copy.deepcopy(net)
        optimiser = torch.optim.SGD(local.parameters(), lr=0.3)
        for step in range(2):
            xb, yb = x[batches[step][place]].clone(), y[batches[step][place]].clone()
            if i == 1:
                xb[:4], yb[:4] = BARS.stamp(xb[:4]), 2
            optimiser.zero_grad()
            F.cross_entropy(local(xb), yb).backward()
            optimiser.step()
        found.append((parameters_to_vector(local.parameters()).detach() - theta) * (4.0 if i == 1 else 1.0))
    torch.testing.assert_close(
        parameters_to_vector(ours.parameters()), theta + torch.stack(found).mean(0), atol=1e-12, rtol=0
    )


def test_model_replacement_is_exact(warm):
    """What a liar sends is gamma times his update, so 1/m of m times it is his model; who learns nothing changes nothing."""
    model, parts = warm
    ours = federated_average(model, TRAIN, parts[:2], rounds=1, sample=2, lr=0.0, seed=0)[0]
    torch.testing.assert_close(parameters_to_vector(ours.parameters()), parameters_to_vector(model.parameters()))

    def moved(scale):
        liar, back = Attacker(0, BARS, 2, 1.0, scale, (0,)), lambda u: u[0] / scale
        alone = federated_average(model, TRAIN, parts[:2], sample=1, rounds=1, attackers=[liar], seed=0, aggregate=back)
        return parameters_to_vector(alone[0].parameters())

    torch.testing.assert_close(moved(10.0), moved(1.0))


def test_averaging_learns_and_leaves_the_model_and_the_generator_alone():
    net = models.mlp(TRAIN.shape, hidden=(32,), seed=0)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    parts = split_clients(TRAIN.y, 20, concentration=0.5, seed=0)
    watch = lambda m: {"accuracy": training.accuracy(m, TEST.x, TEST.y)}  # noqa: E731
    one, history = federated_average(net, TRAIN, parts, rounds=15, lr=0.3, watch=watch, seed=1)
    two, _ = federated_average(net, TRAIN, parts, rounds=15, lr=0.3, seed=1)
    assert all(torch.equal(a, before[k]) for k, a in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in net.parameters())
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert history["accuracy"].iloc[-1] > 0.85 and list(history["round"]) == list(range(1, 16))


@pytest.fixture(scope="module")
def warm():
    parts = split_clients(TRAIN.y, 20, seed=0)
    net = models.mlp(TRAIN.shape, hidden=(32,), seed=0)
    return federated_average(net, TRAIN, parts, rounds=25, lr=0.3, seed=1)[0], parts


def attacked(warm, **changes):
    model, parts = warm
    options = {"target": 2, "rounds": 6, "at": (1, 2, 3, 4, 5), "lr": 0.3, "test": TEST, "seed": 0} | changes
    return federated_backdoor(model, TRAIN, parts, BARS, **options)[1].iloc[-1]


@pytest.mark.parametrize("distributed", [True, False])
def test_the_mean_lets_the_backdoor_in_and_robust_rules_keep_it_out(warm, distributed):
    for seed in range(3):
        open_door = attacked(warm, distributed=distributed, seed=seed)
        assert open_door["success"] > 0.9 and open_door["accuracy"] > 0.85
    for rule in (median, partial(trimmed_mean, trim=4), partial(krum, attackers=4)):
        assert attacked(warm, distributed=distributed, aggregate=rule)["success"] < 0.3


def test_no_rule_helps_against_a_majority(warm):
    """Eight of the ten sampled clients stamp the whole trigger and shout no louder than the others."""
    model, parts = warm
    liars = [Attacker(i, BARS, 2, rounds=tuple(range(8))) for i in range(8)]
    for rule in (median, partial(trimmed_mean, trim=4), norm_clipped, partial(krum, attackers=4)):
        fallen, _ = federated_average(model, TRAIN, parts, rounds=8, lr=0.3, aggregate=rule, attackers=liars, seed=0)
        assert attack_success(fallen, TEST.x, TEST.y, BARS, 2) > 0.9
        assert training.accuracy(fallen, TEST.x, TEST.y) > 0.85


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda w: attacked(w, sample=21), ValueError, "sample: got 21, want at most 20"),
        (lambda w: attacked(w, target=10), ValueError, "target: got 10"),
        (lambda w: attacked(w, attackers=[]), ValueError, "attackers: got none"),
        (lambda w: attacked(w, attackers=[0, 0, 1]), ValueError, "attackers: got client 0, want different ones"),
        (lambda w: attacked(w, attackers=[25]), ValueError, "attackers: got client 25"),
        (lambda w: attacked(w, attackers=range(9)), ValueError, "parts: got 9, want at most 8"),
        (lambda w: attacked(w, share=0.0), ValueError, "share: got 0"),
        (lambda w: attacked(w, scale=0.0), ValueError, "scale: got 0"),
        (lambda w: attacked(w, rounds=0), ValueError, "rounds: got 0"),
        (lambda w: attacked(w, lr=1e30), FloatingPointError, "updates: got infinite values in round"),
        (lambda w: attacked(w, target=1.5), TypeError, "target: got 1.5"),
        (lambda w: split_clients(TRAIN.y, 1), ValueError, "clients: got 1"),
        (lambda w: split_clients(TRAIN.y[:3], 4), ValueError, "clients: got 4 for 3 examples"),
        (lambda w: split_clients(TRAIN.y, 4, concentration=0.0), ValueError, "concentration: got 0"),
        (
            lambda w: federated_average(w[0], TRAIN, [torch.tensor([9999])] * 10),
            ValueError,
            "clients: want at least one index",
        ),
        (lambda w: trimmed_mean(torch.ones(4, 2), 2), ValueError, "trim: got 2 on both sides of 4"),
        (lambda w: krum(torch.ones(3, 2), 1), ValueError, "attackers: got 1 for 3 updates"),
        (lambda w: median(torch.ones(3)), ValueError, "updates: got shape"),
        (lambda w: mean(torch.tensor([[float("nan")]])), ValueError, "updates: got NaN"),
    ],
)
def test_bad_input_is_named(warm, call, error, message):
    with pytest.raises(error, match=message):
        call(warm)
