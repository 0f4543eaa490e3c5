"""Label noise: corrected losses are exact on average over every flip, the SVM's program is the expected one."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import SVC
from torch import nn

from tmlcourse import data, models, poisoning, training
from tmlcourse.poisoning import co_teaching, fit, forward_loss, noise_svm, noisy_labels, scores, svm, unbiased_loss
from tmlcourse.poisoning.label_noise import transition


def random_T(classes, generator):
    T = torch.rand(classes, classes, generator=generator, dtype=torch.float64) + 2 * torch.eye(classes)
    return T / T.sum(1, keepdim=True)


def given_logits(z):
    """A model that answers z whatever it is shown."""
    return lambda x: z


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_the_corrected_loss_is_the_clean_loss_on_average_over_all_noise(seed, classes):
    """Every possible noisy label, weighted by its probability: no sampling."""
    gen = torch.Generator().manual_seed(seed)
    T, z = random_T(classes, gen), torch.randn(1, classes, generator=gen, dtype=torch.float64)
    loss = unbiased_loss(T, classes)
    each = torch.stack([loss(given_logits(z), None, torch.tensor([j]))[0] for j in range(classes)])
    clean = F.cross_entropy(z.expand(classes, -1), torch.arange(classes), reduction="none")
    assert torch.allclose(T @ each, clean, atol=1e-10)


@pytest.mark.parametrize(("plus", "minus"), [(0.1, 0.3), (0.4, 0.2), (0.0, 0.0)])
def test_two_classes_give_natarajans_formula(plus, minus):
    """rho_plus is the chance that a +1 is seen as -1."""
    t = torch.linspace(-3, 3, 7, dtype=torch.float64)
    z = torch.stack([torch.zeros_like(t), t], 1)  # so that the cross-entropy is log(1 + exp(-y t))
    loss = unbiased_loss(torch.tensor([[1 - minus, minus], [plus, 1 - plus]], dtype=torch.float64), 2)
    l = lambda y: F.softplus(-y * t)  # noqa: E731, E741
    for y, own, other in ((1, plus, minus), (-1, minus, plus)):
        want = ((1 - other) * l(y) - own * l(-y)) / (1 - plus - minus)
        got = loss(given_logits(z), None, torch.full((7,), (y + 1) // 2))[0]
        assert torch.allclose(got, want.mean(), atol=1e-12)


def test_the_mean_over_all_labellings_of_a_small_set_is_its_clean_risk():
    torch.manual_seed(0)
    T, z, y = random_T(3, None), torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    loss, mean = unbiased_loss(T, 3), 0.0
    for seen in itertools.product(range(3), repeat=4):
        mean = mean + T[y, list(seen)].prod() * loss(given_logits(z), None, torch.tensor(seen))[0]
    assert torch.allclose(mean, F.cross_entropy(z, y), atol=1e-10)


def test_without_noise_both_losses_are_the_cross_entropy():
    torch.manual_seed(0)
    z, y = torch.randn(6, 4), torch.randint(4, (6,))
    for loss in (unbiased_loss(0.0, 4), forward_loss(0.0, 4)):
        value, logits = loss(given_logits(z), None, y)
        assert torch.allclose(value, F.cross_entropy(z, y), atol=1e-6) and logits is z and value.dtype == torch.float32


@given(st.integers(0, 10**6))
def test_the_forward_loss_is_least_at_the_true_probabilities(seed):
    gen = torch.Generator().manual_seed(seed)
    T, p = random_T(3, gen), torch.rand(3, generator=gen, dtype=torch.float64).softmax(0)
    seen = p @ T

    def risk(q):
        values = [forward_loss(T, 3)(given_logits(q.log()[None]), None, torch.tensor([j]))[0] for j in range(3)]
        return seen @ torch.stack(values)

    other = torch.rand(3, generator=gen, dtype=torch.float64).softmax(0)
    assert risk(p) <= risk(other) + 1e-12
    assert torch.allclose(risk(p), -(seen * seen.log()).sum())


def test_labels_are_flipped_as_often_as_the_matrix_says():
    T = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    y = torch.arange(3).repeat_interleave(20_000)
    seen = noisy_labels(y, T, classes=3, seed=0)
    counts = torch.stack([seen[y == i].bincount(minlength=3) for i in range(3)]) / 20_000
    assert (counts - T).abs().max() < 5 * (0.25 / 20_000) ** 0.5  # five standard errors
    assert seen.equal(noisy_labels(y, T, classes=3, seed=0)) and not seen.equal(noisy_labels(y, T, classes=3, seed=1))
    assert noisy_labels(y, 0.0, classes=3, seed=0).equal(y)
    assert (noisy_labels(y, 1.0, classes=3, seed=0) != y).all()
    state = torch.get_rng_state()
    noisy_labels(y, 0.3, classes=3, seed=2)
    assert state.equal(torch.get_rng_state())


def test_training_a_linear_model_through_noise():
    """One direction of noise moves a class's boundary; the correction moves it back."""
    train, test = data.load("digits", "train"), data.load("digits")
    T = torch.eye(10)
    T[3], T[3, 3], T[3, 9] = 0, 0.45, 0.55  # most threes are called nine
    seen = data.Dataset(train.x, noisy_labels(train.y, T, classes=10, seed=0), train.classes, train.name)
    found = {}
    for name, loss in {
        "plain": training.cross_entropy,
        "unbiased": unbiased_loss(T, 10),
        "forward": forward_loss(T, 10),
    }.items():
        model = models.linear(train.shape, seed=0)
        training.fit(model, seen, epochs=15, lr=1e-2, loss=loss, seed=0)
        threes = test.y == 3
        found[name] = training.accuracy(model, test.x[threes], test.y[threes])
    assert found["unbiased"] > found["plain"] + 0.2 and found["forward"] > found["plain"] + 0.2


