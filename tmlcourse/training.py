"""One training loop. What is trained for is the loss: a function (model, x, y) -> scalar.

Standard, adversarial, certified and private training are compositions of `fit` with a loss, not loops of their own:

    fit(model, data)                                              # min E l(h(x), y)
    fit(model, data, loss=adversarial(Linf(0.3), steps=10))       # min E max_{x' in B(x)} l(h(x'), y)
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, progress


def cross_entropy(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and the logits it came from: the standard risk (1/n) sum_i l(h(x_i), y_i)."""
    z = model(x)
    return F.cross_entropy(z, y), z


def adversarial(threat, attack: Callable | None = None, **options) -> Callable:
    """The adversarial risk (1/n) sum_i max_{x' in B(x_i)} l(h(x'), y_i), the maximum found by `attack`.

    By Danskin's theorem the gradient of the maximum is the gradient at the maximiser, so the attack is not differentiated.

    Args:
        threat: the feasible set.
        attack: (model, x, y, threat, **options) -> x_adv; `tmlcourse.attacks.pgd` without.
        options: passed to the attack.
    Returns:
        A loss for `fit`. The attack sees the model in evaluation mode; the training step does not.
    Source: Madry et al. 2018; Danskin 1966.
    Example: `fit(model, data, loss=adversarial(Linf(0.3), steps=10, alpha=0.1))`.
    """
    if attack is None:
        from .attacks import pgd as attack

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mode = model.training
        model.eval()
        try:
            x_adv = attack(model, x, y, threat, **options)
        finally:
            model.train(mode)
        return cross_entropy(model, x_adv, y)

    return loss


def single_step(model, x: Tensor, y: Tensor, threat, *, alpha: float) -> Tensor:
    """The attack of fast adversarial training: one step of `alpha` from a random start, taken whether or not it helps.

    Source: Wong, Rice & Kolter 2020 (they use alpha = 1.25 eps for MNIST and CIFAR-10).
    Example: `adversarial(Linf(0.3), single_step, alpha=0.375)`.
    """
    start = threat.random(x).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)
    return threat.ascend(start.detach(), grad, x, alpha)


