"""The chapters: their form, their text, and that each runs alone from a clean environment with the package's wheel."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import nb_clean
import nbformat
import pytest
import stamp
from clean_environment import KERNEL, closure, dependencies, make, pretend_colab, source_tree, wheel
from conftest import skip_or_fail
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
CELL_SECONDS = 300
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def run(*command, cwd=ROOT, **variables):
    """A finished command, its output as text; a variable that is None is taken out of the environment."""
    environment = {key: value for key, value in (os.environ | variables).items() if value is not None}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, text=True, capture_output=True)


# ---- the form of every notebook and file


def test_notebooks_are_in_normal_form():
    assert nb_clean.main(["--check", *map(str, sorted((ROOT / "book").glob("*.ipynb")))]) == 0


def test_setup_cells_and_links_follow_from_the_one_setting():
    assert stamp.main(["--check"]) == 0


@pytest.mark.parametrize("command", [("check", "--output-format", "concise"), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    answer = run(sys.executable, "-m", "ruff", *command, "--no-cache", ".")
    assert answer.returncode == 0, answer.stdout + answer.stderr


# ---- the rules for a chapter's text; each takes a notebook and returns what is wrong with it

FORBIDDEN = {
    "a fenced directive (Colab shows it raw)": r"(?m)^\s*(`{3,}|:{3,})\s*\{",
    "a code block with a role's braces": r"(?m)^\s*~{3,}\s*\{",
    r"\label (use $$...$$ (label))": r"\\label\b",
    r"\newcommand": r"\\(re)?newcommand\b|\\def\\",
    "a bare align (use aligned inside $$)": r"\\begin\{(align|equation|gather|eqnarray)\*?\}",
    "a MyST comment or block break": r"(?m)^(%|\+\+\+)",
    "a MyST target": r"(?m)^\([\w-]+\)=",
}
ROLE = re.compile(r"\{([\w:]+)\}`([^`]*)`")
# `cite:alp` is author and year without brackets: the text has them, so that it reads well on Colab, too.
ALLOWED_ROLES = {"cite:alp", "eq", "numref"}
SHOWS = re.compile(r"\b(plot\.\w+\(|plt\.show\(|\.imshow\()")


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shape_problems(notebook):
    headings = "\n".join(line for text in markdown(notebook) for line in text.splitlines() if line.startswith("#"))
    yield from (
        f"no heading with {name!r}" for name in ("In one page", "Exercises", "Further reading") if name not in headings
    )
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        yield "the first cell is not the title"
    if sum(len(re.findall(r"(?m)^# ", text)) for text in markdown(notebook)) != 1:
        yield "not exactly one title (a heading with one #)"


def length_problems(notebook):
    lengths = sorted(len(cell.source.splitlines()) for cell in code(notebook))
    if statistics.median(lengths) > 7:
        yield f"the median code cell has {statistics.median(lengths)} lines, want at most 7"
    if sum(length <= 20 for length in lengths) < 0.9 * len(lengths):
        yield f"fewer than nine in ten code cells have at most 20 lines: {lengths}"
    if lengths[-1] > 40:
        yield f"a code cell has {lengths[-1]} lines, want at most 40"


def markup_problems(notebook):
    for text in markdown(notebook):
        yield from (f"{what}: {text[:60]!r}" for what, pattern in FORBIDDEN.items() if re.search(pattern, text))
        for found in ROLE.finditer(text):
            before = text[: found.start()].rpartition("\n\n")[2]
            if found[1] not in ALLOWED_ROLES:
                yield f"the role {found[1]}, which Colab shows raw: {text[:60]!r}"
            elif before.count("(") <= before.count(")"):
                yield f"{found[0]} stands outside brackets: {text[:60]!r}"


def citation_problems(notebook, bibliography):
    keys = set(re.findall(r"(?m)^@\w+\{([^,\s]+),", bibliography))
    for role, target in ROLE.findall("\n".join(markdown(notebook))):
        if role.startswith("cite"):
            unknown = {key.strip() for key in target.split(",")} - keys
            yield from (f"{key} is not in references.bib" for key in sorted(unknown))


def figure_problems(notebook):
    for cell in code(notebook):
        # An explorer carries the alt text of its frames itself.
        shown = SHOWS.search(cell.source) and "widgets.explorer(" not in cell.source
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if shown and len(alt) < 20:
            yield f"a figure without alt text: {cell.source[:60]!r}"


def claim_problems(notebook):
    marked = [cell for cell in code(notebook) if "NBVAL_CHECK_OUTPUT" in cell.source]
    if not marked:
        yield "no cell with # NBVAL_CHECK_OUTPUT states a claim"
    yield from (f"a claim without stored output: {cell.source[:60]!r}" for cell in marked if not cell.outputs)


def problems(notebook, bibliography):
    rules = (shape_problems, length_problems, markup_problems, figure_problems, claim_problems)
    return [problem for rule in rules for problem in rule(notebook)] + list(citation_problems(notebook, bibliography))


@each_chapter
def test_the_rules_for_a_chapter(chapter):
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    assert problems(nbformat.read(chapter, as_version=4), bibliography) == []


def good_chapter():
    true = v4.new_output("stream", name="stdout", text="True\n")
    claim = v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(True)", outputs=[true])
    alt = {"mystnb": {"image": {"alt": "A rising curve: the loss grows with every step."}}}
    text = "See ({cite:alp}`known2020`), ({eq}`loss`).\n\n$$\\begin{aligned}x&=1\\end{aligned}$$ (loss)"
    return v4.new_notebook(cells=[
        v4.new_markdown_cell("# Title"), v4.new_markdown_cell(text), claim,
        v4.new_code_cell("plot.images(x)", metadata=alt),
        *(v4.new_markdown_cell(f"## {name}") for name in ("In one page", "Exercises", "Further reading"))])  # fmt: skip


def test_equations_and_figures_have_names_of_their_own():
    """Over the whole book: Sphinx takes the first of two."""
    names = []
    for chapter in CHAPTERS:
        notebook = nbformat.read(chapter, 4)
        names += [label for text in markdown(notebook) for label in re.findall(r"(?m)^\$\$ \(([\w-]+)\)$", text)]
        names += [cell.metadata.get("mystnb", {}).get("figure", {}).get("name", "") for cell in code(notebook)]
    names = [name for name in names if name]
    assert len(names) > 50 and not {name for name in names if names.count(name) > 1}


LINES = ("Goal", "Knows", "May", "When")
CARD = re.compile(
    r"(?m)^\| \d+ \[[^\]]+\]\(([\w-]+)\.ipynb\) \| " + " ".join(rf"\*\*{n}:\*\* (.*?)\." for n in LINES) + r" \|$"
)


def test_every_chapter_begins_with_its_attackers_card():
    """The line of chapter 1's table, word for word."""
    opening = "\n".join(markdown(nbformat.read(ROOT / "book" / "01-threats.ipynb", 4)))
    cards = {name: texts for name, *texts in CARD.findall(opening)}
    assert set(cards) == {chapter.stem for chapter in CHAPTERS if chapter.stem[0].isdigit()} - {"01-threats"}
    for name, texts in cards.items():
        lines = markdown(nbformat.read(ROOT / "book" / f"{name}.ipynb", 4))[0].splitlines()
        assert [f"| **{n}** | {text} |" in lines for n, text in zip(LINES, texts, strict=True)] == [True] * 4, name


