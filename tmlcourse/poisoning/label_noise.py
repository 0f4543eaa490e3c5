"""Label noise and losses that answer it: exact on average, through the noise, by trust in easy examples, and an SVM's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, randomness
from .learners import Learner


def transition(noise: float | Tensor, classes: int) -> Tensor:
    """The matrix T of label noise, T_ij = P(observed label j | true label i), in double precision.

    Args:
        noise: the probability in [0, 1] that a label is replaced, each other class being as likely; or T itself (K, K).
        classes: K >= 2.
    Raises: TypeError, ValueError: bad input, rows that are no probabilities.
    Source: Natarajan et al. 2013 (K = 2: rho_+ = T_10, rho_- = T_01 for classes 0 = minus, 1 = plus); Patrini et al. 2017.
    Example: `float(transition(0.3, 4)[0, 0])`.
    """
    checks.positive_int(classes, "classes", least=2)
    if not isinstance(noise, Tensor):
        rate = checks.nonnegative(noise, "noise")
        if rate > 1:
            raise ValueError(f"noise: got {noise}, want a probability in [0, 1] or a matrix ({classes}, {classes})")
        T = torch.full((classes, classes), rate / (classes - 1), dtype=torch.float64)
        return T.fill_diagonal_(1 - rate)
    T = noise.detach().double().cpu()
    if T.shape != (classes, classes):
        raise ValueError(f"noise: got shape {tuple(T.shape)}, want ({classes}, {classes})")
    if not (T >= 0).all() or not torch.allclose(T.sum(1), torch.ones(classes, dtype=T.dtype), atol=1e-6):
        raise ValueError("noise: got rows that are no probabilities, want entries >= 0 that sum to 1 in each row")
    return T


def noisy_labels(y: Tensor, noise: float | Tensor, *, classes: int, seed: int | None = None) -> Tensor:
    """Labels redrawn independently of one another, the new one j with probability T_yj.

    Args:
        y: int64 labels (n,) below `classes`; noise: as for `transition`.
        seed: makes the draw reproducible; without it torch's own generator is used.
    Returns: int64 labels (n,) on the device of y.
    Raises: TypeError, ValueError: bad input.
    Source: Angluin & Laird 1988 (classification noise).
    Example: `int((noisy_labels(y, 0.0, classes=2, seed=0) != y).sum())` is 0.
    """
    T = transition(noise, classes)
    _below(checks.labels(y, y), classes)
    generator = randomness.generator(seed)
    return torch.multinomial(T[y.cpu()], 1, generator=generator).squeeze(1).to(y.device)


def unbiased_loss(noise: float | Tensor, classes: int) -> Callable:
    """A loss on noisy labels whose mean over the noise is the cross-entropy on the true ones, for `training.fit`.

        l~(z, j) = sum_k (T^-1)_jk l(z, k),    so that  sum_j T_ij l~(z, j) = l(z, i)  for every i and z

    With two classes it is Natarajan's ((1 - rho_{-y}) l(z, y) - rho_y l(z, -y)) / (1 - rho_+ - rho_-). It can be negative
    and has no lower bound: a network that can fit single labels drives it down for ever, a linear one cannot.

    Args: noise: as for `transition`, with T invertible; classes: K >= 2.
    Returns: (model, x, y) -> (mean of l~, logits).
    Raises: TypeError, ValueError: bad input, or noise that leaves nothing to learn (T singular).
    Source: Natarajan et al. 2013, lemma 1; Patrini et al. 2017, theorem 1.
    Example: `unbiased_loss(0.2, 10)(model, test.x, test.y)[0].shape`.
    """
    T = transition(noise, classes)
    if torch.linalg.cond(T) > 1e6:
        raise ValueError("noise: got a singular matrix (observed labels say nothing), want one that can be inverted")
    weights = torch.linalg.inv(T)

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = _logits(model, x, y, classes)
        return -(weights.to(z)[y] * z.log_softmax(1)).sum(1).mean(), z

    return loss


def forward_loss(noise: float | Tensor, classes: int) -> Callable:
    """The likelihood of the noisy label under the model and then the noise: -log sum_i p_i(x) T_ij, for `training.fit`.

    It is never negative, and least where p is the true conditional probability; unlike `unbiased_loss`, it is not equal to
    the clean loss on average.

    Args, returns, errors: as for `unbiased_loss`; T need not be invertible.
    Source: Patrini et al. 2017, theorem 2.
    Example: `forward_loss(0.2, 10)(model, test.x, test.y)[0].shape`.
    """
    log_T = transition(noise, classes).log()

    def loss(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = _logits(model, x, y, classes)
        return -torch.logsumexp(z.log_softmax(1) + log_T.to(z).t()[y], 1).mean(), z

    return loss


def co_teaching(noise: float, *, ramp: float = 0.3) -> Callable:
    """Two networks, each trained on the examples that the *other* finds easiest, for `training.fit`.

    Networks learn what is regular first; examples of large loss are then likely to be the mislabelled ones. Of each batch a
    share `noise` is left out, coming in linearly over the first `ramp` of training.

    Args: noise: the share in [0, 1) of labels thought wrong; ramp: in (0, 1].
    Returns: (model, x, y, progress) -> (sum of both losses, mean logits); the model is `nn.ModuleList([first, second])`.
    Raises: TypeError, ValueError: bad input.
    Source: Han et al. 2018, algorithm 1.
    Example: `training.fit(torch.nn.ModuleList([models.linear(), models.linear()]), data, loss=co_teaching(0.2), epochs=1)`.
    """
    if checks.nonnegative(noise, "noise") >= 1:
        raise ValueError(f"noise: got {noise}, want a share in [0, 1): something must remain")
    if not 0 < checks.nonnegative(ramp, "ramp") <= 1:
        raise ValueError(f"ramp: got {ramp}, want a share of training in (0, 1]")

    def loss(model, x: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        if not isinstance(model, nn.ModuleList) or len(model) != 2:
            raise TypeError(f"model: got {type(model).__name__}, want nn.ModuleList([first, second])")
        z = [net(x) for net in model]
        losses = [F.cross_entropy(one, y, reduction="none") for one in z]
        keep = max(1, math.ceil((1 - noise * min(progress / ramp, 1)) * len(x)))
        easy = [one.detach().topk(keep, largest=False).indices for one in losses]
        return losses[0][easy[1]].mean() + losses[1][easy[0]].mean(), (z[0] + z[1]) / 2

    return loss


def noise_svm(C: float = 1.0, *, flip: float, smooth: float = 1e-6) -> Learner:
    """The support vector machine that expects each label to be flipped with probability `flip`, by its dual.

        min_a  a^T E[Q~] a / 2 - sum_i a_i   subject to  0 <= a_i <= C,  sum_i a_i y_i = 0,
        Q~_ij = y~_i y~_j x_i.x_j,   E[Q~]_ij = (1 - 2 flip)^2 Q_ij for i != j,   E[Q~]_ii = Q_ii

    That is the SVM with the kernel s x.x' + (1 - s) |x|^2 [x is x'], s = (1 - 2 flip)^2: no single example can be trusted
    with much weight. flip = 0 is `svm(C)`.

    Args: C > 0; flip in [0, 1/2); smooth > 0, as for `svm`.
    Returns: a `Learner` with labels -1 and 1, for `fit` and `flip_labels`.
    Raises: TypeError, ValueError: bad input.
    Source: Biggio, Nelson & Laskov 2011, section 3.
    Example: `noise_svm(1.0, flip=0.1).signs`.
    """
    for name, value in (("C", C), ("smooth", smooth)):
        checks.positive(value, name)
    if checks.nonnegative(flip, "flip") >= 0.5:
        raise ValueError(f"flip: got {flip}, want a probability in [0, 0.5): beyond it labels mislead")
    s = (1 - 2 * flip) ** 2

    def weights(a: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return (a * y) @ X

    def objective(a: Tensor, X: Tensor, y: Tensor) -> Tensor:
        own = (1 - s) * (a.square() * y.square() * X.square().sum(1)).sum()
        return (s * weights(a, X, y).square().sum() + own + smooth * a.square().sum()) / 2 - a.sum()

    return Learner(
        "SVM for noisy labels",
        objective,
        inequality=lambda a, X, y: torch.cat([-a, a - C]),
        equality=lambda a, X, y: (a @ y).reshape(1),
        start=lambda X, y: torch.full_like(y, C / 2),
        model=lambda a, mu, X, y: torch.cat([s * weights(a, X, y), mu]),
        signs=True,
    )


def _below(y: Tensor, classes: int) -> None:
    if y.max() >= classes:
        raise ValueError(f"y: got label {y.max().item()}, want labels in [0, {classes - 1}]")


def _logits(model, x: Tensor, y: Tensor, classes: int) -> Tensor:
    z = model(x)
    if z.shape != (len(y), classes):
        raise ValueError(f"model: got output {tuple(z.shape)}, want logits ({len(y)}, {classes})")
    return z
