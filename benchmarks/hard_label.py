"""Attacks that see only the winning label, at one query budget, beside the libraries that have one: distance and time.

    python3 course.py bench benchmarks/hard_label.py [--images 10] [--queries 2000] [--rounds 1] [--threads 1]

ART has Sign-OPT, with a limit of queries; HopSkipJump (ART, foolbox) and the boundary attack (foolbox) look for the same
nearest image by other walks, and are given as many steps as the budget allows. Queries are counted at one door, distances
are taken over the images that everyone broke; times are medians over the rounds, in which the contestants take turns.
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import time
import warnings

import numpy as np
import pandas as pd
import torch
from black_box import Counted
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import opt_attack, sign_opt


def ours(attack):
    return lambda net, x, y, queries: attack(net, x, y, queries=queries, seed=0)


def _art(net, x):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1),
                             device_type="cpu" if x.device.type == "cpu" else "gpu")  # fmt: skip


def art_sign_opt(net, x, y, queries):
    from art.attacks.evasion import SignOPTAttack

    attack = SignOPTAttack(_art(net, x), targeted=False, query_limit=queries, num_trial=20, k=50, verbose=False)
    return torch.from_numpy(attack.generate(x.cpu().numpy(), np.eye(10)[y.cpu()])).to(x)


def art_hop_skip_jump(net, x, y, queries):
    """100 evaluations a step grow with the root of its number: so many steps as fit."""
    from art.attacks.evasion import HopSkipJump

    steps = max(1, int((queries / 150) ** 0.75))
    attack = HopSkipJump(_art(net, x), max_iter=steps, max_eval=1000, init_eval=100, init_size=20, verbose=False)
    return torch.from_numpy(attack.generate(x.cpu().numpy())).to(x)


def _foolbox(attack, net, x, y):
    import foolbox as fb

    return attack(fb.PyTorchModel(net, bounds=(0, 1)), x, fb.criteria.Misclassification(y), epsilons=None)[0]


def foolbox_boundary(net, x, y, queries):
    """Two queries a step or a little more, and the search for a start."""
    import foolbox as fb

    start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=20)
    return _foolbox(fb.attacks.BoundaryAttack(init_attack=start, steps=int(queries / 2.2)), net, x, y)


def foolbox_hop_skip_jump(net, x, y, queries):
    import foolbox as fb

    start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=20)
    steps = max(1, int((queries / 150) ** 0.75))
    attack = fb.attacks.HopSkipJumpAttack(init_attack=start, steps=steps, initial_gradient_eval_steps=100)
    return _foolbox(attack, net, x, y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", fallback="digits").to(device)
    net = pretrained.load(f"{test.name}-standard", device=device)
    with torch.no_grad():
        right = (net(test.x[:1000]).argmax(1) == test.y[:1000]).nonzero().flatten()[: options.images]
    x, y = test.x[right], test.y[right]
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{len(x)} images of {test.name}, {options.queries} queries each")  # fmt: skip
    contestants = {"tmlcourse sign_opt": ours(sign_opt), "tmlcourse opt_attack": ours(opt_attack)}
    contestants |= {"tmlcourse sign_opt, q=20": ours(functools.partial(sign_opt, q=20))}
    for peer in (art_sign_opt, art_hop_skip_jump, foolbox_boundary, foolbox_hop_skip_jump):
        if importlib.util.find_spec(peer.__name__.split("_")[0]):
            contestants[peer.__name__.replace("_", " ", 1)] = peer
    seconds, spent, length = {name: [] for name in contestants}, {}, {}
    for _ in range(options.rounds):
        for name, attack in contestants.items():
            torch.manual_seed(0)
            np.random.seed(0)
            counted = Counted(net).eval()
            began = time.perf_counter()
            x_adv = attack(counted, x.clone(), y, options.queries).detach()
            seconds[name].append(time.perf_counter() - began)
            spent[name] = counted.rows / len(x)
            with torch.no_grad():
                fooled = net(x_adv).argmax(1) != y
            length[name] = torch.where(fooled, (x_adv - x).flatten(1).norm(dim=1), torch.inf)
    everyone = torch.stack([torch.isfinite(v) for v in length.values()]).all(0)
    rows = [
        {
            "attack": name,
            "fooled": torch.isfinite(length[name]).float().mean().item(),
            "mean L2": length[name][everyone].mean().item(),
            "median L2": length[name][everyone].median().item(),
            "queries an image": spent[name],
            "seconds": statistics.median(seconds[name]),
            "microseconds a query": 1e6 * statistics.median(seconds[name]) / (spent[name] * len(x)),
        }
        for name in contestants
    ]
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
