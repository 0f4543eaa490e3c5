#!/usr/bin/env python3
"""Print the built book into one PDF through headless Chromium: contents, page numbers, bookmarks, links that stay inside.

usage: pdf.py [--out FILE]        after `python3 course.py book`
"""

import argparse
import contextlib
import html
import io
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pypdf
import yaml
from playwright.sync_api import sync_playwright
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, NullObject, StreamObject

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
PAPER = {"format": "A4", "scale": 0.8, "print_background": True, "tagged": True,
         "margin": {"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}}  # fmt: skip
FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555"><span class="title"></span></div>'
)
CONTENTS = """<!doctype html><html lang="en"><title>Contents</title><style>
  body {font: 15px/1.45 sans-serif} h1 {font-weight: normal} a {color: inherit; text-decoration: none}
  p {margin: 0.9em 0 0.1em; font-weight: bold} div {display: flex; gap: 1em} a {flex: 1}
</style><h1>Contents</h1>"""


def order():
    """(part, page) for every page of the book, in the order of its table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    yield "", toc["root"]
    for part in toc["parts"]:
        yield from ((part["caption"], chapter["file"]) for chapter in part["chapters"])


def printed(tab, page):
    """One page of the book as a PDF, all of it: folded answers are opened, pictures and formulas waited for."""
    tab.goto((HTML / f"{page}.html").as_uri(), wait_until="load")
    tab.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    tab.evaluate("""async () => {
        document.querySelectorAll("details").forEach(element => { element.open = true; });
        document.querySelectorAll("img").forEach(image => { image.loading = "eager"; });
        await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
        document.title = document.title.split(" — ")[0];
    }""")
    return on_paper(tab)


def on_paper(tab):
    return tab.pdf(**PAPER, display_header_footer=True, header_template="<span></span>", footer_template=FOOTER)


def link_inside(writer, first):
    """Turn links to other pages of the book into jumps to the first sheet of that page; `first` maps files to sheets."""
    for sheet in writer.pages:
        for note in sheet.get("/Annots") or ():
            action = note.get_object().get("/A")
            address = urlsplit(str(action["/URI"])) if action is not None and "/URI" in action else None
            if address is None or address.scheme != "file" or unquote(address.path) not in first:
                continue
            target = writer.pages[first[unquote(address.path)]].indirect_reference
            del note.get_object()["/A"]
            fit = [target, NameObject("/XYZ"), NullObject(), NullObject(), NullObject()]
            note.get_object()[NameObject("/Dest")] = ArrayObject(fit)


@contextlib.contextmanager
def chromium():
    """A headless Chromium or Chrome; None where there is none on the path."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        yield None
        return
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def contents(tab, entries):
    """The table of contents: (part, title, page, its number) as sheets."""
    lines, last = [], ""
    for part, title, page, number in entries:
        if part != last:
            lines.append(f"<p>{html.escape(part)}</p>")
        address = (HTML / f"{page}.html").as_uri()
        lines.append(f'<div><a href="{address}">{html.escape(title)}</a><span>{number}</span></div>')
        last = part
    tab.goto("about:blank")
    tab.set_content(CONTENTS + "".join(lines))
    return pypdf.PdfReader(io.BytesIO(on_paper(tab)))


def numbered(writer):
    """Write its number at the foot of each sheet; Chromium counts each chapter from 1."""
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
                             NameObject("/BaseFont"): NameObject("/Helvetica")})  # fmt: skip
    font = writer._add_object(font)

    def stream(text):
        made = StreamObject()
        made.set_data(text.encode())
        return writer._add_object(made)

    for number, sheet in enumerate(writer.pages, 1):
        x = float(sheet.mediabox.width) - 46 - 4.5 * len(str(number))
        text = f"Q /Artifact BMC BT 0.33 g /Number 8 Tf {x:.1f} 22 Td ({number}) Tj ET EMC"
        sheet["/Resources"].setdefault(NameObject("/Font"), DictionaryObject()).get_object()[NameObject("/Number")] = (
            font
        )
        old = sheet["/Contents"].get_object()
        old = list(old) if isinstance(old, ArrayObject) else [sheet.raw_get("/Contents")]
        sheet[NameObject("/Contents")] = ArrayObject([stream("q"), *old, stream(text)])


def make(browser, pages, out):
    """Print (part, page) pairs into the file `out`, contents after the first; returns the number of sheets."""
    writer, first, parts, tab, made = pypdf.PdfWriter(), {}, {}, browser.new_page(), []
    for part, page in pages:
        sheets = pypdf.PdfReader(io.BytesIO(printed(tab, page)))
        made.append((part, tab.title(), page, sheets))
        print(f"{page}: {len(sheets.pages)} sheets", flush=True)
    draft = [(part, title, page, 999) for part, title, page, _ in made]
    room, starts = len(contents(tab, draft).pages), [1]
    for *_, sheets in made:
        starts.append(starts[-1] + len(sheets.pages) + (room if len(starts) == 1 else 0))
    listed = contents(tab, [(*entry[:3], number) for entry, number in zip(made, starts, strict=False)])
    tab.close()
    for (part, title, page, sheets), start in zip(made, starts, strict=False):
        writer.append(sheets, import_outline=False)
        if start == 1:
            writer.append(listed, import_outline=False)
        first[str(HTML / f"{page}.html")] = start - 1
        if part and part not in parts:
            parts[part] = writer.add_outline_item(title=part, page_number=start - 1)
        writer.add_outline_item(title=title, page_number=start - 1, parent=parts.get(part))
    link_inside(writer, first)
    numbered(writer)
    writer.add_metadata({"/Title": "Trustworthy Machine Learning"})
    with out.open("wb") as file:
        writer.write(file)
    return len(writer.pages)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "trustworthy-machine-learning.pdf")
    options, pages = parser.parse_args(arguments), list(order())
    missing = [page for _, page in pages if not (HTML / f"{page}.html").exists()]
    if missing:
        sys.exit(f"pdf: {', '.join(missing)} not built; run `python3 course.py book` first")
    with chromium() as browser:
        if browser is None:
            sys.exit("pdf: needs Chromium or Chrome on the path")
        print(f"{make(browser, pages, options.out)} sheets: {options.out}")


if __name__ == "__main__":
    main()
