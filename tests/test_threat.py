"""Threat sets: projections, norms and steps against brute force, linear programs and each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from tmlcourse.threat import L0, L1, L2, Linf

BALLS = {"Linf": Linf, "L2": L2, "L1": L1}
RADIUS = {"Linf": 0.3, "L2": 0.7, "L1": 1.3, "L0": 3}


def sets(d=None):
    return [Linf(0.3), L2(0.7), L1(1.3), L0(3)]


def batch(seed, n=8, d=12, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=g, dtype=torch.float64)
    x[x < 0.2], x[x > 0.8] = 0, 1  # pixels on the edge of the box are the usual case
    return x, x + scale * torch.randn(n, d, generator=g, dtype=torch.float64)


@given(
    seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 3.0, 100.0]), norm=st.sampled_from([*BALLS])
)
def test_projection_is_feasible_idempotent_and_keeps_what_is_inside(seed, eps, norm):
    threat = BALLS[norm](eps)
    x, v = batch(seed)
    p = threat.project(v, x)
    assert threat.contains(p, x, tolerance=1e-9).all()
    torch.testing.assert_close(threat.project(p, x), p, atol=1e-9, rtol=0)


@given(seed=st.integers(0, 10**6), norm=st.sampled_from([*BALLS]))
def test_projection_is_non_expansive(seed, norm):
    threat = BALLS[norm](RADIUS[norm])
    x, v = batch(seed)
    w = batch(seed + 1)[1]
    assert ((threat.project(v, x) - threat.project(w, x)).norm(dim=1) <= (v - w).norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("box", [(0.0, 1.0), None])
def test_projection_is_the_nearest_point(norm, box):
    """Feasible, and no further from v than what a general solver finds for min ||z - v||^2 over ball and box."""
    threat = BALLS[norm](RADIUS[norm], box)
    x, v = batch(3, n=12, d=5)
    for x0, v0, p in zip(x.numpy(), v.numpy(), threat.project(v, x).numpy(), strict=True):
        # z = x + a - b with a, b >= 0 makes every ball smooth enough for SLSQP.
        def split(ab, x0=x0):
            return x0 + ab[:5] - ab[5:]

        ball = {"Linf": lambda ab: threat.eps - (ab[:5] + ab[5:]), "L1": lambda ab: threat.eps - ab.sum(),
                "L2": lambda ab: threat.eps**2 - ((ab[:5] - ab[5:]) ** 2).sum()}[norm]  # fmt: skip
        constraints = [{"type": "ineq", "fun": ball}]
        if box:
            constraints += [{"type": "ineq", "fun": split}, {"type": "ineq", "fun": lambda ab, s=split: 1 - s(ab)}]
        best = minimize(lambda ab, v0=v0, s=split: ((s(ab) - v0) ** 2).sum(), np.zeros(10), bounds=[(0, None)] * 10,
                        constraints=constraints, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
        assert ((p - v0) ** 2).sum() <= best.fun + 1e-7
    assert threat.contains(threat.project(v, x), x, tolerance=1e-9).all()


def test_l1_projection_without_box_is_duchi():
    x, v = batch(5, n=20, d=30)
    p = L1(1.3, box=None).project(v, x)
    for delta, got in zip((v - x).numpy(), (p - x).numpy(), strict=True):
        lo, hi = 0.0, np.abs(delta).max()  # brute-force bisection for the soft threshold
        for _ in range(200):
            t = (lo + hi) / 2
            lo, hi = (t, hi) if np.maximum(np.abs(delta) - t, 0).sum() > 1.3 else (lo, t)
        np.testing.assert_allclose(got, np.sign(delta) * np.maximum(np.abs(delta) - lo, 0), atol=1e-9)


def test_l0_projection_is_the_nearest_point_by_enumeration():
    from itertools import combinations

    x, v = batch(7, n=20, d=6)
    p = L0(2).project(v, x)
    for x0, v0, got in zip(x, v, p, strict=True):
        best = min(
            ((torch.where(torch.tensor([i in keep for i in range(6)]), v0.clamp(0, 1), x0) - v0) ** 2).sum()
            for keep in combinations(range(6), 2)
        )
        assert ((got - v0) ** 2).sum() <= best + 1e-12
        assert (got != x0).sum() <= 2


@given(seed=st.integers(0, 10**6), which=st.integers(0, 3), alpha=st.sampled_from([0.0, 0.01, 1.0, 7.0]))
def test_steepest_step_reaches_the_dual_norm(seed, which, alpha):
    threat = sets()[which]
    _, g = batch(seed)
    v = threat.steepest(g, alpha)
    torch.testing.assert_close((v * g).sum(1), alpha * threat.dual_norm(g))
    size = v.abs().amax(1) if which == 3 else threat.norm(v)
    assert (size <= alpha * (1 + 1e-12)).all()
    each = threat.steepest(g, torch.full((len(g),), alpha, dtype=g.dtype))  # one step size an image
    torch.testing.assert_close(each, v)


@pytest.mark.parametrize("threat", sets(), ids=str)
def test_no_feasible_direction_beats_the_steepest_step(threat):
    _, g = batch(11, n=1, d=4)
    v = torch.randn(20000, 4, dtype=torch.float64)
    v = threat._keep(v, v.abs()).clamp(-1, 1) if isinstance(threat, L0) else v / threat.norm(v)[:, None]
    assert (v @ g[0]).max() <= threat.dual_norm(g)[0] + 1e-9


def test_steepest_step_survives_zero_and_tiny_gradients():
    for threat in sets():
        assert (threat.steepest(torch.zeros(2, 3)) == 0).all()
        tiny = torch.full((1, 4), 1e-30)
        torch.testing.assert_close((threat.steepest(tiny) * 1e30 * tiny).sum(1), threat.dual_norm(tiny * 1e30))


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.2), L1(0.2)], ids=str)
def test_random_start_is_uniform_in_the_ball(threat):
    """P(||delta|| <= r eps) = r^d for a uniform draw from any norm ball of dimension d."""
    x = torch.full((20000, 3), 0.5, dtype=torch.float64)
    ratio = threat.norm(threat.random(x, torch.Generator().manual_seed(0)) - x) / threat.eps
    for r in (0.25, 0.5, 0.75, 0.9):
        assert abs((ratio <= r).double().mean() - r**3) < 4 * (r**3 * (1 - r**3) / 20000) ** 0.5
    centred = (threat.random(x, torch.Generator().manual_seed(1)) - x).mean(0)
    assert centred.abs().max() < 0.005


@given(seed=st.integers(0, 10**6), which=st.integers(0, 3))
def test_random_start_is_feasible_and_seeded(seed, which):
    threat = sets()[which]
    x, _ = batch(seed)
    draw = threat.random(x, torch.Generator().manual_seed(seed))
    assert threat.contains(draw, x, tolerance=1e-9).all()
    assert torch.equal(draw, threat.random(x, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("norm", ["Linf", "L1"])
def test_repeated_steps_solve_the_linear_program(norm):
    """max <c, z> over ball and box, against scipy's LP solver: the box is part of the feasible set."""
    threat = BALLS[norm](RADIUS[norm])
    x, c = batch(13, n=10, d=6)
    z = x
    for _ in range(60):
        z = threat.ascend(z, c, x, threat.eps / 5)
    for x0, c0, got in zip(x.numpy(), c.numpy(), z.numpy(), strict=True):
        if norm == "Linf":
            bounds = [(max(0, a - 0.3), min(1, a + 0.3)) for a in x0]
            best = -linprog(-c0, bounds=bounds).fun
        else:  # z = x + a - b
            eye = np.eye(6)
            rows = np.vstack([np.ones(12), np.hstack([eye, -eye]), np.hstack([-eye, eye])])
            best = c0 @ x0 - linprog(np.concatenate([-c0, c0]), A_ub=rows, b_ub=np.concatenate([[1.3], 1 - x0, x0])).fun
        assert abs(c0 @ got - best) < 1e-8


