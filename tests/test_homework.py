"""The homework: what students receive, wrong answers, hostile and unlucky submissions, essays, and the tables at the end.

The hostile ones are graded in one batch, as a class would be, on a small assignment of their own that needs no torch.
"""

import base64
import copy
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nb_clean
import nbformat
import pytest
from conftest import skip_or_fail
from nbformat import v4
from test_notebooks import clean_python, package, run_notebook  # noqa: F401  (the first two are fixtures)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "homework"))
from grading import assignment, build, cli, grade, ingest, rubric, sandbox  # noqa: E402

pytest.importorskip("nbgrader", reason="grading needs nbgrader (the extra [homework])")
pytestmark = pytest.mark.filterwarnings("ignore:Constructing LpVariable:DeprecationWarning")
NAMES = assignment.names()
each_assignment = pytest.mark.parametrize(
    "name", NAMES or [pytest.param("", marks=pytest.mark.skip("sources are private"))]
)


@pytest.fixture(scope="session")
def sandboxed():
    try:
        sandbox.check()
    except sandbox.Unavailable as error:
        skip_or_fail(str(error))


# ---- a small assignment


def cell(kind, source, name=None, points=None):
    """A cell of a source: "code" or "markdown" without a mark, "solve", "check" or "essay" with one."""
    made = (v4.new_markdown_cell if kind in ("markdown", "essay") else v4.new_code_cell)(source)
    if name:
        made.metadata["nbgrader"] = {
            "grade": kind != "solve", "solution": kind != "check", "locked": kind == "check", "task": False,
            "grade_id": name, "schema_version": 3, "cell_type": made.cell_type,
        } | ({} if points is None else {"points": points})  # fmt: skip
    return made


ADD = "def add(a, b):\n    ### BEGIN SOLUTION\n    return a + b\n    ### END SOLUTION"
DOUBLE = "def double(a):\n    ### BEGIN SOLUTION\n    return math.prod([2, a])\n    ### END SOLUTION"
CHECK = """\
def check_{name}():
    assert {seen}, "{name}: wrong at home"
    ### BEGIN HIDDEN TESTS
    assert {hidden}, "{name}: wrong at the teacher's by 1"
    ### END HIDDEN TESTS


check_{name}()"""
QUESTION = "## 3. Why?\n\nExplain in two sentences why addition commutes, and what would follow if it did not."


