"""Light pages: figures as WebP where that is smaller, pictures that load when they are reached, and nothing dead.

The frames of a slider lie in the page as text that is a third longer than they are: they become files, which wait until
somebody reaches for the slider. Only the frame that shows is part of the page. Dead are the state of live widgets, which
need a kernel, marks around code in the colour of all code, and the line by which the tests know a claim.
"""

import base64
import hashlib
import re
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.transforms.post_transforms import SphinxPostTransform
from tmlcourse.widgets import as_webp

FRAME = re.compile(r'src="data:image/webp;base64,([^"]+)"')
CLAIM = '<span class="c1"># NBVAL_CHECK_OUTPUT</span>\n'
PLAIN_CODE = re.compile(r'<span class="[npw]">([^<]*)</span>')
SIZE = re.compile(r'style="width: (\d+)px; height: (\d+)px;"')
WAIT = ' loading="lazy" decoding="async"'
REACHED = "this.querySelectorAll('img').forEach(e=>e.loading='eager')"


class LightPictures(SphinxPostTransform):
    default_priority = 210  # as Sphinx's own converters of pictures

    def run(self, **kwargs):
        if self.app.builder.format != "html":
            return
        for image in self.document.findall(nodes.image):
            if image["uri"].endswith(".png") and image["uri"] in self.env.images:
                self.shrink(image)
        for html in self.document.findall(nodes.raw):
            if "tml-frames" in html.astext():
                html.replace_self(
                    nodes.raw("", self.frames_as_files(html.astext()), format="html")
                )

    def shrink(self, image):
        picture = Path(self.app.srcdir, image["uri"])
        with Image.open(picture) as opened:
            image["width"], image["height"] = map(str, opened.size)
        lighter = Path(
            self.app.doctreedir, "webp", picture.stem + ".webp"
        )  # kept: drawn once, encoded once
        if not lighter.is_file():
            lighter.parent.mkdir(exist_ok=True)
            with Image.open(picture) as opened:
                lighter.write_bytes(as_webp(opened))
        if lighter.stat().st_size < picture.stat().st_size:
            image["uri"] = str(lighter)
            image["candidates"] = {"*": str(lighter)}
            self.env.images.add_file(self.env.docname, str(lighter))

    def frames_as_files(self, html):
        folder = Path(self.app.outdir, self.app.builder.imagedir)
        folder.mkdir(parents=True, exist_ok=True)
        up = "../" * self.env.docname.count("/") + self.app.builder.imagedir

        def file(found):
            frame = base64.b64decode(found[1])
            name = hashlib.sha256(frame).hexdigest() + ".webp"
            (folder / name).write_bytes(frame)
            return f'src="{up}/{name}"{WAIT}'

        reached = f'<figure onpointerenter="{REACHED}" onfocusin="{REACHED}" class="tml-frames"'
        return FRAME.sub(file, html).replace('<figure class="tml-frames"', reached)


def lighten(app, pagename, templatename, context, doctree):
    live = "application/vnd.jupyter.widget-state+json"
    context["script_files"] = [
        file
        for file in context["script_files"]
        if live not in str(getattr(file, "attributes", ""))
    ]
    if "body" in context:
        body = PLAIN_CODE.sub(r"\1", context["body"].replace(CLAIM, ""))
        # A picture whose size is known can come late: nothing jumps. As attributes, since a style would forbid the style
        # sheet to keep the proportions where the page is narrower than the picture.
        body = SIZE.sub(r'width="\1" height="\2"', body)
        context["body"] = re.sub(
            r'<img (?=[^>]*src="[^"]*_images/)(?![^>]*loading=)', f"<img{WAIT} ", body
        )


def sweep(app, exception):
    """Throw away pictures of earlier builds that no page shows any more."""
    if exception is not None or app.builder.name != "html":
        return
    pages = (
        page.read_text(encoding="utf-8") for page in Path(app.outdir).rglob("*.html")
    )
    shown = set().union(*(re.findall(r"_images/([\w.-]+)", page) for page in pages))
    for picture in Path(app.outdir, app.builder.imagedir).glob("*"):
        if picture.name not in shown:
            picture.unlink()


def setup(app):
    app.add_post_transform(LightPictures)
    app.connect("html-page-context", lighten)
    app.connect("build-finished", sweep)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
