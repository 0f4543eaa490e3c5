"""What students hand in, as it comes: find the notebooks, tell whose they are, and mend what Colab or a student broke.

Nothing is lost quietly: whatever is set aside or mended is a note in the report.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode, v4

from .assignment import Assignment, Question, defines, tag

LARGEST = 50 << 20  # bytes of one file


@dataclass
class Handed:
    """A file that was handed in, and whose it is."""

    student: str
    file: str
    content: bytes
    when: float = 0.0
    notes: list[str] = field(default_factory=list)


# ---- whose file is it?

MOODLE = re.compile(r"^(?P<name>.+?)_\d+_assignsubmission_file_?(?P<rest>.*)$")
CANVAS = re.compile(r"^(?P<name>[^_]+)_(?:LATE_)?(?P<number>\d+)_\d+_(?P<rest>.+)$")
GRADESCOPE = re.compile(r"^submission_(?P<number>\d+)$")


def plain(name: str) -> str:
    """A name as a file and a table can hold it: "Zoë van Dijk" -> "zoe-van-dijk"."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower())[:100].strip("-") or "unnamed"


def student_of(file: str, assignment: str, gradescope: dict[str, str]) -> str:
    """The student's name, from the file's path as Moodle, Canvas, Gradescope or Colab write it."""
    path = PurePosixPath(file)
    for part in path.parts[:-1]:
        if found := MOODLE.match(part):
            return plain(found["name"])
        if GRADESCOPE.match(part):
            return plain(gradescope.get(part, part))
    stem = path.stem
    for pattern in (MOODLE, CANVAS):
        if found := pattern.match(stem):
            return plain(found["name"])
    # Colab: "hw2-attacks_jane-doe", "jane_hw2", "Copy of hw2-attacks - Jane Doe (1)".
    stem = re.sub(r"^(copy[ _]of[ _]|kopie[ _]van[ _]|kopie[ _]von[ _])+", "", stem, flags=re.I)
    stem = re.sub(r"\s*\(\d+\)$", "", stem)
    short, _, topic = assignment.partition("-")
    stem = re.sub(rf"{short}([-_ ]{topic})?", " ", stem, flags=re.I)
    if plain(stem) == "unnamed" and len(path.parts) > 1:
        return plain(path.parts[-2])
    return plain(stem)


