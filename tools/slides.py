#!/usr/bin/env python3
"""Make a chapter's slides: its headings, formulas, questions, figures and claims, one thought a slide.

usage: slides.py [CHAPTER ...]        after `python3 course.py book`; CHAPTER is a number or a name, all without

The figures, sliders and short tables are those of the built book. By default a paragraph becomes its first sentence, a
list, a table, a formula and a `> ` box stay whole, code goes and what it shows stays. A cell's tags say otherwise:
`slide` shows all of it (code, too), `no-slide` nothing. Keys: arrows, F for the full screen, O for all slides at once;
`?print-pdf` in the address and the browser's print make a PDF.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

import nbformat
import sphinx_revealjs
import yaml
from jupyter_cache import get_cache
from nbconvert import SlidesExporter
from nbformat import v4
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "_build" / ".jupyter_cache"  # the outputs of the last build
STATIC = ROOT / "_build" / "html" / "_static"
OUT = ROOT / "_build" / "slides"
ROLE = re.compile(r"\{[\w:]+\}`[^`]*`")
FULL = 680  # the height of a slide in pixels; heights are estimated, the page itself makes what it shows fit
MORE = 800  # a slide shrinks a little rather than leave one item or one sentence over
FIGURE = 420  # the least height of a figure, which the last row of a lecture hall has to read
ROWS = 12  # of the longest table among the outputs that is shown
IMAGES = ("image/svg+xml", "image/png")
SHOWN = ("tml-frames", "tml-question", "dataframe")  # of the HTML that cells put out
LEFT_OUT = ("Exercises", "Further reading")


def without_roles(text):
    """A text without its citations and references: brackets that begin with one go with it."""
    text = re.sub(rf"\s*\((?:see |chapter )?{ROLE.pattern}[^()]*\)", "", text)
    text = re.sub(r"(?m)^(\$\$|.*\$\$) \([\w-]+\)$", r"\1", text)
    text = re.sub(rf"[,;]?\s*{ROLE.pattern}", "", text)
    return re.sub(r"[,;]\s*\)", ")", text)


def blocks(text):
    """The blocks of a Markdown text: paragraphs, lists, formulas; a fence, <details> or $$ ... $$ is one block."""
    block, fence = [], None
    for line in [*text.splitlines(), ""]:
        ends = {"```": "```", "<details>": "</details>", "$$": "$$"}
        opened = next((mark for mark in ends if line.strip().startswith(mark)), None)
        if fence:
            block.append(line)
            if line.strip().endswith(fence) or line.strip().startswith(fence):
                fence = None
            continue
        if opened and not (opened == "$$" and line.strip().count("$$") == 2):
            fence = ends[opened]
        if line.strip() or fence:
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []


def first_sentence(paragraph):
    """Up to the first full stop that ends a sentence; all of a paragraph that has none."""
    flat = " ".join(paragraph.split())
    found = re.match(r"(.+?[.!?:])(?=\s+[A-Z*$(]|$)", flat)
    return (found[1] if found else flat).rstrip(":") + ("." if found and found[1].endswith(":") else "")


def gist(text):
    """(kind, text) for what of a Markdown cell belongs on a slide; kind is "h1" to "h6" or "text"."""
    for block in blocks(without_roles(text)):
        heading = re.match(r"(#+) (.*)", block)
        if heading:
            yield f"h{len(heading[1])}", heading[2]
            yield from gist(block.split("\n", 1)[1]) if "\n" in block else ()
        elif block.startswith(("<details>", "```", "    ")):
            continue
        elif re.match(r"- |1\. ", block):
            yield from (("text", item) for item in re.split(r"\n(?=- |\d+\. )", block))
        elif block.startswith(("$$", "|", "> ")):
            yield "text", block
        elif not block.startswith(("[", "**You need**", "<")):
            yield "text", first_sentence(block)


def shown(cell):
    """The outputs of a code cell for a slide: its figures, its slider, its short tables."""
    outputs = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        found = next((kind for kind in IMAGES if kind in data), None)
        if found:
            alt = {found: {"alt": cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")}}
            outputs.append(v4.new_output("display_data", data={found: data[found]}, metadata=alt))
        elif any(mark in data.get("text/html", "") for mark in SHOWN) and data["text/html"].count("<tr") <= ROWS + 1:
            outputs.append(v4.new_output("display_data", data={"text/html": data["text/html"]}))
    return outputs


def claims(cell):
    """What a checked cell found, as a list; empty for other cells."""
    if "NBVAL_CHECK_OUTPUT" not in cell.source:
        return ""
    text = "".join(output.text for output in cell.get("outputs", ()) if output.output_type == "stream")
    return "\n".join(
        f"- {re.sub(r': True$', '&nbsp;&#10003;', line.strip())}" for line in text.splitlines() if line.strip()
    )


def in_the_open(cell):
    """The functions and classes with which a code cell begins, if they fit on a slide; else nothing."""
    if not cell.source.startswith(("def ", "class ")):
        return ""
    ends = [
        block.end_lineno for block in ast.parse(cell.source).body if isinstance(block, ast.FunctionDef | ast.ClassDef)
    ]
    lines = cell.source.splitlines()[: ends[-1]]
    return "\n".join(lines) if len(lines) <= 18 and max(map(len, lines)) <= 100 else ""


def height(text):
    """About how many pixels a Markdown block takes on a slide, at some 65 letters a line."""
    lines = text.splitlines()
    if text.startswith("$$"):
        return 70 + 50 * (text.count(r"\\") + 1)
    if text.startswith("|"):
        return 20 + sum(34 * -(-len(line) // 95) for line in lines if not line.startswith("|-"))
    if text.startswith("- "):
        return sum(8 + 42 * -(-len(line) // 62) for line in lines)
    return (50 if text.startswith("> ") else 12) + 37 * -(-len(text) // 65)


def tables(text):
    """A long table as shorter ones, each under the same head; any other text as it is."""
    head, rows = text.splitlines()[:2], text.splitlines()[2:]
    parts = -(-height(text) // (FULL - 120)) if text.startswith("|") else 1
    if parts == 1:
        return [text]
    cuts = [round(part * len(rows) / parts) for part in range(parts + 1)]
    return ["\n".join(head + rows[first:last]) for first, last in zip(cuts, cuts[1:], strict=False)]


class Deck:
    """Cells with nbconvert's marks; a slide that is full goes on in the next one below it."""

    def __init__(self):
        self.cells, self.used, self.title = [], 0, ""
        self.before = self.start = None  # height of the slide that the present one goes on with, and where it goes on

    def close(self):
        """The end of a slide. One that only went on for a line or two goes back into the slide before it."""
        if self.before is not None and self.used <= 80 + 170 and self.before + self.used - 80 <= MORE:
            del self.cells[self.start]
            self.used += self.before - 80
        self.before = None

    def add(self, cell, kind, weight):
        cell.metadata["slideshow"] = {"slide_type": kind}
        self.used = weight if kind != "-" else self.used + weight
        self.cells.append(cell)

    def heading(self, level, text):
        self.close()
        self.title = text
        mark = "slide" if level in ("h1", "h2") else "subslide"
        self.add(v4.new_markdown_cell(f"{'#' * min(3, int(level[1]))} {text}"), mark, 80)

    def next(self):
        self.close()
        self.before, self.start = self.used, len(self.cells)
        self.add(v4.new_markdown_cell(f"### {self.title}"), "subslide", 80)

    def put(self, cell, weight):
        """A block, on the next slide if it does not fit on this one."""
        goes_on = cell.source.startswith("- ") and self.cells[-1].source.startswith("- ")
        if self.used + weight > (MORE if goes_on else FULL) and self.used > 80:
            self.next()
        self.add(cell, "-", weight)

    def text(self, text):
        for part in tables(text):
            self.put(v4.new_markdown_cell(part), height(part))

    def code(self, source):
        self.put(v4.new_code_cell(source), 20 + 28 * len(source.splitlines()))

    def figure(self, outputs, caption):
        for output in outputs:
            rows = output.data.get("text/html", "").count("<tr")
            cell = v4.new_code_cell("", outputs=[output], metadata={"tags": ["only-output"]})
            self.put(cell, 20 + 40 * rows if rows else FIGURE)
        if caption:
            caption = re.sub(r"`([^`]+)`", r"<code>\1</code>", caption)  # inside HTML, Markdown is not read
            self.add(v4.new_markdown_cell(f"<figcaption>{caption}</figcaption>"), "-", 50)


