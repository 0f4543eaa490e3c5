"""Prototypes, criticisms and influential images: brute force on tiny sets, retraining, bad input."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmlcourse import data
from tmlcourse.interpret.examples import influential, kernel, mmd, prototypes
from tmlcourse.interpret.influence import regression, retrain


def cloud(seed, n=9, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 60))
def test_each_prototype_is_the_best_addition(seed):
    X = cloud(seed)
    K, chosen = kernel(X), prototypes(X, 4)
    S = []
    for j, value in zip(chosen.prototypes.tolist(), chosen.mmd.tolist(), strict=True):
        best = min(mmd(K, torch.tensor([*S, i])) for i in range(len(X)) if i not in S)
        S.append(j)
        assert abs(mmd(K, torch.tensor(S)) - best) < 1e-12 and abs(value - best) < 1e-12
    # Greedy is not optimal, but near: the gain in MMD^2 is at least 1 - 1/e of the best (Kim et al. 2016, for such kernels).
    least = min(mmd(K, torch.tensor(T)) for T in combinations(range(len(X)), 4))
    empty = float(K.mean())
    assert empty - chosen.mmd[-1] >= (1 - 1 / torch.e) * (empty - least)


@given(st.integers(0, 40))
def test_each_criticism_is_the_best_addition(seed):
    X = cloud(seed)
    K, chosen = kernel(X), prototypes(X, 3, criticisms=3)
    S = chosen.prototypes
    witness = (K.mean(0) - K[S].mean(0)).abs()

    def worth(C):
        return float(witness[C].sum() + torch.linalg.slogdet(K[C][:, C])[1])

    C = []
    for j in chosen.criticisms.tolist():
        trials = {i: worth(torch.tensor([*C, i])) for i in range(len(X)) if i not in [*S.tolist(), *C]}
        assert abs(trials[j] - max(trials.values())) < 1e-8
        C.append(j)
    assert len({*S.tolist(), *C}) == 6


def test_all_of_the_data_is_its_own_prototype():
    chosen = prototypes(cloud(0), 9)
    assert abs(float(chosen.mmd[-1])) < 1e-12 and sorted(chosen.prototypes.tolist()) == list(range(9))


def test_with_labels_every_class_gets_prototypes():
    digits = data.load("digits")
    chosen = prototypes(digits.x, 20, criticisms=5, labels=digits.y)
    assert len(digits.y[chosen.prototypes].unique()) == 10
    assert chosen.mmd[-1] < 0.05 * chosen.mmd[0]


def test_influential_images_are_those_whose_removal_matters():
    digits = data.load("digits", "train")
    two = digits[(digits.y == 1) | (digits.y == 7)]
    model = regression(two.x[:60], two.y[:60], lam=0.01)
    test, label = two.x[60:61], two.y[60:61]
    helpful, harmful = influential(model, test, label, 5)
    before = model.losses(test, label)
    changes = torch.cat([retrain(model, torch.tensor([i])).losses(test, label) - before for i in range(60)])
    order = changes.argsort(descending=True)
    assert helpful.shape == harmful.shape == (1, 5)
    assert len(set(helpful[0].tolist()) & set(order[:8].tolist())) >= 4 and changes[helpful[0]].min() > 0
    assert len(set(harmful[0].tolist()) & set(order[-8:].tolist())) >= 4 and changes[harmful[0]].max() < 0


def test_bad_input_is_named():
    X = cloud(0)
    with pytest.raises(ValueError, match="m, criticisms: got 7 and 3"):
        prototypes(X, 7, criticisms=3)
    with pytest.raises(ValueError, match="all equal"):
        prototypes(torch.ones(4, 2), 2)
    with pytest.raises(TypeError, match="X: got torch.int64"):
        prototypes(torch.ones(4, 2).long(), 2)
    with pytest.raises(ValueError, match="gamma"):
        kernel(X, gamma=0.0)
    with pytest.raises(TypeError, match="model"):
        influential(None, X, X[:, 0])
    with pytest.raises(ValueError, match="k: got 99"):
        influential(regression(X, torch.arange(9) % 2), X[:1], torch.tensor([0]), 99)
