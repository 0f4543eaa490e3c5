"""Figures: they show what they are given, look the same everywhere, and refuse what they cannot show."""

import doctest

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from tmlcourse import plot

X = torch.linspace(0, 1, 6 * 64).reshape(6, 1, 8, 8)
CURVE = pd.DataFrame(
    {
        "eps": [0.0, 0.1, 0.2] * 2,
        "accuracy": [0.98, 0.4, 0.0, 0.97, 0.9, 0.8],
        "low": [0.97, 0.35, 0.0, 0.96, 0.88, 0.77],
        "high": [0.99, 0.45, 0.01, 0.98, 0.92, 0.83],
        "model": ["standard"] * 3 + ["robust"] * 3,
    }
)
BOUNDS = pd.DataFrame({"budget": [1, 2, 4], "lower": [0.1, 0.3, 0.4], "upper": [0.9, 0.6, 0.45]})
NAMED = pd.concat(
    [
        BOUNDS.assign(name="IBP", lower=np.nan),
        BOUNDS.assign(name="CROWN", lower=np.nan, upper=[0.8, 0.55, 0.44]),
        BOUNDS.assign(name="FGSM", upper=np.nan),
        BOUNDS.assign(name="PGD", upper=np.nan, lower=[0.2, 0.35, 0.42]),
    ]
)
PUBLISHED = pd.DataFrame(
    {"row": ["clean", "PGD, 40 steps of 0.01, one restart"], "ours": [98.4, 93.1], "low": [98.1, 92.9],
     "high": [98.7, 93.6], "published": [98.8, np.nan]}
)  # fmt: skip
TRACES = {"small steps": np.arange(12.0).reshape(3, 4), "large steps": [1.0, 2.0, 4.0, 4.0]}
SURFACE = np.add.outer(np.arange(5.0), np.arange(7.0) ** 2)
POINTS, LABELS = [[0.2, 0.8], [0.7, 0.3], [0.9, 0.1]], [1, 0, 0]

BY_GROUP = pd.DataFrame({"row": ["FPR", "FPR", "FNR", "FNR"], "group": ["a", "b"] * 2,
                         "value": [20.0, 40, 30, 10],
                         "low": [15.0, 30, 25, 0], "high": [25.0, 50, 35, 40], "small": [0, 0, 0, 1]})  # fmt: skip
CALIBRATED = pd.DataFrame({"group": ["a", "a", "b", "b"], "score": [0.2, 0.8] * 2, "observed": [0.3, 0.7, 0.2, 0.9],
                           "low": [0.2, 0.6, 0.1, 0.8], "high": [0.4, 0.8, 0.3, 1.0]})  # fmt: skip
ROCS = {"a": [(0, 0), (0.2, 0.6), (1, 1)], "b": [(0, 0), (0.1, 0.3), (0.5, 0.8), (1, 1)]}
COUNTS = pd.DataFrame({"score": [1, 2, 3], "positive": [2, 5, 9], "negative": [9, 4, 1]})
FIGURES = {
    "images": lambda **k: plot.images(X, titles=list("abcdef"), columns=4, data_name="digits", **k),
    "perturbations": lambda **k: plot.perturbations(
        X, (X + 0.1).clamp(0, 1), labels=range(6), labels_adv=[0, 1, 7, 3, 4, 5], data_name="digits", **k
    ),
    "robustness_curve": lambda **k: plot.robustness_curve(CURVE, data_name="digits", **k),
    "loss_trace": lambda **k: plot.loss_trace(TRACES, data_name="digits", **k),
    "decision_regions": lambda **k: plot.decision_regions(
        lambda x: x, POINTS, LABELS, balls=("L1", 0.1), data_name="digits", **k
    ),
    "norm_balls": lambda **k: plot.norm_balls(0.25, **k),
    "loss_surface": lambda **k: plot.loss_surface(
        SURFACE, (0, 1, 0, 2), marks={"image": (0.5, 1)}, path=[(0.5, 1), (0.9, 1.5)], data_name="digits", **k
    ),
    "loss_slices": lambda **k: plot.loss_slices(
        [0, 1, 2], {"gradient": [0, 1, 4], "random": [0, 0, 1]}, data_name="digits", **k
    ),
    "sandwich": lambda **k: plot.sandwich(NAMED, data_name="digits", truth=0.43, **k),
    "bars_against_published": lambda **k: plot.bars_against_published(PUBLISHED, data_name="digits", **k),
    "ladder": lambda **k: plot.ladder(
        {"interval": -3.0, "LP": -0.2},
        {"PGD": 0.5},
        exact=0.4,
        picture=X[0],
        title="Radius 0.1",
        data_name="digits",
        **k,
    ),
    "relu_hull": lambda **k: plot.relu_hull(-1.0, 1.6, slopes={"CROWN's lower line": 1.0, "the dual's": 0.6}, **k),
    "outlines": lambda **k: plot.outlines(
        [[0.2, 0.2], [0.5, 0.6]], {"box": [(0, 0), (1, 0), (1, 1)]}, title="A triangle", data_name="digits", **k
    ),
    "bars": lambda **k: plot.bars(
        ["a rather long label of a bar", "b"], [12345, 3], title="Work", xlabel="seconds", data_name="digits", **k
    ),
    "group_intervals": lambda **k: plot.group_intervals(BY_GROUP, title="Errors", data_name="digits", **k),
    "calibration": lambda **k: plot.calibration(CALIBRATED, data_name="digits", **k),
    "roc": lambda **k: plot.roc(ROCS, points={"equal": (0.2, 0.55)}, data_name="digits", **k),
    "threshold": lambda **k: plot.threshold(COUNTS, 2, title="a", data_name="digits", **k),
}
ONE_AXES = [name for name in FIGURES if name not in ("images", "perturbations", "norm_balls", "ladder")]
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def texts(figure):
    """All texts with something in them, after drawing."""
    pixels(figure)
    return figure.findobj(lambda a: isinstance(a, Text) and a.get_text().strip())


def words(figure):
    return " | ".join(t.get_text() for t in texts(figure))


@every_figure
def test_every_figure_leaves_pyplot_and_the_settings_alone(draw):
    settings, mine = dict(matplotlib.rcParams), plt.figure()
    figure = draw()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == [mine.number] and plt.gcf() is mine
    plt.close(mine)
    assert dict(matplotlib.rcParams) == settings


@every_figure
def test_every_figure_looks_the_same_under_any_settings(draw):
    plain = pixels(draw())
    odd = {"xtick.labelsize": 22, "axes.facecolor": "black", "grid.color": "red", "ytick.color": "red"}
    odd |= {"font.size": 20, "axes.labelsize": 25, "lines.linewidth": 9, "figure.facecolor": "black"}
    with plt.rc_context(odd):
        assert np.array_equal(pixels(draw()), plain)


