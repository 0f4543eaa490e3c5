"""Shadow models trained at once are what they would be if each were trained alone."""

from types import SimpleNamespace

import pytest
import torch

from tmlcourse import data, models, privacy, training


@pytest.fixture(scope="module")
def pool():
    return data.load("digits", n=90)


def build(seed):
    return models.mlp((1, 8, 8), hidden=(7,), seed=seed)


def test_the_stack_equals_training_one_by_one(pool):
    double = SimpleNamespace(x=pool.x.double(), y=pool.y)
    setting = dict(epochs=3, batch_size=20, lr=1e-2)  # 45 members: the last batch is a smaller one
    shadows = privacy.train_shadows(lambda seed: build(seed).double(), double, n=4, seed=5, **setting)
    for i in range(4):
        alone = build(5 + i).double()
        mine = shadows.members[i]
        training.fit(alone, SimpleNamespace(x=double.x[mine], y=pool.y[mine]), seed=5 + i, **setting)
        assert torch.allclose(alone(double.x), shadows.logits(double.x)[i], atol=1e-9)
        assert torch.allclose(shadows.model(i)(double.x), shadows.logits(double.x, batch_size=7)[i], atol=1e-9)


def test_it_equals_sgd_with_momentum_and_convolutions_too():
    pool = data.load("digits", n=24)
    sgd = lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # noqa: E731
    double = SimpleNamespace(x=pool.x.double(), y=pool.y)
    make = lambda seed: models.small_cnn((1, 8, 8), mean=0.3, std=0.4, seed=seed).double()  # noqa: E731
    shadows = privacy.train_shadows(make, double, n=2, epochs=1, batch_size=6, lr=0.01, optimizer=sgd, seed=0)
    alone, mine = make(1), shadows.members[1]
    training.fit(alone, SimpleNamespace(x=double.x[mine], y=pool.y[mine]), epochs=1, batch_size=6, lr=0.01, optimizer=sgd,
                 seed=1)  # fmt: skip
    assert torch.allclose(alone(double.x), shadows.logits(double.x)[1], atol=1e-8)


def test_halves_are_balanced_both_ways():
    members = privacy.halves(6, 11, seed=0)
    assert (members.sum(1) == 5).all() and members.sum(0).max() <= 3
    even = privacy.halves(8, 10, seed=0)
    assert (even.sum(1) == 5).all() and (even.sum(0) == 4).all()
    assert torch.equal(even, privacy.halves(8, 10, seed=0)) and not torch.equal(even, privacy.halves(8, 10, seed=1))


def test_slices_and_networks_that_were_trained_elsewhere(pool):
    shadows = privacy.train_shadows(build, pool, n=3, epochs=1, seed=0)
    assert len(shadows[1:]) == 2 and torch.allclose(shadows[1:].logits(pool.x)[0], shadows.logits(pool.x)[1])
    again = privacy.Shadows.of([shadows.model(i) for i in range(3)], shadows.members, pool)
    assert torch.equal(again.logits(pool.x), shadows.logits(pool.x))


def test_a_seed_is_enough_and_torchs_generator_is_left_alone(pool):
    state = torch.get_rng_state()
    first, second = (privacy.train_shadows(build, pool, n=2, epochs=1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.weights.values(), second.weights.values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(members=torch.ones(2, 3, dtype=torch.bool)), r"members: got torch.bool \(2, 3\)"),
        (dict(members=torch.zeros(2, 90, dtype=torch.bool)), "members"),
        (dict(n=0), "n: got 0"),
        (dict(epochs=0), "epochs"),
        (dict(lr=0.0), "lr"),
        (dict(build=lambda seed: torch.nn.Sequential(build(seed), torch.nn.Dropout())), "dropout"),
        (dict(build=lambda seed: models.resnet((1, 8, 8), depth=8, seed=seed)), "batch statistics"),
        (dict(build=lambda seed: models.linear((1, 8, 8), 5, seed=seed)), "label"),
    ],
)
def test_bad_input_is_named(pool, change, message):
    options = {"build": build, "n": 2, "epochs": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        privacy.train_shadows(options.pop("build"), pool, **options)


def test_a_loss_that_explodes_says_so(pool):
    with pytest.raises(FloatingPointError, match="lower lr"):
        privacy.train_shadows(build, pool, n=2, epochs=9, lr=1e30, optimizer=torch.optim.SGD, seed=0)
