"""Adversarial training against its floor, and the table of all methods on MNIST.

    python3 course.py bench benchmarks/training.py [--rounds 7] [--threads 1]
    python benchmarks/training.py --table [--network wong_kolter] [--images 10000] [--epochs 8] [--steps 5] [--out FILE.csv]
    python benchmarks/training.py --recipe [--images 40000] [--epochs 5]      Madry's training: its cost, and PGD-40

The floor of a step of adversarial training with k gradient steps is the bare loop: k + 1 forward and backward passes of the
same network on the same batch, and an optimiser step. Contestants take turns; the table gives medians of the rounds' ratios,
in CPU seconds (on a GPU in wall time).
"""

import functools
import sys
import time
from pathlib import Path

import pandas as pd
import timing
import torch
import torch.nn.functional as F

from tmlcourse import data, models, pretrained, training
from tmlcourse.attacks import pgd, robust_accuracy
from tmlcourse.threat import Linf

EPS = 0.3
NETWORKS = {
    "small_cnn": functools.partial(models.small_cnn, seed=0),
    "wong_kolter": pretrained.RECIPES["mnist-certified"].build,
}
TABLE = Path(training.__file__).with_name("tables") / "mnist.csv"


def floor(model, optimiser, x, y, steps):
    """One training step and nothing that could be left out."""
    x_adv = torch.clamp(x + EPS * (2 * torch.rand_like(x) - 1), 0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = torch.clamp(torch.clamp(x_adv.detach() + 0.1 * g.sign(), x - EPS, x + EPS), 0, 1)
    optimiser.zero_grad(set_to_none=True)
    F.cross_entropy(model(x_adv), y).backward()
    optimiser.step()


def race(options, device):
    """Epochs of `fit` with each loss against the same number of floor steps."""
    train = data.load("mnist", "train", n=options.batches * 100, fallback="digits").to(device)
    timing.headline(
        f"{options.batches} batches of 100 images of {train.name}, {options.rounds} rounds after one warm-up"
    )
    threat, steps, bars = Linf(EPS), options.steps, []
    losses = {
        "Madry": training.adversarial(threat, steps=steps, alpha=0.1),
        "friendly, tau = steps": training.friendly(threat, steps=steps, tau=steps, alpha=0.1),
        "friendly, tau = 0": training.friendly(threat, steps=steps, tau=0, alpha=0.1),
        "TRADES": training.trades(threat, steps=steps, alpha=0.1),
        "MART": training.mart(threat, steps=steps, alpha=0.1),
    }

    def bare(build):
        model = build().to(device).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for index in torch.randperm(len(train)).split(100):
            floor(model, optimiser, train.x[index], train.y[index], steps)

    def fitted(build, loss):
        training.fit(build().to(device).train(), train, epochs=1, loss=loss, seed=0)

    for name, build in NETWORKS.items():
        calls = {"floor": functools.partial(bare, build)}
        calls |= {n: functools.partial(fitted, build, loss) for n, loss in losses.items()}
        found = timing.in_turn(calls, options.rounds)
        print(f"\n{name}, PGD-{steps}\n{found.table('floor')}", flush=True)
        bars += [timing.at_most(7, f"{n} to {steps} + 1 passes, {name}", found.ratio(n, "floor"), 1.05, peer="bare loop")
                 for n in losses]  # fmt: skip
    return bars


def methods(threat, steps, standard, defended):
    """Name -> (loss, decay of the weight average); `standard` and `defended` are networks trained before.

    The radius grows over the first half of training in all of them, or the iterative ones would stay at guessing.
    """
    late = functools.partial(_stages, boundaries=(0.42, 0.75))  # the paper's 50 and 90 of 120 epochs
    makes = {
        "FGSM": lambda t: training.adversarial(t, training.single_step, random_start=False),
        "Goodfellow": training.mixture,
        "ensemble": lambda t: training.ensemble(t, [standard]),
        "fast": _fast,
        "cascade": lambda t: training.cascade(t, [defended], steps=steps),
        "Madry": lambda t: training.adversarial(t, steps=steps),
        "friendly": lambda t: training.friendly(t, steps=steps, tau=late),
        "TRADES": lambda t: training.trades(t, beta=1.0, steps=steps),
        "MART": lambda t: training.mart(t, beta=5.0, steps=steps),
    }
    losses = {"standard": training.cross_entropy, "label smoothing": training.label_smoothing(0.1)}
    losses |= {name: training.growing(make, threat, share=0.5) for name, make in makes.items()}
    return {name: (loss, None) for name, loss in losses.items()} | {"Madry, averaged": (losses["Madry"], 0.99)}


def _fast(threat):
    return training.adversarial(threat, training.single_step, alpha=1.25 * threat.eps)


def _stages(done, boundaries):
    """tau = 0, 1, 2 ... as training passes each boundary."""
    return sum(done > b for b in boundaries)


def table(options, device):
    """Train each method in turn and append its row to the file; methods that are in the file already are not done again."""
    out, build = Path(options.out), NETWORKS[options.network]
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    train = data.load("mnist", "train", n=options.images).to(device)
    test = data.load("mnist").to(device)
    few = test[:: max(1, len(test) // options.tested)]
    networks = {}

    def trained(name, loss, average=None):
        model, began = build().to(device), time.process_time()
        fitted = training.fit(
            model, train, epochs=options.epochs, batch_size=50, lr=2e-3, loss=loss, average=average, seed=0
        )
        networks[name] = model, time.process_time() - began, fitted.seconds.mean()
        return model

    threat = Linf(EPS)
    standard = trained("standard", training.cross_entropy)
    defended = trained("fast", training.growing(_fast, threat, share=0.5))
    for name, (loss, average) in methods(threat, options.steps, standard, defended).items():
        if name in [row["method"] for row in rows]:
            continue
        if name not in networks:
            trained(name, loss, average)
        model, cpu, seconds = networks[name]
        card = training.scorecard(model, few.x, few.y, threat, steps=20)
        row = {"method": name, **card, "clean": training.accuracy(model, test.x, test.y), "seconds": seconds,
               "cpu_seconds": cpu, "images": len(train), "epochs": options.epochs, "steps": options.steps,
               "tested": len(few), "network": options.network, "device": device.type}  # fmt: skip
        rows.append(row)
        pd.DataFrame(rows).round(4).to_csv(out, index=False)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def recipe(options, device):
    """Madry's training with a growing radius on MNIST; what stands under PGD-40 with restarts, and what it cost."""
    train, test = data.load("mnist", "train", n=options.images).to(device), data.load("mnist").to(device)
    model, began = NETWORKS[options.network]().to(device), time.process_time()
    loss = training.growing(functools.partial(training.adversarial, steps=options.steps), Linf(EPS), share=0.5)
    training.fit(model, train, epochs=options.epochs, batch_size=50, lr=2e-3, loss=loss, seed=0)
    minutes = (time.process_time() - began) / 60
    print(f"{options.network}, {60 * minutes:.0f} CPU seconds of training, {device}", flush=True)
    print(f"clean {training.accuracy(model, test.x, test.y):.4f}", flush=True)
    few, stands = test[:: max(1, len(test) // options.tested)], {}
    for restarts in (1, 20):
        attack = functools.partial(pgd, steps=40, alpha=0.01, restarts=restarts)
        result = robust_accuracy(model, few.x, few.y, Linf(EPS), [attack], seed=0)
        print(f"PGD-40, {restarts} restarts: {result}", flush=True)
        stands[restarts] = 100 * result.accuracy
    return [timing.at_least(7, "training recipe: % standing under PGD-40", stands[1], 80.0),
            timing.at_most(7, "training recipe: CPU minutes", minutes, 20.0)]  # fmt: skip


def main():
    options = timing.start(
        __doc__, rounds=7, batches=3, steps=5, table=False, recipe=False, network="wong_kolter", images=10_000, tested=1000,
        epochs=8, out=str(TABLE),
    )  # fmt: skip
    bars = (table if options.table else recipe if options.recipe else race)(options, timing.DEVICE)
    sys.exit(timing.verdict(bars or []))


if __name__ == "__main__":
    main()