@every_figure
def test_every_figure_is_a_white_card(draw):
    card = pixels(draw())
    edge = np.concatenate([card[0], card[-1], card[:, 0], card[:, -1]])
    assert (edge[:, 3] == 255).all() and (edge[:, :3] == 255).all(axis=1).mean() > 0.9


@every_figure
def test_nothing_is_cut_off_and_text_reads_on_a_phone(draw):
    figure = draw()
    shown = texts(figure)
    width, height = figure.get_size_inches()
    tight = figure.get_tightbbox()
    assert min(tight.x0, tight.y0) > -0.01 and tight.x1 < width + 0.01 and tight.y1 < height + 0.01
    phone = 328 / figure.get_figwidth() / 72  # pixels of a 360 px page, margins off, to the point
    assert min(t.get_fontsize() for t in shown) * phone > 8.9


@pytest.mark.parametrize("name", [n for n in FIGURES if n not in ("norm_balls", "relu_hull")])
def test_title_names_the_data(name):
    figure = FIGURES[name]()
    titles = [ax.get_title(loc="left") for ax in figure.axes] + [figure.get_suptitle()]
    assert any("digits" in title for title in titles)


@pytest.mark.parametrize("name", ONE_AXES)
def test_one_axes_figures_draw_into_the_callers_axes_and_label_them(name):
    mine, ax = plt.subplots()
    try:
        assert FIGURES[name](ax=ax) is mine
        assert ax.has_data() and ax.get_xlabel() and plt.fignum_exists(mine.number)
        assert ax.get_ylabel() or name in ("bars", "bars_against_published", "group_intervals")
        with pytest.raises(TypeError, match="ax: got str"):
            FIGURES[name](ax="axes")
    finally:
        plt.close(mine)


