"""Layer-wise relevance propagation: a logit is shared out, layer by layer, until it reaches the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import checks
from ..layout import images_at_once
from ..models import Normalize
from .common import selected, targets

RULES = ("epsilon", "gamma", "zplus", "alphabeta", "composite")
_WEIGHTED = (nn.Linear, nn.Conv2d)
_AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_CARRIERS = (nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, Normalize)  # relevance goes through unchanged


@dataclass(frozen=True)
class LayerRelevance:
    """What arrived at the input of the layer `name`, and what this layer's bias and epsilon kept, `absorbed` (N,).

    Conservation: relevance.sum() + absorbed = the relevance at the layer's output, image by image.
    """

    name: str
    relevance: Tensor
    absorbed: Tensor


def lrp(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    rule: str = "epsilon",
    eps: float = 1e-6,
    gamma: float = 0.25,
    alpha: float = 2.0,
    beta: float = 1.0,
    batch_size: int | None = None,
) -> Tensor:
    """Layer-wise relevance propagation: R_j = sum_k c_jk / (sum_j c_jk + c_k) R_k from the logit z_c down to the pixels.

    c_jk is what unit j contributes to unit k, a_j w_jk in its simplest form, and c_k what the bias b_k does. The rules:
        epsilon:    c_jk = a_j w_jk, and eps * sign(sum) is added to the sum.
        gamma:      a_j (w_jk + gamma max(w_jk, 0)), the bias likewise; for layers whose inputs are >= 0.
        zplus:      max(a_j w_jk, 0), the bias likewise.
        alphabeta:  alpha times the share in the positive contributions minus beta times that in the negative ones.
        composite:  epsilon in linear layers, gamma in convolutions, and in the first of all the box rule
                    c_jk = x_j w_jk - l max(w_jk, 0) - h min(w_jk, 0), where [l, h] are the values that a pixel can have.
    Bias rule: a bias takes its share of the relevance and keeps it (except in the box rule, where it takes none), so that
    without biases and with eps = 0 the pixels' relevances add up to z_c. `lrp_layers` says what each layer kept.
    A maximum passes all relevance to its winner, a mean shares it by a_j, ReLU, `Normalize` and `Flatten` pass it unchanged;
    batch normalisation is folded into the layer before it.

    Args:
        model: `nn.Sequential` (nested ones too) of Linear, Conv2d, ReLU, max and average pooling, Flatten, Normalize,
            BatchNorm, Dropout and Identity; in evaluation mode. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1].
        target: the class c to explain: int64 (N,), one number for all images, or None for the predicted classes.
        rule, eps (>= 0), gamma (>= 0), alpha, beta (>= 0, alpha - beta = 1): as above.
        batch_size: images worked on at once; the default suits the caches of a CPU (32) or a GPU (1,000).
    Returns: signed, shape, dtype and device of x.
    Raises: TypeError, ValueError: bad input, a layer without a rule; the message names it and says what to do instead.
    Source: Bach et al. 2015; Montavon et al. 2019 (gamma, box, composite).
    Example: `lrp(model, x, rule="composite")`.
    """
    target = targets(model, x, target)
    layers = _prepared(model, x, rule, eps, gamma, alpha, beta)
    on_cpu = x.device.type == "cpu"
    if on_cpu and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # in which a CPU's convolutions are fastest
    size = 32 if batch_size is None and on_cpu else images_at_once(x, batch_size)
    count = math.ceil(len(x) / size)
    with torch.enable_grad():
        parts = zip(x.tensor_split(count), target.tensor_split(count), strict=True)
        return torch.cat([list(_sweep(layers, a, t))[-1][1] for a, t in parts]).contiguous()


def lrp_layers(model, x: Tensor, target: Tensor | int | None = None, *, rule: str = "epsilon", eps: float = 1e-6,
               gamma: float = 0.25, alpha: float = 2.0, beta: float = 1.0) -> list[LayerRelevance]:  # fmt: skip
    """The relevance at the input of every layer, first layer first, and what each layer kept; arguments as for `lrp`.

    The last entry is the output itself, the logit z_c at its place. For each layer i and image
    `r[i].relevance.flatten(1).sum(1) + r[i].absorbed` is `r[i + 1].relevance.flatten(1).sum(1)`.

    Example: `lrp_layers(model, x)[0].relevance` is `lrp(model, x)`.
    """
    target = targets(model, x, target)
    swept = _sweep(_prepared(model, x, rule, eps, gamma, alpha, beta), x, target)
    with torch.enable_grad():
        return [LayerRelevance(name, R, kept()) for name, R, kept in swept][::-1]


def _prepared(model, x, rule, eps, gamma, alpha, beta) -> list:
    """[(name, layer, spread)]: the layers in order, batch norm folded away, each with the function that shares out."""
    checks.choice(rule, "rule", RULES)
    eps, gamma = checks.nonnegative(eps, "eps"), checks.nonnegative(gamma, "gamma")
    alpha, beta = checks.nonnegative(alpha, "alpha"), checks.nonnegative(beta, "beta")
    if not math.isclose(alpha - beta, 1):
        raise ValueError(
            f"alpha, beta: got {alpha:g} and {beta:g}, want alpha - beta = 1, or relevance would be made or lost"
        )
    rules = {
        "epsilon": lambda *a: _epsilon(*a, eps=eps),
        "gamma": lambda *a: _gamma(*a, gamma=gamma, eps=eps),
        "zplus": lambda *a: _alphabeta(*a, alpha=1.0, beta=0.0, eps=eps),
        "alphabeta": lambda *a: _alphabeta(*a, alpha=alpha, beta=beta, eps=eps),
    }
    layers = _folded(model)
    first = next((i for i, (_, layer) in enumerate(layers) if isinstance(layer, _WEIGHTED)), None)
    out, low, high = [], x.new_zeros(1), x.new_ones(1)
    for i, (name, layer) in enumerate(layers):
        if isinstance(layer, Normalize) and (first is None or i < first):
            low, high = layer(low.view(1, 1, 1, 1)), layer(high.view(1, 1, 1, 1))
        if isinstance(layer, _CARRIERS):
            spread = _unchanged
        elif isinstance(layer, nn.MaxPool2d):
            spread = _winners
        elif isinstance(layer, _AVERAGES):
            spread = lambda *a: _epsilon(*a, eps=0.0)  # noqa: E731
        elif rule != "composite":
            spread = rules[rule]
        elif i == first:
            spread = lambda *a, low=low, high=high: _box(*a, low=low, high=high, eps=eps)  # noqa: E731
        else:
            spread = rules["epsilon" if isinstance(layer, nn.Linear) else "gamma"]
        out.append((name, layer, spread))
    return out


def _folded(model) -> list[tuple[str, nn.Module]]:
    """The names and layers of a network in the order in which they run; batch norm is folded into the layer before it."""
    advice = ("LRP has rules for nn.Sequential of Linear, Conv2d, ReLU, pooling, Flatten, Normalize, BatchNorm and Dropout; "
              "integrated_gradients explains any differentiable network")  # fmt: skip
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"model: got {type(model).__name__}, want an nn.Sequential, whose layers run in their order. {advice}"
        )
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Sequential):
            continue
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_mean is not None:
            if not layers or not isinstance(layers[-1][1], _WEIGHTED):
                raise ValueError(f"model: got layer {name!r} ({type(layer).__name__}) after no Linear or Conv2d, want one "
                                 f"right before it, into which it is folded. {advice}")  # fmt: skip
            layers[-1] = (layers[-1][0], _fold(layers[-1][1], layer))
        elif isinstance(layer, (*_WEIGHTED, *_AVERAGES, *_CARRIERS, nn.MaxPool2d)):
            layers.append((name, layer))
        else:
            raise ValueError(
                f"model: got layer {name!r} ({type(layer).__name__}), for which LRP has no rule here. {advice}"
            )
    return layers


def _fold(layer, norm) -> nn.Module:
    """The layer whose output is that of the batch norm after `layer`: weights times g, bias b g + beta - mean g."""
    g = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
    bias = -norm.running_mean if layer.bias is None else layer.bias.detach() - norm.running_mean
    options = dict(bias=True, device=layer.weight.device, dtype=layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        new = torch.nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    else:
        new = torch.nn.utils.skip_init(
            nn.Conv2d, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, padding_mode=layer.padding_mode, **options,
        )  # fmt: skip
    new.weight.data = layer.weight.detach() * g.view(-1, *[1] * (layer.weight.dim() - 1))
    new.bias.data = bias * g + (0 if norm.bias is None else norm.bias.detach())
    return new


def _sweep(layers, x: Tensor, target: Tensor):
    """Forward once, keeping what enters and leaves each layer; then z_c back through all of them, last layer first.

    Yields name, relevance at the layer's input, and a function that says what the layer kept.
    """
    seen, a = [], x.detach()
    for _, layer, spread in layers:
        a = a.detach().requires_grad_(spread is not _unchanged)
        with torch.set_grad_enabled(a.requires_grad):
            seen.append((a, layer(a.clone() if getattr(layer, "inplace", False) else a)))
        a = seen[-1][1]
    a = a.detach()
    R = torch.zeros_like(a).scatter_(1, target[:, None], selected(a, target)[:, None])
    yield "output", R, lambda: R.new_zeros(len(R))
    for (name, layer, spread), (a, z) in zip(reversed(layers), reversed(seen), strict=True):
        R, kept = spread(layer, a, z, R)
        yield name, R, kept


def _unchanged(layer, a, z, R):
    return R.view(a.shape), lambda: R.new_zeros(len(R))


def _winners(layer, a, z, R):
    return torch.autograd.grad(z, a, R)[0], lambda: R.new_zeros(len(R))


def _epsilon(layer, a, z, R, *, eps):
    bias = _parameters(layer).get("bias")
    return _share([a], z, bias, R, eps, signed=True)


def _gamma(layer, a, z, R, *, gamma, eps):
    changed = {key: value + gamma * value.clamp(min=0) for key, value in _parameters(layer).items()}
    z = _output(layer, changed, a)
    return _share([a], z, changed.get("bias"), R, eps, signed=True)


def _alphabeta(layer, a, z, R, *, alpha, beta, eps):
    """Both kinds of contributions as sums of products of positive and negative parts: (a w)^+ = a^+ w^+ + a^- w^-."""
    plus = {key: value.clamp(min=0) for key, value in _parameters(layer).items()}
    minus = {key: value.clamp(max=0) for key, value in _parameters(layer).items()}
    up, down = (a.detach().clamp(**{end: 0}).requires_grad_() for end in ("min", "max"))
    inputs = [up, down] if bool(down.any()) else [up]  # no input is negative behind a ReLU
    total, shares = 0.0, []
    for factor, same, other, sign in ((alpha, plus, minus, 1.0), (-beta, minus, plus, -1.0)):
        if factor:
            sums = _output(layer, same, up)
            if len(inputs) == 2:
                sums = sums + _output(layer, {"weight": other["weight"]}, down)
            share, kept = _share(inputs, sums, same.get("bias"), R, sign * eps)
            total = total + factor * share
            shares.append((factor, kept))
    return total, lambda: sum(factor * kept() for factor, kept in shares)


def _box(layer, a, z, R, *, low, high, eps):
    """x w - l w^+ - h w^-: the contributions of pixels in [l, h], measured from the end that speaks least for the unit."""
    weight = layer.weight.detach()
    if a.dim() == 2:  # the pixels were flattened on the way
        low, high = (
            v.reshape(1, -1, 1).expand(1, v.numel(), a.shape[1] // v.numel()).reshape(1, -1) for v in (low, high)
        )
    inputs = [a] + [(-v.expand_as(a)).clone().requires_grad_() for v in (low, high)]
    weights = weight, weight.clamp(min=0), weight.clamp(max=0)
    sums = sum(_output(layer, {"weight": w}, v) for w, v in zip(weights, inputs, strict=True))
    return _share(inputs, sums, None, R, eps)


def _parameters(layer) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in layer.named_parameters()}


def _output(layer, values: dict[str, Tensor], a: Tensor) -> Tensor:
    """The layer's output with other parameters; no bias where `values` has none."""
    if layer.bias is not None and "bias" not in values:
        values = {**values, "bias": torch.zeros_like(layer.bias)}
    return functional_call(layer, values, (a,))


def _share(inputs, sums: Tensor, bias: Tensor | None, R: Tensor, eps: float, signed: bool = False):
    """R_j = sum_k c_jk / (sum_j c_jk + c_k + eps) R_k, where `sums` are linear in `inputs` but for the bias c_k.

    signed: eps takes the sign of the sum. A sum of exactly 0 gives its relevance to nobody.
    Returns R_j and a function that says what biases and eps kept, (N,).
    """
    z = sums.detach()

    def stabiliser():  # z + 0 is never -0: a sum of 0 counts as positive
        return torch.copysign(z.new_tensor(eps), z + 0.0) if signed else torch.full_like(z, eps)

    s = stabiliser().add_(z)
    torch.div(R, s, out=s)  # in place: fresh memory costs as much as arithmetic
    if not eps:
        s[z == 0] = 0
    grads = torch.autograd.grad(sums, inputs, s)
    share = sum(grad.mul_(a.detach()) for a, grad in zip(inputs, grads, strict=True))

    def kept():
        c = 0.0 if bias is None else bias.view(-1, *[1] * (z.dim() - 2))
        return torch.where(z + stabiliser() == 0, R, (c + stabiliser()) * s).flatten(1).sum(1)

    return share, kept