def test_what_two_networks_teach_each_other_is_mostly_true():
    """A third of the labels is wrong; among the examples that are easy for the networks, far fewer are."""
    train = data.load("digits-28x28", "train")[:1000]
    seen = data.Dataset(train.x, noisy_labels(train.y, 1 / 3, classes=10, seed=0), train.classes, train.name)
    pair = nn.ModuleList(models.mlp(train.shape, hidden=(50,), seed=s) for s in (0, 1))
    training.fit(pair, seen, epochs=10, lr=3e-3, loss=co_teaching(1 / 3), seed=0)
    with torch.no_grad():
        hard = F.cross_entropy(pair[0](seen.x), seen.y, reduction="none")
    easy = hard.argsort()[:667]
    assert (seen.y != train.y).double().mean() > 0.3
    assert (seen.y[easy] != train.y[easy]).double().mean() < 0.15


def test_co_teaching_takes_the_other_networks_easy_examples():
    """By hand, at the end of the ramp: network 0 learns from what 1 finds easy, and the other way round."""
    y = torch.tensor([0, 0, 0, 0])
    one, two = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    pair = nn.ModuleList([nn.Identity(), nn.Identity()])
    logits = [torch.stack([v, torch.zeros(4)], 1) for v in (one, two)]
    pair[0].forward, pair[1].forward = (lambda x, z=z: z for z in logits)
    loss = co_teaching(0.5)
    value, _ = loss(pair, torch.zeros(4, 1), y, 1.0)
    want = F.softplus(-one[[2, 3]]).mean() + F.softplus(-two[[0, 1]]).mean()
    assert torch.allclose(value, want)
    everything, mean = loss(pair, torch.zeros(4, 1), y, 0.0)
    assert torch.allclose(everything, F.softplus(-one).mean() + F.softplus(-two).mean())
    assert torch.allclose(mean, (logits[0] + logits[1]) / 2)