def lightness(colour):
    """CIE L*, 0 to 100."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_lines_differ_in_colour_dash_and_marker_and_neighbours_in_lightness():
    lines = [plot._line(i) for i in range(12)]
    for key in ("color", "linestyle", "marker"):
        assert len({str(line[key]) for line in lines[:6]}) == 6
    assert len({str(line) for line in lines}) == 12 and len({line["marker"] for line in lines}) == 12
    steps = np.diff([lightness(c) for c in plot.COLOURS + plot.COLOURS[:1]])
    assert (np.abs(steps) > 15).all()
    with plot.style():
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"][:6] == list(plot.COLOURS)


def test_images_shows_each_image_under_its_title():
    figure = plot.images(X, titles=list("abcdef"), columns=4)
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("abcdef")
    assert all(np.array_equal(ax.images[0].get_array(), x[0]) for ax, x in zip(shown, X, strict=True))
    rgb = plot.images(torch.rand(2, 3, 4, 5))
    assert rgb.axes[0].images[0].get_array().shape == (4, 5, 3)


@pytest.mark.parametrize(
    "largest, factor", [(0.1, 10), (0.3, 3), (8 / 255, 30), (1 / 255, 200), (0.75, 1), (1.0, 1), (0.0, 1)]
)
def test_perturbation_is_magnified_by_a_round_factor_that_fits(largest, factor):
    x = torch.zeros(1, 1, 4, 4)
    figure = plot.perturbations(x, x + largest)
    image = figure.axes[1].images[0]
    assert f"× {factor:g}\n" in words(figure)
    assert np.allclose(image.get_array(), factor * largest, atol=1e-6) and image.get_clim() == (-1, 1)


def test_perturbation_of_colour_images_is_centred_on_grey_and_magnify_is_obeyed():
    x = torch.full((1, 3, 4, 4), 0.5)
    x_adv = x.clone()
    x_adv[:, 0, 0, 0] -= 0.1
    figure = plot.perturbations(x, x_adv, magnify=5)
    change = figure.axes[1].images[0].get_array()
    assert "× 5\nmid-grey: no change" in words(figure)
    assert np.allclose(change[0, 0], [0.25, 0.5, 0.5]) and np.allclose(change[1:], 0.5)


def test_wrong_predictions_are_marked_by_sign_weight_and_frame():
    figure = plot.perturbations(X[:3], X[:3], labels=[0, 1, 2], labels_adv=[0, 2, 2], classes=["cat", "dog", "ship"])
    right, wrong = figure.axes[6], figure.axes[7]
    assert [ax.get_title() for ax in figure.axes] == ["cat", "dog", "ship", "", "", "", "cat", "✗ ship", "ship"]
    assert wrong.title.get_fontweight() == "bold" != right.title.get_fontweight()
    assert wrong.spines["left"].get_linewidth() > 2 * right.spines["left"].get_linewidth()


def test_robustness_curve_draws_one_line_and_one_interval_a_model_in_per_cent():
    ax = plot.robustness_curve(CURVE.sample(frac=1, random_state=0)).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"standard", "robust"} == {t.get_text() for t in ax.get_legend().get_texts()}
    assert np.allclose(lines["robust"].get_xydata(), [[0, 97], [0.1, 90], [0.2, 80]])
    assert len(ax.collections) == 2 and "%" in ax.get_ylabel()
    shaded = [band.get_paths()[0].get_extents() for band in ax.collections]
    assert {round(box.y1) for box in shaded} == {99, 98} and {round(box.y0) for box in shaded} == {0, 77}


def test_robustness_curve_tells_attacks_apart():
    both = pd.concat([CURVE.assign(attack="FGSM"), CURVE.assign(attack="PGD")])
    ax = plot.robustness_curve(both).axes[0]
    assert [line.get_label() for line in ax.lines] == ["standard, FGSM", "robust, FGSM", "standard, PGD", "robust, PGD"]
    with pytest.raises(ValueError, match="one row for each model, attack and eps"):
        plot.robustness_curve(pd.concat([both, both]))


def test_loss_trace_draws_the_median_over_the_runs():
    ax = plot.loss_trace(TRACES).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert np.array_equal(lines["small steps"].get_ydata(), [4, 5, 6, 7])
    assert np.array_equal(lines["large steps"].get_ydata(), [1, 2, 4, 4])
    faint = [line for line in ax.lines if line.get_alpha() is not None]
    assert len(faint) == 3 and all(line.get_alpha() < 0.5 for line in faint)


def test_decision_regions_are_hatched_bounded_and_hold_points_and_balls():
    seen = []

    def predict(x):
        seen.append(x)
        return (x[:, 0] > 0.5).long()

    ax = plot.decision_regions(predict, POINTS, LABELS, bounds=(0, 1, 0, 1), balls=("Linf", 0.1)).axes[0]
    assert seen[0].dtype == torch.float32 and seen[0].shape[1] == 2 and not seen[0].requires_grad
    hatched = [c.hatches[0] for c in ax.collections if getattr(c, "hatches", None) and c.hatches[0]]
    assert len(hatched) == len(set(hatched)) == 2
    dots = {line.get_marker(): line.get_xydata() for line in ax.lines}
    assert np.allclose(dots["s"], [[0.2, 0.8]]) and len(dots["o"]) == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["class 0: region, points", "class 1: region, points"]
    box = ax.patches[0].get_path().vertices
    assert len(ax.patches) == 3 and np.allclose([box.min(0), box.max(0)], [[0.1, 0.7], [0.3, 0.9]])
    assert not any(isinstance(c, QuadMesh) for c in ax.collections)


@pytest.mark.parametrize("norm, p", [("L1", 1), ("L2", 2), ("Linf", np.inf)])
def test_balls_are_balls(norm, p):
    assert np.allclose(np.linalg.norm(plot._ball(norm, 0.3), ord=p, axis=1), 0.3)


def test_norm_balls_step_reaches_the_dual_norm_in_the_title():
    g = np.array([-0.4, 1.1])
    figure = plot.norm_balls(0.5, gradient=g)
    for ax, p, q in zip(figure.axes, (1, 2, np.inf), (np.inf, 2, 1), strict=True):
        step = next(line for line in ax.lines if line.get_marker() == "o").get_xydata()[0]
        assert np.isclose(np.linalg.norm(step, ord=p), 0.5) and np.isclose(g @ step, 0.5 * np.linalg.norm(g, ord=q))
        assert f"{0.5 * np.linalg.norm(g, ord=q):.2f}" in ax.get_title()
        level = next(line for line in ax.lines if line.get_marker() != "o").get_xydata()
        assert np.allclose(level @ g, g @ step)


def test_loss_surface_has_its_extent_marks_and_path():
    figure = FIGURES["loss_surface"]()
    ax, bar = figure.axes
    assert ax.get_xlim() == (0, 1) and ax.get_ylim() == (0, 2) and "loss" in bar.get_ylabel()
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines == {"path": [[0.5, 1], [0.9, 1.5]], "image": [[0.5, 1]]}
    assert plot.loss_surface(np.ones((3, 3)), (0, 1, 0, 1)).axes  # a flat surface is one too


def test_loss_surfaces_with_the_same_limits_have_the_same_colours():
    scales = [plot.loss_surface(SURFACE * k, (0, 1, 0, 1), limits=(-50, 50)).axes[1].get_ylim() for k in (0.1, 1.0)]
    assert scales[0] == scales[1] == (-50, 50)


def test_loss_surface_is_not_upside_down():
    ax = plot.loss_surface([[0.0, 0.0], [1.0, 1.0]], (0, 1, 0, 1)).axes[0]
    darkest = ax.collections[0].get_paths()[0].vertices
    assert darkest[:, 1].max() < 0.1


def test_loss_slices_draws_each_label():
    ax = FIGURES["loss_slices"]().axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines} == {
        "gradient": [0, 1, 4],
        "random": [0, 0, 1],
    }


def test_sandwich_shades_between_the_best_bounds():
    ax = plot.sandwich(NAMED, truth=0.43, below="poison: at least", above="bound: at most").axes[0]
    assert [line.get_label() for line in ax.lines] == ["IBP", "CROWN", "FGSM", "PGD", "truth"]
    band = ax.collections[0].get_paths()[0].vertices
    for budget, low, high in ((1, 0.2, 0.8), (2, 0.35, 0.55), (4, 0.42, 0.44)):
        at = band[band[:, 0] == budget, 1]
        assert np.allclose([at.min(), at.max()], [low, high])
    assert {t.get_text() for t in ax.texts} == {"bound: at most ↓", "poison: at least ↑"}
    up = [line.get_color() for line in ax.lines]
    assert up[0] == up[1] != up[2] == up[3]
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(styles) == 5


def test_sandwich_sentences_lie_on_no_curve():
    figure = plot.sandwich(BOUNDS.assign(lower=0.1, upper=0.9), truth=0.43)
    pixels(figure)
    ax = figure.axes[0]
    curves = np.concatenate([line.get_ydata() for line in ax.lines])
    above, below = (text.get_window_extent().transformed(ax.transData.inverted()) for text in ax.texts)
    assert curves.max() < above.y0 and curves.min() > below.y1


def test_sandwich_names_a_bound_that_gives_both_sides_twice():
    ax = plot.sandwich(BOUNDS.assign(name="MIP", exact=[0.42, 0.43, 0.44])).axes[0]
    assert [line.get_label() for line in ax.lines] == ["MIP, certificates", "MIP, attacks", "exact"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lower": [0.1, 0.7, 0.4]}, "lower 0.7 above upper 0.6 at budget 2"),
        ({"exact": [0.05, 0.4, 0.42]}, "lower 0.1 above exact 0.05 at budget 1"),
        ({"exact": [0.5, 0.5, 0.5]}, "exact 0.5 above upper 0.45 at budget 4"),
    ],
)
def test_sandwich_refuses_what_crosses(change, message):
    with pytest.raises(ValueError, match=message):
        plot.sandwich(BOUNDS.assign(**change))
    with pytest.raises(ValueError, match="truth 0.5 above upper 0.45 at budget 4"):
        plot.sandwich(BOUNDS, truth=0.5)


def test_published_values_stand_beside_ours():
    ax = FIGURES["bars_against_published"]().axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()][0] == "clean"
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"ours, with interval", "published"}
    bars = ax.containers[0].lines[2][0].get_segments()
    assert np.allclose([bar[:, 0] for bar in bars], [[98.1, 98.7], [92.9, 93.6]])
    published = next(line for line in ax.lines if line.get_label() == "published")
    assert published.get_xdata()[0] == 98.8 and published.get_markerfacecolor() == "white"


def test_nothing_published_is_not_announced():
    ax = plot.bars_against_published(PUBLISHED.assign(published=NAN), data_name="digits").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours, with interval"]
    assert "ublished" not in ax.get_title(loc="left") + ax.get_title()


NAN = float("nan")
BAD = [
    (lambda: plot.images(X * 255), ValueError, r"x: got values in \[0, 255\]"),
    (lambda: plot.images(X[:, 0]), ValueError, r"x: got shape \(6, 8, 8\), want \(N, C, H, W\)"),
    (lambda: plot.images(X[:0]), ValueError, "x: got shape .* want a non-empty batch"),
    (lambda: plot.images(X * NAN), ValueError, "x: got NaN"),
    (lambda: plot.images(X, titles=["a"]), ValueError, "titles: got .* want 6 texts"),
    (lambda: plot.images(X, titles="abcdef"), ValueError, "titles: got 'abcdef'"),
    (lambda: plot.images(X, columns=0), ValueError, "columns: got 0"),
    (lambda: plot.perturbations(X, X[:3]), ValueError, r"x_adv: got shape \(3, 1, 8, 8\), want \(6, 1, 8, 8\)"),
    (lambda: plot.perturbations(X.repeat(3, 1, 1, 1), X.repeat(3, 1, 1, 1)), ValueError, "x: got 18 images"),
    (lambda: plot.perturbations(X, X, labels=[0, 1]), ValueError, "labels: got 2 labels, want 6"),
    (lambda: plot.perturbations(X, X, labels=[0, 1, 2, 3, 4, 9], classes="abc"), ValueError, r"labels: got .*\[0, 2\]"),
    (lambda: plot.perturbations(X, X, magnify=0), ValueError, "magnify: got 0"),
    (lambda: plot.robustness_curve([1]), TypeError, "table: got list, want a pandas DataFrame"),
    (lambda: plot.robustness_curve(CURVE.drop(columns=["low", "model"])), ValueError, "table: no column low, model"),
    (lambda: plot.robustness_curve(CURVE[:0]), ValueError, "table: got no rows"),
    (lambda: plot.robustness_curve(CURVE.assign(accuracy="a")), TypeError, "table: column accuracy holds"),
    (lambda: plot.robustness_curve(CURVE.assign(high=NAN)), ValueError, "table: column high holds NaN"),
    (lambda: plot.robustness_curve(CURVE.assign(accuracy=50.0)), ValueError, "not per cent"),
    (lambda: plot.robustness_curve(CURVE.assign(eps=-CURVE["eps"])), ValueError, "eps >= 0"),
    (lambda: plot.robustness_curve(CURVE.assign(low=1.0)), ValueError, "want low <= accuracy <= high"),
    (lambda: plot.loss_trace([1, 2]), TypeError, "traces: got list, want a dict"),
    (lambda: plot.loss_trace({}), ValueError, "traces: got 0 lines"),
    (lambda: plot.loss_trace({str(i): [1, 2] for i in range(13)}), ValueError, "traces: got 13 lines, want 1 to 12"),
    (lambda: plot.loss_trace({"a": [1, NAN]}), ValueError, r"traces\['a'\]: got NaN"),
    (lambda: plot.loss_trace({"a": np.zeros((2, 2, 2))}), ValueError, r"traces\['a'\]: got shape \(2, 2, 2\)"),
    (lambda: plot.loss_trace({"a": ["x"]}), TypeError, r"traces\['a'\]: got list, want numbers"),
    (lambda: plot.decision_regions(lambda x: x, [[1, 2, 3]], [0]), ValueError, r"points: got \(1, 3\)"),
    (lambda: plot.decision_regions(lambda x: x, POINTS, [0]), ValueError, "points: got .* for 1 labels"),
    (lambda: plot.decision_regions(lambda x: x, POINTS, [0, 1, -1]), ValueError, r"labels: got \[-1, 1\]"),
    (lambda: plot.decision_regions(lambda x: x[:5], POINTS, LABELS), ValueError, "predict: got 5 answers"),
    (lambda: plot.decision_regions(lambda x: x * NAN, POINTS, LABELS), ValueError, "predict: got NaN"),
    (lambda: plot.decision_regions(lambda x: x, POINTS, LABELS, balls=("L3", 1)), ValueError, "balls: got 'L3'"),
    (lambda: plot.decision_regions(lambda x: x, POINTS, LABELS, balls=("L2", -1)), ValueError, "balls: got -1"),
    (lambda: plot.decision_regions(lambda x: x, POINTS, LABELS, bounds=(1, 0, 0, 1)), ValueError, "bounds: got"),
    (lambda: plot.norm_balls(0), ValueError, "eps: got 0"),
    (lambda: plot.norm_balls(gradient=(0, 0)), ValueError, r"gradient: got \(0, 0\)"),
    (lambda: plot.loss_surface([1, 2], (0, 1, 0, 1)), ValueError, r"values: got shape \(2,\)"),
    (lambda: plot.loss_surface([[1, 2]], (0, 1, 0, 1)), ValueError, r"values: got shape \(1, 2\)"),
    (lambda: plot.loss_surface(SURFACE * NAN, (0, 1, 0, 1)), ValueError, "values: got NaN"),
    (lambda: plot.loss_surface(SURFACE, (0, 1)), ValueError, "extent: got"),
    (lambda: plot.loss_surface(SURFACE, (0, 1, 0, 1), limits=(0, 1e-3)), ValueError, "limits: got"),
    (lambda: plot.loss_surface(SURFACE, (0, 1, 0, 1), path=[(1, 2, 3)]), ValueError, r"path: got shape \(1, 3\)"),
    (lambda: plot.loss_surface(SURFACE, (0, 1, 0, 1), marks=[(1, 2)]), TypeError, "marks: got list"),
    (lambda: plot.loss_surface(SURFACE, (0, 1, 0, 1), marks={"a": [1]}), ValueError, r"marks\['a'\]: want two"),
    (lambda: plot.loss_slices([0, 1], {"a": [1]}), ValueError, r"values_by_label\['a'\]: want shape \(2,\)"),
    (lambda: plot.loss_slices([0, 1], [1, 2]), TypeError, "values_by_label: got list"),
    (lambda: plot.sandwich(BOUNDS.drop(columns="upper")), ValueError, "table: no column upper"),
    (lambda: plot.sandwich(BOUNDS.assign(lower=NAN, upper=NAN)), ValueError, "neither lower nor upper"),
    (lambda: plot.sandwich(BOUNDS.assign(budget=NAN)), ValueError, "table: column budget holds NaN"),
    (lambda: plot.sandwich(BOUNDS.assign(lower=NAN)), ValueError, "table: lower: got 0 lines"),
    (lambda: plot.sandwich(BOUNDS, truth=NAN), ValueError, "truth: got NaN"),
    (lambda: plot.bars_against_published(PUBLISHED.assign(ours=NAN)), ValueError, "table: column ours holds NaN"),
    (lambda: plot.bars_against_published(PUBLISHED.assign(low=99.0)), ValueError, "want low <= ours <= high"),
    (lambda: plot.bars_against_published(PUBLISHED.drop(columns="row")), ValueError, "table: no column row"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named_and_leaves_no_figure_open(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


def test_examples_run():
    assert doctest.testmod(plot).failed == 0


# ---- curves, signed pictures and histograms (chapter 2)


def test_curves_show_each_line_and_a_logarithmic_axis_only_when_asked():
    ax = plot.curves([0, 1, 2], {"a": [1, 2, 4], "b": [3, 3, 3]}, title="T", xlabel="x", ylabel="y", log=True).axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2, 4], [3, 3, 3]]
    assert ax.get_yscale() == "log" and ax.get_title("left") == "T"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert plot.curves([0, 1], {"a": [1, 2]}, title="T", xlabel="x", ylabel="y").axes[0].get_yscale() == "linear"


def test_weights_share_one_scale_about_zero():
    w = torch.linspace(-2, 1, 3 * 64).view(3, 1, 8, 8)
    fig = plot.weights(w, titles=["a", "b", "c"], data_name="digits", limit=2.0)
    images = [ax.images[0] for ax in fig.axes if ax.images]
    assert [image.get_clim() for image in images] == [(-2, 2)] * 3
    np.testing.assert_allclose(images[1].get_array(), w[1, 0])
    assert plot.weights(torch.zeros(1, 4, 4)).axes[0].images[0].get_clim() == (-1, 1)


def test_histograms_share_their_bins_and_count_every_value():
    fig = plot.histograms({"a": [0.0, 1, 1], "b": [5.0], "c": []}, title="T", xlabel="x", bins=5)
    assert [sum(bar.get_height() for bar in ax.patches) for ax in fig.axes] == [3, 1, 0]
    assert len({tuple(round(bar.get_x(), 6) for bar in ax.patches) for ax in fig.axes}) == 1
    assert [ax.get_title("left") for ax in fig.axes] == ["a (3)", "b (1)", "c (none)"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.curves([0, 1], {"a": [1]}, title="", xlabel="", ylabel=""), ValueError, r"\['a'\]: want shape"),
        (lambda: plot.curves([0, 1], [1, 2], title="", xlabel="", ylabel=""), TypeError, "values_by_label: got list"),
        (lambda: plot.weights(torch.zeros(2, 3, 4, 4)), ValueError, "w: got shape"),
        (lambda: plot.weights(torch.zeros(2, 4, 4), titles=["a"]), ValueError, "titles: got"),
        (lambda: plot.histograms({"a": []}, title="", xlabel=""), ValueError, "no values at all"),
        (lambda: plot.histograms([1.0], title="", xlabel=""), TypeError, "values_by_label: got list"),
    ],
)
def test_bad_input_of_these_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


# ---- matrices and named points (chapter 4)


def test_a_matrix_writes_each_number_in_its_cell():
    table = pd.DataFrame([[100.0, 40], [35, 0]], index=["A", "B"], columns=["C", "D"])
    ax = plot.matrix(table, title="T", xlabel="x", ylabel="y", data_name="digits").axes[0]
    np.testing.assert_allclose(ax.images[0].get_array(), table)
    assert [text.get_text() for text in ax.texts] == ["100", "40", "35", "0"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["A", "B"]
    assert [text.get_color() for text in ax.texts][0] == "white" != ax.texts[3].get_color()


def test_points_are_named_one_by_one():
    ax = plot.points([1, 2], [3, 4], ["a", "b"], title="T", xlabel="x", ylabel="y").axes[0]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines] == [(1, 3), (2, 4)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.matrix(pd.DataFrame([[np.nan]]), title="", xlabel="", ylabel=""), ValueError, "table: got NaN"),
        (
            lambda: plot.matrix(pd.DataFrame([[1.0]]), title="", xlabel="", ylabel="", limits=(1, 0)),
            ValueError,
            "limits: got",
        ),
        (lambda: plot.points([1], [1, 2], ["a", "b"], title="", xlabel="", ylabel=""), ValueError, "labels: got 2"),
    ],
)
def test_bad_matrices_and_points_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


def test_sanitation_fills_what_is_kept_and_draws_both_sets():
    from tmlcourse.poisoning import sanitizer

    y = torch.arange(60) % 2
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 3 * y[:, None]
    defense = sanitizer(x, y)
    ax = plot.sanitation(defense, x, y).axes[0]
    filled = sum(len(line.get_xdata()) for line in ax.lines if str(line.get_label()).endswith("kept"))
    hollow = sum(len(line.get_xdata()) for line in ax.lines if str(line.get_label()).endswith("thrown out"))
    assert (filled, hollow) == (int(defense.keeps(x, y).sum()), int((~defense.keeps(x, y)).sum()))
    circle = np.stack(ax.lines[2].get_data(), 1)
    np.testing.assert_allclose(np.linalg.norm(circle - defense.centroids[0].numpy(), axis=1), float(defense.radii[0]))
    with pytest.raises(ValueError, match=r"x: got shape \(60, 3\)"):
        plot.sanitation(defense, torch.zeros(60, 3), y)


def test_before_after_draws_one_line_a_row_and_says_what_it_cannot_draw():
    table = pd.DataFrame({"row": ["a", "b"], "before": [1.0, 2.0], "after": [0.0, 2.5]})
    ax = plot.before_after(table, title="T", xlabel="weight", data_name="d", mark=1).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [line.get_xdata()[:2].tolist() for line in ax.lines[:2]] == [[1.0, 0.0], [2.0, 2.5]]
    assert ax.lines[1].get_color() != ax.lines[0].get_color()
    with pytest.raises(ValueError, match="30"):
        plot.before_after(pd.concat([table] * 16), title="T", xlabel="w")
    with pytest.raises(ValueError, match="after"):
        plot.before_after(table.drop(columns="after"), title="T", xlabel="w")


# ---- certification (chapters 8 and 9)


def test_the_ladder_puts_every_rung_where_it_belongs():
    figure = plot.ladder({"IBP": -9.0, "LP": -0.2}, {"PGD": 0.5}, exact=0.4, picture=X[0], limits=(-1, 1), title="T")
    picture, ax = figure.axes
    assert picture.images[0].get_array().shape == (8, 8)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["IBP", "LP", "exact", "PGD"]
    marks = [line for line in ax.lines if line.get_marker() in tuple("><D")]
    assert [m.get_marker() for m in marks] == [">", ">", "D", "<"]
    places = [float(np.ravel(m.get_xdata())[0]) for m in marks]
    assert places[1:] == [-0.2, 0.4, 0.5] and -1 < places[0] < -0.9
    assert [m.get_markerfacecolor() == "white" for m in marks] == [True, False, False, False]


def test_the_ladder_refuses_a_bound_on_the_wrong_side():
    for below, above, exact in (({"LP": 0.3}, {"PGD": 0.2}, None), ({"LP": 0.3}, {}, 0.2), ({}, {"PGD": 0.1}, 0.2)):
        with pytest.raises(ValueError, match="not what it says"):
            plot.ladder(below, above, exact=exact)
    assert plot.ladder({"LP": 0.2}, {"PGD": 0.2}, exact=0.2)


def test_the_hull_is_the_triangle():
    ax = plot.relu_hull(-1.0, 2.0, slopes={"CROWN": 1.0}).axes[0]
    box, triangle = (patch.get_xy()[:-1].tolist() for patch in ax.patches)
    assert box == [[-1, 0], [2, 0], [2, 2], [-1, 2]] and triangle == [[-1, 0], [0, 0], [2, 2]]
    np.testing.assert_allclose(np.transpose(ax.lines[1].get_data()), [(-1, -1), (2, 2)])


def test_outlines_are_closed_around_the_points():
    square = [(0, 0), (1, 0), (1, 1), (0, 1)]
    ax = plot.outlines(np.random.rand(9, 2), {"box": square}, title="T").axes[0]
    assert len(ax.lines[0].get_xdata()) == 9
    np.testing.assert_allclose(np.transpose(ax.lines[1].get_data()), [*square, (0, 0)])


def test_bars_stand_in_order_with_their_numbers():
    ax = plot.bars(["a", "b"], [12, 3], title="T", xlabel="seconds", data_name="digits").axes[0]
    assert [patch.get_width() for patch in ax.patches] == [12, 3]
    assert [text.get_text() for text in ax.texts] == ["12", "3"]
    assert ax.yaxis.get_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.ladder([1.0], {}), TypeError, "below: got list"),
        (lambda: plot.ladder({}, {}), ValueError, "nothing to show"),
        (lambda: plot.ladder({"LP": np.nan}, {}), ValueError, r"below\['LP'\]: got NaN"),
        (lambda: plot.relu_hull(0.5, 1.0), ValueError, "want low < 0 < high"),
        (lambda: plot.relu_hull(-1.0, 1.0, slopes={"a": 1.5}), ValueError, r"slopes\['a'\]: got 1.5"),
        (lambda: plot.outlines([[1.0, 2, 3]], {}, title=""), ValueError, "points: want two columns"),
        (lambda: plot.outlines([[1.0, 2]], [], title=""), TypeError, "shapes: got list"),
        (lambda: plot.bars(["a"], [-1.0], title="", xlabel=""), ValueError, "values: got -1"),
        (lambda: plot.bars(["a"], [1.0, 2.0], title="", xlabel=""), ValueError, "labels: got"),
    ],
)
def test_bad_certification_figures_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


def test_groups_stand_side_by_side_and_small_ones_are_hollow():
    ax = plot.group_intervals(BY_GROUP, title="T").axes[0]
    faces = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "s" for _ in line.get_xdata()]
    assert faces == [plot.COLOURS[1], "white"]  # group b: solid for FPR, hollow for FNR
    assert "too few to judge" in words(ax.figure) and ax.yaxis.get_inverted()
    spans = sorted(tuple(path.vertices[:, 0]) for bar in ax.containers for path in bar[2][0].get_paths())
    assert spans == [(0, 40), (15, 25), (25, 35), (30, 50)]


def test_calibration_is_drawn_in_per_cent_around_the_diagonal():
    ax = plot.calibration(CALIBRATED).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 100])
    np.testing.assert_allclose([c[0].get_ydata().astype(float) for c in ax.containers], [[30, 70], [20, 90]])
    assert len(plot.calibration(CALIBRATED, diagonal=False).axes[0].lines) == len(ax.lines) - 1


def test_what_all_groups_reach_lies_under_each_hull():
    ax = plot.roc(ROCS, points={"equal": (0.2, 0.5)}).axes[0]
    (shade,) = ax.collections
    region = shade.get_paths()[0].vertices
    hull_a = np.interp(region[:, 0], [0, 20, 100], [0, 60, 100])
    hull_b = np.interp(region[:, 0], [0, 10, 50, 100], [0, 30, 80, 100])
    assert (region[:, 1] <= np.minimum(hull_a, hull_b) + 1e-6).all()
    assert region[:, 1].max() == 100
    assert not plot.roc(ROCS, hulls=False).axes[0].collections


def test_the_two_ends_of_a_line_have_names():
    table = pd.DataFrame({"row": ["a"], "before": [1.0], "after": [2.0]})
    assert "women" in words(plot.before_after(table, title="T", xlabel="x", names=("women", "men")))


def test_a_threshold_shows_its_rates():
    figure = plot.threshold(COUNTS, 2, title="a")
    # positives 2 | 5, 9; negatives 9 | 4, 1
    assert "FPR 35.7 %   FNR 12.5 %   PPV 73.7 %" in words(figure)
    assert "PPV –" in words(plot.threshold(COUNTS, 9))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.group_intervals(BY_GROUP.drop(columns="group"), title=""), ValueError, "no column group"),
        (lambda: plot.group_intervals(BY_GROUP.assign(low=99.0), title=""), ValueError, "want low <= value <= high"),
        (lambda: plot.calibration(CALIBRATED.assign(high=0.0)), ValueError, "want low <= observed <= high"),
        (lambda: plot.calibration({}), TypeError, "table: got dict"),
        (lambda: plot.roc([1]), TypeError, "curves: got list"),
        (lambda: plot.roc({"a": [(0, 0), (1, 2)]}), ValueError, r"curves\['a'\]"),
        (lambda: plot.roc(ROCS, points={"p": [1, 2, 3]}), ValueError, r"points\['p'\]"),
        (lambda: plot.threshold(COUNTS.assign(positive=-1), 2), ValueError, "negative counts"),
    ],
)
def test_bad_fairness_figures_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


HEAT = {"signed": torch.linspace(-1, 3, 24).view(2, 1, 3, 4), "unsigned": torch.linspace(0, 1, 24).view(2, 1, 3, 4)}


def test_heat_maps_have_a_bar_for_each_kind_of_scale():
    figure = plot.heatmaps(
        HEAT, images=torch.rand(2, 3, 3, 4), masks=torch.eye(3, 4).expand(2, 1, 3, 4), rows=["a", "b"]
    )
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == 6 and len(figure.axes) == 8  # two bars
    limits = [ax.images[0].get_clim() for ax in pictures]
    assert limits[1:3] == limits[4:] == [(-1, 1), (0, 1)]
    assert [float(abs(ax.images[0].get_array()).max()) for ax in pictures if ax.images[0].get_array().ndim == 2] == [
        1.0
    ] * 4
    assert pictures[0].get_ylabel() == "a" and sum(bool(ax.collections) for ax in pictures) == 4


def test_heat_maps_that_are_compared_share_one_scale():
    figure = plot.heatmaps({"a": HEAT["signed"], "b": HEAT["signed"] / 3}, shared=True, unit="logit")
    pictures = [ax for ax in figure.axes if ax.images]
    assert {ax.images[0].get_clim() for ax in pictures} == {(-3, 3)} and len(figure.axes) == 5
    np.testing.assert_allclose(pictures[1].images[0].get_array(), HEAT["signed"][0, 0] / 3)
    assert "3 logit" in [t.get_text() for t in figure.axes[-1].get_xticklabels()]


def test_channels_of_heat_maps_are_summed_where_signed():
    heat = torch.tensor([[1.0, -1.0], [0.5, 2.0]]).view(1, 2, 1, 2)
    drawn = plot.heatmaps({"a": heat, "b": heat.abs()}, shared=True, columns=1)
    pictures = [ax.images[0].get_array() for ax in drawn.axes if ax.images]
    np.testing.assert_allclose(pictures[0], [[1.5, 1.0]])
    np.testing.assert_allclose(pictures[1], [[1.0, 2.0]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.heatmaps([1]), TypeError, "maps_by_title: got list"),
        (lambda: plot.heatmaps({}), TypeError, "not empty"),
        (
            lambda: plot.heatmaps({"a": torch.rand(2, 1, 3, 4), "b": torch.rand(2, 1, 4, 4)}),
            ValueError,
            "want one shape",
        ),
        (lambda: plot.heatmaps(HEAT, rows=["a"]), ValueError, "rows"),
        (lambda: plot.heatmaps(HEAT, images=torch.rand(3, 1, 3, 4)), ValueError, "images: got 3, want 2"),
        (lambda: plot.heatmaps({"a": torch.full((1, 1, 2, 2), torch.nan)}), ValueError, "NaN"),
    ],
)
def test_bad_heat_maps_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


PIPELINE = {stage: f"somebody who stands at the {stage}" for stage in plot.STAGES}


def test_the_pipeline_names_every_stage_and_puts_each_attacker_beside_its_own():
    figure = plot.pipeline(PIPELINE)
    places = {t.get_text().replace("\n", " "): t.get_position() for t in texts(figure)}
    for stage, name in plot.STAGES.items():
        assert places[name][1] == places[PIPELINE[stage]][1] and places[name][0] < places[PIPELINE[stage]][0]
    assert len({place[1] for text, place in places.items() if text in plot.STAGES.values()}) == len(plot.STAGES)
    alone = [t.get_text() for t in plot.pipeline({"input": "evasion"}).axes[0].texts if t.get_text()]
    assert set(alone) == {*plot.STAGES.values(), "training", "in use", "evasion"}


@pytest.mark.parametrize(
    "check",
    [
        test_every_figure_leaves_pyplot_and_the_settings_alone,
        test_every_figure_looks_the_same_under_any_settings,
        test_every_figure_is_a_white_card,
        test_nothing_is_cut_off_and_text_reads_on_a_phone,
    ],
)
def test_the_pipeline_is_a_figure_like_the_others(check):
    check(lambda: plot.pipeline(PIPELINE))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.pipeline(["input"]), TypeError, "attackers: got list"),
        (lambda: plot.pipeline({"weather": "rain"}), ValueError, "attackers"),
        (lambda: plot.pipeline({"input": " "}), ValueError, "empty"),
    ],
)
def test_bad_attackers_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


ROOF = pd.DataFrame(
    {
        "name": ["step", "step", "clip and sum"],
        "group": ["PyTorch, measured", "kernel, from the roof", "PyTorch, measured"],
        "intensity": [0.1, 0.4, 0.5],
        "rate": [1e9, 4e9, 3e9],
    }
)
GROWTH = {"images: n^1.00": ([1, 2, 4], [1.0, 2, 4]), "depth: n^2.00": ([1, 2, 4], [1.0, 4, 16])}


@pytest.mark.parametrize(
    "make",
    [
        lambda: plot.roofline(ROOF, bandwidth=1e10, peak=1e11),
        lambda: plot.growth(GROWTH, title="Growth", xlabel="times as large", ylabel="times as long"),
    ],
)
@pytest.mark.parametrize(
    "check",
    [
        test_every_figure_leaves_pyplot_and_the_settings_alone,
        test_every_figure_looks_the_same_under_any_settings,
        test_every_figure_is_a_white_card,
        test_nothing_is_cut_off_and_text_reads_on_a_phone,
    ],
)
def test_the_figures_of_speed_are_figures_like_the_others(check, make):
    check(make)


def test_the_roof_is_the_lower_of_bandwidth_and_peak():
    (ax,) = plot.roofline(ROOF, bandwidth=1e10, peak=1e11).axes
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(y, np.minimum(1e11, np.asarray(x) * 1e10))
    filled = {line.get_markerfacecolor() for line in ax.lines[1:]}
    assert "white" in filled and len(filled) == 3
    assert {tuple(np.ravel(line.get_data())) for line in ax.lines[1:]} == {(0.1, 1e9), (0.4, 4e9), (0.5, 3e9)}


def test_growth_shows_powers_as_straight_lines():
    (ax,) = plot.growth(GROWTH, title="T", xlabel="x", ylabel="y").axes
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.lines] == list(GROWTH)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: plot.roofline(ROOF.assign(rate=0.0), bandwidth=1.0, peak=1.0), ValueError, "must be > 0"),
        (lambda: plot.roofline(ROOF.assign(group=list("abc")), bandwidth=1.0, peak=1.0), ValueError, "3 groups"),
        (lambda: plot.roofline(ROOF, bandwidth=0.0, peak=1.0), ValueError, "bandwidth: got 0"),
        (lambda: plot.growth([1], title="T", xlabel="x", ylabel="y"), TypeError, "points_by_label: got list"),
        (lambda: plot.growth({"a": ([1, 2], [1, 0])}, title="T", xlabel="x", ylabel="y"), ValueError, "all > 0"),
    ],
)
def test_bad_measurements_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == []


def test_roc_log_draws_the_best_rate_within_each_false_alarm_rate():
    figure = plot.roc_log({"attack": [(0, 0), (0.001, 0.02), (0.1, 0.3), (1, 1)]}, least=1e-3, data_name="made up")
    axes = figure.axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log" and "made up" in axes.get_title(loc="left")
    x, y = axes.lines[1].get_data()
    assert y[0] == 2 and y[-1] == 100 and y[np.searchsorted(x, 9.0)] == 2
    with pytest.raises(ValueError, match="want .T, 2. in"):
        plot.roc_log({"attack": [(0, 2)]})
    with pytest.raises(ValueError, match="least"):
        plot.roc_log({"attack": [(0, 0), (1, 1)]}, least=0.0)
    with pytest.raises(TypeError, match="curves"):
        plot.roc_log([(0, 0), (1, 1)])


def test_agreement_draws_every_case_and_the_diagonal():
    actual = np.array([-1.0, 0.0, 2.0])
    clouds, words = {"a": actual, "b": 0.5 * actual}, {"title": "T", "xlabel": "x", "ylabel": "y"}
    figure = plot.agreement(actual, clouds, data_name="toy", **words)
    diagonal, a, b = figure.axes[0].lines
    assert np.array_equal(*diagonal.get_data()) and diagonal.get_xdata()[0] < -1 and diagonal.get_xdata()[1] > 2
    assert np.array_equal(a.get_ydata(), actual) and np.array_equal(b.get_ydata(), 0.5 * actual)
    assert "toy" in figure.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="predicted_by_label\\['a'\\]: want shape"):
        plot.agreement(actual, {"a": [1.0]}, title="T", xlabel="x", ylabel="y")
    with pytest.raises(TypeError, match="predicted_by_label: got list"):
        plot.agreement(actual, [actual], title="T", xlabel="x", ylabel="y")


# What people see who lack one kind of cone: matrices on linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
WITHOUT = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, seen_by=None):
    """CIELAB under daylight, as seen with all cones or without one kind of them."""
    rgb = np.clip(np.array(WITHOUT[seen_by]) @ linear(colour), 0, 1) if seen_by else linear(colour)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    """The ratio of WCAG 2, 1 to 21."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("seen_by", [None, *WITHOUT])