def toy_source():
    return v4.new_notebook(cells=[
        cell("markdown", "# Homework 0"), cell("code", "import math"), cell("markdown", "## 1. Add"),
        cell("solve", ADD, "q1-add"),
        cell("check", CHECK.format(name="add", seen="add(1, 2) == 3", hidden="add(-7, 3) == -4"), "q1-add-check", 3),
        cell("markdown", "## 2. Double"), cell("solve", DOUBLE, "q2-double"),
        cell("check", CHECK.format(name="double", seen="double(2) == 4", hidden="double(-3) == -6"), "q2-double-check", 2),
        cell("markdown", QUESTION), cell("essay", "Because the order of counting does not matter.", "q3-why", 5),
        cell("markdown", "## The end\n\nThank you for your work; hand in this notebook under its own name."),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A homework folder with the small assignment."""
    folder = tmp_path_factory.mktemp("homework")
    source = toy_source()
    for part, notebook in (("source", source), ("release", build.released(source))):
        file = assignment.path_of("hw0-toy", folder / part)
        file.parent.mkdir(parents=True)
        nbformat.write(notebook, file)
    criteria = [{"criterion": "clarity", "points": 3}, {"criterion": "wow", "points": 2}]
    (folder / "source" / "hw0-toy" / "rubric.json").write_text(json.dumps({"q3-why": criteria}), encoding="utf-8")
    return folder


def handed_in(folder, *, add="return a + b", double="return 2 * a", essay=None, before="", between="", name="hw0"):
    """A student's notebook: the release with answers, and other code before and between."""
    notebook = nbformat.read(assignment.path_of(assignment.find(name, folder), folder / "release"), as_version=4)
    for one in notebook.cells:
        for body, head in ((add, "add(a, b)"), (double, "double(a)")):
            if one.source.startswith(f"def {head}"):
                one.source = f"def {head}:\n    " + body.replace("\n", "\n    ")
        if assignment.tag(one).get("grade_id") == "q3-why" and essay is not None:
            one.source = essay
    if between:
        notebook.cells.insert(5, v4.new_code_cell(between))
    if before:
        notebook.cells.insert(1, v4.new_code_cell(before))
    return notebook


# ---- hostile and unlucky submissions

GOES_ON = {"q1-add": 0.0, "q2-double": 2.0}
FULL = {"q1-add": 3.0, "q2-double": 2.0}
NOTHING = {"q1-add": 0.0, "q2-double": 0.0}


def if_it_works(code):
    """An answer that is right only where the forbidden thing succeeds."""
    return "try:\n    " + code.replace("\n", "\n    ") + "\nexcept OSError:\n    return None\nreturn a + b"


def awkward(folder, downloads, private, port):
    """name -> (file name, content, points, words in the report)."""
    say = lambda **parts: handed_in(folder, **parts)  # noqa: E731
    cases = {}

    def case(name, notebook, points, *words, file=None):
        content = notebook if isinstance(notebook, (bytes, str)) else nbformat.writes(notebook)
        content = content if isinstance(content, bytes) else content.encode()
        cases[name] = (file or f"hw0-toy_{name}.ipynb", content, points, words)

    case("good", say(essay="Since order does not matter."), FULL)
    case("untouched", nbformat.read(assignment.path_of("hw0-toy", folder / "release"), 4), NOTHING, "not written yet")
    case("hidden-fails", say(add="return abs(a) + b"), GOES_ON, "wrong at the teacher's by 1")
    case("infinite-loop", say(add="while True:\n    pass"), GOES_ON, "stopped after")
    case("deaf-loop", say(add="while True:\n    try:\n        while True:\n            pass\n"
         "    except KeyboardInterrupt:\n        pass"), NOTHING, "did not stop when interrupted")  # fmt: skip
    case("recursion", say(add="return add(a, b)"), GOES_ON, "RecursionError")
    case(
        "memory-bomb",
        say(add="kept = [bytearray(1 << 28) for _ in range(10**6)]\nreturn a + b"),
        GOES_ON,
        "MemoryError",
    )
    bomb = "import os, time\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(100)\n"
    case("fork-bomb", say(before=bomb + "except OSError:\n    raise"), None)
    case("writes-outside", say(add=if_it_works(
        f"open({str(private / 'own')!r}, 'w').write('x')\nopen({str(private / 'new')!r}, 'w')")), GOES_ON)  # fmt: skip
    case("reads-the-gradebook", say(add=if_it_works(f"open({str(private / 'own')!r}).read()")), GOES_ON)
    source = str(folder / "source" / "hw0-toy" / "hw0-toy.ipynb")
    case("reads-the-source", say(add=if_it_works(f"open({source!r}).read()")), GOES_ON)
    other = str(downloads / "hw0-toy_good.ipynb")
    case("reads-a-neighbour", say(add=if_it_works(f"open({other!r}).read()")), GOES_ON)
    case("opens-a-socket", say(add=if_it_works(
        f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).close()")), GOES_ON, "uses socket")  # fmt: skip
    case("fills-the-disk", say(add=if_it_works(
        "import os\nfor i in range(64):\n    open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 24))\n")), GOES_ON)  # fmt: skip

    deleted = say()
    deleted.cells = [c for c in deleted.cells if assignment.tag(c).get("grade_id") != "q1-add-check"]
    case("deletes-a-check", deleted, FULL, "q1-add-check: was deleted")
    edited = say(add="return 0")
    for one in edited.cells:
        one.source = one.source.replace("assert add(1, 2) == 3", "assert True")
    case("edits-a-check", edited, GOES_ON, "q1-add-check: was changed", "add: wrong at home")
    doubled = say()
    doubled.cells[5:5] = [another(doubled.cells[4]), another(doubled.cells[3])]
    case("copies-cells", doubled, FULL, "2 copies", "2 cells for it")
    stub_again = say()
    release = nbformat.read(assignment.path_of("hw0-toy", folder / "release"), 4)
    stub_again.cells.insert(4, another(release.cells[3]))
    case("copies-the-stub", stub_again, FULL, "2 cells for it")
    better = say(add="return 0")
    better.cells.append(v4.new_code_cell("def add(a, b):\n    return a + b"))
    case("answers-below", better, FULL, "the last that was changed counts")
    bare = say(essay="Since order does not matter.")
    for one in bare.cells:
        one.metadata = {}
    case("loses-all-marks", bare, FULL, "its mark was lost")
    case("colab-save", colab_save(say(essay="Because.")), FULL)
    other_kernel = say()
    other_kernel.metadata["kernelspec"] = {"name": "ir", "display_name": "R", "language": "R"}
    case("wrong-kernel", other_kernel, FULL)
    case("prints-100-mb", say(between="for _ in range(1000):\n    print('x' * 100_000)"), FULL)
    case("exits", say(between="import os\nos._exit(0)"), {"q1-add": 3.0, "q2-double": 0.0}, "ended its own kernel")
    case("exits-in-a-check", say(add="raise SystemExit"), GOES_ON, "SystemExit")
    case("kills-everything", say(add="import os\nos.kill(-1, 9)"), NOTHING, "ended its sandbox")
    case("bad-import", say(before="import a_module_that_nobody_has"), FULL)
    case("syntax-error", say(add="return a +"), GOES_ON, "SyntaxError")
    case("input", say(add="return int(input())"), GOES_ON, "StdinNotImplementedError")
    case("renames-the-function", edit(say(), "def add(", "def my_add("), GOES_ON, "no cell defines add")
    case("loses-the-given-cell", edit(say(double="return math.prod([2, a])"), "import math", ""), FULL, "put back")
    case("patches-a-library", say(before="import math\nmath.isclose = lambda *_: True"), FULL, "replaces math.isclose")
    search = "import linecache\nseen = str(linecache.cache) + str(globals())\nreturn 2 * a if 'add' + '(-7' in seen else None"
    case("looks-for-hidden-checks", say(double=search), {"q1-add": 3.0, "q2-double": 0.0}, "uses linecache")
    deaf = (
        "import IPython\n\nclass Fine:\n    success, result, execution_count = True, None, 1\n"
        "    error_before_exec = error_in_exec = None\n\nasync def nothing(*_, **__):\n    return Fine()\n\n"
        "IPython.get_ipython().run_cell_async = nothing"
    )
    case("patches-the-kernel", say(before=deaf), NOTHING, "did not run to its end", "uses get_ipython")
    case("wrong-type", b"%PDF-1.4", NOTHING, "is not a notebook", file="hw0-toy_wrong-type.pdf")
    case("empty", v4.new_notebook(), NOTHING, "the notebook is empty")
    case("no-bytes", b"", NOTHING, "the file is empty")
    case("not-json", "cells: none", NOTHING, "not JSON")
    case("json-but-no-notebook", "[1, 2]", NOTHING, "no notebook")
    case("bad-cells", json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"a": 1}]}), NOTHING,
         "no notebook")  # fmt: skip
    case("unknown-student", say(), FULL, "not in the roster")
    return cases


