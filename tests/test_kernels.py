"""GPU kernels: each equals its reference, natively on a GPU and elsewhere in Triton's interpreter; the rule who computes."""

import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import skip_or_fail
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from tmlcourse import attacks, certify, data, kernels, models, training
from tmlcourse.kernels import ascent, backsubstitution, clipping, dispatch, graphs, interval, roofline
from tmlcourse.privacy import clipped_gradient
from tmlcourse.threat import L0, L1, L2, Linf

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
some = settings(max_examples=15)

if DEVICE == "cpu":  # read when Triton is first imported, which the tests below do
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def triton():
    """Leave out what needs Triton where there is none (macOS, Windows); it must not be there and unusable."""
    if not dispatch.installed():
        skip_or_fail("needs Triton, which comes with torch on Linux")
    assert kernels.ready(), "Triton was imported before TRITON_INTERPRET was set"


@pytest.fixture
def fresh():
    """As if nothing had been said yet."""
    before = set(dispatch._said)
    dispatch._said.clear()
    yield
    dispatch._said.update(before)


def draw_tensor(seed, shape, layout="dense", dtype=torch.float32, scale=1.0):
    """Random numbers (normal) in one of several places in memory."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "rows apart":
        base = torch.randn(len(shape) and 2 * shape[0], *shape[1:], generator=generator)[::2]
    elif layout == "turned":
        base = torch.randn(*shape[::-1], generator=generator).permute(*reversed(range(len(shape))))
    elif layout == "one for all":
        base = torch.randn(1, *shape[1:], generator=generator).expand(shape)
    else:
        base = torch.randn(shape, generator=generator)
    return (base * scale).to(DEVICE, dtype)


LAYOUTS = st.sampled_from(["dense", "rows apart", "turned", "one for all"])
SHAPES = st.sampled_from([(0, 5), (1, 1), (2, 1, 1, 7), (3, 1, 5, 5), (2, 3, 8, 8), (2, 1, 28, 28), (1, 1031)])
SEEDS = st.integers(0, 10_000)


def near(found, wanted, tolerance=1e-5):
    """Whether two tensors are the same to 1e-5, relative to the entries and, below that, to the largest of them."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and found.device == wanted.device
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(largest, 1e-30))


# ---- the step of an attack


def points(seed, shape, layout, threat):
    """Clean images, points of their sets (one image at a corner of the box), gradients with zeros and ties."""
    x = draw_tensor(seed, shape, layout).mul(0.4).add(0.5).clamp(0, 1)
    here = threat.random(x, torch.Generator(DEVICE).manual_seed(seed)) if len(x) else x.clone()
    grad = draw_tensor(seed + 1, shape, layout)
    return x, here, torch.where(grad.abs() < 0.3, 0.0, (3 * grad).round() if seed % 3 == 0 else grad)


@pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=["box", "no box"])
@pytest.mark.parametrize("norm, size", [(Linf, 0.1), (L2, 0.8), (L1, 3.0)], ids=["Linf", "L2", "L1"])
@given(seed=SEEDS, shape=SHAPES, layout=LAYOUTS, step=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), each=st.booleans())
@some
def test_ascent_step_equals_what_threat_says(triton, norm, size, box, seed, shape, layout, step, each):
    threat = norm(size, box)
    x, here, grad = points(seed, shape, layout, threat)
    alpha = step * size
    alpha = torch.linspace(0, alpha, len(x), device=DEVICE) if each else alpha
    with kernels.using("triton"):
        found = kernels.ascent_step(here, grad, x, threat, alpha)
    near(found, threat.ascend(here, grad, x, alpha))
    assert threat.contains(found, x).all()


@given(seed=SEEDS, eps=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 40.0]), norm=st.sampled_from([Linf, L2, L1]))
@example(seed=0, eps=0.0, norm=L1)
@some
def test_ascent_step_with_every_radius_and_steps_that_leave_the_set(triton, seed, eps, norm):
    x = draw_tensor(seed, (3, 1, 6, 6)).clamp(0, 1)  # most pixels at an end of the box
    threat, grad = norm(eps), draw_tensor(seed + 1, (3, 1, 6, 6))
    grad[0] = 0
    with kernels.using("triton"):
        found = kernels.ascent_step(x, grad, x, threat, 2 * eps + 0.1)
    near(found, threat.ascend(x, grad, x, 2 * eps + 0.1))


def test_ascent_step_where_the_box_binds_everywhere(triton):
    """A white image and a gradient uphill: no pixel may move."""
    x = torch.ones(2, 1, 3, 3, device=DEVICE)
    for threat in (Linf(0.2), L2(0.5), L1(2.0)):
        with kernels.using("triton"):
            assert torch.equal(kernels.ascent_step(x, torch.rand_like(x) + 0.1, x, threat, 0.3), x)


def test_better_pixels_that_touch_the_box_stay_there(triton):
    """The best pixel is at its end already: it is pushed all the same, so that the projection takes from the others."""
    x = torch.full((1, 5), 0.8, device=DEVICE)
    here = torch.tensor([[1.0, 0.85, 0.8, 0.8, 0.8]], device=DEVICE)
    grad = torch.tensor([[9.0, 5.0, 5.0, 1.0, 0.0]], device=DEVICE)
    with kernels.using("triton"):
        found = kernels.ascent_step(here, grad, x, L1(0.3), 0.3)
    near(found, L1(0.3).ascend(here, grad, x, 0.3))
    assert found[0, 0] == 1


