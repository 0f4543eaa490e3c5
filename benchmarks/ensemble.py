"""Auto-PGD and the ensemble, side by side with the libraries a user would pick instead.

    python3 course.py bench benchmarks/ensemble.py [--images 100] [--rounds 3] [--threads 1] [--ensemble 0]

Every Auto-PGD makes 100 steps from one random start, with cross-entropy and with DLR; the contestants attack the same
images of the same robust network in turn, round after round, and the table gives medians. With `--ensemble N` the four
attacks of AutoAttack also run, ours and torchattacks', on N images, compared image by image (many minutes on a CPU).
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import time
import warnings

import pandas as pd
import torch

from tmlcourse import data, pretrained
from tmlcourse.attacks import robust_accuracy
from tmlcourse.attacks.auto import apgd, autoattack
from tmlcourse.threat import L2, Linf

STEPS, BATCH = 100, 100


def ours(model, x, y, threat, loss):
    return apgd(model, x, y, threat, steps=STEPS, loss=loss, seed=0)


def ours_stopping(model, x, y, threat, loss):
    return apgd(model, x, y, threat, steps=STEPS, loss=loss, stop_early=True, seed=0)


def in_batches(attack):
    @functools.wraps(attack)
    def run(model, x, y, threat, loss):
        batches = zip(x.split(BATCH), y.split(BATCH), strict=True)
        return torch.cat([attack(model, a, b, threat, loss) for a, b in batches])

    return run


@in_batches
def torchattacks(model, x, y, threat, loss):
    import torchattacks as library

    short = {"cross_entropy": "ce", "dlr": "dlr"}[loss]
    attack = library.APGD(model, norm=type(threat).__name__, eps=threat.eps, steps=STEPS, loss=short)
    return attack(x, y)


@in_batches
def art(model, x, y, threat, loss):
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, loss=torch.nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )  # fmt: skip
    named = {"cross_entropy": "cross_entropy", "dlr": "difference_logits_ratio"}[loss]
    attack = AutoProjectedGradientDescent(
        classifier, norm="inf" if isinstance(threat, Linf) else 2, eps=threat.eps, eps_step=2 * threat.eps,
        max_iter=STEPS, nb_random_init=1, batch_size=BATCH, loss_type=named, verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


@torch.no_grad()
def standing(model, x_adv, y):
    batches = zip(x_adv.split(BATCH), y.split(BATCH), strict=True)
    return torch.cat([model.eval()(a).argmax(1) == b for a, b in batches])


def ensembles(model, x, y, threat):
    """What stands after the four attacks, ours and torchattacks' AutoAttack; seconds of each."""
    began = time.perf_counter()
    mine = robust_accuracy(model, x, y, threat, autoattack(), seed=0)
    seconds = [time.perf_counter() - began]
    import torchattacks as library

    began = time.perf_counter()
    attack = library.AutoAttack(model, norm=type(threat).__name__, eps=threat.eps, seed=0)
    theirs = standing(model, torch.cat([attack(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]), y)
    seconds.append(time.perf_counter() - began)
    return mine, theirs, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ensemble", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", fallback="digits")[: max(options.images, options.ensemble)].to(device)
    name = f"{test.name}-robust"
    model, eps = pretrained.load(name, device=device), pretrained.manifest()[name]["eps"]
    peers = {f.__name__: f for f in (torchattacks, art) if importlib.util.find_spec(f.__name__)}
    contestants = {"tmlcourse": ours, "tmlcourse, stop_early": ours_stopping, **peers}
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{options.images} images, {name}, {options.rounds} rounds after one warm-up")  # fmt: skip
    some = test[: options.images]
    for threat in (Linf(eps), L2(2.0)):
        for loss in ("cross_entropy", "dlr"):
            seconds, left = {n: [] for n in contestants}, {}
            for number in range(options.rounds + 1):
                for contestant, attack in contestants.items():
                    began = time.perf_counter()
                    answer = attack(model, some.x.clone(), some.y, threat, loss)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if number:
                        seconds[contestant].append(time.perf_counter() - began)
                    left[contestant] = standing(model, answer, some.y).float().mean().item()
            ratio = {
                n: statistics.median(a / b for a, b in zip(s, seconds["tmlcourse"], strict=True))
                for n, s in seconds.items()
            }
            times = {n: statistics.median(s) for n, s in seconds.items()}
            table = pd.DataFrame({"seconds": times, "time / ours": ratio, "standing": left})
            print(f"\n{threat}, {loss}\n{table.round(3)}", flush=True)
    if options.ensemble and "torchattacks" in peers:
        some = test[: options.ensemble]
        mine, theirs, seconds = ensembles(model, some.x, some.y, Linf(eps))
        print(f"\nensemble on {len(some)} images: ours {int(mine.standing.sum())} stand, {seconds[0]:.0f} s; torchattacks "
              f"{int(theirs.sum())} in {seconds[1]:.0f} s; only ours stands on {int((mine.standing & ~theirs).sum())}, "
              f"only theirs on {int((theirs & ~mine.standing).sum())}")  # fmt: skip


if __name__ == "__main__":
    main()