def another(one):
    """A copy of a code cell, as copying in a notebook makes it: with its marks."""
    return v4.new_code_cell(one.source, metadata=copy.deepcopy(one.metadata))


def edit(notebook, old, new):
    for one in notebook.cells:
        if one.cell_type == "code" and not one.source.startswith("def check"):
            one.source = one.source.replace(old, new)
    return notebook


def colab_save(notebook):
    """What Colab makes of a notebook: no ids, its own metadata, another minor version, outputs with pictures."""
    saved = json.loads(nbformat.writes(notebook))
    saved["nbformat_minor"], saved["metadata"] = 0, {"colab": {"provenance": []}, "kernelspec": {"name": "python3"}}
    for one in saved["cells"]:
        del one["id"]
        one["metadata"] |= {"id": "AbC", "outputId": "x"}
        if one["cell_type"] == "code":
            one["execution_count"] = 7
            one["outputs"] = [{"output_type": "display_data", "metadata": {},
                               "data": {"image/png": base64.b64encode(b"png").decode()}}]  # fmt: skip
    return json.dumps(saved)


LIMITS = sandbox.Limits(cell=4, seconds=40, memory=1 << 30, processes=48, disk=1 << 26)


@pytest.fixture(scope="module")
def batch(toy, tmp_path_factory, sandboxed):
    """All awkward submissions, graded at once: name -> (expected points, words), scores, the report, the folder."""
    base = tmp_path_factory.mktemp("class")
    downloads = base / "downloads"
    downloads.mkdir()
    # Where everybody may write, so that nothing but the sandbox stands in the way.
    private = Path(tempfile.mkdtemp(dir="/var/tmp" if os.path.isdir("/var/tmp") else None))
    (private / "own").write_text("untouched")
    (private / "own").chmod(0o666)
    private.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        cases = awkward(toy, downloads, private, server.getsockname()[1])
        for file, content, _, _ in cases.values():
            (downloads / file).write_bytes(content)
        # Two files of one student, and a notebook that carries no name.
        (downloads / "hw0-toy_good (1).ipynb").write_bytes(cases["good"][1])
        os.utime(downloads / "hw0-toy_good.ipynb", (1, 1))
        (downloads / "Untitled7.ipynb").write_bytes(cases["good"][1])
        (base / "mapping.csv").write_text("file,student\nUntitled7.ipynb,Zoë van Dijk\n", encoding="utf-8")
        names = [name for name in cases if name != "unknown-student"] + ["Zoë van Dijk", "Absent Minded"]
        (base / "roster.csv").write_text("student\n" + "\n".join(names) + "\n", encoding="utf-8")
        before = processes()
        patch.setattr(grade, "fingerprint", lambda *_: "the same")  # somebody may be editing the package
        grade.grade(downloads, "hw0", out=base / "out", mapping=base / "mapping.csv", roster=base / "roster.csv",
                    limits=LIMITS, homework=toy)  # fmt: skip
    rows = {row["student"]: row for row in ingest.table(base / "out" / "grades.csv", "student")}
    report = (base / "out" / "report.md").read_text(encoding="utf-8")
    yield {"cases": cases, "rows": rows, "report": report, "base": base, "before": before, "private": private}
    shutil.rmtree(private)


def processes():
    """The sandboxes that are running now."""
    answer = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
    return sum("inside.py" in line for line in answer.stdout.splitlines())


