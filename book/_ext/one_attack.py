"""The directive `one-attack`: a picture, a pattern, their sum, and what the network of chapter 1 says, computed here.

Of the shapes that the network names rightly, the one is shown of whose wrong name it is surest in the end.
"""

import base64
import io
from html import escape

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

STEPS = 6  # of 255, that each channel of a pixel may move
PART = '<div><img class="dark-light" width="128" height="128" src="data:image/png;base64,{}" alt="{}"><span>{}</span></div>'


def png(image):
    from torchvision.transforms.functional import to_pil_image

    file = io.BytesIO()
    to_pil_image(image).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


class OneAttack(SphinxDirective):
    def run(self):
        import torch
        from tmlcourse import attacks, data, pretrained
        from tmlcourse.threat import Linf

        shapes, eps = data.shapes(48), STEPS / 255
        model = pretrained.load("shapes-standard")
        x_adv = attacks.pgd(
            model, shapes.x, shapes.y, Linf(eps), steps=20, loss="margin", seed=0
        )
        with torch.no_grad():
            (sure, named), (sure_adv, named_adv) = (
                model(x).softmax(1).max(1) for x in (shapes.x, x_adv)
            )
        turned = (named == shapes.y) & (named_adv != shapes.y)
        i = int((turned * sure_adv).argmax())
        before, after = (f"“{shapes.classes[k]}”" for k in (named[i], named_adv[i]))
        pattern = 0.5 + (x_adv[i] - shapes.x[i]) / (2 * eps)
        parts = (
            (
                shapes.x[i],
                f"A small colour picture that the network names {before}.",
                before,
                sure[i],
            ),
            (
                pattern,
                "A pattern of coloured dots in which nobody sees anything.",
                f"{STEPS}/255 of this",
                None,
            ),
            (
                x_adv[i],
                f"The sum, which looks like the first picture. The network names it {after}.",
                after,
                sure_adv[i],
            ),
        )
        shown = [
            PART.format(
                png(image.clamp(0, 1)),
                escape(alt),
                f"<b>{text}</b>"
                + (f"<br>{100 * p:.1f} % sure" if p is not None else ""),
            )
            for image, alt, text, p in parts
        ]
        html = f'<div class="course-sum">{shown[0]}<i>+</i>{shown[1]}<i>=</i>{shown[2]}</div>'
        return [nodes.raw("", html, format="html")]


def setup(app):
    app.add_directive("one-attack", OneAttack)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
