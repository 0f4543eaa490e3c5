"""Every row of the four lectures has a place in the book (`book/coverage.csv`), and that place is there."""

import csv
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
LECTURES = {"Z": 65, "Q": 137, "W": 47, "B": 31}  # rows in each lecture
with (BOOK / "coverage.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))


def sections(page):
    """The headings of a page; None where there is no such page."""
    path = next((BOOK / f"{page}{suffix}" for suffix in (".ipynb", ".md") if (BOOK / f"{page}{suffix}").exists()), None)
    if path is None:
        return [] if list(BOOK.parent.glob(f"homework/source/{page}/{page}.ipynb")) else None
    if path.suffix == ".md":
        text = [path.read_text(encoding="utf-8")]
    else:
        text = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    return [line.lstrip("#").strip() for block in text for line in block.splitlines() if line.startswith("#")]


def test_no_row_is_missing_and_none_is_there_twice():
    assert [row["row"] for row in ROWS] == [f"{letter}{i + 1}" for letter, n in LECTURES.items() for i in range(n)]
    assert all(len(row["topic"]) >= 3 for row in ROWS)


@pytest.mark.parametrize("page", sorted({row["page"] for row in ROWS}))
def test_every_section_is_there(page):
    found = sections(page)
    assert found is not None, f"no page {page}"
    wanted = {row["row"]: row["section"] for row in ROWS if row["page"] == page and row["section"]}
    assert {row: section for row, section in wanted.items() if section not in found} == {}


def test_each_lecture_has_its_table():
    text = (BOOK / "coverage.md").read_text(encoding="utf-8")
    assert [letter for letter in LECTURES if f"{{lecture-coverage}} {letter}\n" in text] == list(LECTURES)


def test_the_map_has_every_chapter_after_what_it_builds_on():
    with (BOOK / "chapters.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pages = [row["page"] for row in rows]
    assert pages == sorted(path.stem for path in BOOK.glob("[0-9]*.ipynb"))
    for i, row in enumerate(rows):
        assert set(row["builds_on"].split()) <= set(pages[:i]), row["page"]
        assert not row["homework"] or sections(row["homework"]) == [], row["homework"]
    homework = {row["homework"] for row in rows} - {""}
    assert homework == {path.name for path in (BOOK.parent / "homework" / "source").glob("hw*")}
