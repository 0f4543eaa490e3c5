"""Branch and bound on the signs of neurons, many subproblems at once.

A subproblem fixes the sign of some unsure neurons. Its bound is CROWN's with optimised slopes, where every fixed sign also
adds a constraint s z >= 0 with a multiplier beta >= 0:

    min a . z  >=  min (a - beta s) . z        for each beta >= 0

Any slopes in [0, 1] and any beta >= 0 prove a bound, so an optimiser that stops early costs time, never soundness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import Box, _affine_back, _concretise, _line, _ReluLines
from .linear_program import Problem
from .network import Relu, Rows

STEPS, BATCH, TRIALS = 12, 128, 16


@dataclass
class _Nodes:
    """M subproblems; per ReLU layer (M, *shape): sign of each neuron (0: free), lower slope, multiplier.

    `low`: their bounds (M,); `split`: neurons to branch on, the most promising first, layer and flat index (M, TRIALS, 2);
    layer -1 where none is unsure.
    """

    sign: list[Tensor]
    slope: list[Tensor]
    beta: list[Tensor]
    low: Tensor
    split: Tensor

    def __getitem__(self, index) -> _Nodes:
        return _Nodes(*([t[index] for t in part] for part in (self.sign, self.slope, self.beta)), self.low[index],
                      self.split[index])  # fmt: skip

    def and_(self, other: _Nodes) -> _Nodes:
        lists = (
            [torch.cat(pair) for pair in zip(a, b, strict=True)]
            for a, b in ((self.sign, other.sign), (self.slope, other.slope), (self.beta, other.beta))
        )
        return _Nodes(*lists, torch.cat([self.low, other.low]), torch.cat([self.split, other.split]))


def branch(problem: Problem, rival: int, tolerance: float, over: Callable[[], bool], look) -> float | None:
    """A proved lower bound of z_y - z_rival: above the tolerance if the tree closes; None if `look` accepts a point.

    `over()` says when to stop; `look(x)` (a batch of images) whether one of them settles the case.
    """
    bounds = problem.bounds
    cost = torch.zeros(problem.network.classes, dtype=torch.float64, device=problem.x.device)
    cost[problem.y], cost[rival] = 1, -1
    sign = [torch.zeros_like(low) for low, _ in bounds]
    slope = [(high > -low).to(low.dtype) for low, high in bounds]
    zero = problem.x.new_zeros(1)
    root = _Nodes(
        sign, slope, [torch.zeros_like(low) for low, _ in bounds], zero - torch.inf, zero.long().repeat(1, TRIALS, 2)
    )
    nodes, x = _bound(problem, cost, bounds, root, 3 * STEPS)
    if look(x):
        return None
    proved = nodes.low.amin().item()
    if proved > tolerance:
        return proved
    proved = torch.inf
    while len(nodes.low):
        if over() or (nodes.split[:, 0, 0] < 0).any():
            return nodes.low.min().item()
        order = nodes.low.argsort()
        now, nodes = nodes[order[:BATCH]], nodes[order[BATCH:]]
        # Of the promising neurons the one is split whose two children come nearest to being closed, by a quick bound.
        trials = [_bound(problem, cost, bounds, _children(now, now.split[:, t]), 0)[0].low for t in range(TRIALS)]
        choice = torch.stack([low.clamp_max(tolerance).unflatten(0, (2, -1)).sum(0) for low in trials]).argmax(0)
        split = now.split[torch.arange(len(choice), device=choice.device), choice]
        children, x = _bound(problem, cost, bounds, _children(now, split), STEPS)
        if look(x):
            return None
        closed = children.low > tolerance
        proved = min([proved, *children.low[closed].tolist()])
        nodes = nodes.and_(children[~closed])
    return proved


def _children(nodes: _Nodes, split: Tensor) -> _Nodes:
    """Every node twice: with the neuron `split` (M, 2) above zero, then below."""
    children, half = nodes.and_(nodes), len(nodes.low)
    for layer in range(len(nodes.sign)):
        mine = (split[:, 0] == layer).nonzero().flatten()
        place = split[mine, 1]
        flat = children.sign[layer].flatten(1)
        flat[mine, place], flat[mine + half, place] = 1.0, -1.0
        children.sign[layer] = flat.reshape(children.sign[layer].shape)
    return children


def _bound(problem: Problem, cost: Tensor, bounds, nodes: _Nodes, steps: int) -> tuple[_Nodes, Tensor]:
    """The nodes with better slopes, multipliers and bounds, and the neuron to split next; and their minimisers."""
    m, network = len(nodes.low), problem.network
    lines, unsure = [], []
    for block, (low, high), sign in zip(network.blocks, bounds, nodes.sign, strict=False):
        low = torch.where(sign > 0, low.clamp_min(0), low.expand_as(sign))
        high = torch.where(sign < 0, high.clamp_max(0), high.expand_as(sign))
        lines.append(_line(block, low, high, "crown"))
        unsure.append(
            (low < 0) & (high > 0) if isinstance(block.activation, Relu) else torch.zeros_like(low, dtype=torch.bool)
        )
    relus = [i for i, line in enumerate(lines) if isinstance(line, _ReluLines)]
    region = Box(
        problem.region.centre.expand(m, *problem.x.shape[1:]), problem.region.radius.expand(m, *problem.x.shape[1:])
    )
    image, zero = torch.arange(m, device=cost.device), cost.new_zeros(m)
    slope = {i: torch.where(unsure[i], nodes.slope[i], lines[i].below) for i in relus}
    beta = {i: nodes.beta[i].clone() for i in relus}

    def back(score: list | None = None) -> tuple[Tensor, Tensor]:
        rows = Rows(cost.expand(m, -1), image, zero, zero)
        for i in range(len(network.blocks) - 1, -1, -1):
            rows = _affine_back(network.blocks[i], rows)
            if i:
                before, line = rows.a, lines[i - 1]
                rows = line.back(rows, slope.get(i - 1))
                if i - 1 in beta:
                    if score is not None:
                        score[i - 1] = before.abs() * line.intercept * unsure[i - 1]
                    rows = rows.with_(rows.a - beta[i - 1] * nodes.sign[i - 1])
        return _concretise(rows, region), rows.a

    best = nodes.low
    kept = {name: {i: v.clone() for i, v in part.items()} for name, part in (("slope", slope), ("beta", beta))}
    parts = [(kind, i) for kind in ("slope", "beta") for i in relus]
    value_of = {"slope": slope, "beta": beta}
    first, second = ({key: torch.zeros_like(value_of[key[0]][key[1]]) for key in parts} for _ in range(2))
    for step in range(1, steps + 1) if parts else ():
        with torch.enable_grad():
            leaves = [value_of[kind][i].requires_grad_() for kind, i in parts]
            value, _ = back()
            grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        value = value.detach()
        better = value > best
        best = torch.where(better, value, best)
        for (kind, i), g in zip(parts, grads, strict=True):
            v = value_of[kind][i].detach()
            kept[kind][i][better] = v[better]
            if g is not None:
                key = (kind, i)
                first[key].mul_(0.8).add_(g, alpha=0.2)
                second[key].mul_(0.95).addcmul_(g, g, value=0.05)
                rate = {"slope": 0.3, "beta": 0.15}[kind] * 0.9**step / (1 - 0.8**step)
                v = v + rate * first[key] / ((second[key] / (1 - 0.95**step)).sqrt() + 1e-12)
            value_of[kind][i] = v.clamp(0, 1) if kind == "slope" else v.clamp_min(0)
    slope, beta = kept["slope"], kept["beta"]
    score: list = [None] * len(lines)
    value, a = back(score)
    best = torch.maximum(best, value)
    flat = torch.cat([s.flatten(1) if s is not None else zero[:, None] for s in score], 1) if lines else zero[:, None]
    sizes = [s[0].numel() if s is not None else 1 for s in score]
    top, place = flat.topk(min(TRIALS, flat.shape[1]), 1)
    if top.shape[1] < TRIALS:
        top, place = (torch.cat([t, t[:, :1].expand(-1, TRIALS - t.shape[1])], 1) for t in (top, place))
    top, place = torch.where(top > 0, top, top[:, :1]), torch.where(top > 0, place, place[:, :1])
    any_left = (
        torch.cat([u.flatten(1) for u in unsure], 1).any(1) if unsure else torch.zeros_like(top, dtype=torch.bool)
    )
    split = torch.full((m, TRIALS, 2), -1, device=cost.device)
    offset = 0
    for i, size in enumerate(sizes):
        here = (place >= offset) & (place < offset + size) & any_left[:, None] & (top > 0)
        split[here] = torch.stack([torch.full_like(place, i), place - offset], 2)[here]
        offset += size
    x = region.centre - region.radius * a.reshape(region.centre.shape).sign()
    full = [slope.get(i, nodes.slope[i]) for i in range(len(lines))]
    multipliers = [beta.get(i, nodes.beta[i]) for i in range(len(lines))]
    return _Nodes(nodes.sign, full, multipliers, best, split), x
