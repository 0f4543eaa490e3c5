"""PGD-40 and robust accuracy, side by side with the libraries a user would pick instead.

    python3 course.py bench benchmarks/pgd.py [--images 500] [--rounds 5] [--threads 1]

All contestants attack the same images of the same network in turn, round after round; the table gives the median of each
round's ratio to the floor: 40 forward passes and backward passes to the input, in batches of 250, and nothing else.
"""

import functools
import sys

import numpy as np
import timing
import torch
import torch.nn.functional as F

from tmlcourse import data, pretrained
from tmlcourse.attacks import pgd, robust_accuracy
from tmlcourse.threat import Linf

EPS, ALPHA, STEPS, BATCH = 0.3, 0.01, 40, 250


def in_batches(attack):
    """The attack on batches of 250, as its users call it; from random starts, or with seed=None from the images."""

    @functools.wraps(attack)
    def run(model, x, y, seed=0):
        torch.manual_seed(seed or 0)
        return torch.cat([attack(model, a, b, seed) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)])

    return run


@in_batches
def floor(model, x, y, _):
    x_adv = x
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = torch.clamp(torch.clamp(x_adv.detach() + ALPHA * g.sign(), x - EPS, x + EPS), 0, 1)
    return x_adv


def ours(model, x, y, seed=0):
    return pgd(model, x, y, Linf(EPS), steps=STEPS, alpha=ALPHA, random_start=seed is not None, seed=seed)


@in_batches
def torchattacks(model, x, y, seed):
    import torchattacks as library

    return library.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=seed is not None)(x, y)


@in_batches
def foolbox(model, x, y, seed):
    import foolbox as fb

    start = seed is not None
    attack = fb.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=ALPHA, steps=STEPS, random_start=start)
    return attack(fb.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=EPS)[1]


def art(model, x, y, seed=0):
    np.random.seed(seed or 0)
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(
        timing.art_classifier(model, x),
        norm="inf",
        eps=EPS,
        eps_step=ALPHA,
        max_iter=STEPS,
        num_random_init=int(seed is not None),
        batch_size=BATCH,
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


@torch.no_grad()
def standing(model, x_adv, y):
    batches = zip(x_adv.split(BATCH), y.split(BATCH), strict=True)
    return sum((model.eval()(a).argmax(1) == b).sum().item() for a, b in batches) / len(y)


def ours_robust_accuracy(model, x, y):
    attack = functools.partial(pgd, steps=STEPS, alpha=ALPHA)
    return robust_accuracy(model, x, y, Linf(EPS), [attack], seed=0).accuracy


def main():
    options = timing.start(__doc__, images=500, rounds=5)
    test = data.load("mnist", n=options.images, fallback="digits")[: options.images].to(timing.DEVICE)
    peers = timing.present(torchattacks, foolbox, art)
    contestants = {"floor": floor, "ours": ours, **peers, "ours, robust_accuracy": ours_robust_accuracy}
    timing.headline(f"{len(test)} images of {test.name}, {options.rounds} rounds after one warm-up")
    bars = []
    for kind, faster in (("standard", 4.0), ("robust", 1.4)):
        model = pretrained.load(f"{test.name}-{kind}", device=timing.DEVICE)
        calls = {n: functools.partial(f, model, test.x.clone(), test.y) for n, f in contestants.items()}
        race = timing.in_turn(calls, options.rounds)
        left = {n: a if isinstance(a, float) else standing(model, a, test.y) for n, a in race.answers.items()}
        print(f"\n{kind} network\n{race.table('floor', **{'robust accuracy': left})}", flush=True)
        fastest, ratio = race.fastest(peers, "ours, robust_accuracy")
        library, slower = race.fastest([n for n in peers if n == "torchattacks"], "ours")
        named = dict(peer=timing.version(library))
        bars += [
            timing.at_most(2, f"PGD-40 to 40 passes, {kind} net", race.ratio("ours", "floor"), 1.03, peer="bare loop"),
            timing.at_most(2, f"PGD-40 to torchattacks, {kind} net", slower and 1 / slower, 0.7, **named),
            timing.at_least(2, f"fastest peer to robust_accuracy, {kind} net", ratio, faster, peer=timing.version(fastest)),
        ]  # fmt: skip
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
