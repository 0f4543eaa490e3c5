"""PATE: private data train teachers, teachers vote with noise, and only the votes are seen.

Each teacher has a part of the data of its own, so one record changes one vote. The student learns from public images that
the vote has labelled; whatever it does with them is post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, randomness
from .accounting import Accountant


@dataclass(frozen=True)
class Votes:
    """The labels that the noisy votes gave (N,), and what they cost; nothing else of the votes may be told."""

    labels: Tensor
    eps: float
    delta: float


def vote(ballots: Tensor, classes: int, *, sigma: float, delta: float, seed: int | None = None) -> Votes:
    """Label each image with argmax_j (n_j + N(0, sigma^2)), n_j the number of teachers that say j.

    One record moves one vote: one count falls by one, another rises by one, a distance of sqrt(2). So each answer is a
    Gaussian mechanism of noise sigma / sqrt(2), and the account adds them up. (Where nearly all teachers agree the paper
    proves much less; that bound depends on the data and must itself be made private.)

    Args:
        ballots: int64 (T, N) in [0, classes): the vote of each of T teachers on each of N images.
        classes: K >= 2.
        sigma: of the noise, in votes (> 0).
        delta: in (0, 1).
        seed: makes the noise reproducible.
    Source: Papernot et al. 2017; Papernot et al. 2018, section 4 (GNMax).
    Example: `vote(torch.tensor([[0, 1], [0, 1], [1, 1]]), 2, sigma=1.0, delta=1e-5, seed=0).labels`.
    """
    checks.positive_int(classes, "classes", least=2)
    checks.positive(sigma, "sigma")
    checks.probability(delta, "delta")
    if not isinstance(ballots, Tensor) or ballots.dtype != torch.int64 or ballots.dim() != 2 or ballots.numel() == 0:
        raise TypeError("ballots: want a non-empty torch.Tensor of int64 votes (teachers, images)")
    if ballots.min() < 0 or ballots.max() >= classes:
        raise ValueError(f"ballots: got votes outside [0, {classes - 1}]")
    counts = tally(ballots, classes)
    generator = randomness.generator(seed)
    noise = sigma * torch.randn(counts.shape, generator=generator, dtype=torch.float64)
    labels = (counts + noise.to(counts.device)).argmax(1)
    return Votes(labels, Accountant().add(sigma=sigma / 2**0.5, steps=len(labels)).eps(delta), delta)


def tally(ballots: Tensor, classes: int) -> Tensor:
    """The counts n_j (N, K) of the ballots (T, N). Not private.

    Example: `tally(torch.tensor([[0, 1], [0, 1], [1, 1]]), 2)`.
    """
    return torch.nn.functional.one_hot(ballots, classes).sum(0).double()
