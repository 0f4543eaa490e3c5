"""Zeroth-order attacks at one query budget, beside the libraries that have one: success, distance, queries, time.

    python3 course.py bench benchmarks/black_box.py [--images 20] [--queries 2000] [--threads 1]

ART's ZOO is the peer with the same rules (scores only, the nearest image in L2). It has no budget, so it runs for as many
iterations as the budget allows, with one value of c; the table says what was really spent, counted at the same door.
"""

import functools
import sys

import numpy as np
import pandas as pd
import timing
import torch
from timing import Counted

from tmlcourse import data, pretrained
from tmlcourse.attacks import zeroth_order as zo
from tmlcourse.attacks.queries import Queries
from tmlcourse.threat import Linf


def art_zoo(net, x, y, queries, **options):
    """ART's ZooAttack: 8 coordinates an iteration, 2 queries each and 1 for the new point; image by image."""
    from art.attacks.evasion import ZooAttack

    counted = Counted(net).eval()
    settings = dict(binary_search_steps=1, initial_const=10.0, learning_rate=0.1, abort_early=False, use_resize=False,
                    use_importance=False, nb_parallel=8, variable_h=1e-2, batch_size=1, verbose=False)  # fmt: skip
    attack = ZooAttack(timing.art_classifier(counted, x), max_iter=queries // 17, **(settings | options))
    x_adv = attack.generate(x.cpu().numpy(), np.eye(10)[y.cpu()])
    return torch.from_numpy(x_adv).to(x), counted.rows


def ours(attack):
    def run(net, x, y, queries):
        oracle = Queries(net)
        return attack(oracle, x, y, queries=queries, seed=0), oracle.total

    return run


def seeded(run, *arguments):
    torch.manual_seed(0)
    np.random.seed(0)
    return run(*arguments)


def main():
    options = timing.start(__doc__, images=20, queries=2000, eps=0.15)
    test = data.load("mnist", n=options.images, fallback="digits")[: options.images].to(timing.DEVICE)
    net = pretrained.load(f"{test.name}-standard", device=timing.DEVICE)
    x, y = test.x, test.y
    timing.headline(f"{len(x)} images of {test.name}, {options.queries} queries each")
    nearest = {
        "zoo": ours(zo.zoo),
        "zoo, newton": ours(functools.partial(zo.zoo, solver="newton")),
        "zoo, 14 x 14": ours(functools.partial(zo.zoo, size=14, solver="newton")),
        "autozoom": ours(zo.autozoom),
        "zo_admm": ours(zo.zo_admm),
    }
    if timing.installed("art"):
        nearest["art ZooAttack"] = art_zoo
        nearest["art ZooAttack, lr 0.3"] = functools.partial(art_zoo, learning_rate=0.3)
    bounded = {f.__name__: ours(functools.partial(f, threat=Linf(options.eps))) for f in
               (zo.nes, zo.zo_signsgd, zo.zo_svrg, zo.zo_adam, zo.zo_ngd)}  # fmt: skip
    bars = []
    for title, contestants in {"nearest in L2": nearest, f"within Linf {options.eps}": bounded}.items():
        calls = {
            n: functools.partial(seeded, run, net, x.clone(), y, options.queries) for n, run in contestants.items()
        }
        race, rows = timing.in_turn(calls, 1, warm_up=0), {}
        for name, (x_adv, spent) in race.answers.items():
            fooled = (net(x_adv).argmax(1) != y) & (net(x).argmax(1) == y)
            length = (x_adv - x).flatten(1).norm(dim=1)[fooled]
            rows[name] = {"fooled": fooled.double().mean().item(), "mean L2": length.mean().item(),
                          "queries an image": spent / len(x), "seconds": race.median(name),
                          "microseconds a query": 1e6 * race.median(name) / spent}  # fmt: skip
        print(f"\n{title}\n{pd.DataFrame(rows).T.round(3)}", flush=True)
        if title == "nearest in L2":
            # Of two attacks the stronger fools more; the time counts by the query, since they spend different numbers.
            table, peers = pd.DataFrame(rows).T, [name for name in rows if name.startswith("art")]
            best = max(peers, key=lambda name: rows[name]["fooled"], default=None)
            about = dict(peer=timing.version(best or ""))
            gain = best and rows["zoo, newton"]["fooled"] - rows[best]["fooled"]
            faster = best and table["microseconds a query"][best] / table["microseconds a query"]["zoo, newton"]
            bars += [timing.at_least(3, "ZOO: images fooled, ours less the best peer's", gain, 0.0, **about),
                     timing.at_least(3, "ZOO: the peer's time a query, to ours", faster, 1.0, **about)]  # fmt: skip
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
