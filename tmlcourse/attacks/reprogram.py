"""Adversarial reprogramming: a model that can only be asked is made to do somebody else's work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, progress, randomness
from .queries import BudgetExceeded, Queries
from .zeroth_order import Mean, Problem, adam, random_directions


@dataclass(frozen=True)
class Program:
    """What `reprogram` learned: a painted frame around the data, and which of the model's classes mean which of ours.

    Attributes:
        weights: W (C, H, W); the frame shows P = tanh(W * mask), as the pixel (1 + P) / 2.
        mask: M (C, H, W), 1 on the frame and 0 where the data are.
        mapping: int64 (K,), the task's class for each class of the model.
        features: how many numbers a row has.
    """

    weights: Tensor
    mask: Tensor
    mapping: Tensor
    features: int

    def images(self, rows: Tensor) -> Tensor:
        """Rows (N, d) in [0, 1] as images (N, C, H, W): the data in the middle, the program around them."""
        return _paint(self.weights[None], self.mask, rows, torch.arange(len(rows), device=rows.device)[None])[0]

    def predict(self, predict, rows: Tensor) -> Tensor:
        """The task's class of each row (N, d), by the largest mean probability of its group of classes: int64 (N,)."""
        probabilities = _grouped(predict(self.images(rows)).detach(), self.mapping)
        return probabilities.argmax(1)


def reprogram(
    predict,
    rows: Tensor,
    y: Tensor,
    shape,
    *,
    queries: int = 20_000,
    batch: int = 32,
    q: int = 10,
    beta: float = 1.0,
    lr: float = 0.1,
    gamma: float = 2.0,
    seed: int | None = None,
) -> Program:
    """Learn one frame P = tanh(W * M) with which a model for images classifies rows of a table, by asking it alone.

    min over W of mean_i -(1 - p_i)^gamma log p_i (the focal loss), p_i the mean probability of the model's classes that stand
    for y_i. Each class of the task gets equally many of the model's, first those that the unpainted rows of that class
    excite most. The gradient comes from q random directions, one-sided, on `batch` rows; Adam moves W.

    Args:
        predict: images (N, C, H, W) -> logits (N, K), or a `Queries` around it, whose account i is row i.
        rows: table (N, d), floating point, scaled to [0, 1].
        y: int64 labels (N,), classes 0..T-1 with T <= K.
        shape: (C, H, W) of the model's images.
        queries: allowed in total, over all rows and steps (>= 1).
        batch: rows in a step; q: directions in a step; beta: length of the differences; lr: step of Adam.
        gamma: of the focal loss, >= 0; 0 is cross-entropy.
        seed: makes the result reproducible.
    Returns:
        `Program`; call its `predict` on new rows.
    Raises:
        TypeError, ValueError: bad input, before any query.
    Source: Tsai, Chen & Ho 2020 (BAR); Elsayed et al. 2019 for the white-box original.
    Example: `reprogram(model, rows, y, (1, 28, 28), seed=0).predict(model, new_rows)`.
    """
    checks.labels(y, checks.images(rows, "rows"))
    checks.positive_int(queries, "queries")  # one at least, to see how many classes the model has
    batch = min(checks.positive_int(batch, "batch"), len(rows))
    gamma, classes = checks.nonnegative(gamma, "gamma"), int(y.max()) + 1
    oracle = predict if isinstance(predict, Queries) else Queries(predict)
    estimator = random_directions(q, beta=beta, antithetic=False)
    generator = randomness.own_generator(seed, rows.device)
    rows = rows.detach().flatten(1)
    mask = frame(shape, rows.shape[1]).to(rows)
    v = rows.new_zeros(1, int(mask.sum()))  # the entries of W on the frame: nothing else is asked about

    def fill(points: Tensor) -> Tensor:
        return points.new_zeros(len(points), *shape).masked_scatter(mask.bool(), points)

    first = torch.randperm(len(rows), generator=generator, device=rows.device)[:queries]
    z = checks.logits(oracle(_paint(fill(v), mask, rows, first[None])[0], first), y[first])
    mapping = _assign(z.softmax(1), y[first], classes)

    def terms(points: Tensor, index: Tensor, which: Tensor) -> Tensor:
        pictures = _paint(fill(points), mask, rows, which)
        z = oracle(pictures.flatten(0, 1), which.flatten())
        p = _grouped(z, mapping).gather(1, y[which.flatten()][:, None]).clamp_min(1e-9)
        return (-((1 - p) ** gamma) * p.log()).view(which.shape).mean(1)

    problem = Problem(Mean(terms, len(rows), batch), estimator, generator)
    step, memory = adam(lr), {}
    steps = (queries - len(first)) // (batch * (q + 1))
    for _ in progress.bar(range(steps), desc="reprogram", unit="step"):
        try:
            v = step(problem, v, memory)
        except BudgetExceeded:
            break
    return Program(fill(v)[0], mask, mapping, rows.shape[1])


