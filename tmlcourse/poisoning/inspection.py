"""Looking for a backdoor inside: at the hidden layer of the training images, and at the units that sleep on clean ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from .. import checks
from ..attacks.feature import features


@torch.no_grad()
def latents(model: nn.Module, x: Tensor, *, layer: int | str = -2, batch_size: int = 1000) -> Tensor:
    """What one layer makes of the images: (N, ...) -> (N, m). `layer` as in `attacks.feature.features`.

    Example: `latents(mlp(hidden=(5,)), torch.rand(3, 1, 28, 28)).shape` is (3, 5).
    """
    checks.model(model, checks.images(x))
    phi = features(model, layer)
    return torch.cat([phi(part) for part in x.split(checks.positive_int(batch_size, "batch_size"))])


def _rows(values, y) -> tuple[Tensor, Tensor]:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values: got {type(values).__name__}, want a floating-point tensor (N, m)")
    if values.dim() != 2 or values.numel() == 0 or not torch.isfinite(values).all():
        raise ValueError(f"values: got shape {tuple(values.shape)}, want a finite (N, m) with N, m >= 1")
    return values.double(), checks.labels(y, values)


def spectral_signatures(values: Tensor, y: Tensor) -> Tensor:
    """For each example its outlier score <phi_i - mean_c, v_c>^2, v_c the top right singular vector of its class c.

    A poisoned share of a class gives its features a second centre; the direction between the centres has the most variance.

    Args: values: phi(x_i), (N, m), from `latents`. y: int64 labels (N,) as given, poisoned ones included.
    Returns: scores (N,) >= 0, in the dtype of the values; to be compared within a class.
    Raises: TypeError, ValueError: bad input.
    Source: Tran, Li & Madry 2018, algorithm 1.
    Example: `spectral_signatures(rows, torch.zeros(8, dtype=torch.int64)).shape` is (8).
    """
    rows, y = _rows(values, y)
    scores = torch.zeros_like(rows[:, 0])
    for label in y.unique():
        mine = y == label
        away = rows[mine] - rows[mine].mean(0)
        direction = torch.linalg.svd(away, full_matrices=False).Vh[0]
        scores[mine] = (away @ direction).square()
    return scores.to(values.dtype)


def suspects(scores: Tensor, y: Tensor, *, fraction: float) -> Tensor:
    """The examples to throw out: in each class the share 1.5 `fraction` of highest score, as bool (N,).

    Args: scores, y: (N,). fraction: the share of a class that may be poisoned, in (0, 2/3).
    Source: Tran, Li & Madry 2018, who remove 1.5 times the number of poisoned examples.
    Example: `int(suspects(torch.arange(8.0), torch.zeros(8, dtype=torch.int64), fraction=0.25).sum())` is 3.
    """
    if not isinstance(scores, Tensor) or scores.shape != y.shape:
        raise ValueError(
            f"scores: got shape {tuple(getattr(scores, 'shape', ()))}, want {tuple(y.shape)}, one an example"
        )
    if not 0 < checks.nonnegative(fraction, "fraction") < 2 / 3:
        raise ValueError(f"fraction: got {fraction}, want a share in (0, 2/3)")
    found = torch.zeros_like(y, dtype=torch.bool)
    for label in y.unique():
        mine = (y == label).nonzero().squeeze(1)
        found[mine[scores[mine].argsort(descending=True)[: round(1.5 * fraction * len(mine))]]] = True
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `activation_clustering` found.

    Attributes:
        small: bool (N,), the examples in the smaller of their class's two clusters.
        table: one row a class: `label`, `size` (share in the smaller cluster), `silhouette` in [-1, 1] (1: two clear groups),
            `flagged`.
    """

    small: Tensor
    table: pd.DataFrame

    @property
    def flagged(self) -> list[int]:
        """The classes that fall into a large and a small group, the clearest first."""
        return self.table[self.table["flagged"]].sort_values("silhouette", ascending=False)["label"].tolist()


