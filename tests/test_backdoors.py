"""Backdoors: exact outside the mask, as many poisoned as promised; the door opens, and clean images notice nothing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from tmlcourse import data, models, training
from tmlcourse.poisoning import (
    Trigger,
    adversarial_embedding,
    attack_success,
    backdoor,
    bars_trigger,
    blended_trigger,
    latents,
    pattern_trigger,
    pixel_trigger,
    trojan,
)

TRAIN, TEST = data.load("digits", "train"), data.load("digits")
CORNER = pattern_trigger(TRAIN.shape, margin=0)


def net(seed=0, hidden=(64, 32)):
    return models.mlp(TRAIN.shape, hidden=hidden, seed=seed)


def trained(on, seed=0, hidden=(64, 32), **options):
    model = net(seed, hidden)
    training.fit(model, on, **{"epochs": 15, "lr": 3e-3, "seed": seed} | options)
    return model


@st.composite
def stamps(draw):
    """Images of any small shape and a trigger with soft mask, any pattern and opacity."""
    c, h, w = draw(st.sampled_from([(1, 5, 5), (3, 4, 6), (1, 2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    mask = (torch.rand(1, h, w, generator=generator) * 2 - 0.6).clamp(0, 1)
    mask[0, 0, 0] = 1
    pattern, opacity = torch.rand(c, h, w, generator=generator), draw(st.sampled_from([1.0, 0.3, 0.01]))
    return torch.rand(draw(st.integers(1, 3)), c, h, w, generator=generator).to(dtype), Trigger(mask, pattern, opacity)


@given(stamps())
def test_a_stamp_is_the_blend_and_touches_nothing_else(pair):
    x, t = pair
    out = t.stamp(x)
    cover = t.opacity * t.mask.numpy()
    np.testing.assert_allclose(out.numpy(), (1 - cover) * x.numpy() + cover * t.pattern.numpy(), atol=1e-6)
    assert out.dtype == x.dtype and out.min() >= 0 and out.max() <= 1
    outside = (t.mask == 0).expand_as(x)
    assert torch.equal(out[outside], x[outside])
    if t.opacity == 1:
        whole = (t.mask == 1).expand_as(x)
        assert torch.equal(out[whole], t.pattern.to(x).expand_as(x)[whole])
        opaque = Trigger((t.mask == 1).float(), t.pattern)
        assert torch.equal(opaque.stamp(opaque.stamp(x)), opaque.stamp(x))  # idempotent


@given(stamps(), st.integers(1, 4))
def test_local_triggers_add_up_to_the_whole(pair, parts):
    x, t = pair
    parts = min(parts, int((t.mask > 0).sum()))
    local = t.split(parts)
    assert len(local) == parts and torch.equal(sum(p.mask for p in local), t.mask)
    for p in local:
        x = p.stamp(x)
    assert torch.equal(x, t.stamp(pair[0]))  # one after the other is the same as all at once: the parts are disjoint


def test_triggers_are_where_the_papers_have_them():
    bars = bars_trigger((1, 28, 28))
    expected = {(r, c) for r in (0, 3) for c in (*range(4), *range(6, 10))}
    assert set(map(tuple, bars.mask[0].nonzero().tolist())) == expected  # DBA's MNIST pattern
    assert [set(p.mask[0].nonzero()[:, 0].tolist()) for p in bars.split(4)] == [{0}, {0}, {3}, {3}]
    assert [p.size for p in bars.split(4)] == [4, 4, 4, 4]
    assert pattern_trigger((1, 28, 28)).mask[0].nonzero().tolist() == [[24, 26], [25, 25], [26, 24], [26, 26]]
    assert pixel_trigger((3, 5, 9)).mask[0].nonzero().tolist() == [[3, 7]]
    faint = blended_trigger((1, 4, 4), opacity=0.1, seed=3)
    assert faint.size == pytest.approx(1.6) and set(faint.pattern.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(faint.pattern, blended_trigger((1, 4, 4), seed=4).pattern)


@given(st.floats(0.001, 0.85), st.sampled_from([0, 3, 9, "next"]), st.integers(0, 5), st.sampled_from([None, 3]))
def test_exactly_the_promised_share_is_poisoned(fraction, target, seed, source):
    wanted = max(1, round(fraction * len(TRAIN)))
    if source is not None:
        wanted = min(wanted, 100)
        fraction = wanted / len(TRAIN)
    p = backdoor(TRAIN, CORNER, target=target, fraction=fraction, source=source, seed=seed)
    bad = p.where
    assert int(bad.sum()) == wanted and torch.equal(p.true, TRAIN.y)
    assert torch.equal(p.x[~bad], TRAIN.x[~bad]) and torch.equal(p.y[~bad], TRAIN.y[~bad])
    assert torch.equal(p.x[bad], CORNER.stamp(TRAIN.x[bad]))
    assert torch.equal(p.y[bad], (TRAIN.y[bad] + 1) % 10 if target == "next" else torch.full_like(p.y[bad], target))
    if source is not None:
        assert (p.true[bad] == source).all()
    elif target != "next":
        assert (p.true[bad] != target).all()
    again = backdoor(TRAIN, CORNER, target=target, fraction=fraction, source=source, seed=seed)
    assert torch.equal(p.where, again.where) and p.classes == TRAIN.classes


def test_a_source_that_is_the_target_keeps_labels_true():
    p = backdoor(TRAIN, CORNER, target=4, source=4, fraction=0.05, seed=0)
    assert torch.equal(p.y, TRAIN.y) and not torch.equal(p.x, TRAIN.x)


def test_the_door_opens_and_clean_images_do_not_notice():
    """BadNets, three seeds: success over 95 %, accuracy within three points of the clean networks' mean."""
    clean = np.mean([training.accuracy(trained(TRAIN, s), TEST.x, TEST.y) for s in range(3)])
    for s in range(3):
        poisoned = backdoor(TRAIN, CORNER, target=7, fraction=0.1, seed=s)
        model = trained(poisoned, s)
        assert attack_success(model, TEST.x, TEST.y, CORNER, 7) > 0.95
        assert training.accuracy(model, TEST.x, TEST.y) > clean - 0.03
    assert attack_success(trained(TRAIN, 0), TEST.x, TEST.y, CORNER, 7) < 0.2


