"""Defences against backdoors: the published index, the trigger found again, who is caught, and who is not."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_backdoors import CORNER, TEST, TRAIN, net, trained

from tmlcourse import models, training
from tmlcourse.poisoning import (
    activation_clustering,
    anomaly_index,
    attack_success,
    backdoor,
    fine_pruning,
    latents,
    neural_cleanse,
    shipped_table,
    spectral_signatures,
    suspects,
    trojan,
    unlearning,
)

# ---- Neural Cleanse


def test_the_index_is_the_papers():
    """The authors' GTSRB model: median 64.466667, scaled spread 13.238736, label 33 with norm 16.117647 -> 3.652087."""
    middle, spread = 64.466667, 13.238736 / 1.4826
    norms = [middle - spread] * 20 + [middle] + [middle + spread] * 21 + [16.117647]
    assert float(anomaly_index(torch.tensor(norms, dtype=torch.float64))[-1]) == pytest.approx(3.652087, abs=1e-6)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.sampled_from([0.0, 3.0]))
def test_the_index_equals_numpy(values, least):
    v = np.array(values)
    spread = max(1.4826 * np.median(np.abs(v - np.median(v))), least)
    expected = np.abs(v - np.median(v)) / spread if spread > 0 else np.zeros(len(v))
    got = anomaly_index(torch.tensor(values, dtype=torch.float64), least=least)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


@pytest.fixture(scope="module")
def planted():
    return {k: trained(backdoor(TRAIN, CORNER, target=k, fraction=0.1, seed=k), k) for k in (0, 4, 7)}


def test_neural_cleanse_names_the_class_and_finds_the_pixels(planted):
    for k, model in planted.items():
        found = neural_cleanse(model, TEST.x[:200], seed=k)
        assert found.flagged == [k]
        assert F.cosine_similarity(found.mask[k].flatten(), CORNER.mask.flatten(), 0) > 0.5
        assert attack_success(model, TEST.x, TEST.y, found.trigger(k), k) > 0.9
        assert found.table["norm"][k] < 0.5 * found.table["norm"].median()
        np.testing.assert_allclose(found.table["norm"], found.mask.flatten(1).sum(1).numpy(), rtol=1e-5)


def test_a_clean_network_is_not_accused():
    for s in range(3):
        assert neural_cleanse(trained(TRAIN, s), TEST.x[:200], seed=s).flagged == []


@pytest.mark.parametrize("lam", [1e-5, 1e-3, 3.0])
def test_the_smallest_trigger_of_a_known_model(lam):
    """z_0 = 10 (x_corner - 1/2), z_1 = 0, z_2 = -100: one pixel is enough for 0 and 1, white and black; 2 is out of reach."""

    def model(x):
        z = 10 * (x[:, 0, 3, 3] - 0.5)
        return torch.stack([z, 0 * z, 0 * z - 100], 1)

    found = neural_cleanse(
        model, torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)), steps=400, lam=lam, seed=0
    )
    for k, colour in ((0, 1.0), (1, 0.0)):
        assert found.mask[k].flatten().argmax() == 15 and found.mask[k].sum() < 1.5
        assert abs(found.pattern[k, 0, 3, 3] - colour) < 0.4
    assert found.table["success"][2] == 0 and found.table["success"][0] > 0.9


def test_neural_cleanse_is_reproducible_and_leaves_no_trace():
    model = net().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    a, b = (neural_cleanse(model, TEST.x[:20], steps=20, seed=3) for _ in range(2))
    assert torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern) and a.table.equals(b.table)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert a.mask.min() >= 0 and a.mask.max() <= 1 and a.pattern.min() >= 0 and a.pattern.max() <= 1
    one = neural_cleanse(models.mlp((3, 5, 7), 2, hidden=(4,), seed=0), torch.rand(1, 3, 5, 7), steps=10, seed=0)
    assert one.mask.shape == (2, 1, 5, 7) and one.pattern.shape == (2, 3, 5, 7)
    wide = neural_cleanse(
        models.mlp((1, 5, 7), hidden=(4,), seed=0).double(), torch.rand(4, 1, 5, 7).double(), steps=10
    )
    assert wide.mask.dtype == torch.float64


