"""Zero-query attacks: the difference of means in closed form, and substitutes that learn from counted labels."""

import copy

import pytest
import torch
from torch import nn

from tmlcourse import data, models, pretrained, training
from tmlcourse.attacks import pgd
from tmlcourse.attacks.queries import Queries
from tmlcourse.attacks.transfer import difference_of_means, substitute
from tmlcourse.threat import L0, L1, L2, Linf


def blobs(n=60, shape=(1, 3, 4), classes=3, seed=0, dtype=torch.float64):
    """Images around one centre a class; the centres of 0 and 1 are nearer to each other than to that of 2."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(classes, *shape, generator=g, dtype=dtype) * 0.4 + 0.3
    centres[1] = centres[0] + 0.05 * torch.randn(shape, generator=g, dtype=dtype)
    y = torch.arange(n) % classes
    x = (centres[y] + 0.02 * torch.randn(n, *shape, generator=g, dtype=dtype)).clamp(0, 1)
    return x, y


# --- difference of means ---------------------------------------------------------------------------------------------


def test_difference_of_means_is_eps_times_the_sign_of_mu_t_minus_mu_y():
    x, y = blobs()
    mu = torch.stack([x[y == k].mean(0) for k in range(3)])
    target = (y + 1) % 3
    x_adv = difference_of_means(x, y, x, y, Linf(0.05), target=target)
    torch.testing.assert_close(x_adv, (x + 0.05 * (mu[target] - mu[y]).sign()).clamp(0, 1), atol=1e-12, rtol=0)
    nearest = torch.tensor([1, 0, min((0, 1), key=lambda k: (mu[k] - mu[2]).norm().item())])[y]
    untargeted = difference_of_means(x, y, x, y, Linf(0.05))
    assert torch.equal(untargeted, difference_of_means(x, y, x, y, Linf(0.05), target=nearest))
    along = difference_of_means(x, y, x, y, L2(0.3, box=None), target=target)
    step = (mu[target] - mu[y]).flatten(1)
    torch.testing.assert_close((along - x).flatten(1), 0.3 * step / step.norm(dim=1, keepdim=True), atol=1e-9, rtol=0)


@pytest.mark.parametrize("threat", [Linf(0.3), Linf(0.0), L2(1.0), L1(2.0), L0(3)])
def test_difference_of_means_stays_in_the_set(threat):
    x, y = blobs(dtype=torch.float32)
    x_adv = difference_of_means(x, y, x, y, threat)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and threat.contains(x_adv, x).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    one = difference_of_means(x, y, x[:1], y[:1], threat)
    torch.testing.assert_close(one, x_adv[:1])


def test_difference_of_means_breaks_the_nearest_mean_classifier_just_beyond_half_the_gap():
    """Moving by t |mu_t - mu_y| along the line between two means flips a point at mu_y for t > 1/2 and not before."""
    x, y = blobs(classes=2)
    mu = torch.stack([x[y == k].mean(0) for k in range(2)])
    gap = (mu[1] - mu[0]).norm().item()
    for t, flips in ((0.49, False), (0.51, True)):
        moved = difference_of_means(x, y, mu, torch.tensor([0, 1]), L2(t * gap, box=None))
        nearest = torch.cdist(moved.flatten(1), mu.flatten(1)).argmin(1)
        assert ((nearest != torch.tensor([0, 1])) == flips).all()


def test_difference_of_means_refuses_bad_input():
    x, y = blobs()
    for match, call in {
        "y_train: got 1 class": lambda: difference_of_means(x[y == 0], y[y == 0], x, y, Linf(0.1)),
        "y: got a class of which there is no image": lambda: difference_of_means(x[y < 2], y[y < 2], x, y, Linf(0.1)),
        "target: got a class of which": lambda: difference_of_means(x, y, x, y, Linf(0.1), target=y + 3),
        "target: got the true label for 60": lambda: difference_of_means(x, y, x, y, Linf(0.1), target=y),
        "x_train: got shape": lambda: difference_of_means(x[:, :, :2], y, x, y, Linf(0.1)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# --- substitute ------------------------------------------------------------------------------------------------------


def oracle_of(record, weight):
    def predict(v):
        record.append(v.clone())
        return (v.flatten(1) @ weight.t()).argmax(1)

    return predict


def test_substitute_asks_about_the_seeds_then_about_steps_along_its_jacobian_and_its_queries_double():
    torch.manual_seed(0)
    weight, x = torch.randn(3, 12), torch.rand(10, 1, 3, 4)
    for rounds, total in ((0, 10), (1, 20), (3, 80)):
        record = []
        oracle = Queries(oracle_of(record, weight), answers="labels")
        substitute(oracle, x, models.linear((1, 3, 4), 3, seed=0), rounds=rounds, lam=0.1, epochs=2, seed=0)
        asked = torch.cat(record)
        assert oracle.total == len(asked) == total and torch.equal(asked[:10], x)
        assert (oracle.count == 1).all(), "a label is asked for once"
        step = asked[10:20] - x[: max(0, min(10, total - 10))]
        inside = (step.abs() - 0.1).abs() < 1e-6
        edge = (asked[10:20] == 0) | (asked[10:20] == 1)
        assert (inside | edge).all() and asked.min() >= 0 and asked.max() <= 1


def test_the_step_is_the_sign_of_the_gradient_of_the_oracles_class_and_flips_every_period():
    """On a linear substitute that is not trained (lr 0) the Jacobian's row is the weight itself."""
    torch.manual_seed(1)
    weight, x = torch.randn(3, 12), torch.full((4, 1, 3, 4), 0.5)
    record, model = [], models.linear((1, 3, 4), 3, seed=0)
    substitute(oracle_of(record, weight), x, model, rounds=2, lam=0.1, period=1, epochs=1, lr=0.0, seed=0)
    asked, w = torch.cat(record), model[1].weight.detach().view(3, 1, 3, 4)
    answers = (asked.flatten(1) @ weight.t()).argmax(1)
    torch.testing.assert_close(asked[4:8], x + 0.1 * w[answers[:4]].sign())
    torch.testing.assert_close(asked[8:], (asked[:8] - 0.1 * w[answers[:8]].sign()))


