"""Zeroth-order attacks at one query budget, beside the libraries that have one: success, distance, queries, time.

    python3 course.py bench benchmarks/black_box.py [--images 20] [--queries 2000] [--threads 1]

ART's ZOO is the peer with the same rules (scores only, the nearest image in L2). It has no budget, so it runs for as many
iterations as the budget allows, with one value of c; the table says what was really spent, counted at the same door.
"""

import argparse
import functools
import importlib.util
import time
import warnings

import numpy as np
import pandas as pd
import torch
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import zeroth_order as zo
from tmlcourse.attacks.queries import Queries
from tmlcourse.threat import Linf


class Counted(nn.Module):
    """A network whose rows are counted, for libraries that want a module (hard_label.py and square.py count with it, too)."""

    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, x):
        self.rows += len(x)
        return self.net(x.float())  # some libraries hand over doubles


def art_zoo(net, x, y, queries, **options):
    """ART's ZooAttack: 8 coordinates an iteration, 2 queries each and 1 for the new point; image by image."""
    from art.attacks.evasion import ZooAttack
    from art.estimators.classification import PyTorchClassifier

    counted = Counted(net).eval()
    classifier = PyTorchClassifier(counted, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1),
                                   device_type="cpu" if x.device.type == "cpu" else "gpu")  # fmt: skip
    settings = dict(binary_search_steps=1, initial_const=10.0, learning_rate=0.1, abort_early=False, use_resize=False,
                    use_importance=False, nb_parallel=8, variable_h=1e-2, batch_size=1, verbose=False)  # fmt: skip
    attack = ZooAttack(classifier, max_iter=queries // 17, **(settings | options))
    x_adv = attack.generate(x.cpu().numpy(), np.eye(10)[y.cpu()])
    return torch.from_numpy(x_adv).to(x), counted.rows


def ours(attack):
    def run(net, x, y, queries):
        oracle = Queries(net)
        return attack(oracle, x, y, queries=queries, seed=0), oracle.total

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eps", type=float, default=0.15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", n=options.images, fallback="digits")[: options.images].to(device)
    net = pretrained.load(f"{test.name}-standard", device=device)
    x, y = test.x, test.y
    print(f"{len(x)} images of {test.name}, {options.queries} queries each; {device}, {options.threads} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    nearest = {
        "zoo": ours(zo.zoo),
        "zoo, newton": ours(functools.partial(zo.zoo, solver="newton")),
        "zoo, 14 x 14": ours(functools.partial(zo.zoo, size=14, solver="newton")),
        "autozoom": ours(zo.autozoom),
        "zo_admm": ours(zo.zo_admm),
    }
    if importlib.util.find_spec("art"):
        nearest["art ZooAttack"] = art_zoo
        nearest["art ZooAttack, lr 0.3"] = functools.partial(art_zoo, learning_rate=0.3)
    bounded = {f.__name__: ours(functools.partial(f, threat=Linf(options.eps))) for f in
               (zo.nes, zo.zo_signsgd, zo.zo_svrg, zo.zo_adam, zo.zo_ngd)}  # fmt: skip
    for title, contestants in {"nearest in L2": nearest, f"within Linf {options.eps}": bounded}.items():
        rows = []
        for name, run in contestants.items():
            torch.manual_seed(0)
            np.random.seed(0)
            began = time.perf_counter()
            x_adv, spent = run(net, x.clone(), y, options.queries)
            seconds = time.perf_counter() - began
            fooled = (net(x_adv).argmax(1) != y) & (net(x).argmax(1) == y)
            length = (x_adv - x).flatten(1).norm(dim=1)[fooled]
            rows.append({"attack": name, "fooled": fooled.float().mean().item(), "mean L2": length.mean().item(),
                         "queries an image": spent / len(x), "seconds": seconds,
                         "microseconds a query": 1e6 * seconds / spent})  # fmt: skip
        print(f"\n{title}\n{pd.DataFrame(rows).round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
