"""Model inversion: the stationary point of softmax regression, its convex optimum, and what it shows of a network."""

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlcourse import data, models, privacy, training


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]), st.sampled_from([0.05, 0.3]))
def test_at_the_solution_the_image_is_made_of_rows_of_the_weights(seed, centre, l2):
    net = models.linear((1, 4, 3), 5, seed=seed).double()
    target = torch.tensor([seed % 5, (seed + 1) % 5])
    x = privacy.model_inversion(
        net, target, shape=(1, 4, 3), objective="cross_entropy", l2=l2, centre=centre, steps=800
    )
    rest = F.one_hot(target, 5) - net(x).softmax(1)
    wanted = (centre + rest @ net[1].weight / (2 * l2)).clamp(0, 1).view_as(x)
    assert torch.allclose(x, wanted, atol=2e-4)


def test_it_finds_what_scipy_finds():
    net = models.linear((1, 3, 3), 4, seed=1).double()
    x = privacy.model_inversion(net, torch.tensor([2]), shape=(1, 3, 3), objective="cross_entropy", l2=0.1, steps=800)

    def cost(v):
        v = torch.tensor(v).view(1, 1, 3, 3)
        return (F.cross_entropy(net(v), torch.tensor([2])) + 0.1 * v.square().sum()).item()

    theirs = scipy.optimize.minimize(cost, [0.1] * 9, bounds=[(0, 1)] * 9, tol=1e-10)
    assert torch.allclose(x.flatten(), torch.tensor(theirs.x), atol=1e-3)


def test_the_picture_of_a_digit_looks_like_the_digit():
    train = data.load("digits-28x28", "train")
    net = models.linear(train.shape, seed=0)
    training.fit(net, train, epochs=10, seed=0)
    target = torch.arange(10)
    x = privacy.model_inversion(net, target, shape=train.shape, tv=0.05, l2=1e-3)
    means = torch.stack([train.x[train.y == k].mean(0) for k in range(10)])
    assert (privacy.nearest(x, means)[0] == target).float().mean() >= 0.9
    assert (net(x).softmax(1)[target, target] > 0.9).all()
    assert x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("objective", ["confidence", "cross_entropy"])
def test_never_worse_than_the_start_and_each_image_alone(objective):
    net = models.small_cnn((1, 16, 12), seed=0)
    start = torch.rand(3, 1, 16, 12, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 7, 7])
    x = privacy.model_inversion(net, target, shape=(1, 16, 12), objective=objective, start=start, steps=10)
    before, after = (F.cross_entropy(net(v), target, reduction="none") for v in (start, x))
    assert (after <= before).all() and (after < before).any()
    alone = privacy.model_inversion(
        net, target[1:2], shape=(1, 16, 12), objective=objective, start=start[1:2], steps=10
    )
    assert torch.allclose(alone[0], x[1], atol=1e-4)
    assert all(p.grad is None for p in net.parameters())


def test_total_variation_smooths():
    net = models.mlp((1, 8, 8), hidden=(20,), seed=0)
    rough, smooth = (
        privacy.model_inversion(net, torch.tensor([3]), shape=(1, 8, 8), tv=tv, centre=0.5) for tv in (0, 1.0)
    )
    assert smooth.diff(dim=-1).abs().sum() < rough.diff(dim=-1).abs().sum()


def test_nearest_is_the_largest_correlation():
    x = torch.rand(4, 1, 5, 5)
    found, similar = privacy.nearest(0.3 * x[[2, 0]] + 0.1, x)
    assert found.tolist() == [2, 0] and torch.allclose(similar, torch.ones(2), atol=1e-5)
    assert privacy.nearest(torch.full((1, 1, 5, 5), 0.5), x)[1].item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(objective="loss"), "objective"), (dict(l2=-1.0), "l2"), (dict(tv=float("nan")), "tv"),
        (dict(centre=1.5), "centre"), (dict(steps=0), "steps"), (dict(alpha=0.0), "alpha"),
        (dict(target=torch.tensor([4])), "target: got label 4"), (dict(start=torch.zeros(1, 1, 2, 2)), "start"),
        (dict(start=torch.full((1, 1, 3, 3), 2.0)), "start"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    options = {"target": torch.tensor([0]), "shape": (1, 3, 3)} | change
    with pytest.raises(ValueError, match=message):
        privacy.model_inversion(models.linear((1, 3, 3), 4, seed=0), options.pop("target"), **options)
