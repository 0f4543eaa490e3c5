"""Lower bounds of the margins z_y - z_j over all images that an L-infinity attacker can make, without trying them.

    interval   every neuron by the largest and smallest sum it could have; fast, loose, differentiable
    CROWN      each ReLU between two lines, and the lines followed back to the image; the lower line's slope is 0 or 1
    dual       the same with lower slope u / (u - l): the feasible dual point of Wong & Kolter
    alpha      the same with every lower slope optimised in [0, 1]; its optimum is that of the linear program

All of them follow the same rows backwards (`Rows`); they differ in the slope alone. A neuron whose sign is known is not
relaxed at all, so only rows of neurons whose sign is open are computed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, kernels, precision, progress
from ..layout import keep_pages
from .network import Block, Conv, Dense, MaxPool, Network, Relu, Reshape, Rows, Windows, read, slack

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "dual", "lp", "mip")
RELAXED = METHODS[:5]
_BUDGET = {"cpu": 2**20, "cuda": 2**26}  # numbers in one chunk of rows: what fits a CPU's caches, or fills a GPU


@dataclass(frozen=True)
class Box:
    """The images an attacker can make, as centre and radius (N, ...) of each pixel's interval."""

    centre: Tensor
    radius: Tensor

    @property
    def low(self) -> Tensor:
        return self.centre - self.radius

    @property
    def high(self) -> Tensor:
        return self.centre + self.radius

    def __getitem__(self, index) -> Box:
        return Box(self.centre[index], self.radius[index])

    @property
    def flat(self) -> Box:
        return Box(self.centre.flatten(1), self.radius.flatten(1))

    @property
    def size(self) -> Tensor:
        """At least |x'| of every pixel: one number an image, (N, 1, ..., 1)."""
        ends = self.centre.detach().abs().flatten(1).amax(1) + self.radius.detach().flatten(1).amax(1)
        return ends.reshape(-1, *[1] * (self.centre.dim() - 1))


def ball(x: Tensor, eps: float | Tensor, box: tuple[float, float] | None = (0.0, 1.0)) -> Box:
    """{x' : |x' - x| <= eps} cut by the box of valid pixels (not cut with None). eps: one number, or (N,) one an image."""
    if isinstance(eps, Tensor):
        eps = eps.reshape(-1, *[1] * (x.dim() - 1))
    if box is None:
        return Box(x, torch.zeros_like(x) + eps)
    return _between((x - eps).clamp_(*box), (x + eps).clamp_(*box))


def _between(low: Tensor, high: Tensor) -> Box:
    centre = (low + high).mul_(0.5)
    return Box(centre, high - centre)