def test_tiny_gradients_have_a_direction_and_huge_ones_do_not_overflow(triton):
    x = torch.full((2, 4), 0.5, device=DEVICE)
    for scale in (1e-30, 1e30):
        with kernels.using("triton"):
            moved = kernels.ascent_step(
                x, scale * torch.tensor([[3.0, 4, 0, 0]], device=DEVICE).expand(2, 4), x, L2(1.0), 0.1
            )
        near(moved - x, torch.tensor([[0.06, 0.08, 0, 0]], device=DEVICE).expand(2, 4), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_short_formats_are_computed_in_float32(triton, dtype, tolerance):
    for threat in (Linf(0.1), L2(0.8), L1(3.0)):
        x, here, grad = (t.to(dtype) for t in points(1, (3, 1, 5, 5), "dense", threat))
        with kernels.using("triton"):
            found = kernels.ascent_step(here, grad, x, threat, 0.05)
        exact = threat.ascend(here.float(), grad.float(), x.float(), 0.05)
        assert found.dtype == dtype and (found.float() - exact).abs().max() <= tolerance
    grads = draw_tensor(2, (40, 33)).to(dtype)
    with kernels.using("triton"):
        total, norms = kernels.clip_and_sum(grads, 2.0)
    exact, exact_norms = clipping.reference([grads.float()], 2.0)
    assert total.dtype == norms.dtype == dtype
    assert (total.float() - exact[0]).abs().max() <= tolerance * exact[0].abs().max()
    assert (norms.float() - exact_norms).abs().max() <= tolerance * exact_norms.max()


def test_other_sets_take_their_own_step(triton):
    x, grad = torch.rand(2, 1, 4, 4, device=DEVICE), draw_tensor(0, (2, 1, 4, 4))
    with kernels.using("triton"):
        assert torch.equal(kernels.ascent_step(x, grad, x, L0(3), 0.5), L0(3).ascend(x, grad, x, 0.5))


# ---- clipping


@given(seed=SEEDS, n=st.sampled_from([1, 2, 9, 33]), size=st.sampled_from([1, 7, 513, 1300]), layout=LAYOUTS,
       clip=st.sampled_from([1e-3, 1.0, 20.0, math.inf]))  # fmt: skip
@some
def test_clip_and_sum_equals_its_reference(triton, seed, n, size, layout, clip):
    grads = [draw_tensor(seed, (n, size), layout), draw_tensor(seed + 1, (n, 2, 3), layout), draw_tensor(seed, (n,))]
    with kernels.using("triton"):
        sums, norms = kernels.clip_and_sum(grads, clip)
        alone, own = kernels.clip_and_sum(grads[0], clip)
        squares, total = kernels.squared_norms(grads[0]), kernels.weighted_sum(grads[0], norms)
    wanted, wanted_norms = clipping.reference(grads, clip)
    near(norms, wanted_norms)
    for found, want in zip(sums, wanted, strict=True):
        near(found, want)
    near(alone, clipping.reference(grads[:1], clip)[0][0])
    near(own.square(), squares)
    near(total, torch.tensordot(wanted_norms, grads[0], 1))


def test_clip_and_sum_moves_by_the_clip_and_drops_broken_examples(triton):
    grads = draw_tensor(3, (6, 50))
    grads[1, 3], grads[4, 0] = torch.nan, torch.inf
    for mode in ("triton", "reference"):
        with kernels.using(mode):
            total, norms = kernels.clip_and_sum(grads, 0.5)
            without, _ = kernels.clip_and_sum(grads[[0, 2, 3, 5]], 0.5)
        near(total, without)
        assert norms.isfinite().tolist() == [True, False, True, True, False, True]
        assert total.norm() <= 4 * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_empty_batches(triton, mode):
    with kernels.using(mode):
        total, norms = kernels.clip_and_sum(torch.zeros(0, 3, 2, device=DEVICE), 1.0)
        assert torch.equal(total, torch.zeros(3, 2, device=DEVICE)) and norms.shape == (0,)
        z, r = kernels.interval_linear(*(torch.rand(s, device=DEVICE) for s in ((3, 5), 3, (0, 5), (0, 5))))
        assert z.shape == r.shape == (0, 3)
        a, added = kernels.relu_backsubstitution(*(torch.zeros(0, 5, device=DEVICE),) * 4)
        assert a.shape == (0, 5) and added.shape == (0,)
        x = torch.zeros(0, 1, 4, 4, device=DEVICE)
        assert kernels.ascent_step(x, x, x, Linf(0.1), 0.1).shape == x.shape


# ---- intervals


@given(seed=SEEDS, sizes=st.sampled_from([(1, 1, 1), (3, 5, 2), (33, 17, 40), (2, 70, 65)]), layout=LAYOUTS,
       slack=st.booleans())  # fmt: skip
@some
def test_interval_linear_and_its_gradients_equal_the_reference(triton, seed, sizes, layout, slack):
    n, inputs, outputs = sizes
    made = (draw_tensor(seed, (outputs, inputs), layout), draw_tensor(seed + 1, (outputs,)),
            draw_tensor(seed + 2, (n, inputs), layout), draw_tensor(seed + 3, (n, inputs), layout).abs(),
            draw_tensor(seed + 4, (outputs,)).abs() if slack else None)  # fmt: skip
    if layout != "one for all":
        made[0][0, 0] = 0  # |w| has a kink there
    leaves = {
        mode: [None if t is None else t.detach().clone().requires_grad_() for t in made] for mode in dispatch.MODES
    }
    answers, grads = {}, {}
    for mode in ("triton", "reference"):
        with kernels.using(mode):
            answers[mode] = kernels.interval_linear(*leaves[mode])
            weights = [draw_tensor(seed + 5 + i, (n, outputs)) for i in range(2)]
            value = sum((a * w).sum() for a, w in zip(answers[mode], weights, strict=True))
            value.backward()
            grads[mode] = [t.grad for t in leaves[mode] if t is not None]
    for found, want in zip(
        (*answers["triton"], *grads["triton"]), (*answers["reference"], *grads["reference"]), strict=True
    ):
        near(found.detach(), want.detach(), 2e-5)


def test_the_backward_pass_of_the_interval_is_that_of_its_formula():
    """In double precision, by differences; the pass that the kernels use, computed by the reference."""
    torch.manual_seed(0)
    weight, centre, radius = (torch.randn(s, dtype=torch.float64) for s in ((3, 4), (5, 4), (5, 4)))
    leaves = [weight.requires_grad_(), centre.requires_grad_(), radius.abs().requires_grad_()]
    assert torch.autograd.gradcheck(interval.IntervalLinear.apply, leaves)


def test_the_interval_contains_the_images_of_its_points(triton):
    weight, bias, x = draw_tensor(0, (20, 33)), draw_tensor(1, (20,)), draw_tensor(2, (6, 33))
    radius = torch.full_like(x, 0.1)
    with kernels.using("triton"):
        z, r = kernels.interval_linear(weight, bias, x, radius)
    for seed in range(20):
        inside = x + 0.1 * draw_tensor(seed, x.shape).sign()
        assert ((inside @ weight.T + bias - z).abs() <= r * (1 + 1e-4)).all()
    worst = torch.stack([x + 0.1 * row.sign() for row in weight]) @ weight.T + bias  # (rows, N, m)
    near(worst.diagonal(dim1=0, dim2=2), z + r, 1e-4)


# ---- back through a ReLU


@given(seed=SEEDS, shape=st.sampled_from([(1, 1), (4, 7), (3, 2, 5, 5), (2, 1100)]), layout=LAYOUTS, look=st.booleans(),
       lower=st.sampled_from(["crown", "dual", "own"]))  # fmt: skip
@some
def test_relu_backsubstitution_equals_its_reference(triton, seed, shape, layout, look, lower):
    a = draw_tensor(seed, (3 * shape[0], *shape[1:]) if look else shape, layout)
    image = torch.arange(shape[0], device=DEVICE).repeat(3) if look else None
    low, high = draw_tensor(seed + 1, shape).clamp_max(0), draw_tensor(seed + 2, shape).clamp_min(0)
    slope = high / (high - low).clamp_min(1e-30)
    below = slope if lower == "dual" else (high > -low).float()
    own = torch.rand(a.shape, device=DEVICE) if lower == "own" else None
    with kernels.using("triton"):
        found, added = kernels.relu_backsubstitution(a, below, slope, -slope * low, image, own=own)
    want, want_added = backsubstitution.reference(a, below, slope, -slope * low, image, own=own)
    assert torch.equal(found, want)
    near(added, want_added)


@given(seed=SEEDS, shape=st.sampled_from([(1, 9), (4, 50), (3, 2, 5, 5)]), look=st.booleans(), dual=st.booleans(),
       open_ones=st.sampled_from([0, 0.1, 0.2]))  # fmt: skip
@some
def test_few_open_signs_are_looked_at_alone_and_the_answer_is_the_same(seed, shape, look, dual, open_ones):
    """The reference takes a short cut where few lines differ; slopes of the rows' own keep it from that."""
    a = draw_tensor(seed, (3 * shape[0], *shape[1:]) if look else shape)
    image = torch.arange(shape[0], device=DEVICE).repeat(3) if look else None
    z, unsure = draw_tensor(seed + 1, shape), draw_tensor(seed + 2, shape).abs() < open_ones
    low, high = torch.where(unsure, -z.abs(), z), torch.where(unsure, z.abs(), z)
    up, down = high.clamp_min(0), low.clamp_max(0)
    slope = up / (up - down).clamp_min(1e-30)
    below = slope if dual else (high > -low).float()
    own = below if image is None else below[image]
    found, added = backsubstitution.reference(a, below, slope, -slope * down, image)
    want, want_added = backsubstitution.reference(a, below, slope, -slope * down, image, own=own)
    assert torch.equal(found, want)
    near(added, want_added)


@given(seed=SEEDS)
@some
def test_what_comes_back_bounds_the_relu_from_below(seed):
    low, high = -draw_tensor(seed, (1, 9)).abs(), draw_tensor(seed + 1, (1, 9)).abs()
    a, slope = draw_tensor(seed + 2, (1, 9)), high / (high - low)
    back, added = kernels.relu_backsubstitution(a, (high > -low).float(), slope, -slope * low)
    z = low + (high - low) * torch.rand(200, 9, device=DEVICE)
    assert ((z.relu() * a).sum(1) >= (z * back).sum(1) + added - 1e-4).all()


# ---- far apart in memory: more than 2^31 numbers


def far_apart(rows, size, seed):
    """Rows 2^30 + 16 numbers apart: the distance fits 32 bits, twice the distance does not. Only their pages are touched."""
    try:
        base = torch.empty((rows - 1) * (2**30 + 16) + size, dtype=torch.float32)
    except RuntimeError:
        pytest.skip("needs 9 GiB of address space")
    far = base.as_strided((rows, size), (2**30 + 16, 1))
    return far.copy_(draw_tensor(seed, (rows, size)).cpu())


@pytest.mark.skipif(DEVICE == "cuda" or sys.platform != "linux", reason="untouched memory is free on Linux alone")
def test_offsets_beyond_two_to_the_31(triton):
    """With 32 bits the third row would be read 2^32 numbers away from where it is."""
    far = far_apart(3, 40, 0)
    near_by = far.clone()
    x = near_by.clamp(0, 1)
    with kernels.using("triton"):
        for threat in (Linf(0.1), L2(0.5), L1(2.0)):
            near(kernels.ascent_step(x, far, x, threat, 0.1), threat.ascend(x, near_by, x, 0.1))
        near(kernels.clip_and_sum(far, 1.0)[0], clipping.reference([near_by], 1.0)[0][0])
        z, r = kernels.interval_linear(far, torch.zeros(3), x, x)
        near(z, x @ near_by.T)
        near(r, x @ near_by.abs().T)
        lines = torch.rand(3, 3, 40)
        near(kernels.relu_backsubstitution(far, *lines)[0], backsubstitution.reference(near_by, *lines)[0])


# ---- who computes


def test_on_the_cpu_the_reference_computes_and_a_word_forces_the_kernel(triton, monkeypatch):
    x = torch.rand(2, 5)
    monkeypatch.delenv("TMLCOURSE_KERNELS", raising=False)
    assert dispatch.mode() == "auto" and not dispatch.takes_kernel("test", (x,), (torch.float32,))
    monkeypatch.setenv("TMLCOURSE_KERNELS", "triton")
    if DEVICE == "cpu":
        assert dispatch.takes_kernel("test", (x,), (torch.float32,))
    with kernels.using("reference"):
        assert not dispatch.takes_kernel("test", (x.to(DEVICE),), (torch.float32,))
        with kernels.using("triton"):
            assert dispatch.takes_kernel("test", (x.to(DEVICE),), (torch.float32,))
    monkeypatch.setenv("TMLCOURSE_KERNELS", "fast")
    with pytest.raises(ValueError, match="TMLCOURSE_KERNELS: got 'fast', want one of 'auto', 'reference', 'triton'"):
        dispatch.mode()
    with pytest.raises(ValueError, match="mode: got 'fast'"), kernels.using("fast"):
        pass


@pytest.mark.parametrize("what, change", [
    ("float64", lambda t: t.double()),
    ("layout", lambda t: t.to_sparse()),
    ("gradient is wanted", lambda t: t.requires_grad_()),
])  # fmt: skip
def test_what_a_kernel_cannot_take_falls_back_and_says_so_once(triton, fresh, what, change):
    grads = change(draw_tensor(0, (4, 6)))
    with warnings.catch_warnings(record=True) as said, kernels.using("triton"):
        warnings.simplefilter("always")
        for _ in range(3):
            assert not dispatch.takes_kernel("demo", (grads,), (torch.float32,))
    (message,) = said
    assert "kernels.demo: got" in str(message.message) and what in str(message.message)


def test_float64_and_large_images_are_the_references_own(triton, fresh):
    x, grad = torch.rand(2, 9, dtype=torch.float64, device=DEVICE), draw_tensor(0, (2, 9), dtype=torch.float64)
    with kernels.using("triton"), pytest.warns(RuntimeWarning, match="got torch.float64"):
        assert torch.equal(kernels.ascent_step(x, grad, x, L2(0.3), 0.1), L2(0.3).ascend(x, grad, x, 0.1))
    x, grad = torch.rand(1, 2**14 + 1, device=DEVICE), draw_tensor(0, (1, 2**14 + 1))
    with kernels.using("triton"), pytest.warns(RuntimeWarning, match="images of 16385 numbers"):
        assert torch.equal(kernels.ascent_step(x, grad, x, L2(0.3), 0.1), L2(0.3).ascend(x, grad, x, 0.1))


def test_bad_input_is_named():
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match="grad: got shape"):
        kernels.ascent_step(x, x[:1], x, Linf(0.1), 0.1)
    with pytest.raises(ValueError, match="clip: got 0, want a number > 0"):
        kernels.clip_and_sum(x, 0)
    with pytest.raises(ValueError, match="grads: got shapes"):
        kernels.clip_and_sum([x, x[:1]], 1.0)
    with pytest.raises(ValueError, match="weight, bias, centre, radius: got shapes"):
        kernels.interval_linear(x, x, x, x)
    with pytest.raises(ValueError, match="slope: got shape"):
        kernels.relu_backsubstitution(x, x, x[:1], x)


