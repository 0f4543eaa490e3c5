"""Figures of results in one look: colours, line styles and markers that also read in grey, in dark mode and on a phone.

Every function takes tensors, arrays or tables, draws on a white card of its own and returns the matplotlib `Figure`;
as the last line of a notebook cell it shows itself. Where there is one set of axes, `ax=` draws into yours.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Polygon
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from . import checks

# Okabe & Ito (2008), ordered so that neighbours differ in lightness too: they stay apart in grey and in print.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#000000", "#CC79A7")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)), (0, (9, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "osD^vP" + "X<p>*h"
HATCHES = ("///", "...", "\\\\\\", "xx", "||", "--", "oo", "++")

_WIDTH = 5.0  # inches; with 11 pt type the text is 10 px high when a 360 px phone shrinks the figure
_GRID = "#DDDDDD"
_INK = "#222222"


def _line(i: int) -> dict:
    """Colour, line style and marker of line i: twelve lines differ in each two of the three."""
    return {"color": COLOURS[i % 6], "linestyle": DASHES[(i + i // 6) % 6], "marker": MARKERS[i]}


_LOOK = {
    "figure.figsize": (_WIDTH, 3.6),
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.prop_cycle": cycler(**{key: [_line(i)[key] for i in range(12)] for key in ("color", "linestyle", "marker")}),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlepad": 8,
    "axes.axisbelow": True,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 11,
    "text.color": _INK,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "hatch.color": "#00000038",
}


def style():
    """Context in which matplotlib draws in the course's look; outside it nothing changes.

    Example:
        >>> with style():
        ...     figure = plt.figure()
        >>> plt.close(figure)
    """
    return plt.style.context(_LOOK, after_reset=True)


def _styled(function):
    """Draw inside the course's look, whatever the caller's own settings are."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with style():
            return function(*args, **kwargs)

    return wrapper


def _figure(height: float) -> Figure:
    """A figure that pyplot has already let go: a notebook shows it once, as the value of its cell."""
    fig = plt.figure(figsize=(_WIDTH, height), layout="constrained")
    plt.close(fig)
    return fig


def _axes(ax: Axes | None, height: float = 3.3, *, grid: str | None = "both") -> Axes:
    """The caller's axes or new ones, dressed; ticks are made when drawn, so their look is stored in the axes now."""
    if ax is None:
        ax = _figure(height).add_subplot()
    elif not isinstance(ax, Axes):
        raise TypeError(f"ax: got {type(ax).__name__}, want matplotlib Axes")
    ax.tick_params(labelsize=10, color="#666666", labelcolor=_INK)
    if grid:
        ax.grid(True, axis=grid, color=_GRID, linewidth=0.8, linestyle="-", alpha=1.0)
    return ax


def _title(text: str, data_name: str, width: int = 44) -> str:
    return textwrap.fill(", ".join(filter(None, (text, data_name))), width)


def _wrap(text, width: int) -> str:
    """A text in lines of about `width` letters; what stands about an equals sign stays together."""
    held = re.sub(r" ([=≤≥<>]) ", "\u00a0\\1\u00a0", str(text))  # textwrap breaks at plain spaces only
    return textwrap.fill(held, width).replace("\u00a0", " ")


def _fit(fig: Figure, rows: int, columns: int) -> Figure:
    """Take away the height that rows of pictures leave unused, so that no gap opens beneath the title."""
    most = fig.get_figheight()
    for _ in range(2):
        fig.get_layout_engine().execute(fig)
        inches, height = fig.get_size_inches(), fig.get_figheight()
        for ax in [fig.axes[row * columns] for row in range(rows)]:
            ax.apply_aspect()
            slot, shown = ax.get_position(original=True), ax.get_position()
            wide, high = inches * (slot.width - shown.width, slot.height - shown.height)
            height += wide * (inches[1] * shown.height) / (inches[0] * shown.width) - high
        fig.set_figheight(min(height, most))
    return fig


def _whole(x: np.ndarray) -> bool:
    """Whether x counts something (epochs, layers, steps): then no tick stands between two whole numbers."""
    return bool((x == np.round(x)).all() and np.ptp(x) >= 2)


def _legend(ax: Axes, *, grow: bool, entries: dict | None = None) -> Figure:
    """The figure with a legend beneath the axes, where it hides no data; a figure of ours grows by its rows."""
    handles, labels = (list(entries.values()), list(entries)) if entries else ax.get_legend_handles_labels()
    columns = max(1, min(len(labels), 56 // (max(map(len, labels)) + 8)))
    ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, borderaxespad=3.9,
              columnspacing=1.4)  # fmt: skip
    if grow:
        ax.figure.set_figheight(ax.figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    return ax.figure


def _array(value, name: str, *dims: int) -> np.ndarray:
    """The finite float array of a tensor, array or list, with one of the numbers of dimensions in `dims`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(value).__name__}, want numbers in an array") from None
    if array.ndim not in dims or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, want {' or '.join(map(str, dims))} non-empty dimension(s)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinite values, want finite ones")
    return array


def _images(x, name: str) -> np.ndarray:
    """Images (N, C, H, W) in [0, 1] as matplotlib wants them: (N, H, W) grey or (N, H, W, 3)."""
    x = checks.images(torch.as_tensor(x), name).detach().cpu()
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (N, C, H, W) with C = 1 (grey) or 3 (RGB)")
    return (x[:, 0] if x.shape[1] == 1 else x.permute(0, 2, 3, 1)).numpy()


def _table(table, columns: tuple[str, ...], gaps: tuple[str, ...] = ()) -> pd.DataFrame:
    """Require a non-empty DataFrame with the named columns, numbers finite except for NaN in `gaps`."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table: got {type(table).__name__}, want a pandas DataFrame")
    if missing := [c for c in columns if c not in table.columns]:
        raise ValueError(f"table: no column {', '.join(missing)} among {', '.join(map(str, table.columns)) or 'none'}")
    if table.empty:
        raise ValueError("table: got no rows, want at least one")
    for column in set(columns) - {"group", "model", "name", "row"}:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise TypeError(f"table: column {column} holds {table[column].dtype}, want numbers")
        values = table[column].dropna() if column in gaps else table[column]
        if not np.isfinite(values.astype(float)).all():
            raise ValueError(f"table: column {column} holds NaN or infinite values, want finite ones")
    return table


def _ordered(table: pd.DataFrame, low: str, middle: str, high: str) -> None:
    """Require low <= middle <= high in every row, up to rounding."""
    if (bad := (table[low] > table[middle] + 1e-9) | (table[middle] > table[high] + 1e-9)).any():
        row = table[bad].iloc[0]
        raise ValueError(f"table: {low} {row[low]:.4g}, {middle} {row[middle]:.4g}, {high} {row[high]:.4g} "
                         f"in row {bad.idxmax()}, want {low} <= {middle} <= {high}")  # fmt: skip


def _lines(labels, name: str, most: int = len(MARKERS)) -> list[str]:
    """Require between one line and as many as can be told apart."""
    if not 1 <= len(labels) <= most:
        raise ValueError(f"{name}: got {len(labels)} lines, want 1 to {most} in one figure")
    return [str(label) for label in labels]


def _extent(value, name: str) -> tuple[float, float, float, float]:
    box = _array(value, name, 1)
    if len(box) != 4 or box[0] >= box[1] or box[2] >= box[3]:
        raise ValueError(f"{name}: got {value}, want (left, right, bottom, top), increasing")
    return tuple(box)


def _texts(texts, name: str, n: int) -> list[str]:
    if isinstance(texts, str) or len(texts) != n:
        raise ValueError(f"{name}: got {texts!r}, want {n} texts, one {'a row' if name == 'rows' else 'an image'}")
    return [str(text) for text in texts]


def _picture(ax: Axes, image: np.ndarray, text: str = "", size: float = 10, **kwargs):
    ax.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", **kwargs})
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="#999999", linewidth=0.6)
    return ax.set_title(text, fontsize=size, fontweight="normal", loc="center", pad=3)


def _text_size(texts, columns: int) -> float:
    """Largest type in which the longest text fits over its image: a character is about 0.6 sizes wide."""
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return float(np.clip(72 * _WIDTH / columns / (0.62 * max(longest, 1)), 6.5, 10))


@_styled
def images(x, *, titles=None, rows=None, data_name: str = "", columns: int = 8) -> Figure:
    """Rows of images, grey or RGB.

    x: (N, C, H, W) in [0, 1], C = 1 or 3. titles: N short texts above the images. rows: a text at the left of each row.
    Raises ValueError for other shapes or values, or another number of titles or rows.

    Example:
        >>> fig = images(torch.rand(3, 1, 8, 8), titles=["a", "b", "c"], data_name="noise")
    """
    pictures = _images(x, "x")
    n, columns = len(pictures), min(checks.positive_int(columns, "columns"), len(pictures))
    titles = _texts(titles, "titles", n) if titles is not None else [""] * n
    size, down = _text_size(titles, columns), math.ceil(n / columns)
    beside = _texts(rows, "rows", down) if rows is not None else [""] * down
    lines = max(text.count("\n") + 1 for text in titles) if any(titles) else 0
    fig = _figure(0.35 * bool(data_name) + down * (min(_WIDTH / columns, 1.6) + 0.02 + lines * size / 60))
    fig.get_layout_engine().set(hspace=0.02, h_pad=0.03, w_pad=0.03)
    axes = fig.subplots(down, columns, squeeze=False).flat
    for ax, picture, text in zip(axes, pictures, titles, strict=False):
        _picture(ax, picture, text, size)
    for ax, text in zip(axes[::columns], beside, strict=True):
        ax.set_ylabel(text, fontsize=10, rotation=0, ha="right", va="center")
    for ax in axes[n:]:
        ax.set_axis_off()
    if data_name:
        fig.suptitle(_title("", data_name), x=0.01, ha="left")
    return fig if rows is None else _fit(fig, down, columns)


def _magnification(delta: np.ndarray) -> float:
    """The largest factor with one significant digit that keeps |factor * delta| <= 1, at least 1."""
    largest = float(np.abs(delta).max())
    if largest == 0:
        return 1.0
    factor = (1 + 1e-5) / largest  # 1 / 0.1 in float32 is 9.9999998 and means 10
    power = 10.0 ** math.floor(math.log10(factor))
    return max(1.0, math.floor(factor / power) * power)


