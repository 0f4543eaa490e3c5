"""Clean-label poison: closed forms, a label that is kept, a ball that is not left, and a target that flips."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import nn

from tmlcourse import data, models, pretrained, training
from tmlcourse.poisoning import clean_label, feature_collision, fit, gradient_matching, logistic, meta_poison, scores
from tmlcourse.threat import Linf


def linear_map(inputs=12, outputs=5, n=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, inputs, generator=gen, dtype=torch.float64)
    base, target = torch.rand(2, n, inputs, generator=gen, dtype=torch.float64)
    return W, base, target, lambda x: x @ W.T


def tiny(n=40, seed=0, shape=(1, 4, 3), classes=3, dtype=torch.float32):
    """A small trained-looking network on random images that are not square."""
    gen = torch.Generator().manual_seed(seed)
    train = SimpleNamespace(x=torch.rand(n, *shape, generator=gen, dtype=dtype), y=torch.arange(n) % classes)
    return (
        models.mlp(shape, classes, hidden=(8,), seed=seed).to(dtype),
        train,
        torch.rand(1, *shape, generator=gen, dtype=dtype),
    )


# ---- feature collision


@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
def test_for_linear_features_the_collision_is_the_closed_form(beta):
    """(W'W + beta I)^-1 (W' phi_t + beta x_b), where the box does not bind: images near the middle grey."""
    W, base, target, phi = linear_map()
    base, target = 0.45 + 0.1 * base, 0.45 + 0.1 * target
    found = feature_collision(phi, base, target, beta=beta, steps=400)
    A = W.T @ W + beta * torch.eye(12, dtype=torch.float64)
    want = torch.linalg.solve(A, (phi(target) @ W + beta * base).T).T
    assert want.min() >= 0 and want.max() <= 1 and torch.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_in_the_box_and_the_ball_the_collision_equals_bounded_least_squares(eps):
    W, base, target, phi = linear_map(seed=1)
    found = feature_collision(phi, base, target, beta=0.3, steps=600, eps=eps)
    A = np.vstack([W.numpy(), 0.3**0.5 * np.eye(12)])
    for x, a, t in zip(found.numpy(), base.numpy(), phi(target).numpy(), strict=True):
        r = 1.0 if eps is None else eps
        bounds = np.maximum(a - r, 0) - 1e-12, np.minimum(a + r, 1) + 1e-12
        best = lsq_linear(A, np.concatenate([t, 0.3**0.5 * a]), bounds=bounds, tol=1e-14).x
        assert np.abs(x - best).max() < 1e-5


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.3, None]), st.sampled_from([0.0, 0.3, 0.9]))
def test_a_collision_stays_in_its_ball_and_never_gets_worse(seed, eps, watermark):
    model, train, target = tiny(seed=seed)
    phi, base = model[:-1], train.x[:3]
    found = feature_collision(phi, base, target, beta=0.2, steps=5, eps=eps, watermark=watermark)
    ball = Linf(1.0 if eps is None else eps)
    assert ball.contains(found, base).all() and found.dtype == base.dtype and found.shape == base.shape
    centre = ball.project((1 - watermark) * base + watermark * target, base)
    goal = phi(target)

    def value(x):
        return (phi(x) - goal).square().sum(1) + 0.2 * (x - centre).flatten(1).square().sum(1)

    assert (value(found) <= value(centre) + 1e-6).all()
    if eps == 0:
        assert found.equal(base)
    alone = feature_collision(phi, base[1:2], target, beta=0.2, steps=5, eps=eps, watermark=watermark)
    assert torch.allclose(alone, found[1:2], atol=1e-4)


def test_three_poisons_flip_the_target_of_a_retrained_last_layer_and_little_else():
    """Poison Frogs at small scale: fewer examples than features, right labels, poison within 0.4 of its base."""
    train, test = data.load("digits-28x28", "train"), data.load("digits-28x28")
    phi = pretrained.load("digits-28x28-standard")[:-1]  # 200 features
    four, nine = (train.x[train.y == label][:30] for label in (4, 9))
    targets, others = test.x[test.y == 9][:4], test[(test.y == 4) | (test.y == 9)]
    with torch.no_grad():
        z, z_target, z_other = (phi(x).double() / 30 for x in (torch.cat([four, nine]), targets, others.x))
    far = torch.cdist(z_target, z[:30])
    base = four[far.topk(3, largest=False).indices.flatten()]
    poison = feature_collision(phi, base, targets.repeat_interleave(3, 0), beta=0.05, steps=80, eps=0.4)
    assert Linf(0.4).contains(poison, base).all()
    with torch.no_grad():
        z_poison = (phi(poison).double() / 30).view(4, 3, -1)
    assert ((z_poison[:, 0] - z_target).norm(dim=1) < 0.5 * far.amin(1)).all()
    y, sign = torch.cat([torch.ones(30), -torch.ones(30)]).double(), torch.where(others.y == 4, 1.0, -1.0)
    clean = fit(logistic(1e-4), z, y).model
    assert (scores(clean, z_target) < 0).all()
    flipped, right = 0, ((scores(clean, z_other) > 0) == (sign > 0)).double().mean()
    for k in range(4):
        fooled = fit(logistic(1e-4), torch.cat([z, z_poison[k]]), torch.cat([y, y[:3]])).model
        flipped += int(scores(fooled, z_target[k : k + 1]) > 0)
        assert ((scores(fooled, z_other) > 0) == (sign > 0)).double().mean() > right - 0.15
    assert flipped >= 3


# ---- gradient matching


def cosine_by_hand(model, x, label, target):
    """1 - cos of the two gradients, by backward passes on a copy."""
    grads = []
    for images in (target, x):
        copied = copy.deepcopy(model)
        F.cross_entropy(copied(images), torch.full((len(images),), label), reduction="sum").backward()
        grads.append(torch.cat([p.grad.flatten() for p in copied.parameters()]))
    return 1 - F.cosine_similarity(*grads, dim=0)


@settings(max_examples=25)
@given(st.integers(0, 10**4), st.sampled_from([0.0, 0.05, 0.4]), st.integers(0, 2))
def test_matched_poison_keeps_labels_and_ball_and_reports_its_cosine(seed, eps, label):
    model, train, target = tiny(seed=seed)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = gradient_matching(model, train, target, label, eps=eps, budget=0.15, steps=4, restarts=2, seed=seed)
    assert found.y.equal(train.y) and len(found) == 40 and len(found.where) == 6
    assert (train.y[found.where] == label).all() and len(found.where.unique()) == 6
    rest = torch.ones(40, dtype=torch.bool)
    rest[found.where] = False
    assert found.x[rest].equal(train.x[rest]) and Linf(eps).contains(found.x, train.x).all()
    assert 0 <= found.loss <= 2
    assert abs(found.loss - cosine_by_hand(model, found.x[found.where], label, target)) < 1e-4
    assert found.loss <= cosine_by_hand(model, train.x[found.where], label, target) + 1e-5
    assert all(a.equal(b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training
    assert before[1].equal(torch.get_rng_state())
    again = gradient_matching(model, train, target, label, eps=eps, budget=0.15, steps=4, restarts=2, seed=seed)
    assert again.x.equal(found.x) and again.loss == found.loss


def test_the_cosine_of_a_linear_model_is_its_closed_form():
    """grad_W l = (softmax(z) - e_y) x^T, grad_b l = softmax(z) - e_y."""
    gen = torch.Generator().manual_seed(3)
    train = SimpleNamespace(x=torch.rand(12, 1, 2, 5, generator=gen, dtype=torch.float64), y=torch.arange(12) % 2)
    model, target = (
        models.linear((1, 2, 5), 2, seed=0).double(),
        torch.rand(2, 1, 2, 5, generator=gen, dtype=torch.float64),
    )
    found = gradient_matching(model, train, target, 1, eps=0.1, budget=0.25, steps=3, seed=0)

    def gradient(x):
        rows = torch.cat([x.flatten(1), torch.ones(len(x), 1, dtype=x.dtype)], 1)
        return ((model(x).softmax(1) - torch.tensor([0.0, 1.0])).T @ rows).flatten().detach()

    a, b = gradient(target), gradient(found.x[found.where])
    assert abs(found.loss - (1 - a @ b / (a.norm() * b.norm()))) < 1e-12 and found.x.dtype == torch.float64


def test_frozen_parameters_do_not_count():
    model, train, target = tiny()
    model[:-1].requires_grad_(False)
    found = gradient_matching(model, train, target, 0, eps=0.2, budget=0.1, steps=2, restarts=1, seed=0)
    z = [model[:-1](x).detach() for x in (target, found.x[found.where])]
    assert abs(found.loss - cosine_by_hand(model[-1], z[1], 0, z[0])) < 1e-5
    assert not any(p.requires_grad for p in model[:-1].parameters())


def test_several_networks_are_matched_on_average():
    nets = [tiny(seed=s)[0] for s in (0, 1)]
    _, train, target = tiny()
    found = gradient_matching(nets, train, target, 0, eps=0.2, budget=0.1, steps=3, seed=0)
    losses = [cosine_by_hand(net, found.x[found.where], 0, target) for net in nets]
    assert abs(found.loss - sum(losses) / 2) < 1e-5


def four_or_nine(name="digits"):
    train, test = data.load(name, "train"), data.load(name)
    pick = [d[(d.y == 4) | (d.y == 9)] for d in (train, test)]
    return [data.Dataset(d.x, (d.y == 9).long(), ("4", "9"), d.name) for d in pick]


def retrained(train, seed, epochs=15):
    model = models.mlp(train.x.shape[1:], 2, hidden=(50,), seed=seed)
    sgd = {"lr": 0.2, "batch_size": 20, "optimizer": torch.optim.SGD, "schedule": training.constant}
    training.fit(model, train, epochs=epochs, seed=seed, **sgd)
    return model


def attacked(attack, train, test, cases, **options):
    """For each target: is it misread by a network trained from scratch, how surely, and the accuracy lost elsewhere."""
    ages = [retrained(train, seed, epochs) for seed, epochs in ((1, 1), (2, 3), (3, 10))]
    clean = retrained(train, 0)
    targets = test.x[(test.y == 1) & (clean(test.x).argmax(1) == 1)][:cases]
    for k in range(cases):
        found = attack(ages, train, targets[k : k + 1], 0, eps=0.3, steps=25, restarts=1, seed=k, **options)
        victim = retrained(found, 10 + k)
        before, after = (training.accuracy(h, test.x, test.y) for h in (clean, victim))
        p = [float(h(targets[k : k + 1]).softmax(1)[0, 0].detach()) for h in (clean, victim)]
        yield p[1] > 0.5, p[1] - p[0], before - after


def test_networks_trained_from_scratch_are_pushed_towards_the_wrong_answer():
    train, test = four_or_nine("digits-28x28")
    flips, pushed, lost = zip(*attacked(gradient_matching, train[:100], test, 3, budget=0.3), strict=True)
    assert sum(pushed) / 3 > 0.1 and max(lost) < 0.12


@pytest.mark.parametrize(("attack", "least", "options"), [(gradient_matching, 2, {}), (meta_poison, 1, {"lr": 0.2})])
def test_networks_trained_from_scratch_on_mnist_misread_the_target_and_little_else(mnist, attack, least, options):
    """Witches' Brew and MetaPoison at small scale: a fifth of 200 images, eps = 0.3."""
    both = mnist[(mnist.y == 4) | (mnist.y == 9)]
    both = data.Dataset(both.x, (both.y == 9).long(), ("4", "9"), mnist.name)
    flips, pushed, lost = zip(*attacked(attack, both[:200], both[1000:1500], 3, budget=0.2, **options), strict=True)
    assert sum(flips) >= least and sum(pushed) / 3 > 0.1 and max(lost) < 0.06


