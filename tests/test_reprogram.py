"""Reprogramming: the picture is what the formula says, the black box is only asked, and the program learns."""

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from tmlcourse import models
from tmlcourse.attacks.queries import Queries
from tmlcourse.attacks.reprogram import Program, _assign, frame, reprogram

SHAPE = (1, 8, 8)


def blobs(n=80, d=4, seed=0):
    """Two classes of rows, low and high, that no threshold on one pixel of the black box was made for."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=g)
    return (0.3 + 0.4 * y[:, None] + 0.1 * torch.randn(n, d, generator=g)).clamp(0, 1), y


def test_the_picture_is_the_data_in_the_middle_and_the_program_around_it():
    w = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    mask = frame((3, 9, 8), 4)
    program = Program(w, mask, torch.tensor([0, 1]), 4)
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    images = program.images(rows)
    assert images.shape == (2, 3, 9, 8)
    assert torch.equal(images[:, mask > 0], ((1 + torch.tanh(w)) / 2)[mask > 0].expand(2, -1))
    assert (mask == 0).sum() == 3 * 16
    middle = images[:, :, 2:6, 2:6]
    assert torch.equal(middle[:, :, ::2, ::2].flatten(2), rows[:, None].expand(-1, 3, -1))
    assert torch.equal(middle[:, :, ::2, ::2], middle[:, :, 1::2, 1::2]), "blocks of two by two"


def test_classes_are_dealt_out_evenly_and_by_lift():
    p = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.3, 0.4, 0.1]])
    assert _assign(p, torch.tensor([0, 1]), 2).tolist() == [0, 0, 1, 1, -1]
    with pytest.raises(ValueError, match="want at most 5"):
        _assign(p, torch.tensor([0, 1]), 6)


@pytest.mark.parametrize("queries", [1, 40, 500, 3000])
def test_the_total_is_never_exceeded_and_counted_by_row(queries):
    rows, y = blobs()
    shown = []
    net = models.linear(SHAPE, 5, seed=0)

    def predict(x):
        shown.append(x)
        return net(x)

    oracle = Queries(predict)
    program = reprogram(oracle, rows, y, SHAPE, queries=queries, batch=8, q=5, seed=0)
    assert oracle.total == sum(map(len, shown)) <= queries and oracle.total > 0.8 * min(queries, 80)
    assert len(oracle.count) <= len(rows)
    images = torch.cat(shown)
    assert (images >= 0).all() and (images <= 1).all(), "only pictures are asked about"
    assert program.mapping.shape == (5,) and (program.weights * (1 - program.mask) == 0).all()


def test_a_row_budget_ends_the_training_early():
    rows, y = blobs()
    oracle = Queries(models.linear(SHAPE, 5, seed=0), budget=30)
    program = reprogram(oracle, rows, y, SHAPE, queries=100_000, batch=8, q=5, seed=0)
    assert (oracle.count <= 30).all() and isinstance(program, Program)


def test_a_program_beats_the_frame_without_paint_and_is_reproducible():
    rows, y = blobs(200)
    new, truth = blobs(200, seed=1)
    body = models.mlp(SHAPE, 6, hidden=(30,), seed=2)
    net = lambda x: 10 * body(x)  # noqa: E731
    before = torch.get_rng_state()
    program = reprogram(net, rows, y, SHAPE, queries=30_000, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(program.weights, reprogram(net, rows, y, SHAPE, queries=30_000, seed=0).weights)
    plain = reprogram(net, rows, y, SHAPE, queries=200, seed=0)
    share = [(p.predict(net, new) == truth).float().mean().item() for p in (plain, program)]
    assert plain.weights.abs().max() == 0 and share[1] > 0.9 and share[1] > share[0] + 0.1


def test_a_network_for_digits_learns_to_read_a_table():
    """30 measurements of 569 tumours, read by a network for handwritten digits that can only be asked."""
    x, y = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(x).float(), torch.tensor(y)
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:300], order[300:]
    from tmlcourse import data, training

    digits = data.load("digits-28x28", "train")
    net = models.mlp(digits.shape, hidden=(50,), seed=0)
    training.fit(net, digits, epochs=10, seed=0)
    program = reprogram(net, x[train], y[train], digits.shape, queries=60_000, seed=0)
    right = (program.predict(net, x[test]) == y[test]).float().mean()
    assert right > y[test].float().mean() + 0.08


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=0), "queries: got 0"),
        (dict(q=0), "q: got 0"),
        (dict(gamma=-1.0), "gamma: got -1"),
        (dict(shape=(1, 3, 3)), "too small for 4 features"),
        (dict(rows=torch.full((80, 4), 2.0)), "rows: got values"),
        (dict(y=torch.arange(80) % 7), "y: got"),
    ],
)
def test_bad_arguments_are_named(change, message):
    rows, y = blobs()
    arguments = dict(rows=rows, y=y, shape=SHAPE, queries=200) | change
    with pytest.raises((TypeError, ValueError), match=message):
        reprogram(
            models.linear(SHAPE, 5, seed=0),
            arguments.pop("rows"),
            arguments.pop("y"),
            arguments.pop("shape"),
            **arguments,
        )