@_styled
def perturbations(x, x_adv, *, labels=None, labels_adv=None, classes=None, data_name: str = "", magnify=None) -> Figure:
    """The originals, the perturbation x_adv - x magnified about 0, the adversarial images: three rows, or one for N = 1.

    x, x_adv: (N, C, H, W) in [0, 1], N at most 12. labels: the true classes (N,); labels_adv: what the model sees in
    x_adv (N,), marked with a cross and a heavy frame where it differs from `labels`. classes: names of the classes.
    magnify: factor > 0; by default the largest round one that fits. Grey images: red is brighter, blue darker;
    RGB images: mid-grey is no change. Raises ValueError for other shapes, values or labels.

    Example:
        >>> x = torch.rand(4, 1, 8, 8)
        >>> fig = perturbations(x, (x + 0.1).clamp(0, 1), labels=[0, 1, 2, 3], labels_adv=[0, 1, 3, 2])
    """
    before, after = _images(x, "x"), _images(x_adv, "x_adv")
    n = len(before)
    if before.shape != after.shape:
        raise ValueError(f"x_adv: got shape {tuple(x_adv.shape)}, want {tuple(x.shape)}, the shape of x")
    if n > 12:
        raise ValueError(f"x: got {n} images, want at most 12: choose some, for example x[:6]")
    delta = after.astype(float) - before
    factor = checks.nonnegative(magnify, "magnify") if magnify is not None else _magnification(delta)
    if factor == 0:
        raise ValueError("magnify: got 0, want a factor > 0")

    names, names_adv = _class_names(labels, "labels", n, classes), _class_names(labels_adv, "labels_adv", n, classes)
    wrong = [bool(a and b and a != b) for a, b in zip(names, names_adv, strict=True)]
    names_adv = [f"✗ {name}" if bad else name for name, bad in zip(names_adv, wrong, strict=True)]
    key = "red: brighter, blue: darker" if before.ndim == 3 else "mid-grey: no change"
    shown = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if before.ndim == 3 else {}
    change = np.clip(factor * delta, -1, 1)
    rows = (
        ("original" + (" and its class" if any(names) else ""), before, names, {}),
        (f"perturbation × {factor:g} ({key})", change if before.ndim == 3 else (1 + change) / 2, [""] * n, shown),
        ("adversarial" + (" and what the model sees" if any(names_adv) else ""), after, names_adv, {}),
    )
    heights = [min(_WIDTH / n, 1.5) + 0.26 + 0.19 * any(row) for row in (names, [], names_adv)]
    fig = _figure(0.3 * bool(data_name) + (2.3 if n == 1 else sum(heights)))
    fig.get_layout_engine().set(h_pad=0.03, w_pad=0.03)
    if data_name:
        fig.suptitle(_title("", data_name), x=0.01, ha="left")
    if n == 1:  # side by side, each under its heading
        titles = [re.sub(r" \(|, | (?=and )", "\n", row[0].rstrip(")")) for row in rows]
        for ax, title, (_, pictures, texts, kwargs) in zip(fig.subplots(1, 3), titles, rows, strict=True):
            _picture(ax, pictures[0], "\n".join(filter(None, [title, *texts])), _text_size(titles, 3), **kwargs)
        ax.spines[:].set(**{"color": "#A33F00", "linewidth": 2} if wrong[0] else {})
        return _fit(fig, 1, 3)
    size = _text_size(names + names_adv, n)
    for panel, (heading, pictures, texts, kwargs) in zip(
        fig.subfigures(3, 1, height_ratios=heights), rows, strict=True
    ):
        panel.suptitle(heading, x=0.01, ha="left", fontsize=10.5, fontweight="normal")
        for ax, picture, text in zip(panel.subplots(1, n, squeeze=False).flat, pictures, texts, strict=True):
            title = _picture(ax, picture, text, size, **kwargs)
            if text.startswith("✗"):
                title.set(fontweight="bold", color="#A33F00")
                ax.spines[:].set(color="#A33F00", linewidth=2)
    return fig


def _class_names(labels, name: str, n: int, classes) -> list[str]:
    """Names of n labels; empty texts where there are none."""
    if labels is None:
        return [""] * n
    values = _array(labels, name, 1).astype(int)
    if len(values) != n:
        raise ValueError(f"{name}: got {len(values)} labels, want {n}, one an image")
    if classes is None:
        return [str(v) for v in values]
    if values.min() < 0 or values.max() >= len(classes):
        raise ValueError(f"{name}: got labels in [{values.min()}, {values.max()}], want [0, {len(classes) - 1}]")
    return [str(classes[v]) for v in values]


@_styled
def robustness_curve(table, *, data_name: str = "", xlabel: str = r"$\varepsilon$ (pixel values in [0, 1])",
                     ax: Axes | None = None) -> Figure:  # fmt: skip
    """Robust accuracy in per cent against eps, one line a model (and attack), its interval shaded.

    table: columns eps >= 0, accuracy, low, high in [0, 1], model, and attack where several are compared.
    Raises ValueError for missing columns, values outside [0, 1] or an eps that a line has twice.

    Example:
        >>> table = pd.DataFrame({"eps": [0, 0.1], "accuracy": [0.9, 0.5], "low": [0.8, 0.4], "high": [1.0, 0.6]})
        >>> fig = robustness_curve(table.assign(model="linear"), data_name="digits")
    """
    table = _table(table, ("eps", "accuracy", "low", "high", "model"))
    if not table[["accuracy", "low", "high"]].stack().between(0, 1).all() or (table["eps"] < 0).any():
        raise ValueError("table: want accuracy, low, high in [0, 1] (not per cent) and eps >= 0")
    _ordered(table, "low", "accuracy", "high")
    keys = ["model", "attack"] if "attack" in table.columns else ["model"]
    if table.duplicated([*keys, "eps"]).any():
        raise ValueError(f"table: want one row for each {', '.join(keys)} and eps")
    groups = {", ".join(map(str, key)): rows for key, rows in table.groupby(keys, sort=False)}
    own, ax = ax is None, _axes(ax)
    for i, label in enumerate(_lines(groups, "table")):
        rows = groups[label].sort_values("eps")
        ax.fill_between(rows["eps"], 100 * rows["low"], 100 * rows["high"], color=COLOURS[i % 6], alpha=0.2, lw=0)
        ax.plot(rows["eps"], 100 * rows["accuracy"], label=label, **_line(i))
    ax.set(xlabel=xlabel, ylabel="robust accuracy (%)", ylim=(-2, 102), title=_title("Robust accuracy", data_name))
    return _legend(ax, grow=own)


@_styled
def loss_trace(traces, *, data_name: str = "", ylabel: str = "loss (cross-entropy)", title: str = "Loss",
               ax: Axes | None = None) -> Figure:  # fmt: skip
    """Loss against step: the median of the runs, and each single run faint behind it.

    traces: dict label -> (steps,) or (runs, steps); the first value is step 0.
    Raises ValueError for an empty dict, other shapes, NaN or infinite values.

    Example:
        >>> fig = loss_trace({"alpha = 0.01": np.random.rand(5, 20).cumsum(1)}, data_name="digits")
    """
    if not isinstance(traces, dict):
        raise TypeError(f"traces: got {type(traces).__name__}, want a dict label -> array (steps,) or (runs, steps)")
    labels = _lines(traces, "traces")
    runs = [np.atleast_2d(_array(trace, f"traces[{label!r}]", 1, 2)) for label, trace in traces.items()]
    own, ax = ax is None, _axes(ax)
    for i, (label, values) in enumerate(zip(labels, runs, strict=True)):
        steps = np.arange(values.shape[1])
        if len(values) > 1:
            ax.plot(steps, values.T, color=COLOURS[i % 6], alpha=max(0.12, 0.4 / len(values) ** 0.5), lw=0.9, ls="-",
                    marker="", zorder=1.5)  # fmt: skip
        every = max(1, len(steps) // 8)
        ax.plot(steps, np.median(values, axis=0), label=label, markevery=(i % every, every), **_line(i))
    if any(len(values) > 1 for values in runs):
        ax.plot([], [], color="#888888", lw=0.9, ls="-", marker="", label="single runs")
    ax.set(xlabel="step", ylabel=ylabel, title=_title(title, data_name))
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _legend(ax, grow=own)


def _ball(norm: str, eps: float) -> np.ndarray:
    """Corner points (M, 2) of the eps-ball around the origin of the plane."""
    if norm == "L2":
        angle = np.linspace(0, 2 * np.pi, 181)
        return eps * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners = {"L1": [(1, 0), (0, 1), (-1, 0), (0, -1)], "Linf": [(1, 1), (-1, 1), (-1, -1), (1, -1)]}
    return eps * np.array(corners[norm], dtype=float)


@_styled
def decision_regions(predict, points, labels, *, bounds=None, balls=None, classes=None, data_name: str = "",
                     axis_labels=("$x_1$", "$x_2$"), ax: Axes | None = None) -> Figure:  # fmt: skip
    """Regions of a classifier in the plane, told apart by tint and hatching, with points and eps-balls around them.

    predict: float32 tensor (M, 2) -> classes (M,) or logits (M, K). points: (N, 2); labels: classes (N,), in 0..7.
    bounds: (left, right, bottom, top), by default all points (and balls) with a margin.
    balls: (norm, eps) with norm "L1", "L2" or "Linf". Raises ValueError for other shapes, labels or norms.

    Example:
        >>> fig = decision_regions(lambda x: x, [[0.2, 0.8], [0.7, 0.3]], [1, 0], balls=("L2", 0.1))
    """
    points, labels = _array(points, "points", 2), _array(labels, "labels", 1).astype(int)
    if points.shape[1] != 2 or len(points) != len(labels):
        raise ValueError(f"points: got {points.shape} for {len(labels)} labels, want (N, 2) and (N,)")
    if labels.min() < 0 or labels.max() >= len(HATCHES):
        raise ValueError(f"labels: got [{labels.min()}, {labels.max()}], want classes in [0, {len(HATCHES) - 1}]")
    norm, eps = balls if balls is not None else ("L2", 0)
    checks.choice(norm, "balls", ("L1", "L2", "Linf"))
    checks.nonnegative(eps, "balls")
    if bounds is None:
        low, high = points.min(axis=0) - eps, points.max(axis=0) + eps
        margin = 0.1 * max((high - low).max(), 1e-3)
        bounds = (low[0] - margin, high[0] + margin, low[1] - margin, high[1] + margin)
    left, right, bottom, top = _extent(bounds, "bounds")

    u, v = np.meshgrid(np.linspace(left, right, 240), np.linspace(bottom, top, 240))
    with torch.no_grad():
        answer = predict(torch.tensor(np.stack([u.ravel(), v.ravel()], axis=1), dtype=torch.float32))
    answer = _array(answer, "predict", 1, 2)
    if len(answer) != u.size:
        raise ValueError(f"predict: got {len(answer)} answers for {u.size} points")
    region = (answer if answer.ndim == 1 else answer.argmax(axis=1)).astype(int).reshape(u.shape)
    if region.min() < 0 or region.max() >= len(HATCHES):
        raise ValueError(f"predict: got classes in [{region.min()}, {region.max()}], want [0, {len(HATCHES) - 1}]")

    own, ax = ax is None, _axes(ax, 4.4, grid=None)
    entries = {}
    for k in np.union1d(region, labels):
        colour = COLOURS[k % 6]
        tint = tuple(0.28 * c + 0.72 for c in to_rgb(colour))
        if (mask := region == k).any():
            ax.contourf(u, v, mask, levels=[0.5, 1.5], colors=[tint], hatches=[HATCHES[k]])
            if not mask.all():
                ax.contour(u, v, mask, levels=[0.5], colors=[_INK], linewidths=1.2)
        dots = ax.plot(*points[labels == k].T, ls="", marker=MARKERS[k], color=colour, mec="white", ms=8, zorder=3)
        name = classes[k] if classes is not None else f"class {k}"
        entries[f"{name}: region, points"] = (Patch(facecolor=tint, hatch=HATCHES[k], edgecolor=_INK, lw=0.8), dots[0])
    if eps > 0:
        for point in points:
            ax.add_patch(Polygon(point + _ball(norm, eps), closed=True, fill=False, lw=1.2, edgecolor=_INK, zorder=2.5))
    ax.locator_params(nbins=6, steps=[1, 2, 5, 10])
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xlabel=axis_labels[0], ylabel=axis_labels[1],
           title=_title("Decision regions", data_name))  # fmt: skip
    return _legend(ax, grow=own, entries=entries)


