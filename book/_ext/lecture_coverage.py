"""The directive `lecture-coverage`: for each topic of one lecture, the section of the book where it stands.

The rows are in `book/coverage.csv`. A row whose section is nowhere stops the build.
"""

import csv
from pathlib import Path

from docutils import nodes
from pages import find, holding, link, table
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

ROWS = Path(__file__).resolve().parent.parent / "coverage.csv"


class LectureCoverage(nodes.General, nodes.Element):
    """Holds the table's place until all pages have been read."""


class LectureCoverageDirective(SphinxDirective):
    """`{lecture-coverage} Z`: the rows whose name begins with that letter."""

    required_arguments = 1

    def run(self):
        self.env.note_dependency(str(ROWS))
        return [LectureCoverage(letter=self.arguments[0])]


# What a notebook's text and the page made of it do not share: marks of mathematics and code, and typographic quotes.
UNSHARED = str.maketrans({"$": None, "`": None, "\N{RIGHT SINGLE QUOTATION MARK}": "'"})


def plain(title):
    """A title as it reads in the notebook and on its page alike."""
    return " ".join(title.translate(UNSHARED).split())


class FillLectureCoverage(SphinxPostTransform):
    default_priority = 8

    def run(self, **kwargs):
        for place in list(self.document.findall(LectureCoverage)):
            with ROWS.open(encoding="utf-8", newline="") as file:
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if row["row"][0] == place["letter"]
                ]
            cells = ([row["topic"], self.place(row), row["row"]] for row in rows)
            place.replace_self(table(("Topic", "Where", "Row"), cells))

    def place(self, row):
        """The link to a page, or to the section of it."""
        page = find(self.env, row["page"])
        title, section = plain(self.env.titles[page].astext()), plain(row["section"])
        if not section:
            return link(self.app, page, title)
        entries = self.env.tocs[page].findall(nodes.reference)
        anchors = {plain(entry.astext()): entry["anchorname"] for entry in entries}
        if section not in anchors:
            raise ExtensionError(
                f"coverage.csv, {row['row']}: no section {section!r} in {page}"
            )
        return link(self.app, page, f"{title}: {section}", anchors[section])


def setup(app):
    app.add_node(LectureCoverage)
    app.add_directive("lecture-coverage", LectureCoverageDirective)
    app.connect("env-updated", lambda app, env: holding(env, LectureCoverage))
    app.add_post_transform(FillLectureCoverage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
