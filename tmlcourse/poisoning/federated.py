"""Federated averaging, backdoors that come in through it, and rules of aggregation that resist them.

The server never sees data. In each round it sends its model to a few clients, each trains on its own examples, and the server
adds an aggregate of their updates delta_i = theta_i - theta. One client who lies writes a part of the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .. import checks, progress
from .backdoors import _target, aims, attack_success
from .triggers import Trigger

# ---- rules of aggregation: updates (m, d) of m clients -> one update (d,)


def _updates(updates, name: str = "updates") -> Tensor:
    if not isinstance(updates, Tensor) or not updates.is_floating_point():
        raise TypeError(f"{name}: got {type(updates).__name__}, want a floating-point tensor (m, d)")
    if updates.dim() != 2 or updates.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(updates.shape)}, want (m, d) with m, d >= 1")
    if not torch.isfinite(updates).all():
        raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    return updates


def mean(updates: Tensor) -> Tensor:
    """(1/m) sum_i delta_i, federated averaging: (m, d) -> (d,). One client can move it anywhere. McMahan et al. 2017."""
    return _updates(updates).mean(0)


def median(updates: Tensor) -> Tensor:
    """The median of each coordinate, the mean of the middle two if m is even: (m, d) -> (d,). Yin et al. 2018."""
    ordered, m = _updates(updates).sort(0).values, len(updates)
    return (ordered[(m - 1) // 2] + ordered[m // 2]) / 2


def trimmed_mean(updates: Tensor, trim: int = 1) -> Tensor:
    """In each coordinate the mean without the `trim` largest and the `trim` smallest values: (m, d) -> (d,).

    Raises: ValueError: 2 trim >= m.
    Source: Yin et al. 2018.
    Example: `trimmed_mean(torch.tensor([[1.0], [2.0], [99.0]]), trim=1)` is 2.0.
    """
    m = len(_updates(updates))
    if 2 * checks.positive_int(trim, "trim", least=0) >= m:
        raise ValueError(f"trim: got {trim} on both sides of {m} updates, want 2 trim < {m}")
    return updates.sort(0).values[trim : m - trim].mean(0)


def norm_clipped(updates: Tensor, limit: float | None = None) -> Tensor:
    """(1/m) sum_i delta_i min(1, limit / ||delta_i||_2), no client louder than `limit`: (m, d) -> (d,).

    Without a limit it is the median of the norms. Source: Sun, Kairouz, Suresh & McMahan 2019.
    """
    norms = _updates(updates).norm(dim=1)
    limit = norms.quantile(0.5) if limit is None else checks.nonnegative(limit, "limit")
    tiny = torch.finfo(updates.dtype).tiny
    return (updates * (limit / norms.clamp_min(tiny)).clamp(max=1)[:, None]).mean(0)


def krum(updates: Tensor, attackers: int = 1) -> Tensor:
    """The one update whose m - f - 2 nearest others are closest, sum_j ||delta_i - delta_j||^2 smallest: (m, d) -> (d,).

    Args: attackers: f, how many clients may lie; needs m >= f + 3 (its theorem 2 f + 3).
    Raises: ValueError: too few updates.
    Source: Blanchard, El Mhamdi, Guerraoui & Stainer 2017.
    Example: `krum(torch.tensor([[0.0], [0.1], [0.3], [9.0]]), attackers=1)[0] < 1`.
    """
    m = len(_updates(updates))
    near = m - checks.positive_int(attackers, "attackers", least=0) - 2
    if near < 1:
        raise ValueError(f"attackers: got {attackers} for {m} updates, want at most {m - 3}")
    apart = torch.cdist(updates.double(), updates.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    apart.fill_diagonal_(torch.inf)
    return updates[apart.sort(1).values[:, :near].sum(1).argmin()].clone()


# ---- clients


def split_clients(
    y: Tensor, clients: int, *, concentration: float | None = None, seed: int | None = None
) -> list[Tensor]:
    """Who holds which examples: for each client the indices of its own, all of them handed out once.

    Args:
        y: labels (n,). clients: how many (2 to n).
        concentration: alpha of the Dirichlet law by which each class is shared out; small is one-sided, 0.5 in DBA.
            Without it everyone gets an equal part of everything.
        seed: of the draw; torch's generator without.
    Returns: `clients` int64 tensors on the device of y, none of them empty.
    Raises: TypeError, ValueError: bad input.
    Source: Hsu, Qi & Brown 2019; Xie et al. 2020.
    Example: `len(split_clients(train.y, 4, seed=0))` is 4.
    """
    if not isinstance(y, Tensor) or y.dim() != 1 or y.dtype != torch.int64:
        raise TypeError(f"y: got {type(y).__name__}, want int64 labels (n,)")
    if checks.positive_int(clients, "clients", least=2) > len(y):
        raise ValueError(f"clients: got {clients} for {len(y)} examples, want at most one client an example")
    if concentration is not None:
        checks.positive(concentration, "concentration")
    seed = int(torch.randint(2**62, ())) if seed is None else checks.positive_int(seed, "seed", least=0)
    rng, labels = np.random.default_rng(seed), y.cpu().numpy()
    parts = [[] for _ in range(clients)]
    if concentration is None:
        for part, piece in zip(parts, np.array_split(rng.permutation(len(y)), clients), strict=True):
            part.extend(piece)
    else:
        for label in np.unique(labels):
            mine = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(rng.dirichlet([concentration] * clients))[:-1] * len(mine)
            for part, piece in zip(parts, np.split(mine, cuts.round().astype(int)), strict=True):
                part.extend(piece)
    for part in parts:
        if not part:  # who was left with nothing takes one from the richest
            part.append(max(parts, key=len).pop())
    return [torch.as_tensor(np.sort(part), dtype=torch.int64, device=y.device) for part in parts]


@dataclass(frozen=True)
class Attacker:
    """A client who stamps a part of each local batch, and sends gamma (theta_i - theta) instead of theta_i - theta.

    Attributes:
        client: its number. trigger, target: what it stamps, and the label it writes.
        share: of each local batch, in (0, 1]. scale: gamma > 0; with the number of sampled clients, the average of the
            round is moved onto the attacker's own model (Bagdasaryan et al. 2020).
        rounds: in which it attacks, and is among the sampled; None for all of them.
    """

    client: int
    trigger: Trigger
    target: int
    share: float = 0.3
    scale: float = 1.0
    rounds: tuple[int, ...] | None = None

    def __post_init__(self):
        checks.positive_int(self.client, "client", least=0)
        if not isinstance(self.trigger, Trigger):
            raise TypeError(f"trigger: got {type(self.trigger).__name__}, want a Trigger")
        if not 0 < checks.nonnegative(self.share, "share") <= 1:
            raise ValueError(f"share: got {self.share}, want a number in (0, 1]")
        checks.positive(self.scale, "scale")


def federated_average(
    model: nn.Module,
    data,
    clients: Sequence[Tensor],
    *,
    rounds: int = 20,
    sample: int = 10,
    steps: int = 10,
    batch_size: int = 32,
    lr: float = 0.1,
    aggregate: Callable[[Tensor], Tensor] = mean,
    attackers: Sequence[Attacker] = (),
    watch: Callable[[nn.Module], dict] | None = None,
    seed: int | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train a copy of the model by federated averaging: theta <- theta + aggregate(delta_1, ..., delta_m), round by round.

    In each round `sample` clients take `steps` steps of SGD from theta on batches of their own examples (all of them at once,
    by `torch.func.vmap`); an `Attacker` among them stamps and scales.

    Args:
        model: without batch statistics or dropout; it is left exactly as it was.
        data: `.x` (N, ...) and `.y` (N,), on the model's device. clients: indices, from `split_clients`.
        rounds: of communication (>= 1). sample: clients a round; steps, batch_size, lr: of the local SGD.
        aggregate: updates (m, d) -> (d,): `mean`, `median`, `trimmed_mean`, `norm_clipped`, `krum`, or your own.
        attackers: who lies. watch: model -> dict of numbers, asked after each round (at its own cost).
        seed: makes the run reproducible; torch's generator without.
    Returns: the trained copy, in evaluation mode, and one row a round: `round`, `norm` (of the aggregate), what `watch` said.
    Raises: TypeError, ValueError: bad input; FloatingPointError where an update is no longer finite.
    Source: McMahan et al. 2017, algorithm 1.
    Example: `federated_average(model, train, split_clients(train.y, 4, seed=0), rounds=1, sample=2, steps=1, seed=0)`.
    """
    checks.model(model, checks.images(data.x, "data.x"))
    checks.labels(data.y, data.x, "data.y")
    for name, value in (("rounds", rounds), ("sample", sample), ("steps", steps), ("batch_size", batch_size)):
        checks.positive_int(value, name)
    checks.nonnegative(lr, "lr")
    if sample > len(clients):
        raise ValueError(f"sample: got {sample}, want at most {len(clients)}, the number of clients")
    if any(len(part) == 0 or part.min() < 0 or part.max() >= len(data.y) for part in clients):
        raise ValueError(f"clients: want at least one index each, all in [0, {len(data.y) - 1}]")
    with torch.no_grad():
        classes = checks.logits(model(data.x[:1]), data.y[:1]).shape[1]
    liars = {}
    for attacker in attackers:
        _target(attacker.target, classes)
        attacker.trigger.stamp(data.x[:1])
        if attacker.client >= len(clients) or attacker.client in liars:
            raise ValueError(f"attackers: got client {attacker.client}, want different ones below {len(clients)}")
        liars[attacker.client] = attacker
    seed = int(torch.randint(2**62, ())) if seed is None else checks.positive_int(seed, "seed", least=0)
    coin = torch.Generator().manual_seed(seed)
    server = copy.deepcopy(model).eval()
    names = [name for name, parameter in server.named_parameters()]
    sizes = [parameter.numel() for parameter in server.parameters()]
    shapes = [parameter.shape for parameter in server.parameters()]
    buffers = dict(server.named_buffers())

    def risk(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = dict(zip(names, (p.view(s) for p, s in zip(theta.split(sizes), shapes, strict=True)), strict=True))
        return F.cross_entropy(functional_call(server, (parts, buffers), (x,)), y)

    gradients, rows = vmap(grad(risk)), []
    for number in progress.bar(range(rounds), desc="federated averaging", unit="round"):
        active = [a for a in liars.values() if a.rounds is None or number in a.rounds]
        must = [a.client for a in active if a.rounds is not None][:sample]
        others = [i for i in torch.randperm(len(clients), generator=coin).tolist() if i not in must]
        chosen = must + others[: sample - len(must)]
        with torch.no_grad():
            theta = parameters_to_vector(server.parameters()).detach()
        local = theta.repeat(sample, 1)
        for _ in range(steps):
            index = torch.stack([_draw(clients[i], batch_size, coin) for i in chosen])
            x, y = data.x[index], data.y[index]
            for place, attacker in enumerate(liars.get(i) for i in chosen):
                if attacker in active:
                    bad = slice(0, max(1, round(attacker.share * batch_size)))
                    x[place, bad] = attacker.trigger.stamp(x[place, bad])
                    y[place, bad] = aims(y[place, bad], attacker.target, classes)
            local = local - lr * gradients(local, x, y)
        scale = torch.tensor([liars[i].scale if liars.get(i) in active else 1.0 for i in chosen])
        updates = (local - theta) * scale.to(theta)[:, None]
        if not torch.isfinite(updates).all():
            raise FloatingPointError(f"updates: got infinite values in round {number + 1}; lower lr = {lr}?")
        step = aggregate(updates)
        vector_to_parameters(theta + step, server.parameters())
        rows.append({"round": number + 1, "norm": float(step.norm())} | (watch(server) if watch else {}))
    return server, pd.DataFrame(rows)


def _draw(part: Tensor, n: int, coin: torch.Generator) -> Tensor:
    """n of a client's examples, with replacement."""
    return part[torch.randint(len(part), (n,), generator=coin).to(part.device)]


def federated_backdoor(
    model: nn.Module,
    data,
    clients: Sequence[Tensor],
    trigger: Trigger,
    *,
    target: int,
    attackers: Sequence[int] = (0, 1, 2, 3),
    at: Sequence[int] | None = None,
    distributed: bool = True,
    share: float = 0.3,
    scale: float | None = None,
    sample: int = 10,
    test=None,
    **options,
) -> tuple[nn.Module, pd.DataFrame]:
    """A backdoor planted through federated averaging: by several clients with a part of the trigger each, or by one with all.

    Distributed: attacker i of s stamps the i-th local part of the trigger and sends (gamma / s)(theta_i - theta).
    Centralised: the first of them stamps the whole trigger and sends gamma (theta_1 - theta). Pixels and scale add up to the
    same, and the whole trigger is what is shown to the finished model.

    Args:
        model, data, clients, sample and the options: as for `federated_average`.
        trigger, target: the whole trigger, and the label that it should call up.
        attackers: numbers of the clients who lie. at: rounds in which they attack, counted from 0; without, all of them,
            whenever chance samples them.
        distributed: as above. share: of a lying client's batch that is stamped. scale: gamma in all; `sample` without, which
            puts the attackers' own model in place of the average (model replacement).
        test: clean data; with it the history has `accuracy` on it and `success` of the whole trigger.
    Returns: as `federated_average`.
    Raises: TypeError, ValueError: bad input.
    Source: Xie, Huang, Chen & Li 2020 (DBA); Bagdasaryan et al. 2020 (model replacement).
    Example: `federated_backdoor(model, train, split_clients(train.y, 6, seed=0), bars_trigger((1, 28, 28)), target=2,
        rounds=1, sample=5, steps=1, seed=0)[1]`.
    """
    from ..training import accuracy

    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    attackers = list(attackers)
    if not attackers:
        raise ValueError("attackers: got none, want at least one client")
    gamma = float(sample) if scale is None else checks.nonnegative(scale, "scale")
    parts = trigger.split(len(attackers)) if distributed else (trigger,)
    rounds = None if at is None else tuple(at)
    liars = [Attacker(client, part, target, share, gamma / len(parts), rounds)
             for client, part in zip(attackers, parts, strict=False)]  # fmt: skip

    def watch(server: nn.Module) -> dict:
        success = attack_success(server, test.x, test.y, trigger, target)
        return {"accuracy": accuracy(server, test.x, test.y), "success": success}

    return federated_average(
        model, data, clients, sample=sample, attackers=liars, watch=None if test is None else watch, **options
    )
