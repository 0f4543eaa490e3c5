"""The explorer: one call, a live widget and a static slider, the same frames, the same bytes in each run."""

import doctest
import html.parser
import io
import json
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pandas as pd
import pytest
from PIL import Image

from tmlcourse import plot, widgets

VIEW = "application/vnd.jupyter.widget-view+json"
TITLE = 'eps of the "ball" <L2> & co'


class Page(html.parser.HTMLParser):
    """Elements in order, and whether all that open are closed."""

    VOID = {"img", "input"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def shown(monkeypatch):
    """What the explorer displays."""
    bundles = []
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture
def live(monkeypatch):
    """The live widgets that the explorer makes."""
    made, make = [], widgets._live
    monkeypatch.setattr(widgets, "_live", lambda *args: made.append(make(*args)) or made[-1])
    return made


def line(value):
    """A small figure that pyplot still holds when it is returned, as a reader's own would be."""
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, value])
    return figure


def explore(draw=line, values=(1, 2, 4), **kwargs):
    options = {"title": TITLE, "label": "eps = {}".format, "alt": "A line that rises to {}.".format, "start": 1}
    widgets.explorer(draw, values, **{**options, **kwargs})


def page(bundle):
    return Page(bundle["text/html"])


def test_page_has_one_labelled_slider_and_one_described_picture_a_value(shown):
    explore()
    found = page(shown[0])
    (slider,) = found.all("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "2", "1")
    assert slider["aria-valuetext"] == "eps = 2"
    assert [name for name, _ in found.elements[:4]] == ["figure", "figcaption", "label", "input"]  # named by nesting
    assert found.text == TITLE + "eps = 2"
    assert [img["alt"] for img in found.all("img")] == [f"A line that rises to {v}." for v in (1, 2, 4)]
    assert json.loads(found.all("figure")[0]["data-labels"]) == ["eps = 1", "eps = 2", "eps = 4"]
    assert found.all("figure")[0]["class"] == "tml-frames"


def test_without_javascript_exactly_the_start_frame_shows(shown):
    explore()
    hidden = ["hidden" in img for img in page(shown[0]).all("img")]
    assert hidden == [True, False, True]
    assert ["display:none" in img["style"] for img in page(shown[0]).all("img")] == hidden


def test_page_is_self_contained_and_shares_no_id(shown):
    explore()
    explore()
    for bundle in shown:
        assert not page(bundle).all("script") and "http" not in bundle["text/html"]
        assert not any("id" in attrs or "for" in attrs for _, attrs in page(bundle).elements)
        assert all(img["src"].startswith("data:image/webp;base64,") for img in page(bundle).all("img"))


def test_page_fits_a_phone_and_a_dark_theme(shown):
    explore()
    found = page(shown[0])
    (slider,), card = found.all("input"), found.all("figure")[0]["style"]
    assert "width:100%" in slider["style"] and 16 * float(re.search(r"height:([\d.]+)rem", slider["style"])[1]) >= 24
    assert "background:#fff;color:#222" in card and "color-scheme:light" in card
    for img in found.all("img"):
        assert "max-width:100%" in img["style"] and img["class"] == "dark-light"
        assert (img["width"], img["height"]) == ("240", "120")  # 2 x 1 inches at 120 dpi: nothing jumps while loading


def test_each_text_is_escaped_wherever_it_stands(shown):
    evil = '</output><b onclick="x()">\'&amp;'
    explore(values=[1, 2], title=evil, label=lambda v: evil * v, alt=lambda v: evil * v)
    found = page(shown[0])
    assert not found.all("b") and found.text == evil + evil * 2
    assert found.all("img")[1]["alt"] == evil * 2 == found.all("input")[0]["aria-valuetext"]
    assert json.loads(found.all("figure")[0]["data-labels"]) == [evil, evil * 2]


def test_same_call_gives_the_same_bytes(shown):
    explore()
    explore()
    assert shown[0]["text/html"] == shown[1]["text/html"] and shown[0]["text/plain"] == shown[1]["text/plain"]


def test_frames_are_small_and_differ():
    frames = widgets._frames(lambda eps: plot.norm_balls(eps, gradient=(1, eps)), [0.5, 1.0], "eps")
    assert frames[0] != frames[1]
    for frame in frames:
        image = Image.open(io.BytesIO(frame))
        assert image.format == "WEBP" and image.width == 600 and len(frame) < 30_000


def test_live_widget_shows_the_page_frames(shown, live):
    explore()
    slider, picture = live[0].children
    src = [img["src"] for img in page(shown[0]).all("img")]
    assert slider.value == 1 and slider.description == TITLE
    for i in (1, 2, 0):
        slider.value = i
        (img,) = Page(picture.value).all("img")
        assert img["src"] == src[i] and img["alt"] == f"A line that rises to {(1, 2, 4)[i]}." and "hidden" not in img
    assert shown[0][VIEW] == {"version_major": 2, "version_minor": 0, "model_id": live[0].model_id}
    assert shown[0]["text/plain"] == "A line that rises to 2."


def test_pyplot_and_settings_are_left_as_they_were(shown):
    mine, settings = plt.figure(), dict(matplotlib.rcParams)
    try:
        explore()
        assert plt.get_fignums() == [mine.number] and dict(matplotlib.rcParams) == settings
    finally:
        plt.close(mine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_draw_shows_nothing_and_leaves_nothing_open(shown, error):
    def draw(value):
        line(value)
        if value == 2:
            raise error
        return line(value)

    with pytest.raises(error):
        explore(draw)
    assert plt.get_fignums() == [] and shown == []


def test_frames_are_drawn_in_the_course_look():
    seen = []

    def draw(value):
        seen.append(plt.rcParams["axes.prop_cycle"].by_key()["color"][0])
        return line(value)

    widgets._frames(draw, [1, 2], "eps")
    assert seen == [plot.COLOURS[0]] * 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"draw": 1}, TypeError, "draw: got int, want a function"),
        ({"label": "eps"}, TypeError, "label: got str"),
        ({"alt": "a line"}, TypeError, "alt: got str"),
        ({"values": []}, ValueError, "start: got 1, want the index of one of 0 values"),
        ({"start": 3}, ValueError, "start: got 3"),
        ({"start": -1}, ValueError, "start: got -1"),
        ({"label": lambda v: "same"}, ValueError, "label: .* different"),
        ({"alt": lambda v: " "}, ValueError, "alt: .* not empty"),
        ({"draw": lambda v: plt.subplots()[1]}, TypeError, "draw: got Axes for 1, want a matplotlib Figure"),
    ],
)
def test_bad_input_is_named_and_nothing_is_shown(shown, change, error, message):
    with pytest.raises(error, match=message):
        explore(**change)
    assert shown == [] and plt.get_fignums() == []