@pytest.mark.parametrize("source, problem", [
    ("# Second title", "exactly one title"),
    ("```{math}\nx\n```", "fenced directive"),
    (":::{note}\nx\n:::", "fenced directive"),
    ("$$x \\label{a}$$", "label"),
    ("$\\newcommand{\\a}{b}$", "newcommand"),
    ("\\begin{align}x\\end{align}", "align"),
    ("(target)=\n## Heading", "MyST target"),
    ("({ref}`a`)", "the role ref"),
    ("({cite:t}`known2020`)", "the role cite:t"),
    ("as {eq}`loss` says", "outside brackets"),
    ("({cite:alp}`known2020, lost1999`)", "lost1999 is not in"),
])  # fmt: skip
def test_the_rules_find_text_that_breaks_them(source, problem):
    chapter = good_chapter()
    assert problems(chapter, "@misc{known2020,\n}") == []
    chapter.cells.append(v4.new_markdown_cell(source))
    (found,) = problems(chapter, "@misc{known2020,\n}")
    assert problem in found


@pytest.mark.parametrize("source, problem", [
    ("fig = plot.images(x)", "alt text"),
    ("x = 1\n" * 41, "41 lines"),
    ("print(1)  # NBVAL_CHECK_OUTPUT", "without stored output"),
])  # fmt: skip
def test_the_rules_find_cells_that_break_them(source, problem):
    chapter = good_chapter()
    chapter.cells.append(v4.new_code_cell(source))
    assert any(problem in found for found in problems(chapter, "@misc{known2020,\n}"))


def test_the_rules_find_what_is_missing():
    chapter = good_chapter()
    chapter.cells = [v4.new_code_cell("x = 1\n" * 8)] * 3
    found = "; ".join(problems(chapter, ""))
    for problem in ("'In one page'", "'Exercises'", "'Further reading'", "not the title", "median", "no cell with"):
        assert problem in found


