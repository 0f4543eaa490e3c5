"""Model extraction: exact for softmax regression, measured for networks, blunted by rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmlcourse import data, models, privacy, training
from tmlcourse.attacks import Queries


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_softmax_regression_comes_out_exactly_from_d_plus_one_answers(seed, classes):
    net = models.linear((2, 3, 4), classes, seed=seed).double()
    oracle = Queries(lambda x: net(x).softmax(1))
    copy = privacy.extract_linear(lambda x: oracle(x.double(), torch.zeros(len(x), dtype=torch.int64)), (2, 3, 4))
    assert oracle.total == 2 * 3 * 4 + 1
    assert torch.allclose(copy[-1].weight, net[-1].weight - net[-1].weight[0], atol=1e-12)
    assert torch.allclose(copy[-1].bias, net[-1].bias - net[-1].bias[0], atol=1e-12)
    x = torch.rand(9, 2, 3, 4).double()
    assert torch.allclose(copy(x).softmax(1), net(x).softmax(1), atol=1e-12)


@pytest.fixture(scope="module")
def black_box():
    train = data.load("digits", "train")
    net = models.mlp(train.shape, hidden=(32,), seed=0)
    training.fit(net, train, epochs=8, lr=5e-3, seed=0)
    return net, train, data.load("digits")


def test_a_trained_regression_agrees_everywhere_and_rounding_blunts_it():
    train, test = data.load("digits", "train"), data.load("digits")
    net = models.linear(train.shape, seed=0)
    training.fit(net, train, epochs=5, lr=1e-2, seed=0)
    copy = privacy.extract_linear(lambda x: net(x).softmax(1), train.shape)
    assert privacy.fidelity(net, copy, test.x) == 1.0
    coarse = lambda x: (net(x).softmax(1) * 100).round().clamp_min(0.1) / 100  # noqa: E731
    assert privacy.fidelity(net, privacy.extract_linear(coarse, train.shape), test.x) < 0.9
    with pytest.raises(ValueError, match="probabilities that are 0"):
        privacy.extract_linear(lambda x: torch.eye(10)[net(x).argmax(1)], train.shape)


def test_more_queries_make_a_better_copy_and_probabilities_tell_more_than_labels(black_box):
    net, train, test = black_box
    asked = []

    def predict(x):
        asked.append(len(x))
        return net(x).softmax(1)

    found = {}
    for n, answers in ((50, "labels"), (50, "probabilities"), (1000, "probabilities")):
        copy = privacy.extract_network(predict, train.x[:n], models.mlp(train.shape, hidden=(32,), seed=5), answers=answers,
                                       epochs=60 if n == 50 else 15, seed=0)  # fmt: skip
        found[n, answers] = privacy.fidelity(net, copy, test.x)
    assert sum(asked) == 1100
    assert found[50, "labels"] < found[50, "probabilities"] < found[1000, "probabilities"]
    assert found[1000, "probabilities"] > 0.93


def test_labels_from_a_box_that_gives_labels(black_box):
    net, train, test = black_box
    few = train.x[:300]
    by_label, by_score = (
        privacy.extract_network(predict, few, models.linear(train.shape, seed=1), answers="labels", epochs=10, seed=0)
        for predict in (lambda x: net(x).argmax(1), lambda x: net(x).softmax(1))
    )
    assert torch.equal(by_label(test.x), by_score(test.x))


def test_the_given_model_is_left_alone(black_box):
    net, train, _ = black_box
    mine = models.linear(train.shape, seed=1)
    before = mine[-1].weight.clone()
    state = torch.get_rng_state()
    privacy.extract_network(lambda x: net(x).softmax(1), train.x[:20], mine, epochs=1, seed=0)
    assert torch.equal(before, mine[-1].weight) and torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named(black_box):
    net, train, _ = black_box
    x, copy = train.x[:5], models.linear(train.shape, seed=0)
    with pytest.raises(ValueError, match="answers: got 'probabilities', but"):
        privacy.extract_network(lambda x: net(x).argmax(1), x, copy)
    with pytest.raises(ValueError, match="answers: got 'scores'"):
        privacy.extract_network(lambda x: net(x).softmax(1), x, copy, answers="scores")
    with pytest.raises(ValueError, match="no probabilities"):
        privacy.extract_network(net, x, copy)
    with pytest.raises(ValueError, match="got 3 logits, want 10"):
        privacy.extract_network(lambda x: net(x).softmax(1), x, models.linear(train.shape, 3, seed=0))
    three = models.linear(train.shape, 3, seed=0)
    with pytest.raises(ValueError, match="got 3 logits, want more"):
        privacy.extract_network(lambda x: torch.full((len(x),), 7), x, three, answers="labels")
    with pytest.raises(TypeError, match="model"):
        privacy.extract_network(lambda x: net(x).softmax(1), x, lambda x: x)
    with pytest.raises(ValueError, match="want probabilities"):
        privacy.extract_linear(lambda x: x, (1, 8, 8))