def gradescope_names(text: str) -> dict[str, str]:
    """Gradescope's submission_metadata.yml: folder -> the submitter's name."""
    import yaml

    found = yaml.safe_load(text) or {}
    names = {}
    for folder, about in found.items():
        people = about.get(":submitters") or [{}] if isinstance(about, dict) else [{}]
        names[str(folder)] = str(people[0].get(":sid") or people[0].get(":name") or folder)
    return names


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """A CSV as rows; it must have these columns."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: got the columns {reader.fieldnames}, want {', '.join(columns)} among them")
        return list(reader)


def files_in(downloads: Path):
    """(name, bytes, time) of every file in a folder or a zip, zips inside included. Names as the download has them."""
    if downloads.is_dir():
        for path in sorted(downloads.rglob("*")):
            name = path.relative_to(downloads).as_posix()
            if path.is_symlink() or not path.is_file() or any(p.startswith((".", "__MACOSX")) for p in path.parts[1:]):
                continue
            content = path.read_bytes() if path.stat().st_size <= LARGEST else None
            yield from _unpacked(name, content, path.stat().st_mtime)
    else:
        yield from _unpacked(downloads.name, downloads.read_bytes(), downloads.stat().st_mtime, outer=True)


def _unpacked(name: str, content: bytes | None, when: float, *, outer: bool = False, depth: int = 0):
    if content is None or not name.lower().endswith(".zip") or depth > 2:
        yield name, content, when
        return
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        yield name, content, when
        return
    for item in sorted(archive.infolist(), key=lambda item: item.filename):
        if item.is_dir() or item.filename.startswith("__MACOSX") or PurePosixPath(item.filename).name.startswith("."):
            continue
        inner = item.filename if outer else f"{name[:-4]}/{item.filename}"
        content = archive.read(item) if item.file_size <= LARGEST else None
        yield from _unpacked(inner, content, datetime(*item.date_time).timestamp(), depth=depth + 1)


def collect(
    downloads: Path, assignment: str, *, mapping: Path | None = None, roster: Path | None = None
) -> tuple[dict[str, Handed], list[str]]:
    """The newest notebook of each student, and notes about every file that is not among them.

    mapping: a CSV with columns `file` (its name, or its path in the download) and `student`. roster: a CSV with a column
    `student`, everyone in the class; others are graded and flagged.
    """
    given = {row["file"]: plain(row["student"]) for row in table(mapping, "file", "student")} if mapping else {}
    known = {plain(row["student"]) for row in table(roster, "student")} if roster else None
    files = list(files_in(downloads))
    gradescope = {}
    for name, content, _ in files:
        if PurePosixPath(name).name == "submission_metadata.yml" and content:
            gradescope = gradescope_names(content.decode("utf-8", "replace"))
    found: dict[str, list[Handed]] = {}
    notes = []
    for name, content, when in files:
        if PurePosixPath(name).name == "submission_metadata.yml":
            continue
        student = given.get(name) or given.get(PurePosixPath(name).name) or student_of(name, assignment, gradescope)
        if content is None:
            notes.append(f"{name}: larger than {LARGEST >> 20} MB, set aside ({student})")
            content = b""
        handed = Handed(student, name, content, when)
        found.setdefault(student, []).append(handed)
    chosen = {}
    for student, theirs in sorted(found.items()):
        # A notebook before any other file; of several the newest, then the last of LMS's numbered copies.
        best = max(theirs, key=lambda one: (one.file.lower().endswith(".ipynb"), one.when, _copy(one.file)))
        for other in theirs:
            if other is not best:
                best.notes.append(f"also handed in {other.file}: set aside, {best.file} was graded")
        if known is not None and student not in known:
            best.notes.append("not in the roster")
        chosen[student] = best
    return chosen, notes


def _copy(file: str) -> int:
    found = re.search(r"[-(](\d+)\)?\.ipynb$", file)
    return int(found[1]) if found else 0


# ---- is it a notebook?


def parse(handed: Handed) -> NotebookNode:
    """The notebook (version 4), or a ValueError in words for the report."""
    if not handed.file.lower().endswith((".ipynb", ".json")):
        raise ValueError(f"{PurePosixPath(handed.file).name} is not a notebook (.ipynb)")
    if not handed.content.strip():
        raise ValueError("the file is empty")
    try:
        raw = json.loads(handed.content.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"the file is not JSON ({str(error)[:80]})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            notebook = nbformat.reads(json.dumps(raw), as_version=4)
        cells = []
        for cell in notebook.cells:
            text = cell.source if isinstance(cell.source, str) else "".join(cell.source)
            make = v4.new_markdown_cell if cell.cell_type == "markdown" else v4.new_code_cell
            if cell.cell_type in ("markdown", "code"):
                metadata = cell.get("metadata") or {}
                cells.append(make(text, metadata={"nbgrader": dict(metadata.get("nbgrader") or {})}))
    except Exception as error:
        raise ValueError(f"the file is JSON and no notebook ({type(error).__name__}: {str(error)[:80]})") from None
    if not any(cell.source.strip() for cell in cells):
        raise ValueError("the notebook is empty")
    return v4.new_notebook(cells=cells)


# ---- mending


@dataclass
class Mended:
    """The cells to run, in order; the official checks among them. `essays`: grade_id -> text."""

    cells: list[NotebookNode]
    essays: dict[str, str]
    notes: list[str]


def mend(notebook: NotebookNode, assignment: Assignment) -> Mended:
    """Bring a submission into the form that is graded: the student's cells, and the course's own checks.

    A question's cell is known by nbgrader's mark or, where that is lost, by the functions it defines. Every check that came
    along is thrown away, and the official one stands after the last cell that defines a function of its question. What
    comes after the last check is not run: it is evidence for a reader.
    """
    official = {tag(cell)["grade_id"]: cell for cell in assignment.source.cells if tag(cell)}
    stubs = {tag(cell)["grade_id"]: cell for cell in assignment.release.cells if tag(cell)}
    notes: list[str] = []
    essays = _essays(notebook, assignment, stubs, notes)
    cells = _without_checks([cell for cell in notebook.cells if cell.cell_type == "code"], assignment, stubs, notes)
    checks = []
    for question in assignment.coded:
        cells, after = _place(cells, question, stubs[question.name].source, notes)
        check = v4.new_code_cell(official[question.check].source)
        check.metadata["nbgrader"] = dict(tag(stubs[question.check]))
        checks.append((after, check))
    ordered = []
    for cell in cells:
        ordered += [cell, *(check for after, check in checks if after is cell)]
    ordered += [check for after, check in checks if after is None]
    last = max((i for i, cell in enumerate(ordered) if tag(cell).get("grade")), default=-1)
    return Mended(_given_first(ordered[: last + 1], assignment, notes), essays, notes)


def _without_checks(cells, assignment: Assignment, stubs, notes) -> list[NotebookNode]:
    kept, seen = [], {}
    for cell in cells:
        for question in assignment.coded:
            official = stubs[question.check]
            names = re.findall(r"(?m)^def\s+(check_\w+)", official.source)
            if tag(cell).get("grade_id") == question.check or defines(cell, names):
                seen.setdefault(question.check, []).append(cell.source.strip() == official.source.strip())
                break
        else:
            kept.append(cell)
    for question in assignment.coded:
        same = seen.get(question.check, [])
        if not same:
            notes.append(f"{question.check}: was deleted, put back")
        elif not all(same):
            notes.append(f"{question.check}: was changed, put back")
        elif len(same) > 1:
            notes.append(f"{question.check}: {len(same)} copies, one was kept")
    return kept


def _place(cells, question: Question, stub: str, notes) -> tuple[list[NotebookNode], NotebookNode | None]:
    """The cells without untouched copies of this question's stub, and the last one that defines its functions."""
    marked = [cell for cell in cells if tag(cell).get("grade_id") == question.name]
    fitting = [cell for cell in cells if defines(cell, question.functions) or any(cell is m for m in marked)]
    written = [cell for cell in fitting if cell.source.strip() != stub.strip()]
    if not any(defines(cell, question.functions) for cell in fitting):
        notes.append(f"{question.name}: no cell defines {' or '.join(question.functions)}")
    if not fitting:
        return cells, None
    if len(fitting) > 1:
        notes.append(f"{question.name}: {len(fitting)} cells for it, the last that was changed counts")
    if not marked:
        notes.append(f"{question.name}: its mark was lost, known by {question.functions[0]}")
    # An untouched copy would undo the answer.
    untouched = {id(cell) for cell in fitting if written and not any(cell is w for w in written)}
    return [cell for cell in cells if id(cell) not in untouched], (written or fitting)[-1]


