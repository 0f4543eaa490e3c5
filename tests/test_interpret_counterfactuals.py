"""Counterfactuals: the closed form and a linear program, the rules of the domain, honest failure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from tmlcourse import data
from tmlcourse.interpret.counterfactuals import counterfactual, linear_counterfactual, mad, one_hot_groups


def problem(seed, d=5):
    g = torch.Generator().manual_seed(seed)
    w, x = (torch.randn(d, generator=g, dtype=torch.float64) for _ in range(2))
    scale, room = (torch.rand(d, generator=g, dtype=torch.float64) + 0.2 for _ in range(2))
    wanted = float(w @ x) + (1 if seed % 2 else -1) * float(torch.rand(1, generator=g))
    return w, x, scale, x - room, x + room, wanted


@given(st.integers(0, 200), st.booleans())
def test_the_exact_counterfactual_is_the_optimum_of_the_linear_program(seed, boxed):
    w, x, scale, low, high, wanted = problem(seed)
    box = {"low": low, "high": high} if boxed else {}
    found = linear_counterfactual(w, 0.0, x, wanted, scale, **box)
    # min sum (p + m) / scale with x' = x + p - m, <w, x'> = wanted
    room_up, room_down = ((high - x).tolist(), (x - low).tolist()) if boxed else ([None] * 5, [None] * 5)
    cost = (1 / scale).repeat(2).numpy()
    program = linprog(cost, A_eq=torch.cat([w, -w])[None].numpy(), b_eq=[wanted - float(w @ x)],
                      bounds=[(0, b) for b in room_up + room_down])  # fmt: skip
    assert found.found == (program.status == 0)
    if found.found:
        assert abs(found.distance - program.fun) < 1e-7 and abs(found.score - wanted) < 1e-9
        assert boxed or len(found.changed) == 1 and found.changed[0] == int((w.abs() * scale).argmax())
    else:
        assert torch.equal(found.x, x)


@given(st.integers(0, 200))
def test_wachter_flips_a_linear_model_at_the_exact_distance(seed):
    w, x, scale, low, high, wanted = problem(seed)
    exact = linear_counterfactual(w, 0.0, x, wanted, scale, low=low, high=high)
    found = counterfactual(lambda r: r @ w, x, wanted, scale, low=low, high=high, tol=0.005)
    if exact.found:
        assert found.found and abs(found.score - wanted) <= 0.005 + 1e-9
        assert found.distance <= exact.distance * 1.01 + 1e-9
        assert found.distance >= exact.distance - 0.005 / float((w.abs() * scale).min())
        assert (found.x >= low - 1e-9).all() and (found.x <= high + 1e-9).all()
    elif found.found:  # within the tolerance of what is just out of reach
        reach = float(torch.where(w > 0, high, low) @ w if wanted > float(w @ x) else torch.where(w > 0, low, high) @ w)
        assert abs(reach - wanted) <= 0.005 + 1e-9


NAMES = ("age", "savings", "jobs", "home=own", "home=rent", "home=free")
X = torch.tensor([30.0, 2.0, 3.0, 0.0, 1.0, 0.0])
SCALE = torch.tensor([5.0, 1.0, 1.0, 0.5, 0.5, 0.5])
RULES = {"groups": one_hot_groups(NAMES), "integer": torch.tensor([False, False, True, False, False, False])}


def score(rows):
    return rows @ torch.tensor([0.02, 0.3, 0.4, 3.0, 0.0, 1.0]) - 5.0


def test_rules_of_the_domain_are_kept():
    assert one_hot_groups(NAMES) == [[3, 4, 5]]
    cheap = counterfactual(score, X, 0.1, SCALE, tol=0.05, **RULES)
    assert cheap.found and score(cheap.x[None]) >= 0.05
    assert cheap.x[2] == cheap.x[2].round() and set(cheap.x[3:].tolist()) == {0.0, 1.0} and cheap.x[3:].sum() == 1
    rent = counterfactual(score, X, 0.1, SCALE, tol=0.05, switches=0, **RULES)
    assert torch.equal(rent.x[3:], X[3:]) and rent.distance >= cheap.distance
    fixed = torch.tensor([False, True, True, False, False, False])
    move = counterfactual(
        score, X, 0.1, SCALE, tol=0.05, fixed=fixed, high=torch.tensor([40.0, 9, 9, 1, 1, 1]), **RULES
    )
    assert torch.equal(move.x[:3][fixed[:3]], X[:3][fixed[:3]]) and move.x[3] == 1
    assert "home had been own" in move.say(NAMES) and "rent" not in move.say(NAMES)
    group = counterfactual(score, X, 0.1, SCALE, tol=0.05, fixed=torch.tensor([0, 0, 0, 0, 1, 0]).bool(), **RULES)
    assert torch.equal(group.x[3:], X[3:])


def test_whole_numbers_are_the_least_that_is_enough():
    only = torch.tensor([True, True, False, True, True, True])
    found = counterfactual(score, X, 0.1, SCALE, tol=0.05, fixed=only, **RULES)
    needed = next(k for k in range(3, 99) if score((X + torch.tensor([0.0, 0, k - 3, 0, 0, 0]))[None]) >= 0.05)
    assert found.changed == (2,) and found.x[2] == needed
    assert f"jobs had been {needed} instead of 3" in found.say(NAMES)


def test_a_decision_that_nothing_changes_is_said_to_be_one():
    stuck = counterfactual(score, X, 0.1, SCALE, fixed=torch.ones(6, dtype=torch.bool), **RULES)
    assert not stuck.found and torch.equal(stuck.x, X) and "Nothing" in stuck.say(NAMES)
    boxed = counterfactual(score, X, 50.0, SCALE, low=0.0, high=40.0, **RULES)
    assert not boxed.found and torch.equal(boxed.x, X)
    done = counterfactual(score, X, float(score(X[None])), SCALE, **RULES)
    assert done.found and done.distance == 0 and "already" in done.say(NAMES)
    assert not linear_counterfactual(torch.zeros(2), 0.0, torch.zeros(2), 1.0, torch.ones(2)).found


def test_a_network_on_a_real_table_is_flipped_and_sparsely():
    table = data.load_table("breast_cancer")
    Z = (table.X - table.X.mean(0)) / table.X.std(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.Softplus(), torch.nn.Linear(8, 1)).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(Z)[:, 0], table.y.double())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    for k in (0, 5, 19):
        start = float(net(Z[k]).detach()[0])
        found = counterfactual(lambda r: net(r)[:, 0], Z[k], -0.1 if start > 0 else 0.1, mad(Z), tol=0.05)
        assert found.found and found.score * start < 0 and len(found.changed) <= 10
    assert all(p.grad is None for p in net.parameters())


def test_mad():
    table = torch.tensor([[1.0, 0, 7], [2, 0, 7], [3, 0, 7], [10, 1, 7]])
    assert torch.allclose(mad(table), torch.tensor([1.0, 0.25, 0.0]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="scale: got shape"):
        counterfactual(score, X, 0.1, SCALE[:3])
    with pytest.raises(ValueError, match="outside in feature"):
        counterfactual(score, X, 0.1, SCALE, high=20.0)
    with pytest.raises(ValueError, match="groups: columns"):
        counterfactual(score, X, 0.1, SCALE, groups=[[0, 1]])
    with pytest.raises(ValueError, match="groups: got"):
        counterfactual(score, X, 0.1, SCALE, groups=[[3]])
    with pytest.raises(ValueError, match="fixed"):
        counterfactual(score, X, 0.1, SCALE, fixed=torch.ones(6))
    with pytest.raises(ValueError, match="switches"):
        counterfactual(score, X, 0.1, SCALE, switches=5)
    with pytest.raises(ValueError, match="tol"):
        counterfactual(score, X, 0.1, SCALE, tol=0.0)
    with pytest.raises(ValueError, match="wanted"):
        counterfactual(score, X, float("nan"), SCALE)
    with pytest.raises(ValueError, match="score: got"):
        counterfactual(lambda r: r, X, 0.1, SCALE)
    with pytest.raises(TypeError, match="x: got torch.int64"):
        counterfactual(score, X.long(), 0.1, SCALE)
    with pytest.raises(ValueError, match="w: got shape"):
        linear_counterfactual(torch.ones(2), 0.0, X, 0.1, SCALE)
