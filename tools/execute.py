#!/usr/bin/env python3
"""Run the chapters that have changed, as many at a time as there are cores, and keep what they show for the book's build.

usage: execute.py        run by `python3 course.py book`

A chapter that fails is not kept: the build runs it once more, says what went wrong and stops.
"""

import os
from pathlib import Path

import yaml
from joblib import Parallel, delayed
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

ROOT = Path(__file__).resolve().parent.parent


def execute(uri, folder, timeout):
    """Run one notebook that the cache knows of; (its name, seconds, or None when it failed)."""
    cache = get_cache(folder)
    done = load_executor("local-serial", cache).run_and_cache(filter_uris=[uri], timeout=timeout).succeeded
    record = cache.get_cached_project_nb(uri) if done else None
    return Path(uri).stem, record and record.data["execution_seconds"]


def main(root=ROOT):
    timeout = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["execute"]["timeout"]
    folder = str(root / "_build" / ".jupyter_cache")  # where Jupyter Book looks
    cache = get_cache(folder)
    chapters = [cache.add_nb_to_project(str(chapter)).uri for chapter in (root / "book").glob("*.ipynb")]
    # The longest first, so that none is left over at the end.
    todo = sorted((record.uri for record in cache.list_unexecuted(chapters)), key=os.path.getsize, reverse=True)
    together = Parallel(n_jobs=max(1, min(len(todo), os.cpu_count() or 1)), return_as="generator_unordered")
    for name, seconds in together(delayed(execute)(uri, folder, timeout) for uri in todo):
        print(f"{name}: " + ("failed" if seconds is None else f"{seconds:.0f} s"), flush=True)


if __name__ == "__main__":
    main()
