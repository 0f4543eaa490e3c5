"""How time and memory grow: attack, bound, exact program and private step against images, eps, width, depth and steps.

    python3 course.py bench benchmarks/growth.py [--rounds 3] [--only PGD]

Each line doubles one size and keeps the others; time (the least of the rounds) and memory (the peak beyond what the program
holds, on Linux or a GPU) are fitted as size^p by least squares on the logarithms. "needed" is the exponent that the algorithm
cannot avoid; a time that grows faster by more than 0.35 is marked and gives exit status 1. eps is fitted, too, though what it
does is not a power: it decides how many neurons are unsure.
"""

import argparse
import ctypes
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tmlcourse import certify, data, models
from tmlcourse.attacks import pgd
from tmlcourse.privacy import clipped_gradient
from tmlcourse.threat import Linf

SLACK = 0.35
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def net(width=100, depth=2):
    return models.mlp((1, 28, 28), hidden=(width,) * depth, seed=0).to(DEVICE).eval()


def cases():
    """(method, size) -> (sizes, needed exponent or None, size -> call)."""
    whole = data.load("mnist", n=512, fallback="digits").to(DEVICE)
    x, y = (t.repeat(8, *[1] * (t.dim() - 1)) for t in (whole.x, whole.y))

    def attack(images=256, eps=0.1, steps=20, **shape):
        model = net(**shape)
        return lambda: pgd(model, x[:images], y[:images], Linf(eps), steps=steps, seed=0)

    def bound(method, images=16, eps=0.02, **shape):
        model = net(**shape)
        return lambda: certify.margins(model, x[:images], y[:images], eps, method=method)

    def exact(images=1, eps=0.005, width=8, depth=2):
        model = net(width, depth)
        return lambda: certify.margins(model, x[:images], y[:images], eps, method="mip", time_limit=20)

    def private(images=256, steps=1, **shape):
        model = net(**shape)
        return lambda: [clipped_gradient(model, x[:images], y[:images], 1.0) for _ in range(steps)]

    doubled = [1, 2, 4, 8]
    return {
        ("PGD", "images"): ([256 * k for k in doubled], 1, lambda v: attack(images=v)),
        ("PGD", "eps"): ([0.02 * k for k in doubled], 0, lambda v: attack(eps=v)),
        ("PGD", "steps"): ([10 * k for k in doubled], 1, lambda v: attack(steps=v)),
        ("PGD", "width"): ([100 * k for k in doubled], 2, lambda v: attack(images=64, width=v)),
        ("PGD", "depth"): ([2 * k for k in doubled], 1, lambda v: attack(images=64, depth=v)),
        ("IBP", "images"): ([256 * k for k in doubled], 1, lambda v: bound("ibp", images=v)),
        ("IBP", "eps"): ([0.01 * k for k in doubled], 0, lambda v: bound("ibp", images=256, eps=v)),
        ("IBP", "width"): ([200 * k for k in doubled], 2, lambda v: bound("ibp", width=v)),
        ("IBP", "depth"): ([2 * k for k in doubled], 1, lambda v: bound("ibp", depth=v)),
        ("CROWN", "images"): ([16 * k for k in doubled], 1, lambda v: bound("crown", images=v)),
        ("CROWN", "eps"): ([0.005 * k for k in doubled], None, lambda v: bound("crown", eps=v)),
        ("CROWN", "width"): ([50 * k for k in doubled], 3, lambda v: bound("crown", images=8, width=v)),
        ("CROWN", "depth"): ([2, 4, 8, 12], 2, lambda v: bound("crown", images=4, width=60, depth=v)),
        ("MIP", "images"): ([1, 2], 1, lambda v: exact(images=v)),
        ("MIP", "eps"): ([0.0025, 0.005], None, lambda v: exact(eps=v)),
        ("MIP", "width"): ([4, 8], None, lambda v: exact(width=v)),
        ("MIP", "depth"): ([1, 2], None, lambda v: exact(depth=v, width=5)),
        ("DP-SGD", "images"): ([256 * k for k in doubled], 1, lambda v: private(images=v)),
        ("DP-SGD", "steps"): ([2 * k for k in doubled], 1, lambda v: private(steps=v)),
        ("DP-SGD", "width"): ([100 * k for k in doubled], 2, lambda v: private(width=v)),
        ("DP-SGD", "depth"): ([2 * k for k in doubled], 1, lambda v: private(depth=v)),
    }  # fmt: skip


def cost(call, rounds):
    """Seconds (the least of the rounds; the processor's own on a CPU, others may be working) and peak memory in MiB."""
    if rounds > 1:
        call()
    clock, taken = time.perf_counter if DEVICE.type == "cuda" else time.process_time, []
    for _ in range(rounds):
        began = clock()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - began)
    return min(taken), peak(call)


def peak(call):
    """MiB that a call holds at its most, beyond what was there before; NaN where that cannot be asked."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024


def status(entry):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(entry))


def exponent(sizes, costs):
    """p of size^p by least squares on logarithms; NaN where something cost nothing."""
    costs = np.asarray(costs, dtype=float)
    if not (costs > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="one method")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"{DEVICE}, 1 thread, torch {torch.__version__}; the least of {options.rounds} rounds")
    rows = []
    for (method, what), (sizes, needed, make) in cases().items():
        if options.only not in (None, method):
            continue
        costs = [cost(make(size), 1 if method == "MIP" else options.rounds) for size in sizes]
        seconds, memory = zip(*costs, strict=True)
        p = exponent(sizes, seconds)
        mark = "too fast" if needed is not None and p > needed + SLACK else ""
        rows.append((method, what, f"{sizes[0]:g} to {sizes[-1]:g}", seconds[0], seconds[-1], p, needed, memory[-1],
                     exponent(sizes, memory), mark))  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "against", "sizes", "first s", "last s", "time ~ size^", "needed",
                                        "MiB", "memory ~ size^", ""])  # fmt: skip
    print(table.round(2).to_string(index=False, na_rep="-"))
    sys.exit(int((table[""] != "").any()))


if __name__ == "__main__":
    main()
