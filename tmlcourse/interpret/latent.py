"""Codes: linear autoencoders, the beta-VAE, how far latents are the factors of the world, and pictures by changing them.

A decoder turns a code z into an image. The code is *disentangled* when a change of one factor of the world changes one
latent, and the change of one latent changes one factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, progress
from ..randomness import generator, seeded


@dataclass(frozen=True, eq=False)
class LinearCode:
    """x = mean + z W: `mean` (d,), orthonormal `axes` W (k, d), `shape` of an image. Made by `principal_components`.

    Example: `principal_components(x, 3).axes.shape` is (3, 784).
    """

    mean: Tensor
    axes: Tensor
    shape: torch.Size

    def encode(self, x: Tensor) -> Tensor:
        """z = (x - mean) W^T: (N, C, H, W) -> (N, k).

        Example: `principal_components(x, 3).encode(x).shape` is (8, 3).
        """
        return (x.flatten(1) - self.mean) @ self.axes.T

    def decode(self, z: Tensor) -> Tensor:
        """x = mean + z W: (N, k) -> (N, C, H, W), not clipped.

        Example: `c = principal_components(x, 3); c.decode(c.encode(x)).shape` is (8, 1, 28, 28).
        """
        return (self.mean + z @ self.axes).reshape(-1, *self.shape)


def principal_components(x: Tensor, k: int) -> LinearCode:
    """The best linear autoencoder with k latents: min over encoders and decoders of sum ||x - decode(encode(x))||^2.

    The minimum is the sum of the squared singular values of the centred images beyond the k-th; the first k right singular
    vectors reach it.

    Args: x: images (N, ...) in [0, 1]; 1 <= k <= min(N, d).
    Returns: `LinearCode`, the axes in the order of their variance, each with its largest entry positive.
    Raises: TypeError, ValueError: bad input.
    Sources: Eckart & Young 1936; Baldi & Hornik 1989 for the autoencoder.
    Example: `principal_components(x, 2).encode(x).shape` is (8, 2).
    """
    rows = checks.images(x).flatten(1)
    if checks.positive_int(k, "k") > min(rows.shape):
        raise ValueError(
            f"k: got {k}, want at most {min(rows.shape)}, the smaller side of the images {tuple(rows.shape)}"
        )
    mean = rows.mean(0)
    _, _, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = axes[:k] * axes[:k].gather(1, axes[:k].abs().argmax(1, keepdim=True)).sign()
    return LinearCode(mean, axes, x.shape[1:])


class VAE(nn.Module):
    """A variational autoencoder of fully connected layers: q(z | x) = N(m(x), diag v(x)), image = sigmoid(decoder(z)).

    Trained by `beta_vae`.
    Example: `VAE((1, 28, 28), 4, 16).decode(torch.zeros(2, 4)).shape` is (2, 1, 28, 28).
    """

    def __init__(self, shape: Sequence[int], latents: int, hidden: int):
        super().__init__()
        self.shape, d = tuple(shape), math.prod(shape)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                     nn.Linear(hidden, 2 * latents))  # fmt: skip
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                     nn.Linear(hidden, d), nn.Sigmoid())  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x): (N, C, H, W) -> 2 x (N, latents).

        Example: `VAE((1, 28, 28), 4, 16)(x)[0].shape` is (8, 4).
        """
        return self.encoder(x).chunk(2, dim=1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): (N, C, H, W) -> (N, latents).

        Example: `VAE((1, 28, 28), 4, 16).encode(x).shape` is (8, 4).
        """
        return self(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The image of a code: (N, latents) -> (N, C, H, W) in [0, 1].

        Example: `VAE((1, 28, 28), 4, 16).decode(torch.randn(2, 4)).shape` is (2, 1, 28, 28).
        """
        return self.decoder(z).reshape(-1, *self.shape)


