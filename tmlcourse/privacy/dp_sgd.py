"""Private learning: stochastic gradient descent whose every step is a Gaussian mechanism.

    g_i = grad l(h(x_i), y_i)
    g = sum_{i in batch} g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I)
    theta <- theta - lr g / (q n)

One record can move the clipped sum by C at most, and each record is in the batch with probability q by its own coin: that is
what `Accountant` accounts for. The sum is divided by the expected size q n, since the size that came out is private, too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress, randomness
from ..kernels import clip_and_sum, squared_norms, weighted_sum
from ..kernels.clipping import scale as scale_of
from ..training import accuracy, constant
from .accounting import Accountant, noise_for

_MIXING = (nn.modules.batchnorm._BatchNorm,)


def per_example_gradients(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: Callable = F.cross_entropy
) -> dict[str, Tensor]:
    """The gradient of every example's own loss: for each trainable parameter a tensor (N, *its shape).

    The readable reference: differentiate the loss of one example, and map that over the batch (`torch.func`).

    Args:
        model: any module whose examples do not see each other; left as it was.
        x, y: images (N, ...) in [0, 1] and int64 labels (N,).
        loss: (logits (N, K), y (N,), reduction="sum") -> scalar.
    Raises: ValueError for batch normalisation, and bad input.
    Source: Abadi et al. 2016.
    Example: `per_example_gradients(model, x, y)`.
    """
    _check(model, x, y)
    names = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {k: v for k, v in (*model.named_parameters(), *model.named_buffers()) if k not in names}

    def one(params, image, label):
        z = torch.func.functional_call(model, params | rest, image[None])
        return loss(z, label[None], reduction="sum")

    return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0), randomness="different")(names, x, y)


def clipped_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    clip: float,
    *,
    loss: Callable = F.cross_entropy,
    method: str = "auto",
    batch_size: int = 256,
) -> tuple[dict[str, Tensor], Tensor]:
    """sum_i g_i min(1, clip / ||g_i||) over the batch, and the norms ||g_i|| (N,) before clipping.

    "books": one forward and one backward pass to the outputs of the layers; what enters a layer and the gradient at what
    leaves it are all that its gradients are made of. A linear layer's is a product b_i a_i^T of norm ||b_i|| ||a_i||, so
    it is never formed for one example; a convolution's is a small product. Needs every trainable parameter in a `Linear` or
    `Conv2d` that is called once. "vmap": `per_example_gradients`, for every other network. "auto": books where they apply.

    Args:
        model, x, y, loss: as for `per_example_gradients`.
        clip: C > 0; `math.inf` clips nothing.
        method: "auto", "books" or "vmap".
        batch_size: examples worked on at once, to stay in the caches.
    Returns:
        A dict parameter name -> clipped sum, and the norms.
    Source: Abadi et al. 2016; Goodfellow 2015, Li et al. 2022 for the norm from the layers' inputs and outputs.
    Example: `clipped_gradient(model, x, y, 1.0)`.
    """
    _check(model, x, y)
    if not (isinstance(clip, (int, float)) and clip > 0):
        raise ValueError(f"clip: got {clip}, want a number > 0")
    checks.choice(method, "method", ("auto", "books", "vmap"))
    checks.positive_int(batch_size, "batch_size")
    layers = _layers(model)
    if method == "books" and layers is None:
        raise ValueError("method: got 'books', but a trainable parameter lies outside Linear and Conv2d (or in two of "
                         "them), want method='vmap'")  # fmt: skip
    total, norms = {}, []
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        found = _books(model, layers, xs, ys, clip, loss) if layers is not None and method != "vmap" else None
        if found is None and method == "books":
            raise ValueError("method: got 'books', but a layer is called twice or never, or overwritten in place, want "
                             "method='vmap'")  # fmt: skip
        part, size = _vmap(model, xs, ys, clip, loss) if found is None else found
        total = {name: value + total[name] for name, value in part.items()} if total else part
        norms.append(size)
    return {name: total[name] for name, p in model.named_parameters() if p.requires_grad}, torch.cat(norms)


def _vmap(model, x: Tensor, y: Tensor, clip: float, loss: Callable) -> tuple[dict[str, Tensor], Tensor]:
    grads = per_example_gradients(model, x, y, loss=loss)
    sums, norms = clip_and_sum(list(grads.values()), clip)
    return dict(zip(grads, sums, strict=True)), norms


def _layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """The layers with trainable parameters, by name; None where the books do not apply."""
    layers, seen = {}, set()
    for name, layer in model.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        known = type(layer) is nn.Linear or (
            type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        )
        if not known or any(id(p) in seen for p in own):
            return None
        seen |= {id(p) for p in own}
        layers[name] = layer
    return layers


def _books(model, layers, x: Tensor, y: Tensor, clip: float, loss: Callable) -> tuple[dict[str, Tensor], Tensor] | None:
    """One pass: what enters each layer (a) and the gradient at what leaves it (b); then the norms; then the weighted sums.

    None where the books are not complete: a layer was called twice or never, or its input or output was overwritten.
    """
    entered, left, calls = {}, {}, []

    def note(name):
        def hook(layer, inputs, output):
            calls.append(name)
            entered[name], left[name] = (inputs[0].detach(), inputs[0]._version), (output, output._version)

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            value = loss(checks.logits(model(x), y), y, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    if sorted(calls) != sorted(layers) or any(t._version != was for t, was in (*entered.values(), *left.values())):
        return None
    backs = torch.autograd.grad(value, [output for output, _ in left.values()], allow_unused=True)
    if any(b is None or len(b) != len(x) for b in backs):
        return None

    with torch.no_grad():
        squares, weighted = x.new_zeros(len(x)), {}
        for (name, layer), (a, _), b in zip(layers.items(), entered.values(), backs, strict=True):
            dot = f"{name}." if name else ""
            if layer.bias is not None and layer.bias.requires_grad:
                of_bias = (
                    b.flatten(2).sum(2) if type(layer) is nn.Conv2d else b.flatten(1, -2).sum(1) if b.dim() > 2 else b
                )
                squares += of_bias.square().sum(1)
                weighted[dot + "bias"] = functools.partial(weighted_sum, of_bias)
            if layer.weight.requires_grad:
                size, weighted[dot + "weight"] = (_linear if type(layer) is nn.Linear else _convolution)(layer, a, b)
                squares += size
        norms = squares.sqrt()
        scale = scale_of(norms, clip)
        return {name: total(scale) for name, total in weighted.items()}, norms


def _linear(layer: nn.Linear, a: Tensor, b: Tensor) -> tuple[Tensor, Callable]:
    """||b_i a_i^T||^2 of each example, and the function scale -> sum_i scale_i b_i a_i^T."""
    if a.dim() > 2:
        grads = torch.bmm(b.flatten(1, -2).transpose(1, 2), a.flatten(1, -2))
        return squared_norms(grads), functools.partial(weighted_sum, grads)

    def total(scale: Tensor) -> Tensor:
        keep = scale > 0
        return (b[keep] * scale[keep, None]).T @ a[keep]

    return a.square().sum(1) * b.square().sum(1), total


def _convolution(layer: nn.Conv2d, a: Tensor, b: Tensor) -> tuple[Tensor, Callable]:
    """The same for a convolution: the gradient correlates what entered with b, one example at a time.

    With one input channel that is itself a convolution, with the examples as groups and stride and dilation swapped.
    Otherwise the windows are laid out (unfold) and multiplied with b, a few examples at a time, to stay in the cache.
    """
    a = F.pad(a, layer._reversed_padding_repeated_twice) if isinstance(layer.padding, str) else a
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    n, channels, (height, width) = len(a), layer.in_channels, layer.kernel_size
    if channels == 1 and a.device.type == "cpu":
        kernels = b.reshape(n * layer.out_channels, 1, *b.shape[2:])
        grads = F.conv2d(a.transpose(0, 1), kernels, None, layer.dilation, padding, layer.stride, groups=n)
        grads = grads[0, :, :height, :width].reshape(n, *layer.weight.shape)
    else:
        grads = a.new_empty(n, *layer.weight.shape)
        for i in range(0, n, few := 16 if a.device.type == "cpu" else 256):
            windows = F.unfold(a[i : i + few], layer.kernel_size, layer.dilation, padding, layer.stride)
            grads[i : i + few] = torch.bmm(b[i : i + few].flatten(2), windows.transpose(1, 2)).view(
                -1, *layer.weight.shape
            )
    return squared_norms(grads), functools.partial(weighted_sum, grads)


def _check(model, x: Tensor, y: Tensor) -> None:
    """Require images, labels, and a network in which an example's gradient is its own."""
    checks.labels(y, checks.images(x))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    for name, layer in model.named_modules():
        if isinstance(layer, _MIXING) or (
            isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats
        ):
            raise ValueError(f"model: got layer {name or type(layer).__name__!r} ({type(layer).__name__}), which mixes the "
                             "examples of a batch (or remembers them), so that no gradient is one example's alone; want "
                             "torch.nn.GroupNorm(groups, channels) in its place")  # fmt: skip
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: got no trainable parameters, want at least one with requires_grad")
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.device != x.device:
            raise ValueError(f"x: got device {x.device}, want {p.device}, where the model's {name} is")


