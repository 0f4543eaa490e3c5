"""The built book in headless Chromium, narrow and wide, light and dark. `course.py book` runs this."""

import functools
import html
import http.server
import re
import statistics
import threading
from pathlib import Path
from urllib.parse import quote, urljoin

import pdf
import pypdf
import pytest
import slides
import yaml
from axe_playwright_python.sync_playwright import Axe
from conftest import checked, skip_or_fail, whole_book

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
CHAPTERS = [page for page in PAGES if re.match(r"book/(\d\d|appendix)-", page)]
PAGES, CHAPTERS = checked(PAGES), checked(CHAPTERS)
WIDTHS = (360, 768, 1280)
# Two extensions of Jupyter Book write the same inline script.
HARMLESS = re.compile("Identifier 'THEBE_JS_URL' has already been declared")
# Pictures come when they are reached; the frames of a slider, when the slider is.
LOAD_ALL = """async () => {
    const shown = [...document.images].filter(image => image.checkVisibility());
    shown.forEach(image => { image.loading = "eager"; });
    await Promise.all(shown.map(image => image.decode().catch(() => 0)));
}"""
# Pictures that are wider or narrower than they were drawn: their alt texts.
DISTORTED = """() => [...document.images].filter(image => image.width && image.naturalWidth
    && Math.abs(image.width / image.height * image.naturalHeight / image.naturalWidth - 1) > 0.03
).map(image => image.alt)"""
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
    tab.evaluate(LOAD_ALL)
    hidden_or_whole = "all => all.every(one => one.naturalWidth || !one.checkVisibility())"
    assert tab.locator("img").evaluate_all(hidden_or_whole), "a picture did not load"
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"scrolls sideways at {width}"
        assert tab.evaluate(DISTORTED) == [], f"squeezed at {width}"
    formulas = tab.locator(".math")
    assert formulas.evaluate_all("all => all.filter(one => !one.querySelector('mjx-container')).length") == 0
    assert tab.locator("mjx-merror").count() == 0
    assert not re.search(r"\\\(|\\\[", tab.inner_text("article")), "a formula was left raw"
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
        tab.wait_for_function(
            "figure => [...figure.querySelectorAll('img')].at(-1).naturalWidth", arg=figure.element_handle()
        )


@whole_book
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
    tab = visit(TOC["root"])
    tab.evaluate("""() => {
        console.error('a fault');
        fetch('https://example.org/').catch(() => null);
        document.querySelector('article').innerHTML += '<img src="data:,"><div style="width:3000px">wide</div>';
    }""")
    tab.wait_for_timeout(300)
    assert "a fault" in complaints(tab)
    assert tab.outside == ["https://example.org/"]
    assert "image-alt" in {rule["id"] for rule in Axe().run(tab).response["violations"]}


@whole_book
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
    texts = [sheet.extract_text().split() for sheet in printed.pages]
    contents = next(text for text in texts if text[0] == "Contents")
    assert f"Evasion Gradient attacks {chapter + 1}" in " ".join(contents)
    assert [text[-1] for text in texts] == [str(number) for number in range(1, sheets + 1)]


@whole_book
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
    heights, figures = [], []
    shown = """() => [...Reveal.getCurrentSlide().querySelectorAll(".jp-OutputArea-output img")]
        .map(image => image.getBoundingClientRect().height).filter(Boolean)"""
    for _ in range(total):
        slide = (
            "const slide = Reveal.getCurrentSlide(); return slide.scrollHeight * (parseFloat(slide.style.zoom) || 1)"
        )
        heights.append(tab.evaluate(f"() => {{{slide}}}"))
        figures += tab.evaluate(shown)
        tab.evaluate("Reveal.next()")
    assert total > 20 and max(heights) <= 700
    assert statistics.median(figures) >= 360, "figures too small for a lecture hall"
    assert tab.locator("mjx-container").count() > 20 and tab.locator("mjx-merror").count() == 0
    assert (errors, outside) == ([], [])
    tab.close()


