"""How explanations are fooled: by a changed image, by a changed model, by a model that notices the explainer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress
from .common import selected, targets
from .lime import neighbours

EXPLANATIONS = ("saliency", "gradient_x_input")


def soften(model: nn.Module, beta: float = 10.0) -> nn.Module:
    """A copy of a network with softplus in the place of every ReLU: nearly the same function, but curved.

        softplus(t) = log(1 + exp(beta t)) / beta  ->  max(t, 0) as beta grows

    The gradient of a ReLU network is piecewise constant in the image, so that an attack on it has nothing to climb.

    Args: model: its ReLUs must be layers (`nn.ReLU`). beta: > 0; small is smoother.
    Raises: TypeError, ValueError: bad input, a network without ReLU layers.
    Source: Dombrowski et al. 2019.
    Example: `soften(models.mlp(seed=0))(x).shape` is (8, 10).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    beta = checks.positive(beta, "beta")
    soft = copy.deepcopy(model)
    found = [(parent, name) for parent in soft.modules() for name, child in parent.named_children()
             if isinstance(child, nn.ReLU)]  # fmt: skip
    if not found:
        raise ValueError("model: got no nn.ReLU layer in it, want one to soften")
    for parent, name in found:
        setattr(parent, name, nn.Softplus(beta).train(parent.training))
    return soft


def shares(model, x: Tensor, target: Tensor, explain: str = "saliency", *, create_graph: bool = False) -> Tensor:
    """How an explanation divides its mass over the pixels: |heat| summed over channels, scaled to sum 1, (N, 1, H, W).

    With `create_graph` the result can be differentiated again, in the image and in the weights.
    Example: `shares(model, x, torch.zeros(8, dtype=torch.int64)).sum().round()`.
    """
    checks.choice(explain, "explain", EXPLANATIONS)
    x = x if x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad():
        (heat,) = torch.autograd.grad(selected(model(x), target).sum(), x, create_graph=create_graph)
        heat = (heat * x if explain == "gradient_x_input" else heat).abs().sum(1, keepdim=True)
        share = heat / heat.sum((1, 2, 3), keepdim=True).clamp_min(1e-20)
    return share if create_graph else share.detach()


def fool_input(
    model,
    x: Tensor,
    wanted: Tensor,
    *,
    eps: float = 8 / 255,
    steps: int = 100,
    alpha: float | None = None,
    gamma: float = 1.0,
    explain: str = "saliency",
) -> Tensor:
    """Images that look the same and are classified the same, with the explanation that somebody wants.

        min over ||delta||_inf <= eps
            ||h(x + delta) - h_wanted||^2 / ||h(x) - h_wanted||^2 + gamma ||g(x + delta) - g(x)||^2 / K

    h is the share of the explanation in each pixel, g the logits. Steps of signs, decreasing; the best image is kept
    among those with the same predicted class.

    Args:
        model: a network that can be differentiated twice: attack `soften(model)` and show the result to the model itself.
        x: images (N, C, H, W) in [0, 1]. wanted: map (H, W), (1, 1, H, W) or (N, 1, H, W), >= 0 and not all zero.
        eps: in pixel values, >= 0. alpha: first step, eps / 4 without. gamma: >= 0. explain: see `EXPLANATIONS`.
    Returns: images like x, never further from `wanted` (for this model) than x itself.
    Raises: TypeError, ValueError: bad input; a model without curvature (its explanation does not depend on the image).
    Source: Dombrowski et al. 2019.
    Example: `fool_input(soften(models.mlp(hidden=(9,), seed=0)), x, x[:1], steps=2).shape` is (8, 1, 28, 28).
    """
    target = targets(model, x, None)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    checks.choice(explain, "explain", EXPLANATIONS)
    eps, gamma = checks.nonnegative(eps, "eps"), checks.nonnegative(gamma, "gamma")
    alpha = eps / 4 if alpha is None else checks.positive(alpha, "alpha")
    checks.positive_int(steps, "steps")
    wanted = _wanted(wanted, x)
    with torch.no_grad():
        before = model(x)
    first = (shares(model, x, target, explain).detach() - wanted).square().sum((1, 2, 3)).clamp_min(1e-20)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    best, least, now = x.clone(), torch.ones_like(first), x.clone()
    for step in progress.bar(range(steps + 1), desc="fooling an explanation"):
        point = now.clone().requires_grad_()
        off = (shares(model, point, target, explain, create_graph=True) - wanted).square().sum((1, 2, 3)) / first
        with torch.enable_grad():
            logits = model(point)
            loss = off.sum() + gamma * (logits - before).square().mean(1).sum()
        better = (off.detach() < least) & (logits.detach().argmax(1) == target)
        least = torch.where(better, off.detach(), least)
        best = torch.where(better[:, None, None, None], now, best)
        if step == steps or eps == 0:
            break
        if step == 0:
            (pull,) = torch.autograd.grad(off.sum(), point, retain_graph=True, allow_unused=True)
            if pull is None or not pull.any():
                raise ValueError("model: its explanation does not depend on the image (ReLUs?), want soften(model)")
        (g,) = torch.autograd.grad(loss, point)
        now = torch.clamp(now - alpha * (1 - step / steps) * g.sign(), low, high).detach()
    return best