ALONE = """
import sys
sys.modules["triton"] = None  # `import triton` fails
import torch
from tmlcourse import attacks, certify, data, kernels, models, privacy
from tmlcourse.privacy import clipped_gradient
from tmlcourse.threat import L2
test = data.load("digits", n=4)
model = models.mlp((1, 8, 8), hidden=(6,), seed=0).eval()
attacks.pgd(model, test.x, test.y, L2(0.3), steps=2, seed=0)
certify.margins(model, test.x, test.y, 0.01)
assert not kernels.ready()
try:
    with kernels.using("triton"):
        kernels.clip_and_sum(torch.ones(2, 2), 1.0)
except RuntimeError as error:
    print(error)
del sys.modules["triton"]
try:
    with kernels.using("triton"):
        kernels.clip_and_sum(torch.ones(2, 2), 1.0)
except RuntimeError as error:
    print(error)
"""


def python(*arguments, **variables):
    """The output of a Python process of its own; TRITON_INTERPRET is not set there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent)} | variables
    answer = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_without_triton_nothing_is_lost_and_with_it_nothing_is_imported_before_its_time():
    """One process: first Triton is hidden, then it is there, but there is neither GPU nor interpreter."""
    missing, *rest = python("-c", ALONE, CUDA_VISIBLE_DEVICES="").splitlines()
    assert "want Triton installed" in missing
    if dispatch.installed():
        assert "TRITON_INTERPRET=1" in rest[0]


def test_the_kernels_are_machine_code_that_reads_and_writes_once(triton, tmp_path):
    """Three inputs, one output, 1,024 numbers each: twice four numbers for each of 128 threads, and not once more."""
    found = json.loads(python(HERE / "kernel_code.py", TRITON_CACHE_DIR=str(tmp_path)))
    assert found.keys() == {"_linf", "_l2", "_l1", "_norm", "_sum", "_pair", "_outer_pair", "_back"}
    assert all(code["machine code"] > 1000 for code in found.values())
    for step in ("_linf", "_l2", "_l1"):
        assert (found[step]["loads"], found[step]["stores"], found[step]["wide"]) == (6, 2, 8)


# ---- where they are used


def test_attacks_privacy_and_certificates_give_the_same_with_kernels(triton):
    test = data.load("digits", n=3).to(DEVICE)
    model = models.mlp((1, 8, 8), hidden=(7, 6), seed=0).to(DEVICE).eval()
    answers = {}
    for mode in ("reference", "triton"):
        with kernels.using(mode):
            found = [attacks.pgd(model, test.x, test.y, t, steps=3, seed=0) for t in (Linf(0.05), L2(0.3), L1(1.0))]
            found += clipped_gradient(model, test.x, test.y, 0.1, method="vmap")[0].values()
            found += [
                certify.margins(model, test.x, test.y, 0.01, method=m) for m in ("ibp", "crown", "dual", "alpha-crown")
            ]
        answers[mode] = found
    for a, b in zip(*answers.values(), strict=True):
        near(a, b, 1e-4)


def test_windows_of_convolutions_go_back_the_same_way(triton):
    test = data.load("digits", n=1).to(DEVICE)
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    torch.manual_seed(0)
    model, y = nn.Sequential(*layers).to(DEVICE).eval(), test.y % 3
    for mode in ("crown", "dual"):
        wanted = certify.margins(model, test.x, y, 0.05, method=mode)
        with kernels.using("triton"):
            near(certify.margins(model, test.x, y, 0.05, method=mode), wanted, 1e-4)


# ---- what is moved


def test_moved_counts_what_operations_read_and_write():
    x = torch.zeros(10)
    for call, count, launches in (
        (lambda: x + x, 120, 1), (lambda: x.view(2, 5), 0, 0), (lambda: x[2:].expand(3, 8) + 1, 8 * 4 + 96, 1),
        (lambda: x.add_(1), 80, 1), (lambda: (x * 2).sum(), 80 + 44, 2), (lambda: torch.empty(5), 0, 0),
    ):  # fmt: skip
        assert roofline.moved(call) == roofline.Traffic(count, launches)


def test_no_reference_moves_less_than_its_kernel():
    x, weight, a = torch.rand(64, 1, 14, 14), torch.randn(50, 196), torch.randn(300, 40)
    lines, image = torch.rand(3, 10, 40), torch.arange(300) % 10
    for norm, least in ((Linf(0.1), 4), (L2(1.0), 10), (L1(5.0), 10)):
        counted = roofline.moved(lambda norm=norm: ascent.reference(x, x - 0.5, x, norm, 0.1)).bytes
        assert counted > least * ascent.traffic(x)
    assert roofline.moved(lambda: clipping.reference([a], 1.0)).bytes >= clipping.traffic(a)
    centre = x.flatten(1)
    counted = roofline.moved(lambda: interval.reference(weight, torch.zeros(50), centre, centre)).bytes
    assert counted > 1.5 * interval.traffic(weight, centre)
    counted = roofline.moved(lambda: backsubstitution.reference(a, *lines, image)).bytes
    assert counted > 4 * backsubstitution.traffic(a, lines[0])


# ---- the first answer on a device


@pytest.mark.parametrize("wrong", ["value", "nan", "shape", "dtype", "error"])
def test_a_kernel_that_is_wrong_is_found_at_its_first_launch_and_not_asked_again(monkeypatch, wrong):
    monkeypatch.setattr(dispatch, "_proved", {})
    x, asked = torch.linspace(-1, 1, 6), []

    def kernel():
        asked.append(1)
        if wrong == "error":
            raise OSError("no compiler")
        bad = {"value": x + 0.01, "nan": x / x.sign().clamp(min=0), "shape": x[:-1], "dtype": x.double()}
        return x, bad[wrong]

    with pytest.warns(
        RuntimeWarning, match="OSError at the first launch" if wrong == "error" else "first answer differs"
    ):
        found = dispatch.checked("demo", x, kernel, lambda: (x, x))
    assert torch.equal(found[1], x) and len(asked) == 1
    monkeypatch.setattr(dispatch, "installed", lambda: True)
    stand_in = SimpleNamespace(is_cuda=True, dtype=x.dtype, device=x.device)
    assert not dispatch.takes_kernel("demo", (stand_in,), (x.dtype,))


def test_a_kernel_that_is_right_is_compared_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_proved", {})
    x, compared = torch.tensor([1.0, float("nan"), 3.0]), []
    for _ in range(3):
        found = dispatch.checked("demo", x, lambda: x * (1 + 1e-6), lambda: compared.append(1) or x)
    assert len(compared) == 1 and found[2] == x[2] * (1 + 1e-6)
    dispatch.checked("demo", x.double(), lambda: x.double(), lambda: compared.append(1) or x.double())
    assert len(compared) == 2  # another dtype is another kernel


def test_every_kernel_passes_its_own_comparison(triton, monkeypatch):
    """As on a GPU, in automatic mode, here by the interpreter: no kernel is given up."""
    monkeypatch.setattr(dispatch, "_proved", {})
    monkeypatch.setattr(dispatch, "takes_kernel", lambda *_, **__: True)
    for module in (ascent, clipping, interval, backsubstitution):
        monkeypatch.setattr(module, "takes_kernel", lambda *_, **__: True)
    x, g = draw_tensor(0, (3, 2, 5)).sigmoid(), draw_tensor(1, (3, 2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for threat in (Linf(0.1), L2(0.5), L1(1.0)):
            kernels.ascent_step(x, g, x, threat, 0.05)
        kernels.clip_and_sum(g, 0.5)
        kernels.squared_norms(g)
        kernels.weighted_sum(g, torch.tensor([0.0, 1.0, 2.0], device=g.device))
        weight = draw_tensor(2, (4, 10)).requires_grad_()
        sum(
            part.sum() for part in kernels.interval_linear(weight, g.new_zeros(4), x.flatten(1), x.flatten(1))
        ).backward()
        kernels.relu_backsubstitution(g, x, x, x)
    assert len(dispatch._proved) == 9 and all(dispatch._proved.values())


# ---- recorded loops


@pytest.fixture
def unrecorded(monkeypatch):
    """The recorded loop's own steps, run one by one: all of it but the recording, which needs a GPU."""
    monkeypatch.setattr(graphs, "record", lambda step: step)
    monkeypatch.setattr(graphs, "playable", lambda *_: True)
    monkeypatch.setattr(graphs, "trainable", lambda *_: True)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5), L1(2.0)], ids=["Linf", "L2", "L1"])