def _check_alone(model, x: Tensor, y: Tensor, loss: Callable) -> None:
    """Require that an example's gradient is the same whether or not others stand beside it."""
    together = clipped_gradient(model, x, y, 1.0, loss=loss)[1]
    alone = [clipped_gradient(model, x[i : i + 1], y[i : i + 1], 1.0, loss=loss)[1] for i in range(len(x))]
    if not torch.allclose(together, torch.cat(alone), rtol=1e-2, atol=1e-6, equal_nan=True):
        raise ValueError("model: got gradients that change with the other examples of the batch, want a network that looks "
                         "at each example alone: one record could move all gradients")  # fmt: skip


# ---- training


@dataclass(frozen=True)
class PrivateRun:
    """A private training: what it cost, and how. `history` has a row an epoch: epoch, steps, validation, seconds."""

    history: pd.DataFrame
    eps: float
    delta: float
    noise: float
    clip: float
    q: float
    steps: int

    def __str__(self) -> str:
        how = f"{self.steps} steps at rate {self.q:.4f}, noise {self.noise:.3f}"
        return f"({self.eps:.3g}, {self.delta:.0e})-private: {how}"


def dp_sgd(
    model: nn.Module,
    data,
    *,
    eps: float | None = None,
    noise: float | None = None,
    clip: float,
    delta: float,
    batch_size: int = 256,
    epochs: int = 5,
    lr: float = 0.5,
    optimizer: Callable = torch.optim.SGD,
    schedule: Callable[[float], float] = constant,
    loss: Callable = F.cross_entropy,
    validation=None,
    seed: int | None = None,
) -> PrivateRun:
    """Train in place with DP-SGD; the returned eps holds for the whole sequence of parameters, not for the last alone.

    Nothing that depends on single records is shown or returned but the parameters: no training loss, no accuracy on the
    training data, no size of a batch. `validation` must be data that need no protection.

    Args:
        model: trained in place where its parameters are; its mode is put back. No batch normalisation.
        data: `.x` (n, ...) in [0, 1] and `.y` (n,). n is taken to be public; neighbours have one record more or less.
        eps, noise: exactly one of the budget (> 0), for which the least noise is found, and sigma (> 0), in units of clip.
        clip: C > 0, the largest norm of one example's gradient.
        delta: in (0, 1); well below 1 / n.
        batch_size: expected size of a batch: each example joins with probability q = batch_size / n, by its own coin.
        epochs: n / batch_size steps each.
        lr, optimizer, schedule: as for `training.fit`; any optimiser is post-processing of the noisy gradient.
        loss: (logits, y, reduction="sum") -> scalar.
        validation: public data whose accuracy is recorded after each epoch.
        seed: makes the run reproducible, noise included: whoever knows it can take the noise off. For tests and teaching.
    Raises:
        ValueError, TypeError: bad input, eps <= 0, delta outside (0, 1), batch normalisation (with advice).
    Source: Abadi et al. 2016; Poisson sampling and its account: Mironov, Talwar & Zhang 2019.
    Example: `dp_sgd(model, data, noise=1.0, clip=1.0, delta=1e-3, batch_size=4, epochs=1, seed=0)`.
    """
    device = next(model.parameters()).device
    _check(model, data.x[:1].to(device), data.y[:1].to(device))
    checks.labels(data.y, checks.images(data.x, "data.x"), "data.y")
    n = len(data.x)
    if (eps is None) == (noise is None):
        raise ValueError(f"eps, noise: got {eps} and {noise}, want exactly one of them")
    checks.positive(noise if eps is None else eps, "noise" if eps is None else "eps")
    checks.positive(clip, "clip")
    checks.probability(delta, "delta")
    checks.positive_int(epochs, "epochs")
    checks.nonnegative(lr, "lr")
    if checks.positive_int(batch_size, "batch_size") > n:
        raise ValueError(f"batch_size: got {batch_size}, want at most {n}, the number of examples")
    q, per_epoch = batch_size / n, max(1, round(n / batch_size))
    steps = epochs * per_epoch
    noise = noise_for(eps, delta, q=q, steps=steps) if noise is None else float(noise)

    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = optimizer(list(params.values()), lr=lr)
    rows, mode = [], model.training
    began = time.perf_counter()
    with (
        randomness.seeded(seed, device),
        progress.bar(total=steps, desc="DP-SGD", unit="step") as bar,
    ):
        try:
            _check_alone(model.eval(), data.x[:3].to(device), data.y[:3].to(device), loss)
            model.train()
            for step in range(steps):
                index = (torch.rand(n, dtype=torch.float64) < q).nonzero().squeeze(1)
                sums = {name: torch.zeros_like(p) for name, p in params.items()}
                if len(index):
                    x, y = data.x[index].to(device), data.y[index].to(device)
                    sums = clipped_gradient(model, x, y, clip, loss=loss)[0]
                for name, p in params.items():
                    p.grad = (sums[name] + noise * clip * torch.randn_like(p)) / batch_size
                for group in optimiser.param_groups:
                    group["lr"] = lr * schedule(step / steps)
                optimiser.step()
                bar.update()
                if (step + 1) % per_epoch == 0:
                    row = {"epoch": (step + 1) // per_epoch, "steps": step + 1}
                    if validation is not None:
                        model.eval()
                        row["validation"] = accuracy(model, validation.x, validation.y)
                        model.train()
                    rows.append(row | {"seconds": time.perf_counter() - began})
        finally:
            model.train(mode)
            optimiser.zero_grad(set_to_none=True)
    spent = Accountant().add(sigma=noise, q=q, steps=steps).eps(delta)
    return PrivateRun(pd.DataFrame(rows), spent, delta, noise, clip, q, steps)
