"""Gradient leakage: the image, from the gradient that a participant of federated learning shares in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress, randomness
from .dp_sgd import _check, _layers


def leaky_lenet(shape=(1, 28, 28), classes: int = 10, *, seed: int | None = None) -> nn.Sequential:
    """The network of the DLG paper: three 5x5 convolutions, sigmoids, a linear layer; weights U(-1/2, 1/2).

    Sigmoids, since the attack differentiates the gradient once more, and where a ReLU is flat nothing is left of it.

    Args: shape (C, H, W), classes, seed: as for `models.linear`.
    Source: Zhu, Liu & Han 2019.
    Example: `leaky_lenet()(x).shape` is (8, 10).
    """
    channels, height, width = shape
    inner = 12 * -(-height // 4) * -(-width // 4)
    body = [nn.Conv2d(channels, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 1, 2)]
    layers = [part for layer in body for part in (layer, nn.Sigmoid())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner, classes))
    generator = randomness.generator(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return net.eval()


@dataclass(frozen=True, eq=False)
class Leak:
    """What came out of T gradients of n images each.

    Args:
        x: images (T n, C, H, W) in [0, 1], those of the first gradient first. y: their labels (T n,).
        distance: (T,), how far the gradients of these are from those that were shared: what the attack minimised.
    Example: `gradient_leakage(model, shared_gradient(model, x[:1], y[:1]), shape=(1, 28, 28), steps=2, seed=0).y`.
    """

    x: Tensor
    y: Tensor
    distance: Tensor


def shared_gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a participant sends: the gradient of the mean loss over its images, name -> (1, *shape of the parameter).

    For the gradient of each image by itself, (N, *shape), take `per_example_gradients`.

    Example: `shared_gradient(model, x, y)["1.bias"].shape` is (1, 10).
    """
    _check(model, x, y)
    names, parameters = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad), strict=True)
    with torch.enable_grad():
        found = torch.autograd.grad(F.cross_entropy(checks.logits(model(x), y), y), parameters)
    return {name: g[None] for name, g in zip(names, found, strict=True)}


def linear_leak(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The input of a linear layer from its gradients, exactly: x = (dl/dW_i) / (dl/db_i), for every unit i.

    dl/dW_i = (dl/da_i) x and dl/db_i = dl/da_i, with a = W x + b. Over a batch both are sums, and the quotient is a mean of
    the images weighted by dl/da_i: still one image alone for each unit that was active for one image alone.

    Args:
        weight: gradient (H, d) of the weights; bias: (H,) of the bias.
    Returns: the quotients (U, d) of the units that have one, and their numbers (U,); the largest |dl/db_i| first.
    Raises: ValueError: shapes that do not fit.
    Source: Phong et al. 2018; Geiping et al. 2020, proposition 3.1.
    Example: `linear_leak(torch.tensor([[2.0, 4.0]]), torch.tensor([2.0]))[0]` is [[1, 2]].
    """
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(f"weight, bias: got {tuple(weight.shape)} and {tuple(bias.shape)}, want (H, d) and (H,)")
    order = bias.abs().argsort(descending=True)
    order = order[bias[order] != 0]
    return weight[order] / bias[order, None], order


def leaked_label(model: nn.Module, gradients: Mapping[str, Tensor]) -> Tensor:
    """The label from the gradient of one image: the only output whose bias has a negative derivative, p_k - 1[k = y].

    Without a bias, from the sums of the rows of the last weights: their sign is the same behind ReLUs or sigmoids.

    Args: model: whose last layer is linear; gradients: name -> (T, *shape), of one image each.
    Returns: labels (T,).
    Raises: ValueError for another last layer.
    Source: Zhao, Mopuri & Bilen 2020 (iDLG).
    Example: `leaked_label(model, shared_gradient(model, x[:1], y[:1])) == y[:1]`.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if not list(layer.children())]
    name, last = layers[-1]
    dot = f"{name}." if name else ""
    if not isinstance(last, nn.Linear) or dot + "weight" not in gradients:
        raise ValueError(
            f"model: got {type(last).__name__} as the last layer, want Linear with its gradient; or give labels"
        )
    if dot + "bias" in gradients:
        return gradients[dot + "bias"].argmin(1)
    return gradients[dot + "weight"].sum(2).argmin(1)


