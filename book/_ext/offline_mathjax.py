"""Serve MathJax from the build: the parts of the wheel `sphinx-mathjax-offline` that the pages use, and no others.

TeX in, HTML out, and MathML for screen readers beside it, without the menu; packed into one file, so that a page is
light on servers that do not compress. The slides load the whole of it.
"""

import base64
import gzip
import importlib.util
import json
from pathlib import Path

from sphinx.util.fileutil import copy_asset

PARTS = (
    "core",
    "input/tex",
    "output/chtml",
    "output/chtml/fonts/tex",
    "a11y/assistive-mml",
)
FONTS = "output/chtml/fonts/woff-v2"
UNPACK = """{
  const unpack = async () => {
    const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    for (const part of await new Response(stream).json()) (0, eval)(part);
    MathJax.startup.promise.then(reach);
    addEventListener("resize", reach);
  };
  // A formula that is wider than the page scrolls: the keyboard must reach it, and no other.
  const reach = () => {
    for (const one of document.querySelectorAll("mjx-container[display]")) {
      if (one.scrollWidth > one.clientWidth) one.setAttribute("tabindex", "0");
      else one.removeAttribute("tabindex");
    }
  };
  const unpacked = unpack();
  MathJax.config.loader.core = { checkReady: () => unpacked };
}
"""


def load_parts(app, config):
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {
        "loader": {"load": ["core"], "source": {"core": "[mathjax]/parts.js"}}
    }


def copy_mathjax(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    # The wheel's folder has dashes in its name: it can be found, and not imported.
    wheel = (
        Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        / "static"
        / "mathjax"
    )
    static = Path(app.outdir) / "_static" / "mathjax"
    copy_asset(wheel / "startup.js", static)
    copy_asset(wheel / "tex-chtml.js", static)
    copy_asset(wheel / FONTS, static / FONTS)
    parts = json.dumps(
        [(wheel / f"{part}.js").read_text(encoding="utf-8") for part in PARTS]
    )
    packed = base64.b64encode(gzip.compress(parts.encode(), mtime=0)).decode()
    (static / "parts.js").write_text(UNPACK % packed, encoding="utf-8")


def setup(app):
    app.connect("config-inited", load_parts)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