# ---- unrolling


def unrolled_case(dtype=torch.float64):
    model, train, target = tiny(n=12, dtype=dtype)
    train.x = train.x.to(dtype)
    return model, train, target, torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]]), train.x[9:].clone()


def test_unrolled_steps_are_the_steps_of_sgd():
    model, train, target, batches, x = unrolled_case()
    value = clean_label._unrolled(model, train, batches, x, target, 2, 0.25, 0.5)
    copied = copy.deepcopy(model)
    sgd = torch.optim.SGD(copied.parameters(), lr=0.5)
    for batch in batches:
        sgd.zero_grad()
        loss = 0.75 * F.cross_entropy(copied(train.x[batch]), train.y[batch])
        (loss + 0.25 * F.cross_entropy(copied(x), torch.full((3,), 2))).backward()
        sgd.step()
    assert torch.allclose(value, F.cross_entropy(copied(target), torch.tensor([2])), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_gradient_through_training_equals_finite_differences(steps):
    model, train, target, batches, x = unrolled_case()
    x.requires_grad_()
    value = clean_label._unrolled(model, train, batches[:steps], x, target, 2, 0.25, 0.5)
    (grad,) = torch.autograd.grad(value, x)
    gen = torch.Generator().manual_seed(0)
    for _ in range(5):
        v = torch.randn(x.shape, generator=gen, dtype=x.dtype)
        h = 1e-6
        up, down = (
            clean_label._unrolled(model, train, batches[:steps], (x + s * h * v).detach(), target, 2, 0.25, 0.5).item()
            for s in (1, -1)
        )
        assert abs((up - down) / (2 * h) - (grad * v).sum().item()) < 1e-7


def test_meta_poison_keeps_its_promises():
    model, train, target = tiny()
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    options = {"budget": 0.1, "steps": 4, "lr": 0.5, "batch_size": 8, "seed": 0}
    start = meta_poison([model], train, target, 0, eps=0.0, **options)
    found = meta_poison([model], train, target, 0, eps=0.2, **options)
    assert start.x.equal(train.x) and found.loss < start.loss
    assert found.y.equal(train.y) and Linf(0.2).contains(found.x, train.x).all() and (train.y[found.where] == 0).all()
    assert meta_poison([model], train, target, 0, eps=0.2, **options).x.equal(found.x)
    assert all(a.equal(b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert before[1].equal(torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


# ---- a peer, and bad input


def test_the_cosine_reached_is_no_worse_than_the_peers():
    """The adversarial robustness toolbox's gradient matching, on the same network, with at least as many steps."""
    art = pytest.importorskip("art.attacks.poisoning.gradient_matching_attack")
    from art.estimators.classification import PyTorchClassifier

    train, test = four_or_nine()
    model, target = retrained(train, 0), test.x[test.y == 1][:1]
    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), train.shape, 2, clip_values=(0, 1),
                                optimizer=torch.optim.SGD(model.parameters(), lr=0.1), device_type="cpu")  # fmt: skip
    np.random.seed(0)
    torch.manual_seed(0)
    peer = art.GradientMatchingAttack(wrapped, percent_poison=0.1, epsilon=0.2, max_trials=1, max_epochs=40,
                                      learning_rate_schedule=([0.1, 0.01], [25, 35]), verbose=0)  # fmt: skip
    own = train.x.numpy(), np.eye(2, dtype=np.float32)[train.y.numpy()]
    x, _ = peer.poison(target.numpy(), np.array([0]), *own)
    x = torch.from_numpy(np.asarray(x, dtype=np.float32)).clamp(0, 1)
    changed = (x - train.x).abs().flatten(1).amax(1) > 1e-6
    assert (train.y[changed] == 0).all()
    theirs = cosine_by_hand(model.eval(), x[changed], 0, target).item()
    budget = int(changed.sum()) / len(train.x)
    ours = gradient_matching(model, train, target, 0, eps=0.2, budget=budget, steps=40, restarts=1, seed=0).loss
    assert ours <= theirs + 0.02


MODEL, TRAIN, TARGET = tiny()
GOOD = {"eps": 0.1, "budget": 0.1, "steps": 1, "seed": 0}


@pytest.mark.parametrize("attack", [gradient_matching, meta_poison])
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"budget": 0.0}, ValueError, "budget: got 0"),
    ({"budget": 1}, ValueError, "budget: got 1"),
    ({"budget": 0.01}, ValueError, "less than one"),
    ({"budget": 0.9}, ValueError, "have the label 0"),
    ({"eps": -0.1}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"steps": 0}, ValueError, "steps"),
    ({"restarts": 0}, ValueError, "restarts"),
    ({"seed": -1}, ValueError, "seed"),
    ({"target": torch.rand(1, 1, 3, 3)}, ValueError, "target"),
    ({"target": 2 * torch.ones(1, 1, 4, 3)}, ValueError, "target"),
    ({"adversarial_label": 3}, ValueError, "adversarial_label: got label 3"),
    ({"adversarial_label": -1}, ValueError, "adversarial_label"),
    ({"models": []}, ValueError, "models: got none"),
    ({"models": lambda x: x}, TypeError, "not iterable|models"),
    ({"data": SimpleNamespace(x=TRAIN.x, y=TRAIN.y.float())}, TypeError, "data.y"),
    ({"data": SimpleNamespace(x=TRAIN.x * 255, y=TRAIN.y)}, ValueError, "data.x"),
    ({"data": SimpleNamespace(x=TRAIN.x[1::3], y=TRAIN.y[1::3])}, ValueError, "but 0 have the label 0"),
])  # fmt: skip
def test_bad_input_is_named(attack, change, error, message):
    given_ = {"models": MODEL, "data": TRAIN, "target": TARGET, "adversarial_label": 0, **GOOD, **change}
    with pytest.raises(error, match=message):
        attack(**given_)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"beta": -1.0}, ValueError, "beta"),
    ({"steps": 0}, ValueError, "steps"),
    ({"eps": -0.1}, ValueError, "eps"),
    ({"watermark": 1.0}, ValueError, "watermark"),
    ({"target": torch.rand(2, 1, 4, 3)}, ValueError, "target"),
    ({"target": torch.rand(1, 1, 3, 3)}, ValueError, "target"),
    ({"base": TRAIN.x[:0]}, ValueError, "base"),
    ({"phi": lambda x: x}, ValueError, "phi"),
    ({"phi": 3}, TypeError, "model"),
])  # fmt: skip
def test_a_collision_names_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        feature_collision(**{"phi": MODEL[:-1], "base": TRAIN.x[:3], "target": TARGET, **change})
