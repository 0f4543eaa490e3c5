"""The commands of `python3 course.py homework`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .sandbox import Limits, Unavailable

WHY = """\
Student code is untrusted: it could read your files and the gradebook, use the network, or fill the disk.
Use a Linux machine or container with bubblewrap, or say --unsafe to run it all the same."""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="course.py homework", description="Graded homework: see homework/README.md.")
    commands = main.add_subparsers(dest="command", required=True)

    release = commands.add_parser("release", help="derive the students' notebooks from the sources")
    release.add_argument("--check", action="store_true", help="change nothing, exit 1 where one is not up to date")

    publish = commands.add_parser("publish", help="write the public copy of the repository, without sources")
    publish.add_argument("folder", type=Path)

    grade = commands.add_parser("grade", help="grade a folder or zip of submissions")
    grade.add_argument("downloads", type=Path, help="as Moodle, Canvas, Gradescope or Colab deliver it")
    grade.add_argument("--assignment", required=True, help="hw2, or hw2-attacks")
    grade.add_argument("--out", type=Path, help="folder of results (default: next to the download)")
    grade.add_argument("--mapping", type=Path, help="CSV with columns file, student")
    grade.add_argument("--roster", type=Path, help="CSV with a column student: everyone in the class")
    grade.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="notebooks run at once")
    grade.add_argument("--seconds", type=float, default=Limits.seconds, help="time of one submission")
    grade.add_argument("--cell-seconds", type=float, default=Limits.cell, help="time of one cell")
    grade.add_argument("--memory", type=float, default=Limits.memory / 2**30, help="GiB of one submission")
    grade.add_argument("--unsafe", action="store_true", help="without a sandbox: student code can do what you can do")

    rubric = commands.add_parser("rubric", help="essays: a table out, and back with points").add_subparsers(
        dest="way", required=True
    )
    for way in ("export", "import"):
        one = rubric.add_parser(way)
        one.add_argument("results", type=Path, help="the folder of results that `grade` wrote")
        if way == "import":
            one.add_argument("file", type=Path, nargs="?", help="default: essays.csv in that folder")
    return main


def run(options: argparse.Namespace) -> int:
    from . import build, grade, rubric

    if options.command == "release":
        return build.release(check=options.check)
    if options.command == "publish":
        return build.publish(options.folder)
    if options.command == "rubric":
        return (
            rubric.export(options.results) if options.way == "export" else rubric.import_(options.results, options.file)
        )
    limits = Limits(cell=options.cell_seconds, seconds=options.seconds, memory=int(options.memory * 2**30))
    out = options.out or options.downloads.resolve().with_name(options.downloads.stem + "-graded")
    return grade.grade(
        options.downloads, options.assignment, out=out, mapping=options.mapping, roster=options.roster,
        jobs=max(1, options.jobs), limits=limits, unsafe=options.unsafe,
    )  # fmt: skip


def main(arguments=None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except Unavailable as error:
        print(f"Not graded: {error}.\n{WHY}", file=sys.stderr)
        return 3
    except (ValueError, FileNotFoundError) as error:
        print(f"course.py homework: {error}", file=sys.stderr)
        return 2
