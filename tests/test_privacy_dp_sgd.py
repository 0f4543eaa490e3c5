"""DP-SGD: gradients against single backward passes, a step against its formula, a run against its account; PATE."""

import functools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from tmlcourse import data, models, training
from tmlcourse.privacy import Accountant, clipped_gradient, dp_sgd, per_example_gradients, tally, vote

LAYERS = {
    "linear": (nn.Flatten(), nn.Linear(64, 5)),
    "mlp": (nn.Flatten(), nn.Linear(64, 9, bias=False), nn.ReLU(), nn.Linear(9, 5)),
    "tutorial": (nn.Conv2d(1, 4, 5, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 6, 3, 2), nn.ReLU(),
                 nn.Flatten(), nn.Linear(6, 5)),
    "odd": (nn.Conv2d(1, 3, (3, 2), (2, 1), padding=(1, 0), dilation=(1, 2)), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False),
            nn.ReLU(), nn.Flatten(), nn.Linear(60, 5)),
    "same": (nn.Conv2d(1, 3, 4, padding="same"), nn.ReLU(), nn.Conv2d(3, 2, 3, padding="same"), nn.Flatten(),
             nn.Linear(128, 5)),
    "rows": (nn.Flatten(1, 2), nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)),
    "groups": (nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
               nn.Linear(64, 5)),
    "overwritten": (nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 5)),
}  # fmt: skip
BY_BOOKS = ("linear", "mlp", "tutorial", "odd", "same", "rows")


def example(name, n=7, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(*LAYERS[name]).to(dtype)
    return model, torch.rand(n, 1, 8, 8, dtype=dtype), torch.arange(n) % 5


def one_by_one(model, x, y):
    """A loop of single backward passes: dict of (N, *shape), and the norms."""
    names, params = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad), strict=True)
    rows = [torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), params) for a, b in zip(x, y, strict=True)]
    grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
    return grads, torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)


@pytest.mark.parametrize("name", LAYERS)
def test_per_example_gradients_are_those_of_single_passes(name):
    model, x, y = example(name)
    want, _ = one_by_one(model, x, y)
    got = per_example_gradients(model, x, y)
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[k], want[k], rtol=0, atol=1e-10) for k in want)


@pytest.mark.parametrize("method", ["books", "vmap", "auto"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_size", [3, 256])
def test_clipped_sums_are_those_of_single_passes(name, method, batch_size):
    model, x, y = example(name)
    if method == "books" and name not in BY_BOOKS:
        with pytest.raises(ValueError, match="method: got 'books'"):
            clipped_gradient(model, x, y, 1.0, method=method)
        return
    grads, norms = one_by_one(model, x, y)
    clip = float(norms.median())
    total, found = clipped_gradient(model, x, y, clip, method=method, batch_size=batch_size)
    assert torch.allclose(found, norms, atol=1e-10)
    for k, g in grads.items():
        want = torch.tensordot((clip / norms).clamp_max(1), g, 1)
        assert torch.allclose(total[k], want, rtol=0, atol=1e-10), k


@pytest.mark.parametrize("method", ["books", "vmap"])
def test_in_single_precision_to_1e_6(method):
    model, x, y = example("tutorial", 32, torch.float32)
    grads, norms = one_by_one(model.double(), x.double(), y)
    total, found = clipped_gradient(model.float(), x, y, math.inf, method=method)
    assert total["0.weight"].dtype == torch.float32
    assert torch.allclose(found.double(), norms, rtol=1e-6)
    assert all(torch.allclose(total[k].double(), g.sum(0), rtol=0, atol=1e-6 * len(x)) for k, g in grads.items())


def test_a_layer_called_twice_and_a_shared_weight_go_the_long_way():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)

        def forward(self, x):
            return self.c(self.b(self.a(self.a(x.flatten(1)).tanh()).tanh()))

    torch.manual_seed(0)
    model = Twice().double()
    _, x, y = example("linear")
    for _ in range(2):
        grads, norms = one_by_one(model, x, y)
        total, _ = clipped_gradient(model, x, y, 0.5)
        assert all(
            torch.allclose(total[k], torch.tensordot((0.5 / norms).clamp_max(1), g, 1)) for k, g in grads.items()
        )
        model.b.weight = model.a.weight


def test_frozen_parameters_and_the_model_are_left_alone():
    model, x, y = example("tutorial")
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(6, dtype=torch.float64)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    total, _ = clipped_gradient(model, x, y, 1.0)
    assert "0.weight" not in total and "0.bias" in total
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[3].bias.grad, torch.ones(6, dtype=torch.float64)) and model[0].weight.grad is None
    assert not any(m._forward_hooks for m in model.modules()) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError):
        clipped_gradient(model, x[:, :, :2, :2], y, 1.0)
    assert not any(m._forward_hooks for m in model.modules())