def test_the_steps_that_are_recorded_are_those_of_the_loop(unrecorded, threat, target):
    test = data.load("digits", n=7)
    model = models.mlp((1, 8, 8), hidden=(9,), seed=0).eval()
    how = dict(steps=12, restarts=2, batch_size=3, seed=0, target=(test.y + 1) % 10 if target else None)
    played = attacks.pgd(model, test.x, test.y, threat, **how)
    assert all(found is not graphs._SEEN for found in graphs._recorded[model].values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "playable", lambda *_: False)
        assert torch.equal(attacks.pgd(model, test.x, test.y, threat, **how), played)


def test_recordings_are_found_again_and_go_with_the_network(unrecorded, monkeypatch):
    count = []
    monkeypatch.setattr(graphs, "record", lambda step: count.append(1) or step)
    test, model = data.load("digits", n=6), models.mlp((1, 8, 8), hidden=(4,), seed=0).eval()

    def attack(model, n=6, eps=0.1):
        attacks.pgd(model, test.x[:n], test.y[:n], Linf(eps), steps=10, seed=0)
        return len(count)

    assert [attack(model) for _ in range(3)] == [0, 1, 1]  # one attack alone is over before a recording pays
    assert [attack(model, n=5) for _ in range(3)] == [1, 2, 2]
    assert [attack(model, eps=0.2) for _ in range(2)] == [2, 3]
    assert attack(model) == 3
    model[1].weight.data = model[1].weight.data.clone()  # other memory
    assert [attack(model) for _ in range(2)] == [3, 4]
    kept = len(graphs._recorded)
    del model
    assert len(graphs._recorded) == kept - 1


