"""Model extraction: a copy of the model from its answers."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, models
from ..training import fit


def extract_linear(predict, shape, *, batch_size: int = 1000) -> nn.Sequential:
    """Softmax regression from d + 1 answers, exactly: log(p_k(x) / p_0(x)) = (w_k - w_0) x + (b_k - b_0) is linear in x.

    The black image tells b_k - b_0, and the image with the single white pixel i tells what pixel i adds, w_ki - w_0i. (The
    softmax does not change if all rows of W move together, so the copy has w_0 = 0, b_0 = 0.)

    Args:
        predict: images (N, *shape) in [0, 1] -> probabilities (N, K), all positive; or a `Queries`.
        shape: (C, H, W) of an image; d = C H W. batch_size: images asked about at a time.
    Returns: `models.linear` with the extracted weights, in evaluation mode, in the dtype of the answers.
    Raises: ValueError for answers that are no positive probabilities: rounding hides the logarithm.
    Source: Tramèr et al. 2016, section 4.1.
    Example: `extract_linear(lambda x: linear(seed=0)(x).softmax(1), (1, 28, 28))(x).shape` is (8, 10).
    """
    d = math.prod(shape)
    asked = torch.cat([torch.zeros(1, d), torch.eye(d)]).view(-1, *shape)
    p = torch.cat([_probabilities(predict(part), part) for part in asked.split(batch_size)])
    if not (p > 0).all():
        raise ValueError(f"predict: got {int((p <= 0).sum())} probabilities that are 0, want positive ones (rounded? see "
                         "extract_network)")  # fmt: skip
    ratio = (p / p[:, :1]).log()
    copy_of = models.linear(shape, p.shape[1]).to(p)
    with torch.no_grad():
        copy_of[-1].bias.copy_(ratio[0])
        copy_of[-1].weight.copy_((ratio[1:] - ratio[0]).T)
    return copy_of


def extract_network(
    predict,
    x: Tensor,
    model: nn.Module,
    *,
    answers: str = "probabilities",
    epochs: int = 20,
    batch_size: int = 25,
    lr: float = 5e-3,
    seed: int | None = None,
) -> nn.Module:
    """Train a copy of `model` to give the black box's answers on x: min E sum_k -p_k(x) log softmax_k h(x).

    With answers="labels" p is a unit vector. An attacker with only a handful of images makes more: `attacks.substitute`.

    Args:
        predict: images -> probabilities (N, K), or labels (N,) int64; or a `Queries`. Each image is asked about once.
        x: images (N, ...) in [0, 1] of the attacker's own; no labels.
        model: an untrained network of any architecture; copied, not changed.
        answers: "probabilities" or "labels": only the winner of each answer is used.
        epochs, batch_size, lr, seed: as for `training.fit`.
    Returns: the trained copy, in evaluation mode.
    Raises: TypeError, ValueError: bad input.
    Source: Tramèr et al. 2016; Orekondy, Schiele & Fritz 2019; Hinton, Vinyals & Dean 2015 for learning from probabilities.
    Example: `extract_network(lambda x: linear(seed=0)(x).softmax(1), x, linear(seed=1), epochs=1, seed=0)(x).shape`.
    """
    checks.images(x)
    checks.choice(answers, "answers", ("probabilities", "labels"))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an untrained torch.nn.Module")
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
        said = torch.cat([torch.as_tensor(predict(part)) for part in x.split(1000)])
    if said.dim() == 1:
        checks.labels(said, x, "predict")
        if answers == "probabilities":
            raise ValueError("answers: got 'probabilities', but the black box answers with labels, want 'labels'")
        if said.max() >= classes:
            raise ValueError(f"model: got {classes} logits, want more: the black box answered {said.max().item()}")
        p = F.one_hot(said, classes).to(x)
    else:
        p = _probabilities(said, x).to(x)
        if p.shape[1] != classes:
            raise ValueError(f"model: got {classes} logits, want {p.shape[1]}, as many as the black box's classes")
        p = F.one_hot(p.argmax(1), classes).to(x) if answers == "labels" else p

    def soft(model, x: Tensor, row: Tensor) -> Tensor:
        return -(p[row] * model(x).log_softmax(1)).sum(1).mean()

    data = SimpleNamespace(x=x, y=torch.arange(len(x), device=x.device))
    fit(model, data, epochs=epochs, batch_size=batch_size, lr=lr, loss=soft, seed=seed)
    return model


def _probabilities(p, x: Tensor) -> Tensor:
    """Require probabilities (N, K), rounded or not."""
    if not isinstance(p, Tensor) or p.dim() != 2 or len(p) != len(x) or p.shape[1] < 2:
        got = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
        raise ValueError(f"predict: got answers {got}, want probabilities ({len(x)}, K) with K >= 2")
    if not torch.isfinite(p).all() or p.min() < 0 or (p.sum(1) - 1).abs().max() > 0.6:
        raise ValueError("predict: got answers that are no probabilities, want rows >= 0 with the sum 1")
    return p.detach()


@torch.no_grad()
def fidelity(first, second, x: Tensor) -> float:
    """Share of images on which two models decide alike, in [0, 1]; not whether they are right.

    Example: `fidelity(model, model, x)` is 1.0.
    """
    checks.images(x)
    return float((first(x).argmax(1) == second(x).argmax(1)).double().mean())
