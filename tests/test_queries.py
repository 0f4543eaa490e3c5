"""The door to a black box: exact counts, a budget that cannot be exceeded or bypassed, and answers without a gradient."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tmlcourse import models
from tmlcourse.attacks import zeroth_order as zo
from tmlcourse.attacks.queries import BudgetExceeded, Queries, open_door
from tmlcourse.threat import L1, L2, Linf


class Witness:
    """A linear classifier that keeps its own record of every row it was shown, in order."""

    def __init__(self, d=12, classes=3, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(classes, d, generator=g, dtype=torch.float64).to(dtype)
        self.rows = []

    def __call__(self, x):
        self.rows.append(x.clone())
        return x.flatten(1) @ self.w.t()

    @property
    def seen(self):
        return sum(len(r) for r in self.rows)


def problem(n=5, dtype=torch.float32, seed=0, shape=(1, 4, 3)):
    """Images that the witness gets right, most of them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g).to(dtype)
    witness = Witness(x[0].numel(), dtype=dtype, seed=seed)
    y = (x.flatten(1) @ witness.w.t()).argmax(1)
    return witness, x, y


DECODER = zo.resize((1, 4, 3), 2)
BOUNDED = {
    "finite_difference": lambda *a, **k: zo.finite_difference(*a, steps=3, **k),
    "groups": lambda *a, **k: zo.finite_difference(*a, steps=3, estimator=zo.groups(4), **k),
    "nes": lambda *a, **k: zo.nes(*a, q=4, **k),
    "zo_signsgd": lambda *a, **k: zo.zo_signsgd(*a, q=3, **k),
    "zo_svrg": lambda *a, **k: zo.zo_svrg(*a, q=2, anchor=5, every=3, **k),
    "zo_adam": lambda *a, **k: zo.zo_adam(*a, q=3, **k),
    "zo_ngd": lambda *a, **k: zo.zo_ngd(*a, q=3, **k),
}
NEAREST = {
    "zoo": lambda *a, **k: zo.zoo(*a, k=2, **k),
    "zoo_newton": lambda *a, **k: zo.zoo(*a, k=3, solver="newton", **k),
    "zoo_small": lambda *a, **k: zo.zoo(*a, k=2, size=2, **k),
    "autozoom": lambda *a, **k: zo.autozoom(*a, q=2, decoder=DECODER, **k),
    "zo_admm": lambda *a, **k: zo.zo_admm(*a, q=3, **k),
}


def run(name, predict, x, y, eps=0.1, **options):
    if name in BOUNDED:
        return BOUNDED[name](predict, x, y, Linf(eps), **options)
    return NEAREST[name](predict, x, y, **options)


# --- the door itself -------------------------------------------------------------------------------------------------


def test_rows_are_charged_to_their_images():
    witness, x, _ = problem()
    oracle = Queries(witness)
    oracle(x[[0, 3, 3]], torch.tensor([0, 3, 3]))
    oracle(x[:2])
    assert oracle.count.tolist() == [2, 1, 0, 2] and oracle.count.dtype == torch.int64
    assert oracle.total == 5 == witness.seen


def test_the_door_closes_before_asking():
    witness, x, _ = problem()
    oracle = Queries(witness, budget=2)
    oracle(x), oracle(x[:2])
    with pytest.raises(BudgetExceeded, match="image 1 "):
        oracle(x[[1, 4]], torch.tensor([1, 4]))
    with pytest.raises(BudgetExceeded, match="image 4 "):
        oracle(x[[4, 4]], torch.tensor([4, 4]))  # the repeats of one call count together
    assert oracle.count.tolist() == [2, 2, 1, 1, 1] and witness.seen == 7
    assert oracle.left(6).tolist() == [0, 0, 1, 1, 1, 2]


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=12), st.integers(0, 6))
def test_no_sequence_of_questions_exceeds_the_budget(calls, budget):
    witness, x, _ = problem()
    oracle, truth = Queries(witness, budget=budget), [0] * 5
    for index in calls:
        wanted = [truth[i] + index.count(i) for i in range(5)]
        if max(wanted) > budget:
            with pytest.raises(BudgetExceeded):
                oracle(x[index], torch.tensor(index))
        else:
            oracle(x[index], torch.tensor(index))
            truth = wanted
        assert (oracle.count.tolist() + [0] * 5)[:5] == truth and witness.seen == oracle.total == sum(truth)


