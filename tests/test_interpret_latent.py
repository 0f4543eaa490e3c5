"""Codes: PCA is the best linear autoencoder, the two terms of the beta-VAE, scores on made-up codes, transfer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmlcourse import data
from tmlcourse.interpret import latent
from tmlcourse.interpret.latent import (
    VAE,
    beta_vae,
    elbo,
    mutual_information,
    mutual_information_gap,
    principal_components,
    single_change,
    transfer,
    traverse,
)

GRID = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0), torch.arange(3.0))  # every combination once


@pytest.fixture(scope="module")
def world():
    return data.discs(2000)


# ---- linear codes


def test_no_linear_autoencoder_beats_principal_components():
    x = data.load("digits", n=200).x.double()
    code = principal_components(x, 5)
    rows = x.flatten(1) - x.flatten(1).mean(0)
    error = (code.decode(code.encode(x)) - x).square().sum()
    assert error == pytest.approx(float(torch.linalg.svdvals(rows)[5:].square().sum()))
    assert torch.allclose(code.axes @ code.axes.T, torch.eye(5).double(), atol=1e-9)
    for seed in range(5):
        w = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)).double()
        z = rows @ torch.linalg.pinv(w)
        assert (rows - z @ w).square().sum() > error
        for _ in range(200):  # alternating least squares arrives
            w = torch.linalg.pinv(z) @ rows
            z = rows @ torch.linalg.pinv(w)
        assert (rows - z @ w).square().sum() == pytest.approx(float(error), rel=1e-3)


def test_principal_components_are_sklearns():
    from sklearn.decomposition import PCA

    x = data.load("digits", n=100).x.double()
    ours, peer = principal_components(x, 4), PCA(4, svd_solver="full").fit(x.flatten(1).numpy())
    same = (ours.axes @ torch.as_tensor(peer.components_).T).abs()
    assert torch.allclose(same, torch.eye(4).double(), atol=1e-8)


# ---- the beta-VAE


def test_the_two_terms_by_hand():
    model = VAE((1, 4, 4), 3, 8).double()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    m, log_v = model(x)
    q = torch.distributions.Normal(m, (log_v / 2).exp())
    error, kl = elbo(model, x, sigma=0.3, generator=torch.Generator().manual_seed(0))
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl, want)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = model.decode(m + noise * (log_v / 2).exp())
    gauss = torch.distributions.Normal(drawn, 0.3).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(error, -gauss - 16 * math.log(0.3 * math.sqrt(2 * math.pi)))


def test_a_seed_repeats_the_training_and_global_state_is_not_touched(world):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (beta_vae(world.x, steps=5, hidden=16, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.encode(world.x), second.encode(world.x))
    assert not torch.equal(first.encode(world.x), other.encode(world.x))
    assert not first.training and not any(p.requires_grad for p in first.parameters())


def test_training_explains_the_pictures_and_a_price_too_high_empties_the_code(world):
    options = {"steps": 300, "hidden": 64, "latents": 3, "start": 1.0, "seed": 0, "batch_size": 32}
    cheap, dear = beta_vae(world.x, beta=0.1, **options), beta_vae(world.x, beta=3000.0, **options)
    flat = (world.x - world.x.mean(0)).square().mean()
    assert (cheap.decode(cheap.encode(world.x)) - world.x).square().mean() < 0.8 * flat
    assert elbo(dear, world.x)[1].mean() < 0.05 < elbo(cheap, world.x)[1].mean()


# ---- scores


def test_a_code_of_one_latent_a_factor_has_gap_one_in_any_order_scale_and_sign():
    z = torch.stack([-3 * GRID[:, 2], GRID[:, 0].exp(), 7 - GRID[:, 1], torch.zeros(60)], 1)
    assert mutual_information_gap(z, GRID) == pytest.approx([1, 1, 1], abs=1e-9)
    want = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]).double()
    assert torch.allclose(mutual_information(z, GRID), want, atol=1e-9)


def test_a_tangled_code_has_gap_zero():
    assert mutual_information_gap(GRID.repeat(1, 2), GRID) == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_rotated_code_scores_between():
    v = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    c = math.sqrt(0.5)
    turned = v @ torch.tensor([[c, -c], [c, c]])
    straight, mixed = (mutual_information_gap(z, v).mean() for z in (v, turned))
    assert straight > 0.9 and mixed < 0.1


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_information_is_sklearns_and_between_0_and_1(seed, bins):
    from sklearn.metrics import mutual_info_score

    gen = torch.Generator().manual_seed(seed)
    z, v = torch.randn(80, 2, generator=gen), torch.randint(0, 4, (80, 2), generator=gen).float()
    z[:, 0] += v[:, 1]
    shares = mutual_information(z, v, bins=max(bins, 4))
    assert (shares >= 0).all() and (shares <= 1 + 1e-9).all()
    ranks = z.argsort(0).argsort(0) * max(bins, 4) // 80
    for j in range(2):
        for k in range(2):
            known = mutual_info_score(ranks[:, j].numpy(), v[:, k].numpy())
            whole = mutual_info_score(v[:, k].numpy(), v[:, k].numpy())
            assert float(shares[j, k]) == pytest.approx(known / whole, abs=1e-9)


def test_single_change_by_hand():
    z = torch.zeros(4, 3)
    after = torch.tensor([[2.0, 0, 0], [1, 1, 0], [1, -1, 1], [0, 0, 0]])
    assert single_change(z, after).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3])


# ---- transfer


class Factors:
    """The discs' own factors as a code: what a perfect model would do."""

    def __init__(self, world):
        self.table = {tuple(x.flatten().tolist()): f for x, f in zip(world.x, world.factors, strict=True)}

    def encode(self, x):
        return torch.stack([self.table[tuple(row.flatten().tolist())] for row in x])

    def decode(self, z):
        return data.discs(factors=z).x


