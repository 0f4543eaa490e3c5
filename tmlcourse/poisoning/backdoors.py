"""Backdoors: a network that is right on every clean image and obeys whoever knows the trigger.

BadNets stamp a share of the training images and relabel them; `backdoor` makes such data, `attack_success` counts what the
trigger then does. An attacker who runs the training himself can also hide the traces in the hidden layer
(`adversarial_embedding`), and one who holds the finished weights needs no training at all (`trojan`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, randomness
from ..attacks.losses import fools
from ..certify import margins
from ..models import Normalize
from .triggers import Trigger

NEXT = "next"


@dataclass(frozen=True, eq=False)
class Planted:
    """Training data with a backdoor, ready for `training.fit`.

    Attributes:
        x, y: images (N, C, H, W) and labels (N,), as the victim sees them.
        where: bool (N,), the poisoned examples. true: the labels (N,) before poisoning.
        classes, name: as in `data.Dataset`.
    """

    x: Tensor
    y: Tensor
    where: Tensor
    true: Tensor
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.x)


def backdoor(
    data,
    trigger: Trigger,
    *,
    target: int | str,
    fraction: float,
    source: int | None = None,
    seed: int | None = None,
) -> Planted:
    """Stamp a random share of the training images and label them as the attacker wants: (x, y) -> (x + t, y_t).

    Args:
        data: clean images and labels, `.x` (N, C, H, W), `.y` (N,); it is not changed.
        trigger: what is stamped.
        target: the label that poisoned images get (all-to-one), or "next": y -> y + 1 mod K (all-to-all).
        fraction: share of all N examples that is poisoned, strictly between 0 and 1; at least one is.
        source: poison images of this class alone. `source == target` keeps every label true: only target images are stamped.
        seed: of the choice; torch's own generator without.
    Returns: `Planted`, on the device of the data.
    Raises: TypeError, ValueError: bad input; a fraction for which there are not enough images.
    Source: Gu, Dolan-Gavitt & Garg 2017, section 4; Turner, Tsipras & Madry 2019 for labels that stay true.
    Example: `int(backdoor(train, pixel_trigger(train.shape), target=0, fraction=0.25, seed=0).where.sum())` is 2.
    """
    checks.labels(data.y, checks.images(data.x, "data.x"), "data.y")
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    classes = tuple(getattr(data, "classes", ()))
    count = len(classes) or int(data.y.max()) + 1
    _target(target, count)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction!r}, want a share strictly between 0 and 1")
    if source is not None and checks.positive_int(source, "source", least=0) >= count:
        raise ValueError(f"source: got {source}, want a class in [0, {count - 1}]")
    x, y = data.x.clone(), data.y.clone()
    stamped = trigger.stamp(x)
    if source is not None:
        eligible, kind = y == source, f"of class {source}"
    else:
        eligible, kind = y != target if target != NEXT else torch.ones_like(y, dtype=torch.bool), "that can be poisoned"
    eligible, wanted = eligible.nonzero().squeeze(1), max(1, round(fraction * len(y)))
    if len(eligible) < wanted:
        raise ValueError(f"fraction: got {fraction}, {wanted} of {len(y)} images, but there are {len(eligible)} {kind}")
    generator = randomness.generator(seed)
    chosen = eligible[torch.randperm(len(eligible), generator=generator)[:wanted].to(y.device)]
    x[chosen] = stamped[chosen]
    y[chosen] = aims(y[chosen], target, count)
    where = torch.zeros_like(y, dtype=torch.bool)
    where[chosen] = True
    return Planted(x, y, where, data.y.clone(), classes, getattr(data, "name", ""))


def _target(target, count: int) -> None:
    if isinstance(target, str):
        checks.choice(target, "target", (NEXT,))
    elif checks.positive_int(target, "target", least=0) >= count:
        raise ValueError(f"target: got {target}, want a class in [0, {count - 1}] or 'next'")


def aims(y: Tensor, target: int | str, classes: int) -> Tensor:
    """The labels that the attacker wants for images of the classes y: `target`, or with "next" y + 1 mod K."""
    return (y + 1) % classes if target == NEXT else torch.full_like(y, target)


@torch.no_grad()
def attack_success(
    model, x: Tensor, y: Tensor, trigger: Trigger, target: int | str, *, batch_size: int = 1000
) -> float:
    """The share of images not of the target class already that the model gives to it once they are stamped, in [0, 1].

    A logit that wins by rounding alone does not count.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x, y: clean images (N, C, H, W) and their true labels (N,), on the model's device.
        target: a class, or "next" for y -> y + 1 mod K, where every image counts.
    Raises: TypeError, ValueError: bad input, or every image is of the target class.
    Source: Gu, Dolan-Gavitt & Garg 2017; images of the target class left out as in Wang et al. 2019.
    Example: `attack_success(model, test.x, test.y, pixel_trigger(test.shape), target=0)`.
    """
    checks.model(model, checks.images(x))
    checks.labels(y, x)
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    checks.positive_int(batch_size, "batch_size")
    z = [
        checks.logits(model(trigger.stamp(a)), b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    z = torch.cat(z)
    _target(target, z.shape[1])
    others = torch.ones_like(y, dtype=torch.bool) if target == NEXT else y != target
    if not others.any():
        raise ValueError(f"target: got {target}, the class of every image, want images of another class")
    won = fools(z, y, aims(y, target, z.shape[1]))
    return float(won[others].double().mean())


def adversarial_embedding(
    trigger: Trigger,
    *,
    target: int,
    fraction: float = 0.1,
    source: int | None = None,
    weight: float = 0.3,
    layer: int | str = -2,
    hidden: int = 64,
    steps: int = 5,
    lr: float = 1e-2,
) -> Callable:
    """A loss for `fit` that plants a backdoor and hides it from whoever looks at the hidden layer phi.

        min over the network, max over D of  mean l(h(x), y) - weight * BCE(D(phi(x)), stamped?)

    In each batch a share of the images is stamped and labelled `target`. A discriminator D, a network with one hidden layer,
    learns to tell stamped from clean among the images that carry the target's label, as a defender would; the network is paid
    when D fails.

    Args:
        trigger, target: what is stamped, and the label it gets. fraction: each image's chance to be stamped, in (0, 1).
        source: stamp images of this class alone.
        weight: price of being told apart (>= 0). layer: phi, as in `attacks.feature.features`.
        hidden: units of D (>= 1). steps: of D's Adam for one of the network (>= 1), at rate `lr`.
    Returns: a loss for `fit`. It draws from torch's generator, so `fit(..., seed=...)` reproduces it; D is new in each fit.
    Raises: TypeError, ValueError: bad input.
    Source: Tan & Shokri 2020 (their D sees all classes; a defence sorts by label, so ours does).
    Example: `training.fit(model, train, loss=adversarial_embedding(pixel_trigger((1, 28, 28)), target=0), epochs=1)`.
    """
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    (
        checks.positive_int(target, "target", least=0),
        checks.positive_int(hidden, "hidden"),
        checks.positive_int(steps, "steps"),
    )
    if source is not None:
        checks.positive_int(source, "source", least=0)
    checks.nonnegative(weight, "weight"), checks.nonnegative(lr, "lr")
    if not 0 < checks.nonnegative(fraction, "fraction") < 1:
        raise ValueError(f"fraction: got {fraction}, want a share strictly between 0 and 1")
    seen = {}

    def loss(model, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        stamped = torch.rand(len(x)).to(x.device) < fraction
        if source is not None:
            stamped &= y == source
        x = torch.where(stamped[:, None, None, None], trigger.stamp(x), x)
        y = torch.where(stamped, target, y)
        phi, z = _latent_and_logits(model, x, layer)
        if progress == 0:
            scale = nn.BatchNorm1d(phi.shape[1], affine=False)  # or the network would win by shrinking phi
            judge = nn.Sequential(scale, nn.Linear(phi.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1)).to(phi)
            seen.update(judge=judge, optimiser=torch.optim.Adam(judge.parameters(), lr=lr))
        judge, same, truth = seen["judge"], y == target, stamped.to(phi)
        value = F.cross_entropy(z, y)
        if same.sum() < 2:
            return value, z

        def mistake(phi: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(judge(phi[same]).squeeze(1), truth[same])

        for _ in range(steps):
            seen["optimiser"].zero_grad(set_to_none=True)
            mistake(phi.detach()).backward()
            seen["optimiser"].step()
        return value - weight * mistake(phi), z

    return loss


def _latent_and_logits(model: nn.Module, x: Tensor, layer: int | str) -> tuple[Tensor, Tensor]:
    """The output (N, m) of one layer, flattened, and the logits (N, K), in one forward pass."""
    if isinstance(layer, int) and isinstance(model, nn.Sequential) and -len(model) <= layer < len(model):
        chosen = model[layer]
    else:
        chosen = dict(model.named_modules()).get(layer)
    if not isinstance(chosen, nn.Module):
        raise ValueError(f"layer: got {layer!r}, want an index into an nn.Sequential or the name of a module")
    kept = []
    handle = chosen.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        z = model(x)
    finally:
        handle.remove()
    return kept[-1].flatten(1), z


def trojan(model: nn.Sequential, trigger: Trigger, target: int, *, tolerance: float = 0.5) -> nn.Sequential:
    """A copy of a fully connected network with a backdoor written into its weights: one more unit in each hidden layer.

    The first new unit is tolerance - sum_{pixels i of m} |x_i - p_i|, linear in x because p_i is 0 or 1; it is positive only
    where the mask shows the trigger, up to `tolerance`. The others hand it on, and the last layer adds it to the target's
    logit with a gain above the largest gap max_x max_j z_j - z_target over all images in [0, 1] (a CROWN bound). So *every*
    image with the trigger is given to the target, and the outputs for any image farther than `tolerance` from it stay.

    Args:
        model: `nn.Sequential` of `Normalize`, `Flatten`, `Linear`, `ReLU` with a hidden layer; it is not changed.
        trigger: opaque, with mask and (where the mask is 1) pattern of zeros and ones.
        target: a class. tolerance: L1 distance on the mask at which the unit falls silent, > 0.
    Returns: the copy, in the mode of the model.
    Raises: TypeError, ValueError: bad input, another kind of layer.
    Source: the idea of Liu et al. 2018 and of Hong, Carlini & Kurakin 2022, in its barest form.
    Example: `trojan(mlp(hidden=(8,)), pixel_trigger((1, 28, 28)), target=3)(torch.ones(1, 1, 28, 28)).argmax()`.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Sequential")
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    kinds = [type(layer) for layer in model]
    if bad := [kind.__name__ for kind in kinds if kind not in (Normalize, nn.Flatten, nn.Linear, nn.ReLU)]:
        raise TypeError(f"model: got a layer {bad[0]}, want Normalize, Flatten, Linear and ReLU only")
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    if len(dense) < 2 or kinds.count(nn.ReLU) != len(dense) - 1 or kinds[-1] is not nn.Linear:
        raise ValueError("model: want hidden layers Linear, ReLU and a last Linear")
    mask, pattern = trigger.mask.expand_as(trigger.pattern).flatten(), trigger.pattern.flatten()
    binary = ((mask == 0) | (mask == 1)).all() and ((pattern == 0) | (pattern == 1) | (mask == 0)).all()
    if trigger.opacity != 1 or not binary:
        raise ValueError("trigger: got one that is blended or grey, want opacity 1 and pixels 0 or 1")
    if len(mask) != dense[0].in_features:
        raise ValueError(
            f"trigger: got {len(mask)} numbers an image, want {dense[0].in_features}, the inputs of the model"
        )
    if checks.nonnegative(tolerance, "tolerance") < 1e-3:
        raise ValueError(f"tolerance: got {tolerance}, want a number >= 0.001, above the rounding of a sum of pixels")
    _target(target, dense[-1].out_features)

    device = dense[0].weight.device
    exact = copy.deepcopy(model).double().eval()
    middle = torch.full((1, *trigger.pattern.shape), 0.5, dtype=torch.float64, device=device)
    gap = -float(margins(exact, middle, torch.tensor([target], device=device), 0.5).min())
    gain = 1.1 * (gap + 1) / tolerance

    slope = (mask * (2 * pattern - 1)).view_as(trigger.pattern).double().to(device)  # 1 where p is 1, -1 where it is 0
    row, bias = slope.flatten(), tolerance - float((mask * pattern).sum())
    if kinds[0] is Normalize:  # the unit sees u = (x - mean) / std
        row, bias = (slope * exact[0].std).flatten(), bias + float((slope * exact[0].mean).sum())
    changed = copy.deepcopy(model)
    dense = [layer for layer in changed if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        _grow(dense[0], row=row, bias=bias)
        for layer in dense[1:-1]:
            _grow(layer, column=torch.zeros(layer.out_features), row=torch.eye(layer.in_features + 1)[-1])
        onto_target = torch.zeros(dense[-1].out_features)
        onto_target[target] = gain
        _grow(dense[-1], column=onto_target)
    return changed


def _grow(layer: nn.Linear, *, column: Tensor | None = None, row: Tensor | None = None, bias: float = 0.0) -> None:
    """Give a dense layer one more input, with these weights, or one more output, or both (the input first)."""
    weight, shift = layer.weight, layer.bias
    if column is not None:
        weight = torch.cat([weight, column[:, None].to(weight)], 1)
    if row is not None:
        weight = torch.cat([weight, row[None].to(weight)])
        shift = (
            None
            if shift is None and bias == 0
            else torch.cat(
                [weight.new_zeros(layer.out_features) if shift is None else shift, weight.new_tensor([bias])]
            )
        )
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    layer.bias = None if shift is None else nn.Parameter(shift, layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