@_styled
def norm_balls(eps: float = 1.0, *, gradient=(0.9, 0.5)) -> Figure:
    """The L1, L2 and Linf balls of the plane, and in each the step that gains most along one gradient.

    max of <g, delta> over ||delta||_p <= eps is eps * ||g||_q with 1/p + 1/q = 1: the dual norm, in the titles.
    eps > 0; gradient: two numbers, not both 0 (else ValueError).

    Example:
        >>> fig = norm_balls(eps=0.5)
    """
    if checks.nonnegative(eps, "eps") == 0:
        raise ValueError("eps: got 0, want a radius > 0")
    g = _array(gradient, "gradient", 1)
    if g.shape != (2,) or not g.any():
        raise ValueError(f"gradient: got {gradient}, want two numbers, not both 0")
    largest = np.abs(g).argmax()
    steps = {
        "L1": (r"\ell_1", r"\infty", np.sign(g) * (np.arange(2) == largest)),
        "L2": (r"\ell_2", "2", g / np.linalg.norm(g)),
        "Linf": (r"\ell_\infty", "1", np.sign(g)),
    }
    fig = _figure(2.75)
    limit, along = 1.75 * eps, g / np.linalg.norm(g)
    for ax, (norm, (name, dual, step)) in zip(fig.subplots(1, 3, sharey=True), steps.items(), strict=True):
        _axes(ax)
        delta = eps * step
        ax.add_patch(Polygon(_ball(norm, eps), closed=True, facecolor="#0072B226", edgecolor=COLOURS[0], lw=2))
        across = np.array([-along[1], along[0]])
        line = delta + np.outer([-6 * eps, 6 * eps], across)
        ax.plot(*line.T, color=_INK, ls=DASHES[2], lw=1.4, marker="")
        _arrow(ax, 1.35 * eps * along, COLOURS[1], DASHES[0], 2)
        _arrow(ax, delta, COLOURS[2], DASHES[0], 3.2)
        ax.plot(*delta, marker="o", color=COLOURS[2], ms=6, zorder=4)
        value = f"{float(g @ delta):.2f}"
        ax.set_title(f"${name}$ ball\n$\\varepsilon\\,||g||_{{{dual}}}$ = {value}", fontsize=10.5, loc="center",
                     fontweight="normal")  # fmt: skip
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel=r"$\delta_1$",
               xticks=(-eps, 0, eps), xticklabels=(f"−{eps:g}", "0", f"{eps:g}"),
               yticks=(-eps, 0, eps), yticklabels=(f"−{eps:g}", "0", f"{eps:g}"))  # fmt: skip
    fig.axes[0].set_ylabel(r"$\delta_2$")
    handles = [
        Line2D([], [], color=COLOURS[1], lw=2, label="gradient $g$"),
        Line2D([], [], color=COLOURS[2], lw=3.2, marker="o", label=r"best step $\delta$"),
        Line2D([], [], color=_INK, ls=DASHES[2], lw=1.4, label=r"equal $\langle g, \delta\rangle$"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
    return fig


def _arrow(ax: Axes, end: np.ndarray, colour: str, dashes, width: float) -> None:
    ax.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width, "ls": dashes,
                                             "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13})  # fmt: skip


@_styled
def loss_surface(values, extent, *, limits=None, marks=None, path=None, data_name: str = "",
                 axis_labels=("along the gradient", "along a random direction"), label: str = "loss (cross-entropy)",
                 ax: Axes | None = None) -> Figure:  # fmt: skip
    """A loss over two directions as filled contours with lines, with points and the path of an attack on it.

    values: (rows, columns), at least 2 x 2; row 0 is the bottom. extent: (left, right, bottom, top).
    limits: (low, high) of the colours, to compare surfaces; without, the least and the largest of the values.
    marks: dict label -> (x, y). path: (T, 2).
    Raises ValueError for other shapes, NaN or infinite values, and values outside the limits.

    Example:
        >>> u, v = np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21))
        >>> fig = loss_surface(u**2 + v, (-1, 1, -1, 1), marks={"image": (0, 0)}, path=[(0, 0), (0.5, 0.6)])
    """
    values = _array(values, "values", 2)
    if min(values.shape) < 2:
        raise ValueError(f"values: got shape {values.shape}, want at least (2, 2)")
    left, right, bottom, top = _extent(extent, "extent")
    low, high = values.min(), values.max()
    if limits is not None:
        limits = _array(limits, "limits", 1)
        if len(limits) != 2 or not limits[0] <= low <= high <= limits[1]:
            raise ValueError(f"limits: got {limits}, want (low, high) around the values' {low:.6g} to {high:.6g}")
        low, high = limits
    if marks is not None and not isinstance(marks, dict):
        raise TypeError(f"marks: got {type(marks).__name__}, want a dict label -> (x, y)")
    marks = {str(name): _array(point, f"marks[{name!r}]", 1) for name, point in (marks or {}).items()}
    if bad := [name for name, point in marks.items() if len(point) != 2]:
        raise ValueError(f"marks[{bad[0]!r}]: want two numbers (x, y)")
    if path is not None and (path := _array(path, "path", 2)).shape[1] != 2:
        raise ValueError(f"path: got shape {path.shape}, want (T, 2)")
    if marks:
        _lines(marks, "marks")

    own, ax = ax is None, _axes(ax, 4.0, grid=None)
    u, v = np.linspace(left, right, values.shape[1]), np.linspace(bottom, top, values.shape[0])
    levels = np.linspace(low, high if high > low else low + 1, 15)
    filled = ax.contourf(u, v, values, levels=levels, cmap="viridis")
    if high > low:
        ax.contour(u, v, values, levels=levels[1:-1:2], colors="white", linewidths=0.7, alpha=0.8)
    bar = ax.figure.colorbar(filled, ax=ax, label=label, shrink=0.95, ticks=MaxNLocator(6, steps=[1, 2, 5, 10]))
    bar.ax.tick_params(labelsize=10, color="#666666", labelcolor=_INK)
    bar.outline.set_visible(False)
    outline = [withStroke(linewidth=4.5, foreground="white")]
    if path is not None:
        ax.plot(*path.T, color=COLOURS[2], ls="-", lw=2, marker="o", ms=3.5, label="path", path_effects=outline)
    for i, (name, point) in enumerate(marks.items()):
        ax.plot(*point, ls="", marker="*sPXDv^<>phd"[i], ms=13 if i == 0 else 9, color="white", mec="black", mew=1.4,
                label=name, zorder=3)  # fmt: skip
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel=axis_labels[0], ylabel=axis_labels[1],
           title=_title("Loss surface", data_name))  # fmt: skip
    if ax.get_legend_handles_labels()[0]:
        return _legend(ax, grow=own)
    return ax.figure


@_styled
def loss_slices(t, values_by_label, *, data_name: str = "", xlabel: str = "distance along the direction",
                ylabel: str = "loss (cross-entropy)", ax: Axes | None = None) -> Figure:  # fmt: skip
    """Slices through a loss: its value along each of several directions, at the same distances t.

    t: (T,); values_by_label: dict label -> (T,). Raises ValueError for other lengths, NaN or infinite values.

    Example:
        >>> t = np.linspace(0, 1, 20)
        >>> fig = loss_slices(t, {"gradient": t**2, "random": 0.1 * t}, data_name="digits")
    """
    t = _array(t, "t", 1)
    if not isinstance(values_by_label, dict):
        raise TypeError(f"values_by_label: got {type(values_by_label).__name__}, want a dict label -> (T,)")
    labels = _lines(values_by_label, "values_by_label")
    slices = [_array(values, f"values_by_label[{label!r}]", 1) for label, values in values_by_label.items()]
    if bad := [label for label, values in zip(labels, slices, strict=True) if values.shape != t.shape]:
        raise ValueError(f"values_by_label[{bad[0]!r}]: want shape {t.shape}, one value for each of t")
    own, ax = ax is None, _axes(ax)
    every = max(1, len(t) // 8)
    for i, (label, values) in enumerate(zip(labels, slices, strict=True)):
        ax.plot(t, values, label=label, markevery=(i % every, every), **_line(i))
    ax.set(xlabel=xlabel, ylabel=ylabel, title=_title("Slices through the loss", data_name))
    return _legend(ax, grow=own)


@_styled
def sandwich(table, *, data_name: str = "", xlabel: str = "budget", ylabel: str = "worst-case loss", truth=None,
             below: str = "attacks: at least this much", above: str = "certificates: at most this much",
             ax: Axes | None = None) -> Figure:  # fmt: skip
    """What is reached from below and what is promised from above, closing on the truth as the budget grows.

    max over names of lower <= truth <= min over names of upper; the band between the two is shaded.
    table: columns budget, lower, upper, optional exact, and optional name for several bounds on a side; lower or
    upper is NaN where a bound has only the other side. truth: a number, drawn as a line across.
    Raises ValueError for missing columns and wherever lower <= exact, truth <= upper is broken: then a bound is wrong.

    Example:
        >>> table = pd.DataFrame({"budget": [1, 10, 100], "lower": [0.1, 0.3, 0.4], "upper": [0.9, 0.6, 0.45]})
        >>> fig = sandwich(table, data_name="digits", truth=0.42)
    """
    gaps = ("lower", "upper", "exact")
    columns = ("budget", "lower", "upper", *(c for c in ("exact", "name") if c in table))
    table = _table(table, columns, gaps).sort_values("budget", kind="stable")
    if table[["lower", "upper"]].isna().all(axis=1).any():
        raise ValueError("table: a row has neither lower nor upper, want at least one of the two")
    truth = None if truth is None else float(_array(truth, "truth", 0))
    best = table.groupby("budget").agg(lower=("lower", "max"), upper=("upper", "min"))
    best["exact"] = table.groupby("budget")["exact"].first() if "exact" in table else np.nan
    best["truth"] = np.nan if truth is None else truth
    for low, high in (
        ("lower", "upper"),
        ("lower", "exact"),
        ("exact", "upper"),
        ("lower", "truth"),
        ("truth", "upper"),
    ):
        if (crossed := best[low] > best[high] + 1e-6 * best[high].abs().clip(lower=1)).any():
            row = best[crossed].iloc[0]
            raise ValueError(f"table: {low} {row[low]:.6g} above {high} {row[high]:.6g} at budget {row.name:g}, "
                             "so one of the two is not what it says")  # fmt: skip

    own, ax = ax is None, _axes(ax, 3.5)
    band = best[["lower", "upper"]].dropna()
    ax.fill_between(band.index, band["lower"], band["upper"], color=_GRID, alpha=0.75, lw=0, label="what is left open")
    sides = {}
    for side in ("upper", "lower"):
        known = table.dropna(subset=[side])
        names = known["name"].astype(str) if "name" in table else pd.Series("", index=known.index)
        sides[side] = dict(list(known.groupby(names, sort=False)))
        _lines(sides[side], f"table: {side}", most=6)
    both = set(sides["upper"]) & set(sides["lower"])
    for side, colour, markers, text in (("upper", COLOURS[0], "vDsP*h", above), ("lower", COLOURS[2], "^oX<p>", below)):
        for i, (name, rows) in enumerate(sides[side].items()):
            label = name if name and name not in both else ", ".join(filter(None, (name, text.split(":")[0])))
            ax.plot(rows["budget"], rows[side], color=colour, ls=DASHES[i], marker=markers[i], label=label)
    if "exact" in table:
        exact = table.dropna(subset=["exact"]).drop_duplicates("budget")
        ax.plot(exact["budget"], exact["exact"], color="black", lw=1.5, ls=DASHES[2], marker="", label="exact")
    if truth is not None:
        ax.axhline(truth, color="black", lw=1.5, ls=DASHES[2], label="truth")

    # Room above and beneath all curves, so that the two sentences lie on none of them.
    shown = table[[c for c in gaps if c in table]].to_numpy(dtype=float)
    low, high = np.nanmin(shown), np.nanmax(shown)
    if truth is not None:
        low, high = min(low, truth), max(high, truth)
    room = 0.2 * (high - low or 1)
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    ax.set(ylim=(low - room, high + room), yticks=ticks[(ticks >= low - room / 4) & (ticks <= high + room / 4)],
           xlabel=xlabel, ylabel=ylabel, title=_title("The sandwich", data_name))  # fmt: skip
    ax.text(0.98, 0.97, f"{above} ↓", transform=ax.transAxes, ha="right", va="top", color="#005A8C")
    ax.text(0.98, 0.03, f"{below} ↑", transform=ax.transAxes, ha="right", va="bottom", color="#A33F00")
    return _legend(ax, grow=own)


@_styled
def bars_against_published(table, *, data_name: str = "", xlabel: str = "accuracy (%)",
                           ax: Axes | None = None) -> Figure:  # fmt: skip
    """Our measurements with their intervals beside the published values, one line a row, in the table's order.

    table: columns row (text), ours, low, high, published, all in the unit of `xlabel`; published may be NaN.
    Raises ValueError for missing columns, NaN elsewhere, or low <= ours <= high broken.

    Example:
        >>> table = pd.DataFrame({"row": ["clean"], "ours": [98.4], "low": [98.1], "high": [98.7], "published": [98.5]})
        >>> fig = bars_against_published(table, data_name="MNIST")
    """
    table = _table(table, ("row", "ours", "low", "high", "published"), ("published",))
    _ordered(table, "low", "ours", "high")
    own, ax = ax is None, _axes(ax, 1.3 + 0.5 * len(table), grid="x")
    y, ours = np.arange(len(table)), table["ours"]
    known = "ours, with interval" if (table["low"] < table["high"]).any() else "ours"
    width = [ours - table["low"], table["high"] - ours]
    ax.errorbar(ours, y + 0.14, xerr=width, ls="", marker="o", color=COLOURS[0], ms=7, capsize=4, label=known)
    beside = table["published"].notna().any()  # nobody publishes figures on stand-in data
    if beside:
        ax.plot(
            table["published"], y - 0.14, ls="", marker="D", color=COLOURS[2], mfc="white", mew=2, label="published"
        )
    ax.set_yticks(y, [_wrap(row, 22) for row in table["row"]])
    title = _title("Ours and published" if beside else "Ours", data_name, 30)
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=xlabel, title=title)
    return _legend(ax, grow=own)


@_styled
def curves(x, values_by_label, *, title: str, xlabel: str, ylabel: str, data_name: str = "", log: bool = False,
           ax: Axes | None = None) -> Figure:  # fmt: skip
    """Several quantities over one axis: a line for each label, on a logarithmic vertical axis with `log`.

    x: (T,); values_by_label: dict label -> (T,). Raises ValueError for other lengths, NaN or infinite values.

    Example:
        >>> m = np.linspace(-2, 2, 41)
        >>> fig = curves(m, {"hinge": np.maximum(0, 1 - m)}, title="A loss", xlabel="margin", ylabel="loss")
    """
    x = _array(x, "x", 1)
    if not isinstance(values_by_label, dict):
        raise TypeError(f"values_by_label: got {type(values_by_label).__name__}, want a dict label -> (T,)")
    labels = _lines(values_by_label, "values_by_label")
    lines = [_array(values, f"values_by_label[{label!r}]", 1) for label, values in values_by_label.items()]
    if bad := [label for label, values in zip(labels, lines, strict=True) if values.shape != x.shape]:
        raise ValueError(f"values_by_label[{bad[0]!r}]: want shape {x.shape}, one value for each of x")
    own, ax = ax is None, _axes(ax)
    every = max(1, len(x) // 8)
    for i, (label, values) in enumerate(zip(labels, lines, strict=True)):
        ax.plot(x, values, label=label, markevery=(i * every // max(1, len(lines)), every), **_line(i))
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear", title=_title(title, data_name))
    if _whole(x):
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    return _legend(ax, grow=own)


@_styled
def weights(w, *, titles=None, data_name: str = "", columns: int = 4, limit: float | None = None) -> Figure:
    """Signed pictures (weights, gradients, templates) on one common scale, symmetric about 0: red positive, blue negative.

    w: (N, H, W) or (N, 1, H, W), any finite numbers. titles: N short texts. limit: the value of full colour, by default the
    99.5 % quantile of |w|. Raises ValueError for other shapes, values or another number of titles.

    Example:
        >>> fig = weights(torch.randn(2, 1, 8, 8), titles=["regular", "robust"], data_name="digits")
    """
    pictures = _array(w, "w", 3, 4)
    if pictures.ndim == 4:
        if pictures.shape[1] != 1:
            raise ValueError(f"w: got shape {pictures.shape}, want (N, H, W) or (N, 1, H, W)")
        pictures = pictures[:, 0]
    n, columns = len(pictures), min(checks.positive_int(columns, "columns"), len(pictures))
    titles = _texts(titles, "titles", n) if titles is not None else [""] * n
    limit = float(np.quantile(np.abs(pictures), 0.995)) if limit is None else checks.nonnegative(limit, "limit")
    limit = limit or 1.0
    size, rows = _text_size(titles, columns), math.ceil(n / columns)
    lines = max(text.count("\n") + 1 for text in titles) if any(titles) else 0
    fig = _figure(0.35 * bool(data_name) + 0.6 + rows * (min(_WIDTH / columns, 2.2) + 0.02 + lines * size / 60))
    fig.get_layout_engine().set(hspace=0.02, h_pad=0.03, w_pad=0.03)
    axes = fig.subplots(rows, columns, squeeze=False).flat
    for ax, picture, text in zip(axes, pictures, titles, strict=False):
        _picture(ax, picture, text, size, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for ax in axes[n:]:
        ax.set_axis_off()
    shown = axes[0].images[0]
    bar = fig.colorbar(shown, ax=list(axes), location="bottom", shrink=0.7, aspect=30, extend="both", pad=0.02)
    bar.ax.tick_params(labelsize=10, color="#666666", labelcolor=_INK)
    bar.outline.set_visible(False)
    bar.set_ticks([-limit, 0, limit], labels=[f"−{limit:.2g}", "0", f"{limit:.2g}"])
    if data_name:
        fig.suptitle(_title("", data_name), x=0.01, ha="left")
    return _fit(fig, rows, columns)


@_styled
def histograms(values_by_label, *, title: str, xlabel: str, data_name: str = "", bins: int = 40, mark: float | None = 0.0,
               ylabel: str = "images") -> Figure:  # fmt: skip
    """One histogram a label, stacked over one another on a common axis, each with how many values it has; a line at `mark`.

    values_by_label: dict label -> (N,), at most 6; the numbers of values may differ, and an empty one is said to be empty.
    Raises ValueError for NaN or infinite values, or nothing to show at all.

    Example:
        >>> fig = histograms({"a": np.random.randn(99), "b": np.random.randn(50)}, title="Logits", xlabel="f(x)")
    """
    if not isinstance(values_by_label, dict):
        raise TypeError(f"values_by_label: got {type(values_by_label).__name__}, want a dict label -> (N,)")
    labels = _lines(values_by_label, "values_by_label", most=6)
    rows = [
        np.array([]) if len(v) == 0 else _array(v, f"values_by_label[{k!r}]", 1) for k, v in values_by_label.items()
    ]
    everything = np.concatenate(rows)
    if everything.size == 0:
        raise ValueError("values_by_label: got no values at all, want at least one")
    edges = np.histogram_bin_edges(
        np.append(everything, [] if mark is None else mark), checks.positive_int(bins, "bins")
    )
    fig = _figure(1.0 + 0.95 * len(rows))
    for i, (ax, label, values) in enumerate(
        zip(fig.subplots(len(rows), 1, sharex=True, squeeze=False).flat, labels, rows, strict=True)
    ):
        _axes(ax, grid="y")
        ax.hist(values, edges, color=COLOURS[i % 6], hatch=HATCHES[i], edgecolor="white", linewidth=0.4)
        if mark is not None:
            ax.axvline(mark, color=_INK, lw=1.2)
        ax.set_title(f"{label} ({len(values) or 'none'})", fontsize=10.5, fontweight="normal", pad=3)
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.set_ylabel(ylabel)
    ax.set_xlabel(xlabel)
    fig.suptitle(_title(title, data_name), x=0.01, ha="left")
    return fig


@_styled
def matrix(table, *, title: str, xlabel: str, ylabel: str, data_name: str = "", limits=(0.0, 100.0), form: str = "{:.0f}",
           ax: Axes | None = None) -> Figure:  # fmt: skip
    """A table of numbers as tinted cells, darker for larger, each with its number: rows down, columns across.

    table: DataFrame of finite numbers; limits: values of the lightest and darkest tint; form: how numbers are written.
    Raises ValueError for an empty table, NaN or infinite values, or limits that are not low < high.

    Example:
        >>> t = pd.DataFrame([[100, 40], [35, 100]], index=["A", "B"], columns=["A", "B"])
        >>> fig = matrix(t, title="Transfer (%)", xlabel="attacked", ylabel="made on")
    """
    values = _array(table.to_numpy(), "table", 2)
    if not limits[0] < limits[1]:
        raise ValueError(f"limits: got {limits}, want (low, high) with low < high")
    ax = _axes(ax, 1.6 + 0.42 * len(table), grid=None)
    ax.imshow(values, cmap="Blues", vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = (value - limits[0]) / (limits[1] - limits[0]) > 0.71  # there black and white both keep 4.5 : 1
        ax.text(j, i, form.format(value), ha="center", va="center", fontsize=10, color="white" if dark else "black")
    ax.set_xticks(range(values.shape[1]), [_wrap(c, 8) for c in table.columns], fontsize=9.5)
    ax.set_yticks(range(len(values)), [str(r) for r in table.index], fontsize=9.5)
    ax.tick_params(length=0)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=_title(title, data_name))
    return ax.figure


@_styled
def points(
    x, y, labels, *, title: str, xlabel: str, ylabel: str, data_name: str = "", ax: Axes | None = None
) -> Figure:
    """One marked point for each label, named beneath the axes: two quantities of a few things against each other.

    x, y: (n,) finite; labels: n different short texts, at most 12. Raises ValueError otherwise.

    Example:
        >>> fig = points([91, 97], [0.8, 0.4], ["linear", "MLP"], title="T", xlabel="accuracy (%)", ylabel="distance")
    """
    x, y, labels = _array(x, "x", 1), _array(y, "y", 1), _lines(labels, "labels")
    if not len(x) == len(y) == len(labels):
        raise ValueError(f"labels: got {len(labels)} labels for {len(x)} and {len(y)} values, want as many")
    own, ax = ax is None, _axes(ax)
    for i, label in enumerate(labels):
        ax.plot(x[i : i + 1], y[i : i + 1], label=label, ms=10, **(_line(i) | {"linestyle": ""}))
    ax.margins(0.12)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=_title(title, data_name))
    return _legend(ax, grow=own)


@_styled
def sanitation(defense, x, y, *, data_name: str = "", ax: Axes | None = None) -> Figure:
    """A sanitising defence in the plane: the sphere and the slab of each class, what is kept (filled) and what goes (hollow).

    defense: `poisoning.sanitizer(x, y)`; x: (n, 2); y: (n,). Raises ValueError for data that are not two-dimensional.

    Example:
        >>> from tmlcourse.poisoning import sanitizer
        >>> x, y = torch.randn(50, 2), torch.arange(50) % 2
        >>> fig = sanitation(sanitizer(x + 3 * y[:, None], y), x + 3 * y[:, None], y)
    """
    points = _array(x, "x", 2)
    if points.shape[1] != 2:
        raise ValueError(f"x: got shape {points.shape}, want (n, 2)")
    kept, labels = np.asarray(defense.keeps(x, y).cpu()), np.asarray(y.cpu())
    own, ax = ax is None, _axes(ax, 3.6)
    centres = defense.centroids.cpu().numpy()
    around = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 181)), np.sin(t)], 1)
    for i, label in enumerate(defense.labels):
        colour, marker = COLOURS[2 * i], MARKERS[2 * i]
        for passed, face, text in ((True, colour, "kept"), (False, "none", "thrown out")):
            rows = points[(labels == label) & (kept == passed)]
            ax.plot(
                *rows.T, ls="", marker=marker, ms=4.5, mec=colour, mfc=face, alpha=0.8, label=f"class {label}, {text}"
            )
        if defense.radii is not None:
            ax.plot(*(centres[i] + float(defense.radii[i]) * around).T, color=colour, lw=2, ls="-", marker="")
        if defense.slabs is not None:
            axis, half = defense.axis.cpu().numpy(), float(defense.slabs[i])
            across = 20 * np.ptp(points) * np.array([-axis[1], axis[0]])
            for sign in (-1, 1):
                foot = centres[i] + sign * half * axis
                ax.plot(*np.stack([foot - across, foot + across]).T, color=colour, lw=1.6, ls=DASHES[1], marker="")
        ax.plot(*centres[i], ls="", marker="P", ms=11, color=colour, mec="white", mew=1.2)
    low, high = points.min(0), points.max(0)
    room = 0.12 * (high - low)
    ax.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]), xlabel="$x_1$",
           ylabel="$x_2$", aspect="equal", title=_title("Spheres (solid) and slabs (dashed)", data_name))  # fmt: skip
    return _legend(ax, grow=own)