def test_colours_stay_apart_without_one_kind_of_cones(seen_by):
    seen = [lab(colour, seen_by) for colour in plot.COLOURS]
    apart = {(i, j): np.linalg.norm(seen[i] - seen[j]) for i in range(6) for j in range(i)}
    assert min(apart.values()) > 15, min(apart, key=apart.get)
    assert all(np.linalg.norm(seen[i] - lab("white", seen_by)) > 25 for i in range(6))


@pytest.mark.parametrize("seen_by", [None, *WITHOUT])
@pytest.mark.parametrize("name", ["RdBu_r", "Reds", "Blues", "viridis"])
def test_tints_rise_in_lightness_and_the_signs_stay_apart(name, seen_by):
    colours = plt.get_cmap(name)(np.linspace(0, 1, 65))
    light = np.array([lab(colour[:3], seen_by)[0] for colour in colours])
    if name == "RdBu_r":
        assert (np.diff(light[:32]) > -0.5).all() and (np.diff(light[33:]) < 0.5).all()
        negative, positive = (lab(colours[i][:3], seen_by) for i in (13, 51))
        assert np.linalg.norm(negative - positive) > 40
    else:
        assert (np.diff(light if name == "viridis" else -light) > -0.5).all()


def test_the_numbers_of_a_matrix_can_be_read_on_every_tint():
    table = pd.DataFrame(np.linspace(0, 100, 51)[None])
    ax = plot.matrix(table, title="T", xlabel="x", ylabel="y").axes[0]
    tints = ax.images[0].to_rgba(ax.images[0].get_array())[0]
    assert min(contrast(text.get_color(), tint[:3]) for text, tint in zip(ax.texts, tints, strict=True)) > 4.4


