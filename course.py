#!/usr/bin/env python3
"""Trustworthy Machine Learning: one script sets everything up and runs it.

usage: python3 course.py COMMAND [ARGUMENT ...]

Every command first makes what it needs: a virtual environment in this folder with the exact versions of
constraints.txt and the package itself. That takes minutes once and no time when nothing has changed; it can be
interrupted at any moment and started again. Python 3.10 or later and a package index are all it needs.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent
OLDEST = (3, 10)
BUILD = ("-c", "from jupyter_book.cli.main import main; main()", "build", ".")
BENCH_PINS = ("torch", "torchvision", "numpy")
WINDOWS = os.name == "nt"


def digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def environment(name, extras, pins):
    """The Python of the virtual environment `name`: made when missing, renewed when what it depends on has changed."""
    folder = ROOT / name
    python = folder / ("Scripts/python.exe" if WINDOWS else "bin/python")
    stamp = folder / "course-stamp"
    version = "{}.{}".format(*sys.version_info)
    key = version + " " + digest(str(ROOT), extras, pins, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def state():
        return stamp.read_text(encoding="utf-8") if stamp.is_file() else ""

    if state() == key and python.exists():
        return python
    # Two commands started at once must not install into one folder; the lock goes away with its process.
    lock = sqlite3.connect(str(ROOT / ".venv.lock"), timeout=3600)
    try:
        lock.execute("BEGIN EXCLUSIVE")
        if state() == key and python.exists():
            return python
        if folder.exists() and not state():
            sys.exit(f"{name}: this folder was not made by course.py. Rename or remove it, then run the command again.")
        print(f"Setting up {name} (several minutes the first time) ...", flush=True)
        usable = python.exists() and state().startswith(version + " ")
        if not usable and folder.exists():  # another Python's, or an install that was interrupted
            shutil.rmtree(str(folder))
        folder.mkdir(exist_ok=True)
        stamp.write_text("unfinished", encoding="utf-8")
        if not usable:
            try:
                venv.EnvBuilder(with_pip=True, symlinks=not WINDOWS).create(str(folder))
            except subprocess.CalledProcessError:
                sys.exit(
                    "This Python makes no virtual environments. On Debian or Ubuntu: sudo apt install python3-venv"
                )
        constraints = folder / "constraints.txt"
        constraints.write_text(pins, encoding="utf-8")
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(constraints), "--editable", f".[{extras}]"]
        if subprocess.run([str(python), *install], cwd=str(ROOT)).returncode:
            sys.exit("The installation failed: see pip's message above, then run the same command again.")
        stamp.write_text(key, encoding="utf-8")
    finally:
        lock.close()
    return python


def course_environment():
    return environment(".venv", "book,homework,test", (ROOT / "constraints.txt").read_text(encoding="utf-8"))


def run(python, *command, cwd=None, **variables):
    """Run Python with a command line in the checkout, its environment's programs first on the path; the exit status."""
    path = str(python.parent) + os.pathsep + os.environ.get("PATH", "")
    command = [str(python), *[str(part) for part in command]]
    # Torch's threads would wait for each other by spinning: beside another busy process that is many times slower.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.run(command, cwd=cwd or str(ROOT), env={**defaults, "PATH": path, **variables}).returncode