def test_unlearning_closes_the_door(planted):
    for k, model in planted.items():
        found = neural_cleanse(model, TEST.x[:200], seed=k)
        mended = copy.deepcopy(model)
        training.fit(mended, TRAIN, loss=unlearning(found.trigger(k)), epochs=10, seed=0)
        assert (
            attack_success(mended, TEST.x, TEST.y, CORNER, k) < 0.2 < attack_success(model, TEST.x, TEST.y, CORNER, k)
        )
        assert training.accuracy(mended, TEST.x, TEST.y) > training.accuracy(model, TEST.x, TEST.y) - 0.03


# ---- hidden layers


@given(st.integers(0, 50), st.sampled_from([torch.float32, torch.float64]))
def test_scores_are_squared_projections_on_the_first_component(seed, dtype):
    rng = np.random.default_rng(seed)
    rows, y = rng.normal(size=(24, 5)) * [3, 1, 1, 1, 1], rng.integers(0, 3, 24)
    got = spectral_signatures(torch.tensor(rows, dtype=dtype), torch.tensor(y))
    assert got.dtype == dtype and (got >= 0).all()
    for k in np.unique(y):
        away = rows[y == k] - rows[y == k].mean(0)
        values, vectors = np.linalg.eigh(away.T @ away)
        np.testing.assert_allclose(got[torch.tensor(y == k)].numpy(), (away @ vectors[:, -1]) ** 2, atol=1e-4)
        if dtype == torch.float64:
            assert float(got[torch.tensor(y == k)].sum()) == pytest.approx(values[-1])


def two_groups(seed=0):
    """Ten classes of 50; a fifth of class 3 has another centre."""
    g = torch.Generator().manual_seed(seed)
    rows, y = torch.randn(500, 6, generator=g), torch.arange(500) % 10
    bad = torch.zeros(500, dtype=torch.bool)
    bad[(y == 3).nonzero().squeeze(1)[:10]] = True
    rows[bad] += torch.tensor([8.0, 0, 0, 0, 0, 0])
    return rows, y, bad


