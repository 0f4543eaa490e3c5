"""Proportional fairness: who contributes more gets the better model. Hierarchically fair federated learning."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from .. import checks, progress
from .rates import binary
from .repair import _rows


@dataclass(frozen=True, eq=False)
class Federation:
    """One model a level. models: dict level -> (d + 1,), coefficients and intercept. levels: of each agent.

    given: DataFrame, one row an agent, one column a level: how many of the agent's rows that level's model has seen.
    """

    models: dict[int, Tensor]
    levels: tuple[int, ...]
    given: pd.DataFrame

    def reward(self, agent: int) -> Tensor:
        """The model that an agent receives: that of the agent's own level."""
        return self.models[self.levels[agent]]


def hierarchical(
    X: list[Tensor], y: list, levels: list[int], *, rounds: int = 200, lr: float = 1.0, local_steps: int = 1,
    reg: float = 1e-3, seed: int = 0,
) -> Federation:  # fmt: skip
    """Hierarchically fair federated logistic regression: a model for each level of contribution, paid in kind.

    Level l has agreed to give m_l rows an agent (what its poorest member has). The model of level l is trained by federated
    averaging on min(m_l, m of the agent's own level) rows of *every* agent: lower levels give all they promised, higher
    levels no more than level l does itself. So a model's quality depends on what its receivers gave:

        theta <- sum_i (n_i / n) theta_i,   theta_i = theta after `local_steps` gradient steps on agent i's rows

    With one local step this is gradient descent on all rows given, and no agent's rows leave the agent.

    Args:
        X: one (n_i, d) an agent. y: one (n_i,) in {0, 1} an agent. levels: one integer >= 1 an agent; m must rise with it.
        rounds, local_steps: >= 1. lr: >= 0. reg: of ||theta||^2 / 2 (>= 0).
        seed: of the choice of rows; a level's rows are among those of the next level.
    Returns: `Federation`.
    Raises: TypeError, ValueError: bad input, or a higher level that gives less than a lower one.
    Source: Zhang, Li, Robles-Kelly & Kankanhalli 2020 (HFFL).
    Example: `hierarchical([torch.rand(4, 2), torch.rand(9, 2)], [[0, 1] * 2, [0, 1, 1] * 3], [1, 2], rounds=5).given`.
    """
    if not len(X) == len(y) == len(levels) or not len(X):
        raise ValueError(f"X, y, levels: got {len(X)}, {len(y)} and {len(levels)} agents, want as many of each")
    X = [_rows(x) for x in X]
    y = [torch.from_numpy(binary(labels, "y", len(x))).to(x) for x, labels in zip(X, y, strict=True)]
    if len({x.shape[1] for x in X}) > 1:
        raise ValueError(f"X: got {sorted({x.shape[1] for x in X})} columns, want as many for each agent")
    levels = tuple(checks.positive_int(level, "levels") for level in levels)
    checks.positive_int(rounds, "rounds")
    checks.positive_int(local_steps, "local_steps")
    checks.nonnegative(lr, "lr")
    checks.nonnegative(reg, "reg")
    order = sorted(set(levels))
    quota = {level: min(len(x) for x, own in zip(X, levels, strict=True) if own == level) for level in order}
    for low, high in zip(order, order[1:], strict=False):
        if quota[low] > quota[high]:
            raise ValueError(f"levels: level {high} gives {quota[high]} rows an agent, level {low} gives {quota[low]}: "
                             "want more of the higher level")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(len(x), generator=generator) for x in X]
    given = pd.DataFrame({level: [min(quota[level], quota[own]) for own in levels] for level in order})
    given = given.rename_axis(index="agent", columns="level")
    models = {}
    for level in progress.bar(order, desc="levels"):
        chosen = [order_[:count] for order_, count in zip(shuffled, given[level], strict=True)]
        parts = [(x[index], labels[index]) for x, labels, index in zip(X, y, chosen, strict=True)]
        models[level] = _average(parts, rounds, lr, local_steps, reg)
    return Federation(models, levels, given)


def _average(parts, rounds: int, lr: float, local_steps: int, reg: float) -> Tensor:
    """Federated averaging of logistic regression."""
    n = sum(len(labels) for _, labels in parts)
    parts = [(torch.cat([x, x.new_ones(len(x), 1)], 1), labels) for x, labels in parts]
    theta = parts[0][0].new_zeros(parts[0][0].shape[1])
    keep = torch.ones_like(theta)
    keep[-1] = 0  # the intercept is not shrunk
    for _ in range(rounds):
        mean = torch.zeros_like(theta)
        for A, labels in parts:
            own = theta
            for _ in range(local_steps):
                own = own - lr * (A.T @ ((A @ own).sigmoid() - labels) / len(labels) + reg * keep * own)
            mean += len(labels) / n * own
        theta = mean
    return theta
