"""The training loop: mini-batches, a schedule, honest history, weight averaging, and checkpoints to go on from."""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checks, progress, randomness
from ..kernels import graphs
from ..kernels.dispatch import on
from ..layout import keep_pages
from .losses import cross_entropy


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


def triangle(done: float) -> float:
    """Learning-rate factor that rises from 0 to 1 over the first 30 % of training and falls back to 0 (Smith 2017)."""
    return done / 0.3 if done < 0.3 else (1 - done) / 0.7


def constant(done: float) -> float:
    """Learning-rate factor 1 throughout."""
    return 1.0


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
    average: float | None = None,
    validation=None,
    watch: Mapping[str, Callable[[nn.Module], float]] | None = None,
    keep: str | None = None,
    checkpoint: str | Path | None = None,
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
        average: decay in [0, 1) of an exponential moving average of the weights, avg <- average avg + (1 - average) theta
            after each step. Validation and `watch` see the average, and at the end it becomes the model. None: no averaging.
        validation: data whose accuracy is recorded after each epoch.
        watch: name -> function of the model, recorded after each epoch, e.g. accuracy under an attack. The model comes in
            evaluation mode; random numbers that the function draws from torch's generator do not disturb the run.
        keep: the column ("validation", or a name of `watch`) whose best epoch is put back at the end: early stopping.
        checkpoint: a file, written after each epoch, complete or not at all. If it is there at the start, training goes on
            from it and ends with the very weights and history (but for the seconds) of a run that was never stopped.
        seed: makes the run reproducible (order, augmentation, random starts) and leaves torch's generator as it was.
    Returns:
        The history, one row an epoch: epoch, loss, accuracy (running, on what the loss saw), validation, those of `watch`,
        seconds.
    Raises:
        TypeError, ValueError: bad input; a checkpoint that is damaged or of another run.
        FloatingPointError: the loss is no longer finite; says in which epoch and step. The model keeps the weights before it.
    Source: for `average`, Polyak & Juditsky 1992 and Izmailov et al. 2018; for `keep`, Rice, Wong & Kolter 2020.
    Example: `fit(small_cnn((1, 8, 8), seed=0), load("digits", "train"), epochs=1, seed=0)`.
    """
    device = next(model.parameters()).device
    checks.labels(data.y, checks.images(data.x, "data.x"), "data.y")
    checks.positive_int(epochs, "epochs")
    checks.positive_int(batch_size, "batch_size")
    checks.nonnegative(lr, "lr")
    if average is not None and checks.nonnegative(average, "average") >= 1:
        raise ValueError(f"average: got {average}, want a decay in [0, 1), or None")
    if keep is not None:
        checks.choice(keep, "keep", [*(["validation"] if validation is not None else []), *(watch or {})])
    keep_pages()
    schedule = triangle if schedule is None else schedule
    told = "progress" in inspect.signature(loss).parameters
    per_epoch = math.ceil(len(data.x) / batch_size)
    mode = model.training
    optimiser = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    averaged = average if average is None else AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(average), use_buffers=True)  # fmt: skip
    deployed = model if averaged is None else averaged.module
    rows, best, devices = [], {}, [device] if device.type == "cuda" else []
    with (
        randomness.seeded(seed, device),
        progress.bar(total=epochs * per_epoch, unit="step") as bar,
    ):
        if checkpoint is not None:
            settings = dict(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, average=average, keep=keep,
                            images=[*data.x.shape], content=_checksum(data.x, data.y), optimizer=_describe(optimizer),
                            loss=_describe(loss), schedule=_describe(schedule), augment=_describe(augment),
                            watch=_describe(watch), validation=_describe(validation),
                            weights={k: [*v.shape] for k, v in model.state_dict().items()})  # fmt: skip
            rows, best = _resume(Path(checkpoint), settings, model, optimiser, averaged, device)
            bar.update(len(rows) * per_epoch)
        try:
            for epoch in range(len(rows), epochs):
                model.train()
                began, total, right, seen = time.perf_counter(), 0.0, 0, 0
                for number, index in enumerate(torch.randperm(len(data.x)).split(batch_size)):
                    x, y = data.x[index].to(device), data.y[index].to(device)
                    done = (epoch + number / per_epoch) / epochs
                    for group in optimiser.param_groups:
                        group["lr"] = lr * schedule(done)
                    x = x if augment is None else augment(x)
                    value, z = _slopes(model, loss, x, y, {"progress": done} if told else {}, optimiser)
                    if not math.isfinite(value):
                        raise FloatingPointError(f"loss: got {value} in epoch {epoch + 1} of {epochs}, step "
                                                 f"{number + 1} of {per_epoch}; lower lr = {lr}?")  # fmt: skip
                    optimiser.step()
                    if averaged is not None:
                        averaged.update_parameters(model)
                    total, seen = total + value * len(x), seen + len(x)
                    right += int((z.argmax(1) == y).sum()) if z is not None else 0
                    shown = {"loss": f"{total / seen:.3f}", "accuracy": f"{right / seen:.3f}" if z is not None else "-"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                row = {
                    "epoch": epoch + 1,
                    "loss": total / seen,
                    "accuracy": right / seen if z is not None else float("nan"),
                }
                deployed.eval()
                with torch.random.fork_rng(devices):
                    if validation is not None:
                        row["validation"] = accuracy(deployed, validation.x, validation.y)
                    row |= {name: float(measure(deployed)) for name, measure in (watch or {}).items()}
                rows.append(row | {"seconds": time.perf_counter() - began})
                if keep is not None and row[keep] > best.get("value", -math.inf):
                    best = {"value": row[keep], "weights": copy.deepcopy(deployed.state_dict())}
                if checkpoint is not None:
                    _save(Path(checkpoint), settings, rows, best, model, optimiser, averaged, device)
            if best or averaged is not None:
                model.load_state_dict(best["weights"] if best else deployed.state_dict())
        finally:
            model.train(mode)
            optimiser.zero_grad(set_to_none=True)
    return pd.DataFrame(rows)


def _slopes(model, loss: Callable, x: Tensor, y: Tensor, progress: dict, optimiser) -> tuple[float, Tensor | None]:
    """The loss and the logits of a batch; sets every `p.grad`. On a GPU a small network's pass is played back."""
    points = getattr(loss, "points", None)
    if points is not None and graphs.trainable(model, x):
        x = points(model, x, y, **progress)
        with on(x):
            play = graphs.descent(model, x, y)
            if play is not None:
                value, z = play(x, y)
                return value.item(), z
        value, z = cross_entropy(model, x, y)
    else:
        value = loss(model, x, y, **progress)
        value, z = value if isinstance(value, tuple) else (value, None)
    number = value.item()
    if math.isfinite(number):
        optimiser.zero_grad(set_to_none=True)  # not earlier: an attack's own `backward` reaches the weights, too
        value.backward()
    return number, z


