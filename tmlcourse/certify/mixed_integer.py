"""The exact answer: the network itself as a mixed-integer program (Tjeng, Xiao & Tedrake 2019).

Bounds decide its cost: an unsure neuron is a binary variable, a decided one is none. So bounds are tightened by what each
stage can do (interval, CROWN, optimised slopes, then two linear programs for each neuron still open) before the program is
written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .branch import branch
from .linear_program import Problem, Program, Solver, build, each_program, objective, relax, tightener
from .network import MaxPool


def margins(model, x: Tensor, y: Tensor, eps: float, *, box, bounds, solver: str, time_limit: float | None) -> Tensor:
    """The exact minima of z_y - z_j (their best proved lower bounds where time ends), (N, K): see `bounds.margins`."""
    return each_program(model, x, y, eps, box, bounds, solver, "mip", lambda problem: _margins(problem, time_limit))


def _margins(problem: Problem, time_limit: float | None) -> list[float]:
    clock = Clock(time_limit)
    program = exact_program(problem, clock)
    relaxed, exact = Solver(relax(program), problem.solver), Solver(program, problem.solver)
    found = [0.0] * problem.network.classes
    for rival in range(problem.network.classes):
        if rival != problem.y:
            goal = objective(program, problem.y, rival)
            bound = relaxed.minimise(*goal, time_limit=clock.left())
            start = _columns(problem, program, _attack(problem, rival, pixels(problem, bound.point)))
            answer = exact.minimise(*goal, time_limit=clock.left(), start=start)
            found[rival] = max(bound.low, answer.low)
    return found


@dataclass
class Clock:
    """Counts the seconds that are left of a limit (None: no limit)."""

    limit: float | None

    def __post_init__(self):
        self.began = time.perf_counter()

    def left(self) -> float | None:
        return None if self.limit is None else max(0.01, self.limit - self.seconds())

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def over(self) -> bool:
        return self.limit is not None and self.seconds() >= self.limit


def exact_program(problem: Problem, clock: Clock) -> Program:
    """The mixed-integer program of one image, its neurons tightened by linear programs first."""
    deadline = None if clock.limit is None else clock.began + clock.limit
    tighten = tightener(problem.solver, deadline)
    return build(problem.network, problem.weights, problem.region, problem.bounds, integer=True, tighten=tighten)


def pixels(problem: Problem, point: np.ndarray | None) -> Tensor:
    """The image in a program's point (the clean one without), shape (1, ...), clipped to the ball."""
    if point is None:
        return problem.x
    flat = torch.from_numpy(np.asarray(point[: problem.x.numel()])).reshape(problem.x.shape).to(problem.x.device)
    return torch.minimum(torch.maximum(flat, problem.region.low), problem.region.high)


def _attack(problem: Problem, rival: int, start: Tensor, steps: int = 20) -> Tensor:
    """A point of the ball (1, ...) of small z_y - z_rival: the best met by signed gradient steps from x and from `start`."""
    x, region = torch.cat([problem.x, start]), problem.region
    best, best_x = torch.inf, start
    for step in range(steps + 1):
        with torch.enable_grad():
            x.requires_grad_()
            z = problem.network(x)
            gap = z[:, problem.y] - z[:, rival]
            (slope,) = torch.autograd.grad(gap.sum(), x)
        x = x.detach()
        if gap.min() < best:
            best, best_x = gap.min().item(), x[[int(gap.argmin())]]
        x = x - region.radius * (2.5 / steps) * (1 - step / (steps + 1)) * slope.sign()
        x = torch.minimum(torch.maximum(x, region.low), region.high)
    return best_x


def _columns(problem: Problem, program: Program, x: Tensor) -> np.ndarray | None:
    """The values that an image gives to a program's columns: where a solver may start. None with max-pooling."""
    if any(isinstance(block.activation, MaxPool) for block in problem.network.blocks):
        return None
    columns = np.zeros(len(program.low))
    columns[: x.numel()] = x.flatten().cpu().numpy()
    layers = iter(program.neurons)
    for block in problem.network.blocks[:-1]:
        x = block(x)
        unsure, positive, negative, v = next(layers)
        values = x.flatten().cpu().numpy()[unsure]
        columns[positive], columns[negative], columns[v] = values.clip(0), (-values).clip(0), values > 0
        x = block.activation(x)
    return columns


@dataclass(frozen=True)
class Decision:
    """What the programs found out about one image. `low` <= the least margin <= `high`; `x`: a point with margin `high`."""

    low: float
    high: float
    x: Tensor
    method: str
    seconds: float


def decide(problem: Problem, open_rivals: list[int], tolerance: float, time_limit: float | None) -> Decision:
    """Find the sign of min z_y - z_j for the rivals that cheaper bounds left open.

    First branch and bound on the network's own bounds, for a quarter of the time (15 s without a limit); then linear
    programs, bounds tightened by linear programs, and the exact program. Stops at a point whose margin is below
    -tolerance, or when every rival's is proved above the tolerance.
    """
    clock = Clock(time_limit)
    low = dict.fromkeys(open_rivals, -np.inf)
    best, best_x = torch.inf, problem.x

    def look(x: Tensor) -> bool:
        """Run the network on points of the ball (M, ...); whether one of them settles the image."""
        nonlocal best, best_x
        z = problem.network(x)
        values = (z[:, [problem.y]] - z).index_fill(1, torch.tensor([problem.y], device=z.device), torch.inf)
        value, index = values.amin(1).min(0)
        if value < best:
            best, best_x = value.item(), x[index : index + 1]
        return best < -tolerance

    def report(method: str) -> Decision:
        return Decision(min(low.values(), default=np.inf), best, best_x, method, clock.seconds())

    def still_open() -> list[int]:
        return [rival for rival in sorted(low, key=low.get) if low[rival] <= tolerance]

    def linear(program: Program) -> bool:
        relaxed = Solver(program, problem.solver)
        for rival in still_open():
            if clock.over():
                break
            answer = relaxed.minimise(*objective(program, problem.y, rival), time_limit=clock.left())
            low[rival] = max(low[rival], answer.low)
            if look(pixels(problem, answer.point)):
                return True
        return not still_open()

    look(problem.x)
    watch = Clock(15.0 if time_limit is None else 0.25 * time_limit)
    for rival in still_open():
        found = branch(problem, rival, tolerance, watch.over, look)
        if found is None:
            return report("branch")
        low[rival] = max(low[rival], found)
    if not still_open() or clock.over():
        return report("branch")
    if linear(build(problem.network, problem.weights, problem.region, problem.bounds, integer=False)) or clock.over():
        return report("lp")
    program = exact_program(problem, clock)
    if linear(relax(program)) or clock.over():
        return report("lp")
    exact = Solver(program, problem.solver)
    for rival in still_open():
        if clock.over():
            break
        goal = objective(program, problem.y, rival)
        answer = exact.minimise(*goal, time_limit=clock.left(), cutoff=1.5 * tolerance, enough=-2 * tolerance)
        low[rival] = max(low[rival], answer.low)
        if look(pixels(problem, answer.point)):
            break
    return report("mip")
