"""Point the edit buttons to the branch that people work on; the Colab buttons may point to a published one."""


def work_on(app, pagename, templatename, context, doctree):
    context["github_version"] = app.config.course_edit_branch


def setup(app):
    app.add_config_value("course_edit_branch", "main", "html")
    app.connect("html-page-context", work_on, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