def test_contains_sees_what_is_outside():
    x = torch.full((1, 4), 0.5)
    outside = {Linf(0.1): [0.62, 0.5, 0.5, 0.5], L2(0.1): [0.58, 0.58, 0.5, 0.5], L1(0.1): [0.56, 0.56, 0.5, 0.5],
               L0(1): [0.6, 0.6, 0.5, 0.5], Linf(0.8): [1.01, 0.5, 0.5, 0.5]}  # fmt: skip
    for threat, z in outside.items():
        assert not threat.contains(torch.tensor([z]), x).any(), threat
        assert threat.contains(x, x).all()


def test_half_and_single_precision_keep_their_type():
    for threat in sets():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.rand(2, 1, 3, 3).to(dtype)
            assert threat.project(x + 1, x).dtype == dtype
            assert threat.ascend(x, torch.randn(2, 1, 3, 3).to(dtype), x, 0.1).dtype == dtype


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_bad_radius(bad):
    for ball in BALLS.values():
        with pytest.raises(ValueError, match=r"eps: got .*want a finite number >= 0"):
            ball(bad)


def test_bad_arguments():
    with pytest.raises(TypeError, match="eps: got '0.1'"):
        Linf("0.1")
    with pytest.raises(TypeError, match="k: got 1.5"):
        L0(1.5)
    with pytest.raises(ValueError, match="k: got -1"):
        L0(-1)
    with pytest.raises(ValueError, match="box: got"):
        Linf(0.1, box=(1.0, 0.0))
    with pytest.raises(ValueError, match="x_adv: got shape"):
        Linf(0.1).contains(torch.zeros(1, 2), torch.zeros(1, 3))