@_styled
def ladder(below, above, *, exact: float | None = None, picture=None, limits=None, title: str = "", data_name: str = "",
           xlabel: str = "margin $z_y - z_j$ of the nearest rival") -> Figure:  # fmt: skip
    """What is known of one image's worst margin, a rung each: certificates from below, the exact value, attacks from above.

    below, above: dicts name -> number; every number of `below` is at most `exact`, every number of `above` at least.
    picture: (C, H, W) in [0, 1], drawn beside it. limits: (low, high) of the axis, so that frames of a slider agree.
    Right of the line at 0 no rival wins; a hollow mark lies beyond the axis. Raises ValueError for NaN, an empty
    ladder, or a rung on the wrong side.

    Example:
        >>> fig = ladder({"interval": -3.0, "LP": -0.2}, {"PGD": 0.5}, exact=0.4, picture=torch.rand(1, 8, 8))
    """
    rungs = []
    for name, side, values in (("below", 1, below), ("above", -1, above)):
        if not isinstance(values, dict):
            raise TypeError(f"{name}: got {type(values).__name__}, want a dict name -> number")
        rungs += [(str(label), side, float(_array(value, f"{name}[{label!r}]", 0))) for label, value in values.items()]
        if name == "below" and exact is not None:
            rungs.append(("exact", 0, float(_array(exact, "exact", 0))))
    if not rungs:
        raise ValueError("below, above: got nothing to show, want at least one number")
    low, high = (
        max([v for _, s, v in rungs if s >= 0], default=-np.inf),
        min([v for _, s, v in rungs if s <= 0], default=np.inf),
    )
    if low > high + 1e-5 * max(1, abs(high)):
        raise ValueError(f"below: got {low:.6g} above {high:.6g}, so one of the two is not what it says")
    values = [v for *_, v in rungs]
    room = 0.12 * (max(*values, 0) - min(*values, 0) or 1)
    left, right = (min(*values, 0) - room, max(*values, 0) + room) if limits is None else limits
    fig = _figure(1.35 + 0.34 * len(rungs))
    if picture is None:
        ax = fig.add_subplot()
    else:
        panel, ax = fig.subplots(1, 2, width_ratios=(1, 2.6))
        _picture(panel, _images(torch.as_tensor(picture)[None], "picture")[0])
    _axes(ax, grid="x")
    ax.axvspan(0, right, color="#009E7322", lw=0)
    ax.axvline(0, color=_INK, lw=1.2)
    colours, markers = {1: COLOURS[0], 0: "black", -1: COLOURS[2]}, {1: ">", 0: "D", -1: "<"}
    for i, (_, side, value) in enumerate(rungs):
        far = {1: left, 0: value, -1: right}[side]
        ax.plot([far, value], [i, i], color=colours[side], lw=5, alpha=0.25, ls="-", marker="", solid_capstyle="butt")
        inset = 0.02 * (right - left)
        seen = float(np.clip(value, left + inset, right - inset))
        face = colours[side] if left <= value <= right else "white"  # hollow: beyond the axis
        ax.plot(seen, i, marker=markers[side], ls="", ms=9, color=colours[side], mfc=face)
    ax.set_yticks(range(len(rungs)), [label for label, *_ in rungs])
    ax.set(xlim=(left, right), ylim=(-0.6, len(rungs) - 0.4), xlabel=xlabel)
    fig.suptitle(_title(title, data_name), x=0.01, ha="left")
    return fig