def test_nothing_but_answers_gets_through():
    net = models.mlp((1, 4, 3), 3, hidden=(5,), seed=0)
    oracle = Queries(net, budget=3)
    x = torch.rand(2, 1, 4, 3, requires_grad=True)
    answer = oracle(x)
    assert not answer.requires_grad and answer.grad_fn is None
    reachable = [getattr(oracle, name) for name in dir(oracle)]
    assert not any(thing is net or thing is net.forward for thing in reachable)
    for name in ("budget", "count", "total", "answers", "predict"):
        with pytest.raises(AttributeError):
            setattr(oracle, name, 10**9)
    oracle.count.zero_()
    assert oracle.count.tolist() == [1, 1], "the count handed out is a copy"


def test_labels_hide_the_scores():
    witness, x, y = problem()
    oracle = Queries(witness, answers="labels")
    assert torch.equal(oracle(x), y)
    with pytest.raises(ValueError, match="labels, want scores"):
        open_door(oracle, x, 10)
    assert torch.equal(open_door(Queries(witness), x, 10, answers="labels")(x), y)
    assert torch.equal(Queries(lambda x: y, answers="labels")(x), y), "a predict that only knows labels will do"


def test_two_doors_in_a_row_both_count_and_the_smaller_budget_wins():
    witness, x, _ = problem()
    outer = Queries(witness, budget=3)
    outer(x[:1])
    inner = open_door(outer, x, 5)
    assert inner.left(2).tolist() == [2, 3]
    inner(x), inner(x)
    with pytest.raises(BudgetExceeded):
        inner(x)
    assert inner.count.tolist() == [2] * 5 and outer.count.tolist() == [3, 2, 2, 2, 2] and witness.seen == outer.total


def test_large_questions_and_channels_last_give_the_same_answers():
    torch.manual_seed(0)
    for shape in ((1, 9, 6), (3, 6, 9)):
        plain = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
        plain(torch.rand(1, *shape))

        class Views(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                return self.net[3](self.net[:2](x).view(len(x), -1))

        x = torch.rand(300, *shape)
        with torch.no_grad():
            want = plain(x)
        for net in (plain, Views(plain)):
            oracle = Queries(net)
            torch.testing.assert_close(oracle(x), want)
            assert oracle.total == 300


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: Queries(None), "predict: got NoneType"),
        (lambda x, w: Queries(w, budget=-1), "budget: got -1"),
        (lambda x, w: Queries(w, answers="logits"), "answers: got 'logits'"),
        (lambda x, w: Queries(w)(x, torch.zeros(2, dtype=torch.int64)), "index: got torch.int64 \\(2,\\)"),
        (lambda x, w: Queries(w)(x, torch.full((5,), -1)), "want an image number >= 0"),
        (lambda x, w: Queries(w)(x[:0]), "x: got no row"),
        (lambda x, w: Queries(lambda x: w(x)[:, 0])(x), "predict: got answers \\(5,\\), want scores"),
        (lambda x, w: Queries(lambda x: w(x)[:2])(x), "predict: got 2 answers for 5 rows"),
        (lambda x, w: Queries(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)))(x), "in train mode"),
        (lambda x, w: open_door(w, x, -1), "queries: got -1"),
    ],
)
def test_bad_use_is_named(call, message):
    witness, x, _ = problem()
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, witness)
    assert witness.seen == 0 or "answers" in message


# --- every attack behind the door ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BOUNDED, *NEAREST])
@settings(max_examples=12)
@given(budget=st.integers(0, 90), seed=st.integers(0, 3))
def test_counts_are_exact_and_no_budget_is_exceeded(name, budget, seed):
    witness, x, y = problem(seed=seed)
    oracle = Queries(witness)
    x_adv = run(name, oracle, x, y, queries=budget, seed=seed)
    assert oracle.total == witness.seen and (oracle.count <= budget).all()
    moved = (x_adv != x).flatten(1).any(1)
    seen = torch.cat(witness.rows) if witness.rows else x[:0]
    for image in x_adv[moved]:
        assert (seen == image).flatten(1).all(1).any(), "an answer that the attacker never looked at"
    if budget == 0:
        assert not moved.any() and witness.seen == 0