def activation_clustering(
    values: Tensor, y: Tensor, *, components: int = 10, size: float = 0.35, silhouette: float = 0.3, seed: int = 0
) -> Clusters:
    """Split the hidden features of each class in two by k-means; a small and well separated part is suspected.

    Args:
        values, y: as for `spectral_signatures`.
        components: principal components kept before clustering (>= 1).
        size, silhouette: a class is flagged if its smaller cluster has at most the share `size` of it and the mean silhouette
            is at least `silhouette`.
        seed: of k-means.
    Returns: `Clusters`.
    Raises: TypeError, ValueError: bad input, a class with fewer than three examples.
    Source: Chen et al. 2018 (who take independent components).
    Example: `activation_clustering(rows, torch.zeros(8, dtype=torch.int64)).table`.
    """
    rows, y = _rows(values, y)
    checks.positive_int(components, "components"), checks.positive_int(seed, "seed", least=0)
    small, table = torch.zeros_like(y, dtype=torch.bool), []
    for label in y.unique().tolist():
        mine = (y == label).nonzero().squeeze(1)
        if len(mine) < 3:
            raise ValueError(f"y: got {len(mine)} examples of class {label}, want at least 3 of each")
        away = rows[mine] - rows[mine].mean(0)
        along = torch.linalg.svd(away, full_matrices=False).Vh[:components]
        points = (away @ along.T).cpu().numpy()
        parts = np.zeros(len(points), dtype=int)
        if np.ptp(points) > 0:
            parts = KMeans(2, n_init=4, random_state=seed).fit_predict(points)
        less = parts == int(parts.mean() < 0.5)
        score = 0.0
        if len(set(parts)) > 1:
            score = silhouette_score(points, parts, sample_size=min(1000, len(points)), random_state=seed)
        share = float(less.mean())
        small[mine[torch.as_tensor(less, device=y.device)]] = True
        table.append((label, share, float(score), bool(share <= size and score >= silhouette)))
    return Clusters(small, pd.DataFrame(table, columns=["label", "size", "silhouette", "flagged"]))


def fine_pruning(
    model: nn.Sequential,
    clean,
    *,
    layer: int | None = None,
    drop: float = 0.02,
    tune: Callable[[nn.Module], object] | None = None,
) -> tuple[nn.Sequential, pd.DataFrame]:
    """Switch off the units that clean images use least, while the accuracy holds, then train on with what is left.

    Units of one layer go in the order of their mean activation on clean images, the sleepiest first: a backdoor that uses
    units of its own is asleep there. The weights into a unit that goes are set to zero, and its bias.

    Args:
        model: `nn.Sequential` with ReLUs; it is left exactly as it was.
        clean: trusted data, `.x` and `.y`.
        layer: index of the `Linear` or `Conv2d` whose units are pruned; the last one before the output without.
        drop: accuracy on the trusted data that may be lost to pruning (>= 0).
        tune: model -> anything, trains the pruned copy in place, e.g. by `fit` on the trusted data; not done without.
    Returns: the pruned (and tuned) copy, and one row a unit in pruning order: `unit`, `activation`, `accuracy` once it and
        all above are gone, `pruned`.
    Raises: TypeError, ValueError: bad input, a layer that has no ReLU after it.
    Source: Liu, Dolan-Gavitt & Garg 2018.
    Example: `fine_pruning(mlp(hidden=(5,)), test)[1]`.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Sequential")
    checks.model(model, checks.images(clean.x, "clean.x"))
    checks.labels(clean.y, clean.x, "clean.y"), checks.nonnegative(drop, "drop")
    prunable = [i for i in range(len(model) - 1)
                if isinstance(model[i], nn.Linear | nn.Conv2d) and isinstance(model[i + 1], nn.ReLU)]  # fmt: skip
    if not prunable or (layer is not None and layer not in prunable):
        raise ValueError(f"layer: got {layer}, want one of {prunable}, the layers with a ReLU after them")
    layer = prunable[-1] if layer is None else layer
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        before = model[: layer + 2](clean.x)
        activation = before.transpose(0, 1).flatten(1).mean(1)
        order = activation.argsort()
        keep = torch.ones_like(activation).view(-1, *[1] * (before.dim() - 2))
        rest, reached = model[layer + 2 :], []

        def accuracy() -> float:
            z = checks.logits(rest(before * keep), clean.y)
            return float((z.argmax(1) == clean.y).double().mean())

        wanted = accuracy() - drop - 1e-9
        for unit in order.tolist():
            keep[unit] = 0
            reached.append(accuracy())
        count = next((i for i, value in enumerate(reached) if value < wanted), len(reached))

    def silence() -> None:
        with torch.no_grad():
            pruned[layer].weight[order[:count]] = 0
            if pruned[layer].bias is not None:
                pruned[layer].bias[order[:count]] = 0

    silence()
    if tune is not None:
        tune(pruned)
        silence()  # training must not wake them again
    columns = {"unit": order.cpu(), "activation": activation[order].cpu(), "accuracy": reached}
    return pruned.train(model.training), pd.DataFrame(columns).assign(pruned=[i < count for i in range(len(order))])