@given(st.integers(0, 100), st.floats(0.01, 10), st.integers(0, 5), st.sampled_from(["books", "vmap"]))
def test_one_record_moves_the_sum_by_at_most_the_clip(seed, clip, who, method):
    model, x, y = example("tutorial", 6)
    x = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    keep = torch.arange(6) != who
    whole, without = (clipped_gradient(model, x[i], y[i], clip, method=method)[0] for i in (keep | True, keep))
    moved = torch.stack([(whole[k] - without[k]).norm() for k in whole]).norm()
    assert moved <= clip * (1 + 1e-9)


@pytest.mark.parametrize("method", ["books", "vmap"])
def test_a_record_whose_gradient_is_not_finite_counts_nothing(method):
    model, x, y = example("mlp")

    def broken(z, y, reduction):
        return (F.cross_entropy(z, y, reduction="none") * torch.where(y == 4, math.inf, 1.0)).sum()

    total, norms = clipped_gradient(model, x, y, 1.0, loss=broken, method=method)
    want, _ = clipped_gradient(model, x[y != 4], y[y != 4], 1.0, method=method)
    assert not torch.isfinite(norms[y == 4]).any()
    assert all(torch.allclose(total[k], want[k]) for k in want)


# ---- a run


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train"), data.load("digits")


def tiny(seed=0):
    return models.linear((1, 8, 8), seed=seed)


def test_without_noise_and_clipping_it_is_plain_gradient_descent(digits):
    """With every record in every batch and next to no noise, each step is one of full-batch gradient descent."""
    train = digits[0][:50]
    model, plain = tiny(), tiny()
    dp_sgd(model, train, noise=1e-9, clip=1e3, delta=1e-5, batch_size=50, epochs=3, lr=0.5, seed=0)
    for _ in range(3):
        loss = F.cross_entropy(plain(train.x), train.y)
        for p, g in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            p.data -= 0.5 * g
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_noise_of_a_step_has_its_law(digits):
    train = digits[0][:40]
    model, noise, clip, lr = tiny(), 2.0, 0.3, 0.7
    before = [p.detach().clone() for p in model.parameters()]
    grads, _ = clipped_gradient(model, train.x, train.y, clip)
    dp_sgd(model, train, noise=noise, clip=clip, delta=1e-5, batch_size=40, epochs=1, lr=lr, seed=3)
    moved = torch.cat([((b - p) * 40 / lr - grads[k]).flatten() for (k, p), b in zip(model.named_parameters(), before)])  # noqa: B905
    assert stats.kstest(moved.detach().numpy(), stats.norm(0, noise * clip).cdf).pvalue > 0.01