def test_a_recording_that_fails_is_said_and_the_loop_goes_on(unrecorded, monkeypatch):
    def fail(step):
        raise RuntimeError("no capture here")

    test, model = data.load("digits", n=6), models.mlp((1, 8, 8), hidden=(4,), seed=0).eval()
    wanted = attacks.pgd(model, test.x, test.y, Linf(0.1), steps=10, seed=0)
    monkeypatch.setattr(graphs, "record", fail)
    graphs._recorded.clear()
    assert torch.equal(attacks.pgd(model, test.x, test.y, Linf(0.1), steps=10, seed=0), wanted)
    with pytest.warns(RuntimeWarning, match="no capture here"):
        found = attacks.pgd(model, test.x, test.y, Linf(0.1), steps=10, seed=0)
    assert torch.equal(found, wanted)
    assert torch.equal(attacks.pgd(model, test.x, test.y, Linf(0.1), steps=10, seed=0), wanted)  # and not said again


def test_only_plain_networks_are_recorded(monkeypatch):
    model = models.small_cnn((1, 8, 8), seed=0).eval()
    assert graphs.plain(model)
    assert not graphs.playable(model, torch.rand(2, 1, 8, 8), Linf(0.1), "cross_entropy")  # no GPU
    assert not graphs.plain(lambda x: x)
    hook = model[1].register_forward_hook(lambda *_: None)
    assert not graphs.plain(model)
    hook.remove()
    assert graphs.plain(model) and graphs.plain(model.train())
    assert not graphs.trainable(model, torch.rand(2, 1, 8, 8))  # no GPU
    noisy = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    assert graphs.plain(noisy.eval()) and not graphs.plain(noisy.train())

    class Other(nn.Linear):
        pass

    assert not graphs.plain(nn.Sequential(nn.Flatten(), Other(64, 10)).eval())


