"""Auto-PGD and the ensemble, side by side with the libraries a user would pick instead.

    python3 course.py bench benchmarks/ensemble.py [--images 100] [--rounds 3] [--threads 1] [--ensemble 0]

Every Auto-PGD makes 100 steps from one random start, with cross-entropy and with DLR; the contestants attack the same
images of the same robust network in turn, round after round, and the table gives medians. With `--ensemble N` the four
attacks of AutoAttack also run, ours and torchattacks', on N images, compared image by image (many minutes on a CPU).
"""

import functools
import sys
import time

import timing
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

    named = {"cross_entropy": "cross_entropy", "dlr": "difference_logits_ratio"}[loss]
    attack = AutoProjectedGradientDescent(
        timing.art_classifier(model, x), norm="inf" if isinstance(threat, Linf) else 2, eps=threat.eps,
        eps_step=2 * threat.eps, max_iter=STEPS, nb_random_init=1, batch_size=BATCH, loss_type=named, verbose=False,
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
    options = timing.start(__doc__, images=100, rounds=3, ensemble=0)
    test = data.load("mnist", fallback="digits")[: max(options.images, options.ensemble)].to(timing.DEVICE)
    name = f"{test.name}-robust"
    model, eps = pretrained.load(name, device=timing.DEVICE), pretrained.manifest()[name]["eps"]
    peers, bars = timing.present(torchattacks, art), []
    contestants = {"ours": ours, "ours, stop_early": ours_stopping, **peers}
    timing.headline(f"{options.images} images, {name}, {options.rounds} rounds after one warm-up")
    some = test[: options.images]
    for threat in (Linf(eps), L2(2.0)):
        for loss in ("cross_entropy", "dlr"):
            case = model, some.x.clone(), some.y, threat, loss
            race = timing.in_turn({n: functools.partial(f, *case) for n, f in contestants.items()}, options.rounds)
            left = {n: standing(model, a, some.y).double().mean().item() for n, a in race.answers.items()}
            print(f"\n{threat}, {loss}\n{race.table('ours', standing=left)}", flush=True)
            bars += timing.strength(3, f"Auto-PGD {loss}, {threat}", race, peers, left, slack=0.02)
    if options.ensemble and "torchattacks" in peers:
        some = test[: options.ensemble]
        mine, theirs, seconds = ensembles(model, some.x, some.y, Linf(eps))
        print(f"\nensemble on {len(some)} images: ours {int(mine.standing.sum())} stand, {seconds[0]:.0f} s; torchattacks "
              f"{int(theirs.sum())} in {seconds[1]:.0f} s; only ours stands on {int((mine.standing & ~theirs).sum())}, "
              f"only theirs on {int((theirs & ~mine.standing).sum())}")  # fmt: skip
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
