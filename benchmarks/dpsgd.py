"""A private step beside a plain one and beside Opacus, on the network of Opacus's MNIST tutorial.

    python3 course.py bench benchmarks/dpsgd.py [--batches 256 1024] [--rounds 9] [--threads 1]

One step is: a batch, its clipped and noised gradient, an SGD update. The contestants take their steps in turn, round after
round; the table gives the median seconds, the median of each round's ratio to the plain step, and the memory that a step
needs at its peak, measured in a process of its own (Linux).
"""

import functools
import subprocess
import sys
import warnings

import timing
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
    if timing.installed("opacus"):
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
    print(timing.peak(lambda: [step() for _ in range(3)]))


def main():
    options = timing.start(__doc__, batches=[256, 1024], rounds=9)
    timing.headline(f"{options.rounds} rounds after one warm-up")
    ours, bars = "tmlcourse books", []
    for size in options.batches:
        race = timing.in_turn(
            {n: make(*batch(size, timing.DEVICE)) for n, make in contestants().items()}, options.rounds
        )
        measurable = timing.DEVICE.type == "cpu" and sys.platform == "linux"
        memory = {name: peak(name, size) for name in race.seconds} if measurable else {}
        print(f"\nbatch {size}\n{race.table('plain SGD', **{'peak MiB': memory})}", flush=True)
        peers = [name for name in race.seconds if name.startswith("opacus")]
        fastest, ratio = race.fastest(peers, ours)
        if size <= 256:
            over = race.ratio(ours, "plain SGD")
            bars.append(timing.at_most(10, f"DP-SGD step to a plain one, batch {size}", over, 1.5, peer="plain SGD"))
        else:
            says = f"DP-SGD: fastest of Opacus to ours, batch {size}"
            bars.append(timing.at_least(10, says, ratio, 1.0, peer=timing.version(fastest)))
        least = min(peers, key=memory.get, default="") if measurable else ""
        share = memory[ours] / memory[least] if least else None
        says = f"DP-SGD: memory to the least of Opacus, batch {size}"
        bars.append(timing.at_most(10, says, share, 1.0, peer=timing.version(least)))
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