def test_transfer_swaps_the_attribute_and_nothing_else():
    world = data.discs(10)
    model, a, b = Factors(world), world.x[:5], world.x[5:]
    want = world.factors[:5].clone()
    want[:, 1] = world.factors[5:, 1]
    assert torch.equal(transfer(model, a, b, 1), data.discs(factors=want).x)
    assert torch.equal(transfer(model, a, b, [0, 1, 2]), b) and torch.equal(transfer(model, a, a, 1), a)
    pulled = traverse(model, a[:1], 0, [0.0, 0.5])
    want = world.factors[:1].repeat(2, 1)
    want[:, 0] = torch.tensor([0.0, 0.5])
    assert torch.equal(pulled, data.discs(factors=want).x)


CALLS = {
    "too many components": (lambda x: principal_components(x[:3], 4), "k: got 4, want at most 3"),
    "a latent that does not exist": (lambda x: transfer(principal_components(x, 2), x, x, 2), r"latents: got \[2\]"),
    "no latents": (lambda x: transfer(principal_components(x, 2), x, x, []), "latents: got"),
    "other donors": (lambda x: transfer(principal_components(x, 2), x, x[:1], 0), "donors: got shape"),
    "a traverse of two": (lambda x: traverse(principal_components(x, 2), x[:2], 0, [0.0]), "want one image"),
    "a traverse beyond": (lambda x: traverse(principal_components(x, 2), x[:1], 2, [0.0]), "latent: got 2"),
    "a constant factor": (lambda x: mutual_information(torch.rand(9, 2), torch.ones(9, 2)), "column 0 never changes"),
    "other lengths": (lambda x: mutual_information(torch.rand(9, 2), torch.rand(8, 2)), "factors: got 8 rows, want 9"),
    "one latent": (lambda x: mutual_information_gap(torch.rand(9, 1), torch.rand(9, 2)), "codes: got 1 latent"),
    "NaN codes": (lambda x: mutual_information(torch.full((9, 2), torch.nan), torch.rand(9, 2)), "codes: got"),
    "other changes": (lambda x: single_change(torch.zeros(2, 3), torch.zeros(3, 3)), "after: got shape"),
    "a price of 0": (lambda x: beta_vae(x, beta=0.0), "beta: got 0"),
    "a start below 1": (lambda x: beta_vae(x, start=0.5), "start: got 0.5"),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(data.load("digits", n=8).x)


# ---- the discs themselves


@given(st.integers(0, 10_000))
def test_a_discs_place_and_colour_are_what_its_factors_say(seed):
    world = data.discs(20, seed=seed)
    above, floor = world.x[:, :, :12], world.x[:, :, 12:]
    light = above.sum(1)
    across = (light.sum(1) @ (torch.arange(16) + 0.5)) / light.sum((1, 2))
    assert torch.allclose(across, 4.75 + 6.5 * world.factors[:, 0], atol=0.15)
    warm = above[:, 0].amax((1, 2)) - above[:, 2].amax((1, 2))
    assert torch.equal(warm.argsort(), world.factors[:, 1].argsort())
    assert torch.allclose(floor, world.factors[:, 2, None, None, None].expand_as(floor) / 2)
    assert torch.equal(world.x, data.discs(factors=world.factors).x)
    assert world.x.min() >= 0 and world.x.max() <= 1


def test_bad_discs_and_photographs_are_named():
    four, far = torch.rand(2, 4), torch.full((1, 3), 2.0)
    for options, message in (
        ({}, "n, factors"),
        ({"n": 0}, "n: got 0"),
        ({"factors": four}, "factors: got shape"),
        ({"factors": far}, "factors: got values"),
    ):
        with pytest.raises(ValueError, match=message):
            data.discs(**options)
    with pytest.raises(ValueError, match="name: got 'cat'"):
        data.photograph("cat")
    with pytest.raises(ValueError, match="height: got 500"):
        data.photograph(height=500)
    assert data.photograph("china", height=40).shape == (1, 3, 40, 60)


def test_the_package_trains_a_code_whose_latents_are_factors():
    """The chapter's own claim, at half of its steps, for the colour: one latent carries it."""
    world, unseen = data.discs(4000), data.discs(500, seed=1)
    model = beta_vae(world.x, latents=4, steps=1000, seed=0)
    changed = unseen.factors.clone()
    changed[:, 1] = changed[:, 1].roll(1)
    share = latent.single_change(model.encode(unseen.x), model.encode(data.discs(factors=changed).x))
    assert share.mean() > 0.6
