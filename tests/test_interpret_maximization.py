"""Activation maximisation: closed forms of the linear case, regularisers, waves, DeepDream; the model stays as it was."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tmlcourse import data, models, pretrained
from tmlcourse.interpret import maximization as am
from tmlcourse.interpret.maximization import (
    activation_maximization,
    activations,
    channel,
    colour_basis,
    deep_dream,
    direction,
    energy,
    logit,
    measure,
    neuron,
    on_sphere,
    probability,
    total_variation,
)

SHAPE = (1, 8, 8)


@pytest.fixture
def linear():
    return models.linear(SHAPE, classes=3, seed=0).double()


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(5, 4)).eval()  # fmt: skip


def ascend(model, objective, **options):
    return activation_maximization(model, objective, **{"shape": SHAPE, "seed": 0, "steps": 8} | options)


# ---- exact answers


def test_l2_and_a_linear_logit_give_half_the_weights_over_lambda(linear):
    w = linear[-1].weight.detach().reshape(3, *SHAPE)
    free = ascend(linear, logit([0, 1, 2]), l2=0.5, frequency=False, bounded=False, steps=300, lr=0.03)
    assert torch.allclose(free, w / (2 * 0.5), atol=1e-6)
    boxed = ascend(linear, logit([0, 1, 2]), l2=0.05, frequency=False, steps=300, lr=0.03)
    assert torch.allclose(boxed, (w / (2 * 0.05)).clamp(0, 1), atol=1e-6)


def test_without_a_penalty_a_linear_logit_ends_at_the_corner_of_the_box(linear):
    x = ascend(linear, logit(1), frequency=False, steps=60, lr=0.1)
    assert torch.equal(x[0], (linear[-1].weight[1].reshape(SHAPE) > 0).double())


def test_on_the_sphere_one_step_is_exact_for_a_linear_logit(linear):
    w = linear[-1].weight.detach().reshape(3, *SHAPE)
    x = on_sphere(linear, logit([0, 1, 2]), shape=SHAPE, norm=2.5, steps=1, seed=0)
    assert torch.allclose(x, 2.5 * w / w.flatten(1).norm(dim=1)[:, None, None, None])


def test_on_the_sphere_the_energy_of_a_linear_layer_is_power_iteration(linear):
    weight = linear[-1].weight.detach()
    with torch.no_grad():
        linear[-1].bias.zero_()
    x = on_sphere(linear, energy(""), shape=SHAPE, norm=1.0, steps=500, seed=0)
    _, s, v = torch.linalg.svd(weight)
    assert (x.flatten() @ v[0]).abs() == pytest.approx(1, abs=1e-6)
    assert (weight @ x.flatten()).norm() == pytest.approx(s[0].item(), rel=1e-6)


def test_each_step_on_the_sphere_climbs_a_convex_function(linear):
    values = [on_sphere(linear, energy(""), shape=SHAPE, steps=t, seed=3).flatten() for t in range(1, 12)]
    values = [linear[-1](v[None]).square().mean().item() for v in values]
    assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))


def test_it_is_the_loop_of_the_chapter(cnn):
    x = torch.full((1, *SHAPE), 0.3)
    ours = ascend(cnn, logit(2), shape=None, start=x, frequency=False, l2=0.01, steps=20)
    x = x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05, maximize=True)
    for _ in range(20):
        (x.grad,) = torch.autograd.grad(cnn(x)[0, 2] - 0.01 * x.square().sum(), x)
        optimizer.step()
        x.detach().clamp_(0, 1)
    assert torch.allclose(ours, x.detach(), atol=1e-6)


# ---- objectives


def test_objectives_are_what_they_say(cnn):
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        h, z = cnn[:2](x), cnn(x)
        flat = cnn[:5](x)
    each = torch.arange(4)
    assert torch.allclose(measure(cnn, x, neuron("1", 3)), h[:, 3, 4, 4])
    assert torch.allclose(measure(cnn, x, neuron("1", [0, 1, 2, 3], y=0, x=7)), h[each, each, 0, 7])
    assert torch.allclose(measure(cnn, x, neuron("4", 2)), flat[:, 2])
    assert torch.allclose(measure(cnn, x, channel("1", 3)), h[:, 3].mean((1, 2)))
    assert torch.allclose(measure(cnn, x, energy("1")), h.square().mean((1, 2, 3)))
    assert torch.allclose(measure(cnn, x, logit([3, 2, 1, 0])), z[each, 3 - each])
    assert torch.allclose(measure(cnn, x, probability(1)), z.log_softmax(1)[:, 1])
    v = torch.randn(6)
    assert torch.allclose(measure(cnn, x, direction("1", v)), h.mean((2, 3)) @ v, atol=1e-6)
    unit = measure(cnn, x, direction("1", torch.eye(6)[3]))
    assert torch.allclose(unit, measure(cnn, x, channel("1", 3)))
    cos = torch.nn.functional.cosine_similarity(h.mean((2, 3)), v.expand(4, 6)).clamp_min(0.1)
    assert torch.allclose(measure(cnn, x, direction("1", v, power=2)), (h.mean((2, 3)) @ v) * cos**2, atol=1e-6)


@pytest.mark.parametrize("objective", [neuron("2", 1), channel("2", 1), energy("2"), direction("2", torch.ones(5)),
                                       logit(1), probability(1)], ids=lambda o: o.says)  # fmt: skip
@pytest.mark.parametrize("frequency", [False, True])
def test_every_objective_rises_and_the_images_are_images(cnn, objective, frequency):
    start = ascend(cnn, objective, steps=1, lr=1e-9)
    end = ascend(cnn, objective, steps=30, frequency=frequency)
    assert measure(cnn, end, objective) > measure(cnn, start, objective)
    assert end.min() >= 0 and end.max() <= 1 and end.shape == (1, *SHAPE) and not end.requires_grad


def test_what_lies_behind_the_layer_is_not_computed(cnn):
    def stop(*_):
        raise AssertionError("computed too much")

    cnn[3].register_forward_hook(stop)
    assert activations(cnn, torch.rand(2, *SHAPE), ["2", "0"])[0].shape == (2, 5, 8, 8)


def test_layers_come_in_the_order_asked_for_and_a_repeated_one_gives_its_first_output(cnn):
    x = torch.rand(2, *SHAPE)
    late, early, same = activations(cnn, x, ["2", "0", "2"])
    assert late is same and torch.allclose(early, cnn[0](x)) and torch.allclose(late, cnn[:3](x))
    relu = nn.ReLU()
    twice = nn.Sequential(nn.Flatten(), relu, nn.Linear(64, 3), relu).eval()
    assert activations(twice, x, ["1"])[0].shape == (2, 64)


def test_an_in_place_layer_behind_the_chosen_one_does_no_harm():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)).eval()
    assert ascend(net, channel("0", 1)).shape == (1, *SHAPE)


# ---- regularisers, waves, colours


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
def test_total_variation_is_the_sum_over_neighbours_and_zero_for_constants_alone(seed, c, h, w):
    x = torch.rand(2, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[1] = x[1, :, :1, :1]
    by_hand = sum((x[0, :, i, j] - x[0, :, a, b]).abs().sum() for i in range(h) for j in range(w)
                  for a, b in ((i + 1, j), (i, j + 1)) if a < h and b < w)  # fmt: skip
    tv = total_variation(x)
    assert tv[0] == pytest.approx(float(by_hand)) and tv[1] == 0
    assert (tv[0] > 0) == (h * w > 1)


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.floats(0, 2))
def test_waves_and_back(seed, h, w, decay):
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.98 + 0.01
    colours = torch.tensor(am.NATURAL_COLOURS, dtype=torch.float64)
    for basis in (None, colours):
        waves = am._Waves.of(x, decay, basis)
        assert torch.allclose(waves.image(waves.waves(x)), x, atol=1e-9)


def test_penalties_and_waves_make_smoother_images(cnn):
    def roughness(**options):
        x = ascend(cnn, channel("2", [0, 1, 2]), steps=20, lr=0.02, **options)
        return x.diff(dim=-1).square().sum() / (x - x.mean()).square().sum()

    rough, smooth = (ascend(cnn, channel("2", 1), steps=20, frequency=False, tv=tv) for tv in (0.0, 0.02))
    assert total_variation(smooth) < 0.9 * total_variation(rough)
    assert roughness(decay=2.0) < 0.9 * roughness(decay=0.0)


def test_a_colour_basis_is_a_root_of_the_covariance():
    x = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1]
    root = colour_basis(x)
    want = x.movedim(1, 0).flatten(1).cov()
    assert torch.allclose(root @ root.T / (root @ root.T).trace(), want / want.trace(), atol=1e-6)
    assert root.norm(dim=0).max() == pytest.approx(1)
    assert torch.tensor(am.NATURAL_COLOURS).norm(dim=0).max() == pytest.approx(1, abs=1e-3)


def test_diversity_keeps_the_features_apart(cnn):
    def likeness(**options):
        x = ascend(cnn, channel("2", [1, 1, 1]), steps=60, lr=0.1, **options)
        return am._likeness(activations(cnn, x, ["2"])[0].detach(), "2").mean()

    assert likeness(diversity=("2", 2.0)) < likeness() - 0.005


def test_gram_likeness_by_hand():
    h = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    gram = torch.einsum("nchw,ndhw->ncd", h, h)
    cos = [[(a * b).sum() / (a.norm() * b.norm()) for b in gram] for a in gram]
    want = torch.tensor([sum(cos[i][j] for j in range(3) if j != i) / 2 for i in range(3)], dtype=torch.float64)
    assert torch.allclose(am._likeness(h, "0"), want)


# ---- promises of every function


@pytest.mark.parametrize("frequency", [False, True])
def test_a_seed_repeats_bit_for_bit_and_global_state_is_not_touched(cnn, frequency):
    options = {"jitter": 2, "frequency": frequency, "n": 2}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = ascend(cnn, logit(1), **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, ascend(cnn, logit(1), **options))
    assert not torch.equal(first, ascend(cnn, logit(1), **options | {"seed": 1}))
    assert torch.equal(deep_dream(cnn, first, "0", octaves=1, seed=0), deep_dream(cnn, first, "0", octaves=1, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was_even_after_an_error(cnn):
    before = copy.deepcopy(cnn.state_dict())
    cnn[2].weight.requires_grad_(False)
    calls = [lambda: ascend(cnn, logit(1)), lambda: ascend(cnn, channel("2", 99)),
             lambda: ascend(cnn, neuron("2", 0, y=40)),
             lambda: deep_dream(cnn, torch.rand(1, 1, 16, 16), "2", octaves=1, steps=2),
             lambda: on_sphere(cnn, logit(9), shape=SHAPE),
             lambda: activations(cnn, torch.rand(1, 3, 8, 8), ["2"])]  # fmt: skip
    for call in calls:
        with contextlib.suppress(ValueError, RuntimeError):
            call()
        assert hooks(cnn) == 0 and not cnn.training
        assert all(p.grad is None for p in cnn.parameters())
        assert [p.requires_grad for p in cnn.parameters()] == [True, True, False, True, True, True]
        assert all(torch.equal(before[k], v) for k, v in cnn.state_dict().items())


def test_never_worse_than_the_start(cnn):
    for lr in (0.05, 50.0):  # with the second, every step goes far too far
        start = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
        for frequency in (False, True):
            end = ascend(cnn, logit(0), shape=None, start=start, tv=0.05, lr=lr, frequency=frequency)

            def score(x):
                return measure(cnn, x, logit(0)) - 0.05 * total_variation(x)

            assert (score(end) >= score(start) - 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_sizes_and_counts(cnn, dtype):
    net = cnn.to(dtype)
    for shape in ((1, 8, 8), (1, 7, 10), (1, 9, 5)):
        x = ascend(net, channel("2", [0, 1]), shape=shape, jitter=1)
        assert x.shape == (2, *shape) and x.dtype == dtype
    assert ascend(net, energy("2"), n=3).shape[0] == 3
    dream = deep_dream(net, torch.rand(2, 1, 20, 33, dtype=dtype), "2", octaves=2, steps=2)
    assert dream.shape == (2, 1, 20, 33) and dream.dtype == dtype and dream.min() >= 0 and dream.max() <= 1


def test_watch_sees_every_step(cnn):
    seen = []
    x = ascend(cnn, logit([0, 1]), steps=5, watch=lambda *what: seen.append(what))
    assert [s for s, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert all(im.shape == (2, *SHAPE) and v.shape == (2,) for _, im, v in seen)
    assert torch.equal(seen[-1][1], x) and torch.allclose(seen[-1][2], measure(cnn, x, logit([0, 1])))


BAD = {
    "a layer that does not exist": (dict(objective=channel("9", 0)), "layer: got '9', want"),
    "a channel that does not exist": (
        dict(objective=channel("2", [0, 5])),
        r"c: got \[0, 5\], want integers in \[0, 4\]",
    ),
    "a class that does not exist": (dict(objective=logit(4)), r"k: got 4, want integers in \[0, 3\]"),
    "a negative class": (dict(objective=probability(-1)), "k: got -1"),
    "a position outside": (dict(objective=neuron("2", 0, y=8)), r"y, x: got \(8, 4\)"),
    "a position where there is none": (dict(objective=neuron("4", 0, y=1)), "has no positions"),
    "a direction of another size": (dict(objective=direction("2", torch.ones(3))), "v: got 3 numbers, want 5"),
    "two counts": (dict(objective=logit([0, 1]), n=3), "n: got 3 from n, 2 from objective"),
    "neither shape nor start": (dict(shape=None), "shape, start"),
    "a flat shape": (dict(shape=(8, 8)), r"shape: got \(8, 8\)"),
    "a start outside [0, 1]": (dict(shape=None, start=2 * torch.ones(1, *SHAPE)), "start: got values"),
    "no steps": (dict(steps=0), "steps: got 0"),
    "a negative penalty": (dict(tv=-1.0), "tv: got -1.0"),
    "free waves": (dict(bounded=False), "bounded"),
    "diversity of one": (dict(diversity=("2", 1.0)), "diversity: got n = 1"),
    "diversity without positions": (dict(n=2, diversity=("4", 1.0)), "diversity: layer '4'"),
    "a singular basis": (dict(colours=torch.zeros(1, 1)), "colours"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(cnn, options, message):
    objective = options.pop("objective", logit(0)) if "objective" in options else logit(0)
    with pytest.raises(ValueError, match=message):
        ascend(cnn, objective, **options)


def test_more_bad_input(cnn):
    with pytest.raises(TypeError, match="model"):
        ascend(lambda x: x, logit(0))
    with pytest.raises(TypeError, match="k: got"):
        logit(1.5)
    with pytest.raises(TypeError, match="v: got"):
        direction("2", [1.0])
    with pytest.raises(ValueError, match="octaves"):
        deep_dream(cnn, torch.rand(1, 1, 12, 12), "2", octaves=4)
    with pytest.raises(ValueError, match="ratio"):
        deep_dream(cnn, torch.rand(1, 1, 12, 12), "2", ratio=1.0)
    with pytest.raises(ValueError, match="layer: got 'x'"):
        deep_dream(cnn, torch.rand(1, 1, 12, 12), "x")
    with pytest.raises(ValueError, match="gradient is zero"):
        on_sphere(cnn, am.Objective("", lambda z: 0 * z[:, 0], "nothing"), shape=SHAPE)
    with pytest.raises(ValueError, match="train mode"):
        ascend(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 2)).train(), logit(0))


# ---- networks as they are


def test_dreaming_raises_the_layers_energy_on_a_photograph():
    net, x = pretrained.load("cifar10-standard"), data.photograph(height=48)
    dream = deep_dream(net, x, "5", octaves=2, steps=4, lr=0.02, seed=0)
    assert measure(net, dream, energy("5")) > 1.5 * measure(net, x, energy("5"))
    assert dream.shape == x.shape


def test_a_trained_network_reads_its_own_prototypes_and_so_does_another():
    classes = list(range(10))
    x = activation_maximization(pretrained.load("digits-28x28-standard"), logit(classes), shape=(1, 28, 28), steps=40,
                                jitter=2, l2=0.02, tv=0.01, seed=0)  # fmt: skip
    for name in ("standard", "certified"):
        assert (pretrained.load(f"digits-28x28-{name}")(x).argmax(1) == torch.arange(10)).float().mean() >= 0.8


def test_the_layers_of_a_torchvision_network_can_be_visited():
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False).eval()
    net = nn.Sequential(models.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), net).eval()
    for layer in ("1.inception3a", "1.inception4d"):
        x = activation_maximization(net, channel(layer, [0, 1]), shape=(3, 64, 64), steps=2, jitter=4,
                                    colours=am.NATURAL_COLOURS, seed=0)  # fmt: skip
        assert x.shape == (2, 3, 64, 64) and torch.isfinite(x).all()
    assert deep_dream(net, torch.rand(1, 3, 64, 64), "1.inception3a", octaves=2, steps=1).shape == (1, 3, 64, 64)