def elbo(
    model: VAE, x: Tensor, *, sigma: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The two terms of the beta-VAE's bound: -log p(x | z) with z drawn from q(z | x), and KL(q(z | x) || N(0, I)).

    The first is ||x - decode(z)||^2 / (2 sigma^2), without its constant; the second sum_j (m_j^2 + v_j - log v_j - 1) / 2.
    Returns: 2 x (N,).
    Source: Kingma & Welling 2014.
    Example: `elbo(VAE((1, 28, 28), 4, 16), x)[1].shape` is (8,).
    """
    mean, log_var = model(x)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    drawn = model.decoder(mean + noise * (log_var / 2).exp())
    error = (drawn - x.flatten(1)).square().sum(1) / (2 * sigma**2)
    return error, 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1)


def beta_vae(
    x: Tensor,
    *,
    latents: int = 4,
    beta: float = 4.0,
    start: float = 100.0,
    steps: int = 2500,
    batch_size: int = 64,
    hidden: int = 128,
    lr: float = 3e-3,
    sigma: float = 0.15,
    seed: int | None = None,
) -> VAE:
    """Train a beta-VAE: min -E log p(x | z) + beta KL(q(z | x) || N(0, I)).

    A large beta makes a latent expensive: it is used only if it explains much, and alone. Beta falls from `start` * beta to
    beta over the first seven tenths of the steps, so that latents come into use one after the other, the most useful
    factor first.

    Args:
        x: images (N, C, H, W) in [0, 1].
        latents, hidden: sizes (>= 1) of the code and of the hidden layers.
        beta: > 0; 1 is the ordinary VAE. start: >= 1; 1 keeps beta constant.
        steps, batch_size, lr: of Adam, with a learning rate that rises and falls once.
        sigma: standard deviation of a pixel about the decoder's answer (> 0).
        seed: of the weights, the batches and the noise; torch's own generator without it.
    Returns: `VAE` in evaluation mode, on the device of x; its parameters no longer ask for gradients.
    Raises: TypeError, ValueError: bad input.
    Sources: Higgins et al. 2017; Burgess et al. 2018 for latents that enter one by one.
    Example: `beta_vae(x, steps=2, seed=0).encode(x).shape` is (8, 4).
    """
    checks.images(x)
    for value, name in ((latents, "latents"), (steps, "steps"), (batch_size, "batch_size"), (hidden, "hidden")):
        checks.positive_int(value, name)
    for value, name in ((beta, "beta"), (start, "start"), (lr, "lr"), (sigma, "sigma")):
        checks.positive(value, name)
    if start < 1:
        raise ValueError(f"start: got {start}, want a factor >= 1")
    with seeded(seed):
        model = VAE(x.shape[1:], latents, hidden).to(x)
    draw = generator(seed, x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in progress.bar(range(steps), desc="beta-VAE"):
        batch = x[torch.randint(len(x), (batch_size,), generator=draw, device=x.device)]
        with torch.enable_grad():
            error, kl = elbo(model, batch, sigma=sigma, generator=draw)
            now = beta * start ** max(0.0, 1 - step / (0.7 * steps))
            (error + now * kl).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.requires_grad_(False).eval()


def mutual_information(codes: Tensor, factors: Tensor, *, bins: int = 10) -> Tensor:
    """I(z_j; v_k) / H(v_k): which share of each factor's entropy each latent knows, in [0, 1].

    Both are cut into `bins` parts: a factor with at most so many values by value, everything else by rank.

    Args: codes (N, L), factors (N, F), finite; bins >= 2.
    Returns: (L, F), float64.
    Raises: TypeError, ValueError: bad input, a factor that never changes.
    Example: `mutual_information(torch.randn(50, 3), torch.rand(50, 2)).shape` is (3, 2).
    """
    checks.positive_int(bins, "bins", least=2)
    for value, name in ((codes, "codes"), (factors, "factors")):
        if not isinstance(value, Tensor) or value.dim() != 2 or not torch.isfinite(value).all():
            raise ValueError(
                f"{name}: got {getattr(value, 'shape', type(value).__name__)}, want a finite tensor (N, columns)"
            )
    if len(codes) != len(factors):
        raise ValueError(f"factors: got {len(factors)} rows, want {len(codes)}, one a code")
    z, v = _binned(codes, bins), _binned(factors, bins)
    joint = torch.einsum("njz,nkv->jkzv", F.one_hot(z, bins).double(), F.one_hot(v, bins).double()) / len(z)
    entropy = -torch.xlogy(joint.sum(2), joint.sum(2)).sum(-1)
    if (constant := (factors == factors[0]).all(0)).any():
        raise ValueError(f"factors: column {int(constant.long().argmax())} never changes, want factors that do")
    apart = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((2, 3)).clamp_min(0) / entropy


def _binned(values: Tensor, bins: int) -> Tensor:
    """The part in which each value lies, in [0, bins): its number among the values, or its rank."""
    columns = []
    for column in values.T:
        kinds, index = column.unique(return_inverse=True)
        ranks = column.argsort(stable=True).argsort()
        columns.append(index if len(kinds) <= bins else ranks * bins // len(ranks))
    return torch.stack(columns, dim=1)


def mutual_information_gap(codes: Tensor, factors: Tensor, *, bins: int = 10) -> Tensor:
    """MIG: for each factor, what the latent that knows it best knows beyond the second best; 1 for one latent a factor.

    mean_k [I(z_(1); v_k) - I(z_(2); v_k)] / H(v_k) is the score; this returns its terms. 0 where two latents share a factor
    equally. It does not punish a latent that knows two factors: look at `mutual_information`, too.

    Args, errors: as for `mutual_information`, with at least two latents.
    Returns: (F,) in [0, 1], float64.
    Source: Chen et al. 2018.
    Example: `mutual_information_gap(torch.randn(50, 3), torch.rand(50, 2)).mean()`.
    """
    shares = mutual_information(codes, factors, bins=bins)
    if len(shares) < 2:
        raise ValueError(f"codes: got {len(shares)} latent, want at least 2")
    first, second = shares.topk(2, dim=0).values
    return first - second


def single_change(before: Tensor, after: Tensor) -> Tensor:
    """How far a change of the world is one of a single latent: the largest share of sum_j (z'_j - z_j)^2 that one has.

    before, after: codes (N, L) of images that differ in one factor. Returns (N,) in [1/L, 1]; 1/L where nothing changes.
    Source: after Higgins et al. 2017 and Kim & Mnih 2018, who fix one factor and let the others change.
    Example: `single_change(torch.zeros(2, 3), torch.eye(3)[:2])`.
    """
    if before.shape != after.shape or before.dim() != 2:
        raise ValueError(f"after: got shape {tuple(after.shape)}, want {tuple(before.shape)}, two dimensions")
    change = (after - before).square()
    whole = change.sum(1)
    return torch.where(whole > 0, change.amax(1) / whole.clamp_min(torch.finfo(whole.dtype).tiny), 1 / change.shape[1])


def transfer(model, x: Tensor, donors: Tensor, latents: int | Sequence[int]) -> Tensor:
    """Images x with some latents of their donors: decode(z with z_j replaced by z'_j for j in `latents`).

    Args: model: with `encode` and `decode`, such as `VAE` or `LinearCode`; x, donors: images (N, C, H, W); latents: indices.
    Returns: (N, C, H, W).
    Raises: ValueError: other shapes, a latent that does not exist.
    Source: Zhang et al. 2019 (swapping blocks of latents).
    Example: `transfer(principal_components(x, 3), x, x.flip(0), 0).shape` is (8, 1, 28, 28).
    """
    checks.same_shape(donors, checks.images(x), "donors")
    z, other = model.encode(x).clone(), model.encode(checks.images(donors, "donors"))
    latents = [latents] if isinstance(latents, int) else list(latents)
    if not latents or not all(0 <= j < z.shape[1] for j in latents):
        raise ValueError(f"latents: got {latents}, want some of 0 ... {z.shape[1] - 1}")
    z[:, latents] = other[:, latents]
    return model.decode(z)


def traverse(model, x: Tensor, latent: int, values: Sequence[float]) -> Tensor:
    """One image with one latent set to each of the values, all others as they are: (1, C, H, W) -> (len(values), C, H, W).

    Raises: ValueError: more than one image, no values, a latent that does not exist.
    Example: `traverse(principal_components(x, 3), x[:1], 0, [-1.0, 0.0, 1.0]).shape` is (3, 1, 28, 28).
    """
    if len(checks.images(x)) != 1 or not len(values):
        raise ValueError(f"x, values: got {len(x)} images and {len(values)} values, want one image and some values")
    z = model.encode(x).repeat(len(values), 1)
    if not 0 <= latent < z.shape[1]:
        raise ValueError(f"latent: got {latent}, want one of 0 ... {z.shape[1] - 1}")
    z[:, latent] = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    return model.decode(z)
