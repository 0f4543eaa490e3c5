"""The GPU kernels beside plain PyTorch and beside the roof of this machine's memory; recorded attacks beside the peers.

    python3 course.py bench benchmarks/kernels.py [--rounds 21]

On a GPU: for each kernel the time, the share of the measured copy bandwidth that its needed bytes make of it, and how many
times as long plain PyTorch takes; then PGD-40 on SmallCNN at batches of 128 and 1,024, launched one by one and recorded,
beside the libraries that a user would pick instead; then an epoch of training, launched one by one and recorded. Leaves with
status 1 where a bar is missed.

Without a GPU: what the choice between kernel and reference costs on the CPU, where it should cost nothing.
"""

import os
import statistics
import sys
from functools import partial

import pandas as pd
import pgd as contest  # benchmarks/pgd.py: one place says how each library is called
import timing
import torch

from tmlcourse import attacks, data, kernels, models, pretrained, training
from tmlcourse.kernels import ascent, backsubstitution, clipping, interval, roofline
from tmlcourse.threat import L1, L2, Linf

BANDWIDTH, FASTER = 0.8, 3.0  # bars of ascent_step and clip_and_sum: share of the copy bandwidth, times plain PyTorch
NO_GPU = "needs a GPU"
AGAINST_PEERS = {128: 3.0, 1024: 1.5}  # bars of the recorded attack, times as fast as the fastest peer


def textbook_clip(grads, clip):
    """As it is usually written: scale every gradient, then add."""
    norms = grads.square().sum(1).sqrt()
    return (grads * (clip / norms).clamp_max(1.0)[:, None]).sum(0)


def cases(device):
    """Name -> (plain PyTorch, kernel, bytes needed, whether the bars hold for it)."""
    x, grad = torch.rand(8192, 3, 32, 32, device=device), torch.randn(8192, 3, 32, 32, device=device)
    found = {}
    for threat in (Linf(8 / 255), L2(0.5), L1(12.0)):
        step = (x, grad, x, threat, 0.25 * threat.eps)
        found[f"ascent_step {type(threat).__name__}"] = (
            partial(ascent.reference, *step), partial(kernels.ascent_step, *step), ascent.traffic(x), True)  # fmt: skip
    grads = torch.randn(4096, 26_010, device=device)
    plain, kernel = partial(textbook_clip, grads, 1.0), partial(kernels.clip_and_sum, grads, 1.0)
    found["clip_and_sum"] = plain, kernel, clipping.traffic(grads), True
    found["clip_and_sum (our reference)"] = (
        partial(clipping.reference, [grads], 1.0), kernel, clipping.traffic(grads), False)  # fmt: skip
    weight, centre = torch.randn(4096, 4096, device=device), torch.rand(16, 4096, device=device)
    layer = (weight, torch.zeros(4096, device=device), centre, centre)
    plain, kernel = partial(interval.reference, *layer), partial(kernels.interval_linear, *layer)
    found["interval_linear"] = plain, kernel, interval.traffic(weight, centre), False
    a, lines = torch.randn(100_000, 1000, device=device), torch.rand(3, 200, 1000, device=device)
    rows = (a, *lines, torch.arange(len(a), device=device) % 200)
    found["relu_backsubstitution"] = (
        partial(backsubstitution.reference, *rows), partial(kernels.relu_backsubstitution, *rows),
        backsubstitution.traffic(a, lines[0]), False)  # fmt: skip
    return found


def on_gpu(rounds):
    """The two tables and their bars."""
    device, bars, rows = torch.device("cuda"), [], []
    copy = roofline.copy_bandwidth(device, megabytes=1024, rounds=rounds)
    print(f"copy bandwidth {copy / 1e9:,.0f} GB/s")
    for name, (plain, kernel, needed, barred) in cases(device).items():
        slow, fast = (roofline.seconds(f, rounds=rounds, device=device) for f in (plain, kernel))
        rows.append((name, 1e3 * slow, 1e3 * fast, needed / fast / copy, slow / fast))
        bars += promised(name, *rows[-1][3:]) if barred else []
    table = pd.DataFrame(rows, columns=["kernel", "PyTorch ms", "kernel ms", "share of copy", "times as fast"])
    print(table.round(3).to_string(index=False))
    epochs_of_training(device, rounds)
    return bars + [peers(device, rounds, batch, bar) for batch, bar in AGAINST_PEERS.items()]