def frame(shape, features: int) -> Tensor:
    """The mask M: 1 on the frame, 0 on a square in the middle, at most two thirds as wide, a block of pixels a feature.

    Example: `frame((1, 28, 28), 30)` leaves out 18 x 18 pixels: 6 x 6 blocks of 3 x 3.
    """
    side, block = _blocks(shape, features)
    mask, (_, h, w) = torch.ones(shape), shape
    top, left = (h - side * block) // 2, (w - side * block) // 2
    mask[:, top : top + side * block, left : left + side * block] = 0
    return mask


def _blocks(shape, features: int) -> tuple[int, int]:
    side = math.isqrt(checks.positive_int(features, "features") - 1) + 1
    if side > min(shape[1:]) - 2:
        raise ValueError(f"shape: got {tuple(shape)}, too small for {features} features and a frame")
    return side, max(1, 2 * min(shape[1:]) // 3 // side)


def _paint(w: Tensor, mask: Tensor, rows: Tensor, which: Tensor) -> Tensor:
    """Programs w (R, C, H, W) around the rows which (R, b): images (R, b, C, H, W)."""
    (side, block), (_, height, width) = _blocks(mask.shape, rows.shape[1]), mask.shape
    cells = torch.zeros(*which.shape, side * side, dtype=rows.dtype, device=rows.device)
    cells[..., : rows.shape[1]] = rows[which]
    picture = cells.unflatten(2, (side, side)).repeat_interleave(block, 2).repeat_interleave(block, 3)
    top, left = (height - side * block) // 2, (width - side * block) // 2
    painted = ((1 + torch.tanh(w * mask)) / 2)[:, None].repeat(1, which.shape[1], 1, 1, 1)
    painted[..., top : top + side * block, left : left + side * block] = picture[:, :, None]
    return painted


def _grouped(z: Tensor, mapping: Tensor) -> Tensor:
    """Logits (R, K) -> for each class of the task the mean probability of the model's classes that stand for it, (R, T)."""
    member = torch.nn.functional.one_hot(mapping.clamp_min(0), int(mapping.max()) + 1).to(z) * (mapping >= 0)[:, None]
    return z.softmax(1) @ (member / member.sum(0))


def _assign(p: Tensor, y: Tensor, classes: int) -> Tensor:
    """Deal out the model's classes, floor(K / T) to each class of the task: the pair of highest lift first."""
    k = p.shape[1]
    if classes > k:
        raise ValueError(f"y: got {classes} classes, want at most {k}, the number of the model's classes")
    seen = torch.stack([p[y == t].mean(0) if (y == t).any() else p.mean(0) for t in range(classes)])
    lift = (seen / seen.mean(0).clamp_min(1e-12)).cpu()
    mapping, room = torch.full((k,), -1), torch.full((classes,), k // classes)
    for pair in lift.flatten().argsort(descending=True).tolist():
        t, source = divmod(pair, k)
        if mapping[source] < 0 and room[t] > 0:
            mapping[source], room[t] = t, room[t] - 1
    return mapping.to(p.device)
