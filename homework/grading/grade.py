"""Grade a class: collect, mend, run each notebook alone, write marks into nbgrader's gradebook, tell everybody.

The folder of results holds, beside what the teacher reads (grades.csv, report.md, feedback/), nbgrader's own tree
(submitted/, autograded/, gradebook.db; `nbgrader formgrader` opens it) and state/, one file a student, written as soon as
it is known.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import re
import secrets
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import nbformat
from nbformat import v4
from tqdm.auto import tqdm

from . import feedback, ingest, sandbox
from .assignment import HOMEWORK, Assignment, path_of, read, tag
from .sandbox import Limits, NotStarted, Session


def fingerprint(assignment: Assignment, limits: Limits, unsafe: bool) -> str:
    """A hash of all that marks depend on besides the submission: assignment, package, this code, versions, limits."""
    parts = [sys.version, json.dumps(asdict(limits)), str(unsafe), nbformat.writes(assignment.source)]
    for folder in (sandbox.PACKAGE, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")) + sorted(folder.rglob("weights/*")):
            parts.append(file.name + hashlib.sha256(file.read_bytes()).hexdigest())
    from importlib.metadata import version

    parts += [version(name) for name in ("torch", "numpy", "ipykernel")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---- one submission

TOUCHES = re.compile(
    r"\b(get_ipython|_getframe|inspect|linecache|ctypes|subprocess|socket|__globals__|builtins|gc\.get_objects)\b"
)


def suspicious(cells) -> list[str]:
    """What in a student's code a teacher may want to look at: it replaces a library's function, or looks at its grader."""
    found = []
    for number, cell in enumerate(cells, 1):
        if tag(cell).get("grade"):
            continue
        source = re.sub(r"(?m)^\s*[%!].*$", "", cell.source)
        found += [f"cell {number} uses {word}" for word in sorted(set(TOUCHES.findall(source)))]
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        modules = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
                   if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}  # fmt: skip
        modules |= {"torch", "np", "F", "numpy", "attacks", "tmlcourse"}
        for node in ast.walk(tree):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else []:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in modules:
                    found.append(f"cell {number} replaces {ast.unparse(target)}")
    return found


FORGET = """
import linecache as _l
_l.cache.clear()
for _name in [_n for _n in globals() if _n.startswith("check_")]:
    del globals()[_name]