def location_fooling(where: Tensor, weight: float = 1.0, *, explain: str = "saliency") -> Callable:
    """A training loss under which a network keeps its answers and moves its explanations to a place of its owner's choice.

        cross-entropy + weight (1 - share of |heat| inside `where`)

    For `tmlcourse.training.fit`, on a copy of a trained network.

    Args: where: bool (H, W), where the explanation shall be. weight: >= 0. explain: see `EXPLANATIONS`.
    Returns: loss, (model, x, y) -> (scalar, logits).
    Raises: TypeError, ValueError: bad input.
    Source: Heo, Joo & Moon 2019 (location fooling, there for LRP, Grad-CAM and SimpleGrad).
    Example: `location_fooling(torch.ones(28, 28, dtype=torch.bool))(model, x, torch.zeros(8, dtype=torch.int64))[1].shape`
        is (8, 10).
    """
    if not isinstance(where, Tensor) or where.dtype != torch.bool or where.dim() != 2 or not where.any():
        got = f"{where.dtype} {tuple(where.shape)}" if isinstance(where, Tensor) else type(where).__name__
        raise ValueError(f"where: got {got}, want a bool tensor (H, W) that is true somewhere")
    weight = checks.nonnegative(weight, "weight")
    checks.choice(explain, "explain", EXPLANATIONS)

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        inside = (shares(model, x, y, explain, create_graph=True) * where.to(x.device)).sum((1, 2, 3))
        return F.cross_entropy(logits, y) + weight * (1 - inside).mean(), logits

    return loss


def scaffold(
    biased: Callable[[Tensor], Tensor],
    innocuous: Callable[[Tensor], Tensor],
    background: Tensor,
    *,
    kind: str = "quartiles",
    seed: int = 0,
) -> Callable[[Tensor], Tensor]:
    """A model that is biased towards people and blameless towards explainers.

        e(x) = biased(x) if x looks like a row of the data, innocuous(x) if it looks like a neighbour that LIME made up

    A random forest learns to tell one from the other, since neighbours whose features are drawn one by one look like nobody.

    Args: biased, innocuous: rows (m, d) -> (m,). background: rows (n, d), the data. kind: of neighbours, as in `lime_table`.
    Returns: rows (m, d) -> (m,).
    Raises: TypeError, ValueError: bad input.
    Source: Slack et al. 2020.
    Example: `scaffold(lambda r: r[:, 0], lambda r: r[:, 1], rows)(rows).shape` is (8).
    """
    from sklearn.ensemble import RandomForestClassifier  # takes a second: only when it is needed

    if not isinstance(background, Tensor) or background.dim() != 2 or len(background) < 2:
        raise ValueError("background: want a tensor of at least two rows (n, d)")
    for name, function in (("biased", biased), ("innocuous", innocuous)):
        if not callable(function):
            raise TypeError(f"{name}: got {type(function).__name__}, want a function of rows (m, d)")
    checks.choice(kind, "kind", ("quartiles", "standardised"))
    generator = torch.Generator().manual_seed(checks.positive_int(seed, "seed", least=0))
    made_up = neighbours(background[0], background, kind=kind, n=len(background) + 1, generator=generator)[1:]
    rows, real = torch.cat([background, made_up]), torch.arange(2 * len(background)) < len(background)
    detector = RandomForestClassifier(100, random_state=seed, n_jobs=1).fit(rows.cpu().numpy(), real.numpy())

    def predict(x: Tensor) -> Tensor:
        person = torch.from_numpy(detector.predict(x.cpu().numpy())).to(x.device)
        return torch.where(person, biased(x), innocuous(x))

    return predict


def _wanted(wanted, x: Tensor) -> Tensor:
    if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
        got = wanted.dtype if isinstance(wanted, Tensor) else type(wanted).__name__
        raise TypeError(f"wanted: got {got}, want a floating-point map")
    try:
        wanted = wanted.to(x).expand(len(x), 1, *x.shape[2:])
    except RuntimeError as cause:
        raise ValueError(f"wanted: got shape {tuple(wanted.shape)}, want {tuple(x.shape[2:])}") from cause
    if not torch.isfinite(wanted).all() or (wanted < 0).any() or (wanted.sum((1, 2, 3)) == 0).any():
        raise ValueError("wanted: want finite numbers >= 0, not all of them zero")
    return wanted / wanted.sum((1, 2, 3), keepdim=True)
