"""A verdict for each image: attack, cheap bound, tight bound, branch and bound, linear and mixed-integer programs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, progress
from ..attacks import margin, pgd
from ..threat import Linf
from .bounds import ball, best_bounds, check, images_at_once, margin_bounds
from .linear_program import Problem, available, matrices
from .mixed_integer import Clock, decide
from .network import Network, on_cpu


@dataclass(frozen=True)
class Verdict:
    """What is known of one image.

    Attributes:
        status: "robust" (no image in the ball is classified otherwise), "vulnerable" or "unknown".
        counterexample: an image of the ball that the network gets wrong, checked on the network in float64; else None.
        margin: proved lower bound of min z_y - z_j over the ball and all rivals j (-inf if nothing was proved). For a
            vulnerable image the margin of its counterexample (negative).
        reached: the smallest margin of a point that was met: the true minimum lies between `margin` and this.
        seconds: spent on this image; batched stages are shared equally.
        method: what decided: "clean", "attack", "crown", "alpha-crown", "branch", "lp" or "mip"; the last one tried for an
            unknown image.
    """

    status: str
    counterexample: Tensor | None
    margin: float
    seconds: float
    method: str
    reached: float = float("inf")


def verify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    time_limit: float | None = None,
    n_jobs: int = 1,
    box: tuple[float, float] | None = (0.0, 1.0),
    solver: str = "HiGHS",
    resume: str | os.PathLike | None = None,
) -> list[Verdict]:
    """Decide for each image whether any x' with |x' - x|_inf <= eps is classified otherwise than y.

        min over x' and j != y of z_y(x') - z_j(x')  > 0: robust,  < 0: vulnerable

    All work is in float64. An image is called robust when its margin is proved above t = 1e-5 (1 + max |z(x)|), vulnerable
    when a point with margin below -t is found, which the model itself misclassifies too: rounding of a float32 model is far
    below t, so neither claim hangs on it. What lies between stays unknown.

    Args:
        model: `nn.Sequential` in evaluation mode (see `network.read` for its layers); it is left exactly as it was.
        x: images (N, ...) in [0, 1]. y: int64 labels (N,).
        eps: radius in pixel intensity (>= 0).
        time_limit: seconds of branch and bound and of programs an image; None: until it is decided.
        n_jobs: images decided at once by joblib (-1: all cores); joblib's Dask or Ray backend serves as well.
        box: (low, high) of valid pixels, or None.
        solver: "HiGHS", or any that PuLP finds.
        resume: a file to which programs' verdicts are appended as they come; what it already holds is not done again.
    Returns:
        One `Verdict` an image. On an interrupt, or when a worker dies, what is decided so far; the rest is "unknown".
    Raises:
        TypeError, ValueError: bad input, an unsupported layer, a solver that is missing; before any work.
    Source: Tjeng, Xiao & Tedrake 2019 (program, progressive tightening); Xu et al. 2021 (optimised slopes); Wang et al. 2021
        (branch and bound with multipliers).
    Example: `[v.status for v in verify(model, x, y, 0.1, time_limit=60, n_jobs=-1)]`.
    """
    network = _checked(model, x, y, eps, box, time_limit, n_jobs, solver)
    with torch.no_grad():
        z = torch.cat([network(part.double()) for part in x.split(256)])
    tolerance = (1e-5 * (1 + z.abs().amax(1))).tolist()
    known = [Verdict("unknown", None, -torch.inf, 0.0, "clean", reached) for reached in (-margin(z, y)).tolist()]
    case = _Case(model, network, x.detach(), y, eps, box, tolerance)
    try:
        _attacks(case, known)
        hard = _bounds(case, known)
        _programs(case, known, hard, time_limit, n_jobs, solver, resume)
    except KeyboardInterrupt:
        left = sum(v.status == "unknown" for v in known)
        warnings.warn(f"verify was interrupted: {left} of {len(x)} images stay unknown", stacklevel=2)
    return known


def _checked(model, x, y, eps, box, time_limit, n_jobs, solver) -> Network:
    check(model, x, y, eps, box)
    if time_limit is not None:
        checks.nonnegative(time_limit, "time_limit")
    check_jobs(n_jobs, solver)
    with torch.no_grad():
        return check(model, x.double(), y, eps, box)


def check_jobs(n_jobs: int, solver: str) -> None:
    """Require a number of workers that joblib knows, and a solver that is installed."""
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs == 0:
        raise ValueError(f"n_jobs: got {n_jobs!r}, want a positive integer, or -1 for all cores")
    available(solver)


@dataclass(frozen=True)
class _Case:
    """The call's arguments; `network` and `tolerance` (one an image) in float64."""

    model: nn.Module
    network: Network
    x: Tensor
    y: Tensor
    eps: float
    box: tuple[float, float] | None
    tolerance: list[float]


def _attacks(case: _Case, known: list[Verdict]) -> None:
    """Clean mistakes, then PGD with two losses on the images that stand."""
    for i, x in enumerate(case.x):
        known[i] = _accept(case, i, known[i], x[None], "clean", 0.0)
    for seed, loss in enumerate(("cross_entropy", "margin")):
        open_ = _open(known)
        if not open_:
            return
        clock = Clock(None)
        x_adv = pgd(case.model, case.x[open_], case.y[open_], Linf(case.eps, case.box), steps=40, loss=loss,
                    stop_early=True, seed=seed)  # fmt: skip
        share = clock.seconds() / len(open_)
        for i, x in zip(open_, x_adv, strict=True):
            known[i] = _accept(case, i, known[i], x[None], "attack", share)


def _open(known: list[Verdict]) -> list[int]:
    return [i for i, verdict in enumerate(known) if verdict.status == "unknown"]


@torch.no_grad()
def _accept(case: _Case, i: int, verdict: Verdict, candidate: Tensor, method: str, seconds: float) -> Verdict:
    """Image i's verdict after a look at a candidate (1, ...): vulnerable if the network (float64) and the model both fall."""
    x, label = case.x[i : i + 1], case.y[i : i + 1]
    candidate = _inside(candidate.to(x), x, case.eps, case.box)
    fallen, value = falls(case.model, case.network, candidate, label, case.tolerance[i])
    seconds += verdict.seconds
    verdict = replace(verdict, reached=min(verdict.reached, value), seconds=seconds, method=method)
    return Verdict("vulnerable", candidate[0], value, seconds, method, value) if fallen else verdict


@torch.no_grad()
def falls(model, network: Network, candidate: Tensor, label: Tensor, tolerance: float) -> tuple[bool, float]:
    """Whether the network (float64, beyond the tolerance) and the model both get an image (1, ...) wrong; its margin."""
    value = -margin(network(candidate.double()), label).item()
    plain = next((p.dtype for p in model.parameters()), candidate.dtype)
    return value < -tolerance and model(candidate.to(plain)).argmax(1).item() != label.item(), value


def _inside(candidate: Tensor, x: Tensor, eps: float, box) -> Tensor:
    """The candidate with every pixel in the ball and the box, exactly: last digits go towards x where rounding left it."""
    if box is not None:
        candidate = candidate.clamp(*box)
    delta = (candidate.double() - x.double()).clamp(-eps, eps)
    candidate = (x.double() + delta).to(x.dtype)
    for _ in range(2):
        out = (candidate.double() - x.double()).abs() > eps
        candidate = torch.where(out, torch.nextafter(candidate, x), candidate)
    return candidate


@torch.no_grad()
def _bounds(case: _Case, known: list[Verdict]) -> list[tuple[int, Problem, list[int], float]]:
    """CROWN, then optimised slopes, on the images that stand.

    What they leave: (image, problem, rivals still open, least bound of the other rivals).
    """
    hard, here = [], on_cpu(case.network)
    open_ = _open(known)
    size = images_at_once(case.network, case.x)
    for method in ("crown", "alpha-crown"):
        left = []
        with progress.bar(total=len(open_), desc=method, unit="image") as bar:
            for part in (open_[n : n + size] for n in range(0, len(open_), size)):
                clock = Clock(None)
                region = ball(case.x[part].double(), case.eps, case.box)
                bounds = best_bounds(case.network, region) if method == "alpha-crown" else None
                low = margin_bounds(case.network, region, case.y[part], method, bounds=bounds)
                low = low.scatter(1, case.y[part][:, None], torch.inf)
                share = clock.seconds() / len(part)
                for n, i in enumerate(part):
                    one = slice(n, n + 1)
                    least = low[n].min().item()
                    verdict = replace(known[i], seconds=known[i].seconds + share, method=method)
                    known[i] = replace(verdict, margin=max(verdict.margin, least))
                    if least > case.tolerance[i]:
                        known[i] = replace(known[i], status="robust")
                        continue
                    left.append(i)
                    if method == "alpha-crown":
                        unsure = low[n] <= case.tolerance[i]
                        rivals = unsure.nonzero().flatten().tolist()
                        closed = low[n].masked_fill(unsure, torch.inf).min().item()
                        mine = [(a[one], b[one]) for a, b in bounds]
                        x, mine, ball_of_x = on_cpu((case.x[i : i + 1].double(), mine, region[one]))
                        hard.append((i, Problem(here, [], x, int(case.y[i]), ball_of_x, mine, ""), rivals, closed))
                bar.update(len(part))
        open_ = left
    return hard


def _programs(case: _Case, known, hard, time_limit, n_jobs, solver, resume) -> None:
    """Linear and mixed-integer programs for what is left, each image a job of its own."""
    store = _Store(resume, case)
    for i, verdict in store.read(known).items():
        known[i] = verdict
    hard = [job for job in hard if known[job[0]].status == "unknown"]
    if not hard:
        return
    weights, closed = matrices(hard[0][1].network), {i: least for i, _, _, least in hard}
    jobs = (
        joblib.delayed(_job)(i, replace(problem, weights=weights, solver=solver), rivals, case.tolerance[i], time_limit)
        for i, problem, rivals, _ in hard
    )
    for i, decision in in_parallel(jobs, len(hard), n_jobs, "verify"):
        verdict = known[i]
        if decision.low > case.tolerance[i]:
            seconds = verdict.seconds + decision.seconds
            least = min(decision.low, closed[i])
            known[i] = Verdict("robust", None, least, seconds, decision.method, verdict.reached)
        else:
            low = max(verdict.margin, min(decision.low, closed[i]))
            known[i] = _accept(case, i, replace(verdict, margin=low), decision.x, decision.method, decision.seconds)
        store.write(i, known[i])


def in_parallel(jobs, count: int, n_jobs: int, name: str):
    """Yield (image, result) of jobs that return (image, result, error), as they come; a failure costs its own image only."""
    left = count
    with progress.bar(total=count, desc="programs", unit="image") as bar:
        try:
            for i, result, error in joblib.Parallel(n_jobs, return_as="generator_unordered")(jobs):
                if error:
                    warnings.warn(f"{name}: the solver failed on image {i} ({error}); it stays unknown", stacklevel=4)
                else:
                    yield i, result
                    left -= 1
                bar.update()
        except (RuntimeError, OSError) as error:  # a worker that was killed: joblib cannot go on
            warnings.warn(f"{name}: a worker died ({error}); {left} images stay unknown", stacklevel=4)


def _job(i: int, problem: Problem, rivals: list[int], tolerance: float, time_limit: float | None):
    """Decide one image; an error is reported, not raised, so that the others go on."""
    try:
        with torch.no_grad():
            return i, decide(problem, rivals, tolerance, time_limit), None
    except Exception as error:  # a solver has many ways to fail, and none may cost the other images
        return i, None, f"{type(error).__name__}: {error}"


class _Store:
    """Verdicts of programs on disk, one line of JSON each, by a digest of everything that they depend on."""

    def __init__(self, path, case: _Case):
        self.path, self.case = None if path is None else Path(path), case
        digest = hashlib.sha256(repr((case.eps, case.box)).encode())
        for name, value in case.model.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        self.model = digest

    def key(self, i: int) -> str:
        digest = self.model.copy()
        digest.update(self.case.x[i].cpu().numpy().tobytes() + repr(int(self.case.y[i])).encode())
        return digest.hexdigest()[:32]

    def read(self, known: list[Verdict]) -> dict[int, Verdict]:
        """The decided ones among the images that are still open; a counterexample is checked again."""
        if self.path is None or not self.path.exists():
            return {}
        lines = {}
        for line in self.path.read_text(encoding="utf8").splitlines():
            try:
                entry = json.loads(line)
                lines[entry["key"]] = entry
            except (json.JSONDecodeError, KeyError, TypeError):  # the line that an interrupt cut off
                continue
        found = {}
        for i in _open(known):
            entry = lines.get(self.key(i))
            if entry and entry["status"] == "robust":
                found[i] = Verdict("robust", None, entry["margin"], entry["seconds"], entry["method"], entry["reached"])
            elif entry and entry["status"] == "vulnerable":
                x = self.case.x[i : i + 1]
                values = np.frombuffer(base64.b64decode(entry["x"]), dtype=np.float64)
                candidate = torch.from_numpy(values.copy()).reshape(x.shape).to(x)
                found[i] = _accept(
                    self.case, i, replace(known[i], seconds=0.0), candidate, entry["method"], entry["seconds"]
                )
        return found

    def write(self, i: int, verdict: Verdict) -> None:
        if self.path is None or verdict.status == "unknown":
            return
        entry = {name: getattr(verdict, name) for name in ("status", "margin", "seconds", "method", "reached")}
        if verdict.counterexample is not None:
            entry["x"] = base64.b64encode(verdict.counterexample.double().cpu().numpy().tobytes()).decode()
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write("\n" * (file.tell() > 0) + json.dumps(entry | {"key": self.key(i)}))
        except OSError as error:  # the verdict itself must not be lost with a full disk
            warnings.warn(f"verify: could not write to {self.path} ({error}); it holds no more", stacklevel=4)
            self.path = None
