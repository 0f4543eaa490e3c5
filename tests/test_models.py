"""Networks: shapes for every data set, seeds, normalisation as a layer, parameter counts of the literature."""

import pytest
import torch

from tmlcourse import models

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 17, 23)]
BUILDERS = {
    "linear": models.linear, "mlp": models.mlp, "small_cnn": models.small_cnn, "gap_cnn": models.gap_cnn,
    "resnet": models.resnet,
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_model_takes_every_data_set(name, shape):
    model = BUILDERS[name](shape, 7, seed=0)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", BUILDERS)
def test_seed_fixes_the_weights_and_leaves_the_generator_alone(name):
    state = torch.get_rng_state()
    a, b, c = (BUILDERS[name]((1, 8, 8), seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_parameter_counts_of_the_literature():
    assert models.count_parameters(models.small_cnn()) == 312_202  # SmallCNN of TRADES, MNIST
    # He et al. 2016, Table 6: ResNet-20 has 0.27 M; ours has 1x1 shortcuts where theirs pads with zeros.
    assert models.count_parameters(models.resnet()) == 269_722 + 16 * 32 + 32 * 64


def test_the_averaged_maps_of_gap_cnn_are_all_that_the_last_layer_sees():
    model, x = models.gap_cnn((3, 16, 20), 5, widths=(4, 6), seed=0), torch.rand(2, 3, 16, 20)
    maps = model[:-3](x)
    assert maps.shape == (2, 6, 8, 10)
    torch.testing.assert_close(model(x), maps.mean((2, 3)) @ model[-1].weight.T + model[-1].bias)


def test_normalize_is_the_first_layer_and_matches_the_formula():
    model = models.mlp((3, 4, 4), hidden=(5,), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), seed=0)
    x = torch.rand(2, 3, 4, 4)
    assert isinstance(model[0], models.Normalize)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(model(x), model[1:](by_hand))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.linear((28, 28)), r"shape: got \(28, 28\), want \(C, H, W\)"),
        (lambda: models.linear(classes=1), "classes: got 1"),
        (lambda: models.small_cnn((1, 3, 3)), "shape: got"),
        (lambda: models.gap_cnn((1, 3, 3)), "shape: got"),
        (lambda: models.gap_cnn(widths=()), "widths: got none"),
        (lambda: models.gap_cnn(widths=(4, 0)), "widths: got 0"),
        (lambda: models.resnet(depth=10), "depth: got 10"),
        (lambda: models.mlp(mean=0.5), "mean, std: got 0.5 and None"),
        (lambda: models.mlp(mean=0.5, std=0.0), "std: got 0.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
