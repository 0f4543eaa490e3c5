"""Explanations beside Captum's, on the course's convolutional network for digits.

    python3 course.py bench benchmarks/interpret.py [--images 100] [--rounds 9] [--threads 1]

Integrated gradients (50 steps) are compared with the floor, the same forward and backward passes and nothing else, in
batches that fit the caches; relevance propagation and occlusion with Captum. The contestants take turns, round after round;
a ratio is the median over the rounds of two times of one round. Exit status 1 where a bar is missed.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings

import captum.attr as peer
import pandas as pd
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.interpret.gradients import integrated_gradients
from tmlcourse.interpret.masks import occlusion
from tmlcourse.interpret.relevance import lrp

STEPS, BATCH, WINDOW, STRIDE = 50, 32, 5, 2
BARS = [("integrated gradients", "the passes alone", 1.03, "at most"), ("LRP", "captum LRP", 2.0, "at least"),
        ("occlusion", "captum occlusion", 2.5, "at least")]  # fmt: skip


class WithoutFlatten(nn.Module):
    """The same network for Captum's LRP, which knows no Flatten layer."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in model if not isinstance(layer, nn.Flatten))
        self.flat = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Flatten))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x.flatten(1) if i == self.flat else x)
        return x


def contestants(model, x, y):
    def passes():
        for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            for _ in range(STEPS):
                leaf = part.detach().requires_grad_()
                torch.autograd.grad(model(leaf).gather(1, labels[:, None]).sum(), leaf)

    def captum_lrp():
        for layer in model:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.rule = EpsilonRule(1e-6)
        peer.LRP(WithoutFlatten(model)).attribute(x.clone(), target=y)

    window = dict(sliding_window_shapes=(x.shape[1], WINDOW, WINDOW), strides=(x.shape[1], STRIDE, STRIDE))
    gradients = peer.IntegratedGradients(model)
    return {
        "the passes alone": passes,
        "integrated gradients": lambda: integrated_gradients(model, x, y, steps=STEPS),
        "captum integrated gradients": lambda: gradients.attribute(x, target=y, n_steps=STEPS),
        "captum integrated gradients, batch": lambda: gradients.attribute(
            x, target=y, n_steps=STEPS, internal_batch_size=len(x)
        ),
        "LRP": lambda: lrp(model, x, y),
        "captum LRP": captum_lrp,
        "occlusion": lambda: occlusion(model, x, y, window=WINDOW, stride=STRIDE),
        "captum occlusion": lambda: peer.Occlusion(model).attribute(x, target=y, **window),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    test = data.load("mnist", n=options.images, fallback="digits").to(device)
    model = pretrained.load(f"{test.name}-standard", device=device)
    print(f"{platform.processor() or platform.machine()}, {device}, {options.threads} threads, torch {torch.__version__}; "
          f"{len(test)} images of {test.name}, {options.rounds} rounds after one warm-up")  # fmt: skip
    steps = contestants(model, test.x, test.y)
    seconds = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            began, cpu = time.perf_counter(), time.thread_time()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - began, time.thread_time() - cpu
            if number:  # alone on a thread, its own time counts: others may be working, too
                seconds[name].append(cpu if device.type == "cpu" and options.threads == 1 else wall)
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    table = pd.DataFrame({"ms": {name: 1000 * spent for name, spent in median.items()}})
    print(table.to_string(float_format="{:.0f}".format))

    missed = 0
    for ours, theirs, bar, kind in BARS:
        pair = (ours, theirs) if kind == "at most" else (theirs, ours)
        ratio = statistics.median(a / b for a, b in zip(seconds[pair[0]], seconds[pair[1]], strict=True))
        met = ratio <= bar if kind == "at most" else ratio >= bar
        print(f"{pair[0]} / {pair[1]}: {ratio:.2f}, {kind} {bar}: {'met' if met else 'MISSED'}")
        missed += not met
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