def test_batches_are_drawn_by_coins_and_sums_divided_by_the_expected_size(digits, monkeypatch):
    """A stand-in for the gradient: ones for every example of the batch."""
    sizes, model = [], tiny()

    def ones(model, x, y, clip, loss):
        sizes.append(len(x))
        return {name: torch.full_like(p, len(x)) for name, p in model.named_parameters()}, torch.ones(len(x))

    monkeypatch.setattr(sys.modules["tmlcourse.privacy.dp_sgd"], "clipped_gradient", ones)
    before = model[1].weight.detach().clone()
    run = dp_sgd(model, digits[0][:200], noise=1e-9, clip=1.0, delta=1e-5, batch_size=20, epochs=30, lr=0.01, seed=0)
    assert run.steps == 300 and run.q == 0.1
    assert sizes[:4] == [3, 1, 1, 1]  # the check that examples do not see each other
    del sizes[:4]
    assert torch.allclose(before - model[1].weight, torch.tensor(0.01 * sum(sizes) / 20), atol=1e-4)
    sizes = torch.tensor(sizes, dtype=torch.float64)
    assert abs(sizes.mean() - 20) < 4 * math.sqrt(18 / 300)
    assert stats.chi2.cdf(299 * float(sizes.var()) / 18, 299) == pytest.approx(0.5, abs=0.499)


def test_empty_batches_are_noise_alone(digits):
    train = digits[0][:30]
    run = dp_sgd(tiny(), train, noise=1.0, clip=1.0, delta=1e-5, batch_size=1, epochs=2, seed=0)
    assert run.steps == 60


def test_the_account_is_that_of_the_accountant_and_the_budget_is_kept(digits):
    train, test = digits
    run = dp_sgd(tiny(), train, eps=2.0, clip=1.0, delta=1e-4, batch_size=256, epochs=2, validation=test, seed=0)
    account = Accountant().add(sigma=run.noise, q=run.q, steps=run.steps)
    assert run.eps == account.eps(1e-4) and 1.99 < run.eps <= 2.0
    assert (
        list(run.history) == ["epoch", "steps", "validation", "seconds"] and run.history["steps"].iloc[-1] == run.steps
    )
    assert "private" in str(run)


def test_accuracy_falls_with_privacy_and_a_seed_repeats_it(digits):
    train, test = digits
    found, state = {}, torch.get_rng_state()
    for noise in (0.5, 0.5, 30.0):
        model = tiny()
        options = {"clip": 1.0, "delta": 1e-4, "batch_size": 256, "epochs": 8, "lr": 2.0}
        dp_sgd(model, train, noise=noise, seed=1, **options)
        weights = [p.detach().clone() for p in model.parameters()]
        if noise in found:
            assert all(torch.equal(a, b) for a, b in zip(weights, found[noise][1], strict=True))
        found[noise] = training.accuracy(model, test.x, test.y), weights
    assert found[0.5][0] > 0.75 > found[30.0][0]
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_an_interrupted_run_leaves_mode_and_gradients(digits):
    def fail(*_, **__):
        raise KeyboardInterrupt

    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        dp_sgd(model, digits[0], noise=1.0, clip=1.0, delta=1e-5, loss=fail, seed=0)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_momentum_and_schedules_are_post_processing(digits):
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    run = dp_sgd(
        tiny(), digits[0], noise=1.0, clip=1.0, delta=1e-5, optimizer=sgd, schedule=training.triangle, epochs=1
    )
    assert run.eps == Accountant().add(sigma=1.0, q=run.q, steps=run.steps).eps(1e-5)


def test_a_network_that_mixes_examples_by_itself_is_refused(digits):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = nn.Sequential(nn.Flatten(), Centred(), nn.Linear(64, 10))
    before = model[2].weight.clone()
    with pytest.raises(ValueError, match="model: got gradients that change with the other examples"):
        dp_sgd(model, digits[0], noise=1.0, clip=1.0, delta=1e-5)
    assert torch.equal(model[2].weight, before) and model.training


def test_batch_normalisation_is_refused_with_advice(digits):
    model = models.resnet((1, 8, 8), depth=8, width=4, seed=0)
    for call in (
        lambda: dp_sgd(model, digits[0], noise=1.0, clip=1.0, delta=1e-5),
        lambda: clipped_gradient(model, digits[0].x[:4], digits[0].y[:4], 1.0),
        lambda: per_example_gradients(model, digits[0].x[:4], digits[0].y[:4]),
    ):
        with pytest.raises(ValueError, match="BatchNorm2d.*GroupNorm"):
            call()


