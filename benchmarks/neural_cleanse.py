"""Ten clean and ten backdoored networks under Neural Cleanse: whom does it flag?

    python benchmarks/neural_cleanse.py --out table.csv        (about two minutes on two cores)

The table that chapter 12 shows is this script's, in tmlcourse/poisoning/tables.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
import torch.nn.functional as F

from tmlcourse import data, models, progress, training
from tmlcourse.poisoning import attack_success, backdoor, neural_cleanse, pattern_trigger


def overlap(mask: torch.Tensor, trigger) -> tuple[float, float]:
    """How much of the true trigger the largest pixels of the mask cover, and the cosine of the two masks."""
    found, true = mask.flatten().cpu(), trigger.mask.flatten()
    top = found.topk(int(true.sum())).indices
    return float(true[top].mean()), float(F.cosine_similarity(found, true, 0))


def rows(name: str, seeds: int):
    n = {"mnist": (3000, 1000)}.get(name, (None, None))
    train, test = data.load(name, "train", n=n[0]), data.load(name, n=n[1])
    trigger = pattern_trigger(train.shape)
    for seed in range(seeds):
        for planted in (False, True):
            target = seed % 10
            learn = backdoor(train, trigger, target=target, fraction=0.1, seed=seed) if planted else train
            net = models.mlp(train.shape, hidden=(128, 64), seed=seed)
            training.fit(net, learn, epochs=15, lr=2e-3, seed=seed)
            found = neural_cleanse(net, test.x[:300], seed=seed)
            table, (iou, cosine) = found.table, overlap(found.mask[target], trigger)
            small = table[table["norm"] < table["norm"].median()]
            yield {"data": name, "seed": seed, "planted": planted, "target": target,
                   "accuracy": training.accuracy(net, test.x, test.y),
                   "success": attack_success(net, test.x, test.y, trigger, target),
                   "norm": table["norm"][target], "median_norm": table["norm"].median(),
                   "index": small["index"].max(), "log_index": small["log_index"].max(),
                   "flagged": " ".join(map(str, found.flagged)),
                   "flagged_by_paper": " ".join(map(str, small["label"][small["index"] > 2])),
                   "covered": iou, "cosine": cosine}  # fmt: skip


def main(argv=None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--data", nargs="+", default=["digits-28x28", "mnist"])
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    found = [row for name in options.data for row in progress.bar(rows(name, options.seeds), total=2 * options.seeds)]
    table = pd.DataFrame(found)
    print(table.round(3).to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.4g")
    return table


if __name__ == "__main__":
    main()
