#!/usr/bin/env python3
"""Print the built book into one PDF, page by page through headless Chromium, with bookmarks and links that stay inside.

usage: pdf.py [--out FILE]        after `python3 course.py book`
"""

import argparse
import contextlib
import io
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pypdf
import yaml
from playwright.sync_api import sync_playwright
from pypdf.generic import ArrayObject, NameObject, NullObject

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
PAPER = {"format": "A4", "scale": 0.8, "print_background": True, "tagged": True,
         "margin": {"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}}  # fmt: skip
FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555">'
    '<span class="title"></span> &middot; <span class="pageNumber"></span></div>'
)


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
    }""")
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


def make(browser, pages, out):
    """Print (part, page) pairs into the file `out`; returns the number of sheets."""
    writer, first, parts, tab = pypdf.PdfWriter(), {}, {}, browser.new_page()
    for part, page in pages:
        sheets, start = pypdf.PdfReader(io.BytesIO(printed(tab, page))), len(writer.pages)
        writer.append(sheets, import_outline=False)
        first[str(HTML / f"{page}.html")] = start
        if part and part not in parts:
            parts[part] = writer.add_outline_item(title=part, page_number=start)
        title = tab.title().split(" — ")[0]
        writer.add_outline_item(title=title, page_number=start, parent=parts.get(part))
        print(f"{page}: {len(sheets.pages)} sheets", flush=True)
    tab.close()
    link_inside(writer, first)
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
