"""The published curve of certified poisoning, MNIST 1 against 7: how near ours is, how tight, and how long all of it takes.

    python3 course.py bench benchmarks/poisoning.py [--steps 300] [--images 13007]

Sphere and slab at the seventieth percentile, hinge loss, |w|^2 <= .8, eight budgets, two processes, seconds on the wall.
"""

import sys
import time

import pandas as pd
import timing

from tmlcourse import data
from tmlcourse.poisoning import certified_bound, sanitizer

PUBLISHED = {0.0: 0.029, 0.01: 0.050, 0.02: 0.059, 0.03: 0.062, 0.05: 0.063, 0.1: 0.063, 0.2: 0.063, 0.3: 0.063}


def main():
    options = timing.start(__doc__, steps=300, images=13_007)
    train = data.load("mnist", "train")
    chosen = ((train.y == 1) | (train.y == 7)).nonzero().squeeze(1)[: options.images]
    x, y = train.x[chosen], train.y[chosen]
    timing.headline(f"{len(x)} images of {train.name}, 1 against 7, {options.steps} steps")
    began = time.perf_counter()
    found = certified_bound(
        x, y, eps=list(PUBLISHED), defense=sanitizer(x, y), rho=0.8**0.5, steps=options.steps, n_jobs=2
    )
    minutes = (time.perf_counter() - began) / 60
    table = pd.DataFrame([(b.eps, b.upper, b.attack_loss, PUBLISHED[b.eps], b.gap / b.upper) for b in found],
                         columns=["eps", "bound", "attack", "published", "gap / bound"])  # fmt: skip
    print(table.round(4).to_string(index=False))
    apart = max((table[column] / table.published - 1).abs().max() for column in ("bound", "attack"))
    sys.exit(timing.verdict([
        timing.at_most(5, "poisoning: bound and attack from the published curve", apart, 0.1, peer="Steinhardt et al. 2017"),
        timing.at_most(5, "poisoning: gap to the bound", table["gap / bound"].max(), 0.02),
        timing.at_most(5, "poisoning: minutes for eight budgets", minutes, 1.0),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