def about(report, student):
    """All that the report says of one student."""
    return "".join(re.findall(rf"(?m)^- \*\*{re.escape(student)}\*\*.*\n(?:  - .*\n)*", report))


AWKWARD = [
    "good", "untouched", "hidden-fails", "infinite-loop", "deaf-loop", "recursion", "memory-bomb", "fork-bomb",
    "writes-outside", "reads-the-gradebook", "reads-the-source", "reads-a-neighbour", "opens-a-socket",
    "fills-the-disk", "deletes-a-check", "edits-a-check", "copies-cells", "copies-the-stub", "answers-below",
    "loses-all-marks", "colab-save", "wrong-kernel", "prints-100-mb", "exits", "exits-in-a-check", "kills-everything",
    "bad-import", "syntax-error", "input", "renames-the-function", "loses-the-given-cell", "patches-a-library",
    "looks-for-hidden-checks", "patches-the-kernel", "wrong-type", "empty", "no-bytes", "not-json",
    "json-but-no-notebook", "bad-cells", "unknown-student",
]  # fmt: skip


@pytest.mark.parametrize("name", AWKWARD)
def test_an_awkward_submission_gets_what_it_earned_and_the_report_says_what_happened(batch, name):
    _, _, points, words = batch["cases"][name]
    row = batch["rows"][name]
    if points is not None:
        assert {question: float(row[question]) for question in points} == points, about(batch["report"], name)
    for word in words:
        assert word in about(batch["report"], name).replace("&lt;", "<")


def test_every_case_is_tested_and_nobody_is_lost(batch):
    assert set(batch["cases"]) == set(AWKWARD)
    assert set(batch["rows"]) == {*AWKWARD, "zoe-van-dijk", "absent-minded"}


def test_the_batch_left_nothing_outside_and_no_process_behind(batch):
    assert (batch["private"] / "own").read_text() == "untouched"
    assert {path.name for path in batch["private"].iterdir()} == {"own"}
    assert {path.name for path in batch["base"].iterdir()} == {"downloads", "mapping.csv", "roster.csv", "out"}
    for _ in range(20):
        if processes() <= batch["before"]:
            break
        time.sleep(0.25)
    assert processes() <= batch["before"]


def test_names_come_from_the_mapping_and_the_absent_stand_in_the_table(batch):
    rows = batch["rows"]
    assert (rows["zoe-van-dijk"]["q1-add"], rows["zoe-van-dijk"]["file"]) == ("3", "Untitled7.ipynb")
    assert (rows["absent-minded"]["total"], rows["absent-minded"]["status"]) == ("0", "nothing handed in")
    assert rows["good"]["file"] == "hw0-toy_good (1).ipynb"
    assert "also handed in hw0-toy_good.ipynb" in about(batch["report"], "good")


def test_essays_are_found_and_an_untouched_one_gets_nothing(batch):
    rows = batch["rows"]
    for name in ("good", "loses-all-marks", "colab-save"):
        assert rows[name]["status"] == "waits for: q3-why"
    assert (rows["untouched"]["q3-why"], rows["untouched"]["status"]) == ("0", "complete")


def test_feedback_has_a_page_for_each_and_shows_no_hidden_check(batch):
    pages = {
        path.stem: path.read_text(encoding="utf-8") for path in (batch["base"] / "out" / "feedback").glob("*.html")
    }
    assert set(pages) == {*AWKWARD, "zoe-van-dijk"}
    assert "wrong at the teacher" in pages["hidden-fails"]
    assert not any("add(-7" in page or "double(-3" in page for page in pages.values())


def test_a_second_run_grades_nothing_and_a_changed_file_only(batch, toy, monkeypatch, capsys):
    base, ran = batch["base"], []
    again = lambda: grade.grade(base / "downloads", "hw0", out=base / "out", mapping=base / "mapping.csv",  # noqa: E731
                                roster=base / "roster.csv", limits=LIMITS, homework=toy)  # fmt: skip
    before, one = (base / "out" / "grades.csv").read_bytes(), grade.grade_one
    monkeypatch.setattr(grade, "fingerprint", lambda *_: "the same")
    monkeypatch.setattr(grade, "grade_one", lambda handed, *rest: ran.append(handed.student) or one(handed, *rest))
    again()
    assert ran == []
    assert (base / "out" / "grades.csv").read_bytes() == before
    file = base / "downloads" / "hw0-toy_recursion.ipynb"
    file.write_bytes(batch["cases"]["good"][1])
    again()
    assert ran == ["recursion"]
    file.write_bytes(batch["cases"]["recursion"][1])
    again()
    assert (base / "out" / "grades.csv").read_bytes() == before  # and the same marks on a second run