def crop_and_flip(x: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels (zeros come in) and mirror every second one: (N, C, H, W) -> same."""
    n, _, h, w = x.shape
    dy, dx = torch.randint(0, 2 * padding + 1, (2, n), device=x.device)
    flip = torch.rand(n, device=x.device) < 0.5
    columns = torch.arange(w, device=x.device)[None] + dx[:, None]
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    rows = torch.arange(h, device=x.device)[None] + dy[:, None]
    padded = F.pad(x, [padding] * 4)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def fit(
    model: nn.Module,
    data,
    *,
    epochs: int = 5,
    batch_size: int = 100,
    lr: float = 1e-3,
    loss: Callable = cross_entropy,
    optimizer: Callable = torch.optim.Adam,
    schedule: Callable[[float], float] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    validation=None,
    seed: int | None = None,
) -> pd.DataFrame:
    """Minimise the mean of `loss` over the data by mini-batches, in place.

    theta <- theta - lr * direction of the optimiser, on batches of a fresh permutation in every epoch.

    Args:
        model: trained in place, on the device where its parameters are; its mode is put back afterwards.
        data: anything with tensors `.x` (N, ...) in [0, 1] and `.y` (N,).
        epochs, batch_size: passes over the data, and images a step (both >= 1).
        lr: the highest learning rate (>= 0).
        loss: (model, x, y) -> scalar, or (scalar, logits) so that the running accuracy can be shown. One that has a parameter
            `progress` is told with it the fraction of training done, in [0, 1): losses that grow harder need to know.
        optimizer: (parameters, lr=...) -> torch optimiser, e.g. `functools.partial(torch.optim.SGD, momentum=0.9)`.
        schedule: multiplies lr; a function of the fraction of training done, in [0, 1). `triangle` without.
        augment: images -> images, on each batch.
        validation: data whose accuracy is recorded after each epoch.
        seed: makes the run reproducible (order, augmentation, random starts) and leaves torch's generator as it was.
    Returns:
        The history, one row an epoch: epoch, loss, accuracy (running, on what the loss saw), validation, seconds.
    Raises:
        TypeError, ValueError: bad input; FloatingPointError when the loss is no longer finite.
    Example: `fit(small_cnn((1, 8, 8), seed=0), load("digits", "train"), epochs=1, seed=0)`.
    """
    device = next(model.parameters()).device
    checks.labels(data.y, checks.images(data.x, "data.x"), "data.y")
    checks.positive_int(epochs, "epochs")
    checks.positive_int(batch_size, "batch_size")
    checks.nonnegative(lr, "lr")
    schedule = triangle if schedule is None else schedule
    told = "progress" in inspect.signature(loss).parameters
    optimiser = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    per_epoch = math.ceil(len(data.x) / batch_size)
    rows, mode = [], model.training
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices, enabled=seed is not None),
        progress.bar(total=epochs * per_epoch, unit="step") as bar,
    ):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for epoch in range(epochs):
                model.train()
                began, total, right, seen = time.perf_counter(), 0.0, 0, 0
                for number, index in enumerate(torch.randperm(len(data.x)).split(batch_size)):
                    x, y = data.x[index].to(device), data.y[index].to(device)
                    done = (epoch + number / per_epoch) / epochs
                    for group in optimiser.param_groups:
                        group["lr"] = lr * schedule(done)
                    value = loss(model, x if augment is None else augment(x), y, **({"progress": done} if told else {}))
                    value, z = value if isinstance(value, tuple) else (value, None)
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()
                    optimiser.step()
                    total, seen = total + value.item() * len(x), seen + len(x)
                    right += int((z.argmax(1) == y).sum()) if z is not None else 0
                    if not math.isfinite(total):
                        raise FloatingPointError(f"loss: got {value.item()} in epoch {epoch + 1}; lower lr = {lr}?")
                    shown = {"loss": f"{total / seen:.3f}", "accuracy": f"{right / seen:.3f}" if z is not None else "-"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                row = {
                    "epoch": epoch + 1,
                    "loss": total / seen,
                    "accuracy": right / seen if z is not None else float("nan"),
                }
                if validation is not None:
                    model.eval()
                    row["validation"] = accuracy(model, validation.x, validation.y)
                rows.append(row | {"seconds": time.perf_counter() - began})
        finally:
            model.train(mode)
            optimiser.zero_grad(set_to_none=True)
    return pd.DataFrame(rows)


def triangle(done: float) -> float:
    """Learning-rate factor that rises from 0 to 1 over the first 30 % of training and falls back to 0 (Smith 2017)."""
    return done / 0.3 if done < 0.3 else (1 - done) / 0.7


def constant(done: float) -> float:
    """Learning-rate factor 1 throughout."""
    return 1.0


@torch.no_grad()
def accuracy(model, x: Tensor, y: Tensor, *, batch_size: int = 1000) -> float:
    """Share of images classified as labelled, (1/n) sum_i 1[argmax_k h(x_i)_k = y_i], in [0, 1].

    Args:
        model: returns logits (N, K); in evaluation mode, on the images' device (or on its own, where x is moved to).
        x, y: images (N, ...) in [0, 1] and int64 labels (N,).
    Raises:
        TypeError, ValueError: bad input.
    Example: `accuracy(model, test.x, test.y)`.
    """
    checks.labels(y, checks.images(x))
    device = next((p.device for p in model.parameters()), x.device) if isinstance(model, nn.Module) else x.device
    right = 0
    for i in range(0, len(x), batch_size):
        xb, yb = x[i : i + batch_size].to(device), y[i : i + batch_size].to(device)
        if i == 0:
            checks.model(model, xb)
        right += int((checks.logits(model(xb), yb).argmax(1) == yb).sum())
    return right / len(x)