@precision.full()
def margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    method: str = "crown",
    box: tuple[float, float] | None = (0.0, 1.0),
    bounds: list[tuple[Tensor, Tensor]] | None = None,
    steps: int = 30,
    solver: str = "HiGHS",
    time_limit: float | None = None,
    batch_size: int | None = None,
    grad: bool = False,
) -> Tensor:
    """Lower bounds of z_y(x') - z_j(x') over all x' with |x' - x|_inf <= eps: a positive row is a certificate.

        ibp      |W| carries the radius of an interval, W its centre; the last layer is folded into the objective
        crown    l <= z <= u:  alpha z <= relu(z) <= u (z - l) / (u - l),  alpha = 1 if u > -l else 0, in every layer
        dual     the same with alpha = u / (u - l)
        lp       minimum over the polytope of all these triangles at once;  mip: over the network itself

    As lower bounds ibp <= lp <= mip and crown, dual <= alpha-crown <= lp (with crown's bounds of the neurons, and up to
    rounding); crown and ibp are not ordered. On unsure neurons crown-ibp takes interval bounds: for training.

    Args:
        model: `nn.Sequential` in evaluation mode; see `network.read` for its layers. It is left exactly as it was.
        x: images (N, ...), floating point, in [0, 1]. y: int64 labels (N,).
        eps: radius in pixel intensity (>= 0).
        method: "ibp", "crown-ibp", "crown", "alpha-crown", "dual", "lp" or "mip".
        box: (low, high) of valid pixels, or None for a ball that is not cut (as in Wong & Kolter).
        bounds: neuron bounds (low, high) before each activation, from `neuron_bounds`; computed by the method without.
        steps: ascent steps of alpha-crown.
        solver, time_limit: of lp and mip (seconds an image); a program that is not finished yields its best proved bound.
        batch_size: images worked on at once; chosen for the memory and the caches without.
        grad: keep the graph, so that the bounds can be differentiated (all but lp and mip).
    Returns:
        (N, K), dtype of x; column y is 0. Computed with outward slack for rounding in the dtype of x, which is kept where
        PyTorch is set to use fewer bits (TF32, autocast); use float64 where the last digits matter (`verify` does).
    Raises:
        TypeError, ValueError: bad input, an unsupported layer (named with its index), before any work.
    Source: Gowal et al. 2018 (ibp); Zhang et al. 2018 (crown), 2020 (crown-ibp); Xu et al. 2021 (alpha); Wong & Kolter
        2018 (dual); Ehlers 2017 (lp); Tjeng, Xiao & Tedrake 2019 (mip).
    Example: `(margins(model, x, y, 0.1, method="crown") >= 0).all(1)`: which images are certified.
    """
    checks.choice(method, "method", METHODS)
    if method in ("lp", "mip"):
        from . import linear_program, mixed_integer

        if grad:
            raise ValueError(f"grad: got True with method {method!r}, want False: a program has no graph")
        module = linear_program if method == "lp" else mixed_integer
        return module.margins(model, x, y, eps, box=box, bounds=bounds, solver=solver, time_limit=time_limit)
    checks.positive_int(steps, "steps")
    with torch.set_grad_enabled(grad):
        network = check(model, x, y, eps, box)
        size = images_at_once(network, x) if batch_size is None else checks.positive_int(batch_size, "batch_size")
        found = []
        with progress.bar(total=len(x), desc=method, unit="image") as bar:
            for first in range(0, len(x), size):
                part = slice(first, first + size)
                region = ball(x[part], eps, box)
                known = None if bounds is None else [(low[part], high[part]) for low, high in bounds]
                found.append(margin_bounds(network, region, y[part], method, bounds=known, steps=steps))
                bar.update(len(x[part]))
        return torch.cat(found)


def least_margin(margins: Tensor, y: Tensor) -> Tensor:
    """min_{j != y} of margins (N, K): one number an image, (N,); the image is certified where it is positive.

    Example: `least_margin(margins(model, x, y, 0.1), y) > 0`.
    """
    return margins.scatter(1, y[:, None], torch.inf).amin(1)


@precision.full()
def neuron_bounds(
    model: nn.Module, x: Tensor, eps: float, *, method: str = "crown", box=(0.0, 1.0), steps: int = 30
) -> list[tuple[Tensor, Tensor]]:
    """(low, high) of every value that goes into an activation, one pair a layer, each (N, *shape of the layer).

    Arguments and sources: as for `margins`; methods "ibp", "crown-ibp" (the same), "crown", "alpha-crown", "dual".
    Example: `[(high - low).mean() for low, high in neuron_bounds(model, x, 0.1)]`: how bounds widen from layer to layer.
    """
    checks.choice(method, "method", RELAXED)
    with torch.no_grad():
        network = check(model, x, None, eps, box)
        parts = [
            inner_bounds(network, ball(part, eps, box), method, steps) for part in x.split(images_at_once(network, x))
        ]
        return [
            (torch.cat([p[i][0] for p in parts]), torch.cat([p[i][1] for p in parts])) for i in range(len(parts[0]))
        ]