def test_recorded_gradients_are_those_of_backward(monkeypatch):
    monkeypatch.setattr(graphs, "record", lambda step: step)
    check_gradients("cpu")


def check_gradients(device):
    train = data.load("digits", "train", n=48).to(device)
    model, loss = models.mlp((1, 8, 8), hidden=(9,), seed=0).to(device), nn.functional.cross_entropy
    pass_ = graphs.gradients(model, loss, train.x[:16], train.y[:16])
    for x, y in zip(train.x.split(16), train.y.split(16), strict=True):
        value, z = pass_(x, y)
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        wanted = loss(model(x), y)
        wanted.backward()
        near(value, wanted.detach())
        near(z, model(x).detach())
        for p, grad in zip(model.parameters(), found, strict=True):
            near(grad, p.grad)
            with torch.no_grad():
                p -= 0.1 * p.grad


LOSSES = {
    "standard": lambda threat: training.cross_entropy,
    "Madry": lambda threat: training.adversarial(threat, steps=4),
    "fast": lambda threat: training.adversarial(threat, training.single_step, alpha=1.25 * threat.eps),
    "friendly": lambda threat: training.friendly(threat, steps=4, tau=1),
    "growing": lambda threat: training.growing(lambda now: training.adversarial(now, steps=2), threat),
    "mixture": lambda threat: training.mixture(threat, attack=training.ascent, steps=3),
    "TRADES": lambda threat: training.trades(threat, steps=3),
    "MART": lambda threat: training.mart(threat, steps=3),
}