def _save(path: Path, settings, rows, best, model, optimiser, averaged, device) -> None:
    """Write everything that the rest of the run depends on; the file appears complete or not at all."""
    state = dict(
        settings=settings, rows=rows, best=best, model=model.state_dict(), optimiser=optimiser.state_dict(),
        averaged=None if averaged is None else averaged.state_dict(), generator=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    )  # fmt: skip
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _resume(path: Path, settings, model, optimiser, averaged, device) -> tuple[list[dict], dict]:
    """Put back what `_save` wrote; (rows, best), empty where there is no file. Changes nothing before all is checked."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return [], {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as cause:  # torch raises a dozen unrelated types for a damaged file
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint of `fit`; delete it to train from the start "
                         f"({cause})".replace("\n", " ")[:400]) from cause  # fmt: skip
    for name, wanted in settings.items():
        if saved.get(name) != wanted:
            got = "weights of other shapes" if name == "weights" else f"{name} = {saved.get(name)!r}, not {wanted!r}"
            raise ValueError(f"checkpoint: {path} is of another run, with {got}; "
                             "name another file, or delete this one to train from the start")  # fmt: skip
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    if averaged is not None:
        averaged.load_state_dict(state["averaged"])
    torch.set_rng_state(state["generator"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    return state["rows"], state["best"]


def _checksum(*tensors: Tensor) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), total)
    return total


def _describe(item) -> str:
    """What tells one setting from another, the same in another process: names and values, no addresses."""
    if isinstance(item, types.FunctionType):
        plain = [c for c in item.__code__.co_consts if not isinstance(c, types.CodeType)]
        code = zlib.crc32(item.__code__.co_code + repr(plain).encode())
        return f"{item.__qualname__}:{code:08x}({_describe(dict(inspect.getclosurevars(item).nonlocals))})"
    if isinstance(item, Mapping):
        return ", ".join(f"{k}={_describe(v)}" for k, v in item.items())
    if isinstance(item, (list, tuple)):
        return "[" + ", ".join(map(_describe, item)) + "]"
    if isinstance(item, nn.Module):
        return f"{type(item).__name__}:{_checksum(*item.state_dict().values()):08x}"
    if isinstance(item, Tensor):
        return f"Tensor{[*item.shape]}:{_checksum(item):08x}"
    if hasattr(item, "func") and hasattr(item, "args") and hasattr(item, "keywords"):
        return f"{_describe(item.func)}({_describe(item.args)}, {_describe(item.keywords)})"
    if hasattr(item, "x") and hasattr(item, "y"):
        return f"data:{_checksum(item.x, item.y):08x}"
    plain = getattr(item, "__qualname__", None) or repr(item)
    return type(item).__qualname__ if " at 0x" in plain else plain


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