@pytest.mark.parametrize(("budget", "asked"), [(0, 0), (1, 1), (7, 7), (25, 25), (10**6, 80)])
def test_substitute_never_exceeds_its_budget(budget, asked):
    torch.manual_seed(2)
    oracle = Queries(oracle_of([], torch.randn(3, 12)), answers="labels")
    model = models.linear((1, 3, 4), 3, seed=0)
    trained = substitute(oracle, torch.rand(10, 1, 3, 4), model, rounds=3, queries=budget, epochs=1, seed=0)
    assert oracle.total == asked
    if asked == 0:
        assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_a_reservoir_makes_the_growth_linear():
    torch.manual_seed(3)
    oracle = Queries(oracle_of([], torch.randn(3, 12)), answers="labels")
    substitute(oracle, torch.rand(8, 1, 3, 4), models.linear((1, 3, 4), 3), rounds=5, reservoir=10, epochs=1)
    assert oracle.total == 8 + 8 + 4 * 10


def test_substitute_leaves_the_given_model_alone_and_its_seed_reproduces():
    torch.manual_seed(4)
    weight, x, model = torch.randn(3, 12), torch.rand(10, 1, 3, 4), models.mlp((1, 3, 4), 3, hidden=(8,), seed=0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    runs = [substitute(oracle_of([], weight), x, model, rounds=2, reservoir=5, epochs=2, seed=5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(run.training for run in runs)
    for a, b, c in zip(runs[0].parameters(), runs[1].parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_substitute_refuses_bad_input():
    x, predict = torch.rand(4, 1, 3, 4), oracle_of([], torch.randn(3, 12))
    model = models.linear((1, 3, 4), 3)
    with pytest.raises(TypeError, match="model: got function"):
        substitute(predict, x, lambda v: v)
    for match, options in {
        "rounds: got -1": {"rounds": -1},
        "lam: got -1": {"lam": -1},
        "period: got 0": {"period": 0},
        "reservoir: got 0": {"reservoir": 0},
        "queries: got -1": {"queries": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            substitute(predict, x, model, **options)
    with pytest.raises(ValueError, match="model: got 3 logits, want more: the black box answered 7"):
        substitute(lambda v: torch.full((len(v),), 7), x, model)


def test_a_linear_black_box_is_copied_well_enough_to_break_it():
    """More rounds agree better with the black box, and what fools the copy fools the original."""
    torch.manual_seed(5)
    black = nn.Sequential(nn.Flatten(), nn.Linear(20, 2)).eval()
    with torch.no_grad():
        black[1].bias -= black[1].weight.sum(1) / 2  # the boundary through the middle of the box
    seeds, x = torch.rand(20, 1, 4, 5), torch.rand(300, 1, 4, 5)
    y = black(x).argmax(1)
    agree, fell = [], []
    for rounds in (0, 4):
        copied = substitute(
            black, seeds, models.linear((1, 4, 5), 2, seed=0), rounds=rounds, epochs=40, lr=0.05, seed=0
        )
        agree.append((copied(x).argmax(1) == y).double().mean().item())
        x_adv = pgd(copied, x, y, Linf(0.15), steps=5, loss="margin", seed=0)
        fell.append((black(x_adv).argmax(1) != y).double().mean().item())
    best = pgd(black, x, y, Linf(0.15), steps=5, loss="margin", seed=0)
    most = (black(best).argmax(1) != y).double().mean().item()
    assert agree[1] > 0.8 and agree[1] > agree[0] and fell[1] >= 0.8 * most and fell[0] <= most


@pytest.mark.parametrize("name", ["digits-28x28", "mnist"])
def test_a_substitute_breaks_more_than_noise_of_the_same_size(name, request):
    test = data.load(name) if name == "digits-28x28" else request.getfixturevalue("mnist")
    black = pretrained.load(f"{name}-standard")
    seeds, x, y, threat = test.x[-150:], test.x[:100], test.y[:100], Linf(0.3)
    oracle = Queries(black, answers="labels")
    copied = substitute(oracle, seeds, models.mlp(test.shape, seed=0), rounds=1, seed=0)
    moved = {
        "noise": threat.random(x, torch.Generator().manual_seed(0)),
        "copy": pgd(copied, x, y, threat, steps=10, seed=0),
    }
    right = {k: training.accuracy(black, v, y) for k, v in moved.items()}
    assert oracle.total == 300 and right["copy"] < right["noise"] - 0.1