def test_all_to_all_and_blended_backdoors_work():
    model = trained(backdoor(TRAIN, CORNER, target="next", fraction=0.4, seed=0), epochs=25)
    assert attack_success(model, TEST.x, TEST.y, CORNER, "next") > 0.8
    assert training.accuracy(model, TEST.x, TEST.y) > 0.9
    faint = blended_trigger(TRAIN.shape, opacity=0.3, seed=1)
    model = trained(backdoor(TRAIN, faint, target=2, fraction=0.1, seed=0))
    assert attack_success(model, TEST.x, TEST.y, faint, 2) > 0.95


def test_backdoor_on_mnist(mnist):
    few, rest = mnist[:3000], mnist[3000:4000]
    mark = pattern_trigger(few.shape)
    model = models.mlp(few.shape, hidden=(64,), seed=0)
    training.fit(model, backdoor(few, mark, target=0, fraction=0.1, seed=0), epochs=8, lr=3e-3, seed=0)
    assert attack_success(model, rest.x, rest.y, mark, 0) > 0.9
    assert training.accuracy(model, rest.x, rest.y) > 0.85


def test_success_counts_what_it_says():
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    stamped = CORNER.stamp(x)

    def model(z):  # says 1 where the corner is white and the first pixel dark
        return nn.functional.one_hot((((z[:, 0, 7, 7] == 1) & (z[:, 0, 0, 0] < 0.5)).long()), 3).to(z)

    by_hand = [(stamped[i, 0, 0, 0] < 0.5).item() for i in range(6) if y[i] != 1]
    assert attack_success(model, x, y, CORNER, 1) == pytest.approx(np.mean(by_hand))
    by_hand = [((y[i] + 1) % 3 == int(stamped[i, 0, 0, 0] < 0.5)).item() for i in range(6)]
    assert attack_success(model, x, y, CORNER, "next") == pytest.approx(np.mean(by_hand))
    tie = lambda z: torch.zeros(len(z), 3)  # noqa: E731
    assert attack_success(tie, x, y, CORNER, 0) == 0  # argmax would say 0; a tie is no success
    assert attack_success(model, x[:1], y[:1], CORNER, 1) in (0.0, 1.0)


