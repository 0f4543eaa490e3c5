"""The minimum adversarial distortion: how far the nearest misclassified image is, between a certificate and a find."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import joblib
import torch
from torch import Tensor, nn

from .. import checks
from ..attacks import fab, margin
from .bounds import ball, best_bounds, check, images_at_once, least_margin, margin_bounds
from .linear_program import Problem, matrices
from .mixed_integer import Clock, decide
from .network import on_cpu
from .verify import check_jobs, falls, in_parallel

LARGEST = 1.0  # the radius at which the search gives up: with pixels in [0, 1] every image is that near


@dataclass(frozen=True)
class Distortion:
    """What is known of one image's distance min |x' - x|_inf to a misclassified image x'.

    Attributes:
        low: proved: no image nearer than this is classified otherwise.
        high: distance of the counterexample; inf if none was found.
        counterexample: a misclassified image at distance `high`, checked on the network in float64; else None.
        seconds: spent on this image; batched stages are shared equally.
    """

    low: float
    high: float
    counterexample: Tensor | None
    seconds: float


def distortion(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    tolerance: float = 1e-3,
    time_limit: float | None = None,
    n_jobs: int = 1,
    box: tuple[float, float] | None = (0.0, 1.0),
    solver: str = "HiGHS",
) -> list[Distortion]:
    """Bracket for each image the least |x' - x|_inf at which x' is classified otherwise than y.

        low <= min { |x' - x|_inf : max over j != y of z_j(x') - z_y(x') >= 0 } <= high

    An attack gives the first `high`, CROWN the first `low`. Then the radius between them is halved: what `verify` decides at
    each radius, by branch and bound and programs, raises `low` or, with a counterexample, lowers `high`.

    Args:
        model: `nn.Sequential` in evaluation mode; see `network.read` for its layers. It is left exactly as it was.
        x: images (N, ...) in [0, 1]. y: int64 labels (N,).
        tolerance: stop when high - low is at most this (> 0), in pixel intensity. (Below 1e-4 the search may stop earlier:
            neither side of a decision is claimed nearer to a tie than `verify` does.)
        time_limit: seconds of search an image; None: until the bracket is closed.
        n_jobs, box, solver: as for `verify`.
    Returns:
        One `Distortion` an image. Both ends are 0 where the clean image is wrong already. Where nothing within 1 is
        misclassified, low = 1 and high = inf. After an interrupt, the brackets so far.
    Raises:
        TypeError, ValueError: bad input, an unsupported layer, a solver that is missing; before any work.
    Source: Tjeng, Xiao & Tedrake 2019 (their program has the radius as its objective; halving asks for signs only, which
        branch and bound proves faster).
    Example: `[(d.low, d.high) for d in distortion(model, x, y, time_limit=10)]`.
    """
    check(model, x, y, 0.0, box)
    checks.positive(tolerance, "tolerance")
    if time_limit is not None:
        checks.nonnegative(time_limit, "time_limit")
    check_jobs(n_jobs, solver)
    with torch.no_grad():
        network = check(model, x.double(), y, 0.0, box)
        z = torch.cat([network(part.double()) for part in x.split(256)])
    small = (1e-5 * (1 + z.abs().amax(1))).tolist()
    known = [Distortion(0.0, torch.inf, None, 0.0) for _ in x]

    def offer(i: int, candidate: Tensor) -> None:
        """Take the candidate if it is misclassified, and nearer."""
        candidate = candidate.to(x)
        distance = (candidate.double() - x[i].double()).abs().max().item()
        inside = box is None or (candidate.min() >= box[0] and candidate.max() <= box[1])
        if inside and distance < known[i].high and falls(model, network, candidate[None], y[i : i + 1], small[i])[0]:
            known[i] = replace(known[i], high=distance, counterexample=candidate)

    try:
        for i, clean in enumerate(x):
            offer(i, clean)
        open_ = [i for i, d in enumerate(known) if d.high > 0]
        if not open_:
            return known
        clock = Clock(None)
        for i, candidate in zip(open_, fab(model, x[open_], y[open_], steps=30, seed=0), strict=True):
            for further in (1.0, 1.001, 1.01, 1.1):  # the attack's points lie on the boundary, within rounding
                offer(i, (x[i] + further * (candidate - x[i])).clamp(0, 1))
        high = torch.tensor([min(known[i].high, LARGEST) for i in open_], dtype=torch.float64, device=x.device)
        low = _certified(network, x[open_].double(), y[open_], high, box, [small[i] for i in open_])
        for i, radius in zip(open_, low.tolist(), strict=True):
            known[i] = replace(known[i], low=radius, seconds=clock.seconds() / len(open_))
        here = on_cpu(network)
        weights = matrices(here)
        jobs = (
            joblib.delayed(_job)(
                i, Problem(here, weights, x[i : i + 1].double().cpu(), int(y[i]), None, [], solver), box,
                known[i].low, known[i].high, small[i], tolerance, time_limit,
            )
            for i in open_
        )  # fmt: skip
        for i, (radius, candidate, seconds) in in_parallel(jobs, len(open_), n_jobs, "distortion"):
            known[i] = replace(known[i], low=max(known[i].low, radius), seconds=known[i].seconds + seconds)
            if candidate is not None:
                offer(i, candidate[0])
    except KeyboardInterrupt:
        warnings.warn("distortion was interrupted: the brackets are those reached so far", stacklevel=2)
    return known


@torch.no_grad()
def _certified(network, x: Tensor, y: Tensor, high: Tensor, box, small: list[float], rounds: int = 7) -> Tensor:
    """The largest radii, to a share 2^-rounds of `high`, that CROWN certifies: (N,)."""
    found = []
    for index in torch.arange(len(x), device=x.device).split(images_at_once(network, x)):
        part, label, enough = x[index], y[index], x.new_tensor(small)[index]
        low, top = torch.zeros_like(high[index]), high[index]
        for _ in range(rounds):
            middle = (low + top) / 2
            bound = margin_bounds(network, ball(part, middle, box), label, "crown")
            proved = least_margin(bound, label) > enough
            low, top = torch.where(proved, middle, low), torch.where(proved, top, middle)
        found.append(low)
    return torch.cat(found)


def _job(i: int, problem: Problem, box, low: float, high: float, small: float, tolerance: float, time_limit):
    """Narrow one image's bracket; an error is reported, not raised, so that the others go on."""
    try:
        with torch.no_grad():
            return i, _narrow(problem, box, low, high, small, tolerance, time_limit), None
    except Exception as error:  # a solver has many ways to fail, and none may cost the other images
        return i, None, f"{type(error).__name__}: {error}"


def _narrow(problem: Problem, box, low: float, high: float, small: float, tolerance: float, time_limit):
    """The radius proved, the nearest point found (None if none is nearer than `high`), and the seconds.

    Asks first just below `high` (or at LARGEST), since attacks often end at the truth; then halves. A radius whose least
    margin is zero to rounding proves nothing either way: the search goes on above it, then below. With a time limit each
    radius gets half of what is left, so that one hard radius does not spoil the easier ones.
    """
    clock, best, ties = Clock(time_limit), None, []
    top, radius = (high, max(high - tolerance, (low + high) / 2)) if high <= LARGEST else (LARGEST, LARGEST)
    while (top - low > tolerance or low < radius == LARGEST) and not clock.over():
        proved, point = _decide(problem, radius, box, small, None if time_limit is None else clock.left() / 2)
        if proved:
            low = radius
        elif point is None:
            ties.append(radius)
        else:
            best, top = point, min(radius, _distance(problem, point))
        ties = [tie for tie in ties if low < tie < top]
        below, above = (low, min(ties)) if ties else (low, top), (max(ties), top) if ties else (top, top)
        ends = max(above, below, key=lambda ends: ends[1] - ends[0])
        if ties and ends[1] - ends[0] <= tolerance / 8:
            break
        radius = sum(ends) / 2
    return low, best, clock.seconds()


def _distance(problem: Problem, point: Tensor) -> float:
    return (point - problem.x).abs().max().item()


def _decide(problem: Problem, radius: float, box, small: float, time_limit) -> tuple[bool, Tensor | None]:
    """Whether no image within the radius is misclassified; and the nearest misclassified one that was met, or None."""
    network, label = problem.network, torch.tensor([problem.y], device=problem.x.device)
    region = ball(problem.x, radius, box)
    if (margin_bounds(network, region, label, "crown").index_fill(1, label, torch.inf) > small).all():
        return True, None
    bounds = best_bounds(network, region)
    low = margin_bounds(network, region, label, "alpha-crown", bounds=bounds).index_fill(1, label, torch.inf)[0]
    rivals = (low <= small).nonzero().flatten().tolist()
    if not rivals:
        return True, None
    decision = decide(replace(problem, region=region, bounds=bounds), rivals, small, time_limit)
    if decision.low > small:
        return True, None
    if decision.high >= -small:
        return False, None
    steps = torch.linspace(0, 1, 65, dtype=torch.float64, device=label.device)[1:]  # nearer ones on the way back to x
    line = problem.x + steps.reshape(-1, *[1] * (problem.x.dim() - 1)) * (decision.x - problem.x)
    wrong = -margin(network(line), label.expand(len(line))) < -2 * small
    first = int(wrong.double().argmax()) if wrong.any() else -1
    return False, line[[first]]
