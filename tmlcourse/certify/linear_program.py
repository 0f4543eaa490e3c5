"""The linear program of the lecture: the network with each ReLU replaced by its triangle.

    minimise z_y - z_j   over   |x' - x| <= eps,  z = relu(W z + b) relaxed

An unsure neuron W z + b in [l, u] is written as the difference of two parts of which only one may differ from zero:

    W z + b = p - n,   0 <= p <= u v,   0 <= n <= -l (1 - v)

With v in {0, 1} this is the lecture's big-M program (p is the neuron's value); with v in [0, 1] it is the triangle, and
eliminating v leaves p / u + n / (-l) <= 1. Neurons of known sign need no variable: an active one is its own affine
function, an inactive one is zero. So a program has one row and two or three columns for each unsure neuron, beside the
pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pulp
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import progress
from .bounds import Box, ball, best_bounds, check, images_at_once
from .network import Conv, Dense, MaxPool, Network, Reshape, Scale, on_cpu


@dataclass
class Program:
    """minimise cost . v + const  s.t.  rows[0] <= A v <= rows[1], columns[0] <= v <= columns[1], v[binary] in {0, 1}.

    Grows layer by layer. `value` (sparse, neurons x columns) and `const` give the values of the layer reached so far;
    `neurons` keeps of each ReLU layer the unsure neurons' numbers and columns (p, n, and v if there are).
    """

    low: list = field(default_factory=list)
    high: list = field(default_factory=list)
    binary: list = field(default_factory=list)
    entries: list = field(default_factory=list)
    row_low: list = field(default_factory=list)
    row_high: list = field(default_factory=list)
    neurons: list = field(default_factory=list)
    value: sp.csr_array | None = None
    const: np.ndarray | None = None

    def column(self, low, high, binary=False) -> np.ndarray:
        """Add columns with these bounds; their numbers."""
        first = len(self.low)
        self.low += list(low)
        self.high += list(high)
        self.binary += [binary] * len(low)
        return np.arange(first, len(self.low))

    def row(self, matrix: sp.sparray, low, high) -> None:
        """Add rows low <= matrix v <= high; the matrix may be narrower than the program."""
        matrix = sp.coo_array(matrix)
        first = len(self.row_low)
        self.entries.append((matrix.row + first, matrix.col, matrix.data))
        self.row_low += list(low)
        self.row_high += list(high)

    def matrix(self) -> sp.csr_array:
        """A, (rows, columns)."""
        shape = (len(self.row_low), len(self.low))
        if not self.entries:
            return sp.csr_array(shape)
        row, col, data = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        return sp.csr_array(sp.coo_array((data, (row, col)), shape=shape))


@dataclass(frozen=True)
class Answer:
    """low: proved lower bound of the optimum; high: value of the best point found (inf without); point: its columns."""

    low: float
    high: float
    point: np.ndarray | None
    done: bool


def matrices(network: Network) -> list[tuple[sp.csr_array, np.ndarray]]:
    """W (sparse) and b of every block, in float64."""
    found = []
    for block in network.blocks:
        size = int(np.prod(block.shapes[0] if block.shapes else block.shape))
        weight, bias = sp.eye_array(size, format="csr"), np.zeros(size)
        for layer, shape in zip(block.layers, block.shapes, strict=True):
            step = _matrix(layer, shape)
            with torch.no_grad():
                own = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten().numpy()
            weight, bias = sp.csr_array(step @ weight), step @ bias + own
        found.append((weight, bias))
    return found


def _matrix(layer, shape) -> sp.csr_array:
    if isinstance(layer, Dense):
        return sp.csr_array(layer.weight.detach().cpu().double().numpy())
    if isinstance(layer, Scale):
        return sp.csr_array(sp.diags_array(layer.factor.detach().cpu().double().flatten().numpy()))
    if isinstance(layer, Reshape):
        return sp.eye_array(int(np.prod(shape)), format="csr")
    return _convolution(layer, shape)


def _convolution(layer: Conv, shape) -> sp.csr_array:
    """One row an output neuron; its entries stand where `unfold` says that the filter looks (0 is the padding)."""
    size = int(np.prod(shape))
    index = torch.arange(1, size + 1, dtype=torch.float64).reshape(1, *shape)
    kernel = tuple(layer.weight.shape[2:])
    place = F.unfold(index, kernel, layer.dilation, layer.padding, layer.stride).long().numpy() - 1
    weight = layer.weight.detach().cpu().double().flatten(2).numpy()
    outputs, inputs, _ = weight.shape
    place = place.reshape(shape[0], weight.shape[2], -1)
    area = place.shape[2]
    rows, cols, data = [], [], []
    for o in range(outputs):
        first = o // (outputs // layer.groups) * inputs
        col = place[first : first + inputs]
        keep = col >= 0
        rows.append(np.broadcast_to(o * area + np.arange(area), col.shape)[keep])
        cols.append(col[keep])
        data.append(np.broadcast_to(weight[o][:, :, None], col.shape)[keep])
    matrix = sp.coo_array(
        (np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), shape=(outputs * area, size)
    )
    return sp.csr_array(matrix)


def build(network: Network, weights, region: Box, bounds, *, integer: bool, tighten=None) -> Program:
    """The program of one image (region and bounds of a batch of one) up to the logits.

    `integer`: v in {0, 1} (the network itself) instead of eliminated (its triangles). `tighten`: called as
    tighten(program, low, high) with the values before each ReLU; returns better (low, high).
    """
    program = Program()
    centre, radius = (v.detach().cpu().double().flatten().numpy() for v in (region.centre, region.radius))
    pixels = program.column(centre - radius, centre + radius)
    program.value, program.const = sp.eye_array(len(pixels), format="csr"), np.zeros(len(pixels))
    for k, (block, (weight, bias)) in enumerate(zip(network.blocks, weights, strict=True)):
        program.value, program.const = sp.csr_array(weight @ program.value), weight @ program.const + bias
        if block.activation is None:
            return program
        low, high = (v.detach().cpu().double().flatten().numpy() for v in bounds[k])
        if isinstance(block.activation, MaxPool):
            _pool(program, block, low, high, integer)
        else:
            if tighten is not None and k:
                low, high = tighten(program, low, high)
            _relu(program, low, high, integer)
    raise AssertionError("the last block has no activation")


def _relu(program: Program, low: np.ndarray, high: np.ndarray, integer: bool) -> None:
    unsure = np.flatnonzero((low < 0) & (high > 0))
    down, up, m = -low[unsure], high[unsure], len(unsure)
    width = len(program.low)
    positive = program.column(np.zeros(m), up)
    negative = program.column(np.zeros(m), down)
    gate = [program.column(np.zeros(m), np.ones(m), True)] if integer else []
    program.neurons.append((unsure, positive, negative, *gate))
    if m:
        each, const, free = np.arange(m), program.const[unsure], np.full(m, -np.inf)
        place = (np.r_[each, each], np.r_[positive, negative] - width)
        parts = sp.coo_array((np.r_[np.ones(m), -np.ones(m)], place), shape=(m, len(program.low) - width))
        program.row(sp.hstack([-program.value[unsure], parts]), const, const)
        if integer:
            _pairs(program, positive, 1.0, gate[0], -up, free, np.zeros(m))
            _pairs(program, negative, 1.0, gate[0], down, free, down)
        else:  # p / u + n / (-l) <= 1, scaled so that no coefficient is above 1
            size = np.maximum(up, down)
            _pairs(program, positive, down / size, negative, up / size, free, down * up / size)
    keep = sp.diags_array((low >= 0).astype(float))
    unit = sp.coo_array((np.ones(m), (unsure, positive)), shape=(len(low), len(program.low)))
    value = sp.csr_array(keep @ program.value)
    value.resize(len(low), len(program.low))
    program.value = sp.csr_array(value + unit)
    program.const = np.where(low >= 0, program.const, 0.0)


def _pairs(program: Program, first, a, second, b, low, high) -> None:
    """Rows low <= a first + b second <= high, one for each pair of columns."""
    each = np.arange(len(first))
    data, place = np.r_[np.broadcast_to(a, len(each)), b], (np.r_[each, each], np.r_[first, second])
    program.row(sp.coo_array((data, place), shape=(len(each), len(program.low))), low, high)


def _pool(program: Program, block, low: np.ndarray, high: np.ndarray, integer: bool) -> None:
    """m = max_i z_i: m >= z_i, and m <= z_i + (1 - v_i)(U - l_i) with sum_i v_i = 1 over the members that can win."""
    members = block.activation.members(block.shape, "cpu").numpy()
    value, const = program.value, program.const
    picked, fixed = np.zeros(len(members), int), np.ones(len(members), bool)
    jobs = []
    for w, row in enumerate(members):
        row = row[row >= 0]
        can_win = high[row] > low[row].max()
        can_win[low[row].argmax()] = True
        row = row[can_win]
        picked[w], fixed[w] = row[0], len(row) == 1
        if len(row) > 1:
            jobs.append((w, row))
    columns = program.column([low[row].max() for _, row in jobs], [high[row].max() for _, row in jobs])
    for (_, row), m in zip(jobs, columns, strict=True):
        n, top = len(row), high[row].max()
        v = program.column(np.zeros(n), np.ones(n), integer)
        reach = top - low[row]
        one = sp.coo_array((np.ones(n), (np.arange(n), np.full(n, m))), shape=(n, len(program.low)))
        gate = sp.coo_array((reach, (np.arange(n), v)), shape=(n, len(program.low)))
        inner = sp.csr_array(value[row])
        inner.resize(n, len(program.low))
        program.row(one - inner, const[row], np.full(n, np.inf))
        program.row(one - inner + gate, np.full(n, -np.inf), const[row] + reach)
        program.row(sp.coo_array((np.ones(n), (np.zeros(n, int), v)), shape=(1, len(program.low))), [1.0], [1.0])
    single = sp.csr_array(sp.diags_array(fixed.astype(float)) @ value[picked])
    single.resize(len(members), len(program.low))
    place = (np.array([w for w, _ in jobs], int), columns)
    unit = sp.coo_array((np.ones(len(jobs)), place), shape=(len(members), len(program.low)))
    program.value = sp.csr_array(single + unit)
    program.const = np.where(fixed, const[picked], 0.0)


class Solver:
    """One program, solved for one objective after the other; HiGHS keeps its basis in between."""

    def __init__(self, program: Program, name: str = "HiGHS"):
        self.program, self.name, self.a = program, name, program.matrix()
        self.low, self.high = np.array(program.low), np.array(program.high)
        self.row_low, self.row_high = np.array(program.row_low), np.array(program.row_high)
        self.integer = any(program.binary)
        available(name)
        self.highs = self._highs() if name == "HiGHS" else None

    def _highs(self):
        import highspy

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.low), len(self.row_low)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = np.zeros(len(self.low)), self.low, self.high
        lp.row_lower_, lp.row_upper_ = self.row_low, self.row_high
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = self.a.indptr, self.a.indices, self.a.data
        if self.integer:
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[b] for b in self.program.binary]
        highs = highspy.Highs()
        for option, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", 1e-7), ("mip_abs_gap", 1e-7)):
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        return highs

    def minimise(
        self, cost: np.ndarray, const: float = 0.0, *, time_limit: float | None = None, cutoff: float | None = None,
        enough: float | None = None, start: np.ndarray | None = None,
    ) -> Answer:  # fmt: skip
        """The least cost . v + const.

        `cutoff`: points above it do not matter, so `low` may stop there. `enough`: stop at a point below it. `start`: a
        feasible point to begin from (HiGHS).
        """
        full = np.zeros(len(self.low))
        full[: len(cost)] = cost
        if not len(self.row_low):  # no unsure neuron: the minimum over a box
            point = np.where(full > 0, self.low, self.high)
            value = float(full @ point + const)
            return Answer(value, value, point, True)
        run = self._run_highs if self.name == "HiGHS" else self._run_pulp
        return run(full, const, time_limit, cutoff, enough, start)

    def _run_highs(self, cost, const, time_limit, cutoff, enough, start) -> Answer:
        import highspy

        highs, status = self.highs, highspy.HighsModelStatus
        highs.changeColsCost(len(cost), np.arange(len(cost), dtype=np.int32), cost)
        highs.setOptionValue(
            "time_limit", highs.getRunTime() + time_limit if time_limit is not None else highspy.kHighsInf
        )
        if not self.integer:
            highs.setOptionValue("simplex_strategy", 4)  # primal: the last vertex is feasible for every objective
            highs.run()
            found = highs.getModelStatus()
            solution = highs.getSolution()
            low = self.safe(cost, np.array(solution.row_dual)) + const if solution.dual_valid else -np.inf
            if found == status.kInfeasible:
                low = np.inf
            point = np.array(solution.col_value) if solution.value_valid else None
            done = found in (status.kOptimal, status.kInfeasible)
            high = float(cost @ point) + const if done and point is not None else np.inf
            return Answer(low, high, point, done)
        highs.setOptionValue("objective_target", -highspy.kHighsInf if enough is None else enough - const)
        extra = cutoff is not None
        if extra:
            used = np.flatnonzero(cost)
            highs.addRow(-highspy.kHighsInf, cutoff - const, len(used), used.astype(np.int32), cost[used])
        if start is not None:
            known = highspy.HighsSolution()
            known.col_value = start
            known.value_valid = True
            highs.setSolution(known)
        highs.run()
        found, info = highs.getModelStatus(), highs.getInfo()
        solution = highs.getSolution()
        feasible = info.primal_solution_status == 2
        point = np.array(solution.col_value) if feasible else None
        high = float(cost @ point) + const if feasible else np.inf
        if found == status.kInfeasible:
            low, done = (cutoff if extra else np.inf), True
        else:
            done = found in (status.kOptimal, status.kObjectiveTarget)
            low = info.mip_dual_bound + const if np.isfinite(info.mip_dual_bound) else -np.inf
            low = min(low, cutoff) if extra else low
        if extra:
            highs.deleteRows(1, np.array([len(self.row_low)], dtype=np.int32))
        return Answer(float(low) - 1e-6 * (1 + abs(low)) if np.isfinite(low) else low, high, point, done)

    def _run_pulp(self, cost, const, time_limit, cutoff, enough, start) -> Answer:
        problem = pulp.LpProblem("margin", pulp.LpMinimize)
        kinds = (pulp.LpContinuous, pulp.LpBinary)
        v = [
            pulp.LpVariable(f"v{j}", low, high, kinds[b])
            for j, (low, high, b) in enumerate(zip(self.low, self.high, self.program.binary, strict=True))
        ]
        problem += pulp.LpAffineExpression([(v[j], cost[j]) for j in np.flatnonzero(cost)])
        names = []
        for i in range(len(self.row_low)):
            part = slice(self.a.indptr[i], self.a.indptr[i + 1])
            terms = [(v[j], c) for j, c in zip(self.a.indices[part], self.a.data[part], strict=True)]
            for sense, side in ((1, self.row_low[i]), (-1, self.row_high[i])):
                if self.row_low[i] == self.row_high[i]:
                    sense = 0
                if np.isfinite(side):
                    names.append((i, f"r{i}_{sense + 1}"))
                    problem += pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, names[-1][1], side)
                if sense == 0:
                    break
        problem.solve(pulp.getSolver(self.name, msg=False, timeLimit=time_limit))
        point = np.array([x.value() if x.value() is not None else np.nan for x in v])
        high = float(cost @ point) + const
        done = problem.sol_status == pulp.LpSolutionOptimal
        if not done:
            return Answer(np.inf if problem.status == pulp.LpStatusInfeasible else -np.inf, np.inf, None, False)
        if self.integer:
            return Answer(high - 1e-6 * (1 + abs(high)), high, point, True)
        dual = np.zeros(len(self.row_low))
        for i, name in names:
            dual[i] += problem.constraints[name].pi or 0.0
        return Answer(self.safe(cost, dual) + const, high, point, True)

    def safe(self, cost: np.ndarray, dual: np.ndarray) -> float:
        """A lower bound that any multipliers prove, however roughly a solver found them.

        cost . v >= sum_i y_i row_i + sum_j min over the column's box of (cost - A^T y)_j v_j  (Neumaier & Shcherbina 2004).
        """
        side = np.where(dual > 0, self.row_low, self.row_high)
        dual = np.where(np.isfinite(side), dual, 0.0)
        rows = dual * np.where(np.isfinite(side), side, 0.0)
        left = cost - self.a.T @ dual
        columns = np.minimum(left * self.low, left * self.high)
        size = np.abs(rows).sum() + (np.abs(left) * np.maximum(np.abs(self.low), np.abs(self.high))).sum()
        return float(rows.sum() + columns.sum() - 1e-13 * size)


def available(name: str) -> None:
    """Raise a ValueError that says what to install if there is no such solver here."""
    if name == "HiGHS":
        try:
            import highspy  # noqa: F401
        except ImportError:
            raise ValueError("solver: got 'HiGHS', but highspy is not installed: pip install highspy") from None
        return
    have = pulp.listSolvers(onlyAvailable=True)
    if name not in have:
        raise ValueError(f"solver: got {name!r}, want 'HiGHS' or what PuLP finds here: {', '.join(have)}")


def objective(program: Program, y: int, rival: int) -> tuple[np.ndarray, float]:
    """z_y - z_rival as cost over the program's columns and a constant."""
    cost = program.value[[y]] - program.value[[rival]]
    return cost.toarray().ravel(), float(program.const[y] - program.const[rival])