def two_clouds(n=24, seed=0):
    gen = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    return torch.randn(n, 3, generator=gen, dtype=torch.float64) + y[:, None] * torch.tensor([1.0, 0.5, 0.0]), y


def test_the_svms_program_is_the_mean_over_all_flips():
    """a^T E[Q~] a by brute force over the 2^n sets of flips."""
    X, y = two_clouds(6)
    a, flip = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.2
    mean = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=6):
        e = torch.tensor(signs, dtype=torch.float64)
        chance = torch.where(e < 0, flip, 1 - flip).prod()
        mean = mean + chance * ((a * e * y) @ X).square().sum() / 2
    got = noise_svm(1.0, flip=flip, smooth=1e-12).objective(a, X, y)
    assert torch.allclose(got, mean - a.sum(), atol=1e-9)


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.3])
def test_the_svm_equals_libsvm_with_the_expected_kernel(flip):
    X, y = two_clouds(40)
    s = (1 - 2 * flip) ** 2
    gram = (X @ X.T).numpy()
    peer = SVC(C=2.0, kernel="precomputed", tol=1e-8).fit(s * gram + (1 - s) * np.diag(np.diag(gram)), y.numpy())
    new = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = scores(fit(noise_svm(2.0, flip=flip), X, y).model, new)
    assert np.allclose(ours, peer.decision_function(s * (new @ X.T).numpy()), atol=1e-4)
    if flip == 0:
        assert torch.allclose(ours, scores(fit(svm(2.0), X, y).model, new), atol=1e-4)


SHAPE, TWO = (1, 8, 8), torch.tensor([0, 1])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: transition(1.5, 3), ValueError, "noise: got 1.5"),
    (lambda: transition(-0.1, 3), ValueError, "noise"),
    (lambda: transition(0.1, 1), ValueError, "classes"),
    (lambda: transition(torch.eye(2), 3), ValueError, "shape"),
    (lambda: transition(torch.ones(2, 2), 2), ValueError, "sum to 1"),
    (lambda: unbiased_loss(0.5, 2), ValueError, "singular"),
    (lambda: unbiased_loss(0.9, 10), ValueError, "singular"),
    (lambda: noisy_labels(torch.tensor([3]), 0.1, classes=3), ValueError, "label 3"),
    (lambda: noisy_labels(torch.tensor([0.0]), 0.1, classes=3), TypeError, "y"),
    (lambda: noisy_labels(torch.tensor([0]), 0.1, classes=3, seed=-1), ValueError, "seed"),
    (lambda: unbiased_loss(0.1, 3)(models.linear(SHAPE), torch.rand(2, *SHAPE), TWO), ValueError, "want logits"),
    (lambda: co_teaching(1.0), ValueError, "noise"),
    (lambda: co_teaching(0.1, ramp=0.0), ValueError, "ramp"),
    (lambda: co_teaching(0.1)(models.linear(SHAPE), torch.rand(2, *SHAPE), TWO, 0.5), TypeError, "ModuleList"),
    (lambda: noise_svm(1.0, flip=0.5), ValueError, "flip"),
    (lambda: noise_svm(0.0, flip=0.1), ValueError, "C: got 0"),
])  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_flips_of_an_svm_that_expects_them():
    """The corrected SVM is a Learner like the others: it can be attacked, and stands more."""
    both = data.load("digits", "train")
    both = both[(both.y == 1) | (both.y == 7)]
    x, y = both.x[:60], both.y[:60]
    worse = poisoning.flip_labels(x, y, count=12, how="random", seed=3)
    rest, truth = both.x[60:].flatten(1).double(), both.y[60:]
    right = {}
    for flip in (0.0, 0.2):
        signs = torch.where(worse == 7, 1.0, -1.0).double()
        model = fit(noise_svm(10.0, flip=flip), x.flatten(1).double(), signs).model
        right[flip] = ((scores(model, rest) > 0) == (truth == 7)).double().mean()
    assert right[0.2] > right[0.0]