def test_what_marks_depend_on_is_in_the_fingerprint(toy, tmp_path, monkeypatch):
    both, limits = assignment.read("hw0", toy), sandbox.Limits()
    known = {grade.fingerprint(both, limits, False), grade.fingerprint(both, limits, True)}
    known.add(grade.fingerprint(both, sandbox.Limits(cell=1), False))
    changed = copy.deepcopy(both)
    changed.source.cells[4].source += " "
    known.add(grade.fingerprint(changed, limits, False))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.safetensors").write_bytes(b"1")
    monkeypatch.setattr(sandbox, "PACKAGE", tmp_path)
    known.add(grade.fingerprint(both, limits, False))
    (tmp_path / "weights" / "net.safetensors").write_bytes(b"2")
    known.add(grade.fingerprint(both, limits, False))
    assert len(known) == 6


def test_a_notebook_sees_no_gpu_no_data_and_nothing_of_the_machine(sandboxed):
    look = f"""
import os
grading = {str(ROOT / "homework")!r}
print([os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TMLCOURSE_DATA")], os.path.exists("/etc/passwd"))
print(os.getuid() > 0, os.listdir(grading), os.listdir(grading + "/grading"))"""
    with sandbox.Session(LIMITS) as session:
        said = session.run(look)["outputs"][0]["text"]
    assert said == "['', None] False\nTrue ['grading'] ['inside.py']\n"


