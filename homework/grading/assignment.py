"""An assignment as its source notebook describes it: questions with points, their functions, checks and essays."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

HOMEWORK = Path(__file__).resolve().parent.parent
ROOT = HOMEWORK.parent
DEFINES = r"(?m)^(?:async\s+)?def\s+{}\s*\("


def tag(cell: NotebookNode) -> dict:
    """nbgrader's metadata of a cell ({} where it has none)."""
    found = cell.metadata.get("nbgrader")
    return found if isinstance(found, dict) and found.get("grade_id") else {}


def defines(cell: NotebookNode, names) -> bool:
    """Whether a code cell defines one of these functions at its top level (also where it is no valid Python)."""
    return cell.cell_type == "code" and any(re.search(DEFINES.format(re.escape(n)), cell.source) for n in names)


@dataclass(frozen=True)
class Question:
    """One question. For code: the functions to write and the cell that checks them; for an essay: neither.

    name: grade_id of the cell that the student fills in. check: grade_id of the cell that is graded (an essay's own).
    """

    name: str
    check: str
    points: float
    functions: tuple[str, ...] = ()

    @property
    def is_essay(self) -> bool:
        return self.name == self.check


@dataclass(frozen=True)
class Assignment:
    """Source and release of one assignment, read once."""

    name: str
    source: NotebookNode
    release: NotebookNode
    questions: tuple[Question, ...]
    rubric: dict[str, list[dict]]

    @property
    def points(self) -> float:
        return sum(question.points for question in self.questions)

    @property
    def coded(self) -> list[Question]:
        return [question for question in self.questions if not question.is_essay]

    @property
    def essays(self) -> list[Question]:
        return [question for question in self.questions if question.is_essay]


def names(homework: Path = HOMEWORK) -> list[str]:
    """The assignments that are there: hw1-..., hw2-..., in order."""
    return sorted(path.parent.name for path in homework.glob("source/hw*/hw*.ipynb"))


def find(name: str, homework: Path = HOMEWORK) -> str:
    """The full name of an assignment: "hw2" or "hw2-attacks" -> "hw2-attacks"."""
    known = names(homework)
    fitting = [full for full in known if name in (full, full.split("-")[0])]
    if len(fitting) != 1:
        raise ValueError(
            f"assignment: got {name!r}, want one of {', '.join(known)}"
            if known
            else f"{homework / 'source'}: no sources are here, and without them nothing can be graded"
        )
    return fitting[0]


def path_of(name: str, folder: Path) -> Path:
    """Where a notebook stands in source, release, submitted/STUDENT and autograded/STUDENT alike."""
    return folder / name / f"{name}.ipynb"


def questions_of(notebook: NotebookNode) -> tuple[Question, ...]:
    """The questions of a source notebook, in order. Each code question is one solution cell, then its check."""
    found, cell_to_fill = [], None
    for cell in notebook.cells:
        mark = tag(cell)
        if mark.get("solution") and mark.get("grade"):
            found.append(Question(mark["grade_id"], mark["grade_id"], float(mark["points"])))
        elif mark.get("solution"):
            cell_to_fill = cell
        elif mark.get("grade"):
            functions = tuple(re.findall(r"(?m)^def\s+(\w+)", cell_to_fill.source))
            found.append(Question(tag(cell_to_fill)["grade_id"], mark["grade_id"], float(mark["points"]), functions))
    return tuple(found)


def read(name: str, homework: Path = HOMEWORK) -> Assignment:
    """Read an assignment; it must have been released."""
    name = find(name, homework)
    source, release = (nbformat.read(path_of(name, homework / part), as_version=4) for part in ("source", "release"))
    rubric = json.loads((homework / "source" / name / "rubric.json").read_text(encoding="utf-8"))
    return Assignment(name, source, release, questions_of(source), rubric)