def _given_first(cells, assignment: Assignment, notes) -> list[NotebookNode]:
    """The cells that the course gives before the first question, put in front where a submission changed or lost them."""
    given = []
    for cell in assignment.release.cells:
        if cell.cell_type == "code":
            if tag(cell):
                break
            given.append(cell)
    there = {_unpinned(cell.source) for cell in cells}
    lost = [cell for cell in given if _unpinned(cell.source) not in there]
    if lost:
        notes.append(f"{len(lost)} of {len(given)} cells that were given had been changed or deleted, put back")
    return [v4.new_code_cell(cell.source) for cell in given] + cells if lost else cells


def _unpinned(source: str) -> str:
    """A cell without what differs between two publications of one assignment: the commit that the setup cell installs."""
    return re.sub(r"git\+\S+", "", source).strip()


def _essays(notebook: NotebookNode, assignment: Assignment, stubs, notes) -> dict[str, str]:
    """The text of each essay: its own cell and the new text cells that follow it (a student may have split it)."""
    given = [cell.source.strip() for cell in assignment.release.cells if cell.cell_type == "markdown" and not tag(cell)]
    release = assignment.release.cells
    found = {}
    for question in assignment.essays:
        stub = stubs[question.name].source.strip()
        position = next((i for i, c in enumerate(notebook.cells) if tag(c).get("grade_id") == question.name), None)
        if position is None:  # after the cell that asks the question
            asked = next(i for i, c in enumerate(release) if tag(c).get("grade_id") == question.name) - 1
            asks = [i for i, c in enumerate(notebook.cells) if _alike(c.source, release[asked].source)]
            position = asks[0] + 1 if asks else None
            notes.append(f"{question.name}: its mark was lost, " + ("found by its question" if asks else "not found"))
        text = []
        for cell in notebook.cells[position:] if position is not None else []:
            other = tag(cell).get("grade_id") not in (None, question.name)
            if cell.cell_type != "markdown" or other or any(_alike(cell.source, one) for one in given):
                break
            if cell.source.strip() != stub:
                text.append(cell.source.strip())
        found[question.name] = "\n\n".join(text)
    return found


def _alike(a: str, b: str) -> bool:
    a, b = a.strip(), b.strip()
    return a == b or (len(b) > 40 and difflib.SequenceMatcher(None, a, b, autojunk=False).quick_ratio() > 0.95
                      and difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.95)  # fmt: skip
