"""One source, three products: what students receive, the page in the book, and the public copy of the repository."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from .assignment import HOMEWORK, ROOT, names, path_of, tag

sys.path.insert(0, str(ROOT / "tools"))
import nb_clean  # noqa: E402
import stamp  # noqa: E402

CODE_STUB = "raise NotImplementedError  # your code"
TEXT_STUB = "*Write your answer here.*"
PRIVATE = ("homework/source",)


def released(source: NotebookNode) -> NotebookNode:
    """The student's notebook: the source without solutions and hidden checks, by nbgrader's own steps."""
    from nbgrader.preprocessors import ClearHiddenTests, ClearSolutions, ComputeChecksums, LockCells

    logging.getLogger("traitlets").setLevel(logging.ERROR)
    notebook = nbformat.from_dict(source)
    notebook = nbformat.reads(nbformat.writes(notebook), as_version=4)  # a copy of its own
    steps = [ClearSolutions(code_stub={"python": CODE_STUB}, text_stub=TEXT_STUB), LockCells(), ClearHiddenTests()]
    for step in [*steps, ComputeChecksums()]:
        notebook, _ = step.preprocess(notebook, {})
    # What needs an answer fails until it is there: "Run all" and the tests go on to the next cell.
    answers = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.rstrip()
            if answers:
                cell.metadata["tags"] = ["raises-exception"]
        answers = answers or (cell.cell_type == "code" and bool(tag(cell)))
    return notebook


def release(*, check: bool = False, homework: Path = HOMEWORK) -> int:
    """Derive every student notebook; with `check` change nothing and return 1 where one differs."""
    status = 0
    for name in names(homework):
        file, out = (path_of(name, homework / part) for part in ("source", "release"))
        old = file.read_text(encoding="utf-8")
        new = stamp.stamped_notebook(old, *stamp.repository())
        derived = nb_clean.normal_text(released(nbformat.reads(new, as_version=4)))
        before = out.read_text(encoding="utf-8") if out.exists() else ""
        for path, text, had in ((file, new, old), (out, derived, before)):
            if text != had:
                status = int(check)
                print(f"{path.relative_to(homework)}: " + ("not up to date" if check else "written"))
                if not check:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8", newline="\n")
    return status


def secrets(notebook: NotebookNode) -> set[str]:
    """The lines of a source that no student may see: those of its solutions, hidden checks and model answers alone."""
    hidden, shown = set(), set()
    for cell in notebook.cells:
        inside = cell.cell_type == "markdown" and bool(tag(cell).get("solution"))
        for line in map(str.strip, cell.source.splitlines()):
            if line.startswith(("### BEGIN", "### END")):
                inside = line.startswith("### BEGIN")
            elif len(line) > 12:
                (hidden if inside else shown).add(line)
    return hidden - shown


def published() -> list[str]:
    """The files of the public copy: what git tracks (or would), without what is private."""
    answer = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True)  # fmt: skip
    files = sorted(set(answer.stdout.splitlines()))
    return [file for file in files if not file.startswith(PRIVATE) and (ROOT / file).is_file()]


def publish(folder: Path) -> int:
    """Copy the repository without the private files into an empty (or new) folder."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, want a new or empty folder")
    if folder.resolve().is_relative_to(HOMEWORK):
        raise ValueError(f"{folder}: is inside the homework's own folder")
    files = published()
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    print(f"{folder}: {len(files)} files, without {', '.join(PRIVATE)}")
    print("Its history must be its own: start it with `git init`, never push the private repository's commits.")
    return 0