del _l
"""


def execute(cells, limits: Limits, unsafe: bool) -> tuple[dict[str, dict], list[str]]:
    """Run the cells; for each check whether it passed and what it said, and notes about what went wrong elsewhere."""
    outcomes, notes = {}, []
    with Session(limits, unsafe=unsafe) as session:
        for number, cell in enumerate(cells, 1):
            check = tag(cell).get("grade_id") if tag(cell).get("grade") else None
            # A check counts as passed when it says so with a word that is made up as it is sent.
            word = secrets.token_hex(16)
            answer = session.run(cell.source + (f"\nprint('{word}')" if check else ""))
            status = answer["status"]
            if check:
                said = "".join(o["text"] for o in answer["outputs"] if o["output_type"] == "stream")
                passed = status == "ok" and word in said
                cell.outputs = _outputs(answer, passed)
                outcomes[check] = {"passed": passed, "message": "" if passed else _message(answer, limits)}
                session.run(FORGET)
            elif status == "timeout":
                notes.append(f"cell {number} ran for more than {limits.cell:g} seconds and was stopped")
            elif status == "error":
                notes.append(f"cell {number} failed: " + ": ".join(_error(answer))[:300])
        if session.why:
            notes.append(f"the notebook {session.why}")
    return outcomes, notes


def _error(answer: dict) -> tuple[str, str]:
    errors = [o for o in answer["outputs"] if o["output_type"] == "error"]
    return (errors[-1]["ename"], errors[-1]["evalue"]) if errors else ("", "")


def _message(answer: dict, limits: Limits) -> str:
    """Why a check failed, in a sentence for the student."""
    name, value = _error(answer)
    if answer["status"] == "dead":
        return f"not checked: the notebook {answer['why']}"
    if answer["status"] == "timeout":
        return f"stopped after {limits.cell:g} seconds: is there a loop that does not end?"
    if name == "NotImplementedError":
        return "not written yet"
    if name == "AssertionError":
        return value
    return f"{name}: {value}" if name else "the check did not run to its end"


def _outputs(answer: dict, passed: bool) -> list:
    """What nbgrader reads a mark from: nothing, or an error."""
    if passed:
        return []
    name, value = _error(answer)
    return [v4.new_output("error", ename=name or "NotRun", evalue=value or answer.get("why", ""), traceback=[])]


def grade_one(handed: ingest.Handed, assignment: Assignment, limits: Limits, unsafe: bool) -> dict:
    """Everything that is known about one submission after it ran, ready for its state file."""
    result = {"student": handed.student, "file": handed.file, "notes": list(handed.notes), "flags": [],
              "checks": {}, "essays": {}, "cells": [], "problem": ""}  # fmt: skip
    try:
        notebook = ingest.parse(handed)
    except ValueError as error:
        result["problem"] = str(error)
        notebook = v4.new_notebook()
        mended = ingest.mend(notebook, assignment)
        outcomes = {q.check: {"passed": False, "message": str(error)} for q in assignment.coded}
        for cell in mended.cells:
            cell.outputs = [v4.new_output("error", ename="NotRun", evalue=str(error), traceback=[])]
    else:
        mended = ingest.mend(notebook, assignment)
        result["notes"] += mended.notes
        result["flags"] = suspicious(mended.cells)
        try:
            outcomes, happened = _twice(execute, mended.cells, limits, unsafe)
            result["notes"] += happened
        except NotStarted as error:
            result["problem"] = f"could not be run on this machine, try again: {error}"
            outcomes = {q.check: {"passed": False, "message": "not run"} for q in assignment.coded}
            for cell in mended.cells:
                cell.outputs = [v4.new_output("error", ename="NotRun", evalue=str(error), traceback=[])]
    result["checks"], result["essays"] = outcomes, mended.essays
    result["cells"] = [dict(cell) for cell in mended.cells]
    return result


def _twice(run, *arguments):
    """A kernel that does not come up on a busy machine gets a second chance."""
    try:
        return run(*arguments)
    except NotStarted:
        return run(*arguments)


# ---- nbgrader's gradebook


class Book:
    """nbgrader's gradebook of one folder of results."""

    def __init__(self, folder: Path, assignment: Assignment):
        from nbgrader.api import Gradebook
        from sqlalchemy.exc import SAWarning

        warnings.filterwarnings("ignore", category=SAWarning)  # nbgrader's own
        os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")  # alembic
        self.folder, self.assignment = folder, assignment
        self.url = f"sqlite:///{folder / 'gradebook.db'}"
        self.gradebook = Gradebook(self.url)
        self.write_source()

    def resources(self, student: str) -> dict:
        name = self.assignment.name
        return {"nbgrader": {"student": student, "assignment": name, "notebook": name, "db_url": self.url}}

    def write_source(self):
        """The assignment with its checks and points, as nbgrader keeps it."""
        from nbgrader.preprocessors import ComputeChecksums, SaveCells

        self.gradebook.update_or_create_assignment(self.assignment.name)
        notebook = nbformat.reads(nbformat.writes(self.assignment.release), as_version=4)
        official = {tag(cell)["grade_id"]: cell.source for cell in self.assignment.source.cells if tag(cell)}
        checks = {question.check for question in self.assignment.coded}
        for cell in notebook.cells:
            if tag(cell).get("grade_id") in checks:
                cell.source = official[tag(cell)["grade_id"]]
        for step in (ComputeChecksums(), SaveCells()):
            notebook, _ = step.preprocess(notebook, self.resources(""))

    def write(self, result: dict):
        """A student's marks, by nbgrader's own rule, and the notebook that was graded."""
        from nbgrader.preprocessors import SaveAutoGrades

        student, name = result["student"], self.assignment.name
        self.gradebook.update_or_create_student(student)
        before = {q.name: self._grade(student, q.name) for q in self.assignment.essays}
        self.gradebook.update_or_create_submission(name, student)
        stubs = {tag(cell)["grade_id"]: cell for cell in self.assignment.release.cells if tag(cell)}
        cells = [nbformat.from_dict(cell) for cell in result["cells"]]
        for question in self.assignment.essays:
            cell = nbformat.from_dict(dict(stubs[question.name]))
            cell.source = result["essays"].get(question.name) or cell.source
            cells.append(cell)
        notebook = v4.new_notebook(cells=cells)
        for cell in notebook.cells:
            if not tag(cell):
                cell.metadata.pop("nbgrader", None)
        out = path_of(name, self.folder / "autograded" / student)
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out)
        SaveAutoGrades().preprocess(notebook, self.resources(student))
        for question in self.assignment.essays:  # a mark stays unless the essay was changed after it
            manual, marked = before[question.name]
            if manual is not None and marked == digest(result["essays"].get(question.name, "")):
                self._grade_of(student, question.name).needs_manual_grade = False
        self.gradebook.db.commit()

    def _grade_of(self, student: str, cell: str):
        return self.gradebook.find_grade(cell, self.assignment.name, self.assignment.name, student)

    def _grade(self, student: str, essay: str) -> tuple[float | None, str]:
        """The manual mark of an essay and the digest of the text that it was given for."""
        from nbgrader.api import MissingEntry

        try:
            manual = self._grade_of(student, essay).manual_score
        except MissingEntry:
            return None, ""
        return manual, self.marks(student).get(essay, {}).get("digest", "")

    def marks_file(self) -> Path:
        return self.folder / "state" / "_marks.json"

    def marks(self, student: str) -> dict:
        """essay -> criteria, comment and digest, as `rubric import` kept them."""
        file = self.marks_file()
        return json.loads(file.read_text(encoding="utf-8")).get(student, {}) if file.is_file() else {}

    def mark(self, student: str, essay: str, criteria: dict[str, float], comment: str, text: str):
        """Write an essay's mark and comment."""
        grade = self._grade_of(student, essay)
        grade.manual_score, grade.needs_manual_grade = sum(criteria.values()), False
        says = self.gradebook.find_comment(essay, self.assignment.name, self.assignment.name, student)
        says.manual_comment = comment
        self.gradebook.db.commit()
        file = self.marks_file()
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known.setdefault(student, {})[essay] = {"criteria": criteria, "comment": comment, "digest": digest(text)}
        store(file, known)

    def scores(self, student: str) -> dict[str, float | None]:
        """Points of each question: None where a person has still to give them."""
        found = {}
        for question in self.assignment.questions:
            grade = self._grade_of(student, question.check)
            found[question.name] = None if grade.needs_manual_grade else float(grade.score)
        return found

    def close(self):
        self.gradebook.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def store(file: Path, value) -> None:
    """Write JSON so that an interrupt leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, file)


# ---- the class

LIMITS = Limits()


def grade(
    downloads: Path, name: str, *, out: Path, mapping: Path | None = None, roster: Path | None = None,
    jobs: int = 2, limits: Limits = LIMITS, unsafe: bool = False, homework: Path = HOMEWORK,
) -> int:  # fmt: skip
    """Grade everything in a download; the exit status is 0 even if every student failed: that is a result."""
    assignment = read(name, homework)
    if not downloads.exists():
        raise ValueError(f"{downloads}: there is no such folder or zip")
    if out.resolve().is_relative_to(downloads.resolve()):
        raise ValueError(f"{out}: is inside the download, want a folder of its own")
    chosen, notes = ingest.collect(downloads, assignment.name, mapping=mapping, roster=roster)
    if not chosen:
        raise ValueError(f"{downloads}: holds no files")
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(assignment, limits, unsafe)
    results, waiting = {}, []
    for student, handed in chosen.items():
        key = digest(mark + handed.file + "".join(handed.notes)) + hashlib.sha256(handed.content).hexdigest()
        file = state / f"{student}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if known.get("key") == key:
            results[student] = known
        else:
            waiting.append((handed, key))
    if waiting and not unsafe:
        sandbox.check()
    with Book(out, assignment) as book:
        pool = ThreadPoolExecutor(max_workers=jobs)
        try:
            tasks = {
                pool.submit(grade_one, handed, assignment, limits, unsafe): (handed, key) for handed, key in waiting
            }
            for task in tqdm(as_completed(tasks), total=len(tasks), desc=assignment.name, unit="notebook"):
                handed, key = tasks[task]
                results[handed.student] = _keep(task.result(), handed, key, book, out)
        except KeyboardInterrupt:
            print(f"\nInterrupted: {len(results)} of {len(chosen)} are graded. The same command goes on from here.")
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        left_over = [
            file.stem for file in state.glob("*.json") if not file.stem.startswith("_") and file.stem not in chosen
        ]
        about = {"assignment": assignment.name, "students": sorted(chosen), "notes": notes, "earlier": left_over}
        store(state / "_class.json", about | {"absent": _absent(chosen, roster), "new": len(waiting)})
        tell(book, out)
    return 0


def _keep(result: dict, handed: ingest.Handed, key: str, book: Book, out: Path) -> dict:
    file = path_of(book.assignment.name, out / "submitted" / handed.student)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(handed.content)
    book.write(result)
    again = result["problem"].startswith("could not be run")
    store(out / "state" / f"{handed.student}.json", result | {"key": "" if again else key})
    return result


def _absent(chosen, roster: Path | None) -> list[str]:
    names = [ingest.plain(row["student"]) for row in ingest.table(roster, "student")] if roster else []
    return [name for name in names if name not in chosen]


def load(out: Path) -> tuple[dict, dict[str, dict]]:
    """What a folder of results holds: about the class, and student -> result."""
    file = out / "state" / "_class.json"
    if not file.is_file():
        raise ValueError(f"{out}: holds no results of `homework grade`")
    about = json.loads(file.read_text(encoding="utf-8"))
    read_one = lambda student: json.loads((out / "state" / f"{student}.json").read_text(encoding="utf-8"))  # noqa: E731
    return about, {student: read_one(student) for student in about["students"]}


def tell(book: Book, out: Path) -> None:
    """Write grades.csv, the report and a page for each student from what is known."""
    about, results = load(out)
    assignment = book.assignment
    questions = [question.name for question in assignment.questions]
    rows = []
    for student, result in results.items():
        scores = book.scores(student)
        waits = [name for name, score in scores.items() if score is None]
        total = sum(score for score in scores.values() if score is not None)
        status = result["problem"] or (f"waits for: {', '.join(waits)}" if waits else "complete")
        points = {name: "" if score is None else f"{score:g}" for name, score in scores.items()}
        rows.append({"student": student, "total": f"{total:g}", "max": f"{assignment.points:g}", **points, "status": status,
                     "notes": len(result["notes"]) + len(result["flags"]), "file": result["file"]})  # fmt: skip
        feedback.page(out / "feedback" / f"{student}.html", assignment, result, scores, book.marks(student))
    for student in about["absent"]:
        empty = dict.fromkeys(questions, "0")
        rows.append({"student": student, "total": "0", "max": f"{assignment.points:g}", **empty,
                     "status": "nothing handed in", "notes": 0, "file": ""})  # fmt: skip
    rows.sort(key=lambda row: row["student"])
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["student", "total", "max", *questions, "status", "notes", "file"])
        writer.writeheader()
        writer.writerows(rows)
    (out / "report.md").write_text(feedback.report(assignment, about, results, rows), encoding="utf-8")
    waits = sum("waits" in row["status"] for row in rows)
    print(f"{out / 'grades.csv'}: {len(rows)} students, {about['new']} graded now"
          + (f", {waits} wait for marks by hand: homework rubric export {out}" if waits else ""))  # fmt: skip