def deck(notebook):
    """The notebook of a chapter's slides."""
    slides, left_out = Deck(), ""  # left_out: the level of the heading whose section is being skipped
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", ()))
        if "no-slide" in tags:
            continue
        if cell.cell_type == "markdown":
            parts = [("text", without_roles(cell.source))] if "slide" in tags else gist(cell.source)
            for kind, text in parts:
                if kind != "text" and (not left_out or kind <= left_out):
                    left_out = kind if text in LEFT_OUT else ""
                if not left_out:
                    (slides.text(text) if kind == "text" else slides.heading(kind, text))
        elif cell.cell_type == "code" and not left_out:
            outputs = shown(cell)
            figure = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "")
            source = cell.source if "slide" in tags else "" if outputs else in_the_open(cell)
            if source:
                slides.code(source)
            if claims(cell):
                slides.text(claims(cell))
            if outputs:
                slides.figure(outputs, without_roles(figure))
    slides.close()
    notebook = v4.new_notebook(cells=slides.cells, metadata={"title": slides.cells[0].source.lstrip("# ")})
    return notebook


def export(notebook):
    """The slides as one HTML page, beside the folders `reveal` and `mathjax`."""
    config = Config()
    config.SlidesExporter.reveal_url_prefix = "reveal"
    config.SlidesExporter.mathjax_url = "mathjax/tex-chtml.js"
    config.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
    config.SlidesExporter.template_name = "slides"
    config.SlidesExporter.reveal_theme = "white"
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"only-output"}
    return SlidesExporter(config=config).from_notebook_node(notebook)[0]


