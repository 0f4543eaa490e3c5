"""The directive `chapter-status`: when, where and with which versions each chapter of this build ran.

Where and with which versions is the line that the chapter's own setup cell printed. The page is filled in when all
chapters have been read, so it can never be older than they are.
"""

import platform
from datetime import datetime, timezone

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from pages import holding, link, table
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

HEADINGS = ("Chapter", "Ran (UTC)", "Seconds", "Where, and with which versions")


class ChapterStatus(nodes.General, nodes.Element):
    """Holds the table's place until all chapters have run."""


class ChapterStatusDirective(SphinxDirective):
    def run(self):
        return [ChapterStatus()]


def printed_by_setup_cell(doctree):
    """The line that `tmlcourse.setup` printed, or an empty string."""
    for block in doctree.findall(nodes.literal_block):
        if "output" in block.get("classes", ()) or "stream" in block.get("classes", ()):
            for line in block.astext().splitlines():
                if line.startswith("tmlcourse "):
                    return line.strip()
    return ""


def chapter_rows(env):
    """(document, date, seconds, printed line) of every executed chapter, in the order of the book."""
    metadata = NbMetadataCollector.get_doc_data(env)
    order = list(env.toctree_includes.get(env.config.root_doc, [])) + sorted(metadata)
    for name in sorted(
        (name for name, data in metadata.items() if data.get("exec_data")),
        key=order.index,
    ):
        run = metadata[name]["exec_data"]
        date = datetime.fromtimestamp(run["mtime"], timezone.utc).strftime(
            "%Y-%m-%d %H:%M"
        )
        seconds = "" if run["runtime"] is None else f"{run['runtime']:.0f}"
        where = (
            f"Python {platform.python_version()}",
            f"{platform.system()} {platform.machine()}",
        )
        yield (
            name,
            date,
            seconds,
            " | ".join((*where, printed_by_setup_cell(env.get_doctree(name)))),
        )


class FillChapterStatus(SphinxPostTransform):
    default_priority = 8

    def run(self, **kwargs):
        for place in list(self.document.findall(ChapterStatus)):
            rows = (
                [link(self.app, name, self.env.titles[name].astext()), *cells]
                for name, *cells in chapter_rows(self.env)
            )
            place.replace_self(table(HEADINGS, rows))


def setup(app):
    app.add_node(ChapterStatus)
    app.add_directive("chapter-status", ChapterStatusDirective)
    app.connect("env-updated", lambda app, env: holding(env, ChapterStatus))
    app.add_post_transform(FillChapterStatus)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
