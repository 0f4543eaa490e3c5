"""Interactives drawn once: a live widget in a kernel, the same frames under a plain slider on a static page."""

from __future__ import annotations

import base64
import html
import io
import json
import random

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


def as_webp(picture: Image.Image) -> bytes:
    """A picture's WebP file: lossless (drawings) or at quality 85 (photographs), whichever is smaller."""
    files = []
    for options in ({"lossless": True, "quality": 60, "method": 4}, {"quality": 85, "method": 6}):
        file = io.BytesIO()
        picture.save(file, format="webp", **options)
        files.append(file.getvalue())
    return min(files, key=len)


def _webp(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, facecolor="white")
    return as_webp(Image.open(buffer).convert("RGB"))


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


def thresholds(tables: dict, *, data_name: str = "", score_name: str = "score", start: int | None = None) -> None:
    """One slider a group: from which score on are people selected, and what follows for the group's error rates.

    tables: dict group -> DataFrame with columns score, positive, negative (people with and without the outcome at each
    score), the same scores in each. start: index of the score shown first, the middle one without.
    Raises TypeError or ValueError for what is not so, before anything is shown.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"score": [1, 2, 3], "positive": [2, 5, 9], "negative": [9, 4, 1]})
        >>> thresholds({"a": table, "b": table})  # doctest: +SKIP
    """
    if not isinstance(tables, dict) or not tables:
        raise TypeError(f"tables: got {type(tables).__name__}, want a dict group -> DataFrame")
    for group, table in tables.items():
        if missing := {"score", "positive", "negative"} - set(getattr(table, "columns", ())):
            raise ValueError(f"tables[{group!r}]: no column {', '.join(sorted(missing))}")
    scores = [sorted(table["score"]) for table in tables.values()]
    if any(own != scores[0] for own in scores):
        raise ValueError("tables: got different scores, want the same ones in each group")
    cuts = scores[0][1:]
    end = 1.12 * max(table[["positive", "negative"]].to_numpy().max() for table in tables.values())
    for group, table in tables.items():
        explorer(
            lambda cut, table=table, group=group: plot.threshold(
                table, cut, title=str(group), data_name=data_name, xlabel=score_name, ylim=end
            ),
            cuts,
            title=f"{group}: select from this {score_name} on",
            label=lambda cut: f"{cut:g} and above",
            alt=f"Histogram of the {score_name} of group {group}, people with the outcome above the axis, without it below; "
            "filled are those from {:g} on. The title gives three error rates.".format,
            start=len(cuts) // 2 if start is None else start,
        )


_FLIPPED = (
    "const f=this.closest('figure'),d=f.dataset,r=crypto.getRandomValues(new Uint32Array(2)),"
    "t=r[0]<d.truth*4294967296,y=t?this.value==='yes':r[1]%2===0;d.n=+d.n+1;d.yes=+d.yes+y;"
    "f.querySelector('output').textContent=(t?'First coin: tail. Tell the truth.':'First coin: head. Second coin: '+"
    "(y?'head.':'tail.'))+' You report: '+(y?'YES':'NO')+'. ('+d.yes+' YES of '+d.n+' reports from this page.)'"
)


def questionnaire(question: str, *, truth: float = 0.5) -> None:
    """Ask an awkward question and let two coins answer for the reader: the answer itself is kept nowhere.

    With probability `truth` the first coin shows tail and the true answer is reported, else the second, fair coin's. The
    coins fall in the reader's browser, or in the kernel where there is one. Only the reports are counted.
    Raises TypeError or ValueError for an empty question or a truth outside [0, 1].

    Example:
        >>> questionnaire("Have you ever travelled without a ticket?")  # doctest: +SKIP
    """
    if not isinstance(question, str) or not question.strip():
        raise TypeError(f"question: got {question!r}, want a text that is not empty")
    if not 0 <= truth <= 1:
        raise ValueError(f"truth: got {truth}, want a probability in [0, 1]")
    style = "font-size:1rem;min-width:5rem;min-height:2.5rem;margin:.5rem .5rem .5rem 0;cursor:pointer"
    buttons = "".join(
        f'<button type="button" value="{v}" style="{style}" onclick="{html.escape(_FLIPPED)}">{v}</button>'
        for v in ("yes", "no")
    )
    text = (
        f'<figure class="tml-question" role="group" aria-label="{html.escape(question)}" style="{_CARD}" '
        f'data-truth="{truth}" data-n="0" data-yes="0"><p style="margin:0">{html.escape(question)}</p>{buttons}'
        '<output aria-live="polite" style="display:block;min-height:3rem">Press what is true; two coins fall, and only '
        "what they let you report is counted.</output></figure>"
    )
    bundle = {"text/plain": question, "text/html": text}
    if model_id := _live_questionnaire(question, truth).model_id:
        view = {"version_major": 2, "version_minor": 0, "model_id": model_id}
        bundle["application/vnd.jupyter.widget-view+json"] = view
    display(bundle, raw=True)


def _live_questionnaire(question: str, truth: float) -> ipywidgets.VBox:
    """The same with ipywidgets: its coins are Python's own random source, which no seed repeats."""
    coins, counts = random.SystemRandom(), {True: 0, False: 0}
    answer = ipywidgets.HTML("Press what is true; two coins fall, and only what they let you report is counted.")

    def press(button) -> None:
        tail = coins.random() < truth
        report = button.description == "yes" if tail else coins.random() < 0.5
        counts[report] += 1
        second = "" if tail else f" Second coin: {'head' if report else 'tail'}."
        first = "First coin: tail. Tell the truth." if tail else "First coin: head."
        said = f"You report: {'YES' if report else 'NO'}. ({counts[True]} YES of {sum(counts.values())} reports.)"
        answer.value = f"{first}{second} {said}"

    buttons = [ipywidgets.Button(description=text) for text in ("yes", "no")]
    for button in buttons:
        button.on_click(press)
    return ipywidgets.VBox([ipywidgets.HTML(html.escape(question)), ipywidgets.HBox(buttons), answer])
