"""The exact error of a network on a whole test set, image by image, between what attacks break and what the dual certifies.

    python3 course.py bench benchmarks/exact_error.py wong-kolter-mnist-0.1 --jobs 2 --out table.csv.gz

Interrupt it when you like: what was decided stands in --work (one file for each part of the test set, and one for the
programs of the part in progress), and the same command goes on from there. At the end it checks, for every image, that PGD
breaks only what is exactly broken, and that only what the dual leaves uncertified is broken; then it writes the table that
`tmlcourse.certify.shipped_table` reads.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from tmlcourse import data, pretrained
from tmlcourse.attacks import pgd
from tmlcourse.certify import margins, tally, verify
from tmlcourse.certify.summary import COLUMNS
from tmlcourse.threat import Linf


def part(model, x, y, first, eps, box, programs, limit, jobs):
    """The table of some images: the dual (never cut to the box, as published), PGD, and the verdicts."""
    dual = margins(model, x, y, eps, method="dual", box=None).scatter(1, y[:, None], torch.inf).amin(1)
    x_adv = pgd(model, x, y, Linf(eps), steps=40, alpha=eps / 10, stop_early=True, seed=0)
    with torch.no_grad():
        clean, broken = model(x).argmax(1) != y, model(x_adv).argmax(1) != y
    verdicts = verify(model, x, y, eps, box=box, time_limit=limit, n_jobs=jobs, resume=programs)
    rows = pd.DataFrame(
        [(v.status, v.method, v.margin, v.reached, v.seconds) for v in verdicts], columns=list(COLUMNS[5:])
    )
    front = {"image": range(first, first + len(x)), "label": y.tolist(), "clean_error": clean.int().tolist(),
             "pgd_error": broken.int().tolist(), "dual_margin": dual.tolist()}  # fmt: skip
    return pd.concat([pd.DataFrame(front), rows], axis=1)


def check(table):
    """Broken by PGD within exactly broken within uncertified, image by image."""
    vulnerable, robust = table.status == "vulnerable", table.status == "robust"
    assert not (robust & (table.pgd_error + table.clean_error > 0)).any(), "an attack broke a certificate"
    assert not (vulnerable & (table.dual_margin > 1e-4)).any(), "a counterexample broke the dual's certificate"
    assert not (robust & (table.margin <= 0)).any() and not (vulnerable & (table.reached >= 0)).any()


def report(table):
    n, status = len(table), table.status.value_counts()
    wrong, open_ = status.get("vulnerable", 0), status.get("unknown", 0)
    uncertified = int((table.dual_margin <= 0).sum())
    for says, count in (("clean error", table.clean_error.sum()), ("PGD-40 error", table.pgd_error.sum()),
                        ("exact error, at least", wrong), ("exact error, at most", wrong + open_),
                        ("uncertified by the dual", uncertified)):  # fmt: skip
        print(f"{says:26} {count:6d} of {n}   {100 * count / n:6.2f} %")
    print(tally(list(table.itertuples())).to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=pretrained.names())
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--images", type=int, help="the first ones only")
    parser.add_argument("--no-box", action="store_true", help="let adversarial pixels leave [0, 1]")
    parser.add_argument("--limit", type=float, help="seconds of programs an image; none without")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int, default=250, help="images at once")
    parser.add_argument("--work", type=Path, help="folder of what is done so far; <name>-exact without")
    parser.add_argument("--out", type=Path, help="where the table goes (.csv or .csv.gz)")
    options = parser.parse_args()
    model = pretrained.load(options.name)
    recipe = pretrained.RECIPES.get(options.name)
    test = data.load(recipe.data if recipe else "mnist", n=options.images)
    box = None if options.no_box else (0.0, 1.0)
    work = options.work or Path(f"{options.name}-exact")
    work.mkdir(parents=True, exist_ok=True)
    tables = []
    for first in range(0, len(test), options.part):
        some = test[first : first + options.part]
        path = work / f"{first:06d}-{len(some)}-{options.eps:g}-{'free' if box is None else 'box'}.csv"
        if not path.exists():
            began = time.perf_counter()
            programs = work / "programs.jsonl"
            table = part(model, some.x, some.y, first, options.eps, box, programs, options.limit, options.jobs)
            table.to_csv(path.with_suffix(".part"), index=False, float_format="%.6g")
            path.with_suffix(".part").replace(path)
            counts = table.status.value_counts().to_dict()
            print(f"{first:6d} {counts} {time.perf_counter() - began:.0f} s", flush=True)
        tables.append(pd.read_csv(path))
    table = pd.concat(tables, ignore_index=True)
    check(table)
    report(table)
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
