"""Randomised smoothing: a classifier that votes over noise, and the L2 ball in which noise alone proves its vote.

The smoothed classifier answers with the class that the model gives most often to x plus Gaussian noise:

    g(x) = argmax_c P(h(x + e) = c),  e ~ N(0, sigma^2 I)

If class A has probability p_A > 1/2, then g answers A everywhere within sigma Phi^-1(p_A) of x, whatever the model is. The
probability itself can only be estimated, so a certificate holds with probability 1 - alpha over the draw of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from scipy.special import bdtrc, ndtri
from torch import Tensor

from .. import checks, progress, randomness
from ..intervals import clopper_pearson


@dataclass(frozen=True)
class Smoothed:
    """What `smooth` knows of each image.

    Attributes:
        label: the smoothed classifier's answer (N,), int64; -1 where it abstains.
        radius: Euclidean distance within which the answer cannot change (N,), float64; 0 where it abstains.
        lower: lower confidence bound of the answer's probability under noise (N,), float64, also where it abstains.
    """

    label: Tensor
    radius: Tensor
    lower: Tensor


def smooth(
    model,
    x: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int | None = None,
) -> Smoothed:
    """The smoothed classifier's answers with their certified radii (CERTIFY).

        A = most frequent class of n0 noisy copies;  k = how many of n fresh copies are A
        p_A >= lower = the alpha quantile of Beta(k, n - k + 1)      (Clopper-Pearson, one-sided)
        radius = sigma Phi^-1(lower)  if lower > 1/2, else abstain

    The two draws are separate: a class chosen and counted on the same copies would look more frequent than it is.

    Args:
        model: returns logits (N, K); in evaluation mode. It sees pixels outside [0, 1], since the noise is not clipped.
        x: images (N, ...) in [0, 1].
        sigma: standard deviation of the noise, in pixel intensity (> 0).
        n0, n: noisy copies of each image for the choice and for the estimate (>= 1).
        alpha: probability, for each image, that its certificate is wrong, in (0, 1).
        batch_size: noisy copies that the model sees at once.
        seed: makes the result reproducible (for one batch size) and leaves torch's generator as it was.
    Returns:
        `Smoothed`. With n copies the radius is at most sigma Phi^-1(alpha^(1/n)), however sure the model is.
    Raises:
        TypeError, ValueError: bad input, before any work.
    Source: Cohen, Rosenfeld & Kolter 2019, algorithm CERTIFY and theorem 1; Clopper & Pearson 1934.
    Example: `smooth(model, x, 0.25, n=100, seed=0).radius`.
    """
    checks.positive_int(n0, "n0")
    draw = _drawer(model, x, sigma, n, alpha, batch_size, seed)
    with progress.bar(total=len(x) * (n0 + n), desc="smooth", unit="copy") as bar:
        chosen = draw(n0, bar).argmax(1, keepdim=True)
        hits = draw(n, bar).gather(1, chosen).squeeze(1)
    lower = torch.from_numpy(clopper_pearson(hits.cpu().numpy(), n, 1 - 2 * alpha)[0]).to(x.device)  # one end alone
    sure = lower > 0.5
    radius = torch.from_numpy(ndtri(lower.clamp_min(0.5).cpu().numpy())).to(x.device) * sigma
    return Smoothed(torch.where(sure, chosen.squeeze(1), -1), radius, lower)


def predict_smoothed(
    model,
    x: Tensor,
    sigma: float,
    *,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int | None = None,
) -> Tensor:
    """The smoothed classifier's answers without a radius (PREDICT): int64 (N,), -1 where it abstains.

    With k_A and k_B counts of the two most frequent classes, A is answered if a fair coin would seldom fall so unevenly:

        P(max(B, k_A + k_B - B) >= k_A) <= alpha,  B ~ Binomial(k_A + k_B, 1/2)

    Another answer than the true g(x) comes with probability at most alpha. Arguments: see `smooth`.

    Source: Cohen, Rosenfeld & Kolter 2019, algorithm PREDICT; Hung & Fithian 2019.
    Example: `predict_smoothed(model, x, 0.25, n=100, seed=0)`.
    """
    draw = _drawer(model, x, sigma, n, alpha, batch_size, seed)
    with progress.bar(total=len(x) * n, desc="smooth", unit="copy") as bar:
        votes, labels = draw(n, bar).topk(2, dim=1)
    first, second = votes.cpu().numpy().T
    chance = 2 * bdtrc(first - 1, first + second, 0.5)  # twice P(Binomial >= first): above 1 on a tie
    return torch.where(torch.from_numpy(chance <= alpha).to(x.device), labels[:, 0], -1)


def certified_accuracy(smoothed: Smoothed, y: Tensor, radii) -> pd.DataFrame:
    """Share of images that are answered rightly with a certified radius of at least r, for each r.

        (1/N) sum_i 1[g(x_i) = y_i and radius_i >= r]

    Args:
        smoothed: from `smooth`. y: int64 labels (N,). radii: numbers >= 0.
    Returns:
        Table with columns radius and certified_accuracy. An image that abstains counts nowhere.
    Source: Cohen, Rosenfeld & Kolter 2019, section 4.
    Example: `certified_accuracy(smooth(model, x, 0.25, n=100), y, [0.0, 0.25, 0.5])`.
    """
    checks.labels(y, smoothed.radius)
    right = smoothed.label == y
    radii = [checks.nonnegative(float(r), "radii") for r in radii]
    shares = [(right & (smoothed.radius >= r)).double().mean().item() for r in radii]
    return pd.DataFrame({"radius": radii, "certified_accuracy": shares})


def _drawer(model, x, sigma, n, alpha, batch_size, seed):
    """After the input checks: draw(count, bar) -> how often each class is the answer to `count` noisy copies, (N, K)."""
    checks.model(model, checks.images(x))
    if checks.nonnegative(sigma, "sigma") == 0:
        raise ValueError("sigma: got 0, want a number > 0: without noise nothing is certified")
    checks.positive_int(n, "n")
    checks.positive_int(batch_size, "batch_size")
    if not 0 < checks.nonnegative(alpha, "alpha") < 1:
        raise ValueError(f"alpha: got {alpha}, want a number in (0, 1)")
    generator = randomness.generator(seed, x.device)

    @torch.no_grad()
    def draw(count: int, bar) -> Tensor:
        votes = None
        for first in range(0, len(x) * count, batch_size):
            last = min(first + batch_size, len(x) * count)
            image = torch.arange(first, last, device=x.device) // count
            noise = torch.randn((len(image), *x.shape[1:]), generator=generator, dtype=x.dtype, device=x.device)
            z = checks.logits(model(x[image] + sigma * noise), image.new_zeros(len(image)))
            votes = image.new_zeros(len(x), z.shape[1]) if votes is None else votes
            votes.index_put_((image, z.argmax(1)), image.new_ones(()), accumulate=True)
            bar.update(len(image))
        return votes

    return draw
