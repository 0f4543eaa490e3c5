"""The built book in headless Chromium, narrow and wide, light and dark. `course.py book` runs this."""

import functools
import html
import http.server
import re
import threading
from pathlib import Path

import pdf
import pypdf
import pytest
import slides
import yaml
from axe_playwright_python.sync_playwright import Axe
from conftest import skip_or_fail

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
WIDTHS = (360, 768, 1280)
# Two extensions of Jupyter Book write the same inline script.
HARMLESS = re.compile("Identifier 'THEBE_JS_URL' has already been declared")
pytestmark = pytest.mark.built


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of the built book, served on this machine only."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with pdf.chromium() as browser:
        if browser is None:
            skip_or_fail("needs Chromium or Chrome on the path")
        yield browser


@pytest.fixture
def visit(browser, site):
    """A function: open a page of the book; whatever it asks from elsewhere, or complains about, is kept and refused."""
    contexts = []

    def open_page(page, scheme="light", width=1280):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        tab = context.new_page()
        tab.outside, tab.errors = [], []

        def only_this_machine(route):
            if route.request.url.startswith((site, "data:", "blob:")):
                route.continue_()
            else:
                tab.outside.append(route.request.url)
                route.abort()

        context.route("**/*", only_this_machine)
        tab.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.goto(f"{site}/{page}.html", wait_until="load")
        tab.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        return tab

    yield open_page
    for context in contexts:
        context.close()


def complaints(tab):
    return [error for error in tab.errors if not HARMLESS.search(error)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_the_page_in_a_browser(visit, page, scheme):
    tab = visit(page, scheme, WIDTHS[0])
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"scrolls sideways at {width}"
    formulas = tab.locator(".math")
    assert formulas.evaluate_all("all => all.filter(one => !one.querySelector('mjx-container')).length") == 0
    assert tab.locator("mjx-merror").count() == 0
    assert not re.search(r"\\\(|\\\[", tab.inner_text("article")), "a formula was left raw"
    hidden_or_whole = "all => all.every(one => one.naturalWidth || !one.checkVisibility())"
    assert tab.locator("img").evaluate_all(hidden_or_whole), "a picture did not load"
    assert complaints(tab) == []
    assert tab.outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_no_serious_barrier(visit, page, scheme):
    found = Axe().run(visit(page, scheme)).response["violations"]
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    assert [(rule["id"], [node["html"][:150] for node in rule["nodes"]]) for rule in serious] == []


def with_sliders():
    files = ((page, HTML / f"{page}.html") for page in PAGES)
    return [page for page, file in files if file.is_file() and "tml-frames" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("page", with_sliders())
def test_the_slider_answers_the_keyboard(visit, page, width):
    tab = visit(page, width=width)
    for figure in tab.locator("figure.tml-frames").all():
        slider = figure.get_by_role("slider")
        assert slider.evaluate("one => one.labels.length && one.labels[0].innerText.trim().length") > 0, "no label"

        def shown(figure=figure):
            return figure.locator("img").evaluate_all("all => all.findIndex(one => one.checkVisibility())")

        def visible(figure=figure):
            return figure.locator("img").evaluate_all("all => all.filter(one => one.checkVisibility()).length")

        last = figure.locator("img").count() - 1
        assert last > 0
        slider.focus()
        tab.keyboard.press("Home")
        assert (shown(), visible()) == (0, 1)
        text = slider.get_attribute("aria-valuetext")
        tab.keyboard.press("ArrowRight")
        assert (shown(), visible()) == (1, 1)
        assert slider.get_attribute("aria-valuetext") != text
        tab.keyboard.press("End")
        assert (shown(), visible()) == (last, 1)


def test_without_javascript_a_slider_shows_one_frame(browser, site):
    for page in with_sliders():
        context = browser.new_context(java_script_enabled=False)
        tab = context.new_page()
        tab.goto(f"{site}/{page}.html")
        for figure in tab.locator("figure.tml-frames").all():
            assert sum(picture.is_visible() for picture in figure.locator("img").all()) == 1
        context.close()


def test_the_tests_see_what_they_look_for(visit, site):
    """A page with every fault: complaints, a request to elsewhere, a barrier."""
    tab = visit(PAGES[0])
    tab.evaluate("""() => {
        console.error('a fault');
        fetch('https://example.org/').catch(() => null);
        document.querySelector('article').innerHTML += '<img src="data:,"><div style="width:3000px">wide</div>';
    }""")
    tab.wait_for_timeout(300)
    assert "a fault" in complaints(tab)
    assert tab.outside == ["https://example.org/"]
    assert "image-alt" in {rule["id"] for rule in Axe().run(tab).response["violations"]}


def test_the_book_prints_whole(browser, tmp_path):
    """Every line of code of a chapter is on paper, parts and chapters are bookmarks, links jump inside."""
    pages = [("", "book/index"), ("Evasion", "book/03-gradient-attacks")]
    sheets = pdf.make(browser, pages, tmp_path / "book.pdf")
    printed = pypdf.PdfReader(tmp_path / "book.pdf")
    assert len(printed.pages) == sheets > 10
    top, part, chapters = printed.outline
    assert (top.title, part.title, [c.title for c in chapters]) == (
        "Trustworthy Machine Learning", "Evasion", ["Gradient attacks"])  # fmt: skip
    source = (HTML / "book/03-gradient-attacks.html").read_text(encoding="utf-8")
    blocks = [html.unescape(re.sub("<[^>]+>", "", block)) for block in re.findall("<pre>(.*?)</pre>", source, re.S)]
    squeezed = re.sub(r"\s", "", "".join(sheet.extract_text() for sheet in printed.pages))
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) > 100 and [line for line in lines if re.sub(r"\s", "", line) not in squeezed] == []
    notes = [note.get_object() for sheet in printed.pages[:2] for note in sheet.get("/Annots") or ()]
    jumps = [note["/Dest"][0] for note in notes if "/Dest" in note and isinstance(note["/Dest"], list)]
    chapter = printed.get_destination_page_number(chapters[0])
    assert any(jump.get_object() == printed.pages[chapter] for jump in jumps)


def test_slides_run_and_fit(browser, tmp_path):
    """The slides of a chapter, from the outputs of this build: formulas typeset, nothing taller than the screen."""
    slides.main(["3"])
    tab = browser.new_page(viewport={"width": 1120, "height": 700})
    errors, outside = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
    tab.goto((slides.OUT / "03-gradient-attacks.html").as_uri(), wait_until="load")
    tab.wait_for_function("MathJax.startup.promise.then(() => Reveal.isReady())")
    total = tab.evaluate("Reveal.getTotalSlides()")
    heights = []
    for _ in range(total):
        slide = (
            "const slide = Reveal.getCurrentSlide(); return slide.scrollHeight * (parseFloat(slide.style.zoom) || 1)"
        )
        heights.append(tab.evaluate(f"() => {{{slide}}}"))
        tab.evaluate("Reveal.next()")
    assert total > 30 and max(heights) <= 700
    assert tab.locator("mjx-container").count() > 20 and tab.locator("mjx-merror").count() == 0
    assert (errors, outside) == ([], [])
    tab.close()