# ---- every chapter runs, alone, as on Colab


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The package's wheel."""
    return wheel(tmp_path_factory.mktemp("wheel"))


def install(python, package):
    """Unpack a wheel into an environment."""
    answer = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", package)
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="session")
def clean_python(package, tmp_path_factory):
    """The Python of an environment with the wheel, what it needs, a kernel, and a stand-in for Colab's module."""
    python = make(tmp_path_factory.mktemp("clean"), closure([*dependencies(), *KERNEL]))
    pretend_colab(python)
    install(python, package)
    return python


def run_notebook(python, notebook, **variables):
    """Run a notebook by nbval, alone in its folder; marked cells are compared with their stored output."""
    nbval = ("--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}", "-p", "no:cacheprovider")
    apart = {"PYTHONPATH": None, "PYTEST_ADDOPTS": None, "PYTEST_XDIST_WORKER": None, "TQDM_DISABLE": "1"}
    return run(python, "-m", "pytest", "-q", *nbval, notebook.name, cwd=notebook.parent, **apart, **variables)


def test_the_wheel_holds_the_package_and_nothing_else(package):
    names = zipfile.ZipFile(package).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"tmlcourse"}
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tmlcourse").rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert inside <= set(names)


def test_the_clean_environment_has_the_package_and_no_extras(clean_python, tmp_path):
    see = "import sys, tmlcourse; print('google.colab' in sys.modules, tmlcourse.__file__)"
    answer = run(clean_python, "-c", see, cwd=tmp_path, PYTHONPATH=None)
    assert answer.returncode == 0, answer.stderr
    colab, file = answer.stdout.split(maxsplit=1)
    assert colab == "True"
    assert Path(file.strip()).is_relative_to(clean_python.parent.parent)
    for extra in ("foolbox", "jupyter_book", "hypothesis"):
        assert "ModuleNotFoundError" in run(clean_python, "-c", f"import {extra}", cwd=tmp_path, PYTHONPATH=None).stderr


@each_chapter
def test_the_chapter_runs_alone_from_a_clean_environment(chapter, clean_python, tmp_path):
    shutil.copy(chapter, tmp_path)
    answer = run_notebook(clean_python, tmp_path / chapter.name)
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {chapter.name}, "the chapter left files behind"


# ---- the setup cell installs the package on Colab and changes nothing that is there


def installed(python):
    """What pip sees: name -> version."""
    answer = run(python, "-m", "pip", "list", "--format", "json", PYTHONPATH=None)
    return {line["name"].lower(): line["version"] for line in json.loads(answer.stdout)}


SOLVERS = ("highspy", "pulp")


@pytest.fixture
def colab_python(tmp_path):
    """The Python of an environment with what Colab has: all of the base dependencies but the solvers, and no tmlcourse."""
    python = make(tmp_path / "colab", closure([*dependencies(), *KERNEL], without=SOLVERS))
    pretend_colab(python)
    return python


@pytest.fixture
def cloned(tmp_path):
    """Environment variables under which git finds the working tree at the repository's public address."""
    if not shutil.which("git"):
        skip_or_fail("needs git")
    url, branch = stamp.repository()
    folder = source_tree(tmp_path / "repository")
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init", "-q", "-b", branch), ("add", "."), (*identity, "commit", "-q", "-m", "tree")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{folder.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": url}


def test_on_colab_the_setup_cell_installs_the_package_and_solvers_and_changes_nothing_else(
    colab_python, cloned, tmp_path
):
    cell = v4.new_code_cell(stamp.setup_cell(*stamp.repository()))
    (tmp_path / "alone").mkdir()
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "alone" / "setup.ipynb")

    before = installed(colab_python)
    assert "tmlcourse" not in before
    assert not before.keys() & set(SOLVERS)
    # First only asked: an installation that would replace torch must fail here, before it does.
    requirement = re.search(r'"(tmlcourse @ [^"]+)"', cell.source)[1]
    ask = ("-m", "pip", "install", "-q", "--dry-run", "--report", "-")
    asked = run(colab_python, *ask, requirement, **cloned, PYTHONPATH=None)
    assert asked.returncode == 0, asked.stderr
    assert {item["metadata"]["name"].lower() for item in json.loads(asked.stdout)["install"]} == {"tmlcourse", *SOLVERS}

    answer = run_notebook(colab_python, tmp_path / "alone" / "setup.ipynb", **cloned)
    assert answer.returncode == 0, answer.stdout[-4000:]
    after = installed(colab_python)
    assert after.keys() - before.keys() == {"tmlcourse", *SOLVERS}
    assert {name: after[name] for name in before} == before