@pytest.mark.parametrize("name", FIGURES)
def test_words_outside_pictures_can_be_read(name):
    """Contrast of at least 4.5 on white for every text, ticks included; the numbers of a matrix have their own test."""
    figure = FIGURES[name]()
    inside = figure.axes[0].texts if name == "matrix" else []
    texts = [text for text in figure.findobj(plt.Text) if text.get_text().strip() and text not in inside]
    assert texts and min(contrast(to_rgb(text.get_color()), "white") for text in texts) >= 4.5


def test_pictures_begin_beneath_their_title_and_fill_the_width():
    for figure in (plot.weights(torch.randn(3, 8, 8), columns=3, data_name="d"),
                   plot.heatmaps({c: torch.rand(4, 1, 8, 8) for c in "abcd"}, data_name="d"),
                   plot.perturbations(X[:1], X[:1], data_name="d"),
                   plot.images(X, rows=["a", "b"], columns=3, data_name="d")):  # fmt: skip
        figure.draw_without_rendering()
        shown = [ax for ax in figure.axes if ax.images]
        boxes = [ax.get_window_extent() for ax in shown]
        title = figure.get_suptitle() and figure._suptitle.get_window_extent()
        heads = [ax.title.get_window_extent().y1 for ax in shown if ax.get_title()]
        assert title.y0 - max([box.y1 for box in boxes] + heads) < 0.2 * figure.dpi
        assert max(b.x1 for b in boxes) - min(b.x0 for b in boxes) > 0.75 * figure.bbox.width