def gradient_leakage(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    *,
    shape,
    n: int = 1,
    method: str = "dlg",
    labels: Tensor | None = None,
    steps: int = 300,
    tries: int = 1,
    tv: float = 1e-4,
    lr: float = 0.1,
    seed: int | None = None,
) -> Leak:
    """Search images whose gradient is the one that was shared; all gradients and all tries at once.

    - "dlg": min over x', y' of ||grad l(x', softmax y') - g||^2 by L-BFGS, from noise (Zhu, Liu & Han 2019).
    - "idlg": the label is read from the gradient, and only x' searched (Zhao et al. 2020). For single images.
    - "cosine": min over x' in [0, 1] of 1 - cos(grad l(x', y), g) + tv TV(x'), by Adam on the signs of the slope (Geiping et
      al. 2020), for trained networks, whose gradients are small, and for noisy ones.

    The gradient of the gradient is formed from what enters each layer and the derivative at what leaves it, in float64 for
    the first two. Networks of other layers than `Linear` and `Conv2d` go through `torch.func`.

    Args:
        model: the network whose gradient it is; without batch normalisation.
        gradients: name -> (T, *shape of the parameter), from `shared_gradient` or `per_example_gradients`, or tampered with.
        shape: (C, H, W) of an image. n: images that each of the T gradients is the mean of (>= 1).
        method: see above. labels: known ones (T n,); without them "cosine" reads them like "idlg", which needs n = 1.
        steps: of the search (>= 1). tries: random starts for each gradient; the nearest gradient counts.
        tv, lr: weight of the total variation (mean absolute difference of neighbours) and step, for "cosine".
        seed: of the starts; torch's own generator without.
    Returns: `Leak`, in the dtype of the gradients.
    Raises: TypeError, ValueError: bad input.
    Example: `gradient_leakage(model, shared_gradient(model, x[:1], y[:1]), shape=(1, 28, 28), steps=2, seed=0).x.shape`.
    """
    checks.choice(method, "method", ("dlg", "idlg", "cosine"))
    for name, value in (("n", n), ("steps", steps), ("tries", tries)):
        checks.positive_int(value, name)
    checks.nonnegative(tv, "tv")
    checks.positive(lr, "lr")
    victims, dtype, device = _check_gradients(model, gradients)
    generator = randomness.generator(seed)
    start = torch.randn(victims * tries * n, *shape, generator=generator, dtype=torch.float64).to(device)
    work = dtype if method == "cosine" else torch.float64
    _check(model, torch.zeros(1, *shape, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    model = copy.deepcopy(model).to(work).eval()
    with torch.no_grad():
        classes = model(start[:1].to(work)).shape[1]
    if labels is None and method != "dlg":
        if n > 1:
            raise ValueError(f"labels: got None with n = {n} images a gradient, want labels ({victims * n},): the sign of "
                             "the gradient tells the label of a single image only")  # fmt: skip
        labels = leaked_label(model, gradients)
    if labels is not None:
        checks.labels(labels, start[: victims * n], "labels")
        if labels.max() >= classes:
            raise ValueError(f"labels: got {labels.max().item()}, want labels in [0, {classes - 1}]")
        labels = labels.view(victims, n).repeat_interleave(tries, 0).flatten()
    g = [gradients[name].to(work).repeat_interleave(tries, 0).flatten(1) for name, _ in _trainable(model)]
    gradient_of = _gradient(model, victims * tries, n)
    if method == "cosine":
        x, distance = _cosine(
            gradient_of, g, start.to(work).sigmoid(), F.one_hot(labels, classes).to(work), steps, lr, tv
        )
        y = labels
    else:
        soft = None if labels is None else F.one_hot(labels, classes).to(work)
        guess = torch.randn(len(start), classes, generator=generator, dtype=torch.float64).to(device)
        x, y, distance = _dlg(gradient_of, g, start, guess, soft, steps)
    best = distance.view(victims, tries).argmin(1) + tries * torch.arange(victims, device=device)
    x = x.view(victims * tries, n, *shape)[best].flatten(0, 1)
    return Leak(x.clamp(0, 1).to(dtype), y.view(-1, n)[best].flatten(), distance[best])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _check_gradients(model, gradients) -> tuple[int, torch.dtype, torch.device]:
    """Require one finite tensor (T, *shape) for each trainable parameter; T, their dtype and device."""
    if not isinstance(model, nn.Module) or not isinstance(gradients, Mapping):
        raise TypeError(f"model, gradients: got {type(model).__name__} and {type(gradients).__name__}, want torch.nn.Module "
                        "and a dict name -> (T, *shape of the parameter)")  # fmt: skip
    parts = _trainable(model)
    if missing := [name for name, _ in parts if name not in gradients]:
        raise ValueError(f"gradients: none for {', '.join(missing)}, want one for each trainable parameter")
    if not parts:
        raise ValueError("model: got no trainable parameters, want at least one with requires_grad")
    first = gradients[parts[0][0]]
    victims = len(first)
    for name, p in parts:
        g = gradients[name]
        if g.shape != (victims, *p.shape):
            raise ValueError(f"gradients[{name!r}]: got shape {tuple(g.shape)}, want {(victims, *p.shape)}")
        if not torch.isfinite(g).all():
            raise ValueError(f"gradients[{name!r}]: got NaN or infinite values, want finite ones")
    return victims, first.dtype, first.device


def _gradient(model: nn.Module, groups: int, n: int) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """A function (x (G n, ...), soft labels (G n, K)) -> the gradients of G mean losses, one (G, d) a parameter.

    It can be differentiated. What enters a layer (a) and the derivative at what leaves it (b) make its gradient: b a^T.
    """
    layers, names = _layers(model), [name for name, _ in _trainable(model)]
    if layers is None:
        return _gradient_by_vmap(model, groups, n)

    def together(t: Tensor) -> Tensor:
        """(G n, c, places) -> (G, c, n places)."""
        return t.view(groups, n, *t.shape[1:]).transpose(1, 2).flatten(2)

    def gradient(x: Tensor, soft: Tensor) -> list[Tensor]:
        entered, left = {}, {}

        def note(name):
            def hook(layer, inputs, output):
                entered[name], left[name] = inputs[0], output

            return hook

        handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
        try:
            loss = -(soft * model(x).log_softmax(1)).sum() / n
        finally:
            for handle in handles:
                handle.remove()
        backs = torch.autograd.grad(loss, [*left.values()], create_graph=True)
        found = {}
        for (name, a), b in zip(entered.items(), backs, strict=True):
            layer, dot = layers[name], f"{name}." if name else ""
            a, b = (
                (_windows(layer, a), b.flatten(2)) if isinstance(layer, nn.Conv2d) else (a[:, :, None], b[:, :, None])
            )
            a, b = together(a), together(b)
            found[dot + "weight"] = torch.bmm(b, a.transpose(1, 2)).flatten(1)
            found[dot + "bias"] = b.sum(2)
        return [found[name] for name in names]

    return gradient


def _windows(layer: nn.Conv2d, a: Tensor) -> Tensor:
    if isinstance(layer.padding, str):
        return F.unfold(
            F.pad(a, layer._reversed_padding_repeated_twice), layer.kernel_size, layer.dilation, 0, layer.stride
        )
    return F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)


def _gradient_by_vmap(model: nn.Module, groups: int, n: int) -> Callable[[Tensor, Tensor], list[Tensor]]:
    parameters = {name: p.detach() for name, p in _trainable(model)}
    rest = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers()) if k not in parameters}

    def loss(parameters, x, soft):
        return -(soft * torch.func.functional_call(model, parameters | rest, (x,)).log_softmax(1)).sum() / n

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def gradient(x: Tensor, soft: Tensor) -> list[Tensor]:
        found = each(parameters, x.unflatten(0, (groups, n)), soft.unflatten(0, (groups, n)))
        return [found[name].flatten(1) for name in parameters]

    return gradient


