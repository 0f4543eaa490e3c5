"""A leaderboard with a referee: everybody's attack on every network, judged by the rules of `robust_accuracy`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from .. import checks, progress
from ..attacks import robust_accuracy
from ..intervals import clopper_pearson


def leaderboard(networks: dict, x: Tensor, y: Tensor, threat, attacks: dict[str, Callable], *,
                seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """How much of each network every attack leaves standing. Attackers want little left, defenders much.

    The referee hands each attack a copy of the network, takes its images, sees whether they lie in the threat set, and asks
    the network itself. An attack that leaves the set is disqualified there, and the reason is on the board.

    Args:
        networks: dict name -> model, as for `pgd`. attacks: dict name -> callable (model, x, y, threat) -> x_adv.
        x, y, threat: the same for all. seed: for attacks that know one.
    Returns:
        DataFrame, for each network the attacks by what they left, then "all together" (the worst case over those that
        counted): network, attack, left, low, high (95 %), verdict ("counts", "disqualified: why", or "worst case").
    Raises: TypeError, ValueError: bad input. What an attack itself raises goes through.
    Example: `leaderboard({"linear": model}, x, y, Linf(0.1), {"FGSM": fgsm, "PGD": pgd})`.
    """
    for what, name in ((networks, "networks"), (attacks, "attacks")):
        if not isinstance(what, dict) or not what or not all(callable(v) for v in what.values()):
            raise TypeError(f"{name}: got {type(what).__name__}, want a dict name -> callable, not empty")
    checks.labels(y, checks.images(x))
    rows = []
    for name, model in progress.bar(networks.items(), desc="leaderboard", unit="network"):
        checks.model(model, x)
        standing, board = None, []
        for who, attack in attacks.items():
            try:
                found = robust_accuracy(model, x, y, threat, [_on_a_copy(attack)], seed=seed)
            except ValueError as error:
                if not str(error).startswith("attacks: "):  # the referee's own words; all else is a bug of somebody
                    raise
                board.append((name, who, float("nan"), float("nan"), float("nan"), f"disqualified: {error}"[:120]))
                continue
            standing = found.standing if standing is None else standing & found.standing
            board.append((name, who, found.accuracy, *found.interval, "counts"))
        rows += sorted(board, key=lambda row: (row[2] != row[2], row[2]))
        if standing is not None:
            k, n = int(standing.sum()), len(standing)
            rows.append((name, "all together", k / n, *clopper_pearson(k, n), "worst case"))
    return pd.DataFrame(rows, columns=["network", "attack", "left", "low", "high", "verdict"])


def _on_a_copy(attack: Callable) -> Callable:
    """The attack, given a copy of the network, so that it cannot move the goal."""

    @functools.wraps(attack, updated=())
    def run(model, x, y, threat, **options):
        with torch.enable_grad():
            return attack(copy.deepcopy(model) if isinstance(model, nn.Module) else model, x, y, threat, **options)

    run.__name__ = getattr(attack, "__name__", None) or getattr(getattr(attack, "func", attack), "__name__", "attack")
    return run