def test_rows_of_images_have_names():
    figure = plot.images(X, rows=["before", "after"], columns=3)
    assert [ax.get_ylabel() for ax in figure.axes] == ["before", "", "", "after", "", ""]
    with pytest.raises(ValueError, match="rows: got .* want 2 texts, one a row"):
        plot.images(X, rows=["before"], columns=3)


def test_a_single_perturbation_is_shown_side_by_side():
    figure = plot.perturbations(X[:1], X[:1].flip(3), labels=[3], labels_adv=[5], data_name="d")
    figure.draw_without_rendering()
    left, middle, right = (ax.get_window_extent() for ax in figure.axes)
    assert left.x1 < middle.x0 and middle.x1 < right.x0 and abs(left.y0 - right.y0) < 1
    assert figure.axes[0].get_title() == "original\nand its class\n3"
    assert figure.axes[2].get_title().endswith("✗ 5") and figure.axes[2].spines["left"].get_linewidth() == 2


def test_ticks_of_counts_are_whole_and_labels_break_before_a_formula():
    ax = plot.curves(np.arange(1, 21), {"a": np.arange(20.0)}, title="T", xlabel="epoch", ylabel="y").axes[0]
    assert np.allclose(ax.get_xticks(), np.round(ax.get_xticks()))
    table = pd.DataFrame({"row": ["3 or 7, robust, ε = 0.25"], "ours": [1], "low": [1], "high": [1], "published": [2]})
    ax = plot.bars_against_published(table).axes[0]
    assert ax.get_yticklabels()[0].get_text() == "3 or 7, robust,\nε = 0.25"
    assert "ours" in [text.get_text() for text in ax.get_legend().get_texts()]  # no interval, so none is promised
