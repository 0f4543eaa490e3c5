"""The GPU kernels beside plain PyTorch and beside the roof of this machine's memory; recorded attacks beside the peers.

    python3 course.py bench benchmarks/kernels.py [--rounds 21]

On a GPU: for each kernel the time, the share of the measured copy bandwidth that its needed bytes make of it, and how many
times as long plain PyTorch takes; then PGD-40 on SmallCNN at batches of 128 and 1,024, launched one by one and recorded,
beside the libraries that a user would pick instead. Leaves with status 1 where a bar is missed.

Without a GPU: what the choice between kernel and reference costs on the CPU, where it should cost nothing.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
import warnings
from functools import partial

import pandas as pd
import pgd as contest  # benchmarks/pgd.py: one place says how each library is called
import torch

from tmlcourse import attacks, data, kernels, pretrained
from tmlcourse.kernels import ascent, backsubstitution, clipping, interval, roofline
from tmlcourse.threat import L1, L2, Linf

BANDWIDTH, FASTER = 0.8, 3.0  # bars of ascent_step and clip_and_sum: share of the copy bandwidth, times plain PyTorch
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
    """The two tables; returns the bars that were missed."""
    device, missed, rows = torch.device("cuda"), [], []
    copy = roofline.copy_bandwidth(device, megabytes=1024, rounds=rounds)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy bandwidth {copy / 1e9:,.0f} GB/s; {rounds} rounds"
    )
    for name, (plain, kernel, needed, barred) in cases(device).items():
        slow, fast = (roofline.seconds(f, rounds=rounds, device=device) for f in (plain, kernel))
        share, ratio = needed / fast / copy, slow / fast
        rows.append((name, 1e3 * slow, 1e3 * fast, share, ratio))
        missed += [f"{name}: {share:.2f} of the copy bandwidth"] if barred and share < BANDWIDTH else []
        missed += [f"{name}: {ratio:.2f} times plain PyTorch"] if barred and ratio < FASTER else []
    table = pd.DataFrame(rows, columns=["kernel", "PyTorch ms", "kernel ms", "share of copy", "times as fast"])
    print(table.round(3).to_string(index=False))
    return missed + peers(device, rounds)


def peers(device, rounds):
    """PGD-40 on the SmallCNN, in turn, round after round."""
    missed = []
    for batch, bar in AGAINST_PEERS.items():
        test = data.load("mnist", n=batch, fallback="digits")[:batch].to(device)
        model = pretrained.load(f"{test.name}-standard", device=device)
        how = dict(steps=contest.STEPS, alpha=contest.ALPHA, batch_size=batch, seed=0)
        ours = partial(attacks.pgd, model, test.x, test.y, Linf(contest.EPS), **how)
        contestants = {"recorded": ours, "launched one by one": partial(without_graphs, ours)}
        contest.BATCH = batch
        for library in (contest.torchattacks, contest.foolbox, contest.art):
            if importlib.util.find_spec(library.__name__):
                contestants[library.__name__] = partial(library, model, test.x, test.y, 0)
        taken = {name: [] for name in contestants}
        for number in range(rounds + 2):
            for name, attack in contestants.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                attack()
                torch.cuda.synchronize()
                if number > 1:
                    taken[name].append(time.perf_counter() - began)
        table = pd.DataFrame({"ms": {name: 1e3 * statistics.median(t) for name, t in taken.items()}})
        print(f"\nPGD-40, batch {batch}, {test.name}\n{table.round(2)}")
        others = [name for name in contestants if name not in ("recorded", "launched one by one")]
        if others:
            fastest = min(table.ms[others]) / table.ms["recorded"]
            print(f"fastest peer / recorded: {fastest:.2f}")
            missed += [f"PGD-40 at {batch}: {fastest:.2f} times the fastest peer"] if fastest < bar else []
    return missed


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
    print("no GPU: skipped")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        print(f"{platform.processor() or platform.machine()}, cpu, torch {torch.__version__}")
        return on_cpu(options.rounds)
    missed = on_gpu(options.rounds)
    print("\n" + ("\n".join(f"missed: {m}" for m in missed) or "every bar is met"))
    return sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
