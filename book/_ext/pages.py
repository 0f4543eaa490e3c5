"""What the generated pages share: finding a page by its name, a link to it, and a table."""

from docutils import nodes
from sphinx.errors import ExtensionError


def find(env, name):
    """The document of that name, in whatever folder it is."""
    found = [page for page in env.found_docs if page.rsplit("/", 1)[-1] == name]
    if len(found) != 1:
        raise ExtensionError(f"want one page named {name!r}, got {found}")
    return found[0]


def link(app, page, text, anchor=""):
    """A reference from the page being written to `page`."""
    address = app.builder.get_relative_uri(app.env.docname, page)
    return nodes.reference("", text, refuri=address + anchor, internal=True)


def holding(env, node):
    """The pages with such a node, to be written anew in every build: the chapters may have run again."""
    return [name for name in env.found_docs if any(env.get_doctree(name).findall(node))]


def table(headings, rows):
    """A table node; a cell is a text or an inline node."""

    def row(cells):
        paragraphs = (
            nodes.paragraph(text=cell)
            if isinstance(cell, str)
            else nodes.paragraph("", "", cell)
            for cell in cells
        )
        return nodes.row("", *(nodes.entry("", paragraph) for paragraph in paragraphs))

    group = nodes.tgroup(
        "", *(nodes.colspec(colwidth=1) for _ in headings), cols=len(headings)
    )
    group += [nodes.thead("", row(headings)), nodes.tbody("", *map(row, rows))]
    return nodes.table("", group, classes=["colwidths-auto"])