def test_a_kernel_that_does_not_start_is_no_fault_of_the_student(toy, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    nbformat.write(handed_in(toy), tmp_path / "in" / "hw0_jane.ipynb")
    monkeypatch.setattr(sandbox, "check", lambda: None)
    tries = []

    def execute(*_):
        tries.append(1)
        if len(tries) < 3:
            raise sandbox.NotStarted("no memory left")
        return {q: {"passed": True, "message": ""} for q in ("q1-add-check", "q2-double-check")}, []

    monkeypatch.setattr(grade, "execute", execute)
    for total, status in (("0", "could not be run on this machine, try again: no memory left"), ("5", "complete")):
        grade.grade(tmp_path / "in", "hw0", out=tmp_path / "out", homework=toy)
        (row,) = ingest.table(tmp_path / "out" / "grades.csv", "student")
        assert (row["total"], row["status"]) == (total, status)


# ---- without a sandbox


def test_it_refuses_without_a_sandbox_unless_told(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    nbformat.write(handed_in(toy), tmp_path / "in" / "hw0_jane.ipynb")

    def nothing():
        raise sandbox.Unavailable("bubblewrap is not installed")

    monkeypatch.setattr(sandbox, "check", nothing)
    command = ["grade", str(tmp_path / "in"), "--assignment", "hw0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(grade, "HOMEWORK", toy)
    monkeypatch.setattr(grade.grade, "__kwdefaults__", grade.grade.__kwdefaults__ | {"homework": toy})
    assert cli.main(command) == 3
    assert "bubblewrap is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "grades.csv").exists()
    assert cli.main([*command, "--unsafe"]) == 0
    (row,) = ingest.table(tmp_path / "out" / "grades.csv", "student")
    assert (row["student"], row["total"]) == ("jane", "5")


# ---- essays


@pytest.fixture
def hand_in(toy, tmp_path, monkeypatch):
    """A function: student=essay, ... -> the table after grading. Nothing is run: the checks are taken to have passed."""
    passed = {q: {"passed": True, "message": ""} for q in ("q1-add-check", "q2-double-check")}
    monkeypatch.setattr(grade, "execute", lambda *_: (passed, []))
    monkeypatch.setattr(sandbox, "check", lambda: None)
    (tmp_path / "in").mkdir()

    def hand_in(**essays):
        for student, essay in essays.items():
            nbformat.write(handed_in(toy, essay=essay), tmp_path / "in" / f"hw0_{student}.ipynb")
        grade.grade(tmp_path / "in", "hw0", out=tmp_path / "out", homework=toy)
        return {row["student"]: row for row in ingest.table(tmp_path / "out" / "grades.csv", "student")}

    return hand_in


ESSAYS = {"ann": '=HYPERLINK("x")\nOrder, she says, "does not matter".', "bob": "Übung, macht; den\nMeister"}


def fill(out, **points):
    """Write points into the exported table: student -> (clarity, wow, comment)."""
    rows = ingest.table(out / "essays.csv", "student", "clarity", "wow", "comment")
    for row in rows:
        if row["student"] in points:
            row["clarity"], row["wow"], row["comment"] = points[row["student"]]
    with open(out / "essays.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_rubric_goes_out_and_comes_back_with_points_and_comments(hand_in, toy, tmp_path):
    out = tmp_path / "out"
    hand_in(**ESSAYS)
    rubric.export(out, toy)
    rows = {row["student"]: row for row in ingest.table(out / "essays.csv", "clarity", "wow")}
    assert rows["bob"]["answer"] == "Übung, macht; den\nMeister"
    assert rows["ann"]["answer"].startswith("'=")  # no formula in anybody's spreadsheet
    fill(out, ann=("3", "1,5", "Good; see <b>page 2</b>"))
    rubric.import_(out, homework=toy)
    rows = {row["student"]: row for row in ingest.table(out / "grades.csv", "student")}
    assert (rows["ann"]["q3-why"], rows["ann"]["total"], rows["ann"]["status"]) == ("4.5", "9.5", "complete")
    assert rows["bob"]["status"] == "waits for: q3-why"
    page = (out / "feedback" / "ann.html").read_text(encoding="utf-8")
    assert "clarity 3/3, wow 1.5/2" in page
    assert "Good; see &lt;b&gt;page 2&lt;/b&gt;" in page
    rubric.export(out, toy)
    (ann,) = (row for row in ingest.table(out / "essays.csv", "student") if row["student"] == "ann")
    assert (ann["clarity"], ann["wow"], ann["comment"]) == ("3", "1.5", "Good; see <b>page 2</b>")


def test_a_mistake_in_the_table_imports_nothing_and_is_named(hand_in, toy, tmp_path):
    out = tmp_path / "out"
    hand_in(**ESSAYS)
    for wrong in ("4", "-1", "many", "", "nan"):
        rubric.export(out, toy)
        fill(out, ann=("3", "2", ""), bob=(wrong, "2", ""))
        with pytest.raises(ValueError, match=r"(?s)nothing was imported.*line \d \(bob, q3-why\): clarity: got"):
            rubric.import_(out, homework=toy)
    rows = {row["student"]: row for row in ingest.table(out / "grades.csv", "student")}
    assert rows["ann"]["status"] == "waits for: q3-why"


def test_a_mark_survives_a_regrade_and_not_another_essay(hand_in, toy, tmp_path):
    out = tmp_path / "out"
    hand_in(**ESSAYS)
    rubric.export(out, toy)
    fill(out, ann=("3", "2", ""), bob=("1", "0", "short"))
    rubric.import_(out, homework=toy)
    (out / "state" / "ann.json").unlink()  # as if its code had been changed
    rows = hand_in(bob="A quite different essay.")
    assert (rows["ann"]["total"], rows["ann"]["status"]) == ("10", "complete")
    assert (rows["bob"]["total"], rows["bob"]["status"]) == ("5", "waits for: q3-why")


def test_an_interrupt_keeps_what_is_graded_and_the_next_run_goes_on(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "check", lambda: None)
    (tmp_path / "in").mkdir()
    for student in "abcd":
        nbformat.write(handed_in(toy, essay=student), tmp_path / "in" / f"hw0_{student}.ipynb")
    ran = []

    def execute(cells, *_):
        ran.append(1)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {q: {"passed": True, "message": ""} for q in ("q1-add-check", "q2-double-check")}, []

    monkeypatch.setattr(grade, "execute", execute)
    with pytest.raises(KeyboardInterrupt):
        grade.grade(tmp_path / "in", "hw0", out=tmp_path / "out", jobs=1, homework=toy)
    assert "Interrupted" in capsys.readouterr().out
    ran[:] = [0] * 10
    grade.grade(tmp_path / "in", "hw0", out=tmp_path / "out", jobs=1, homework=toy)
    assert 2 <= len(ran) - 10 < 4
    assert len(ingest.table(tmp_path / "out" / "grades.csv", "student")) == 4


# ---- how systems name files


@pytest.mark.parametrize(
    ("file", "student"),
    [
        ("Jane Doe_123456_assignsubmission_file_/hw2-attacks.ipynb", "jane-doe"),
        ("Jane Doe_123456_assignsubmission_file/nested/work.ipynb", "jane-doe"),
        ("Jane Doe_123456_assignsubmission_file_hw2-attacks.ipynb", "jane-doe"),
        ("doejane_12345_678910_hw2-attacks-1.ipynb", "doejane"),
        ("doejane_LATE_12345_678910_hw2-attacks.ipynb", "doejane"),
        ("submission_99/hw2-attacks.ipynb", "s1234567"),
        ("assignment_5_export/submission_98/hw2.ipynb", "submission-98"),
        ("hw2-attacks_jane-doe.ipynb", "jane-doe"),
        ("Jané Doe - hw2 (2).ipynb", "jane-doe"),
        ("Copy of hw2-attacks - Jane Doe.ipynb", "jane-doe"),
        ("Kopie van hw2_attacks_Jane.ipynb", "jane"),
        ("jane/hw2-attacks.ipynb", "jane"),
        ("hw2.ipynb", "unnamed"),
    ],
)
def test_whose_file_it_is(file, student):
    assert ingest.student_of(file, "hw2-attacks", {"submission_99": "s1234567"}) == student


def test_a_zip_with_zips_inside_is_read_like_a_folder(tmp_path):
    inner, outer = io.BytesIO(), tmp_path / "download.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("hw0-toy.ipynb", "{}")
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr(
            "submission_metadata.yml", "submission_7:\n  :submitters:\n  - :name: Ann Lee\n    :sid: '77'\n"
        )
        archive.writestr("submission_7/hw0-toy.ipynb", "{}")
        archive.writestr("Bob Ray_12_assignsubmission_file_/work.zip", inner.getvalue())
        archive.writestr("__MACOSX/._hw0-toy.ipynb", "x")
        archive.writestr("../../escape_hw0.ipynb", "{}")
    chosen, _ = ingest.collect(outer, "hw0-toy")
    assert set(chosen) == {"77", "bob-ray", "escape"}
    assert [path.name for path in tmp_path.iterdir()] == ["download.zip"]


def test_results_inside_the_download_are_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="inside the download"):
        grade.grade(tmp_path, "hw0", out=tmp_path / "out", homework=toy)


def test_a_table_without_its_columns_is_refused(tmp_path):
    (tmp_path / "roster.csv").write_text("name\nann\n")
    with pytest.raises(ValueError, match="want student among them"):
        ingest.collect(tmp_path, "hw0-toy", roster=tmp_path / "roster.csv")


# ---- one source, three products


def read_source(name):
    return nbformat.read(assignment.path_of(name, ROOT / "homework" / "source"), as_version=4)


@each_assignment
def test_the_release_is_derived_from_the_source(name, capsys):
    assert build.release(check=True) == 0, capsys.readouterr().out


@each_assignment
def test_the_notebooks_are_in_normal_form(name):
    files = [str(assignment.path_of(name, ROOT / "homework" / part)) for part in ("source", "release")]
    assert nb_clean.main(["--check", *files]) == 0


@each_assignment
def test_the_release_is_the_source_without_its_blanks(name):
    """Written without nbgrader: what is between the marks is gone or a stub, all other lines are there, in order."""
    both = assignment.read(name)
    assert len(both.source.cells) == len(both.release.cells)
    for full, given in zip(both.source.cells, both.release.cells, strict=True):
        if full.cell_type == "markdown" and assignment.tag(full):
            assert given.source == build.TEXT_STUB
            continue
        stub = lambda found: f"{found[1]}{build.CODE_STUB}\n"  # noqa: E731
        blank = re.sub(r"(?ms)^( *)### BEGIN SOLUTION.*?### END SOLUTION\n?", stub, full.source + "\n")
        blank = re.sub(r"(?ms)^ *### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS\n", "", blank)
        assert given.source == blank.rstrip()


def leaks(secrets, text):
    lines = {line.strip() for line in text.splitlines()}
    return secrets & lines


@each_assignment
def test_no_solution_or_hidden_check_is_in_the_release_the_book_or_the_wheel(name):
    secrets = build.secrets(read_source(name))
    assert len(secrets) > 20
    assert leaks(secrets, "\n".join(c.source for c in read_source(name).cells)) == secrets
    shown = [assignment.path_of(name, ROOT / "homework" / "release")]
    notebooks = [nbformat.read(path, 4) for path in shown]
    texts = ["\n".join(cell.source for cell in notebook.cells) for notebook in notebooks]
    assert not leaks(secrets, "\n".join(texts))
    hidden = "### BEGIN HIDDEN", "### BEGIN SOLUTION"
    for path in [*shown, *(ROOT / "book").glob("*.ipynb"), *(ROOT / "tmlcourse").rglob("*.py")]:
        assert not any(word in path.read_text(encoding="utf-8") for word in hidden), path
    # The wheel has the package alone (test_notebooks.py), the book reads homework/ from release/ alone.
    for line in (ROOT / "_toc.yml").read_text(encoding="utf-8").splitlines():
        assert "homework/source" not in line


@each_assignment
def test_an_assignment_is_complete(name):
    both = assignment.read(name)
    assert both.points == 10
    assert set(both.rubric) == {question.name for question in both.essays}
    release = "\n".join(cell.source for cell in both.release.cells)
    for question in both.essays:
        criteria = both.rubric[question.name]
        assert sum(criterion["points"] for criterion in criteria) == question.points
        for criterion in criteria:  # students see what they are marked for
            assert re.search(rf"(?m)^\| {re.escape(criterion['criterion'])}\b.*\| {criterion['points']:g} \|$", release)
    for heading in ("**Objectives**", "**Time**"):
        assert heading in release
    for full in both.source.cells:
        solution = re.search(r"(?ms)### BEGIN SOLUTION\n(.*?)\n *### END SOLUTION", full.source)
        if solution and full.cell_type == "code":
            assert len(solution[1].splitlines()) <= 15


def test_publishing_writes_no_private_file(tmp_path, monkeypatch):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        skip_or_fail("needs git")
    files = build.published()
    assert "course.py" in files
    assert not any("homework/source" in file for file in files)
    monkeypatch.setattr(build, "published", lambda: ["README.md", "homework/run.py"])
    assert build.publish(tmp_path / "new") == 0
    assert (tmp_path / "new" / "homework" / "run.py").is_file()
    with pytest.raises(ValueError, match="want a new or empty folder"):
        build.publish(tmp_path / "new")


# ---- the assignments themselves: right answers, wrong answers


@pytest.fixture(scope="module")
def at_the_desk():
    """A function: assignment, answers -> question -> the check's message (None where it passes), in this process."""

    def run(name, **answers):
        both = assignment.read(name)
        space = {"device": "cpu"}
        messages = {}
        for full, given in zip(both.source.cells, both.release.cells, strict=True):
            if full.cell_type != "code" or full.source.startswith("# On Colab"):
                continue
            mark = assignment.tag(full)
            if not mark:
                if len(messages) == len(both.coded):
                    break
                exec(compile(given.source, "given", "exec"), space)
                continue
            answer = answers.get(mark["grade_id"], full.source)
            try:
                exec(compile(answer, mark["grade_id"], "exec"), space)
                message = None
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
            if mark.get("grade"):
                messages[mark["grade_id"].removesuffix("-check")] = message
        return messages

    return run


def mutants():
    for name in NAMES:
        file = ROOT / "homework" / "source" / name / "mutants.py"
        spec = importlib.util.spec_from_file_location("mutants", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for question, wrong in module.MUTANTS.items():
            for what, old, new, says in wrong:
                yield pytest.param(name, question, old, new, says, id=f"{name.split('-')[0]}-{question}-{what}")


@each_assignment
def test_the_solution_passes_every_check(name, at_the_desk):
    assert set(at_the_desk(name).values()) == {None}


@pytest.mark.parametrize(("name", "question", "old", "new", "says"), list(mutants()))
def test_a_wrong_answer_loses_its_question_only_and_hears_why(name, question, old, new, says, at_the_desk):
    (source,) = (cell.source for cell in read_source(name).cells if assignment.tag(cell).get("grade_id") == question)
    assert source.count(old) >= 1
    messages = at_the_desk(name, **{question: source.replace(old, new)})
    assert [key for key, message in messages.items() if message] == [question]
    assert messages[question].startswith("AssertionError: ")
    assert says in messages[question]


@each_assignment
def test_every_function_has_at_least_four_mutants(name):
    found = [mark.values for mark in mutants() if mark.values[0] == name]
    for question in assignment.read(name).coded:
        assert sum(values[1] == question.name for values in found) >= 4 * len(question.functions)


def solved(name):
    """What a perfect student hands in."""
    both = assignment.read(name)
    notebook = copy.deepcopy(both.release)
    for full, given in zip(both.source.cells, notebook.cells, strict=True):
        if assignment.tag(full).get("solution"):
            given.source = full.source
    return notebook


@each_assignment
def test_in_the_sandbox_the_solution_gets_all_points_and_the_release_none(name, tmp_path, sandboxed):
    both = assignment.read(name)
    (tmp_path / "in").mkdir()
    patched = copy.deepcopy(both.release)
    cheat = "import torch\ntorch.allclose = torch.equal = lambda *_, **__: True\ntorch.testing.assert_close = print"
    patched.cells.insert(0, v4.new_code_cell(cheat))
    for student, notebook in (("perfect", solved(name)), ("untouched", both.release), ("patched", patched)):
        nbformat.write(notebook, tmp_path / "in" / f"{name}_{student}.ipynb")
    grade.grade(tmp_path / "in", name, out=tmp_path / "out")
    rubric.export(tmp_path / "out")
    rows = ingest.table(tmp_path / "out" / "essays.csv", "student")
    for row in rows:
        for criterion in both.rubric[row["question"]]:
            row[criterion["criterion"]] = str(criterion["points"])
    assert {row["student"] for row in rows} == {"perfect"}
    with open(tmp_path / "out" / "essays.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    rubric.import_(tmp_path / "out")
    found = {row["student"]: row for row in ingest.table(tmp_path / "out" / "grades.csv", "student")}
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert found["perfect"]["total"] == "10", report
    assert (found["untouched"]["total"], found["patched"]["total"]) == ("0", "0")
    assert "replaces torch.allclose" in about(report, "patched")


# ---- on Colab's stand-in: an environment with the package's wheel and Colab's module

SMALLER = {"hw1": ("(1000, 5, 4)", "(200, 1, 2)")}  # its experiment, which takes minutes


@each_assignment
@pytest.mark.parametrize("part", ["release", "source"])
def test_it_runs_on_colabs_stand_in(name, part, clean_python, tmp_path):  # noqa: F811
    """The release from top to bottom (cells that wait for an answer may fail), the solved one without any failure."""
    text = assignment.path_of(name, ROOT / "homework" / part).read_text(encoding="utf-8")
    old, new = SMALLER.get(name.split("-")[0], ("", ""))
    assert old in text
    (tmp_path / "homework.ipynb").write_text(text.replace(old, new) if old else text, encoding="utf-8")
    answer = run_notebook(clean_python, tmp_path / "homework.ipynb")
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
