"""Explanations that only ask the model: LIME on superpixels and tables, its exact sibling the Shapley value, anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, progress, randomness
from ..intervals import clopper_pearson
from .common import selected, targets

_CHUNK = 512  # images sent through the model at once
Game = Callable[[Tensor], Tensor]


# ---- superpixels


def grid(shape, cell: int = 4) -> Tensor:
    """Square superpixels: int64 (H, W), numbered from 0 row by row; the last ones are smaller where `cell` does not divide.

    Args: shape: of images, (..., H, W); cell: side in pixels, >= 1.
    Raises: TypeError, ValueError: bad input.
    Example: `grid((1, 28, 28), 7).max() + 1`.
    """
    checks.positive_int(cell, "cell")
    h, w = shape[-2:]
    columns = math.ceil(w / cell)
    return (torch.arange(h) // cell)[:, None] * columns + torch.arange(w) // cell


def slic(x: Tensor, *, cell: int = 6, compactness: float = 0.5, steps: int = 5) -> Tensor:
    """Superpixels that follow the colours: k-means of pixels in (colour, place), started from a grid.

    distance^2 = ||colour - colour_k||^2 + compactness^2 ||place - place_k||^2 / cell^2

    Args: x: images (N, C, H, W) in [0, 1]; cell: about the side of a superpixel; compactness >= 0: large gives squares.
    Returns: int64 (N, H, W); a number may be in no pixel.
    Raises: TypeError, ValueError: bad input.
    Source: Achanta et al. 2012, without the limit on where a cluster may reach.
    Example: `slic(x, cell=7).shape`.
    """
    _four(checks.images(x))
    scale = checks.nonnegative(compactness, "compactness") / checks.positive_int(cell, "cell")
    checks.positive_int(steps, "steps")
    n, _, h, w = x.shape
    rows, columns = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    place = scale * torch.stack([rows, columns]).to(x).expand(n, -1, -1, -1)
    pixels = torch.cat([x, place], 1).flatten(2).transpose(1, 2)  # (N, HW, C + 2)
    owner = grid(x.shape, cell).to(x.device).flatten().expand(n, -1)
    count = int(owner.max()) + 1
    for _ in range(steps):
        member = F.one_hot(owner, count).to(x)
        size = member.sum(1)[:, :, None]
        centres = torch.where(size > 0, member.transpose(1, 2) @ pixels / size.clamp_min(1), torch.inf)
        owner = torch.cdist(pixels, centres.nan_to_num(posinf=1e6)).argmin(2)
    return owner.view(n, h, w)


# ---- LIME


def lime(
    model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    segments: Tensor | None = None,
    n: int = 500,
    width: float = 0.25,
    ridge: float = 0.0,
    baseline: float | Tensor | str = 0.0,
    of: str = "logit",
    seed: int | None = None,
) -> Tensor:
    """LIME: hide superpixels at random, and fit a linear model to what the network then says.

        w = argmin_w,b  sum_z pi(z) (f(z) - b - <w, z>)^2 + ridge ||w||^2,   pi(z) = exp(-D(z, 1)^2 / width^2)

    z in {0, 1}^M says which superpixels are seen; D is the cosine distance to the whole image. With 2^M <= n every z is asked
    once and nothing is random. On a model that is linear in the pixels w_j is exactly what superpixel j adds to the logit.

    Args:
        model: images -> logits. x: images (N, C, H, W) in [0, 1]. target: classes to explain, default the predicted ones.
        segments: int64 (H, W) or (N, H, W), numbers of superpixels from 0; `grid(x.shape)` without.
        n: images asked for each explanation, more than the number of superpixels. width: of the kernel. ridge: >= 0.
        baseline: what a hidden pixel shows: a number, a tensor that broadcasts to x, or "mean", its superpixel's mean colour.
        of: "logit" or "probability", what f is.
    Returns: the weight of each pixel's superpixel, (N, 1, H, W), dtype of x.
    Raises: TypeError, ValueError: bad input.
    Source: Ribeiro, Singh & Guestrin 2016.
    Example: `lime(model, x[:2], segments=grid(x.shape, 14), n=16).shape` is (2, 1, 28, 28).
    """
    target = targets(model, x, target)
    segments, count = _segments(segments, x)
    checks.positive_int(n, "n")
    checks.positive(width, "width")
    checks.nonnegative(ridge, "ridge")
    checks.choice(of, "of", ("logit", "probability"))
    hidden = _baseline(baseline, x, segments, count)
    every = 2**count <= n
    if not every and n <= count:
        raise ValueError(f"n: got {n}, want more than {count}, the number of superpixels")
    z = _coalitions(count) if every else torch.rand(n, count, generator=randomness.generator(seed)) < 0.5
    if not every:
        z[0] = True  # the image itself
    z = z.to(x.device)
    answers = _ask(model, x, target, segments, hidden, z, of)
    seen = z.double().mean(1)
    pi = torch.exp(-((1 - seen.sqrt()) ** 2) / width**2)
    w = _weighted(z.double(), answers.double().T, pi, ridge)[0].T  # (N, M)
    return w.gather(1, segments.flatten(1)).view(len(x), 1, *x.shape[2:]).to(x.dtype)


def _ask(model, x, target, segments, hidden, z, of) -> Tensor:
    """f of every image under every mask, (N, n)."""
    pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(z))).to(x.device)
    flat, out = segments.flatten(1), []
    with torch.no_grad():
        for image, mask in (chunk.T for chunk in progress.bar(pairs.split(_CHUNK), desc="asking the model")):
            seen = z[mask].gather(1, flat[image]).view(-1, 1, *x.shape[2:])
            answer = model(torch.where(seen, x[image], hidden[image]))
            logit = selected(answer, target[image])
            out.append(logit if of == "logit" else torch.exp(logit - answer.logsumexp(1)))
    return torch.cat(out).view(len(x), len(z))


def _weighted(z: Tensor, f: Tensor, pi: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression of f (n, r) on z (n, M): weights (M, r) and intercepts (r,), which pay no penalty."""
    pi = (pi / pi.sum())[:, None]
    centre, middle = (pi * z).sum(0), (pi * f).sum(0)
    rows, wanted = pi.sqrt() * (z - centre), pi.sqrt() * (f - middle)
    if ridge:
        extra = (ridge / len(z)) ** 0.5 * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        rows, wanted = torch.cat([rows, extra]), torch.cat([wanted, wanted.new_zeros(len(extra), wanted.shape[1])])
    w = torch.linalg.pinv(rows, rtol=1e-10) @ wanted  # what never varies gets weight 0
    return w, middle - centre @ w


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A linear model that stands in for another one near a row: `weights` (d,), `intercept`, and `fidelity`.

    fidelity is the weighted R^2 on the rows that it was fitted to: 1 means that it says all that the model says there.
    """

    weights: Tensor
    intercept: float
    fidelity: float


def lime_table(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    background: Tensor,
    *,
    kind: str = "quartiles",
    n: int = 2000,
    width: float | None = None,
    ridge: float = 0.0,
    seed: int | None = None,
) -> Surrogate:
    """LIME on a row of a table.

    "quartiles": z_j = 1 where feature j of a neighbour falls between the same quartiles as in x; neighbours take each feature
    from a random row of the background. "standardised": neighbours are normal, with the background's mean and
    standard deviation feature by feature, and z_j = (feature - x_j) / std_j: weights are slopes, in units of f a standard
    deviation, and on a linear model exactly w_j std_j.

    Args:
        predict: rows (m, d) -> numbers (m,), any model. x: (d,). background: (m, d), at least two rows.
        n: neighbours. width: of the kernel exp(-||z - z(x)||^2 / width^2), 0.75 sqrt(d) without. ridge: >= 0.
    Returns: `Surrogate`.
    Raises: TypeError, ValueError: bad input.
    Source: Ribeiro, Singh & Guestrin 2016.
    Example: `lime_table(lambda r: r.sum(1), rows[0], rows, kind="standardised", n=200).fidelity > 0.99`.
    """
    _row(x, background, predict)
    checks.choice(kind, "kind", ("quartiles", "standardised"))
    checks.positive_int(n, "n", least=2)
    width = 0.75 * len(x) ** 0.5 if width is None else checks.positive(width, "width")
    checks.nonnegative(ridge, "ridge")
    generator = randomness.generator(seed)
    rows = neighbours(x, background, kind=kind, n=n, generator=generator)
    if kind == "quartiles":
        edges = background.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
        z = (_bins(rows.double(), edges) == _bins(x[None].double(), edges)).double()
        away = (1 - z).square().sum(1)
    else:
        spread = background.double().std(0)
        z = (rows.double() - x.double()) / torch.where(spread > 0, spread, 1.0)
        away = z.square().sum(1)
    f = _answers(predict, rows)[:, None]
    pi = torch.exp(-away / width**2)
    w, b = _weighted(z, f, pi, ridge)
    off, all_ = (pi * (f - b - z @ w)[:, 0] ** 2).sum(), (pi * (f[:, 0] - (pi * f[:, 0]).sum() / pi.sum()) ** 2).sum()
    return Surrogate(w[:, 0], float(b[0]), float(1 - off / all_) if float(all_) > 0 else 1.0)


def neighbours(x: Tensor, background: Tensor, *, kind: str = "quartiles", n: int = 2000, generator=None) -> Tensor:
    """The rows that `lime_table` asks the model about, (n, d); the first is x itself.

    Example: `neighbours(rows[0], rows, n=5).shape` is (5, 30).
    """
    if kind == "quartiles":
        rows = torch.randint(len(background), (n, len(x)), generator=generator).to(x.device)
        drawn = background.gather(0, rows)
    else:
        noise = torch.randn(n, len(x), generator=generator, dtype=background.dtype).to(x.device)
        drawn = background.mean(0) + noise * background.std(0)
    drawn[0] = x
    return drawn


def _bins(rows: Tensor, edges: Tensor) -> Tensor:
    return (rows[:, None] > edges).sum(1)


# ---- Shapley values


def shapley(value: Game, players: int, *, n: int | None = None, seed: int | None = None) -> Tensor:
    """The Shapley value: what each player adds, averaged over all orders in which they may come.

        phi_i = sum over S without i of  |S|! (M - |S| - 1)! / M!  (v(S + i) - v(S))

    Args:
        value: coalitions, bool (B, M) -> worth (B,), asked in chunks. players: M >= 1, at most 20 for the exact value.
        n: without, the exact value from all 2^M coalitions; else the mean over n random orders, (M + 1) n questions.
    Returns: (M,) double precision; their sum is v(all) - v(none), exactly so in both ways.
    Raises: TypeError, ValueError: bad input.
    Source: Shapley 1953; Lundberg & Lee 2017; Castro, Gomez & Tejada 2009 for sampling.
    Example: `shapley(lambda s: s.double().sum(1), 3).sum()`.
    """
    players = checks.positive_int(players, "players")
    if n is not None:
        orders = torch.rand(checks.positive_int(n, "n"), players, generator=randomness.generator(seed)).argsort(1)
        place = orders.argsort(1)
        coalitions = place[:, None] < torch.arange(players + 1)[:, None]  # (n, M + 1, M): the first k of each order
        v = _worths(value, coalitions.flatten(0, 1)).view(len(orders), players + 1)
        return v.diff(dim=1).gather(1, place).mean(0)
    _few(players)
    v, members = _worths(value, _coalitions(players)), _coalitions(players).sum(1)
    share = torch.tensor([1 / (players * math.comb(players - 1, s)) for s in range(players)], dtype=torch.float64)
    codes = torch.arange(2**players)
    without = [codes[(codes >> i) % 2 == 0] for i in range(players)]
    return torch.stack([share[members[S]] @ (v[S + 2**i] - v[S]) for i, S in enumerate(without)])


def kernel_shap(value: Game, players: int, *, n: int | None = None, seed: int | None = None) -> Tensor:
    """Shapley values as LIME computes its weights: weighted least squares, with the one kernel that makes them the same.

        pi(S) = (M - 1) / (C(M, |S|) |S| (M - |S|)),   subject to  b = v(none),  sum_j phi_j = v(all) - v(none)

    Args: as in `shapley`; n: coalitions drawn, in pairs of one and its complement.
    Returns: (M,) double precision; exact without n.
    Raises: TypeError, ValueError: bad input, fewer than 2 players.
    Source: Lundberg & Lee 2017, theorem 2.
    Example: `kernel_shap(lambda s: s.double().sum(1), 3).sum()`.
    """
    players = checks.positive_int(players, "players", least=2)
    sizes = torch.arange(1, players)
    if n is None:
        _few(players)
        z = _coalitions(players)[1:-1]
        s = z.sum(1).double()
        ways = torch.tensor([math.comb(players, k) for k in range(players + 1)], dtype=torch.float64)[z.sum(1)]
        pi = (players - 1) / (ways * s * (players - s))
    else:
        generator = randomness.generator(seed)
        odds = 1 / (sizes * (players - sizes)).double()
        s = sizes[torch.multinomial(odds, checks.positive_int(n, "n"), replacement=True, generator=generator)]
        z = torch.rand(n, players, generator=generator).argsort(1).argsort(1) < s[:, None]
        z = torch.cat([z, ~z])
        pi = torch.ones(len(z), dtype=torch.float64)
    none, all_ = _worths(value, torch.tensor([[False] * players, [True] * players]))
    # phi_M = all - none - sum of the others: least squares in M - 1 unknowns
    rows = z[:, :-1].double() - z[:, -1:].double()
    wanted = _worths(value, z) - none - z[:, -1].double() * (all_ - none)
    root = pi.sqrt()[:, None]
    phi = torch.linalg.lstsq(root * rows, root * wanted[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([phi, (all_ - none - phi.sum())[None]])


def table_game(predict: Callable[[Tensor], Tensor], x: Tensor, background: Tensor) -> Game:
    """v(S) = mean over background rows b of f(features S from x, the others from b).

    On a linear model the Shapley value of this game is w_j (x_j - mean_j).

    Args: predict: rows (m, d) -> (m,); x: (d,); background: (m, d).
    Raises: TypeError, ValueError: bad input.
    Source: Lundberg & Lee 2017; the interventional form of Janzing, Minorics & Bloebaum 2020.
    Example: `shapley(table_game(lambda r: r.sum(1), rows[0, :4], rows[:, :4]), 4)`.
    """
    _row(x, background, predict)

    def value(coalitions: Tensor) -> Tensor:
        mixed = torch.where(coalitions.to(x.device)[:, None], x, background)
        return _answers(predict, mixed.flatten(0, 1)).view(len(coalitions), len(background)).mean(1)

    return value


def image_game(
    model, x: Tensor, target: Tensor | int | None = None, *, segments: Tensor, baseline: float | Tensor | str = 0.0
) -> Game:
    """v(S) = the logit when only the superpixels in S are seen. x: one image (1, C, H, W). Others: see `lime`.

    Example: `shapley(image_game(model, x[:1], segments=grid(x.shape, 14)), 4)`.
    """
    target = targets(model, x, target)
    if len(x) != 1:
        raise ValueError(f"x: got {len(x)} images, want one")
    segments, count = _segments(segments, x)
    hidden = _baseline(baseline, x, segments, count)
    return lambda coalitions: _ask(model, x, target, segments, hidden, coalitions.to(x.device), "logit")[0]


# ---- anchors


@dataclass(frozen=True, eq=False)
class Anchor:
    """A rule "these features stay between the same quartiles": `features`, its `precision` with `low` and `high`, `coverage`.

    precision: share of neighbours under the rule with the same decision, and its 95 % Clopper-Pearson interval; coverage:
    share of background rows that the rule speaks about.
    """

    features: tuple[int, ...]
    precision: float
    low: float
    high: float
    coverage: float


def anchor(
    decide: Callable[[Tensor], Tensor],
    x: Tensor,
    background: Tensor,
    *,
    tau: float = 0.95,
    most: int = 3,
    n: int = 1000,
    seed: int | None = None,
) -> Anchor | None:
    """The shortest rule that holds a decision fast, whatever the other features are: P(h(z) = h(x) | rule) >= tau.

    Every set of one feature is tried, then every set of two, up to `most`; z takes the features of the rule from rows in x's
    quartiles, all others from anywhere. Among the rules of one size that pass, the one with the largest coverage is returned.

    Args:
        decide: rows (m, d) -> classes (m,). x: (d,). background: (m, d). tau: in (0, 1). n: neighbours asked a rule.
    Returns: `Anchor`, or None where no rule of at most `most` features passes (the lower end of its interval counts).
    Raises: TypeError, ValueError: bad input.
    Source: Ribeiro, Singh & Guestrin 2018 (anchors), by enumeration in place of their beam search.
    Example: `anchor(lambda r: r[:, 0] > 0.5, rows[0, :3], rows[:, :3], n=200)`.
    """
    _row(x, background, decide)
    checks.probability(tau, "tau")
    checks.positive_int(most, "most")
    checks.positive_int(n, "n")
    generator, d = randomness.generator(seed), len(x)
    edges = background.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=0)
    alike = _bins(background.double(), edges) == _bins(x[None].double(), edges)  # (m, d)
    pool = [torch.cat([background[alike[:, j], j], x[j : j + 1]]) for j in range(d)]
    own = decide(x[None])
    for size in range(1, min(most, d) + 1):
        passed = []
        for rule in combinations(range(d), size):
            z = neighbours(x, background, n=n, generator=generator)
            for j in rule:
                z[:, j] = pool[j][torch.randint(len(pool[j]), (n,), generator=generator)]
            hits = int((decide(z) == own).sum())
            low, high = clopper_pearson(hits, n)
            if low >= tau:
                coverage = float(alike[:, list(rule)].all(1).double().mean())
                passed.append(Anchor(rule, hits / n, low, high, coverage))
        if passed:
            return max(passed, key=lambda a: (a.coverage, a.precision))
    return None


# ---- shared pieces


def _coalitions(players: int) -> Tensor:
    """All subsets, bool (2^M, M), row c being the binary digits of c."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players)) % 2 == 1