def check(model, x: Tensor, y: Tensor | None, eps: float, box) -> Network:
    """The input checks of everything that certifies; returns the network that was read."""
    keep_pages()
    checks.images(x)
    checks.nonnegative(eps, "eps")
    if box is not None and not box[0] < box[1]:
        raise ValueError(f"box: got {box}, want (low, high) with low < high, or None")
    network = read(model, x)
    for name, p in model.state_dict().items():
        if not p.sum().isfinite() and not p.isfinite().all():  # a sum is quick, but may overflow
            raise ValueError(f"model: got NaN or infinite values in {name}, want finite weights")
    if y is not None and checks.labels(y, x).max() >= network.classes:
        raise ValueError(f"y: got label {y.max().item()}, want labels in [0, {network.classes - 1}]")
    return network


def images_at_once(network: Network, x: Tensor) -> int:
    """How many images a bound works on at once, so that its coefficients stay in a few hundred megabytes."""
    neurons = sum(math.prod(b.shape) for b in network.blocks) + x[0].numel()
    return max(1, min(256 if x.device.type == "cpu" else 1024, 2**21 // neurons))


def margin_bounds(network: Network, region: Box, y: Tensor, method: str, *, bounds=None, steps: int = 30) -> Tensor:
    """`margins` on a network already read, all images at once: (N, K)."""
    if bounds is None:
        bounds = inner_bounds(network, region, method, steps)
    n, k, last = len(y), network.classes, len(network.blocks) - 1
    if method == "ibp" and last:
        region = _after(network.blocks[last - 1], *bounds[last - 1])
        if _is_one_matrix(network.blocks[last]) and k <= 32:
            return _differences(network.blocks[last].layers[-1], region.flat, y)
    image = torch.arange(n, device=y.device).repeat_interleave(k - 1)
    rival = torch.arange(k - 1, device=y.device).repeat(n)
    rival = rival + (rival >= y[image]).long()
    one = F.one_hot(y[image], k) - F.one_hot(rival, k)
    zero = region.centre.new_zeros(n * (k - 1))
    lines = _lines(network, bounds, method)
    found = []
    for part in torch.arange(len(image), device=y.device).split(_rows_at_once(network, last, y.device)):
        rows = Rows(one[part].to(zero.dtype), image[part], zero[part], zero[part])
        if method == "ibp" and last:
            found.append(_concretise(_affine_back(network.blocks[last], rows), region))
        else:
            found.append(_follow(network, last, rows, lines, region, method, steps))
    return zero.new_zeros(n, k).index_put((image, rival), torch.cat(found))


def inner_bounds(network: Network, region: Box, method: str, steps: int = 30) -> list[tuple[Tensor, Tensor]]:
    """`neuron_bounds` on a network already read, all images at once, in the order of the layers.

    Each layer begins with the interval that follows from the layer before; the neurons whose sign that leaves open (they
    alone are relaxed) are followed back to the image.
    """
    bounds: list[tuple[Tensor, Tensor]] = []
    inner = region
    for k, block in enumerate(network.blocks[:-1]):
        low, high = _interval(block, inner)
        if method not in ("ibp", "crown-ibp") and (k or block.mixes > 1):
            low, high = _sharpen(network, k, low, high, bounds, region, method, steps)
        bounds.append((low, high))
        inner = _after(block, low, high)
    return bounds


def best_bounds(network: Network, region: Box, steps: int = 30) -> list[tuple[Tensor, Tensor]]:
    """The intersection of what interval, CROWN, dual and alpha-CROWN know of every neuron."""
    known = [inner_bounds(network, region, method, steps) for method in ("ibp", "crown", "dual", "alpha-crown")]
    return [
        (torch.stack([low for low, _ in layer]).amax(0), torch.stack([high for _, high in layer]).amin(0))
        for layer in zip(*known, strict=True)
    ]


def _interval(block: Block, inner: Box) -> tuple[Tensor, Tensor]:
    """[l, u] of W z + b: centre W c + b, radius |W| r, with slack for the rounding of both."""
    c, r = inner.centre, inner.radius
    for layer in block.layers:
        r = r + slack(c) * Box(c, r).size
        c, r = layer.interval(c, r) if isinstance(layer, Dense) else (layer(c), layer.spread(r))
    return c - r, c + r


def _is_one_matrix(block: Block) -> bool:
    return isinstance(block.layers[-1], Dense) and all(isinstance(layer, Reshape) for layer in block.layers[:-1])


def _differences(layer: Dense, inner: Box, y: Tensor) -> Tensor:
    """min over the box of z_y - z_j, z = W h + b, for all j: (W_y - W_j) c + b_y - b_j - |W_y - W_j| r, (N, K)."""
    z, apart = layer(inner.centre), (layer.weight[:, None] - layer.weight).abs()
    k, image = len(apart), torch.arange(len(y), device=y.device)
    spread = F.linear(inner.radius, apart.flatten(0, 1)).unflatten(1, (k, k))[image, y]
    terms = layer.weight.detach().abs().sum(1) * inner.size + layer.bias.detach().abs()
    rounding = slack(z) * (terms + terms.gather(1, y[:, None]))
    return (z.gather(1, y[:, None]) - z - spread - rounding).scatter(1, y[:, None], 0.0)


def _after(block: Block, low: Tensor, high: Tensor) -> Box:
    """The interval behind the activation (a ReLU and a maximum are monotone)."""
    return _between(block.activation(low), block.activation(high))


def _sharpen(network, k, low, high, bounds, region, method, steps) -> tuple[Tensor, Tensor]:
    """Follow the neurons of block k that need it back to the image, from below and (negated) from above."""
    block = network.blocks[k]
    flat_low, flat_high = low.flatten(1), high.flatten(1)
    image, index = _needed(block, flat_low, flat_high)
    if not len(image):
        return low, high
    lines = _lines(network, bounds, method)
    found = []
    at_once = max(1, _rows_at_once(network, k, low.device) // 2)
    for some_image, some in zip(image.split(at_once), index.split(at_once), strict=True):
        rows, started = _unit_rows(block, some_image, some, region.centre)
        values = _follow(network, k, rows, lines, region, method, steps, started)
        found.append(torch.stack(values.chunk(2)))
    below, above = torch.cat(found, 1)
    above = -above
    if method == "alpha-crown":  # the published methods take their own bound, even where the interval is tighter
        below = torch.maximum(below, flat_low[image, index])
        above = torch.minimum(above, flat_high[image, index])
    low = flat_low.index_put((image, index), below).reshape(low.shape)
    return low, flat_high.index_put((image, index), above).reshape(high.shape)


def _needed(block: Block, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Which neurons of which images are worth following back, as (image, index), given their intervals (N, neurons).

    The unsure ones before a ReLU; all before a maximum, if the block does more than hand on the values before it.
    """
    if isinstance(block.activation, Relu):
        needed = (low < 0) & (high > 0)
    else:
        needed = torch.full_like(low, bool(block.layers), dtype=torch.bool)
    return needed.nonzero(as_tuple=True)


def _unit_rows(block: Block, image: Tensor, index: Tensor, like: Tensor) -> tuple[Rows, bool]:
    """The rows z_index and -z_index of a block's values, both signs one after the other.

    Says whether the block's last layer is already passed (for a matrix its row is simply taken).
    """
    sign = torch.ones(2 * len(image), 1, dtype=like.dtype, device=like.device)
    sign[len(image) :] = -1
    image, index = image.repeat(2), index.repeat(2)
    zero = torch.zeros_like(sign[:, 0])
    last = block.layers[-1] if block.layers else None
    if isinstance(last, Dense):
        const = last.bias[index] * sign[:, 0]
        return Rows(last.weight[index] * sign, image, const, const.detach().abs()), True
    if len(block.shape) == 1:
        return Rows(F.one_hot(index, block.shape[0]) * sign, image, zero, zero), False
    channels, _, width = block.shape
    area = math.prod(block.shape[1:])
    channel, sign = index // area, sign[:, 0]
    place, row = torch.unique(image * area + index % area, return_inverse=True)
    windows = Windows(place // area, torch.stack([place % area // width, place % width], 1), row)
    if isinstance(last, Conv) and (rows := last.filters(image, channel, sign, windows, block.shapes[-1])) is not None:
        return rows, True
    return Rows((F.one_hot(channel, channels) * sign[:, None])[:, :, None, None], image, zero, zero, windows), False


def _rows_at_once(network: Network, k: int, device: torch.device) -> int:
    """How many rows of block k go back to the image together."""
    return max(1, _BUDGET.get(device.type, 2**20) // _widest(network, k))


def _widest(network: Network, k: int) -> int:
    """The most numbers that a row of block k has on its way to the image."""
    if len(network.blocks[k].shape) == 1:
        return max(math.prod(shape) for b in network.blocks[: k + 1] for shape in (*b.shapes, b.shape))
    widest, reach, windowed = 1, [1, 1], True
    for block in reversed(network.blocks[: k + 1]):
        windowed = windowed and not (block is not network.blocks[k] and isinstance(block.activation, MaxPool))
        for layer, shape in zip(reversed(block.layers), reversed(block.shapes), strict=True):
            if isinstance(layer, Conv):
                size = [(q - 1) * d + 1 for q, d in zip(layer.weight.shape[2:], layer.dilation, strict=True)]
                reach = [(r - 1) * s + q for r, s, q in zip(reach, layer.stride, size, strict=True)]
            widest = max(
                widest, min(math.prod(shape), shape[0] * reach[0] * reach[1]) if windowed else math.prod(shape)
            )
    return widest


@dataclass(frozen=True)
class _ReluLines:
    """below: slope of the lower line (through 0); slope, intercept: of the upper line. All (N, *shape)."""

    below: Tensor
    slope: Tensor
    intercept: Tensor

    def back(self, rows: Rows, below: Tensor | None = None) -> Rows:
        """A positive coefficient takes the lower line, a negative one the upper (beyond the edge all lines are zero)."""
        if below is not None:
            rows = rows.cut(self.slope.shape[1:])
        slope, which = rows.seen(self.slope)
        same = below is not None or self.below is self.slope  # not asked for, or the dual
        low = slope if same else rows.seen(self.below)[0]
        intercept, _ = rows.seen(self.intercept)
        a, added = kernels.relu_backsubstitution(rows.a, low, slope, intercept, which, own=below)
        return rows.with_(a, added, rows.windows)


@dataclass(frozen=True)
class _PoolLines:
    """A maximum is at least its member of largest lower bound, and at most that member if no other can win, else a number."""

    pool: MaxPool
    shape: tuple[int, ...]
    place: Tensor
    wins: Tensor
    high: Tensor

    def back(self, rows: Rows, below: Tensor | None = None) -> Rows:
        rows = rows.dense(self.place.shape[1:])
        place, wins = rows.at(self.place), rows.at(self.wins)
        linear = torch.where((rows.a > 0) | wins, rows.a, torch.zeros_like(rows.a))
        flat = linear.new_zeros(len(linear), self.shape[0], self.shape[1] * self.shape[2])
        flat = flat.scatter_add(2, place.flatten(2), linear.flatten(2))
        return rows.with_(flat.reshape(-1, *self.shape), ((rows.a - linear) * rows.at(self.high)).flatten(1).sum(1))


def _lines(network: Network, bounds, method: str) -> list:
    """The lines around every activation whose bounds are known."""
    return [_line(b, low, high, method) for b, (low, high) in zip(network.blocks, bounds, strict=False)]


def _line(block: Block, low: Tensor, high: Tensor, method: str):
    if isinstance(block.activation, MaxPool):
        pool, shape = block.activation, block.shape
        _, place = pool.where(low)
        members = pool.members(shape, low.device)
        chosen = (place + torch.arange(shape[0], device=low.device)[:, None, None] * (shape[1] * shape[2])).flatten(1)
        rivals = F.pad(high.flatten(1), (0, 1), value=-torch.inf)[:, members]  # -1, the padding, never wins
        rivals = rivals.masked_fill(members == chosen[:, :, None], -torch.inf).amax(2).reshape(place.shape)
        best_low = low.flatten(2).gather(2, place.flatten(2)).reshape(place.shape)
        return _PoolLines(pool, shape, place, rivals <= best_low, pool(high))
    up, down = high.clamp_min(0), low.clamp_max(0)
    slope = up / (up - down).clamp_min(torch.finfo(up.dtype).tiny)
    below = slope if method == "dual" else (high > -low).to(low.dtype)
    return _ReluLines(below, slope, -slope * down)


def _affine_back(block: Block, rows: Rows, started: bool = False) -> Rows:
    last = len(block.layers) - 1
    for i in range(last, -1, -1):
        if i < last:
            rows = rows.cut(block.shapes[i + 1])
        if i < last or not started:
            rows = block.layers[i].back(rows, block.shapes[i])
    return rows


def _concretise(rows: Rows, region: Box) -> Tensor:
    """min of a . x + const over the region: a . c - |a| . r, less what rounding may have added."""
    tiny = slack(rows.a)
    radius = region.radius + tiny * (region.centre.abs() + region.radius)
    value = (rows.a * rows.at(region.centre)).flatten(1).sum(1) - (rows.a.abs() * rows.at(radius)).flatten(1).sum(1)
    return value + rows.const - tiny * rows.size


def _backward(
    network: Network, k: int, rows: Rows, lines, region: Box, started: bool, slopes=None, record=None
) -> Tensor:
    """Lower bounds of the rows on block k's values: through every block and activation down to the image.

    `slopes[i]`: lower slopes for the rows at activation i, in place of the line's own. `record` collects the rows' own.
    """
    for i in range(k, -1, -1):
        rows = _affine_back(network.blocks[i], rows, started and i == k)
        if i:
            line = lines[i - 1]
            if record is not None:
                record[i - 1] = rows.at(line.below) if isinstance(line, _ReluLines) else None
            rows = line.back(rows, None if slopes is None else slopes[i - 1])
    return _concretise(rows, region)


def _follow(network, k, rows, lines, region, method, steps, started=False) -> Tensor:
    """`_backward`, for alpha-crown with slopes that climb: every row has its own slope at every neuron below it.

    Any slopes in [0, 1] are valid, and the best bound met is kept.
    """
    if method != "alpha-crown" or k == 0:
        return _backward(network, k, rows, lines, region, started)
    record: dict[int, Tensor | None] = {}
    with torch.no_grad():
        best = _backward(network, k, rows, lines, region, started, record=record)
    slopes = [record[i] for i in range(k)]
    free = [s for s in slopes if s is not None]
    kept = [s.clone() for s in free]
    frozen = dataclasses.replace(rows, a=rows.a.detach(), const=rows.const.detach())
    m, v = ([torch.zeros_like(s) for s in free] for _ in range(2))
    for step in range(1, steps + 1):
        with torch.enable_grad():
            for s in free:
                s.requires_grad_()
            value = _backward(network, k, frozen, lines, region, started, slopes)
            grads = torch.autograd.grad(value.sum(), free, allow_unused=True)
        with torch.no_grad():
            value = value.detach()
            better = value > best
            best = torch.where(better, value, best)
            rate = 0.3 * min(1.0, 3 / steps) ** ((step - 1) / steps)
            for i, g in enumerate(grads):
                s = free[i].detach()
                kept[i][better] = s[better]
                g = torch.zeros_like(s) if g is None else g
                m[i].mul_(0.9).add_(g, alpha=0.1)
                v[i].mul_(0.99).addcmul_(g, g, value=0.01)
                size = (v[i] / (1 - 0.99**step)).sqrt_().add_(1e-12)
                s.addcdiv_(m[i], size, value=rate / (1 - 0.9**step)).clamp_(0, 1)
                free[i] = s
            left = iter(free)
            slopes = [None if s is None else next(left) for s in slopes]
    best_slopes = iter(kept)
    return _backward(
        network, k, rows, lines, region, started, [None if s is None else next(best_slopes) for s in slopes]
    )