def executed(name):
    """A chapter with the outputs of the last build; None if it has not run as it is now."""
    notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", 4)
    try:
        return get_cache(str(CACHE)).merge_match_into_notebook(notebook)[1]
    except KeyError:
        return None


def main(wanted):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [chapter["file"].split("/")[-1] for part in toc["parts"] for chapter in part["chapters"]]
    chapters = [name for name in names if (ROOT / "book" / f"{name}.ipynb").exists()]
    chosen = [name for name in chapters if not wanted or any(name.startswith(w.zfill(2)) for w in wanted)]
    if not chosen:
        sys.exit(f"slides: got {' '.join(wanted)}, want some of {', '.join(chapters)}")
    notebooks = {name: executed(name) for name in chosen}
    missing = [name for name, notebook in notebooks.items() if notebook is None]
    if missing and (wanted or missing == chosen):
        sys.exit(f"slides: {', '.join(missing)} has not run as it is now; run `python3 course.py book` first")
    OUT.mkdir(parents=True, exist_ok=True)
    assets = Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs"
    shutil.copytree(assets, OUT / "reveal", dirs_exist_ok=True)
    shutil.copytree(STATIC / "mathjax", OUT / "mathjax", dirs_exist_ok=True)
    for name, notebook in notebooks.items():
        if notebook is None:
            print(f"{name}: has not run as it is now, no slides")
            continue
        (OUT / f"{name}.html").write_text(export(deck(notebook)), encoding="utf-8")
        print((OUT / f"{name}.html").as_uri())


if __name__ == "__main__":
    main(sys.argv[1:])
