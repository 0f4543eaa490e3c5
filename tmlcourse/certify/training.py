"""Losses for `training.fit` that train a network for its own certificate.

The worst that a bound allows stands in for the worst that an attack finds. With lower bounds m_j of the margins z_y - z_j,

    log(1 + sum_{j != y} exp(-m_j))  >=  max over the ball of the cross-entropy

so what is minimised is a certified upper bound of the adversarial risk. Bounds of an untrained network are hopelessly
loose, so every loss begins with plain training and lets eps grow from 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .bounds import Box, ball, check, inner_bounds, margin_bounds
from .network import Network


def interval(eps: float, *, kappa: float = 0.5, warm_up: float = 0.05, ramp: float = 0.5, box=(0.0, 1.0)) -> Callable:
    """Interval bound propagation: kappa l(h(x), y) + (1 - kappa) l(worst logits of the intervals, y).

    After a share `warm_up` of training, over a share `ramp`, eps grows from 0 and the weight of the clean loss falls from 1
    to `kappa`, both linearly.

    Args:
        eps: radius in pixel intensity (>= 0).
        kappa: weight of the clean loss at the end, in [0, 1].
        warm_up, ramp: shares of training, >= 0 and together at most 1.
        box: (low, high) of valid pixels, or None.
    Returns:
        A loss for `fit`: (model, x, y, progress=1.0) -> (scalar, logits). The bounds read the model in evaluation mode (batch
        norm with its running statistics, no dropout); the clean loss does not.
    Raises:
        TypeError, ValueError: bad input; when called, an unsupported layer.
    Source: Gowal et al. 2018 (MNIST: warm-up 1/30, ramp 1/6 of 60,000 steps; here training is shorter, and the ramp longer).
    Example: `training.fit(model, train, loss=interval(0.1), epochs=1, seed=0)`.
    """
    return _ramped(eps, kappa, warm_up, ramp, box, _interval)


def crown_ibp(
    eps: float,
    *,
    kappa: float = 0.5,
    beta: tuple[float, float] = (1.0, 0.0),
    warm_up: float = 0.05,
    ramp: float = 0.5,
    box=(0.0, 1.0),
) -> Callable:
    """CROWN-IBP: as `interval`, with margins (1 - beta) m_IBP + beta m_CROWN-IBP.

    CROWN's last step over interval bounds is tight while eps is small, intervals are stable when it is large: `beta` goes
    from its first to its second number during the ramp. A mixture of two lower bounds is a lower bound.

    Args:
        beta: weights of the CROWN-IBP margins at the beginning and the end of the ramp, in [0, 1].
        Others: see `interval`.
    Source: Zhang et al. 2020 ("Towards Stable and Efficient Training of Verifiably Robust Neural Networks").
    Example: `training.fit(model, train, loss=crown_ibp(0.1), epochs=1, seed=0)`.
    """
    for end in beta:
        if not 0 <= checks.nonnegative(end, "beta") <= 1:
            raise ValueError(f"beta: got {beta}, want two numbers in [0, 1]")
    first, last = beta

    def worst(network: Network, region: Box, y: Tensor, ramped: float) -> Tensor:
        bounds, share = inner_bounds(network, region, "ibp"), first + ramped * (last - first)
        low = [margin_bounds(network, region, y, m, bounds=bounds) for m, used in
               (("ibp", share < 1), ("crown-ibp", share > 0)) if used]  # fmt: skip
        return low[0] if len(low) == 1 else torch.lerp(*low, share)

    return _ramped(eps, kappa, warm_up, ramp, box, worst)


def dual(eps: float, *, kappa: float = 0.0, warm_up: float = 0.05, ramp: float = 0.5, box=(0.0, 1.0)) -> Callable:
    """The convex outer adversarial polytope: the robust cross-entropy of the dual bound.

    Arguments: see `interval`; the authors use kappa = 0 and box = None.

    Source: Wong & Kolter 2018.
    Example: `training.fit(model, train, loss=dual(0.1), epochs=1, seed=0)`.
    """
    return _ramped(eps, kappa, warm_up, ramp, box, _dual)


def _interval(network: Network, region: Box, y: Tensor, ramped: float) -> Tensor:
    return margin_bounds(network, region, y, "ibp")


def _dual(network: Network, region: Box, y: Tensor, ramped: float) -> Tensor:
    return margin_bounds(network, region, y, "dual")


def _ramped(eps: float, kappa: float, warm_up: float, ramp: float, box, worst: Callable) -> Callable:
    """The schedule that all share; `worst(network, region, y, ramped)` -> margins (N, K), `ramped` in (0, 1]."""
    checks.nonnegative(eps, "eps")
    if checks.nonnegative(kappa, "kappa") > 1:
        raise ValueError(f"kappa: got {kappa}, want a number in [0, 1]")
    if checks.nonnegative(warm_up, "warm_up") + checks.nonnegative(ramp, "ramp") > 1:
        raise ValueError(f"warm_up, ramp: got {warm_up} and {ramp}, want shares of training that add up to at most 1")

    def loss(model, x: Tensor, y: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        z = model(x)
        clean = F.cross_entropy(z, y)
        since = progress - warm_up
        ramped = min(1.0, max(0.0, since) / ramp) if ramp else float(since >= 0)
        if ramped == 0:
            return clean, z
        mode = {module: module.training for module in model.modules()}
        model.eval()
        try:
            region = ball(x, ramped * eps, box)
            robust = F.cross_entropy(-worst(check(model, x, y, eps, box), region, y, ramped), y)
        finally:
            for module, training in mode.items():
                module.training = training
        weight = 1 - ramped * (1 - kappa)
        return weight * clean + (1 - weight) * robust, z

    return loss