def promised(name, share=None, ratio=None):
    """A kernel's two bars."""
    return [timing.at_least(11, f"{name}: share of the copy bandwidth", share, BANDWIDTH, note=NO_GPU),
            timing.at_least(11, f"{name}: plain PyTorch's time to ours", ratio, FASTER, note=NO_GPU)]  # fmt: skip


def peers(device, rounds, batch, bar):
    """PGD-40 on the SmallCNN, in turn, round after round; its bar."""
    test = data.load("mnist", n=batch, fallback="digits")[:batch].to(device)
    model = pretrained.load(f"{test.name}-standard", device=device)
    how = dict(steps=contest.STEPS, alpha=contest.ALPHA, batch_size=batch, seed=0)
    ours = partial(attacks.pgd, model, test.x, test.y, Linf(contest.EPS), **how)
    contest.BATCH = batch
    libraries = timing.present(contest.torchattacks, contest.foolbox, contest.art)
    contestants = {"recorded": ours, "launched one by one": partial(without_graphs, ours)}
    contestants |= {name: partial(library, model, test.x, test.y, 0) for name, library in libraries.items()}
    race = timing.in_turn(contestants, rounds, warm_up=2)
    print(f"\nPGD-40, batch {batch}, {test.name}\n{race.table('recorded')}")
    fastest, ratio = race.fastest(libraries, "recorded")
    return timing.at_least(11, pgd_says(batch), ratio, bar, peer=timing.version(fastest))


def epochs_of_training(device, rounds, batch=128):
    """Twenty batches of training as it is played back and as PyTorch launches it, for the standard loss and for Madry's."""
    train = data.load("mnist", "train", n=20 * batch, fallback="digits-28x28").to(device)
    losses = {"standard": training.cross_entropy, "Madry, ten steps": training.adversarial(Linf(contest.EPS), steps=10)}
    for name, loss in losses.items():
        model = models.small_cnn(seed=0).to(device)
        ours = partial(training.fit, model, train, loss=loss, epochs=1, batch_size=batch, lr=1e-4, seed=0)
        race = timing.in_turn(
            {"recorded": ours, "launched one by one": partial(without_graphs, ours)}, rounds, warm_up=2
        )
        print(f"\n{len(train.x) // batch} batches of {batch}, {name}, {train.name}\n{race.table('recorded')}")


def pgd_says(batch):
    return f"PGD-40 on a GPU, batch {batch}: the fastest peer's time to ours"


def without_graphs(attack):
    os.environ["TMLCOURSE_GRAPHS"] = "0"
    try:
        return attack()
    finally:
        del os.environ["TMLCOURSE_GRAPHS"]


def on_cpu(rounds):
    """What the choice costs where it always falls on the reference: the two in turn, round after round."""
    torch.manual_seed(0)
    x, grad, grads = torch.rand(64, 1, 28, 28), torch.randn(64, 1, 28, 28), torch.randn(64, 8000)
    weight, bias, centre = torch.randn(100, 784), torch.zeros(100), torch.rand(64, 784)
    a, lines = torch.randn(2000, 100), torch.rand(3, 2000, 100)
    both = {
        "ascent_step": (kernels.ascent_step, ascent.reference, (x, grad, x, Linf(0.1), 0.01)),
        "clip_and_sum": (kernels.clip_and_sum, clipping.reference, ([grads], 1.0)),
        "interval_linear": (kernels.interval_linear, interval.reference, (weight, bias, centre, centre)),
        "relu_backsubstitution": (kernels.relu_backsubstitution, backsubstitution.reference, (a, *lines)),
    }
    rows = []
    for name, (chosen, reference, arguments) in both.items():
        taken = [
            [roofline.seconds(partial(f, *arguments), rounds=9) for f in (reference, chosen)] for _ in range(rounds)
        ]
        plain = statistics.median(t for t, _ in taken)
        rows.append((name, 1e6 * plain, 1e6 * statistics.median(b - a for a, b in taken)))
    table = pd.DataFrame(rows, columns=["on the CPU", "reference, microseconds", "choice, microseconds"])
    print(table.round(1).to_string(index=False))
    kernels_barred = (*(f"ascent_step {norm}" for norm in ("Linf", "L2", "L1")), "clip_and_sum")
    bars = [bar for name in kernels_barred for bar in promised(name)]
    return bars + [timing.at_least(11, pgd_says(batch), None, bar, note=NO_GPU) for batch, bar in AGAINST_PEERS.items()]


def main():
    options = timing.start(__doc__, rounds=21)
    timing.headline(f"{options.rounds} rounds")
    bars = (on_gpu if timing.DEVICE.type == "cuda" else on_cpu)(options.rounds)
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
