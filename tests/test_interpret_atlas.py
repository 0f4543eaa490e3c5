"""Neuron groups, facets, atlases, dissection, ablation and alignment: closed forms, peers, planted truths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret import atlas
from tmlcourse.interpret.maximization import activations


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(6, 3)).eval()  # fmt: skip


def images(n=12, seed=0, size=8):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


# ---- groups


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_error_of_the_factorisation_never_rises_and_is_what_the_factors_leave(seed, k):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).double().eval()
    x = images(3, seed).double()
    groups = atlas.neuron_groups(net, "1", x, k, steps=25, seed=seed)
    assert (groups.errors.diff() <= 1e-12).all() and len(groups.errors) == 26
    assert groups.maps.min() >= 0 and groups.directions.min() >= 0
    h = activations(net, x, ["1"])[0].detach()
    rest = h - torch.einsum("nkhw,kc->nchw", groups.maps, groups.directions)
    assert float(rest.square().sum() / h.square().sum()) == pytest.approx(float(groups.errors[-1]), abs=1e-9)
    used = groups.maps.sum((0, 2, 3))
    assert (used.diff() <= 1e-9).all()


def test_groups_are_as_good_as_sklearns():
    from sklearn.decomposition import NMF

    net, x = pretrained.load("digits-28x28-standard"), data.load("digits-28x28", n=12).x
    groups = atlas.neuron_groups(net, "3", x, 4, steps=300, seed=0)
    h = activations(net, x, ["3"])[0].detach().movedim(1, -1).reshape(-1, 32).double().numpy()
    peer = NMF(4, init="random", solver="mu", max_iter=300, tol=0, random_state=0).fit(h)
    assert float(groups.errors[-1]) <= 1.1 * peer.reconstruction_err_**2 / (h**2).sum()


def test_planted_groups_are_found():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU()).eval()
    net[0].weight.data = torch.tensor([1.0, 2.0, 0.0, 0.5]).view(4, 1, 1, 1)
    groups = atlas.neuron_groups(net, "1", images(), 1, steps=50, seed=0)
    want = torch.tensor([1.0, 2.0, 0.0, 0.5])
    assert torch.allclose(groups.directions[0], want / want.norm(), atol=1e-4) and groups.errors[-1] < 1e-6


# ---- facets


def test_facets_separate_two_kinds_and_start_from_their_means():
    kinds = torch.arange(20) % 5 == 0  # 4 of one kind, 16 of the other
    x = torch.where(kinds[:, None, None, None], 0.9, 0.1) * torch.ones(20, 1, 4, 4)
    x = x + 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    facet, starts = atlas.facets(net, "1", x, 2, nearest=30)
    assert torch.equal(facet == 1, kinds) and starts.shape == (2, 1, 4, 4)
    assert torch.allclose(starts, x.mean(0).expand_as(starts))  # 30 nearest of 20: all
    _, starts = atlas.facets(net, "1", x, 2, nearest=4)
    assert torch.allclose(starts[1], x[kinds].mean(0)) and starts[0].max() < 0.2


# ---- the atlas


def test_an_atlas_averages_what_falls_into_each_cell(cnn):
    x = images(50)
    whole = atlas.activation_atlas(cnn, "3", x, side=1)
    h = activations(cnn, x, ["3"])[0].detach()
    assert torch.allclose(whole.directions[0], h.mean(0), atol=1e-6) and whole.counts.tolist() == [50]
    a = atlas.activation_atlas(cnn, "3", x, side=4)
    assert a.counts.sum() == 50 and torch.allclose((a.directions * a.counts[:, None]).sum(0) / 50, h.mean(0), atol=1e-6)
    few = atlas.activation_atlas(cnn, "3", x, side=4, least=4)
    assert (few.counts >= 4).all() and len(few.counts) < len(a.counts)
    assert torch.equal(a.directions, atlas.activation_atlas(cnn, "3", x, side=4).directions)
    with_places = [atlas.activation_atlas(cnn, "1", x, side=2, seed=s).directions for s in (0, 0, 1)]
    assert torch.equal(*with_places[:2]) and not torch.equal(*with_places[1:])


def test_neighbours_on_the_map_are_similar():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).eval()
    net[1].weight.data, net[1].bias.data = torch.eye(4), torch.zeros(4)
    x = torch.zeros(40, 1, 2, 2)
    x[:20, 0, 0, 0] = 1.0
    x[20:, 0, 1, 1] = 1.0
    x = x * (0.5 + 0.5 * torch.rand(40, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    a = atlas.activation_atlas(net, "1", x, side=2)
    for column in (0, 1):
        kind = a.directions[a.columns == column]
        assert (kind.argmax(1) == kind[0].argmax()).all()


def test_a_sheet_lays_the_pictures_out(cnn):
    a = atlas.activation_atlas(cnn, "3", images(30), side=3, least=2)
    pictures = torch.arange(len(a.counts)).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    sheet = a.sheet(pictures, background=-1.0)
    assert sheet.shape == (1, 1, 6, 6)
    for i, (r, c) in enumerate(zip(a.rows.tolist(), a.columns.tolist(), strict=True)):
        assert (sheet[0, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] == i).all()
    assert (sheet == -1).sum() == 4 * (9 - len(a.counts))
    with pytest.raises(ValueError, match="want"):
        a.sheet(pictures[:-1])


# ---- dissection and ablation


def test_dissection_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False)).eval()
    net[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    x = torch.arange(100.0).view(1, 1, 10, 10) / 100
    masks = x >= 0.85
    iou = atlas.dissect(net, "0", x, masks, quantile=0.9)  # channel 0: the nine largest; channel 1: the nine smallest
    assert iou.tolist() == pytest.approx([9 / 15, 0.0])


def test_a_channel_that_is_the_mask_has_overlap_one():
    shapes = data.shapes(16)
    x = shapes.masks.float()
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).eval()
    net[0].weight.data.fill_(1.0)
    share = 1 - float(x.mean())
    iou = atlas.dissect(net, "0", x, shapes.masks, quantile=share - 0.01)
    assert iou.item() == pytest.approx(1.0)


def test_trained_units_mark_the_shape_better_than_untrained_ones():
    shapes = data.load("shapes", n=64)
    trained = atlas.dissect(pretrained.load("shapes-standard"), "9", shapes.x, shapes.masks)
    assert trained.max() > 0.4


def test_ablation_is_zero_inside_and_gone_outside(cnn):
    x = images()
    with torch.no_grad():
        before, h = cnn(x), cnn[:2](x)
        h[:, [1, 4]] = 0
        with atlas.ablated(cnn, "1", [1, 4]) as net:
            assert torch.allclose(net(x), cnn[2:](h), atol=1e-6)
        assert torch.equal(cnn(x), before) and hooks(cnn) == 0
        with atlas.ablated(cnn, "1", []):
            assert torch.equal(cnn(x), before)
    with pytest.raises(ValueError, match="channels: got"), atlas.ablated(cnn, "1", [6]):
        cnn(x)
    with pytest.raises(RuntimeError), atlas.ablated(cnn, "1", [0]):
        raise RuntimeError
    assert hooks(cnn) == 0


# ---- alignment


def test_alignment_of_a_linear_model_is_the_cosine_with_its_weights():
    net = models.linear((1, 8, 8), classes=3, seed=0).double()
    x, y = images(5).double(), torch.tensor([0, 1, 2, 0, 1])
    rows, w = x.flatten(1), net[-1].weight.detach()[y]
    centred = rows - rows.mean(1, keepdim=True)
    want = ((centred * w).sum(1) / centred.norm(dim=1) / w.norm(dim=1)).abs()
    assert torch.allclose(atlas.alignment(net, x, y), want)
    net[-1].weight.data[0] = centred[0]
    assert atlas.alignment(net, x[:1], y[:1]).item() == pytest.approx(1.0)
    assert atlas.alignment(net, torch.full((1, 1, 8, 8), 0.3).double(), y[:1]).item() < 1e-6


def test_robust_gradients_align_with_the_shapes():
    shapes = data.load("shapes", n=100)
    means = [
        atlas.alignment(pretrained.load(f"shapes-{who}"), shapes.x, shapes.y).mean() for who in ("standard", "robust")
    ]
    assert means[1] > 1.2 * means[0]


# ---- errors

CALLS = {
    "groups before a ReLU": (lambda n: atlas.neuron_groups(n, "0", images(), 2), "layer: '0' gives values in"),
    "groups without positions": (lambda n: atlas.neuron_groups(n, "3", images(), 2), "layer: '3' gives"),
    "no such layer": (lambda n: atlas.neuron_groups(n, "77", images(), 2), "layer: got '77'"),
    "too many facets": (lambda n: atlas.facets(n, "3", images(3), 4), "k: got 4 facets of 3 images"),
    "an atlas of one image": (lambda n: atlas.activation_atlas(n, "3", images(1)), "x: got 1 image"),
    "empty cells": (lambda n: atlas.activation_atlas(n, "3", images(), least=99), "least: got 99"),
    "masks of another kind": (lambda n: atlas.dissect(n, "1", images(), images()), "masks: got torch.float32"),
    "empty masks": (lambda n: atlas.dissect(n, "1", images(), images() > 2), "masks: got no marked pixel"),
    "a quantile of 1": (lambda n: atlas.dissect(n, "1", images(), images() > 0.5, quantile=1.0), "quantile"),
    "a class that does not exist": (lambda n: atlas.alignment(n, images(1), torch.tensor([3])), "got label 3"),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_bad_input_is_named_and_the_model_left_alone(cnn, call, message):
    with pytest.raises(ValueError, match=message):
        call(cnn)
    assert hooks(cnn) == 0 and all(p.grad is None for p in cnn.parameters())
