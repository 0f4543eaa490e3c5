"""Fooled explanations: the answers stay, the explanation goes where the attacker wants, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn

from tmlcourse import data, models, training
from tmlcourse.interpret.fooling import fool_input, location_fooling, scaffold, shares, soften
from tmlcourse.interpret.lime import lime_table


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train"), data.load("digits")


@pytest.fixture(scope="module")
def sincere(digits):
    model = models.mlp((1, 8, 8), hidden=(40, 40), seed=0)
    training.fit(model, digits[0], epochs=25, lr=5e-3, seed=0)
    return model


def test_softplus_comes_near_to_relu_and_the_model_is_not_touched(sincere, digits):
    x = digits[1].x[:20]
    away = [float((soften(sincere, beta)(x) - sincere(x)).abs().max().detach()) for beta in (5.0, 50.0, 1000.0)]
    assert away[0] > away[1] > away[2] and away[2] < 0.02
    assert any(isinstance(layer, nn.ReLU) for layer in sincere.modules())
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 5), nn.ReLU()), nn.Linear(5, 2)).eval()
    soft = soften(nested)
    assert not any(isinstance(layer, nn.ReLU) for layer in soft.modules()) and not any(
        m.training for m in soft.modules()
    )


def test_shares_are_the_saliency_divided_by_its_sum(sincere, digits):
    x, y = digits[1].x[:3].clone().requires_grad_(), digits[1].y[:3]
    (g,) = torch.autograd.grad(sincere(x)[range(3), y].sum(), x)
    expected = g.abs() / g.abs().sum((1, 2, 3), keepdim=True)
    assert torch.allclose(shares(sincere, x.detach(), y), expected)
    weighed = (g * x).abs().detach()
    ours = shares(sincere, x.detach(), y, "gradient_x_input")
    assert torch.allclose(ours, weighed / weighed.sum((1, 2, 3), keepdim=True))


def test_a_fooled_network_keeps_its_accuracy_and_moves_its_saliency(sincere, digits):
    train, test = digits
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[:2, :3] = True
    liar = copy.deepcopy(sincere)
    training.fit(liar, train, epochs=20, lr=5e-3, loss=location_fooling(where, 3.0), seed=0)
    inside = [float((shares(m, test.x, test.y) * where).sum((1, 2, 3)).mean()) for m in (sincere, liar)]
    accuracy = [training.accuracy(m, test.x, test.y) for m in (sincere, liar)]
    assert inside[0] < 0.2 and inside[1] > 0.6
    assert accuracy[1] > accuracy[0] - 0.05
    value, logits = location_fooling(where, 0.0)(sincere, test.x[:9], test.y[:9])
    assert torch.allclose(value, nn.functional.cross_entropy(sincere(test.x[:9]), test.y[:9]))
    assert torch.equal(logits, sincere(test.x[:9]))


@pytest.mark.parametrize("explain", ["saliency", "gradient_x_input"])
def test_a_fooled_image_keeps_its_answer_and_changes_its_explanation(sincere, digits, explain):
    x, soft = digits[1].x[:6].double(), soften(sincere, 10.0).double()
    target, wanted = soft(x).argmax(1), torch.zeros(8, 8, dtype=torch.float64)
    wanted[:3, :3] = 1.0
    state = {k: v.clone() for k, v in soft.state_dict().items()}
    forged = fool_input(soft, x, wanted, eps=0.25, steps=60, gamma=0.01, explain=explain)
    assert forged.dtype == torch.float64 and forged.min() >= 0 and forged.max() <= 1
    assert (forged - x).abs().max() <= 0.25 + 1e-9
    assert torch.equal(soft(forged).argmax(1), target)
    goal = wanted / wanted.sum()
    off = [(shares(soft, images, target, explain) - goal).square().sum((1, 2, 3)) for images in (x, forged)]
    assert (off[1] <= off[0] + 1e-12).all()
    inside = [
        float((shares(soft, images, target, explain) * (wanted > 0)).sum((1, 2, 3)).mean()) for images in (x, forged)
    ]
    assert inside[1] > 1.1 * inside[0]
    assert all(torch.equal(v, state[k]) for k, v in soft.state_dict().items())
    assert all(p.grad is None for p in soft.parameters())
    assert torch.equal(fool_input(soft, x, wanted, eps=0.0), x)
    assert torch.equal(forged, fool_input(soft, x, wanted, eps=0.25, steps=60, gamma=0.01, explain=explain))
    one = fool_input(soft, x[:1], wanted, eps=0.25, steps=60, gamma=0.01, explain=explain)
    assert torch.allclose(one, forged[:1], atol=1e-6)


def test_a_clumsy_attack_on_an_image_gives_nothing_worse_than_the_start(sincere, digits):
    """Steps so large that the answer flips and the explanation gets worse: the best image seen counts, or the start."""
    x, soft, wanted = digits[1].x[:20], soften(sincere, 10.0), torch.zeros(8, 8)
    wanted[5:, :2] = 1.0
    target, goal = soft(x).argmax(1), wanted / wanted.sum()
    forged = fool_input(soft, x, wanted, eps=1.0, alpha=1.0, steps=3, gamma=0.0)
    assert torch.equal(soft(forged).argmax(1), target)
    off = [(shares(soft, images, target) - goal).square().sum((1, 2, 3)) for images in (x, forged)]
    assert (off[1] <= off[0] + 1e-6).all()


def test_the_scaffold_hides_the_bias_from_lime():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(400, 4, generator=generator, dtype=torch.float64)
    rows[:, 0] = (rows[:, 0] > 0.5).double()
    rows[:, 3] = rows[:, 2] + 0.02 * rows[:, 3]  # real people lie near a line, LIME's neighbours do not

    def biased(r):
        return r[:, 0]

    def innocuous(r):
        return (r[:, 1] > 0.5).double()

    wrapped = scaffold(biased, innocuous, rows, seed=0)
    assert (wrapped(rows) == biased(rows)).double().mean() > 0.95
    open_, closed = (lime_table(f, rows[0], rows, kind="quartiles", seed=0).weights.abs() for f in (biased, wrapped))
    assert open_[0] > 5 * open_[1] and closed[1] > closed[0]
    assert torch.equal(wrapped(rows), scaffold(biased, innocuous, rows, seed=0)(rows))


def test_bad_input_is_named(sincere, digits):
    x, wanted = digits[1].x[:2], torch.ones(8, 8)
    soft = soften(sincere)
    with pytest.raises(ValueError, match="no nn.ReLU"):
        soften(models.linear((1, 8, 8)))
    with pytest.raises(ValueError, match="beta"):
        soften(sincere, 0.0)
    with pytest.raises(ValueError, match="x: got shape"):
        fool_input(soft, x.flatten(1), wanted)
    with pytest.raises(ValueError, match="wanted: got shape"):
        fool_input(soft, x, torch.ones(5, 5))
    with pytest.raises(ValueError, match="wanted: want finite"):
        fool_input(soft, x, 0 * wanted)
    with pytest.raises(ValueError, match="eps"):
        fool_input(soft, x, wanted, eps=-1.0)
    with pytest.raises(ValueError, match="explain"):
        fool_input(soft, x, wanted, explain="lrp")
    with pytest.raises(ValueError, match="does not depend on the image"):
        fool_input(models.linear((1, 8, 8)), x, wanted)
    with pytest.raises(ValueError, match="where"):
        location_fooling(torch.zeros(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="background"):
        scaffold(lambda r: r[:, 0], lambda r: r[:, 0], torch.ones(3))
    with pytest.raises(TypeError, match="biased"):
        scaffold(None, lambda r: r[:, 0], torch.rand(9, 2))
