"""Unlearnable data: noise that makes the loss small, so that nothing is left to learn from the image."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..threat import Linf

_AT_ONCE = 512  # images in one backward pass; class-wise noise learns from one such batch a step


@dataclass(frozen=True)
class Protected:
    """Data with noise that protects it; `training.fit` takes it as it is.

    Args:
        x: protected images (n, ...), y: their labels (n,); noise: one for each class (K, ...) or each image (n, ...).
        error: share of the protected images that the last network of the search misread.
    Example: `Protected(x, y, x - x, 0.0).noise.abs().max()`.
    """

    x: Tensor
    y: Tensor
    noise: Tensor
    error: float

    def __len__(self) -> int:
        return len(self.x)


def unlearnable(
    data,
    model: nn.Module,
    *,
    eps: float,
    class_wise: bool = True,
    rounds: int = 10,
    train_steps: int = 10,
    noise_steps: int = 20,
    alpha: float | None = None,
    lr: float = 0.1,
    batch_size: int = 128,
    stop: float = 0.01,
    seed: int | None = None,
) -> Protected:
    """Error-minimising noise: min over theta, and min over ||delta||_inf <= eps, of E l(h_theta(x + delta), y).

    By turns: `train_steps` of SGD on theta with the present noise, then `noise_steps` of delta <- P(delta - alpha sign
    grad_delta l) on all data. Both want a small loss, so the noise soon carries the label and the network need not look at
    the image. It ends when the network misreads at most the share `stop` of the protected images.

    Args:
        data: images `.x` (n, ...) in [0, 1] and labels `.y` (n,).
        model: where the search begins, usually an untrained network; a copy of it is trained.
        eps: largest change of a pixel (>= 0).
        class_wise: one noise for a class, clipped on each image to [0, 1]; or one for each image.
        rounds, train_steps, noise_steps, batch_size: all >= 1; lr: of SGD with momentum 0.9 (> 0).
        alpha: step of the noise, default eps / 10.
        stop: share in [0, 1].
        seed: of the batches; without it torch's own generator is used.
    Returns: `Protected`, in the dtype of the data.
    Raises: TypeError, ValueError: bad input; FloatingPointError: the copy's training diverged.
    Source: Huang et al. 2021, algorithm 1.
    Example: `unlearnable(test, models.linear(), eps=0.1, rounds=1, seed=0).x.shape` is (8, 1, 28, 28).
    """
    x, y = checks.images(data.x, "data.x").detach(), checks.labels(data.y, data.x, "data.y")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module: a copy of it is trained")
    checks.model(model, x)
    ball = Linf(checks.nonnegative(eps, "eps"))
    for name, value in (("rounds", rounds), ("train_steps", train_steps), ("noise_steps", noise_steps)):
        checks.positive_int(value, name)
    batch_size = checks.positive_int(batch_size, "batch_size")
    alpha = ball.eps / 10 if alpha is None else checks.nonnegative(alpha, "alpha")
    if checks.nonnegative(lr, "lr") == 0 or checks.nonnegative(stop, "stop") > 1:
        raise ValueError(f"lr, stop: got {lr} and {stop}, want lr > 0 and stop in [0, 1]")
    generator = randomness.generator(seed)
    network = copy.deepcopy(model).requires_grad_(True).eval()
    with torch.no_grad():
        classes = checks.logits(network(x[:1]), y[:1]).shape[1]
    if y.max() >= classes:
        raise ValueError(f"data.y: got label {y.max().item()}, want labels in [0, {classes - 1}]")

    row = y if class_wise else torch.arange(len(x), device=x.device)
    noise = x.new_zeros(classes if class_wise else len(x), *x.shape[1:])
    optimiser = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    error = 1.0
    with torch.enable_grad(), progress.bar(total=rounds, desc="unlearnable", unit="round") as bar:
        for _ in range(rounds):
            for _ in range(train_steps):
                index = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator).to(x.device)
                loss = F.cross_entropy(network(ball.project(x[index] + noise[row[index]], x[index])), y[index])
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss: got {loss.item()} while training the copy; lower lr = {lr}?")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            for _ in range(noise_steps):
                some = torch.randperm(len(x), generator=generator)[: _AT_ONCE if class_wise else None].to(x.device)
                slope = _slope(network, ball, x[some], y[some], noise, row[some])
                noise = (noise - alpha * slope.sign()).clamp(-ball.eps, ball.eps)
            error = _error(network, ball.project(x + noise[row], x), y)
            bar.update()
            if error <= stop:
                break
    if not class_wise:
        noise = ball.project(x + noise, x) - x
    return Protected(ball.project(x + noise[row], x), y, noise, error)


def _slope(network, ball: Linf, x: Tensor, y: Tensor, noise: Tensor, row: Tensor) -> Tensor:
    """The gradient of the summed loss with respect to the noise, every image's part added where its noise is."""
    total = torch.zeros_like(noise)
    for a, b, r in zip(x.split(_AT_ONCE), y.split(_AT_ONCE), row.split(_AT_ONCE), strict=True):
        moved = ball.project(a + noise[r], a).requires_grad_()
        loss = F.cross_entropy(network(moved), b, reduction="sum")
        total.index_add_(0, r, torch.autograd.grad(loss, moved)[0])
    return total


@torch.no_grad()
def _error(network, x: Tensor, y: Tensor) -> float:
    wrong = [(network(a).argmax(1) != b).sum() for a, b in zip(x.split(1000), y.split(1000), strict=True)]
    return int(torch.stack(wrong).sum()) / len(x)