@pytest.mark.parametrize("name", [*BOUNDED, *NEAREST])
def test_the_callers_own_budget_is_kept_image_by_image(name):
    witness, x, y = problem(n=6, seed=1)
    oracle = Queries(witness, budget=60)
    for spent in (20, 50, 60):  # images 0, 1, 2 have been asked about before
        image = {20: 0, 50: 1, 60: 2}[spent]
        oracle(x[[image] * spent], torch.full((spent,), image))
    run(name, oracle, x, y, queries=45, seed=0)
    assert (oracle.count <= 60).all() and (oracle.count[3:] <= 45).all() and oracle.total == witness.seen
    assert oracle.count[3:].max() > 20, "the images with queries left went on"


@pytest.mark.parametrize("name", [*BOUNDED, *NEAREST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_images_reproducible_and_leave_no_trace(name, dtype):
    torch.manual_seed(0)
    net = models.mlp((1, 4, 3), 3, hidden=(6,), seed=1).to(dtype)
    x = torch.rand(4, 1, 4, 3, dtype=dtype)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 3  # wrong from the start
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    x_adv = run(name, net, x, y, queries=200, seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and not x_adv.requires_grad
    assert (x_adv >= 0).all() and (x_adv <= 1).all() and torch.equal(x_adv[0], x[0])
    assert torch.equal(x_adv, run(name, net, x, y, queries=200, seed=3))
    one = run(name, net, x[1:2], y[1:2], queries=200, seed=3)
    assert one.shape == x[1:2].shape
    if name in BOUNDED:
        assert Linf(0.1).contains(x_adv, x).all()
        assert torch.equal(run(name, net, x, y, eps=0.0, queries=200, seed=3), x)


@pytest.mark.parametrize("name", [*BOUNDED, *NEAREST])
def test_targets_are_reached_or_refused(name):
    witness, x, y = problem(n=6, seed=2)
    target = (y + 1) % 3
    x_adv = run(name, witness, x, y, eps=0.8, queries=800, seed=0, target=target)
    moved = (x_adv != x).flatten(1).any(1)
    assert moved.float().mean() > 0.6
    if name in NEAREST:
        assert (witness(x_adv)[moved].argmax(1) == target[moved]).all()
    else:
        assert (witness(x_adv).argmax(1) == target).float().mean() > 0.6
    seen = witness.seen
    with pytest.raises(ValueError, match="target: got the true label for 2 images"):
        run(name, witness, x, y, queries=50, target=torch.cat([y[:2], target[2:]]))
    with pytest.raises(ValueError, match="want \\[0, 1\\]"):
        run(name, witness, 255 * x, y, queries=50)
    with pytest.raises(ValueError, match="queries: got -1"):
        run(name, witness, x, y, queries=-1)
    assert witness.seen == seen


@pytest.mark.parametrize("threat", [Linf(0.3), L2(0.8), L1(2.0)])
@pytest.mark.parametrize("name", [n for n in BOUNDED if n != "groups"])
def test_bounded_attacks_keep_to_every_set_and_never_lose(name, threat):
    witness, x, y = problem(n=8, seed=3)
    x_adv = BOUNDED[name](witness, x, y, threat, queries=400, seed=0)
    assert threat.contains(x_adv, x).all()
    z, z0 = witness(x_adv), witness(x)
    lead = lambda z: z.scatter(1, y[:, None], -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]  # noqa: E731
    loss = (
        lead if name not in ("finite_difference", "zo_ngd") else lambda z: -z.log_softmax(1).gather(1, y[:, None])[:, 0]
    )
    fooled = z.argmax(1) != y
    assert (fooled | (loss(z) >= loss(z0) - 1e-6)).all() and (loss(z) > loss(z0)).float().mean() > 0.8
