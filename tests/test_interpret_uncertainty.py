"""Uncertainty: the decomposition by hand, the limits, the model left as it was, doubt where it belongs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models
from tmlcourse.interpret.uncertainty import heteroscedastic, uncertainty


class Says(nn.Module):
    """A model that answers with a fixed tensor."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, x):
        return self.z


def members(seed, shape=(4, 3, 2, 2), count=3):
    g = torch.Generator().manual_seed(seed)
    return [Says(3 * torch.randn(shape, generator=g, dtype=torch.float64)) for _ in range(count)]


@given(st.integers(0, 50))
def test_the_parts_by_hand_and_their_sum(seed):
    ensemble, x = members(seed), torch.zeros(4, 1, dtype=torch.float64)
    p = torch.stack([m.z.softmax(1) for m in ensemble])
    mean = p.mean(0)
    u = uncertainty(ensemble, x, measure="variance")
    assert torch.allclose(u.mean, mean)
    assert torch.allclose(u.epistemic, p.var(0, correction=0).sum(1))
    assert torch.allclose(u.aleatoric, (p * (1 - p)).sum(2).mean(0))
    assert torch.allclose(u.total, (mean * (1 - mean)).sum(1))
    u = uncertainty(ensemble, x)
    entropy = torch.distributions.Categorical(probs=p.movedim(2, -1)).entropy()
    assert torch.allclose(u.aleatoric, entropy.mean(0))
    assert torch.allclose(u.total, torch.distributions.Categorical(probs=mean.movedim(1, -1)).entropy())
    assert torch.allclose(u.total, u.epistemic + u.aleatoric) and (u.epistemic > -1e-12).all()
    assert u.total.shape == (4, 2, 2)


@given(st.integers(0, 50))
def test_regression_is_kendall_and_gals_formula(seed):
    ensemble, x = members(seed, (5, 2)), torch.zeros(5, 1, dtype=torch.float64)
    y = torch.stack([m.z[:, 0] for m in ensemble])
    noise = torch.stack([m.z[:, 1].exp() for m in ensemble]).mean(0)
    u = uncertainty(ensemble, x, kind="regression")
    assert torch.allclose(u.total, (y**2).mean(0) - y.mean(0) ** 2 + noise)
    assert torch.allclose(u.aleatoric, noise) and torch.allclose(u.mean, y.mean(0))


def test_members_that_agree_leave_no_epistemic_doubt():
    one, x = members(0)[0], torch.zeros(4, 1, dtype=torch.float64)
    for measure in ("entropy", "variance"):
        u = uncertainty([one, one, one], x, measure=measure)
        assert u.epistemic.abs().max() < 1e-12 and torch.allclose(u.total, u.aleatoric)
    sure = [Says(torch.tensor([[50.0, -50.0]])), Says(torch.tensor([[-50.0, 50.0]]))]
    u = uncertainty(sure, torch.zeros(1, 1))
    assert abs(float(u.epistemic) - 0.6931472) < 1e-6 and float(u.aleatoric) < 1e-6
    certain = uncertainty([Says(torch.tensor([[2000.0, -2000.0]]))] * 2, torch.zeros(1, 1))
    assert float(certain.total) == 0


def dropout_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 10)
        ).eval()


def test_dropout_is_seeded_and_the_model_left_as_it_was():
    net, x = dropout_net(), data.load("digits", n=4).x
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    first = uncertainty(net, x, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.epistemic, uncertainty(net, x, seed=1).epistemic)
    assert not torch.equal(first.epistemic, uncertainty(net, x, seed=2).epistemic)
    assert not any(layer.training for layer in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert first.epistemic.dtype == torch.float32 and (first.epistemic > 0).all()
    net[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        uncertainty(net, x)
    assert not any(layer.training for layer in net.modules())


def test_the_loss_is_least_at_the_true_noise():
    y = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 1
    values = {s: float(heteroscedastic(torch.stack([torch.ones_like(y), torch.full_like(y, s)], 1), y))
              for s in torch.linspace(-4, 0, 81).tolist()}  # fmt: skip
    best = min(values, key=values.get)
    assert abs(best - float(((y - 1) ** 2).mean().log())) < 0.05
    gaussian = -torch.distributions.Normal(1.0, 0.5).log_prob(y).mean() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert (
        abs(
            float(
                heteroscedastic(
                    torch.stack([torch.ones_like(y), torch.full_like(y, 2 * torch.tensor(0.5).log())], 1), y
                )
            )
            - float(gaussian)
        )
        < 1e-6
    )


def test_an_ensemble_doubts_what_it_has_not_seen():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, generator=g) * 2 - 1
    noise = 0.02 + 0.3 * (x > 0) * x
    y = (2 * x + noise * torch.randn(200, 1, generator=g))[:, 0]
    ensemble = []
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(300):
            loss = heteroscedastic(net(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ensemble.append(net.eval())
    inside, noisy, outside = torch.tensor([[-0.7]]), torch.tensor([[0.9]]), torch.tensor([[-4.0]])
    here, there, far = (uncertainty(ensemble, v, kind="regression") for v in (inside, noisy, outside))
    assert there.aleatoric > 5 * here.aleatoric
    assert far.epistemic > 10 * here.epistemic


def test_bad_input_is_named():
    x = data.load("digits", n=2).x
    with pytest.raises(ValueError, match="no dropout layer"):
        uncertainty(models.mlp((1, 8, 8)), x)
    with pytest.raises(ValueError, match="ensemble of 1"):
        uncertainty([models.mlp((1, 8, 8))], x)
    with pytest.raises(ValueError, match="train mode"):
        uncertainty(dropout_net().train(), x)
    with pytest.raises(ValueError, match="samples"):
        uncertainty(dropout_net(), x, samples=1)
    with pytest.raises(ValueError, match="kind"):
        uncertainty(dropout_net(), x, kind="ranking")
    with pytest.raises(ValueError, match="want \\(N, 2"):
        uncertainty(dropout_net(), x, kind="regression")
    with pytest.raises(ValueError, match="x: got shape"):
        uncertainty(dropout_net(), x / 0)
    with pytest.raises(TypeError, match="x: got torch.int64"):
        uncertainty(dropout_net(), x.long())
    with pytest.raises(ValueError, match="output: got"):
        heteroscedastic(torch.zeros(3, 3), torch.zeros(3))
