"""Attacks that ask the model nothing when they strike: difference of class means, and a substitute to attack instead."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..training import fit
from .queries import Queries


def difference_of_means(
    x_train: Tensor, y_train: Tensor, x: Tensor, y: Tensor, threat, *, target: Tensor | None = None
) -> Tensor:
    """Step from the mean image of one's own class towards that of another: x + eps sign(mu_t - mu_y) under `Linf`.

    No query at all: only labelled images of the same kind are needed. Under another norm the step is the longest one that
    the set allows along mu_t - mu_y. Without a target, t is the class whose mean is nearest to that of y (in L2).

    Args:
        x_train: images (M, ...) in [0, 1] of the attacker's own.
        y_train: their int64 labels (M,).
        x: images (N, ...) to attack, in [0, 1], of the shape of x_train's.
        y: their int64 labels (N,).
        threat: the feasible set.
        target: int64 labels (N,) that the attacker wants to see instead.
    Returns:
        Images (N, ...) inside the threat set and [0, 1]. Nobody has looked whether they fool anything.
    Raises:
        TypeError, ValueError: bad input, a class without an image among x_train, targets that equal y.
    Source: Bhagoji et al. 2018.
    Example: `difference_of_means(train.x, train.y, test.x, test.y, Linf(0.3))`.
    """
    checks.labels(y, checks.images(x))
    checks.labels(y_train, checks.images(x_train, "x_train"), "y_train")
    checks.same_shape(x_train[:1], x[:1], "x_train")
    present = y_train.unique()
    if len(present) < 2:
        raise ValueError(f"y_train: got {len(present)} class, want at least 2")
    for labels, name in ((y, "y"), (target, "target")):
        if labels is not None and not torch.isin(checks.labels(labels, x, name), present).all():
            raise ValueError(f"{name}: got a class of which there is no image in x_train")
    if target is not None and (target == y).any():
        raise ValueError(f"target: got the true label for {int((target == y).sum())} images, want other classes")
    means = torch.stack([x_train[y_train == k].mean(0) for k in present]).to(x.dtype)
    place = torch.searchsorted(present, y)
    if target is None:
        away = torch.cdist(means.flatten(1), means.flatten(1))
        other = away.fill_diagonal_(torch.inf).argmin(1)[place]
    else:
        other = torch.searchsorted(present, target)
    return threat.ascend(x, means[other] - means[place], x, threat.full_step)


def substitute(
    predict,
    x_seed: Tensor,
    model: nn.Module,
    *,
    rounds: int = 5,
    lam: float = 0.1,
    queries: int | None = None,
    period: int = 3,
    reservoir: int | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 50,
    seed: int | None = None,
) -> nn.Module:
    """Train a copy F of `model` to answer as the black box O does, on points where F's own answer changes fastest.

    S_0 = x_seed. Ask O for the labels of S, train F on them, augment S <- S + {x + lam sign(grad_x F_{O(x)}(x)) : x in S};
    `rounds` times, and train once more. Attack the result with any white-box method: what fools it often fools O too.

    Args:
        predict: images -> int64 labels (N,), or scores (N, K) of which only the winner is used; or a `Queries`. Here a query
            is charged to the point asked about, so that `Queries.total` is what the substitute cost.
        x_seed: images (M, ...) in [0, 1], a few of each class; no labels.
        model: an untrained network of any architecture with logits (N, K); it is copied, not changed.
        rounds: how often S is augmented (>= 0); without a reservoir it doubles each time.
        lam: step of the augmentation, in pixel values (>= 0).
        queries: labels asked for in all, at most (>= 0), or None: the last augmentation is cut to fit.
        period: the step's sign flips every `period` rounds (>= 1), so that points do not all drift one way.
        reservoir: how many points of S, drawn at random, are stepped from once S has more than that (>= 1); all without.
        epochs, lr, batch_size: of the training after each round, as for `tmlcourse.training.fit`.
        seed: makes the result reproducible; without it torch's own generator is used.
    Returns:
        The trained copy, in evaluation mode.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Papernot et al. 2017.
    Example: `x_adv = pgd(substitute(oracle, x_few, mlp(), seed=0), x, y, Linf(0.3))`.
    """
    checks.images(x_seed, "x_seed")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an untrained torch.nn.Module")
    checks.positive_int(rounds, "rounds", least=0)
    checks.nonnegative(lam, "lam")
    for value, name in ((period, "period"), (1 if reservoir is None else reservoir, "reservoir")):
        checks.positive_int(value, name)
    left = checks.positive_int(10**12 if queries is None else queries, "queries", least=0)
    oracle = Queries(predict, answers="labels")
    generator = randomness.generator(seed, x_seed.device)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        classes = model(x_seed[:1]).shape[1]
    new, x, y = x_seed.detach(), x_seed[:0].detach(), torch.zeros(0, dtype=torch.int64, device=x_seed.device)
    with progress.bar(total=rounds + 1, desc="substitute", unit="round") as bar:
        for number in range(rounds + 1):
            new = new[:left]
            if not len(new):
                break
            answers = oracle(new, torch.arange(len(x), len(x) + len(new)))
            left -= len(new)
            if answers.max() >= classes:
                raise ValueError(
                    f"model: got {classes} logits, want more: the black box answered {answers.max().item()}"
                )
            x, y = torch.cat([x, new]), torch.cat([y, answers])
            fit(model, SimpleNamespace(x=x, y=y), epochs=epochs, lr=lr, batch_size=batch_size,
                seed=None if seed is None else seed + number)  # fmt: skip
            bar.update()
            if number < rounds:
                grown = torch.arange(len(x), device=x.device)
                if reservoir is not None and reservoir < len(x):
                    grown = torch.randperm(len(x), generator=generator, device=x.device)[:reservoir]
                new = _augment(model, x[grown], y[grown], lam * (-1) ** (number // period))
    return model


def _augment(model: nn.Module, x: Tensor, y: Tensor, lam: float) -> Tensor:
    """x + lam sign(grad_x F_y(x)), clipped to [0, 1]: where the copy's answer to the black box's label changes fastest."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)
    return (x.detach() + lam * grad.sign()).clamp(0, 1)