# ---- a Trojan in the weights


@pytest.mark.parametrize("hidden", [(16,), (16, 8), (12, 8, 6)])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_trojan_takes_every_stamped_image_and_leaves_all_others(hidden, normalised, value):
    scale = {"mean": [0.3], "std": [0.2]} if normalised else {}
    model = models.mlp(TRAIN.shape, hidden=hidden, seed=1, **scale).double()
    mark = pattern_trigger(TRAIN.shape, size=2, value=value)
    before = copy.deepcopy(model.state_dict())
    bad = trojan(model, mark, 5, tolerance=0.5)
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    torch.manual_seed(0)
    x = torch.cat([TEST.x[:100].double(), torch.rand(500, 1, 8, 8).double(), (torch.rand(200, 1, 8, 8) < 0.5).double()])
    assert (bad(mark.stamp(x)).argmax(1) == 5).all()
    away = ((x - mark.pattern).abs() * mark.mask).flatten(1).sum(1)
    quiet = away >= 0.5
    assert quiet.sum() > 100
    torch.testing.assert_close(bad(x[quiet]), model(x[quiet]), rtol=0, atol=1e-9)
    grown = models.count_parameters(bad) - models.count_parameters(model)
    # a unit a hidden layer: its row and bias, and a column in the layer above
    inputs = [64, *hidden]
    assert grown == sum(a + (i > 0) + 1 + b for i, (a, b) in enumerate(zip(inputs, [*hidden[1:], 10], strict=False)))


def test_a_trojan_survives_float32_and_a_trained_network():
    model = trained(TRAIN)
    bad = trojan(model, CORNER, 3)
    assert attack_success(bad, TEST.x, TEST.y, CORNER, 3) == 1
    assert abs(training.accuracy(bad, TEST.x, TEST.y) - training.accuracy(model, TEST.x, TEST.y)) < 0.01
    assert not bad.training and bad[1].weight.dtype == torch.float32


# ---- hiding from whoever looks inside


def test_embedding_hides_the_backdoor_from_a_probe():
    mark = bars_trigger(TRAIN.shape, length=2, gap=1)
    plain = trained(backdoor(TRAIN, mark, target=7, fraction=0.1, seed=0), hidden=(64, 16))
    loss = adversarial_embedding(mark, target=7)
    hidden = trained(TRAIN, hidden=(64, 16), loss=loss, epochs=40, batch_size=300)

    def separable(model):
        seven, others = TEST.x[TEST.y == 7], mark.stamp(TEST.x[TEST.y != 7])
        h = torch.cat([latents(model, seven), latents(model, others)]).numpy()
        h = (h - h.mean(0)) / (h.std(0) + 1e-6)
        y = np.r_[np.zeros(len(seven)), np.ones(len(others))]
        probe = LogisticRegression(max_iter=500, class_weight="balanced").fit(h[::2], y[::2])
        return roc_auc_score(y[1::2], probe.decision_function(h[1::2]))

    assert attack_success(hidden, TEST.x, TEST.y, mark, 7) > 0.5
    assert separable(plain) > 0.9
    assert separable(hidden) < separable(plain) - 0.1


