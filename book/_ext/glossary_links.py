"""Lead from the words of the chapters to the glossary, and from the search to the sections that teach them.

The first time that the running text of a chapter uses a term of `book/glossary.md`, the word becomes a link to its
entry, with the definition as its tooltip. Each entry ends with a link to the section that teaches it: there the index,
and so the search, finds all its names. Words in the page's `own_chapter_only` mean something else in other chapters.
"""

import json
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform

PAGE = "book/glossary"
CHAPTER = re.compile(r"book/(\d\d|appendix)-")
NO_RUNNING_TEXT = (
    nodes.TextElement,
    nodes.container,  # the cells and what they print
    nodes.citation,
)
RUNNING_TEXT = (nodes.paragraph, nodes.emphasis, nodes.strong)
NOT_READ_THROUGH = ("Exercises", "Further reading")


def entries(env):
    """(names, id, definition, document, id of the section) of each entry of the glossary."""
    for item in env.get_doctree(PAGE).findall(nodes.definition_list_item):
        terms = list(item.findall(nodes.term))
        names = [term.astext() for term in terms]
        *said, place = item.next_node(nodes.definition)[0]
        if not isinstance(place, addnodes.pending_xref):
            raise ExtensionError(
                f"glossary, {names[0]}: the last word is no link to a section"
            )
        page, slug = place["reftarget"], place["reftargetid"]
        sections = env.metadata[page].get("myst_slugs", {})
        if slug not in sections:
            raise ExtensionError(f"glossary, {names[0]}: no section {slug} in {page}")
        text = " ".join("".join(node.astext() for node in said).split())
        yield names, terms[0]["ids"][0], text, page, sections[slug][1]


def pattern(name):
    """Where a text uses the name: also at the head of a sentence, in the plural, and with a hyphen for a space."""
    first, rest = re.escape(name[0]), re.escape(name[1:])
    if name[0].islower():
        first = f"[{name[0]}{name[0].upper()}]"
    plural = "(?:y|ies)" if name.endswith("y") else f"{rest[-1:]}(?:e?s)?"
    whole = (
        first
        + rest[: -1 if name[-1].isalnum() else None]
        + (plural if name[-1].isalnum() else "")
    )
    whole = whole.replace(r"\ ", r"[\s-]").replace(
        "'", "['\N{RIGHT SINGLE QUOTATION MARK}]"
    )
    return rf"(?<![\w-]){whole}(?![\w-])"


def index_sections(app, env):
    """Put the names of the glossary into the index at the sections that teach them; tell which pages to write anew."""
    index = env.get_domain("index").entries
    for page, entry in getattr(env, "course_taught", []):
        if entry in index.get(page, []):
            index[page].remove(entry)
    own = json.loads(env.metadata[PAGE].get("own_chapter_only", "[]"))
    terms, taught = [], []
    for names, place, definition, page, section in entries(env):
        terms.append(
            (
                [(pattern(name), page if name in own else "") for name in names],
                place,
                definition,
            )
        )
        taught += [(page, ("single", name, section, "main", None)) for name in names]
    for page, entry in taught:
        index.setdefault(page, []).append(entry)
    changed = (terms, taught) != (
        getattr(env, "course_terms", None),
        getattr(env, "course_taught", None),
    )
    env.course_terms, env.course_taught = terms, taught
    return [page for page in env.found_docs if CHAPTER.match(page)] if changed else []


class LinkTerms(SphinxPostTransform):
    default_priority = 900  # references are resolved: what is still text stays text

    def run(self, **kwargs):
        if self.app.builder.format != "html":
            return
        if self.env.docname == PAGE:
            # The search lists main entries first: the section before the glossary.
            for index in self.document.findall(addnodes.index):
                index["entries"] = [
                    (*entry[:3], "", entry[4]) for entry in index["entries"]
                ]
        here = [
            entry for page, entry in self.env.course_taught if page == self.env.docname
        ]
        self.document += addnodes.index(entries=here)
        if CHAPTER.match(self.env.docname):
            self.link_terms()

    def link_terms(self):
        todo = {}
        for number, (names, place, definition) in enumerate(self.env.course_terms):
            for name, page in names:
                if page in ("", self.env.docname):
                    todo[f"t{number}_{len(todo)}"] = (name, place, definition)
        for text in list(self.document.findall(nodes.Text)):
            if self.is_running(text):
                todo = self.link(text, todo)

    def is_running(self, text):
        node = text.parent
        while node is not None:
            if isinstance(node, nodes.section) and node[0].astext() in NOT_READ_THROUGH:
                return False
            if isinstance(node, NO_RUNNING_TEXT) and not isinstance(node, RUNNING_TEXT):
                return False
            node = node.parent
        return True

    def link(self, text, todo):
        """Replace the text by itself with links; returns the names that are still to be linked."""
        parts, rest = [], text.astext()
        while todo and (found := self.first(rest, todo)):
            name, place, definition = todo[found.lastgroup]
            todo = {key: value for key, value in todo.items() if value[1] != place}
            address = (
                self.app.builder.get_relative_uri(self.env.docname, PAGE) + "#" + place
            )
            link = nodes.reference(
                "",
                found[0],
                refuri=address,
                internal=True,
                reftitle=definition,
                classes=["course-term"],
            )
            parts += [nodes.Text(rest[: found.start()]), link]
            rest = rest[found.end() :]
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(rest)])
        return todo

    def first(self, text, todo):
        """The first name that the text uses, the longest of those that begin there."""
        longest = sorted(todo, key=lambda key: -len(todo[key][0]))
        return re.search(
            "|".join(f"(?P<{key}>{todo[key][0]})" for key in longest), text
        )


def setup(app):
    app.connect("env-updated", index_sections)
    app.add_post_transform(LinkTerms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
