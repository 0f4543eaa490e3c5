"""Neural Cleanse: rebuild the trigger from the network alone, tell whether there is one, and train it away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress, randomness, tables
from .triggers import Trigger


@dataclass(frozen=True, eq=False)
class Cleansed:
    """What `neural_cleanse` found.

    Attributes:
        mask: (K, 1, H, W), pattern: (K, C, H, W): the smallest trigger found for each class.
        table: one row a class: `label`, `norm` = ||m||_1 in pixels, `index` (of the norms, as in the paper), `log_index` (of
            their logarithms), `success` on the given images, `flagged`.
    """

    mask: Tensor
    pattern: Tensor
    table: pd.DataFrame

    @property
    def flagged(self) -> list[int]:
        """The classes with a suspiciously small trigger, most suspicious first."""
        return self.table[self.table["flagged"]].sort_values("norm")["label"].tolist()

    def trigger(self, label: int) -> Trigger:
        """The trigger found for one class."""
        return Trigger(self.mask[label], self.pattern[label])


def anomaly_index(values: Tensor, *, least: float = 0.0) -> Tensor:
    """|v - median v| / (1.4826 median |v - median v|): how many robust standard deviations from the middle, (K,) -> (K,).

    The median of an even number of values is the mean of the middle two. `least`: a smaller spread counts as this much; where
    the spread is 0, so is every index.
    Source: Hampel 1974; Wang et al. 2019, section IV-C.
    Example: `anomaly_index(torch.tensor([1.0, 9.0, 10.0, 11.0, 12.0]))[0] > 5`.
    """
    if not isinstance(values, Tensor) or values.dim() != 1 or not len(values) or not values.is_floating_point():
        raise ValueError(
            f"values: got {getattr(values, 'shape', type(values).__name__)}, want floating-point numbers (K,)"
        )
    away = (values - values.quantile(0.5)).abs()
    spread = (1.4826 * away.quantile(0.5)).clamp_min(checks.nonnegative(least, "least"))
    return torch.where(spread > 0, away / spread.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


def neural_cleanse(
    model,
    x: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.1,
    lam: float = 1e-3,
    success: float = 0.99,
    threshold: float = 3.0,
    batch_size: int = 32,
    seed: int | None = None,
) -> Cleansed:
    """For each class the smallest trigger that sends all images there; a class for which it is far smaller has a backdoor.

        min over m, p  of  mean_x l(h((1 - m) x + m p), k) + lam_k ||m||_1      for all classes k at once, by Adam

    Every ten steps lam_k rises by 1.5 where the share of images sent to k is at least `success`, and falls by 1.5^1.5 where
    it is not; the smallest mask that had it is kept.

    The paper flags a norm below the median whose anomaly index is above 2. With ten classes that is brittle: one is easy to
    reach and one hard, the spread is wide, and four pixels among masks of fifty are not two spreads away. Norms differ by
    factors, so `flagged` looks at their logarithms: index above `threshold`, a spread under 20 % counted as 20 %.

    Args:
        model: returns logits (N, K); in evaluation mode. It is left exactly as it was.
        x: a few clean images (N, C, H, W) of all classes; no labels are needed.
        steps: of Adam (>= 10). lr: its rate. lam: first weight of the norm (> 0).
        success: share in (0, 1]. threshold: of the logarithms' index.
        batch_size: images a step, each with all K triggers.
        seed: makes the result reproducible; torch's own generator without.
    Returns: `Cleansed`. A class that no trigger reached keeps its last mask, and its `success` says so.
    Raises: TypeError, ValueError: bad input.
    Source: Wang et al. 2019.
    Example: `neural_cleanse(model, test.x, steps=10, seed=0).table`.
    """
    checks.model(model, checks.images(x))
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")
    checks.positive_int(steps, "steps", least=10), checks.positive_int(batch_size, "batch_size")
    for name, value in (("lr", lr), ("lam", lam), ("success", success)):
        checks.positive(value, name)
    if success > 1:
        raise ValueError(f"success: got {success}, want a share in (0, 1]")
    checks.nonnegative(threshold, "threshold")
    x = x.detach()
    with torch.no_grad():
        classes = checks.logits(model(x[:1]), torch.zeros(1, dtype=torch.int64, device=x.device)).shape[1]
    generator = randomness.own_generator(seed, x.device)

    def stamped(batch: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        """(K, ...) triggers on (n, ...) images: (K n, ...)."""
        return torch.lerp(batch[None], pattern[:, None], mask[:, None]).flatten(0, 1)

    def goal(n: int) -> Tensor:
        return torch.arange(classes, device=x.device).repeat_interleave(n)

    raw = [torch.randn(classes, c, *x.shape[2:], generator=generator, dtype=x.dtype, device=x.device) / 10
           for c in (1, x.shape[1])]  # fmt: skip
    raw = [r.requires_grad_() for r in raw]
    optimiser = torch.optim.Adam(raw, lr=lr, betas=(0.5, 0.9))
    weight = x.new_full((classes,), lam)
    best = [torch.sigmoid(r.detach()) for r in raw]
    smallest, hits = x.new_full((classes,), torch.inf), x.new_zeros(classes)
    n = min(batch_size, len(x))
    for t in progress.bar(range(1, steps + 1), desc="Neural Cleanse", unit="step"):
        batch = x[torch.randint(len(x), (n,), generator=generator, device=x.device)]
        with torch.enable_grad():
            now = [torch.sigmoid(r) for r in raw]
            z = model(stamped(batch, *now))
            norm = now[0].flatten(1).sum(1)
            value = F.cross_entropy(z, goal(n), reduction="sum") / n + (weight * norm).sum()
            grads = torch.autograd.grad(value, raw)
        hits += (z.detach().argmax(1) == goal(n)).view(classes, n).to(x.dtype).mean(1) / 10
        if t % 10 == 0:
            reached = hits >= success - 1e-6
            better = reached & (norm.detach() < smallest)
            for kept, new in zip(best, now, strict=True):
                kept[better] = new.detach()[better]
            smallest[better] = norm.detach()[better]
            weight = torch.where(reached, weight * 1.5, weight / 1.5**1.5)
            hits.zero_()
        for r, grad in zip(raw, grads, strict=True):
            r.grad = grad
        optimiser.step()
    lost = smallest.isinf()
    for kept, last in zip(best, raw, strict=True):
        kept[lost] = torch.sigmoid(last.detach())[lost]
    norms = best[0].flatten(1).sum(1)
    with torch.no_grad():
        answers = torch.cat(
            [model(stamped(part, *best)).argmax(1).view(classes, -1) for part in x.split(batch_size)], 1
        )
    reached = (answers == torch.arange(classes, device=x.device)[:, None]).double().mean(1)
    norms = norms.double()
    logs = anomaly_index(norms.clamp_min(1e-12).log(), least=0.2)
    flagged = (logs > threshold) & (norms < norms.quantile(0.5))
    columns = {"norm": norms, "index": anomaly_index(norms), "log_index": logs, "success": reached, "flagged": flagged}
    table = pd.DataFrame({"label": range(classes)} | {name: value.cpu().numpy() for name, value in columns.items()})
    return Cleansed(best[0], best[1], table)


def unlearning(trigger: Trigger, *, share: float = 0.2) -> Callable:
    """A loss for `fit` that trains a backdoor away: a share of each batch is stamped and keeps its true labels.

    Args:
        trigger: as `neural_cleanse` found it, or the true one. share: of a batch, in (0, 1].
    Returns: a loss for `fit`; it draws from torch's generator, so `fit(..., seed=...)` reproduces it.
    Raises: TypeError, ValueError: bad input.
    Source: Wang et al. 2019, section VI-B, who take one pass over a tenth of the training data and stamp a fifth of it.
    Example: `training.fit(model, train, loss=unlearning(pixel_trigger((1, 28, 28))), epochs=1)`.
    """
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger: got {type(trigger).__name__}, want a Trigger")
    if not 0 < checks.nonnegative(share, "share") <= 1:
        raise ValueError(f"share: got {share}, want a number in (0, 1]")

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (torch.rand(len(x)) < share).to(x.device)
        z = model(torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), trigger.stamp(x), x))
        return F.cross_entropy(z, y), z

    return loss


def shipped_table(name: str = "neural-cleanse") -> pd.DataFrame:
    """What `neural_cleanse` says of forty networks, half of them with a planted backdoor, one row a network.

    Columns: data, seed, planted, target (the class planted), accuracy, success of the planted trigger, norm and median_norm
    of the triggers found, index and log_index, flagged (the classes, as text), flagged_by_paper (by the index of the norms),
    covered, cosine (found mask and true one). Written by benchmarks/neural_cleanse.py.

    Raises:
        ValueError: no such table; the message lists those that there are.
    Example: `shipped_table().groupby("planted").norm.median()`.
    """
    return tables.shipped(__file__, name, keep_default_na=False)
