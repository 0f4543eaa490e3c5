"""The directive `chapter-map`: what each chapter builds on, how long it takes, and the homework that goes with it.

What builds on what stands in `book/chapters.csv`. Minutes are counted, not guessed: the words of the page at the pace of
a reader who stops at formulas, and the seconds that the chapter ran in this build.
"""

import csv
from pathlib import Path

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from pages import find, holding, link, table
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

ROWS = Path(__file__).resolve().parent.parent / "chapters.csv"
HEADINGS = ("Chapter", "Builds on", "To read (minutes)", "To run (seconds)", "Homework")
WORDS_A_MINUTE = 120


class ChapterMap(nodes.General, nodes.Element):
    """Holds the table's place until all pages have been read."""


class ChapterMapDirective(SphinxDirective):
    def run(self):
        self.env.note_dependency(str(ROWS))
        return [ChapterMap()]


def minutes(doctree):
    """The words of paragraphs and lists, at `WORDS_A_MINUTE`, to the next five minutes."""
    words = sum(len(text.astext().split()) for text in doctree.findall(nodes.paragraph))
    return max(5, 5 * round(words / WORDS_A_MINUTE / 5))


class FillChapterMap(SphinxPostTransform):
    default_priority = 8

    def run(self, **kwargs):
        for place in list(self.document.findall(ChapterMap)):
            with ROWS.open(encoding="utf-8", newline="") as file:
                place.replace_self(
                    table(HEADINGS, [self.row(row) for row in csv.DictReader(file)])
                )

    def row(self, row):
        page = find(self.env, row["page"])
        number = row["page"][:2].lstrip("0")
        data = (
            NbMetadataCollector.get_doc_data(self.env).get(page, {}).get("exec_data")
            or {}
        )
        before = ", ".join(name[:2].lstrip("0") for name in row["builds_on"].split())
        return [
            link(self.app, page, f"{number}. {self.env.titles[page].astext()}"),
            before,
            str(minutes(self.env.get_doctree(page))),
            f"{data['runtime']:.0f}" if data.get("runtime") else "",
            link(self.app, find(self.env, row["homework"]), row["homework"][2:3])
            if row["homework"]
            else "",
        ]


def setup(app):
    app.add_node(ChapterMap)
    app.add_directive("chapter-map", ChapterMapDirective)
    app.connect("env-updated", lambda app, env: holding(env, ChapterMap))
    app.add_post_transform(FillChapterMap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