def run_inputs():
    """A hash of all that a chapter's output depends on besides its cells: the package, the versions, the data."""
    files = [path for path in sorted((ROOT / "tmlcourse").rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    parts = [str(path.relative_to(ROOT)) + hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tmlcourse"
    for folder in (os.environ.get("TMLCOURSE_DATA", ""), str(cache)):
        parts += [folder, *(sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else [])]
    return digest(sys.version, (ROOT / "constraints.txt").read_text(encoding="utf-8"), *parts)


def drop_stale_outputs():
    """The execution cache knows the cells' text only: forget it when anything else that counts has changed."""
    mark, inputs = ROOT / "_build" / "run-inputs", run_inputs()
    if not mark.is_file() or mark.read_text(encoding="utf-8") != inputs:
        shutil.rmtree(str(ROOT / "_build" / ".jupyter_cache"), ignore_errors=True)
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(inputs, encoding="utf-8")


def first_heading(file):
    """The title of a page, which the side of every other page repeats."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return next((line for line in text.splitlines() if line.startswith("# ")), "")


def frame_inputs():
    """A hash of what all pages share: settings, extensions, styles, sources, titles. A change of it rewrites them all."""
    folders = [path for name in ("_ext", "_static") for path in (ROOT / "book" / name).rglob("*")]
    files = [
        ROOT / "_config.yml",
        ROOT / "_toc.yml",
        ROOT / "constraints.txt",
        *(ROOT / "book").glob("*.bib"),
        *folders,
    ]
    parts = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.suffix != ".pyc" and file.is_file()
    ]
    pages = sorted([*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")])
    return digest(run_inputs(), *parts, *(first_heading(page) for page in pages))


def built_pages():
    """Page -> hash of the built page."""
    html = ROOT / "_build" / "html"
    files = {path.relative_to(html).with_suffix("").as_posix(): path for path in html.rglob("*.html")}
    return {page: hashlib.sha256(path.read_bytes()).hexdigest() for page, path in files.items()}


def book(arguments):
    """run every chapter, build the book into _build/html and check the finished pages"""
    python = course_environment()
    os.environ.pop("MPLBACKEND", None)  # the kernel chooses its own
    drop_stale_outputs()
    # Matplotlib lists the machine's fonts on its first import and says so on stderr, which would fail the build.
    run(python, "-c", "import matplotlib.font_manager")
    # -W: a chapter that fails, fails the build.
    build, mark = [*BUILD, "-W", "-n", "--keep-going"], ROOT / "_build" / "frame-inputs"
    inputs, before = frame_inputs(), built_pages()
    whole = not mark.is_file() or mark.read_text(encoding="utf-8") != inputs
    mark.unlink(missing_ok=True)  # comes back when all is well: what an unfinished build has read may hide warnings
    # In UTC, because the execution cache keeps its times without a zone.
    quiet = {"TQDM_DISABLE": "1", "TZ": "UTC"}
    # One thread each, as in the tests.
    run(python, "tools/execute.py", OMP_NUM_THREADS="1", **quiet)
    status = run(python, *build, *["--all"] * whole, *arguments, **quiet)
    if status:
        print("The book was not built. What a chapter said when it failed: _build/html/reports/")
        return status
    changed = [page for page, content in built_pages().items() if before.get(page) != content]
    # Pages that are as they were have passed before.
    only = {} if whole else {"TMLCOURSE_PAGES": " ".join(changed)}
    side_by_side = [] if whole else ["-n", "2"]
    checks = ("-m", "built", "tests/test_book.py", "tests/test_browser.py", *side_by_side)
    status = run(python, "-m", "pytest", *checks, **only)
    if not status:
        mark.write_text(inputs, encoding="utf-8")
    print("The book: " + (ROOT / "_build" / "html" / "index.html").as_uri())
    return status


def test(arguments):
    """run the tests; further arguments go to pytest"""
    # One thread each: two workers that both use both cores take turns at waiting. What stays together: tests/conftest.py.
    workers = ("-n", "2", "--no-loadscope-reorder")
    return run(course_environment(), "-m", "pytest", *workers, *arguments, OMP_NUM_THREADS="1")


def lab(arguments):
    """open JupyterLab on the chapters"""
    return run(course_environment(), "-m", "jupyterlab", "book", *arguments)


def bench(arguments):
    """compare with the peers: every bar in one table (--quick, --only, --out), or one file of benchmarks/ with its options"""
    wanted = re.compile("(" + "|".join(BENCH_PINS) + ")==")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    python = environment(".venv-bench", "bench", "\n".join(line for line in lines if wanted.match(line)) + "\n")
    if arguments and not arguments[0].startswith("-"):
        return run(python, *arguments, TQDM_DISABLE="1")
    return run(python, "benchmarks/bars.py", *arguments, TQDM_DISABLE="1")


def clean_notebooks(arguments):
    """put the notebooks into their one normal form; --check only tells"""
    return run(course_environment(), "tools/nb_clean.py", *arguments, *sorted((ROOT / "book").glob("*.ipynb")))


def stamp(arguments):
    """write the repository's address from _config.yml into the setup cells and the README"""
    return run(course_environment(), "tools/stamp.py", *arguments)


def links(arguments):
    """ask every address that the book links to whether it still answers (runs the chapters that have not run yet)"""
    return run(course_environment(), *BUILD, "--builder", "linkcheck", "--quiet", *arguments, TQDM_DISABLE="1")


def slides(arguments):
    """make the slides of chapters (slides 3 8), or of all, into _build/slides"""
    return run(course_environment(), "tools/slides.py", *arguments)


def pdf(arguments):
    """print the built book into one PDF, through Chromium or Chrome"""
    return run(course_environment(), "tools/pdf.py", *arguments)


def homework(arguments):
    """release, grade and publish the homework (see homework/README.md)"""
    # In the folder where the command was given, so that a download is found there.
    return run(course_environment(), ROOT / "homework" / "run.py", *arguments, cwd=os.getcwd())


def retrain(arguments):
    """train a shipped network again and compare: retrain NAME"""
    return run(course_environment(), "-m", "tmlcourse.pretrained", "retrain", *arguments)


COMMANDS = {
    "book": book,
    "test": test,
    "lab": lab,
    "bench": bench,
    "clean-notebooks": clean_notebooks,
    "stamp": stamp,
    "pdf": pdf,
    "slides": slides,
    "links": links,
    "homework": homework,
    "retrain": retrain,
}


def main(arguments):
    if sys.version_info < OLDEST:
        sys.exit("The course needs Python {}.{} or later, and this is Python {}.{}.".format(*OLDEST, *sys.version_info))
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        for name, function in COMMANDS.items():
            print(f"  {name:16} {function.__doc__}")
        return 2 if arguments else 0
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("\nInterrupted. The same command starts again where that is possible.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