@_styled
def relu_hull(low: float, high: float, *, slopes=None, ax: Axes | None = None) -> Figure:
    """A ReLU on [low, high], low < 0 < high, its triangle, its interval's box, and lower lines of the named slopes.

    The triangle is z >= 0, z >= a, z <= u (a - l) / (u - l). slopes: dict name -> number in [0, 1].
    Raises ValueError for other bounds or slopes.

    Example:
        >>> fig = relu_hull(-1.0, 2.0, slopes={"CROWN": 1.0, "dual": 2 / 3})
    """
    if not low < 0 < high:
        raise ValueError(f"low, high: got {low}, {high}, want low < 0 < high")
    slopes = {str(k): float(_array(v, f"slopes[{k!r}]", 0)) for k, v in (slopes or {}).items()}
    if bad := [k for k, v in slopes.items() if not 0 <= v <= 1]:
        raise ValueError(f"slopes[{bad[0]!r}]: got {slopes[bad[0]]}, want a number in [0, 1]")
    own, ax = ax is None, _axes(ax, 3.4)
    box = [(low, 0), (high, 0), (high, high), (low, high)]
    ax.add_patch(Polygon(box, closed=True, facecolor="#F3F3F3", edgecolor="#999999", ls=DASHES[1], label="interval"))
    triangle = [(low, 0), (0, 0), (high, high)]
    ax.add_patch(Polygon(triangle, closed=True, facecolor="#0072B233", edgecolor=COLOURS[0], lw=2, label="triangle"))
    ax.plot([low, 0, high], [0, 0, high], color="black", lw=3, ls="-", marker="", label="ReLU")
    for i, (name, slope) in enumerate(slopes.items(), 1):
        ax.plot([low, high], [slope * low, slope * high], label=name, **_line(i) | {"marker": ""})
    ax.set(xlabel="value before, $a = (Wz + b)_j$", ylabel="value behind, $z_j$", xticks=(low, 0, high),
           xticklabels=("$l$", "0", "$u$"), title="One neuron whose sign is open")  # fmt: skip
    return _legend(ax, grow=own)