@pytest.mark.parametrize("change, message", [
    ({"eps": 1.0}, "eps, noise: got 1.0 and 1.0, want exactly one"),
    ({"noise": None}, "eps, noise: got None and None"),
    ({"noise": 0}, "noise: got 0"), ({"noise": None, "eps": 0}, "eps: got 0"), ({"noise": None, "eps": -1.0}, "eps: got -1"),
    ({"clip": 0}, "clip: got 0"), ({"clip": math.inf}, "clip: got inf"),
    ({"delta": 0}, "delta: got 0"), ({"delta": 1.0}, "delta: got 1.0"),
    ({"epochs": 0}, "epochs: got 0"), ({"batch_size": 10**6}, "batch_size: got 1000000, want at most"),
])  # fmt: skip
def test_bad_input_is_named_before_any_work(digits, change, message):
    model = tiny()
    before = model[1].weight.clone()
    with pytest.raises(ValueError, match=message):
        dp_sgd(model, digits[0], **{"noise": 1.0, "clip": 1.0, "delta": 1e-5, **change})
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.full((4, 1, 8, 8), math.nan)}, "x: got NaN"), ({"x": torch.full((4, 1, 8, 8), 7.0)}, "x: got values"),
    ({"y": torch.full((4,), 12)}, "y: got label 12"), ({"clip": -1.0}, "clip: got -1"), ({"method": "fast"}, "method: got"),
    ({"model": len}, "model: got builtin"),
])  # fmt: skip
def test_bad_input_of_a_gradient_is_named(change, message):
    arguments = {"model": tiny(), "x": torch.rand(4, 1, 8, 8), "y": torch.arange(4), "clip": 1.0, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        clipped_gradient(**arguments)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_clipped_sums_equal_opacus(mode):
    pytest.importorskip("opacus")
    import dpsgd

    x, y = dpsgd.batch(16, "cpu")
    model = dpsgd.network()
    step = dpsgd.opacus(x, y, mode)
    step.optimiser.noise_multiplier = 0.0
    step()
    total, _ = clipped_gradient(model, x, y, dpsgd.CLIP)
    theirs = dict(zip(total, (p.grad for p in step.model.parameters()), strict=True))
    assert all(torch.allclose(theirs[k] * len(x), total[k], atol=2e-5) for k in total)


# ---- PATE


def test_votes_count_and_cost_what_they_should():
    ballots = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 2, 1]])
    assert tally(ballots, 3).tolist() == [[3, 0, 0], [0, 2, 1], [0, 2, 1]]
    found = vote(ballots, 3, sigma=1e-3, delta=1e-5, seed=0)
    assert found.labels.tolist() == [0, 1, 1]
    many = vote(ballots.repeat(1, 100), 3, sigma=40.0, delta=1e-5, seed=0)
    assert many.eps == Accountant().add(sigma=40 / math.sqrt(2), steps=300).eps(1e-5)
    assert len(set(many.labels.tolist())) == 3
    for bad in (ballots.float(), ballots[0]):
        with pytest.raises(TypeError, match="ballots: want"):
            vote(bad, 3, sigma=1.0, delta=1e-5)
    with pytest.raises(ValueError, match="ballots: got votes outside"):
        vote(ballots, 2, sigma=1.0, delta=1e-5)


def test_one_record_moves_the_counts_by_root_two():
    ballots = torch.randint(0, 5, (20, 50), generator=torch.Generator().manual_seed(0))
    changed = ballots.clone()
    changed[3] = (changed[3] + 1) % 5
    assert (tally(ballots, 5) - tally(changed, 5)).norm(dim=1).max() == pytest.approx(math.sqrt(2))
