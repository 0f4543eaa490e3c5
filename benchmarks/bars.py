"""Every speed, memory and quality ratio that the project promises, measured again, in one table; the exit status by its bars.

    python3 course.py bench                 under an hour on two cores that nobody else uses
    python3 course.py bench --quick         a few minutes: proves the machinery, too little work to judge by
    python3 course.py bench --only pgd certify
    python3 course.py bench --out table.csv

Each benchmark runs as a program of its own, one after the other, and hands over its bars. They are promised on MNIST:
put it where `tmlcourse.data.load` finds it. How auto_LiRPA, which wants an old torch, takes part: `auto_lirpa.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import timing

from tmlcourse import data

HERE = Path(__file__).resolve().parent
# Benchmark -> its options in a full and in a quick run. A name before a colon keeps two runs of one file apart.
RUNS = {
    "pgd": ("--images 250 --rounds 2", "--images 20 --rounds 1"),
    "minimum_norm": ("--images 16 --rounds 2", "--images 4 --rounds 1"),
    "ensemble": ("--images 240 --rounds 1", "--images 4 --rounds 1"),
    "square": ("--images 80 --queries 300 --seeds 1", "--images 4 --queries 20 --seeds 1"),
    "hard_label": ("--images 8 --queries 1000", "--images 2 --queries 150"),
    "black_box": ("--images 6 --queries 1000", "--images 2 --queries 60"),
    "physical": ("--images 40", "--images 12"),
    "certify": ("--rounds 5 --limit 20", "--images 32 --rounds 1 --programs 2 --limit 1"),
    "certify:exact error": ("--bounds-off --programs 0 --decide 250 --threads 2", "--bounds-off --programs 0 --decide 10"),
    "poisoning": ("", "--images 500 --steps 20"),
    "training": ("--rounds 5 --batches 2", "--rounds 1 --batches 1"),
    "training:recipe": ("--recipe --images 40000 --epochs 5 --tested 200", "--recipe --images 200 --epochs 1 --tested 10"),
    "interpret": ("--rounds 5", "--images 16 --rounds 1"),
    "influence": ("--images 1000", "--images 200 --points 5"),
    "dpsgd": ("--rounds 9", "--rounds 1"),
    "privacy_attacks": ("--images 10", "--images 1 --shadows 8"),
    "growth": ("--rounds 3", "--rounds 1 --only IBP"),
    "kernels": ("--rounds 21", "--rounds 1"),
}  # fmt: skip


def peers() -> timing.Bar:
    """Whether PGD leaves no more images standing than its peers from equal starts, by the tests that say so."""
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_attack_peers.py"], cwd=HERE.parent
    ).returncode
    libraries = ", ".join(timing.version(name) for name in ("torchattacks", "foolbox", "art") if timing.installed(name))
    return timing.at_most(2, "PGD-40: tests of images standing, failed", status, 0, peer=libraries)


def measured(name: str, options: str) -> tuple[list[timing.Bar], int]:
    """The bars of one benchmark and its exit status; what breaks before it handed any over has missed."""
    file = name.split(":")[0] + ".py"
    print(f"\n===== {file} {options}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bars.jsonl"
        began = time.perf_counter()
        command = [sys.executable, str(HERE / file), *options.split()]
        status = subprocess.run(command, env={**os.environ, "TMLCOURSE_BARS": str(path)}).returncode
        print(f"===== {file}: status {status}, {time.perf_counter() - began:.0f} s", flush=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [timing.Bar(**json.loads(line)) for line in lines]
    return found or [timing.at_most(11, f"{file}: exit status", max(1, abs(status)), 0)], status if not found else 0


def table(bars: list[timing.Bar]) -> pd.DataFrame:
    """One row a bar, in the order of the issues."""
    rows = [(b.issue, b.says, "" if b.measured is None else f"{b.measured:.3g}", f"{b.sense} {b.bar:.4g}", b.peer, b.verdict)
            for b in sorted(bars, key=lambda b: b.issue)]  # fmt: skip
    return pd.DataFrame(rows, columns=["issue", "what", "measured", "bar", "beside", "verdict"])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some benchmarks, by name")
    parser.add_argument("--out", help="a CSV file for the table")
    options = parser.parse_args(arguments)
    chosen = {name: runs for name, runs in RUNS.items() if name.split(":")[0] in (options.only or [name.split(":")[0]])}
    if unknown := set(options.only) - {name.split(":")[0] for name in RUNS}:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, want some of {', '.join(RUNS)}")
    if data.load("mnist", n=1, fallback="digits").name != "mnist":
        print("MNIST is not here, for which the bars are promised: occlusion, for one, skips black squares")
    bars, broken = [] if options.only else [peers()], 0
    for name, (full, quick) in chosen.items():
        found, status = measured(name, quick if options.quick else full)
        bars, broken = bars + found, broken or status
    rows = table(bars)
    print(f"\n{rows.to_string(index=False)}\n")
    if options.out:
        rows.to_csv(options.out, index=False)
    count = {
        word: sum(bar.met is met for bar in bars) for word, met in (("met", True), ("missed", False), ("open", None))
    }
    print(", ".join(f"{number} {word}" for word, number in count.items())
          + ("; a quick run is too little work to judge by" if options.quick else ""))  # fmt: skip
    return int(bool(broken) if options.quick else broken or count["missed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
