#!/usr/bin/env python3
"""Put notebooks into one normal form, so that a diff shows what a person changed.

usage: nb_clean.py [--check] FILE ...      (--check: change nothing, exit 1 if a file is not in normal form)

Kept: sources, tags, nbgrader and mystnb cell metadata, the wish for a GPU, and the text outputs of the cells that nbval
compares (`# NBVAL_CHECK_OUTPUT`). Dropped: other outputs, execution counts, what Colab and JupyterLab add on saving.
Cell ids come from the source, so that a save in Colab, which drops them, changes nothing.
"""

import hashlib
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CELL_KEYS = ("tags", "nbgrader", "mystnb", "deletable", "editable")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def is_checked(cell):
    """Whether nbval compares this cell's output."""
    return cell.cell_type == "code" and "NBVAL_CHECK_OUTPUT" in cell.source


def normal_output(output):
    """A text output without counts and metadata; None for every other kind."""
    if output.output_type == "stream":
        return NotebookNode(output_type="stream", name=output.name, text=output.text)
    if output.output_type == "execute_result" and "text/plain" in output.data:
        data = {"text/plain": output.data["text/plain"]}
        return NotebookNode(output_type="execute_result", execution_count=1, metadata={}, data=data)
    return None


def normalise(notebook):
    """Bring a notebook (version 4) into normal form, in place."""
    gpu = {key: notebook.metadata[key] for key in ("accelerator",) if key in notebook.metadata}
    notebook.metadata = NotebookNode(gpu, kernelspec=NotebookNode(KERNEL), language_info=NotebookNode(name="python"))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line.rstrip() for line in cell.source.split("\n"))
            outputs = [normal_output(output) for output in cell.outputs] if is_checked(cell) else []
            cell.outputs = [output for output in outputs if output is not None]
            cell.execution_count = 1 if cell.outputs else None
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in CELL_KEYS if key in cell.metadata})
        name = hashlib.sha1((cell.cell_type + cell.source).encode()).hexdigest()[:8]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return notebook


def normal_text(notebook):
    """The normal form of a notebook as the text of its file."""
    return nbformat.writes(normalise(notebook), version=4).rstrip("\n") + "\n"


def main(arguments):
    check, status = "--check" in arguments, 0
    for file in map(Path, (argument for argument in arguments if argument != "--check")):
        old = file.read_bytes().decode("utf-8")
        notebook = nbformat.reads(old, as_version=4)
        new = normal_text(notebook)
        for position, cell in enumerate(notebook.cells):
            if is_checked(cell) and not cell.outputs:
                status = 1
                print(f"{file}: cell {position} is marked NBVAL_CHECK_OUTPUT and has no stored text output")
        if new != old:
            status = 1 if check else status
            print(f"{file}: " + ("not in normal form: python3 course.py clean-notebooks" if check else "cleaned"))
            if not check:
                file.write_bytes(new.encode("utf-8"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
