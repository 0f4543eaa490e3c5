"""Square, side by side with the libraries a user would pick instead: images broken, queries spent, seconds.

    python3 course.py bench benchmarks/square.py [--images 100] [--queries 500] [--seeds 3] [--threads 1]

All contestants attack the same images of the same network with the same budget an image, in turn, seed after seed. Queries
are counted at the model, whoever asks; in this table every contestant's look at the clean image counts, as ours does.
"""

import argparse
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
from tmlcourse.attacks.queries import Queries
from tmlcourse.attacks.square import square
from tmlcourse.threat import L2, Linf


@torch.no_grad()
def fallen(model, x_adv, y):
    return torch.cat([model(a).argmax(1) for a in x_adv.split(100)]) != y


def ours(model, x, y, threat, queries, seed):
    """(which images fell, queries of each image): bool (N,), (N,)."""
    oracle = Queries(model)
    x_adv = square(oracle, x, y, threat, queries=queries, seed=seed)
    return fallen(model, x_adv, y), oracle.count.double()


def torchattacks(model, x, y, threat, queries, seed):
    import torchattacks as library

    counted = Counted(model).eval()
    norm = "Linf" if isinstance(threat, Linf) else "L2"
    # Its budget of n + 1 iterations leaves out two looks at the clean and one at the last image.
    attack = library.Square(counted, norm=norm, eps=threat.eps, n_queries=queries - 2, seed=seed)
    x_adv = attack(x, y)
    mean = (counted.rows - len(x)) / len(x)  # its last look only confirms
    return fallen(model, x_adv, y), torch.full((len(x),), mean, dtype=torch.float64)


def art(model, x, y, threat, queries, seed):
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    np.random.seed(seed)
    counted = Counted(model).eval()
    classifier = PyTorchClassifier(
        counted, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )  # fmt: skip
    # It asks three times an iteration: whether the image stands, its loss, and the loss of the candidate.
    norm = np.inf if isinstance(threat, Linf) else 2
    attack = SquareAttack(classifier, norm=norm, eps=threat.eps, max_iter=queries - 2, verbose=False)
    x_adv = torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)
    return fallen(model, x_adv, y), torch.full((len(x),), counted.rows / len(x), dtype=torch.float64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", n=options.images, fallback="digits").to(device)
    peers = {f.__name__: f for f in (torchattacks, art) if importlib.util.find_spec(f.__name__)}
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{len(test)} images of {test.name}, {options.queries} queries, {options.seeds} seeds")  # fmt: skip
    # Radii at which some images fall within the budget and some do not.
    for kind, threats in {"standard": (Linf(0.2), L2(2.0)), "robust": (Linf(0.35), L2(2.5))}.items():
        model = pretrained.load(f"{test.name}-{kind}", device=device)
        for threat in threats:
            rows = {}
            for seed in range(options.seeds):
                for name, contestant in {"tmlcourse": ours, **peers}.items():
                    began = time.perf_counter()
                    fell, spent = contestant(model, test.x.clone(), test.y, threat, options.queries, seed)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    rows.setdefault(name, []).append(
                        (time.perf_counter() - began, fell.double().mean().item(), spent.mean().item())
                    )
            table = pd.DataFrame(
                {name: [statistics.mean(column) for column in zip(*runs, strict=True)] for name, runs in rows.items()},
                index=["seconds", "images broken", "mean queries"],
            ).T
            print(f"\n{kind} network, {threat}\n{table.round(3)}")


if __name__ == "__main__":
    main()
