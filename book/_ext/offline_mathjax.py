"""Serve MathJax from the build: the part of the wheel `sphinx-mathjax-offline` that the pages use."""

import importlib.util
from pathlib import Path

from sphinx.util.fileutil import copy_asset


def copy_mathjax(app, exception):
    if exception is None and app.builder.format == "html":
        # The wheel's folder has dashes in its name: it can be found, and not imported.
        wheel = (
            Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
            / "static"
            / "mathjax"
        )
        static, fonts = (
            Path(app.outdir) / "_static" / "mathjax",
            "output/chtml/fonts/woff-v2",
        )
        copy_asset(wheel / "tex-chtml.js", static)
        copy_asset(wheel / fonts, static / fonts)


def setup(app):
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