TAUGHT = {  # what somebody looks for, the page, and the head of the section that teaches it
    "PGD": ("03-gradient-attacks", "PGD: climb"),
    "FGSM": ("03-gradient-attacks", "FGSM: one step"),
    "DeepFool": ("04-more-attacks", "DeepFool"),
    "Carlini and Wagner": ("04-more-attacks", "Penalties"),
    "Square attack": ("05-black-box", "Search instead of gradients"),
    "TRADES": ("06-adversarial-training", "Smarter objectives"),
    "BPDA": ("07-broken-defenses", "BPDA"),
    "CROWN": ("09-convex-relaxations", "Faster than a solver"),
    "randomised smoothing": ("09-convex-relaxations", "Smoothing"),
    "Neural Cleanse": ("12-backdoors-and-clean-labels", "Neural Cleanse"),
    "LIME": ("13-explaining-decisions", "Only asking"),
    "Grad-CAM": ("13-explaining-decisions", "Class activation maps"),
    "DeepDream": ("14-explaining-models", "DeepDream"),
    "DP-SGD": ("15-differential-privacy", "Learning in secret"),
    "membership inference": ("16-privacy-attacks", "Was I in the data?"),
    "equalized odds": ("17-fairness", "Three families"),
}


@whole_book
def test_the_search_leads_first_to_where_a_method_is_taught(browser, site):
    tab, wrong = browser.new_page(), {}
    for name, (page, heading) in TAUGHT.items():
        tab.goto(f"{site}/search.html?q={quote(name)}")
        first = tab.locator("#search-results li a").first
        first.wait_for()
        address = urljoin(f"{site}/search.html", first.get_attribute("href"))
        tab.goto(address)
        section = tab.evaluate("decodeURIComponent(location.hash.slice(1))")
        here = (
            tab.evaluate("id => document.getElementById(id)?.querySelector('h1, h2, h3, h4')?.innerText", section) or ""
        )
        if not (f"/{page}.html" in address and here.startswith(heading)):
            wrong[name] = (address.removeprefix(site), here)
    tab.close()
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_light(browser, site, page):
    """All that a page loads when somebody reads it to its end, from a server that compresses nothing."""
    tab, sizes = browser.new_page(viewport={"width": 1280, "height": 900}), {}
    tab.on("response", lambda answer: sizes.update({answer.url: int(answer.headers.get("content-length", 0))}))
    tab.goto(f"{site}/{page}.html", wait_until="load")
    tab.evaluate(LOAD_ALL)
    tab.wait_for_load_state("networkidle")
    heaviest = sorted(((size, url.removeprefix(site)) for url, size in sizes.items()), reverse=True)[:5]
    tab.close()
    assert sum(sizes.values()) <= 2e6, heaviest


@pytest.mark.parametrize("page", CHAPTERS)
def test_the_chapter_appears_within_a_second(browser, site, page):
    def first_paint():
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        tab = context.new_page()
        tab.goto(f"{site}/{page}.html", wait_until="load")
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        found = tab.wait_for_function(paint).json_value()
        context.close()
        return found

    # The one time of a clock that a test of this book asserts: another busy program may spoil two tries, not all three.
    assert any(first_paint() < 1000 for _ in range(3))


@whole_book
def test_a_chapter_by_keyboard_alone(visit):
    """The first stop skips to the text, each stop shows where one is, and the theme switches."""
    tab = visit("book/03-gradient-attacks")
    tab.keyboard.press("Tab")
    skip = tab.evaluate("[document.activeElement.getAttribute('href'), document.activeElement.innerText]")
    assert skip == ["#main-content", "Skip to main content"] and tab.locator(":focus").is_visible()
    tab.keyboard.press("Enter")
    stops, told = [], set()
    for _ in range(25):
        tab.keyboard.press("Tab")
        stops.append(
            tab.evaluate("""() => {
            const here = document.activeElement, look = getComputedStyle(here);
            return [here.outerHTML.slice(0, 80), look.outlineStyle !== "none" || look.boxShadow !== "none",
                    !!here.closest("main, .bd-main"), here.title];
        }""")
        )
        told.add(stops[-1][3])
    assert [stop for stop in stops if not stop[1]] == []
    assert all(stop[2] for stop in stops) and any("attack" in title for title in told)
    switch, theme = tab.locator(".theme-switch-button:visible"), "document.documentElement.dataset.mode"
    before = tab.evaluate(theme)
    switch.first.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate(theme) != before