def fitted(make, threat, device="cpu", **options):
    """A small network's weights and history after two epochs; the last batch of an epoch is smaller."""
    train = data.load("digits", "train", n=40).to(device)
    model = models.mlp((1, 8, 8), hidden=(9,), seed=0).to(device)
    options = dict(epochs=2, batch_size=12, loss=make(threat), seed=0) | options
    history = training.fit(model, train, **options)
    return model, history.drop(columns="seconds"), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8)], ids=["Linf", "L2"])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_training_with_recorded_steps_is_training(unrecorded, make, threat):
    model, history, played = fitted(make, threat)
    kinds = {key[0]: found for key, found in graphs._recorded[model].items()}
    assert all(found is not graphs._SEEN for found in kinds.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "playable", lambda *_: False)
        patch.setattr(graphs, "trainable", lambda *_: False)
        plain, wanted, looped = fitted(make, threat)
    assert plain not in graphs._recorded
    assert torch.equal(played, looped) and history.equals(wanted)


def test_each_loss_is_recorded_as_far_as_it_can_be(unrecorded):
    recorded = {name: {key[0] for key in graphs._recorded.get(fitted(make, Linf(0.1))[0], {})}
                for name, make in LOSSES.items()}  # fmt: skip
    both, passes, climbs = {"climb", "descent"}, {"descent"}, {"climb"}
    assert recorded == {"standard": passes, "Madry": both, "fast": both, "growing": both, "friendly": passes,
                        "mixture": climbs, "TRADES": climbs, "MART": climbs}  # fmt: skip


def test_training_goes_on_where_recording_fails_or_differs(unrecorded, monkeypatch):
    *_, wanted = fitted(LOSSES["Madry"], Linf(0.1))

    def fail(step):
        raise RuntimeError("no capture here")

    for record, says in ((fail, "no capture here"), (lambda step: lambda: None, "playback differs")):
        monkeypatch.setattr(graphs, "record", record)
        with pytest.warns(RuntimeWarning, match=says) as said:
            *_, found = fitted(LOSSES["Madry"], Linf(0.1))
        assert torch.equal(found, wanted)
        assert len(said) == 4  # the attack's step and the pass, each for whole batches and for the last one


