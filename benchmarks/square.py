"""Square, side by side with the libraries a user would pick instead: images broken, queries spent, seconds.

    python3 course.py bench benchmarks/square.py [--images 100] [--queries 500] [--seeds 3] [--threads 1]

All contestants attack the same images of the same network with the same budget an image, in turn, seed after seed. Queries
are counted at the model, whoever asks; in this table every contestant's look at the clean image counts, as ours does.
"""

import statistics
import sys
from functools import partial

import numpy as np
import timing
import torch
from timing import Counted

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

    np.random.seed(seed)
    counted = Counted(model).eval()
    # It asks three times an iteration: whether the image stands, its loss, and the loss of the candidate.
    norm = np.inf if isinstance(threat, Linf) else 2
    attack = SquareAttack(
        timing.art_classifier(counted, x), norm=norm, eps=threat.eps, max_iter=queries - 2, verbose=False
    )
    x_adv = torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)
    return fallen(model, x_adv, y), torch.full((len(x),), counted.rows / len(x), dtype=torch.float64)


def main():
    options = timing.start(__doc__, images=100, queries=500, seeds=3)
    test = data.load("mnist", n=options.images, fallback="digits").to(timing.DEVICE)
    peers, bars = timing.present(torchattacks, art), []
    timing.headline(f"{len(test)} images of {test.name}, {options.queries} queries, {options.seeds} seeds")
    # Radii at which some images fall within the budget and some do not.
    for kind, threats in {"standard": (Linf(0.2), L2(2.0)), "robust": (Linf(0.35), L2(2.5))}.items():
        model = pretrained.load(f"{test.name}-{kind}", device=timing.DEVICE)
        for threat in threats:
            case = model, test.x.clone(), test.y, threat, options.queries
            races = [
                timing.in_turn({n: partial(f, *case, seed) for n, f in {"ours": ours, **peers}.items()}, 1, warm_up=0)
                for seed in range(options.seeds)
            ]
            race = timing.together(races)
            broken, spent = (
                {n: statistics.mean(r.answers[n][i].double().mean().item() for r in races) for n in race.seconds}
                for i in (0, 1)
            )
            title = f"Square, {threat}, {kind} net"
            print(f"\n{title}\n{race.table('ours', **{'images broken': broken, 'mean queries': spent})}", flush=True)
            bars += timing.strength(3, title, race, peers, {n: 1 - b for n, b in broken.items()}, slack=0.02)
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
