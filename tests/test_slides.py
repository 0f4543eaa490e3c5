"""A chapter's slides: what goes on them, what stays off, and that they load nothing from elsewhere."""

import re

import nbformat
import pytest
import slides
from nbformat import v4

TEXT = """\
# Title

First sentence, with a ({cite:alp}`known2020`) citation. A second one.

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
        ("h1", "Title"), ("text", "First sentence, with a citation."), ("text", "- one"), ("text", "- two"),
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
    claim = v4.new_output("stream", name="stdout", text="it holds: True\nvalue 3\n")
    meta = {"mystnb": {"image": {"alt": "A curve."}, "figure": {"caption": "What is seen."}}}
    return v4.new_notebook(cells=[
        v4.new_markdown_cell("# Title\n\nText."), v4.new_code_cell("import torch"),
        v4.new_code_cell("def f(x):\n    return x"), v4.new_markdown_cell("## Section"),
        v4.new_code_cell("plot.curves(x)", outputs=[figure], metadata=meta),
        v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)", outputs=[claim]),
        v4.new_code_cell("shown = 1", metadata={"tags": ["slide"]}),
        v4.new_markdown_cell("## Gone", metadata={"tags": ["no-slide"]}),
        v4.new_markdown_cell("## Exercises\n\nSolve."), v4.new_markdown_cell("after")])  # fmt: skip


def test_a_deck():
    cells = slides.deck(chapter()).cells
    text = [cell.source for cell in cells]
    for there in (
        "# Title",
        "Text.",
        "def f(x):\n    return x",
        "## Section",
        "- it holds &#10003;\n- value 3",
        "shown = 1",
    ):
        assert there in text
    assert not {"import torch", "plot.curves(x)", "## Gone", "## Exercises", "Solve.", "after"} & set(text)
    assert "<figcaption>What is seen.</figcaption>" in text
    kinds = {cell.source: cell.metadata["slideshow"]["slide_type"] for cell in cells}
    assert kinds["# Title"] == kinds["## Section"] == "slide" and kinds["Text."] == "-"


def test_a_full_slide_goes_on_below():
    many = v4.new_notebook(cells=[v4.new_markdown_cell("## Long\n\n" + "\n\n".join(["$$\nx\n$$"] * 6))])
    cells = slides.deck(many).cells
    starts = [cell.source for cell in cells if cell.metadata["slideshow"]["slide_type"] != "-"]
    assert starts[0] == "## Long" and len(starts) > 1 and set(starts[1:]) == {"### Long"}
    assert sum(cell.source.startswith("$$") for cell in cells) == 6


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
