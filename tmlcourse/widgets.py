"""Interactives drawn once: a live widget in a kernel, the same frames under a plain slider on a static page."""

from __future__ import annotations

import base64
import html
import io
import json

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from . import plot, progress

_CARD = "background:#fff;color:#222;color-scheme:light;padding:.5rem;margin:0;max-width:100%;box-sizing:border-box"
_MOVED = (
    "const f=this.closest('figure'),l=JSON.parse(f.dataset.labels),v=+this.value;"
    "f.querySelectorAll('img').forEach((e,i)=>{e.hidden=i!==v;e.style.display=i===v?'block':'none'});"
    "f.querySelector('output').textContent=l[v];this.setAttribute('aria-valuetext',l[v])"
)


def _webp(figure: Figure) -> bytes:
    """The figure as WebP: lossless where that is the smaller file (lines), at quality 85 where not (photographs)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    files = []
    for options in ({"lossless": True, "quality": 60, "method": 4}, {"quality": 85, "method": 6}):
        file = io.BytesIO()
        image.save(file, format="webp", **options)
        files.append(file.getvalue())
    return min(files, key=len)


def _img(frame: bytes, alt: str, *, shown: bool = True) -> str:
    width, height = Image.open(io.BytesIO(frame)).size
    return (
        f'<img class="dark-light" src="data:image/webp;base64,{base64.b64encode(frame).decode()}" '
        f'alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}" style="display:{"block" if shown else "none"};max-width:100%;height:auto"'
        f"{'' if shown else ' hidden'}>"
    )


def frames_html(frames: list[bytes], labels: list[str], alts: list[str], title: str, start: int = 0) -> str:
    """HTML of a slider over WebP frames: no library, no kernel, no network, no id that another one could share.

    Without JavaScript (and in print) the start frame shows. labels: one a frame, spoken and written beside the
    slider; alts: the description of each frame. Raises ValueError for unequal numbers or a start out of range.

    Example:
        >>> with plot.style():
        ...     figure = plt.figure()
        >>> page = frames_html([_webp(figure)] * 2, ["0", "0.1"], ["an empty page"] * 2, "eps")
        >>> plt.close(figure)
    """
    if not frames or not len(frames) == len(labels) == len(alts):
        raise ValueError(f"frames: got {len(frames)}, with {len(labels)} labels and {len(alts)} alts, want one of each")
    if not 0 <= start < len(frames):
        raise ValueError(f"start: got {start}, want the index of one of {len(frames)} frames")
    label = html.escape(labels[start])
    pictures = "".join(_img(frame, alts[i], shown=i == start) for i, frame in enumerate(frames))
    return (
        f'<figure class="tml-frames" style="{_CARD}" data-labels="{html.escape(json.dumps(labels))}">'
        f'<figcaption style="color:#222;margin:0 0 .5rem;font-size:1rem;line-height:1.5;text-align:left">'
        f'<label style="display:block">{html.escape(title)}'
        f'<input type="range" min="0" max="{len(frames) - 1}" step="1" value="{start}" aria-valuetext="{label}" '
        f'autocomplete="off" oninput="{html.escape(_MOVED)}" '
        f'style="display:block;width:100%;max-width:40rem;height:2rem;margin:0;accent-color:#0072B2;cursor:pointer"></label>'
        f'<output aria-live="off" style="font-weight:bold">{label}</output></figcaption>{pictures}</figure>'
    )


def explorer(draw, values, *, title: str, label=str, alt, start: int = 0) -> None:
    """Show draw(value) for each of the values under a slider: live in a kernel, frames on the static page.

    draw: value -> matplotlib Figure, called once a value, in the course's look. title: what the slider sets.
    label: value -> the text beside the slider, different for each value. alt: value -> the sentence that describes
    the frame to somebody who does not see it. start: index of the value shown first.
    Raises TypeError or ValueError for what is not so, before anything is shown.

    Example:
        >>> def draw(eps):
        ...     return plot.norm_balls(eps)
        >>> explorer(draw, [0.1, 0.2], title="eps", alt="The unit balls with radius {}.".format)  # doctest: +SKIP
    """
    for name, function in (("draw", draw), ("label", label), ("alt", alt)):
        if not callable(function):
            raise TypeError(f"{name}: got {type(function).__name__}, want a function of the value")
    values = list(values)
    if not 0 <= start < len(values):
        raise ValueError(f"start: got {start}, want the index of one of {len(values)} values")
    labels, alts = [label(value) for value in values], [alt(value) for value in values]
    for name, texts in (("label", labels), ("alt", alts)):
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{name}: got {texts}, want a text that is not empty for each value")
    if len(set(labels)) < len(labels):
        raise ValueError(f"label: got {labels}, want a different text for each value")

    frames = _frames(draw, values, title)
    bundle = {"text/plain": alts[start], "text/html": frames_html(frames, labels, alts, title, start)}
    if model_id := _live(frames, labels, alts, title, start).model_id:
        view = {"version_major": 2, "version_minor": 0, "model_id": model_id}
        bundle["application/vnd.jupyter.widget-view+json"] = view
    display(bundle, raw=True)


def _frames(draw, values: list, title: str) -> list[bytes]:
    """Draw and encode each frame; whatever draw leaves open in pyplot is closed, also after an error."""
    frames, open_before = [], set(plt.get_fignums())
    try:
        for value in progress.bar(values, desc=title):
            with plot.style():
                figure = draw(value)
                if not isinstance(figure, Figure):
                    raise TypeError(f"draw: got {type(figure).__name__} for {value!r}, want a matplotlib Figure")
                frames.append(_webp(figure))
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)
    finally:
        for number in set(plt.get_fignums()) - open_before:
            plt.close(number)
    return frames


def _live(frames: list[bytes], labels: list[str], alts: list[str], title: str, start: int) -> ipywidgets.VBox:
    """The same frames under an ipywidgets slider (7 and 8); in HTML, where pictures carry their alt text."""
    slider = ipywidgets.SelectionSlider(
        options=list(zip(labels, range(len(frames)), strict=True)), value=start, description=title,
        style={"description_width": "initial"}, layout=ipywidgets.Layout(width="100%", max_width="40rem"),
    )  # fmt: skip
    picture = ipywidgets.HTML()

    def show(index: int) -> None:
        picture.value = f'<div style="{_CARD}">{_img(frames[index], alts[index])}</div>'

    show(start)
    slider.observe(lambda change: show(change["new"]), names="value")
    return ipywidgets.VBox([slider, picture])