def test_frames_html_wants_one_label_and_one_alt_a_frame():
    with pytest.raises(ValueError, match="frames: got 1, with 2 labels and 1 alts"):
        widgets.frames_html([b""], ["a", "b"], ["c"], "t")
    with pytest.raises(ValueError, match="frames: got 0"):
        widgets.frames_html([], [], [], "t")
    with pytest.raises(ValueError, match="start: got 1"):
        widgets.frames_html([b""], ["a"], ["c"], "t", start=1)


def test_in_a_notebook_a_figure_shows_once_and_an_explorer_shows_both_ways():
    cells = [
        "from tmlcourse import plot, widgets",
        "plot.norm_balls()",
        "widgets.explorer(plot.norm_balls, [1.0, 2.0], title='eps', alt='Balls of radius {}.'.format)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    silent, figure, explorer = (cell.outputs for cell in notebook.cells)
    assert silent == []
    assert [output.output_type for output in figure] == ["execute_result"] and "image/png" in figure[0].data
    assert [output.output_type for output in explorer] == ["display_data"]
    assert set(explorer[0].data) == {"text/plain", "text/html", VIEW}
    assert explorer[0].data["text/plain"] == "Balls of radius 1.0."


def counts(*scores):
    return pd.DataFrame({"score": scores, "positive": range(1, len(scores) + 1), "negative": 3})


def test_thresholds_show_one_slider_a_group_over_the_same_cuts(shown):
    widgets.thresholds({"a": counts(1, 2, 3), "b": counts(3, 2, 1)}, data_name="digits", score_name="decile")
    first, second = map(page, shown)
    for found, group in ((first, "a"), (second, "b")):
        assert found.text.startswith(f"{group}: select from this decile on")
        assert json.loads(found.all("figure")[0]["data-labels"]) == ["2 and above", "3 and above"]
        assert [f"group {group}" in img["alt"] for img in found.all("img")] == [True, True]
    assert first.all("img")[0]["alt"] != first.all("img")[1]["alt"]


def test_thresholds_want_the_same_scores_in_each_group(shown):
    with pytest.raises(ValueError, match="tables: got different scores"):
        widgets.thresholds({"a": counts(1, 2), "b": counts(1, 3)})
    with pytest.raises(ValueError, match=r"tables\['a'\]: no column negative, score"):
        widgets.thresholds({"a": counts(1, 2).filter(["positive"])})
    with pytest.raises(TypeError, match="tables: got list"):
        widgets.thresholds([counts(1, 2)])
    assert shown == []


def test_questionnaire_asks_and_keeps_no_answer(shown, monkeypatch):
    made, make = [], widgets._live_questionnaire
    monkeypatch.setattr(widgets, "_live_questionnaire", lambda *args: made.append(make(*args)) or made[-1])
    widgets.questionnaire('Did you "borrow" <it>?', truth=0.5)
    found = page(shown[0])
    assert (
        [b["value"] for b in found.all("button")] == ["yes", "no"] and not found.all("script") and not found.all("it")
    )
    assert (
        found.all("figure")[0]["aria-label"] == 'Did you "borrow" <it>?'
        and found.all("figure")[0]["data-truth"] == "0.5"
    )
    assert "http" not in shown[0]["text/html"] and shown[0]["text/plain"] == 'Did you "borrow" <it>?'
    _, row, answer = made[0].children
    yes = row.children[0]
    for _ in range(400):
        yes.click()
    count = int(re.search(r"\((\d+) YES of 400 reports", answer.value)[1])
    assert 240 < count < 360  # three quarters of 400, and seven standard deviations
    for truth, report in ((1.0, "NO"), (0.0, "YES|NO")):
        widgets.questionnaire("Ever?", truth=truth)
        made[-1].children[1].children[1].click()
        assert re.search(f"You report: ({report})", made[-1].children[2].value)


def test_questionnaire_names_what_is_wrong(shown):
    with pytest.raises(TypeError, match="question: got ' '"):
        widgets.questionnaire(" ")
    with pytest.raises(ValueError, match="truth: got 2"):
        widgets.questionnaire("Ever?", truth=2)
    assert shown == []


def test_examples_run():
    assert doctest.testmod(widgets).failed == 0