@_styled
def outlines(points, shapes, *, title: str, data_name: str = "", axis_labels=("$z_1$", "$z_2$"),
             ax: Axes | None = None) -> Figure:  # fmt: skip
    """A cloud of points in the plane and closed outlines around it, each with a colour and a line style of its own.

    points: (N, 2). shapes: dict name -> corners (M, 2), at most 6. Raises ValueError for other shapes.

    Example:
        >>> fig = outlines(torch.rand(50, 2), {"box": [(0, 0), (1, 0), (1, 1), (0, 1)]}, title="A box")
    """
    points = _array(points, "points", 2)
    if not isinstance(shapes, dict):
        raise TypeError(f"shapes: got {type(shapes).__name__}, want a dict name -> corners (M, 2)")
    corners = {name: _array(c, f"shapes[{name!r}]", 2) for name, c in shapes.items()}
    if bad := [name for name, c in {"points": points, **corners}.items() if c.shape[1] != 2]:
        raise ValueError(f"{bad[0]}: want two columns, the coordinates")
    _lines(corners, "shapes", most=6)
    own, ax = ax is None, _axes(ax, 4.2)
    ax.plot(*points.T, ls="", marker=".", ms=2.5, color="#777777", alpha=0.6, zorder=1)
    entries = {"true image": Line2D([], [], ls="", marker="o", color="#777777")}
    for i, (name, c) in enumerate(corners.items()):
        ring = np.concatenate([c, c[:1]])
        (entries[name],) = ax.plot(*ring.T, label=name, lw=2.2, **_line(i) | {"marker": ""})
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1], title=_title(title, data_name))
    return _legend(ax, grow=own, entries=entries)


