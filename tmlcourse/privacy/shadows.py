"""Shadow models: networks of one architecture, each trained on its own part of the data, all at the same time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from .. import checks, progress, randomness
from ..training import triangle


@dataclass(frozen=True, eq=False)
class Shadows:
    """M trained networks in one: stacked weights, and who was a member of whose training data.

    Args:
        template: a network of the architecture; its own weights mean nothing.
        weights: for each parameter its name and a tensor (M, *its shape).
        members: bool (M, N): network i was trained on the examples members[i] of the pool.
        x, y: the pool, images (N, ...) and labels (N,).
    `len(shadows)` is M, `shadows[:8]` are the first eight of them.
    Example: `train_shadows(lambda seed: linear(seed=seed), test, n=4, epochs=1, seed=0)[:2].logits(x).shape` is (2, 8, 10).
    """

    template: nn.Module
    weights: dict[str, Tensor]
    members: Tensor
    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: slice) -> Shadows:
        if not isinstance(index, slice):
            raise TypeError(f"index: got {index!r}, want a slice; one network alone is shadows.model(i)")
        weights = {name: value[index] for name, value in self.weights.items()}
        return replace(self, weights=weights, members=self.members[index])

    @classmethod
    def of(cls, models: Sequence[nn.Module], members: Tensor, pool) -> Shadows:
        """Networks that were trained elsewhere, e.g. one by one with `dp_sgd`, on pool[members[i]]."""
        template = _template(models[0], checks.images(pool.x, "pool.x"), checks.labels(pool.y, pool.x, "pool.y"))
        if members.dtype != torch.bool or members.shape != (len(models), len(pool.x)):
            raise ValueError(f"members: got {members.dtype} {tuple(members.shape)}, want torch.bool "
                             f"({len(models)}, {len(pool.x)})")  # fmt: skip
        weights = {name: value.detach() for name, value in stack_module_state(list(models))[0].items()}
        return cls(template, weights, members.to(pool.x.device), pool.x, pool.y)

    def model(self, i: int) -> nn.Module:
        """Network i by itself, in evaluation mode."""
        model = copy.deepcopy(self.template)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name][i])
        return model

    @torch.no_grad()
    def logits(self, x: Tensor, *, batch_size: int = 1000) -> Tensor:
        """What every network answers to every image: (N, ...) in [0, 1] -> (M, N, K)."""
        checks.images(x)
        several = vmap(_call(self.template), in_dims=(0, None))
        return torch.cat([several(self.weights, part) for part in x.split(batch_size)], 1)


def _call(template: nn.Module) -> Callable:
    buffers = dict(template.named_buffers())
    return lambda weights, x: functional_call(template, (weights, buffers), (x,))


def halves(n: int, pool: int, *, seed: int | None = None) -> Tensor:
    """Training sets for n networks, as bool (n, pool): random halves in pairs, the second of a pair what the first left.

    So every example is a member for exactly half of the networks (for even n and pool), which LiRA needs on both sides.

    Example: `halves(4, 6, seed=0).sum(0)` is all 2.
    """
    checks.positive_int(n, "n")
    checks.positive_int(pool, "pool", least=2)
    generator = randomness.generator(seed)
    members = torch.zeros(n, pool, dtype=torch.bool)
    for i in range(0, n, 2):
        order = torch.randperm(pool, generator=generator)
        for row, part in zip(members[i : i + 2], order[: pool // 2 * 2].chunk(2), strict=False):
            row[part] = True
    return members


def train_shadows(
    build: Callable[[int], nn.Module],
    pool,
    *,
    n: int = 32,
    members: Tensor | None = None,
    epochs: int = 20,
    batch_size: int = 100,
    lr: float = 5e-3,
    optimizer: Callable = torch.optim.Adam,
    schedule: Callable[[float], float] = triangle,
    seed: int | None = None,
) -> Shadows:
    """Train n networks at once, each on its own part of the pool: n calls of `training.fit` in a fraction of the time.

    The weights are stacked, and `torch.func.vmap` runs the n forward passes as one. The networks share no parameter, so the
    gradient of the sum of their losses holds the gradient of each; optimisers that treat each entry alone (SGD, Adam) then
    do to the stack what they would do to the parts. Result i equals `fit(build(seed + i), pool[members[i]], seed=seed + i)`.

    Args:
        build: seed -> an untrained network that returns logits; without batch statistics or dropout.
        pool: `.x` (N, ...) in [0, 1] and `.y` (N,), on the networks' device.
        n: networks (>= 1). members: bool (n, N), the same number in each row; `halves` without.
        epochs, batch_size, lr, optimizer, schedule: as for `training.fit`.
        seed: of the networks, their training sets and their batches; torch's own generator chooses one without.
    Returns: `Shadows`.
    Raises: TypeError, ValueError: bad input; FloatingPointError where a loss is no longer finite.
    Source: Shokri et al. 2017 for the idea.
    Example: `train_shadows(lambda seed: linear(seed=seed), test, n=2, epochs=1, seed=0).members.sum(1)` is 4 and 4.
    """
    x, y = checks.images(pool.x, "pool.x").detach(), checks.labels(pool.y, pool.x, "pool.y")
    for name, value in (("n", n), ("epochs", epochs), ("batch_size", batch_size)):
        checks.positive_int(value, name)
    checks.positive(lr, "lr")
    seed = int(torch.randint(2**31, ())) if seed is None else checks.positive_int(seed, "seed", least=0)
    if members is None:
        members = halves(n, len(x), seed=seed)
    members = members.to(x.device)
    sizes = members.sum(1) if members.dim() == 2 else members
    if members.dtype != torch.bool or members.shape != (n, len(x)) or sizes.min() < 1 or sizes.min() != sizes.max():
        raise ValueError(f"members: got {members.dtype} {tuple(members.shape)}, want torch.bool ({n}, {len(x)}) with the "
                         "same number of members (at least one) in each row")  # fmt: skip
    models = [build(seed + i) for i in range(n)]
    template = _template(models[0], x, y)
    weights = {name: value.detach().clone().requires_grad_() for name, value in stack_module_state(models)[0].items()}
    size = int(sizes[0])
    own = members.nonzero()[:, 1].view(n, size)
    coins = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    optimiser, several = optimizer(list(weights.values()), lr=lr), vmap(_call(template))
    per_epoch = math.ceil(size / batch_size)
    with torch.enable_grad(), progress.bar(total=epochs * per_epoch, desc=f"{n} shadow models", unit="step") as bar:
        for epoch in range(epochs):
            order = torch.stack([torch.randperm(size, generator=coin) for coin in coins]).to(x.device)
            for number, columns in enumerate(order.split(batch_size, dim=1)):
                for group in optimiser.param_groups:
                    group["lr"] = lr * schedule((epoch + number / per_epoch) / epochs)
                index = own.gather(1, columns)
                loss = F.cross_entropy(several(weights, x[index]).flatten(0, 1), y[index].flatten(), reduction="sum")
                loss = loss / columns.shape[1]
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"loss: got {loss.item()} in epoch {epoch + 1}; lower lr = {lr}?")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                bar.update()
    return Shadows(template, {name: value.detach() for name, value in weights.items()}, members, x, y)


def _template(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """A copy of the first network in evaluation mode; refuses layers that would need a state of their own in each network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: got a {type(model).__name__}, want a function seed -> torch.nn.Module")
    template = copy.deepcopy(model).train()
    try:
        checks.model(template, x)
    except ValueError as cause:
        if "train mode" not in str(cause):
            raise
        raise ValueError("build: got a network with batch statistics or dropout, want one without: all networks run as "
                         "one") from cause  # fmt: skip
    template.eval().requires_grad_(False)
    with torch.no_grad():
        classes = checks.logits(template(x[:1]), y[:1], "pool.y").shape[1]
    if y.max() >= classes:
        raise ValueError(f"pool.y: got label {y.max().item()}, want labels in [0, {classes - 1}]")
    return template
