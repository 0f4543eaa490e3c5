"""A chapter's slides: what goes on them, what stays off, and that they load nothing from elsewhere."""

import re

import nbformat
import pytest
import slides
from nbformat import v4

TEXT = """\
# Title

First sentence, with a ({cite:alp}`known2020`) citation (new, {cite:alp}`new2021`). A second one.

- one
- two

**You need** patience.

## A section

The loss is

$$
a = b

c
$$ (label)

> **Predict, then run.** What?

<details><summary>Solution</summary>

Hidden.

</details>

```python
hidden = 1
```

| a | b |
|---|---|
| 1 | 2 |"""


def test_the_gist_of_a_text():
    assert list(slides.gist(TEXT)) == [
        ("h1", "Title"), ("text", "First sentence, with a citation (new)."), ("text", "- one"), ("text", "- two"),
        ("h2", "A section"), ("text", "The loss is"), ("text", "$$\na = b\n\nc\n$$"),
        ("text", "> **Predict, then run.** What?"), ("text", "| a | b |\n|---|---|\n| 1 | 2 |"),
    ]  # fmt: skip


@pytest.mark.parametrize(("paragraph", "sentence"), [
    ("One. Two.", "One."),
    ("It is 0.3 here. Two.", "It is 0.3 here."),
    ("Where does it go? There.", "Where does it go?"),
    ("Write the two\nside by side:", "Write the two side by side."),
    ("no stop", "no stop"),
])  # fmt: skip
def test_the_first_sentence(paragraph, sentence):
    assert slides.first_sentence(paragraph) == sentence


def chapter():
    figure = v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    slider = v4.new_output("display_data", data={"text/html": '<figure class="tml-frames">frames</figure>'})
    table = v4.new_output("display_data", data={"text/html": '<table class="dataframe"><tr><td>7</td></tr></table>'})
    long = v4.new_output("display_data", data={"text/html": '<table class="dataframe">' + 40 * "<tr></tr>"})
    claim = v4.new_output("stream", name="stdout", text="it holds: True\nvalue 3\n")
    meta = {"mystnb": {"image": {"alt": "A curve."}, "figure": {"caption": "What is seen."}}}
    return v4.new_notebook(cells=[
        v4.new_markdown_cell("# Title\n\nText."), v4.new_code_cell("import torch"),
        v4.new_code_cell("def f(x):\n    return x\n\n\nused = f(1)"), v4.new_markdown_cell("## Section"),
        v4.new_code_cell("plot.curves(x)", outputs=[figure], metadata=meta),
        v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)", outputs=[claim]),
        v4.new_code_cell("shown = 1", metadata={"tags": ["slide"]}),
        v4.new_markdown_cell("## Gone", metadata={"tags": ["no-slide"]}),
        v4.new_markdown_cell("#### Exercises\n\nSolve."), v4.new_markdown_cell("after\n\n##### First"),
        v4.new_code_cell("plot.curves(y)", outputs=[figure]), v4.new_markdown_cell("### Sliders"),
        v4.new_code_cell("explorer()", outputs=[slider, table, long])])  # fmt: skip


def test_a_deck():
    cells = slides.deck(chapter()).cells
    text = [cell.source for cell in cells]
    for there in (
        "# Title",
        "Text.",
        "def f(x):\n    return x",
        "## Section",
        "- it holds&nbsp;&#10003;\n- value 3",
        "shown = 1",
    ):
        assert there in text
    assert not {"import torch", "plot.curves(x)", "## Gone", "after", "### First"} & set(text)
    assert not any(word in source for source in text for word in ("Exercises", "Solve", "used"))
    outputs = [output.data for cell in cells for output in cell.get("outputs", ())]
    assert [next(iter(data)) for data in outputs] == ["image/png", "text/html", "text/html"]
    assert "frames" in outputs[1]["text/html"] and "<td>7" in outputs[2]["text/html"]
    assert "<figcaption>What is seen.</figcaption>" in text
    kinds = {cell.source: cell.metadata["slideshow"]["slide_type"] for cell in cells}
    assert kinds["# Title"] == kinds["## Section"] == "slide" and kinds["Text."] == "-"


def test_brackets_that_a_citation_leaves():
    text = "A name (NAME, ({cite:alp}`known2020`)), a rule ({eq}`rule` in short), and ({cite:alp}`known2020`, p. 3)."
    assert slides.without_roles(text) == "A name (NAME), a rule, and."
    wide = v4.new_code_cell("def f():\n    return " + '"' + 100 * "x" + '"')
    assert slides.in_the_open(wide) == "" and slides.in_the_open(v4.new_code_cell("def f():\n    pass\nf()")) != ""


def test_a_full_slide_goes_on_below():
    many = v4.new_notebook(cells=[v4.new_markdown_cell("## Long\n\n" + "\n\n".join(["$$\nx\n$$"] * 8))])
    cells = slides.deck(many).cells
    starts = [cell.source for cell in cells if cell.metadata["slideshow"]["slide_type"] != "-"]
    assert starts[0] == "## Long" and len(starts) > 1 and set(starts[1:]) == {"### Long"}
    assert sum(cell.source.startswith("$$") for cell in cells) == 8


def test_a_figure_has_room():
    drawn = v4.new_code_cell("plot.curves(x)", outputs=[v4.new_output("display_data", data={"image/png": "aa"})])
    drawn.metadata["mystnb"] = {"figure": {"caption": "From `verify`."}}
    text = v4.new_markdown_cell("## Words\n\n" + "\n\n".join(["$$\nx\n$$"] * 2))
    cells = slides.deck(v4.new_notebook(cells=[text, drawn])).cells
    assert [cell.source for cell in cells][-3:] == [
        "### Words",
        "",
        "<figcaption>From <code>verify</code>.</figcaption>",
    ]


def test_one_line_is_not_left_over():
    text = "## Long\n\n" + "\n\n".join(["$$\nx\n$$"] * 5)
    cells = slides.deck(v4.new_notebook(cells=[v4.new_markdown_cell(text + "\n\nA last word.")])).cells
    assert [cell.source for cell in cells] == text.split("\n\n") + ["A last word."]


def test_a_long_table_goes_on_under_the_same_head():
    head, rows = ["| a | b |", "|---|---|"], [f"| {i} | {'word ' * 30} |" for i in range(11)]
    parts = slides.tables("\n".join(head + rows))
    assert len(parts) > 1 and all(part.splitlines()[:2] == head for part in parts)
    assert [row for part in parts for row in part.splitlines()[2:]] == rows
    assert all(slides.height(part) <= slides.FULL - 80 for part in parts)
    assert slides.tables("no table") == ["no table"]


def test_the_page_needs_no_network_and_says_what_its_figures_show():
    page = slides.export(slides.deck(chapter()))
    assert re.findall(r'(?:src|href)="(?:https?:)?//[^"]+', page) == []
    assert 'alt="A curve."' in page and "reveal/dist/reveal.js" in page and "mathjax/" in page
    assert "plot.curves" not in page and "return" in page


def test_every_chapter_makes_slides():
    """Without outputs; with them in tests/test_browser.py."""
    for path in sorted((slides.ROOT / "book").glob("*.ipynb")):
        cells = slides.deck(nbformat.read(path, 4)).cells
        starts = sum(cell.metadata["slideshow"]["slide_type"] != "-" for cell in cells)
        assert 10 <= starts <= 160, path
        assert not any(slides.ROLE.search(cell.source) for cell in cells), path
