"""What a sanitising defender lets through: spheres and slabs about class centroids, cut by a box or to integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from .. import checks

SIGNS = (-1, 1)  # of the smaller and of the larger of the two labels
_SLACK = 1e-9  # relative: what rounding may add to a distance


def examples(x, y) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Require a two-class data set; the examples as rows (n, d) in double precision, signs -1 / +1, and the two labels."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, want a floating-point torch.Tensor (n, ...)")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want at least one example (n, ...)")
    if not torch.isfinite(x).all():
        raise ValueError("x: got NaN or infinite values, want finite ones")
    signed = isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1] and bool((y < 0).any())
    checks.labels(y.abs() if signed else y, x)  # labels -1 and 1 are welcome, too
    labels = y.unique().tolist()
    if len(labels) != 2:
        raise ValueError(f"y: got the classes {labels}, want examples of exactly two classes")
    rows = x.detach().flatten(1).double()
    if (rows == rows[:1]).all():
        raise ValueError("x: got only constant features, want at least one that varies")
    return rows, torch.where(y == labels[1], 1.0, -1.0).double(), tuple(labels)


@dataclass(frozen=True, eq=False)
class Sanitizer:
    """The feasible set F = F_- u F_+ of a defence that keeps (x, y) where x lies in all the sets it names for its class.

        sphere: ||x - mu_y|| <= r_y        slab: |<x - mu_y, mu_+ - mu_->| / ||mu_+ - mu_-|| <= s_y

    Made by `sanitizer`. Attributes: `labels`, the two classes, the smaller one the negative class; `centroids` (2, d),
    `radii` (2,) or None, `slabs` (2,) or None, float64, negative class first; `box` (low, high) of valid features or
    None; `integer`, whether features are whole numbers; `data_dependent`, whether the defender computes the centroids
    from what it is given, poison included (see `refit`); `anchors` (2, d), allowed integer points.
    Raises ValueError where a class has no allowed point, or one that is unbounded.
    Source: Steinhardt, Koh & Liang 2017, section 2.
    """

    labels: tuple[int, int]
    centroids: Tensor
    radii: Tensor | None = None
    slabs: Tensor | None = None
    box: tuple[float, float] | None = None
    integer: bool = False
    data_dependent: bool = False
    anchors: Tensor | None = None

    def __post_init__(self):
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box: got {self.box}, want (low, high) with low < high")
        if self.radii is None and (self.box is None or not all(map(math.isfinite, self.box))):
            raise ValueError(
                "sphere: got False without a bounded box: the feasible set is unbounded, want a sphere or a box"
            )
        for name, size in (("radii", self.radii), ("slabs", self.slabs)):
            if size is not None and not ((size >= 0) & torch.isfinite(size)).all():
                raise ValueError(f"{name}: got {size.tolist()}, want two finite numbers >= 0")
        if self.slabs is not None and self._axis().norm() < 1e-12 * (1 + self.centroids.abs().max()):
            raise ValueError("slab: the two centroids coincide, so there is no direction between them: use slab=False")
        for side in range(2):
            self._require_points(side)
        if self.data_dependent and (self.box is not None or self.integer):
            raise ValueError("data_dependent: got True with a box or integers, want spheres and slabs alone")

    def _axis(self) -> Tensor:
        return self.centroids[1] - self.centroids[0]

    @property
    def axis(self) -> Tensor:
        """The unit vector between the centroids, (d,)."""
        return self._axis() / self._axis().norm()

    def keeps(self, x: Tensor, y: Tensor, *, tol: float = 1e-7) -> Tensor:
        """Which examples pass: bool (n,). `tol`, relative to the radii, is what rounding may take."""
        rows = x.detach().flatten(1).to(self.centroids)
        side = (y == self.labels[1]).long().to(rows.device)
        away = rows - self.centroids[side]
        passed = (y == self.labels[0]) | (y == self.labels[1])
        scale = 1 + self.centroids.norm(dim=1)[side]
        if self.radii is not None:
            passed &= away.norm(dim=1) <= self.radii[side] + tol * scale
        if self.slabs is not None:
            passed &= (away @ self.axis).abs() <= self.slabs[side] + tol * scale
        if self.box is not None:
            passed &= ((rows >= self.box[0] - tol) & (rows <= self.box[1] + tol)).all(1)
        if self.integer:
            passed &= (rows == rows.round()).all(1)
        return passed

    def refit(self, x: Tensor, y: Tensor) -> Sanitizer:
        """What the defender really uses on the data it is given: centroids of x, the same thresholds (if data-dependent)."""
        if not self.data_dependent:
            return self
        rows = x.detach().flatten(1).to(self.centroids)
        centroids = torch.stack([rows[y == label].mean(0) for label in self.labels])
        return replace(self, centroids=centroids)

    def worst(self, w: Tensor, side: int) -> tuple[Tensor, float]:
        """argmax of -sign <w, x> over class `side` (0 or 1): the point (d,), and a number that the maximum never exceeds.

        Closed form for sphere and slab; with a box, its dual with one multiplier a constraint. For integers the box and
        spheres are kept and the rest is relaxed: the number is a bound, the point need not be whole.
        """
        c = -SIGNS[side] * w
        if self.box is not None:
            return self._worst_in_box(c, side)
        mu, length = self.centroids[side], c.norm()
        if length == 0:
            return mu.clone(), 0.0
        r = self.radii[side]
        step = r * c / length
        if self.slabs is not None:
            axis, s = self.axis, self.slabs[side]
            if (step @ axis).abs() > s:
                across = c - (c @ axis) * axis
                step = (c @ axis).sign() * s * axis + (r**2 - s**2).sqrt() * across / across.norm().clamp_min(1e-300)
        point = mu + step
        return point, float(c @ point)

    def _worst_in_box(self, c: Tensor, side: int) -> tuple[Tensor, float]:
        mu = self.centroids[side].cpu().numpy()
        r, s = self._sizes(side)
        axis = self.axis.cpu().numpy() if self.slabs is not None else None
        delta, bound = _box_program(c.cpu().numpy(), self.box[0] - mu, self.box[1] - mu, r, axis, s)
        return torch.from_numpy(mu + delta).to(c), bound + float(c.cpu().numpy() @ mu)

    def _sizes(self, side: int) -> tuple[float, float]:
        """Radius and half-width of a class; where the sphere is missing, a radius that holds the whole box."""
        if self.radii is not None:
            r = float(self.radii[side])
        else:
            mu = self.centroids[side]
            r = 1.01 * float(torch.maximum((self.box[0] - mu).abs(), (self.box[1] - mu).abs()).norm())
        return r, math.inf if self.slabs is None else float(self.slabs[side])

    def _require_points(self, side: int) -> None:
        """Infeasible sets: the nearest point of the box must lie in the sphere, and some such point in the slab."""
        name = f"class {self.labels[side]}"
        if self.box is not None:
            mu = self.centroids[side].cpu().numpy()
            low, high = self.box[0] - mu, self.box[1] - mu
            r, s = self._sizes(side)
            near = np.linalg.norm(np.clip(0, low, high))
            if near > r * (1 + _SLACK):
                raise ValueError(
                    f"infeasible: {name}: the box {self.box} lies {near:.4g} from the centroid, beyond {r:.4g}"
                )
            if self.slabs is not None:
                axis = self.axis.cpu().numpy()
                reach = [_box_program(sign * axis, low, high, r, None, math.inf)[1] for sign in (1, -1)]
                if min(reach) < -s:
                    raise ValueError(f"infeasible: {name}: no point of the box and the sphere lies in the slab")
        if self.integer and (self.anchors is None or not torch.isfinite(self.anchors[side]).all()):
            raise ValueError(f"infeasible: {name}: no integer example passes the defence, so none is known")

    def round(self, points: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
        """Integer points near `points` (m, d) that pass: rounded at random, nearer and nearer to an allowed integer point."""
        anchors = self.anchors[side]
        rounded, open_ = anchors.clone(), torch.ones(len(points), dtype=torch.bool, device=points.device)
        label = torch.tensor(self.labels, device=points.device)[side]
        for t in np.linspace(1, 0, 26).repeat(3):
            target = anchors + float(t) * (points - anchors)
            coin = torch.rand(target.shape, generator=generator, dtype=torch.float64).to(target)
            trial = (target + coin).floor()
            good = open_ & self.keeps(trial, label, tol=0.0)
            rounded[good], open_[good] = trial[good], False
            if not open_.any():
                break
        return rounded


def _box_program(c, low, high, r: float, axis, s: float) -> tuple[np.ndarray, float]:
    """max <c, delta> over low <= delta <= high, ||delta|| <= r, |<axis, delta>| <= s: a feasible point and an upper bound.

    For a sphere multiplier lam > 0 and a slab multiplier nu the maximiser of the Lagrangian is clip((c - nu axis) / lam);
    its value bounds the maximum for any lam, nu. Both are roots of monotone functions. Assumes that there is a point.
    """
    length = float(np.linalg.norm(c)) or 1.0
    nearest = np.clip(0.0, low, high)
    least = 1e-7 * length / max(r, 1e-12)

    def inner(nu):
        tilted = c if axis is None else c - nu * axis
        size = lambda log: float(np.linalg.norm(np.clip(tilted / math.exp(log), low, high))) - r  # noqa: E731
        left = math.log(least)
        if size(left) <= 0:
            lam = least
        else:
            right = math.log((float(np.linalg.norm(tilted)) + length) / max(r, 1e-12)) + 1
            while size(right) > 0 and right < 100:
                right += 5
            lam = math.exp(brentq(size, left, right, xtol=1e-10) + 1e-10 if size(right) <= 0 else right)
        return np.clip(tilted / lam, low, high), lam

    nu = 0.0
    delta, lam = inner(nu)
    if axis is not None and abs(axis @ delta) > s:
        sign, far = math.copysign(1.0, axis @ delta), length
        excess = lambda nu: sign * float(axis @ inner(sign * nu)[0]) - s  # noqa: E731
        while excess(far) > 0 and far < 1e9 * length:
            far *= 4
        nu = sign * brentq(excess, 0.0, far, xtol=1e-10 * length) if excess(far) <= 0 else sign * far
        delta, lam = inner(nu)
    slab = 0.0 if axis is None else s * abs(nu) - nu * float(axis @ delta)
    bound = float(c @ delta) - lam / 2 * (float(delta @ delta) - r**2) + slab
    inside = _inside(delta, nearest, r, axis, s)
    return inside, max(bound, float(c @ inside))


def _inside(delta, start, r: float, axis, s: float) -> np.ndarray:
    """delta, pulled towards `start` by what rounding left outside the ball and the slab."""
    over = max(
        float(np.linalg.norm(delta)) / max(r, 1e-300),
        abs(float(axis @ delta)) / max(s, 1e-300) if axis is not None else 0,
    )
    if over <= 1:
        return delta
    shrink = min(1.0, (1 - 1e-12) / over)
    return start + shrink * (delta - start)


def sanitizer(
    x: Tensor,
    y: Tensor,
    *,
    quantile: float = 0.7,
    sphere: bool = True,
    slab: bool = True,
    box: tuple[float, float] | None = None,
    integer: bool = False,
    data_dependent: bool = False,
    centroids: Tensor | None = None,
) -> Sanitizer:
    """The defence that keeps, of each class of (x, y), the share `quantile` nearest its centroid, in each of its sets.

    Args:
        x: clean examples (n, ...), floating point; y: int64 labels (n,) of two classes.
        quantile: share in (0, 1] that sets the radii r_y and the half-widths s_y.
        sphere, slab: which sets to use.
        box: (low, high), features outside it are refused; (0, inf) for counts.
        integer: refuse features that are not whole numbers.
        data_dependent: False for an oracle that knows the clean centroids; True for a defender that has to compute them from
            the data it is given, poison included. Thresholds are fixed in both.
        centroids: (2, ...) to use in place of the class means, the smaller label first.
    Returns: `Sanitizer`.
    Raises: TypeError, ValueError: bad input; a class without examples; an empty or unbounded set.
    Source: Steinhardt, Koh & Liang 2017, sections 2 and 5.
    Example: `sanitizer(x, y).keeps(x, y).double().mean()` is about 0.5 for sphere and slab at 0.7.
    """
    rows, signs, labels = examples(x, y)
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 < quantile <= 1:
        raise ValueError(f"quantile: got {quantile!r}, want a share in (0, 1]")
    if centroids is None:
        centroids = torch.stack([rows[signs == sign].mean(0) for sign in SIGNS])
    else:
        if not isinstance(centroids, Tensor) or centroids.numel() != 2 * rows.shape[1]:
            raise ValueError(f"centroids: got {getattr(centroids, 'shape', centroids)}, want (2, {rows.shape[1]})")
        centroids = centroids.detach().reshape(2, -1).to(rows)
        if not torch.isfinite(centroids).all():
            raise ValueError("centroids: got NaN or infinite values, want finite ones")
    away = [rows[signs == sign] - centroids[i] for i, sign in enumerate(SIGNS)]
    radii = slabs = None
    if sphere:
        radii = torch.stack([_quantile(a.norm(dim=1), quantile) for a in away])
    if slab:
        axis = centroids[1] - centroids[0]
        axis = axis / axis.norm().clamp_min(1e-300)
        slabs = torch.stack([_quantile((a @ axis).abs(), quantile) for a in away])
    anchors = torch.full_like(centroids, math.nan)
    if integer:
        # The set without the integer part says which examples pass; the one nearest the centroid is a known allowed point.
        loose = Sanitizer(labels, centroids, radii, slabs, box)
        passed = loose.keeps(x, y, tol=0.0) & (rows == rows.round()).all(1)
        for i, sign in enumerate(SIGNS):
            known = rows[passed & (signs == sign)]
            if len(known):
                anchors[i] = known[(known - centroids[i]).norm(dim=1).argmin()]
    return Sanitizer(labels, centroids, radii, slabs, box, integer, data_dependent, anchors if integer else None)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear interpolation between the two nearest order statistics."""
    return torch.as_tensor(np.quantile(values.cpu().numpy(), q), dtype=torch.float64, device=values.device)