@_styled
def bars(labels, values, *, title: str, xlabel: str, data_name: str = "", form: str = "{:.0f}",
         ax: Axes | None = None) -> Figure:  # fmt: skip
    """One horizontal bar a label, in the order given from the top, each with its number at its end.

    labels: n texts; values: (n,) numbers >= 0; form: how numbers are written. Raises ValueError otherwise.

    Example:
        >>> fig = bars(["a", "b"], [12, 3], title="Work", xlabel="seconds")
    """
    values = _array(values, "values", 1)
    if (values < 0).any():
        raise ValueError(f"values: got {values.min():.4g}, want numbers >= 0")
    labels = _texts(labels, "labels", len(values))
    ax = _axes(ax, 1.2 + 0.48 * len(values), grid="x")
    place = np.arange(len(values))
    ax.barh(place, values, height=0.62, color=COLOURS[0])
    for y, value in zip(place, values, strict=True):
        ax.annotate(form.format(value), (value, y), (4, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_yticks(place, [_wrap(label, 24) for label in labels])
    ax.set(ylim=(len(values) - 0.5, -0.5), xlim=(0, 1.12 * (values.max() or 1)), xlabel=xlabel,
           title=_title(title, data_name, 30))  # fmt: skip
    return ax.figure


@_styled
def before_after(table, *, title: str, xlabel: str, data_name: str = "", mark=None, names=("before", "after"),
                 ax: Axes | None = None) -> Figure:  # fmt: skip
    """One line a row from a value before (hollow) to the value after (filled), in the table's order.

    table: columns row (text), before, after, all in the unit of `xlabel`, at most 30 rows. mark: the row to stand out, an
    index. names: what the two ends are called. Raises ValueError for missing columns or values that are not finite.

    Example:
        >>> table = pd.DataFrame({"row": ["alcohol", "pH"], "before": [0.3, -0.1], "after": [0.0, -0.1]})
        >>> fig = before_after(table, title="Weights", xlabel="weight", mark=0)
    """
    table = _table(table, ("row", "before", "after"))
    if len(table) > 30:
        raise ValueError(f"table: got {len(table)} rows, want at most 30")
    own, ax = ax is None, _axes(ax, 1.1 + 0.27 * len(table), grid="x")
    y = np.arange(len(table))
    chosen = np.zeros(len(table), dtype=bool)
    if mark is not None:
        chosen[mark] = True
    for i, (before, after) in enumerate(zip(table["before"], table["after"], strict=True)):
        colour, width = (COLOURS[2], 3) if chosen[i] else (COLOURS[0], 1.5)
        ax.plot([before, after], [i, i], ls="-", lw=width, color=colour, marker="")
    colours = np.where(chosen, COLOURS[2], COLOURS[0])
    ax.scatter(table["before"], y, s=48, marker="o", facecolors="white", edgecolors=colours, linewidths=2, zorder=3)
    ax.scatter(table["after"], y, s=42, marker="D", c=colours, zorder=4)
    ax.axvline(0, color="#666666", lw=1, ls="-", zorder=0)
    ax.set_yticks(y, [textwrap.shorten(str(row), 24, placeholder="…") for row in table["row"]])
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=xlabel, title=_title(title, data_name, 34))
    entries = {
        names[0]: Line2D([], [], ls="", marker="o", color=COLOURS[0], mfc="white", mew=2),
        names[1]: Line2D([], [], ls="", marker="D", color=COLOURS[0]),
    }
    return _legend(ax, grow=own, entries=entries)


@_styled
def group_intervals(table, *, title: str, data_name: str = "", xlabel: str = "share (%)",
                    ax: Axes | None = None) -> Figure:  # fmt: skip
    """One number of several groups with its interval, side by side for each row; hollow where a group is too small.

    table: columns row (text), group (text), value, low, high, all in the unit of `xlabel`, and perhaps small (bool);
    rows and groups in the table's order, at most 6 groups. Raises ValueError for missing columns or values out of order.

    Example:
        >>> table = pd.DataFrame({"row": ["FPR"] * 2, "group": ["a", "b"], "value": [20, 40]})
        >>> fig = group_intervals(table.assign(low=table.value - 5, high=table.value + 6), title="Errors")
    """
    table = _table(table, ("group", "row", "value", "low", "high"))
    table = table.assign(group=table["group"].astype(str))
    _ordered(table, "low", "value", "high")
    rows, names = list(dict.fromkeys(table["row"])), _lines(dict.fromkeys(table["group"]), "table: group", most=6)
    step = 0.72 / len(names)
    own, ax = ax is None, _axes(ax, 1.0 + len(rows) * (0.2 + 0.22 * len(names)), grid="x")
    for i, name in enumerate(names):
        mine = table[table["group"] == name]
        y = np.array([rows.index(row) for row in mine["row"]]) + step * (i - (len(names) - 1) / 2)
        small = mine["small"].to_numpy(bool) if "small" in mine else np.zeros(len(mine), bool)
        ax.errorbar(mine["value"], y, xerr=[mine["value"] - mine["low"], mine["high"] - mine["value"]], ls="", marker="",
                    color=COLOURS[i], capsize=3.5, elinewidth=2)  # fmt: skip
        for hollow in (False, True):
            ax.plot(mine["value"][small == hollow], y[small == hollow], ls="", marker=MARKERS[i], ms=7.5, mew=2, zorder=3,
                    color=COLOURS[i], mfc="white" if hollow else COLOURS[i])  # fmt: skip
    for i in range(1, len(rows)):
        ax.axhline(i - 0.5, color=_GRID, lw=0.8, ls="-", zorder=0)
    ax.set_yticks(range(len(rows)), [_wrap(row, 18) for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, title=_title(title, data_name, 34))
    entries = {name: Line2D([], [], ls="", marker=MARKERS[i], color=COLOURS[i], ms=7.5) for i, name in enumerate(names)}
    if "small" in table and table["small"].any():
        entries["too few to judge"] = Line2D([], [], ls="", marker="o", color="#555555", mfc="white", mew=2, ms=7.5)
    return _legend(ax, grow=own, entries=entries)


@_styled
def calibration(table, *, data_name: str = "", xlabel: str = "score", diagonal: bool = True,
                ax: Axes | None = None) -> Figure:  # fmt: skip
    """What happened to people with the same score, one line a group, each share with its interval.

    table: columns group, score, observed, low, high, shares in [0, 1], at most 6 groups. diagonal: draw the line on which
    a score means what it says. Raises ValueError for missing columns or low <= observed <= high broken.

    Example:
        >>> table = pd.DataFrame({"group": ["a", "a"], "score": [0.2, 0.8], "observed": [0.3, 0.7]})
        >>> fig = calibration(table.assign(low=table.observed - 0.1, high=table.observed + 0.1))
    """
    table = _table(table, ("group", "score", "observed", "low", "high"))
    table = table.assign(group=table["group"].astype(str))
    _ordered(table, "low", "observed", "high")
    names = _lines(dict.fromkeys(table["group"]), "table: group", most=6)
    own, ax = ax is None, _axes(ax, 3.6)
    if diagonal:
        ax.plot([0, 1], [0, 100], color="#888888", lw=1.2, ls=DASHES[2], marker="")
    reach = np.ptp(table["score"]) or 1
    for i, name in enumerate(names):
        mine = table[table["group"] == name].sort_values("score")
        x = mine["score"] + 0.008 * reach * (i - (len(names) - 1) / 2)
        error = 100 * np.array([mine["observed"] - mine["low"], mine["high"] - mine["observed"]])
        line = _line(2 * i)
        ax.fill_between(x, 100 * mine["low"], 100 * mine["high"], color=line["color"], alpha=0.13, lw=0)
        ax.errorbar(x, 100 * mine["observed"], yerr=error, capsize=3, elinewidth=1.2, label=name, **line)
    ax.set(ylim=(0, 100), xlabel=xlabel, ylabel="had the outcome (%)", title=_title("Calibration by group", data_name))
    return _legend(ax, grow=own)


@_styled
def roc(curves, *, points=None, data_name: str = "", title: str = "ROC by group", hulls: bool = True,
        ax: Axes | None = None) -> Figure:  # fmt: skip
    """ROC curves, one a group, over the region that every group reaches by drawing lots, and marked points.

    curves: dict name -> (T, 2) of FPR and TPR in [0, 1] from (0, 0) to (1, 1), rising, at most 6. points: dict label ->
    (FPR, TPR), or -> (M, 2) for the same mark at several places. hulls: shade what all mixtures reach.
    Raises ValueError for other shapes or values outside [0, 1].

    Example:
        >>> curves = {"a": [(0, 0), (0.2, 0.6), (1, 1)], "b": [(0, 0), (0.3, 0.7), (1, 1)]}
        >>> fig = roc(curves, points={"equal": (0.3, 0.65)})
    """
    if not isinstance(curves, dict):
        raise TypeError(f"curves: got {type(curves).__name__}, want a dict name -> (T, 2)")
    lines = {name: _array(c, f"curves[{name!r}]", 2) for name, c in curves.items()}
    marks = {name: np.atleast_2d(_array(p, f"points[{name!r}]", 1, 2)) for name, p in (points or {}).items()}
    for what, found in (("curves", lines), ("points", marks)):
        for name, c in found.items():
            if c.shape[1] != 2 or c.min() < -1e-9 or c.max() > 1 + 1e-9:
                raise ValueError(
                    f"{what}[{name!r}]: got shape {c.shape} in [{c.min():.3g}, {c.max():.3g}], want (., 2) in [0, 1]"
                )
    _lines(lines, "curves", most=6)
    own, ax = ax is None, _axes(ax, 4.6)
    if hulls:
        x = np.linspace(0, 1, 401)
        top = np.min([_concave(c, x) for c in lines.values()], axis=0)
        ax.fill_between(
            100 * x, 100 * np.minimum(x, top), 100 * top, color=_GRID, alpha=0.75, lw=0, label="within reach of all"
        )
    ax.plot([0, 100], [0, 100], color="#888888", lw=1.2, ls=DASHES[2], marker="")
    for i, (name, c) in enumerate(lines.items()):
        few = len(c) <= 15
        ax.plot(*(100 * c.T), label=name, **_line(2 * i) | ({"ms": 5} if few else {"marker": ""}))
    for i, (name, c) in enumerate(marks.items()):
        face, size = (COLOURS[5], 15) if i == 0 else ("white", 9)
        mark = {"marker": "*XPDhv"[i % 6], "ms": size, "color": face, "mec": "black", "mew": 1.3, "zorder": 9 - i}
        ax.plot(*(100 * c.T), ls="", label=name, **mark)
    ax.set(xlim=(-1, 101), ylim=(-1, 101), aspect="equal", xlabel="false-positive rate (%)", ylabel="true-positive rate (%)",
           title=_title(title, data_name))  # fmt: skip
    return _legend(ax, grow=own)


def _concave(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The least concave function above the points, at x."""
    hull: list = []
    for p in points[np.lexsort((-points[:, 1], points[:, 0]))]:
        if hull and p[0] == hull[-1][0]:
            continue
        while len(hull) > 1:
            (a, b), (c, d) = hull[-1] - hull[-2], p - hull[-2]
            if a * d < b * c:
                break
            hull.pop()
        hull.append(p)
    return np.interp(x, *np.transpose(hull))


@_styled
def threshold(table, cut: float, *, title: str = "", data_name: str = "", xlabel: str = "score",
              ylim: float | None = None, ax: Axes | None = None) -> Figure:  # fmt: skip
    """Two histograms back to back: people with the outcome above, without it beneath, filled from the cut on, and the rates.

    Selected are scores >= cut. table: columns score, positive, negative (people at each score, >= 0). ylim: the axis' end.
    Raises ValueError for missing columns or negative counts.

    Example:
        >>> fig = threshold(pd.DataFrame({"score": [1, 2, 3], "positive": [2, 5, 9], "negative": [9, 4, 1]}), 2)
    """
    table = _table(table, ("score", "positive", "negative")).sort_values("score")
    x, up, down = (table[c].to_numpy(float) for c in ("score", "positive", "negative"))
    if min(up.min(), down.min()) < 0:
        raise ValueError("table: got negative counts, want counts >= 0")
    own, ax = ax is None, _axes(ax, 3.0, grid="y")
    chosen, width = x >= cut, 0.82 * (np.diff(x).min() if len(x) > 1 else 1)
    for counts, sign, colour, hatch in ((up, 1, COLOURS[2], "///"), (down, -1, COLOURS[0], "...")):
        tint = tuple(0.2 * c + 0.8 for c in to_rgb(colour))
        ax.bar(x, sign * counts, width, color=tint, edgecolor=colour, lw=1)
        ax.bar(x[chosen], sign * counts[chosen], width, color=colour, edgecolor="white", hatch=hatch, lw=0)
    ax.axhline(0, color=_INK, lw=1)
    if chosen.any() and not chosen.all():
        ax.axvline((x[chosen].min() + x[~chosen].max()) / 2, color=_INK, lw=1.6, ls=DASHES[1])
    end = ylim or 1.12 * max(up.max(), down.max())
    tp, fp = up[chosen].sum(), down[chosen].sum()
    rates = {"FPR": (fp, down.sum()), "FNR": (up.sum() - tp, up.sum()), "PPV": (tp, tp + fp)}
    text = "   ".join(
        f"{name} {100 * part / whole:.1f} %" if whole else f"{name} –" for name, (part, whole) in rates.items()
    )
    ax.set_title(_title(title, data_name) + "\n" + text, fontsize=11)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set(ylim=(-end, end), xlabel=xlabel, ylabel="people")
    if len(x) <= 12:
        ax.set_xticks(x)
    entries = {"with the outcome, selected": Patch(facecolor=COLOURS[2], hatch="///", edgecolor="white"),
               "without it, selected": Patch(facecolor=COLOURS[0], hatch="...", edgecolor="white")}  # fmt: skip
    return _legend(ax, grow=own, entries=entries)


@_styled
def heatmaps(maps_by_title, *, images=None, masks=None, rows=None, shared: bool = False, unit: str = "", data_name: str = "",
             columns: int | None = None) -> Figure:  # fmt: skip
    """Explanations of images: a row an image, a column a method; red speaks for the class, blue against it.

    A method with negative values is drawn on a scale symmetric about 0, the others from white to red, each kind with its bar.

    maps_by_title: dict title -> (N, C, H, W) or (N, H, W); channels are summed where signed, their maximum taken where not.
    images: (N, C, H, W) in [0, 1], a first column. masks: (N, 1, H, W), outlined on every map. rows: N texts at the left.
    shared: one scale in the maps' own unit (named by `unit`) over all that is drawn; otherwise each map is divided by its
        largest absolute value, for methods whose units differ.
    columns: breaks a single row of maps (N = 1) after so many pictures.
    Raises ValueError or TypeError for other shapes, values or numbers.

    Example:
        >>> heat = {"gradient": torch.randn(2, 1, 8, 8), "saliency": torch.rand(2, 1, 8, 8)}
        >>> fig = heatmaps(heat, images=torch.rand(2, 1, 8, 8), rows=["3", "7"], data_name="digits")
    """
    if not isinstance(maps_by_title, dict) or not maps_by_title:
        raise TypeError(f"maps_by_title: got {type(maps_by_title).__name__}, want a dict title -> maps, not empty")
    maps = {str(title): _one_channel(value, f"maps_by_title[{title!r}]") for title, value in maps_by_title.items()}
    shapes = {value.shape for value in maps.values()}
    n = len(next(iter(maps.values())))
    if len(shapes) > 1:
        raise ValueError(f"maps_by_title: got maps of shapes {sorted(shapes)}, want one shape")
    rows = _texts(rows, "rows", n) if rows is not None else None
    signed = {title: bool((value < 0).any()) for title, value in maps.items()}
    largest = max(float(np.abs(value).max()) for value in maps.values()) or 1.0
    if not shared:
        maps = {t: v / np.maximum(np.abs(v).max((1, 2), keepdims=True), 1e-30) for t, v in maps.items()}
        largest = 1.0
    pictures = {} if images is None else {"image": _images(images, "images")}
    outlines = None if masks is None else _array(masks, "masks", 3, 4).reshape(n, *next(iter(shapes))[1:])
    if pictures and len(pictures["image"]) != n:
        raise ValueError(f"images: got {len(pictures['image'])}, want {n}, one a row")

    titles = [*pictures, *maps]
    broken = columns is not None and n == 1
    across = min(checks.positive_int(columns, "columns"), len(titles)) if broken else len(titles)
    down = math.ceil(len(titles) / across) if broken else n
    size = _text_size(titles, across + 0.3 * (rows is not None))
    lines = max(title.count("\n") + 1 for title in titles) * (down if broken else 1)
    kinds = sorted(set(signed.values()))
    fig = _figure(0.35 * bool(data_name) + 0.62 + down * (min(_WIDTH / across, 1.8) + 0.02) + lines * size / 60)
    fig.get_layout_engine().set(hspace=0.02, h_pad=0.03, w_pad=0.03)
    axes = fig.subplots(down, across, squeeze=False)
    shown = {}
    for i in range(n):
        for j, title in enumerate(titles):
            ax = axes[divmod(j, across)] if broken else axes[i, j]
            text = title if broken or i == 0 else ""
            if title in pictures:
                _picture(ax, pictures[title][i], text, size)
            else:
                low, look = (-largest, "RdBu_r") if signed[title] else (0.0, "Reds")
                _picture(ax, maps[title][i], text, size, cmap=look, vmin=low, vmax=largest)
                shown[signed[title]] = ax.images[0]
                if outlines is not None:
                    ax.contour(outlines[i], levels=[0.5], colors=_INK, linewidths=0.9, linestyles="-")
        if rows:
            axes[i, 0].set_ylabel(rows[i], fontsize=min(10, size + 1), rotation=90)
    for ax in axes.flat[len(titles) if broken else axes.size :]:
        ax.set_axis_off()
    for kind in kinds:
        bar = fig.colorbar(shown[kind], ax=list(axes.flat), location="bottom", shrink=0.7, aspect=30, pad=0.02)
        bar.ax.tick_params(labelsize=10, color="#666666", labelcolor=_INK)
        bar.outline.set_visible(False)
        top = f"{largest:.2g}" if shared else "largest"
        name = unit if shared else ""
        ticks = {-largest: f"−{top}" if shared else "−largest", 0.0: "0", largest: f"{top} {name}".strip()}
        bar.set_ticks([t for t in ticks if kind or t >= 0], labels=[v for t, v in ticks.items() if kind or t >= 0])
    if data_name:
        fig.suptitle(_title("", data_name), x=0.01, ha="left")
    return _fit(fig, down, across)


def _one_channel(maps, name: str) -> np.ndarray:
    """(N, H, W) from (N, C, H, W): the sum of signed channels, the maximum of others."""
    maps = _array(maps, name, 3, 4)
    if maps.ndim == 4:
        maps = maps.sum(1) if (maps < 0).any() else maps.max(1)
    return maps


def _rounded(x: float, y: float, width: float, height: float, **look) -> FancyBboxPatch:
    """A box with round corners."""
    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.14", **look)


STAGES = {
    "world": "the world",
    "data": "training data $D$",
    "learner": "learner $A$",
    "input": "input $x$",
    "model": "model $f = A(D)$",
    "answer": "answer $f(x)$",
    "explanation": "explanation",
}


@_styled
def pipeline(attackers) -> Figure:
    """The way from the world to an answer, in training and in use, and beside each stage who stands there and pulls.

    attackers: dict stage -> text, the stages being the keys of `STAGES`; a line has at most 27 letters. Raises TypeError
    or ValueError for what is not a dict, an unknown stage or an empty text.

    Example:
        >>> fig = pipeline({"data": "poison, backdoor", "input": "evasion"})
    """
    if not isinstance(attackers, dict):
        raise TypeError(f"attackers: got {type(attackers).__name__}, want a dict stage -> text")
    texts = _texts(list(attackers.values()), "attackers", len(attackers))
    for stage, text in zip(attackers, texts, strict=True):
        checks.choice(stage, "attackers", tuple(STAGES))
        if not text.strip():
            raise ValueError(f"attackers[{stage!r}]: got an empty text")
    fig = _figure(6.2)
    ax = fig.add_subplot()
    ax.set(xlim=(0, 10), ylim=(-8.15, 0.85))
    ax.set_axis_off()
    ax.set_title(_title("Who stands where", ""))
    heights = dict(zip(STAGES, (0, -1.2, -2.4, -4.0, -5.2, -6.4, -7.6), strict=True))
    for top, bottom, phase in ((0.6, -3.0, "training"), (-3.4, -8.1, "in use")):
        ax.add_patch(_rounded(0, bottom, 4.9, top - bottom, facecolor="#EEF3F8", edgecolor="none"))
        ax.text(0.32, (top + bottom) / 2, phase, rotation=90, ha="center", va="center", color="#555555", fontsize=10.5)
    flow = {"arrowstyle": "-|>", "color": COLOURS[0], "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    for stage, name in STAGES.items():
        y, left = heights[stage], 1.75 if stage == "input" else 0.8
        ax.add_patch(_rounded(left, y - 0.36, 4.6 - left, 0.72, facecolor="white", edgecolor=COLOURS[0], lw=1.6))
        ax.text((left + 4.6) / 2, y, name, ha="center", va="center", fontsize=11)
    for above, below in (
        ("world", "data"),
        ("data", "learner"),
        ("input", "model"),
        ("model", "answer"),
        ("answer", "explanation"),
    ):
        ax.annotate("", (3.0, heights[below] + 0.37), (3.0, heights[above] - 0.37), arrowprops=flow)
    ax.annotate("", (1.25, heights["model"] + 0.37), (1.25, heights["learner"] - 0.37), arrowprops=flow)
    pull = flow | {"color": "#A33F00", "lw": 1.6}
    for stage, text in zip(attackers, texts, strict=True):
        y = heights[stage]
        ax.annotate("", (4.66, y), (5.5, y), arrowprops=pull)
        ax.text(5.6, y, textwrap.fill(text, 27), va="center", fontsize=10, color="#A33F00", linespacing=1.1)
    return fig


@_styled
def agreement(actual, predicted_by_label, *, title: str, xlabel: str, ylabel: str, data_name: str = "",
              ax: Axes | None = None) -> Figure:  # fmt: skip
    """Predicted values over what came true, one mark a case, with the diagonal on which a perfect prediction lies.

    actual: (n,); predicted_by_label: dict label -> (n,), at most 6. Raises ValueError for other lengths, NaN or infinite
    values.

    Example:
        >>> x = np.linspace(-1, 1, 9)
        >>> fig = agreement(x, {"first order": 0.9 * x}, title="T", xlabel="actual", ylabel="predicted")
    """
    actual = _array(actual, "actual", 1)
    if not isinstance(predicted_by_label, dict):
        raise TypeError(f"predicted_by_label: got {type(predicted_by_label).__name__}, want a dict label -> (n,)")
    labels = _lines(predicted_by_label, "predicted_by_label", most=6)
    clouds = [_array(values, f"predicted_by_label[{k!r}]", 1) for k, values in predicted_by_label.items()]
    if bad := [k for k, cloud in zip(labels, clouds, strict=True) if cloud.shape != actual.shape]:
        raise ValueError(f"predicted_by_label[{bad[0]!r}]: want shape {actual.shape}, one value for each actual one")
    own, ax = ax is None, _axes(ax, 3.8)
    both = np.concatenate([actual, *clouds])
    low, high = both.min(), both.max()
    edge = 0.05 * (high - low) or 1.0
    ax.plot([low - edge, high + edge], [low - edge, high + edge], ls="-", lw=1, color="#666666", marker="")
    for i, (label, cloud) in enumerate(zip(labels, clouds, strict=True)):
        look = _line(i) | {"linestyle": "", "markerfacecolor": "white" if i else COLOURS[0], "markeredgewidth": 1.5}
        ax.plot(actual, cloud, label=label, ms=6, **look)
    ax.locator_params(nbins=5)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=_title(title, data_name))
    return _legend(ax, grow=own)


@_styled
def roofline(table, *, bandwidth: float, peak: float, title: str = "Roofline", ax: Axes | None = None) -> Figure:
    """Rates of computation over arithmetic intensity, under the roof min(peak, intensity x bandwidth); both axes logarithmic.

    table: columns `name`, `group` (at most two: filled marks for the first, hollow ones for the second), `intensity`
    (operations a byte, > 0), `rate` (operations a second, > 0). bandwidth: bytes a second. peak: operations a second.

    Example:
        >>> table = pd.DataFrame({"name": ["step"], "group": ["measured"], "intensity": [0.4], "rate": [2e9]})
        >>> fig = roofline(table, bandwidth=1e10, peak=1e11)
    """
    table = _table(table, ("name", "group", "intensity", "rate"))
    if not (table[["intensity", "rate"]] > 0).all(axis=None):
        raise ValueError("table: intensity and rate must be > 0 on logarithmic axes")
    for value, name in ((bandwidth, "bandwidth"), (peak, "peak")):
        checks.positive(value, name)
    names, groups = _lines(dict.fromkeys(table["name"]), "name", most=8), list(dict.fromkeys(table["group"]))
    if len(groups) > 2:
        raise ValueError(f"table: got {len(groups)} groups, want at most 2")
    own, ax = ax is None, _axes(ax, 4.0)
    knee = peak / bandwidth
    low, high = min(table["intensity"].min(), knee) / 2, max(table["intensity"].max(), knee) * 4
    ax.plot([low, knee, high], [low * bandwidth, peak, peak], color=_INK, lw=1.8, ls="-", marker="")
    entries = {}
    for i, name in enumerate(names):
        for group, rows in table[table["name"] == name].groupby("group"):
            look = _line(i) | {"linestyle": "", "markeredgewidth": 1.8, "markersize": 8}
            look |= {} if group == groups[0] else {"markerfacecolor": "white"}
            (mark,) = ax.plot(rows["intensity"], rows["rate"], **look)
            entries.setdefault(name, mark)
    for group in groups:
        fill = "#666666" if group == groups[0] else "white"
        entries[group] = Line2D([], [], ls="", marker="o", ms=8, mec="#666666", mfc=fill, mew=1.8)
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="intensity (operations a byte)",
           ylabel="operations a second", title=_title(title, ""))  # fmt: skip
    return _legend(ax, grow=own, entries=entries)


@_styled
def growth(points_by_label, *, title: str, xlabel: str, ylabel: str, data_name: str = "",
           ax: Axes | None = None) -> Figure:  # fmt: skip
    """How costs grow: a line for each label on two logarithmic axes, where n^p is a straight line of slope p.

    points_by_label: dict label -> (x, y), each (T,) and > 0. Raises ValueError for other lengths or values.

    Example:
        >>> fig = growth({"linear": ([1, 2, 4], [3, 6, 12])}, title="Growth", xlabel="n", ylabel="seconds")
    """
    if not isinstance(points_by_label, dict):
        raise TypeError(f"points_by_label: got {type(points_by_label).__name__}, want a dict label -> (x, y)")
    own, ax = ax is None, _axes(ax, 3.8)
    for i, label in enumerate(_lines(points_by_label, "points_by_label")):
        x, y = (_array(values, f"points_by_label[{label!r}]", 1) for values in points_by_label[label])
        if x.shape != y.shape or not (x > 0).all() or not (y > 0).all():
            raise ValueError(f"points_by_label[{label!r}]: want as many x as y, all > 0")
        ax.plot(x, y, label=label, **_line(i))
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=_title(title, data_name))
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axis.set_minor_locator(NullLocator())
    return _legend(ax, grow=own)


@_styled
def roc_log(curves, *, least: float = 1e-3, data_name: str = "", title: str = "ROC", ax: Axes | None = None) -> Figure:
    """ROC curves on logarithmic axes, where the left end, few false alarms, takes as much room as all the rest.

    curves: dict name -> (T, 2) of FPR and TPR in [0, 1], rising, at most 6. least: where the axes begin, in (0, 1); the
    dashed line is guessing. Raises ValueError for other shapes or values.

    Example:
        >>> fig = roc_log({"attack": [(0, 0), (0.001, 0.02), (0.1, 0.3), (1, 1)]})
    """
    if not isinstance(curves, dict):
        raise TypeError(f"curves: got {type(curves).__name__}, want a dict name -> (T, 2)")
    least = checks.probability(least, "least")
    names = _lines(curves, "curves", most=6)
    own, ax = ax is None, _axes(ax, 4.4)
    ax.plot([100 * least, 100], [100 * least, 100], color="#888888", lw=1.2, ls=DASHES[2], marker="")
    for i, (name, curve) in enumerate(zip(names, curves.values(), strict=True)):
        c = _array(curve, f"curves[{name!r}]", 2)
        if c.shape[1] != 2 or c.min() < -1e-9 or c.max() > 1 + 1e-9:
            raise ValueError(
                f"curves[{name!r}]: got {c.shape} in [{c.min():.3g}, {c.max():.3g}], want (T, 2) in [0, 1]"
            )
        x = np.geomspace(least, 1, 200)
        y = c[np.searchsorted(c[:, 0], x * (1 + 1e-9), side="right") - 1, 1]
        ax.plot(
            100 * x, 100 * y.clip(least / 10), label=name, markevery=(8 * i, 33), drawstyle="steps-post", **_line(2 * i)
        )
    ax.set(xscale="log", yscale="log", xlim=(100 * least, 100), ylim=(100 * least, 110), aspect="equal",
           xlabel="false-positive rate (%)", ylabel="true-positive rate (%)", title=_title(title, data_name))  # fmt: skip
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    return _legend(ax, grow=own)