def _few(players: int) -> None:
    if players > 20:
        raise ValueError(f"players: got {players}, want at most 20 for the exact value; n= samples")


def _worths(value: Game, coalitions: Tensor) -> Tensor:
    if not callable(value):
        raise TypeError(f"value: got {type(value).__name__}, want a function of coalitions, bool (B, M) -> (B,)")
    parts = []
    for chunk in progress.bar(coalitions.split(4 * _CHUNK), desc="asking for coalitions"):
        v = value(chunk)
        if not isinstance(v, Tensor) or v.shape != (len(chunk),) or not torch.isfinite(v).all():
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"value: got {got} (or numbers that are not finite), want ({len(chunk)},) finite numbers")
        parts.append(v.detach().double().cpu())
    return torch.cat(parts)


def _four(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want images (N, C, H, W)")


def _segments(segments, x: Tensor) -> tuple[Tensor, int]:
    _four(x)
    segments = grid(x.shape) if segments is None else segments
    if not isinstance(segments, Tensor) or segments.dtype != torch.int64:
        got = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
        raise TypeError(f"segments: got {got}, want an int64 tensor (H, W) or (N, H, W)")
    if segments.shape not in (x.shape[2:], (len(x), *x.shape[2:])):
        raise ValueError(
            f"segments: got shape {tuple(segments.shape)}, want {tuple(x.shape[2:])} or one for each image"
        )
    if segments.min() < 0:
        raise ValueError(f"segments: got {int(segments.min())}, want numbers from 0")
    return segments.to(x.device).expand(len(x), -1, -1), int(segments.max()) + 1


def _baseline(baseline, x: Tensor, segments: Tensor, count: int) -> Tensor:
    """What the hidden pixels show, shape of x."""
    if isinstance(baseline, str):
        checks.choice(baseline, "baseline", ("mean",))
        member = F.one_hot(segments.flatten(1), count).to(x)  # (N, HW, M)
        means = x.flatten(2) @ member / member.sum(1, keepdim=True).clamp_min(1)
        return means.gather(2, segments.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    try:
        hidden = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    except (RuntimeError, TypeError, ValueError) as cause:
        raise ValueError(
            f"baseline: want 'mean', a number in [0, 1], or a tensor that fits {tuple(x.shape)}"
        ) from cause
    return checks.images(hidden, "baseline")


def _row(x, background, predict) -> None:
    for name, value, dim in (("x", x, 1), ("background", background, 2)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: got {type(value).__name__}, want a floating-point tensor")
        if value.dim() != dim or not value.numel() or not torch.isfinite(value).all():
            want = "a row (d,)" if dim == 1 else "rows (m, d)"
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {want} of finite numbers")
    if background.shape[1] != len(x) or len(background) < 2:
        raise ValueError(f"background: got shape {tuple(background.shape)}, want at least 2 rows of {len(x)} features")
    if not callable(predict):
        raise TypeError(f"predict: got {type(predict).__name__}, want a function of rows (m, d)")


def _answers(predict, rows: Tensor) -> Tensor:
    with torch.no_grad():
        f = predict(rows)
    if not isinstance(f, Tensor) or f.shape != (len(rows),) or not torch.isfinite(f).all():
        got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"predict: got {got} (or numbers that are not finite), want ({len(rows)},) finite numbers")
    return f.double()
