"""The built book in _build/html: every page is there, complete, and needs nothing from outside.

`course.py book` runs these tests on what it has built.
"""

import io
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import stamp
import yaml
from conftest import checked
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
NOTEBOOKS = [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()]
CHAPTERS = [page for page in NOTEBOOKS if page.startswith("book/")]  # homework is shown as it is handed out: not run
pytestmark = pytest.mark.built


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def text(page):
    return (HTML / f"{page}.html").read_text(encoding="utf-8")


def test_the_table_of_contents_names_every_page_there_is():
    files = [file for kind in ("book/*.md", "book/*.ipynb", "homework/release/*/*.ipynb") for file in ROOT.glob(kind)]
    assert sorted(PAGES) == sorted(str(file.relative_to(ROOT).with_suffix("")) for file in files)


def test_the_front_door_leads_to_the_opening_page():
    assert f"url={TOC['root']}.html" in (HTML / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", checked(PAGES))
def test_the_page_is_there_and_complete(page):
    article = text(page).partition('<article class="bd-article">')[2]
    assert len(Elements(article).all("h1")) == 1
    assert "system-message" not in text(page)
    assert not re.search(r"\{(cite|eq|numref)[\w:]*\}", text(page)), "a role was left raw"


@pytest.mark.parametrize("page", checked(PAGES))
def test_the_page_loads_nothing_from_outside(page):
    elements = Elements(text(page))
    loaded = [
        attributes.get("src") for tag in ("script", "img", "iframe", "source") for attributes in elements.all(tag)
    ]
    loaded += [attributes.get("href") for attributes in elements.all("link")]
    assert [address for address in loaded if address and re.match(r"(https?:)?//", address)] == []
    missing = [
        address
        for address in loaded
        if address and not address.startswith("data:")
        if not (HTML / page).parent.joinpath(urllib.parse.unquote(re.split("[?#]", address)[0])).resolve().is_file()
    ]
    assert missing == []


@pytest.mark.parametrize("page", checked(PAGES))
def test_every_picture_has_an_alt_text(page):
    pictures = [
        attributes for attributes in Elements(text(page)).all("img") if attributes.get("role") != "presentation"
    ]
    assert [picture.get("src", "")[:60] for picture in pictures if len(picture.get("alt") or "") < 10] == []


@pytest.mark.parametrize("page", checked(CHAPTERS))
def test_the_chapter_shows_its_outputs(page):
    cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    assert "tmlcourse " in text(page), "the setup cell's line"
    assert 'class="tml-frames"' in text(page), "every chapter has a slider"
    figures = [cell for cell in cells if "image" in cell.metadata.get("mystnb", {})]
    assert text(page).count("<img ") >= len(figures)
    assert "NBVAL_CHECK_OUTPUT" not in text(page), "the tests' own mark says nothing to a reader"


@pytest.mark.parametrize("page", checked(NOTEBOOKS))
def test_the_colab_and_download_links_are_right(page):
    url, branch = stamp.repository()
    links = {link.get("href", "") for link in Elements(text(page)).all("a")}
    colab = {link for link in links if "colab.research.google.com" in link}
    assert colab == {
        f"https://colab.research.google.com/github/{url.split('github.com/')[1]}/blob/{branch}/{page}.ipynb"
    }
    (download,) = {link for link in links if link.endswith(".ipynb") and "_sources" in link}
    file = (HTML / page).parent.joinpath(download).resolve()
    assert file.read_bytes() == (ROOT / f"{page}.ipynb").read_bytes()


def test_the_status_page_shows_when_where_and_with_which_versions_each_chapter_ran():
    rows = re.findall(r"<tr.*?</tr>", text("book/status"), re.DOTALL)
    plain = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in rows]
    for page in CHAPTERS:
        (row,) = (line for line, source in zip(plain, rows, strict=True) if f'href="{Path(page).name}.html"' in source)
        when, where = r"20\d\d-\d\d-\d\d \d\d:\d\d \d+", r"Python 3\.\d+\.\d+ \| \w+ \w*"
        assert re.search(rf"{when} {where} \| tmlcourse \S+ \| torch \S+ \| .+ \| data", row), row


@pytest.mark.parametrize("page", checked(PAGES))
def test_the_edit_issue_and_repository_links_are_right(page):
    url, _ = stamp.repository()
    source = page + (".ipynb" if page in NOTEBOOKS else ".md")
    links = {link.get("href", "") for link in Elements(text(page)).all("a")}
    assert f"{url}/edit/main/{source}" in links and url in links
    assert any(link.startswith(f"{url}/issues/new?") and page in link for link in links)


def glossary_links(page):
    """(id of the entry, definition) for each word of the page that leads to the glossary."""
    links = [link for link in Elements(text(page)).all("a") if "course-term" in (link.get("class") or "")]
    assert all(link["href"].startswith("glossary.html#term-") for link in links)
    return [(link["href"].partition("#")[2], link.get("title", "")) for link in links]


@pytest.mark.parametrize("page", checked(CHAPTERS))
def test_the_words_of_the_chapter_lead_to_the_glossary_once_each(page):
    found = glossary_links(page)
    entries, definitions = [entry for entry, _ in found], [definition for _, definition in found]
    assert len(entries) >= 4 and len(set(entries)) == len(entries)
    assert all(len(definition) > 20 and "\\" not in definition for definition in definitions)
    assert not re.search(r"<(h[1-6]|code|figcaption)\b(?:(?!</\1).)*course-term", text(page), re.DOTALL)


def test_every_word_of_the_glossary_is_used_by_a_chapter():
    entries = [entry.get("id") for entry in Elements(text("book/glossary")).all("dt")]
    heads = re.findall(r'(?:<dl[^>]*>|</dd>)\s*<dt id="([^"]+)"', text("book/glossary"))
    assert len(heads) > 80 and len(set(entries)) == len(entries)
    assert sorted(set(heads) - {entry for page in CHAPTERS for entry, _ in glossary_links(page)}) == []


@pytest.mark.parametrize("page", checked(PAGES))
def test_figures_are_webp_where_that_is_smaller(page):
    pictures = [picture["src"] for picture in Elements(text(page)).all("img") if "_images/" in picture.get("src", "")]
    files = [(HTML / page).parent.joinpath(source).resolve() for source in pictures]
    heavy = [file.name for file in files if file.suffix == ".png" and webp_size(file) < file.stat().st_size]
    assert heavy == []
    assert all(picture.get("loading") for picture in Elements(text(page)).all("img") if "_images/" in picture["src"])


def webp_size(file):
    packed = io.BytesIO()
    Image.open(file).save(packed, format="webp", lossless=True)
    return packed.tell()


def test_the_book_is_light():
    assert sum(file.stat().st_size for file in HTML.rglob("*") if file.is_file()) < 40e6