def test_a_second_centre_is_found():
    rows, y, bad = two_groups()
    gone = suspects(spectral_signatures(rows, y), y, fraction=0.2)
    assert gone[bad].all() and (gone & (y == 3)).sum() == 15 and gone.sum() == 150
    found = activation_clustering(rows, y)
    assert found.flagged == [3] and torch.equal(found.small & (y == 3), bad)
    assert found.table.set_index("label")["size"][3] == pytest.approx(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = activation_clustering(torch.ones(9, 2), torch.zeros(9, dtype=torch.int64))
    assert same.flagged == [] and same.table["silhouette"][0] == 0


def test_all_to_all_shows_in_the_hidden_layer():
    """Each class gets images of one other class, a compact second group: both methods see it, Neural Cleanse does not."""
    for s in range(2):
        poisoned = backdoor(TRAIN, CORNER, target="next", fraction=0.3, seed=s)
        model = trained(poisoned, s)
        rows = latents(model, poisoned.x)
        scores = spectral_signatures(rows, poisoned.y)
        classes = [poisoned.y == k for k in range(10)]
        area = np.mean([roc_auc_score(poisoned.where[c].numpy(), scores[c].numpy()) for c in classes])
        assert area > 0.8
        assert len(activation_clustering(rows, poisoned.y).flagged) >= 4
        assert neural_cleanse(model, TEST.x[:200], seed=s).flagged == []


# ---- fine-pruning


def test_pruning_takes_the_sleepiest_units_first_and_as_many_as_accuracy_allows():
    model = trained(TRAIN)
    before = copy.deepcopy(model.state_dict())
    pruned, table = fine_pruning(model, TEST, drop=0.02)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    h = model[:-1](TEST.x).mean(0)
    assert table["activation"].is_monotonic_increasing
    np.testing.assert_allclose(table["activation"], h[table["unit"].tolist()].detach().numpy(), rtol=1e-4, atol=1e-6)
    clean, gone = training.accuracy(model, TEST.x, TEST.y), int(table["pruned"].sum())
    reached = training.accuracy(pruned, TEST.x, TEST.y)
    assert reached >= clean - 0.02 and reached == pytest.approx(table["accuracy"][gone - 1])
    assert table["accuracy"][gone] < clean - 0.02  # one more would be too many
    assert (pruned[:-1](TEST.x)[:, table["unit"][:gone].tolist()] == 0).all()


def test_pruning_removes_a_trojan_and_tuning_does_not_wake_it():
    model = trained(TRAIN)
    bad = trojan(model, CORNER, 3)
    assert attack_success(bad, TEST.x, TEST.y, CORNER, 3) == 1
    tuned, table = fine_pruning(bad, TEST, tune=lambda m: training.fit(m, TRAIN, epochs=1, seed=0))
    assert table["unit"][0] == 32 or table["activation"][0] == 0  # the new unit sleeps on clean images
    assert attack_success(tuned, TEST.x, TEST.y, CORNER, 3) < 0.1
    assert training.accuracy(tuned, TEST.x, TEST.y) > training.accuracy(model, TEST.x, TEST.y) - 0.03


def test_pruning_a_convolution():
    model = models.small_cnn((1, 8, 8), seed=0)
    pruned, table = fine_pruning(model, TEST[:50], layer=2, drop=0.0)
    assert len(table) == 32
    assert pruned[:4](TEST.x[:5])[:, table["unit"][table["pruned"]].tolist()].abs().sum() == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: neural_cleanse(net(), TEST.x * 300), ValueError, "x: got values"),
        (lambda: neural_cleanse(net(), TEST.x.flatten(1)), ValueError, "x: got shape"),
        (lambda: neural_cleanse(net(), TEST.x, steps=5), ValueError, "steps: got 5"),
        (lambda: neural_cleanse(net(), TEST.x, success=1.5), ValueError, "success: got 1.5"),
        (lambda: neural_cleanse(net(), TEST.x, lam=0.0), ValueError, "lam: got 0"),
        (lambda: anomaly_index([1.0]), ValueError, "values: got list"),
        (lambda: unlearning(CORNER, share=0.0), ValueError, "share: got 0"),
        (lambda: unlearning(torch.ones(3)), TypeError, "trigger: got Tensor"),
        (lambda: latents(net(), TEST.x, layer=9), ValueError, "layer: got 9"),
        (
            lambda: spectral_signatures(torch.ones(3), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "values: got shape",
        ),
        (lambda: spectral_signatures(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)), ValueError, "y: got shape"),
        (
            lambda: suspects(torch.ones(3), torch.zeros(3, dtype=torch.int64), fraction=0.9),
            ValueError,
            "fraction: got 0.9",
        ),
        (
            lambda: activation_clustering(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "got 2 examples",
        ),
        (lambda: fine_pruning(models.linear((1, 8, 8)), TEST), ValueError, r"layer: got None, want one of \[\]"),
        (lambda: fine_pruning(net(), TEST, layer=2), ValueError, r"layer: got 2, want one of \[1, 3\]"),
        (lambda: fine_pruning(net(), TEST, drop=-1.0), ValueError, "drop: got -1"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_shipped_table_says_what_the_chapter_says():
    """Ten clean and ten planted networks on each of two data sets: exactly the planted class is flagged, or none."""
    table = shipped_table()
    assert table.groupby(["data", "planted"]).size().tolist() == [10] * 4
    truth = table["target"].astype(str).where(table["planted"], "")
    assert (table["flagged"] == truth).all()
    assert (table["success"][table["planted"]] > 0.9).all() and (table["covered"][table["planted"]] == 1).all()
