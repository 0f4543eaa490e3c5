"""The training loop: deterministic, honest history, composition of losses, and against an independent optimiser."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from tmlcourse import data, models, training
from tmlcourse.attacks import fgsm
from tmlcourse.threat import Linf


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train", n=400)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fit_is_reproducible_and_leaves_generator_mode_and_gradients(digits):
    runs = []
    for seed in (0, 0, 1):
        model = nn.Sequential(*models.mlp((1, 8, 8), hidden=(16,), seed=0), nn.Dropout(0.2)).eval()
        state = torch.get_rng_state()
        history = training.fit(model, digits, epochs=2, seed=seed, loss=training.adversarial(Linf(0.1), steps=1))
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training and all(p.grad is None for p in model.parameters())
        runs.append((weights(model), history.drop(columns="seconds")))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1].equals(runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_fit_reaches_the_optimum_that_scikit_learn_finds():
    """Full-batch training of logistic regression with a ridge: a convex problem with one answer."""
    g = np.random.default_rng(0)
    x, y = g.random((200, 5)), g.integers(0, 3, 200)
    x[:, 0] += y / 3
    x = x / x.max()
    set_ = SimpleNamespace(x=torch.tensor(x, dtype=torch.float32), y=torch.tensor(y))

    def ridge(model, x, y):
        return F.cross_entropy(model(x), y) + (model.weight**2).sum() / (2 * 200)

    model = nn.Linear(5, 3)
    training.fit(model, set_, epochs=400, batch_size=200, lr=0.5, loss=ridge, seed=0)
    peer = LogisticRegression(C=1.0, max_iter=5000, tol=1e-10).fit(x, y)
    np.testing.assert_allclose(torch.softmax(model(set_.x), 1).detach().numpy(), peer.predict_proba(x), atol=2e-3)


def test_history_tells_what_happened(digits):
    model = models.mlp((1, 8, 8), hidden=(64,), seed=0)
    held_out = data.load("digits")
    history = training.fit(model, digits, epochs=8, lr=1e-2, validation=held_out, seed=0)
    assert list(history.epoch) == [*range(1, 9)]
    assert history.loss.iloc[-1] < history.loss.iloc[0] / 2
    assert history.validation.iloc[-1] == training.accuracy(model, held_out.x, held_out.y) > 0.8
    assert history.accuracy.iloc[-1] > 0.9


def test_adversarial_loss_is_the_loss_at_the_attack_and_keeps_the_mode(digits):
    model = models.mlp((1, 8, 8), seed=0).train()
    x, y = digits.x[:20], digits.y[:20]
    value, _ = training.adversarial(Linf(0.1), fgsm)(model, x, y)
    assert model.training
    torch.testing.assert_close(value, F.cross_entropy(model(fgsm(model, x, y, Linf(0.1))), y))
    assert value > training.cross_entropy(model, x, y)[0]


def test_gradients_that_an_attack_leaves_on_the_weights_are_not_learned_from(digits):
    def attack(clean):
        def step(model, x, y, threat):
            point = x.clone().requires_grad_()
            F.cross_entropy(model(point), y).backward()
            slope = point.grad.sign()
            if clean:
                model.zero_grad(set_to_none=True)
            return threat.project(x + threat.eps * slope, x)

        return training.adversarial(Linf(0.1), step)

    found = []
    for clean in (False, True):
        model = models.mlp((1, 8, 8), hidden=(9,), seed=0)
        training.fit(model, digits, epochs=1, loss=attack(clean), seed=0)
        found.append(weights(model))
    assert torch.equal(*found)


class Viewing(nn.Module):
    """A layer that needs the ordinary layout."""

    def forward(self, x):
        return x.view(len(x), -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_channels_last_is_training(digits, channels):
    """A network with a layer of one's own is trained in the layout in which it comes."""
    data = SimpleNamespace(x=digits.x[:200].repeat(1, channels, 1, 1), y=digits.y[:200])
    found = []
    for flat in (nn.Flatten(), Viewing()):
        model = models.small_cnn((channels, 8, 8), seed=0)
        model[[type(layer) for layer in model].index(nn.Flatten)] = flat
        training.fit(model, data, epochs=1, seed=0, optimizer=torch.optim.SGD, lr=0.1)
        found.append(weights(model))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_danskin_gradient_of_the_worst_case_on_a_linear_model():
    """grad_w max_delta l = grad_w l at delta*, against log(1 + exp(eps ||w||_1 - margin)) differentiated."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 2).double(), 0.3 + 0.4 * torch.rand(30, 6).double(), torch.randint(0, 2, (30,))
    value, _ = training.adversarial(Linf(0.1, box=None), fgsm)(model, x, y)
    found = torch.autograd.grad(value, model.weight)[0]
    w, s = model.weight[1] - model.weight[0], 2.0 * y - 1
    exact = F.softplus(-(s * (x @ w + model.bias[1] - model.bias[0])) + 0.1 * w.abs().sum()).mean()
    torch.testing.assert_close(found, torch.autograd.grad(exact, model.weight)[0], atol=1e-9, rtol=0)


def test_single_step_takes_the_step_whether_or_not_it_helps(digits):
    model = models.mlp((1, 8, 8), seed=0)
    torch.manual_seed(0)
    x_adv = training.single_step(model, digits.x[:9], digits.y[:9], Linf(0.2), alpha=0.25)
    assert Linf(0.2).contains(x_adv, digits.x[:9]).all()
    torch.manual_seed(0)
    start = Linf(0.2).random(digits.x[:9])
    assert ((x_adv - start).abs().flatten(1).amax(1) > 0.05).all()


def test_crop_and_flip_moves_and_mirrors_pixels_only():
    x = torch.rand(500, 2, 6, 6) + 0.1
    torch.manual_seed(0)
    out = training.crop_and_flip(x, padding=2)
    assert out.shape == x.shape
    padded = F.pad(x, [2] * 4)
    kinds = set()
    for before, after in zip(padded, out, strict=True):
        hits = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if torch.equal(
                after, (w.flip(2) if flip else w) if (w := before[:, dy : dy + 6, dx : dx + 6]) is not None else w
            )
        ]
        assert hits
        kinds.add(hits[0])
    assert len(kinds) == 50  # every shift, mirrored or not


def test_accuracy_counts(digits):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = F.one_hot(torch.tensor(3), 10).float()
    assert training.accuracy(constant, digits.x, digits.y) == (digits.y == 3).double().mean()
    assert training.accuracy(constant, digits.x, digits.y, batch_size=7) == (digits.y == 3).double().mean()


def test_a_loss_that_asks_is_told_how_far_training_is(digits):
    model, seen = models.linear((1, 8, 8), seed=0), []

    def loss(model, x, y, progress):
        seen.append(progress)
        return F.cross_entropy(model(x), y)

    training.fit(model, digits, epochs=2, loss=loss, seed=0)
    assert seen == [number / 8 for number in range(8)]
    seen.clear()
    training.fit(model, digits, epochs=1, loss=functools.partial(loss), seed=0)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_an_interrupted_run_leaves_a_usable_model(digits):
    model = models.mlp((1, 8, 8), seed=0)
    calls = []

    def loss(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    with pytest.raises(KeyboardInterrupt):
        training.fit(model, digits, loss=loss, seed=0)
    assert (
        not model.training and torch.isfinite(weights(model)).all() and all(p.grad is None for p in model.parameters())
    )


def test_bad_input(digits):
    model = models.linear((1, 8, 8), seed=0)
    cases = [
        (dict(epochs=0), ValueError, "epochs: got 0"),
        (dict(batch_size=2.5), TypeError, "batch_size: got 2.5"),
        (dict(lr=-1.0), ValueError, "lr: got -1.0"),
        (dict(lr=1e38, optimizer=torch.optim.SGD), FloatingPointError, "loss: got inf in epoch 1 of 5, step 3 of 4"),
        (dict(average=1.0), ValueError, "average: got 1.0"),
        (dict(keep="validation"), ValueError, "keep: got 'validation'"),
        (dict(keep="pgd", watch={"fgsm": len}), ValueError, "keep: got 'pgd', want one of 'fgsm'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            training.fit(model, digits, **options)
    with pytest.raises(ValueError, match=r"data.x: got values in .*divide by 255"):
        training.fit(model, SimpleNamespace(x=digits.x * 255, y=digits.y))
    with pytest.raises(ValueError, match="x: got NaN"):
        training.accuracy(model, digits.x * float("nan"), digits.y)


# --- averages, early stopping, checkpoints ---------------------------------------------------------------------------


def test_average_is_the_exponential_mean_of_the_weights_after_each_step(digits):
    visited = []

    class Recorder(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            visited.append(torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]]))

    model = models.linear((1, 8, 8), seed=0)
    training.fit(model, digits, epochs=2, average=0.7, optimizer=Recorder, seed=0)
    mean = visited[0]
    for w in visited[1:]:
        mean = 0.7 * mean + 0.3 * w
    torch.testing.assert_close(weights(model), mean)
    plain, zero = models.linear((1, 8, 8), seed=0), models.linear((1, 8, 8), seed=0)
    training.fit(plain, digits, epochs=2, seed=0)
    training.fit(zero, digits, epochs=2, average=0.0, seed=0)
    assert torch.equal(weights(plain), weights(zero)) and torch.equal(weights(plain), visited[-1])


def test_watch_is_recorded_without_disturbing_the_run_and_keep_puts_the_best_epoch_back(digits):
    plain, watched, seen = models.mlp((1, 8, 8), seed=0), models.mlp((1, 8, 8), seed=0), []

    def measure(model):
        assert not model.training
        seen.append(weights(model).clone())
        torch.rand(7)
        return [0.3, 0.9, 0.9, 0.1][len(seen) - 1]

    before = training.fit(plain, digits, epochs=4, seed=0)
    history = training.fit(watched, digits, epochs=4, watch={"measured": measure}, keep="measured", seed=0)
    assert list(history.measured) == [0.3, 0.9, 0.9, 0.1] and before.loss.equals(history.loss)
    assert torch.equal(weights(watched), seen[1]) and torch.equal(weights(plain), seen[3])


OPTIONS = dict(
    epochs=4, lr=5e-3, batch_size=64, seed=3, average=0.9, augment=functools.partial(training.crop_and_flip, padding=1)
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
    ).eval()


class Killed(BaseException):
    pass


def run(digits, path=None, options=OPTIONS, **more):
    """Train a network; its history without the clock, and all of its state."""
    model, loss = network(), functools.partial(training.adversarial(Linf(0.1), steps=2))
    history = training.fit(model, digits, loss=loss, validation=digits[:50], checkpoint=path, **options, **more)
    return history.drop(columns="seconds"), model.state_dict()


def same(a, b):
    return a[0].equals(b[0]) and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


class Dying:
    """A schedule that kills the run in a step of choice (never, with -1); to a checkpoint it looks the same each time."""

    def __init__(self, after):
        self.left = after

    def __call__(self, done):
        self.left -= 1
        if self.left == 0:
            raise Killed
        return 1 - done


@pytest.mark.parametrize("killed_in_step", [2, 8, 13, 21, 28])
def test_a_killed_run_resumes_to_the_very_same_result(digits, tmp_path, killed_in_step):
    whole, path = run(digits, schedule=Dying(-1)), tmp_path / "folder" / "run.pt"
    with pytest.raises(Killed):
        run(digits, path, schedule=Dying(killed_in_step))
    resumed = run(digits, path, schedule=Dying(-1))
    assert same(whole, resumed) and list(resumed[0].epoch) == [1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    again = run(digits, path, schedule=Dying(1))  # finished: nothing is trained any more
    assert same(whole, again)


def test_resuming_keeps_the_best_epoch_and_the_global_generator(digits, tmp_path):
    path, options = tmp_path / "run.pt", OPTIONS | dict(keep="validation", average=None)
    whole = run(digits, options=options, schedule=Dying(-1))
    with pytest.raises(Killed):
        run(digits, path, options=options, schedule=Dying(20))
    state = torch.get_rng_state()
    assert same(whole, run(digits, path, options=options, schedule=Dying(-1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_is_never_half_written(digits, tmp_path, monkeypatch):
    """The disk fills up while the second one is written: the first one is still there, and good."""
    path, save, calls = tmp_path / "run.pt", torch.save, []

    def failing(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError("no space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="no space"):
        run(digits, path)
    monkeypatch.undo()
    assert len(torch.load(path, weights_only=True)["rows"]) == 1
    assert same(run(digits), run(digits, path))


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_touched(digits, tmp_path):
    path = tmp_path / "run.pt"
    run(digits, path, options=OPTIONS | {"epochs": 1})
    model, before = network(), weights(network())
    loss = functools.partial(training.adversarial(Linf(0.1), steps=2))
    own = OPTIONS | dict(epochs=1, loss=loss, validation=digits[:50], checkpoint=path)
    for change, named in [
        (dict(epochs=2), "epochs = 1, not 2"),
        (dict(lr=1e-2), "lr = 0.005, not 0.01"),
        (dict(seed=4), "seed = 3, not 4"),
        (dict(average=None), "average = 0.9, not None"),
        (dict(loss=functools.partial(training.adversarial(Linf(0.2), steps=2))), "loss = .*eps=0.1.*, not .*eps=0.2"),
        (dict(loss=training.cross_entropy), "loss = .*not 'cross_entropy"),
        (dict(schedule=training.constant), "schedule = 'triangle.*, not 'constant"),
        (dict(optimizer=torch.optim.SGD), "optimizer = 'Adam', not 'SGD'"),
        (dict(augment=None), "augment = .*padding=1.*, not 'None'"),
    ]:
        with pytest.raises(ValueError, match=f"checkpoint: .* is of another run, with {named}"):
            training.fit(model, digits, **(own | change))
    with pytest.raises(ValueError, match="content = "):
        training.fit(model, SimpleNamespace(x=digits.x.flip(3), y=digits.y), **own)
    with pytest.raises(ValueError, match="weights of other shapes"):
        training.fit(models.linear((1, 8, 8), seed=0), digits, **own)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="is damaged, or no checkpoint of `fit`; delete it"):
        training.fit(model, digits, **own)
    assert torch.equal(weights(model), before) and not model.training


def test_a_diverging_run_says_where_and_keeps_the_weights_before(digits):
    model, calls = network(), []

    def loss(model, x, y):
        calls.append(weights(model).clone())
        return F.cross_entropy(model(x), y) * (float("nan") if len(calls) == 11 else 1)

    with pytest.raises(FloatingPointError, match="loss: got nan in epoch 2 of 3, step 4 of 7; lower lr = 0.01"):
        training.fit(model, digits, epochs=3, batch_size=64, lr=0.01, loss=loss, seed=0)
    assert torch.equal(weights(model), calls[-1]) and not model.training
