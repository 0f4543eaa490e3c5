"""How sure is the model, and which doubt would more data remove? Aleatoric and epistemic uncertainty, number or map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, progress, randomness

KINDS = ("classification", "regression")
MEASURES = ("entropy", "variance")
_DROPOUT = nn.modules.dropout._DropoutNd


class Uncertainty(NamedTuple):
    """`mean` prediction (probabilities or values), and three maps without the class axis: total = epistemic + aleatoric."""

    mean: Tensor
    total: Tensor
    epistemic: Tensor
    aleatoric: Tensor


def uncertainty(
    model: nn.Module | Sequence[nn.Module],
    x: Tensor,
    *,
    kind: str = "classification",
    measure: str = "entropy",
    samples: int = 30,
    seed: int | None = None,
) -> Uncertainty:
    """Split the doubt about a prediction into what lies in the data and what lies in the weights.

        classification, entropy:   H(mean_t p_t) = [H(mean_t p_t) - mean_t H(p_t)] + mean_t H(p_t)
        classification, variance:  sum_k p_k (1 - p_k) of the mean = sum_k Var_t p_tk + mean_t sum_k p_tk (1 - p_tk)
        regression:                mean_t y_t^2 - (mean_t y_t)^2 + mean_t sigma_t^2

    total = epistemic + aleatoric. Aleatoric doubt stays, however many examples are seen; epistemic doubt is disagreement
    between models that all fit the training data: members of an ensemble, or one network whose dropout stays on.

    Args:
        model: a network with dropout layers, in evaluation mode, asked `samples` times; or a list of networks, each asked
            once. Classification: logits (N, K, ...), any map behind the class axis. Regression: (N, 2, ...), the mean and the
            logarithm of the variance.
        x: inputs (N, ...), floating point, finite. measure: for classification, in nats or as a variance.
    Returns: `Uncertainty`, the maps (N, ...); epistemic is never below zero but for rounding.
    Raises: TypeError, ValueError: bad input, a network without dropout.
    Source: Kendall & Gal 2017; Gal & Ghahramani 2016 (dropout); Lakshminarayanan et al. 2017 (ensembles); for the entropies,
        Depeweg et al. 2018.
    Example: `uncertainty([model, model], x).epistemic.shape` is (8).
    """
    checks.choice(kind, "kind", KINDS)
    checks.choice(measure, "measure", MEASURES)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"x: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, want a floating-point tensor"
        )
    if not x.numel() or not torch.isfinite(x).all():
        raise ValueError(f"x: got shape {tuple(x.shape)} or numbers that are not finite, want finite inputs (N, ...)")
    answers = _members(model, x, samples) if isinstance(model, (list, tuple)) else _dropout(model, x, samples, seed)
    mean = spread = noise = 0.0
    for count, z in enumerate(answers, 1):
        if z.dim() < 2 or len(z) != len(x) or z.shape[1] < 2 or (kind == "regression" and z.shape[1] != 2):
            want = "(N, 2, ...): mean and log variance" if kind == "regression" else "logits (N, K, ...) with K >= 2"
            raise ValueError(f"model: got output {tuple(z.shape)}, want {want}")
        z = z.double()
        value = z[:, 0] if kind == "regression" else z.softmax(1)
        away = value - mean
        mean = mean + away / count
        spread = spread + away * (value - mean)  # Welford's sum of squares: no cancellation
        noise = noise + (z[:, 1].exp() if kind == "regression" else _doubt(value, measure))
    noise = noise / count
    if kind == "regression":
        epistemic = spread / count
    elif measure == "variance":
        epistemic = (spread / count).sum(1)
    else:
        epistemic = _doubt(mean, measure) - noise
    return Uncertainty(*(v.to(x.dtype) for v in (mean, epistemic + noise, epistemic, noise)))


def _doubt(p: Tensor, measure: str) -> Tensor:
    return -torch.xlogy(p, p).sum(1) if measure == "entropy" else (p * (1 - p)).sum(1)


def _members(models, x: Tensor, samples: int) -> Iterator[Tensor]:
    if len(models) < 2:
        raise ValueError(f"model: got an ensemble of {len(models)}, want at least 2")
    for member in models:
        checks.model(member, x)
    with torch.no_grad():
        for member in models:
            yield member(x)


def _dropout(model, x: Tensor, samples: int, seed) -> Iterator[Tensor]:
    checks.positive_int(samples, "samples", least=2)
    checks.model(model, x)
    layers = [layer for layer in model.modules() if isinstance(layer, _DROPOUT)] if isinstance(model, nn.Module) else []
    if not any(layer.p > 0 for layer in layers):
        raise ValueError(
            "model: got no dropout layer in it, want one with dropout, or a list of networks (an ensemble)"
        )
    outputs = []  # kept until the end, so that whoever reads them sees the model as it was
    with torch.no_grad(), randomness.seeded(seed, x.device), _on(layers):
        for _ in progress.bar(range(samples), desc="dropout samples"):
            outputs.append(model(x))
    return iter(outputs)


@contextmanager
def _on(layers):
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False


def heteroscedastic(output: Tensor, y: Tensor) -> Tensor:
    """The loss of a network that also says how noisy its answer is: large errors are cheap where it admits to them.

        mean of  exp(-s) (y - mu)^2 / 2 + s / 2,   s = log sigma^2

    Args: output: (N, 2, ...), mu and s; y: (N, ...).
    Raises: ValueError: shapes that do not fit.
    Source: Nix & Weigend 1994; Kendall & Gal 2017, equation 8.
    Example: `heteroscedastic(torch.zeros(5, 2), torch.ones(5))` is 0.5.
    """
    if output.dim() < 2 or output.shape[1] != 2 or output[:, 0].shape != y.shape:
        raise ValueError(f"output: got {tuple(output.shape)} for y {tuple(y.shape)}, want (N, 2, ...) for (N, ...)")
    mu, s = output.unbind(1)
    return (torch.exp(-s) * (y - mu) ** 2 / 2 + s / 2).mean()