def tightener(solver: str = "HiGHS", deadline: float | None = None):
    """For `build`: solve two linear programs for every neuron whose sign is open (over the layers below it)."""

    def tighten(program: Program, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = low.copy(), high.copy()
        relaxed = Solver(relax(program), solver)
        for i in np.flatnonzero((low < 0) & (high > 0)):
            left = None if deadline is None else deadline - time.perf_counter()
            if left is not None and left <= 0:
                break
            cost, const = program.value[[i]].toarray().ravel(), float(program.const[i])
            low[i] = max(low[i], relaxed.minimise(cost, const, time_limit=left).low)
            if low[i] < 0:
                high[i] = min(high[i], -relaxed.minimise(-cost, -const, time_limit=left).low)
        return low, high

    return tighten


def relax(program: Program) -> Program:
    """The same program with v in [0, 1]."""
    fields = {
        name: list(getattr(program, name)) for name in ("low", "high", "entries", "row_low", "row_high", "neurons")
    }
    return Program(**fields, binary=[False] * len(program.low), value=program.value, const=program.const)


def margins(model, x: Tensor, y: Tensor, eps: float, *, box, bounds, solver: str, time_limit: float | None) -> Tensor:
    """Lower bounds of z_y - z_j from the triangle relaxation, (N, K): see `bounds.margins`."""
    return each_program(model, x, y, eps, box, bounds, solver, "lp", lambda problem: _margins(problem, time_limit))


@dataclass(frozen=True)
class Problem:
    """Everything that decides one image, in float64 and on the CPU, where the solvers are: what a worker receives."""

    network: Network
    weights: list
    x: Tensor
    y: int
    region: Box
    bounds: list
    solver: str


def each_program(model, x: Tensor, y: Tensor, eps: float, box, bounds, solver: str, name: str, work) -> Tensor:
    """`work(problem)` -> K numbers, for each image; stacked, in the dtype of x and rounded down."""
    available(solver)
    with torch.no_grad():
        check(model, x, y, eps, box)
        rows = []
        with progress.bar(total=len(x), desc=name, unit="image") as bar:
            for problem in problems(check(model, x.double(), y, eps, box), x, y, eps, box, bounds, solver):
                rows.append(work(problem))
                bar.update()
        exact = torch.tensor(np.array(rows), dtype=torch.float64, device=x.device)
        below = exact.to(x.dtype)
        return torch.where(below.double() > exact, torch.nextafter(below, torch.full_like(below, -torch.inf)), below)


def problems(network: Network, x: Tensor, y: Tensor, eps: float, box, bounds=None, solver: str = "HiGHS"):
    """Yield a `Problem` an image; without `bounds`, with the best that can be had without a solver."""
    here = on_cpu(network)
    weights = matrices(here)
    for index in torch.arange(len(x), device=x.device).split(images_at_once(network, x)):
        region = ball(x[index].double(), eps, box)
        if bounds is None:
            known = best_bounds(network, region)
        else:
            known = [(low[index].double(), high[index].double()) for low, high in bounds]
        for i, n in enumerate(index.tolist()):
            one = slice(i, i + 1)
            mine = [(low[one], high[one]) for low, high in known]
            part = on_cpu((x[n : n + 1].double(), region[one], mine))
            yield Problem(here, weights, part[0], int(y[n]), *part[1:], solver)


def _margins(problem: Problem, time_limit: float | None) -> list[float]:
    program = build(problem.network, problem.weights, problem.region, problem.bounds, integer=False)
    solver = Solver(program, problem.solver)
    found = [0.0] * problem.network.classes
    for rival in range(problem.network.classes):
        if rival != problem.y:
            found[rival] = solver.minimise(*objective(program, problem.y, rival), time_limit=time_limit).low
    return found
