"""A private step beside a plain one and beside Opacus, on the network of Opacus's MNIST tutorial.

    python3 course.py bench benchmarks/dpsgd.py [--batches 256 1024] [--rounds 9] [--threads 1]

One step is: a batch, its clipped and noised gradient, an SGD update. The contestants take their steps in turn, round after
round; the table gives the median seconds, the median of each round's ratio to the plain step, and the memory that a step
needs at its peak, measured in a process of its own (Linux).
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from tmlcourse.privacy.dp_sgd import clipped_gradient

CLIP, NOISE, LR = 1.0, 1.1, 0.1
OPACUS = ("hooks", "ew", "functorch", "ghost")


def network():
    """Conv 16 of 8 x 8 and stride 2, pool, conv 32 of 4 x 4 and stride 2, pool, 32, 10."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(16, 32, 4, 2), nn.ReLU(),
        nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def plain(x, y):
    model = network().to(x.device)
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)

    def step():
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()

    return step


def ours(x, y, method="books"):
    model = network().to(x.device)
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    params = dict(model.named_parameters())

    def step():
        sums, _ = clipped_gradient(model, x, y, CLIP, method=method)
        for name, p in params.items():
            p.grad = (sums[name] + NOISE * CLIP * torch.randn_like(p)) / len(x)
        optimiser.step()

    return step


def opacus(x, y, mode):
    from opacus.grad_sample import wrap_model
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model, criterion = network().to(x.device), nn.CrossEntropyLoss()
    if mode == "ghost":
        wrapped = wrap_model(model, grad_sample_mode="ghost", max_grad_norm=CLIP, use_ghost_clipping=True)
        maker, loss_of = DPOptimizerFastGradientClipping, None
    else:
        wrapped, maker, loss_of = wrap_model(model, grad_sample_mode=mode), DPOptimizer, criterion
    optimiser = maker(torch.optim.SGD(wrapped.parameters(), lr=LR), noise_multiplier=NOISE, max_grad_norm=CLIP,
                      expected_batch_size=len(x))  # fmt: skip
    loss_of = loss_of or DPLossFastGradientClipping(wrapped, optimiser, criterion)

    def step():
        optimiser.zero_grad()
        loss_of(wrapped(x), y).backward()
        optimiser.step()

    step.model, step.optimiser = wrapped, optimiser
    return step


def contestants():
    found = {"plain SGD": plain, "tmlcourse books": ours, "tmlcourse vmap": functools.partial(ours, method="vmap")}
    if importlib.util.find_spec("opacus"):
        found |= {f"opacus {mode}": functools.partial(opacus, mode=mode) for mode in OPACUS}
    return found


def batch(size, device):
    torch.manual_seed(1)
    return torch.rand(size, 1, 28, 28, device=device), torch.randint(0, 10, (size,), device=device)


def peak(name, size):
    """Peak memory of three steps beyond what the program and the batch hold, in MiB, from a process of its own."""
    code = f"import dpsgd; dpsgd.measure({name!r}, {size})"
    answer = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return float(answer.stdout.split()[-1])


def measure(name, size):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    warm = contestants()[name](*batch(8, "cpu"))
    warm()
    step = contestants()[name](*batch(size, "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    for _ in range(3):
        step()
    print((kilobytes("VmHWM") - before) / 1024)


def kilobytes(entry):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(entry))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{options.rounds} rounds after one warm-up")  # fmt: skip
    for size in options.batches:
        steps = {name: make(*batch(size, device)) for name, make in contestants().items()}
        seconds = {name: [] for name in steps}
        for number in range(options.rounds + 1):
            for name, step in steps.items():
                began, cpu = time.perf_counter(), time.thread_time()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                wall, cpu = time.perf_counter() - began, time.thread_time() - cpu
                if number:
                    seconds[name].append(
                        cpu if device.type == "cpu" and options.threads == 1 else wall
                    )  # others may be working, too
        rows = []
        for name, spent in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(spent, seconds["plain SGD"], strict=True))
            memory = peak(name, size) if device.type == "cpu" and sys.platform == "linux" else float("nan")
            rows.append((name, 1000 * statistics.median(spent), ratio, memory))
        table = pd.DataFrame(rows, columns=["contestant", "ms", "ratio to plain", "peak MiB"])
        print(f"\nbatch {size}\n{table.to_string(index=False, float_format='{:.2f}'.format)}")


if __name__ == "__main__":
    main()
