"""PGD-40 and robust accuracy, side by side with the libraries a user would pick instead.

    python3 course.py bench benchmarks/pgd.py [--images 500] [--rounds 5] [--threads 1]

All contestants attack the same images of the same network in turn, round after round; the table gives the median of each
round's ratio to the floor: 40 forward passes and backward passes to the input, in batches of 250, and nothing else.
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
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, loss=torch.nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )  # fmt: skip
    attack = ProjectedGradientDescentPyTorch(
        classifier,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", n=options.images, fallback="digits")[: options.images].to(device)
    peers = {f.__name__: f for f in (torchattacks, foolbox, art) if importlib.util.find_spec(f.__name__)}
    contestants = {"floor": floor, "tmlcourse pgd": ours, **peers, "tmlcourse robust_accuracy": ours_robust_accuracy}
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{len(test)} images of {test.name}, {options.rounds} rounds after one warm-up")  # fmt: skip
    for kind in ("standard", "robust"):
        model = pretrained.load(f"{test.name}-{kind}", device=device)
        seconds, left = {name: [] for name in contestants}, {}
        for number in range(options.rounds + 1):
            for name, contestant in contestants.items():
                began = time.perf_counter()
                answer = contestant(model, test.x.clone(), test.y)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - began)
                left[name] = answer if isinstance(answer, float) else standing(model, answer, test.y)
        ratio = {
            name: statistics.median(a / b for a, b in zip(s, seconds["floor"], strict=True))
            for name, s in seconds.items()
        }
        table = pd.DataFrame(
            {
                "seconds": {k: statistics.median(v) for k, v in seconds.items()},
                "time / floor": ratio,
                "robust accuracy": left,
            }
        )
        print(f"\n{kind} network\n{table.round(3)}")
        fastest = min((ratio[p] for p in peers), default=float("nan"))
        print(f"pgd / torchattacks: {ratio['tmlcourse pgd'] / ratio.get('torchattacks', float('nan')):.2f}; "
              f"fastest peer / robust_accuracy: {fastest / ratio['tmlcourse robust_accuracy']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
