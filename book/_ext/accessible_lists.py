"""Give the bibliography roles that screen readers know: docutils makes a list whose entries are no list items."""


def mend_roles(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = context["body"].replace(
            'role="doc-biblioentry"', 'role="listitem"'
        )


def setup(app):
    app.connect("html-page-context", mend_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
