"""Essays are read by people: a CSV with one column a criterion goes out, and comes back with points and comments."""

from __future__ import annotations

import csv
from pathlib import Path

from .assignment import HOMEWORK, read
from .grade import Book, load, tell

FIXED = ("student", "question", "answer", "notebook")


def _columns(assignment) -> list[str]:
    """One column a criterion, in the order of the rubric."""
    return list(
        dict.fromkeys(c["criterion"] for question in assignment.essays for c in assignment.rubric[question.name])
    )


def export(out: Path, homework: Path = HOMEWORK) -> int:
    """Write OUT/essays.csv: what is not marked yet is empty, what is keeps its points."""
    about, results = load(out)
    assignment = read(about["assignment"], homework)
    columns = _columns(assignment)
    file = out / "essays.csv"
    with Book(out, assignment) as book, open(file, "w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, [*FIXED, *columns, "comment"])
        writer.writeheader()
        for question in assignment.essays:
            for student, result in results.items():
                if text := result["essays"].get(question.name):
                    mark = book.marks(student).get(question.name, {})
                    valid = book.scores(student)[question.name] is not None
                    points = {name: f"{value:g}" for name, value in mark.get("criteria", {}).items()} if valid else {}
                    # A leading sign would make a formula of an answer in a spreadsheet.
                    answer = "'" + text if text[:1] in "=+-@\t\r" else text
                    notebook = f"submitted/{student}/{assignment.name}/{assignment.name}.ipynb"
                    writer.writerow({"student": student, "question": question.name, "answer": answer, "notebook": notebook,
                                     **points, "comment": mark.get("comment", "")})  # fmt: skip
    print(f"{file}: {', '.join(columns)}")
    return 0


def read_marks(file: Path, assignment, results: dict) -> list[tuple[str, str, dict[str, float], str]]:
    """(student, question, points of each criterion, comment) of each complete row; every problem at once as a ValueError."""
    problems, marks = [], []
    with open(file, newline="", encoding="utf-8-sig") as handle:
        for number, row in enumerate(csv.DictReader(handle), 2):
            student, question = row.get("student", ""), row.get("question", "")
            where = f"line {number} ({student}, {question})"
            if student not in results or question not in assignment.rubric:
                problems.append(f"{where}: no such student or question")
                continue
            criteria = assignment.rubric[question]
            given = {c["criterion"]: (row.get(c["criterion"]) or "").strip().replace(",", ".") for c in criteria}
            if not any(given.values()):
                continue  # not marked yet
            points = {}
            for criterion in criteria:
                name, most = criterion["criterion"], criterion["points"]
                try:
                    points[name] = float(given[name])
                except ValueError:
                    problems.append(f"{where}: {name}: got {given[name]!r}, want a number from 0 to {most:g}")
                    continue
                if not 0 <= points[name] <= most:
                    problems.append(f"{where}: {name}: got {given[name]}, want 0 to {most:g}")
            marks.append((student, question, points, (row.get("comment") or "").strip()))
    if problems:
        raise ValueError("nothing was imported:\n  " + "\n  ".join(problems))
    return marks


def import_(out: Path, file: Path | None = None, homework: Path = HOMEWORK) -> int:
    """Read the CSV back: all of it, or, where a line has a mistake, nothing."""
    about, results = load(out)
    assignment = read(about["assignment"], homework)
    marks = read_marks(file or out / "essays.csv", assignment, results)
    with Book(out, assignment) as book:
        for student, question, points, comment in marks:
            book.mark(student, question, points, comment, results[student]["essays"].get(question, ""))
        tell(book, out)
    print(f"{len(marks)} essays marked")
    return 0