def _dlg(gradient_of, g: list[Tensor], start: Tensor, guess: Tensor, soft, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS on the squared distance, over the pixels and, where the labels are not known, over their logits."""
    groups, pixels = len(g[0]), start[0].numel() * (len(start) // len(g[0]))

    def objective(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            x = v[:, :pixels].reshape(start.shape)
            labels = v[:, pixels:].reshape(guess.shape).softmax(1) if soft is None else soft
            distance = sum((a - b).square().sum(1) for a, b in zip(gradient_of(x, labels), g, strict=True))
            return distance.detach(), torch.autograd.grad(distance.sum(), v)[0]

    v = start.reshape(groups, -1)
    v = v if soft is not None else torch.cat([v, guess.reshape(groups, -1)], 1)
    v, distance = lbfgs(objective, v, steps)
    labels = (v[:, pixels:].reshape(guess.shape) if soft is None else soft).argmax(1)
    return v[:, :pixels].reshape(start.shape), labels, distance


def _cosine(gradient_of, g, x: Tensor, soft: Tensor, steps: int, lr: float, tv: float) -> tuple[Tensor, Tensor]:
    """Adam on the signs of the slope, steps shrinking tenfold at 3/8, 5/8 and 7/8 of the way; pixels stay in [0, 1]."""
    groups, x = len(g[0]), x.clone().requires_grad_()
    norm = sum(b.square().sum(1) for b in g).sqrt()
    optimiser = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [round(steps * k / 8) for k in (3, 5, 7)], 0.1)
    best, least = x.detach().clone(), torch.full((groups,), torch.inf, dtype=x.dtype, device=x.device)
    with torch.enable_grad(), progress.bar(total=steps, desc="gradient leakage", unit="step") as bar:
        for step in range(steps + 1):
            found = gradient_of(x, soft)
            dot = sum((a * b).sum(1) for a, b in zip(found, g, strict=True))
            length = sum(a.square().sum(1) for a in found).clamp_min(1e-30).sqrt()
            variation = (x.diff(dim=-1).abs().flatten(1).mean(1) + x.diff(dim=-2).abs().flatten(1).mean(1)).view(
                groups, -1
            )
            value = 1 - dot / (length * norm).clamp_min(1e-30) + tv * variation.mean(1)
            better = value.detach() < least
            least = least.where(~better, value.detach())
            rows = better.repeat_interleave(len(x) // groups)
            best[rows] = x.detach()[rows]
            if step == steps:
                break
            x.grad = torch.autograd.grad(value.sum(), x)[0].sign()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(0, 1)
            bar.update()
    return best, least


def lbfgs(objective: Callable, v: Tensor, steps: int, *, memory: int = 100) -> tuple[Tensor, Tensor]:
    """Minimise G functions at once: each row by its own L-BFGS with a line search of its own (Armijo, factor 0.3).

    Args:
        objective: v (G, d) -> values (G,) and slopes (G, d), row by row.
        v: where to start. steps: iterations; memory: pairs of steps and slopes that the curvature is learned from.
    Returns: the last points, never worse than the first, and their values.
    Source: Nocedal 1980.
    Example: `lbfgs(lambda v: ((v - 1).square().sum(1), 2 * (v - 1)), torch.zeros(2, 3), 5)[0]` is all ones.
    """
    value, slope = objective(v)
    moves, turns, inverse = [], [], []
    scale = (1 / slope.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
    for _ in progress.bar(range(steps), desc="gradient leakage", unit="step"):
        direction, weights = slope.clone(), []
        for s, t, r in zip(reversed(moves), reversed(turns), reversed(inverse), strict=True):
            weights.append(r * (s * direction).sum(1))
            direction -= weights[-1][:, None] * t
        direction *= scale[:, None]
        for s, t, r in zip(moves, turns, inverse, strict=True):
            direction += (weights.pop() - r * (t * direction).sum(1))[:, None] * s
        descent = (direction * slope).sum(1)
        direction = direction.where((descent > 0)[:, None], slope * scale[:, None])
        descent = (direction * slope).sum(1)

        new, reached, turned = v.clone(), value.clone(), slope.clone()
        length, waiting = torch.ones_like(value), descent > 0
        for _ in range(20):
            if not waiting.any():
                break
            trial = v - length[:, None] * direction
            found, its_slope = objective(trial)
            ok = waiting & (found <= value - 1e-4 * length * descent)
            new[ok], reached[ok], turned[ok] = trial[ok], found[ok], its_slope[ok]
            waiting, length = waiting & ~ok, length * 0.3
        s, t = new - v, turned - slope
        product, square = (s * t).sum(1), t.square().sum(1)
        good = product > 1e-12 * square
        moves.append(s.where(good[:, None], 0))
        turns.append(t.where(good[:, None], 0))
        inverse.append((1 / product).where(good, 0))
        if len(moves) > memory:
            del moves[0], turns[0], inverse[0]
        scale = (product / square).where(good, scale)
        moved = bool((new != v).any())
        v, value, slope = new, reached, turned
        if not moved:
            break
    return v, value
