"""How time and memory grow: attack, bounds, exact program and private step against images, eps, width, depth and steps.

    python3 course.py bench benchmarks/growth.py [--rounds 3] [--only PGD] [--out FOLDER]

Each line doubles one size and keeps the others; time (the least of the rounds) and memory (the peak beyond what the program
holds, on Linux or a GPU) are fitted as size^p by least squares on the logarithms. "needed" is the exponent that the algorithm
cannot avoid; a time that grows faster by more than 0.35 misses the bar. eps is fitted, too, though what it does is not a
power: it decides how many neurons are unsure. `--out`: a picture of each size, growth-images.svg and so on.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timing

from tmlcourse import certify, data, models, plot
from tmlcourse.attacks import pgd
from tmlcourse.privacy import clipped_gradient
from tmlcourse.threat import Linf

SLACK = 0.35


def net(width=100, depth=2):
    return models.mlp((1, 28, 28), hidden=(width,) * depth, seed=0).to(timing.DEVICE).eval()


def cases():
    """(method, size) -> (sizes, needed exponent or None, size -> call)."""
    whole = data.load("mnist", n=512, fallback="digits").to(timing.DEVICE)
    x, y = (t.repeat(8, *[1] * (t.dim() - 1)) for t in (whole.x, whole.y))

    def attack(images=256, eps=0.1, steps=20, **shape):
        model = net(**shape)
        return lambda: pgd(model, x[:images], y[:images], Linf(eps), steps=steps, seed=0)

    def bound(method, images=16, eps=0.02, steps=30, **shape):
        model = net(**shape)
        return lambda: certify.margins(model, x[:images], y[:images], eps, method=method, steps=steps)

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
        ("alpha-CROWN", "images"): ([4, 8, 16], 1, lambda v: bound("alpha-crown", images=v, steps=5, width=50)),
        ("alpha-CROWN", "steps"): ([5, 10, 20], 1, lambda v: bound("alpha-crown", images=4, steps=v, width=50)),
        ("MIP", "images"): ([1, 2, 4], 1, lambda v: exact(images=v)),
        ("MIP", "eps"): ([0.00125, 0.0025, 0.005], None, lambda v: exact(eps=v)),
        ("MIP", "width"): ([2, 4, 8], None, lambda v: exact(width=v)),
        ("MIP", "depth"): ([1, 2], None, lambda v: exact(depth=v, width=5)),
        ("DP-SGD", "images"): ([256 * k for k in doubled], 1, lambda v: private(images=v)),
        ("DP-SGD", "steps"): ([2 * k for k in doubled], 1, lambda v: private(steps=v)),
        ("DP-SGD", "width"): ([100 * k for k in doubled], 2, lambda v: private(width=v)),
        ("DP-SGD", "depth"): ([2 * k for k in doubled], 1, lambda v: private(depth=v)),
    }  # fmt: skip


def cost(call, rounds):
    """Seconds (the least of the rounds) and peak memory in MiB."""
    race = timing.in_turn({"": call}, rounds, warm_up=min(1, rounds - 1))
    return min(race.seconds[""]), timing.peak(call)


def exponent(sizes, costs):
    """p of size^p by least squares on logarithms; NaN where something cost nothing."""
    costs = np.asarray(costs, dtype=float)
    if not (costs > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(table, folder):
    """Time and memory beside each other for each size, a line for each method, its exponent in the legend."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, rows in table.groupby("against", sort=False):
        with plot.style():
            figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
        for ax, quantity, unit in zip(axes, ("seconds", "MiB"), ("time (s)", "peak memory (MiB)"), strict=True):
            lines = {f"{r.method}: {getattr(r, quantity + '_p'):.2f}": (r.sizes, getattr(r, quantity))
                     for r in rows.itertuples() if min(getattr(r, quantity)) > 0}  # fmt: skip
            if lines:
                plot.growth(
                    lines,
                    title=f"{unit.split(' (')[0]} ~ ({what})$^p$, p in the legend",
                    xlabel=what,
                    ylabel=unit,
                    ax=ax,
                )
        figure.savefig(folder / f"growth-{what}.svg")
        plt.close(figure)


def main():
    options = timing.start(__doc__, rounds=3, only="", out="")
    timing.headline(f"the least of {options.rounds} rounds")
    rows = []
    for (method, what), (sizes, needed, make) in cases().items():
        if options.only in ("", method):
            costs = [cost(make(size), 1 if method == "MIP" else options.rounds) for size in sizes]
            seconds, memory = zip(*costs, strict=True)
            rows.append(
                (method, what, sizes, seconds, exponent(sizes, seconds), needed, memory, exponent(sizes, memory))
            )
    table = pd.DataFrame(rows, columns=["method", "against", "sizes", "seconds", "seconds_p", "needed", "MiB", "MiB_p"])
    ends = pd.DataFrame({f"{end} {column}": table[column].str[at] for column in ("sizes", "seconds", "MiB")
                         for end, at in (("first", 0), ("last", -1))})  # fmt: skip
    shown = pd.concat([table[["method", "against", "needed", "seconds_p", "MiB_p"]], ends], axis=1)
    print(shown.round(3).to_string(index=False, na_rep="-"), flush=True)
    if options.out:
        draw(table, Path(options.out))
    table["over"] = table.seconds_p - table.needed.astype(float)
    worst = table.dropna(subset="over").sort_values("over").groupby("method", sort=False).tail(1)
    sys.exit(timing.verdict([
        timing.at_most(11, f"{r.method}: exponent over what is needed, worst in {r.against}", r.over, SLACK)
        for r in worst.itertuples()
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