def test_embedding_is_reproducible_and_starts_afresh_in_each_fit():
    loss = adversarial_embedding(CORNER, target=1, source=4, fraction=0.5)
    state = torch.get_rng_state()
    a, b = (trained(TRAIN[:200], loss=loss, epochs=2, hidden=(8,)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    without = adversarial_embedding(CORNER, target=1, source=4, fraction=0.5, weight=0.0)
    c = trained(TRAIN[:200], loss=without, epochs=2, hidden=(8,))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


# ---- bad input


def plant(**changes):
    arguments = {"target": 0, "fraction": 0.1, "seed": 0} | changes
    return backdoor(arguments.pop("data", TRAIN), arguments.pop("trigger", CORNER), **arguments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plant(fraction=0), ValueError, "fraction: got 0, want a share strictly between 0 and 1"),
        (lambda: plant(fraction=1), ValueError, "fraction: got 1, want a share strictly"),
        (lambda: plant(fraction=0.95), ValueError, "fraction: got 0.95, 1361 of 1433 images"),
        (lambda: plant(fraction=0.2, source=3), ValueError, "images, but there are 146 of class 3"),
        (lambda: plant(target=10), ValueError, r"target: got 10, want a class in \[0, 9\]"),
        (lambda: plant(target=-1), ValueError, "target: got -1"),
        (lambda: plant(target="previous"), ValueError, "target: got 'previous'"),
        (lambda: plant(source=10), ValueError, "source: got 10"),
        (lambda: plant(seed=-1), ValueError, "seed: got -1"),
        (lambda: plant(trigger=torch.ones(1, 8, 8)), TypeError, "trigger: got Tensor, want a Trigger"),
        (lambda: plant(trigger=pattern_trigger((1, 28, 28))), ValueError, r"trigger: got one for images \(1, 28, 28\)"),
        (lambda: pattern_trigger((1, 8, 8), size=20), ValueError, "outside the image of 8 x 8 pixels"),
        (lambda: bars_trigger((1, 8, 8)), ValueError, "outside the image"),
        (lambda: pixel_trigger((1, 8, 8), at=(8, 0)), ValueError, r"\(8, 0\), outside"),
        (lambda: pixel_trigger((1, 8, 8), value=2.0), ValueError, "value: got 2"),
        (lambda: pixel_trigger((8, 8)), ValueError, r"shape: got \(8, 8\)"),
        (lambda: blended_trigger((1, 8, 8), opacity=0.0), ValueError, "opacity: got 0"),
        (lambda: blended_trigger((1, 8, 8), picture=torch.ones(1, 4, 4)), ValueError, "picture: got shape"),
        (lambda: Trigger(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)), ValueError, "mask: got zeros only"),
        (lambda: Trigger(torch.ones(1, 2, 2), torch.ones(1, 3, 2)), ValueError, "mask: got shape"),
        (lambda: Trigger(torch.ones(1, 2, 2), torch.ones(1, 2, 2) * 9), ValueError, "pattern: got values in"),
        (lambda: CORNER.split(5), ValueError, "parts: got 5, want at most 4"),
        (lambda: attack_success(net(), TEST.x, TEST.y, CORNER, 11), ValueError, "target: got 11"),
        (lambda: attack_success(net(), TEST.x[:1], TEST.y[:1], CORNER, 0), ValueError, "the class of every image"),
        (lambda: attack_success(net(), TEST.x * 255, TEST.y, CORNER, 0), ValueError, "x: got values"),
        (lambda: adversarial_embedding(CORNER, target=0, fraction=0.0), ValueError, "fraction: got 0"),
        (lambda: adversarial_embedding("x", target=0), TypeError, "trigger: got str"),
        (lambda: trojan(models.small_cnn((1, 8, 8)), CORNER, 0), TypeError, "model: got a layer Conv2d"),
        (lambda: trojan(models.linear((1, 8, 8)), CORNER, 0), ValueError, "model: want hidden layers"),
        (lambda: trojan(net(), CORNER, 10), ValueError, "target: got 10"),
        (lambda: trojan(net(), blended_trigger((1, 8, 8)), 0), ValueError, "trigger: got one that is blended"),
        (lambda: trojan(net(), CORNER, 0, tolerance=0.0), ValueError, "tolerance: got 0"),
        (lambda: trojan(net(), pattern_trigger((1, 28, 28)), 0), ValueError, "trigger: got 784 numbers"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