def test_a_recorded_pass_sees_which_parameters_are_frozen(unrecorded):
    train = data.load("digits", "train", n=40)
    model = models.mlp((1, 8, 8), hidden=(9,), seed=0)
    before = model[1].weight.detach().clone()
    training.fit(model, train, epochs=2, batch_size=20, seed=0)
    assert not torch.equal(model[1].weight, before)
    model[1].weight.requires_grad_(False)
    frozen, moving = model[1].weight.clone(), model[3].weight.detach().clone()
    training.fit(model, train, epochs=2, batch_size=20, seed=0)
    assert torch.equal(model[1].weight, frozen) and model[1].weight.grad is None
    assert not torch.equal(model[3].weight, moving)


def test_a_recorded_pass_that_is_not_finite_stops_the_training(unrecorded):
    with pytest.raises(FloatingPointError, match="lower lr"):
        fitted(LOSSES["standard"], None, lr=1e30, optimizer=torch.optim.SGD, epochs=4)


@on_gpu
@pytest.mark.parametrize("make", [LOSSES[name] for name in ("standard", "Madry", "TRADES")])
def test_on_a_gpu_training_with_recorded_steps_is_training(make, monkeypatch):
    model, history, played = fitted(make, Linf(0.1), DEVICE, epochs=4)
    assert all(found not in (None, graphs._SEEN) for found in graphs._recorded[model].values())
    monkeypatch.setenv("TMLCOURSE_GRAPHS", "0")
    _, wanted, looped = fitted(make, Linf(0.1), DEVICE, epochs=4)
    assert (played - looped).norm() < 0.02 * looped.norm()  # the library adds in another order each time
    assert (history["loss"] - wanted["loss"]).abs().max() < 0.02


@on_gpu
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8), L1(4.0)], ids=["Linf", "L2", "L1"])
def test_on_a_gpu_recorded_attacks_are_the_loops(threat, monkeypatch):
    test = data.load("digits-28x28", n=128).to(DEVICE)
    model = models.small_cnn(seed=0).to(DEVICE).eval()
    assert graphs.playable(model, test.x, threat, "cross_entropy")
    _, played, again = (attacks.pgd(model, test.x, test.y, threat, steps=20, seed=0) for _ in range(3))
    assert all(found not in (None, graphs._SEEN) for found in graphs._recorded[model].values())
    monkeypatch.setenv("TMLCOURSE_GRAPHS", "0")
    looped = attacks.pgd(model, test.x, test.y, threat, steps=20, seed=0)
    for found in (played, again):  # the library adds in another order each time, and a tiny gradient's sign may differ
        assert ((found - looped).abs().flatten(1).amax(1) < 1e-3).float().mean() > 0.9
        assert abs(training.accuracy(model, found, test.y) - training.accuracy(model, looped, test.y)) < 0.03


@on_gpu
def test_on_a_gpu_recorded_gradients_are_those_of_backward():
    check_gradients(DEVICE)


def _lets_go(climb):
    pass


def _drifts(climb):
    climb.step()
    climb.x_adv += 1e-3 * torch.randn_like(climb.x_adv)


def _forgets(climb):
    climb.step()
    climb.value.zero_()


def _flips(climb):
    climb.step()
    climb.fooled.logical_not_()


def _loses(climb):
    climb.step()
    climb.best.zero_()


@pytest.mark.parametrize("playback", [_lets_go, _drifts, _forgets, _flips, _loses])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8), L1(4.0)], ids=["Linf", "L2", "L1"])
def test_a_playback_that_differs_from_the_step_is_not_used(unrecorded, monkeypatch, threat, playback):
    test, model = data.load("digits", n=6), models.mlp((1, 8, 8), hidden=(4,), seed=0).eval()
    wanted = attacks.pgd(model, test.x, test.y, threat, steps=10, seed=0)
    graphs._recorded.clear()
    monkeypatch.setattr(graphs, "record", lambda step: partial(playback, step.__self__))
    attacks.pgd(model, test.x, test.y, threat, steps=10, seed=0)
    with pytest.warns(RuntimeWarning, match="playback differs"):
        found = attacks.pgd(model, test.x, test.y, threat, steps=10, seed=0)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8), L1(4.0)], ids=["Linf", "L2", "L1"])
def test_a_playback_that_adds_up_in_another_order_is_used(unrecorded, monkeypatch, threat):
    """As a GPU does: last digits differ, and for Linf the sign of a gradient that is nearly nought."""

    def playback(climb):
        climb.step()
        climb.x_adv *= 1 + 1e-7 * torch.randn_like(climb.x_adv)
        climb.value *= 1 + 1e-6
        climb.x_adv[0, 0, 0, 0] -= 2e-3 if type(threat) is Linf else 0.0

    test, model = data.load("digits", n=60), models.mlp((1, 8, 8), hidden=(4,), seed=0).eval()
    monkeypatch.setattr(graphs, "record", lambda step: partial(playback, step.__self__))
    for _ in range(2):
        attacks.pgd(model, test.x, test.y, threat, steps=10, seed=0)
    assert all(found not in (None, graphs._SEEN) for found in graphs._recorded[model].values())
