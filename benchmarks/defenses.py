"""The defences' layers, side by side with the library that has them too: milliseconds and the largest difference.

    python3 course.py bench benchmarks/defenses.py [--images 100] [--rounds 7] [--threads 1]

Both contestants filter the same images in turn, round after round; medians are compared. Randomised pruning has no
counterpart there: it is compared with drawing one index after the other, as its paper writes it.
"""

import argparse
import platform
import statistics
import time

import pandas as pd
import torch

from tmlcourse import data
from tmlcourse.defenses import ActivationPruning, BitDepth, MedianFilter, Thermometer


def art(layer):
    """The same filter of the Adversarial Robustness Toolbox, images -> images."""
    from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing, ThermometerEncoding

    theirs = {
        BitDepth: lambda: FeatureSqueezing(clip_values=(0, 1), bit_depth=layer.bits),
        MedianFilter: lambda: SpatialSmoothing(window_size=layer.size, channels_first=True),
        Thermometer: lambda: ThermometerEncoding(clip_values=(0, 1), num_space=layer.levels, channels_first=True),
    }[type(layer)]()
    return lambda x: torch.from_numpy(theirs(x.numpy().copy())[0])


def one_by_one(layer):
    """Stochastic activation pruning with `torch.multinomial`."""

    def prune(a):
        p = a / a.sum(1, keepdim=True)
        draws = round(layer.share * a.shape[1])
        kept = torch.zeros_like(p).scatter_(1, torch.multinomial(p, draws, replacement=True), 1.0)
        return a * kept / (1 - (1 - p) ** draws).clamp_min(1e-12)

    return prune


def milliseconds(contestants, x, rounds):
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run(x)
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    test = data.load("mnist", n=options.images, fallback="digits")
    x, active = test.x, torch.rand(64, 4096, generator=torch.Generator().manual_seed(0))
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, {test.name}"
    )
    rows = []
    for layer in (BitDepth(1), MedianFilter(2), MedianFilter(3), Thermometer(16)):
        peer = art(layer)
        ours, theirs = layer(x), peer(x)
        if isinstance(layer, Thermometer):  # their first lamp is always lit, our last one never
            ours, theirs = ours[:, :-1], theirs[:, 1:]
        difference = (ours - theirs).abs().max().item()
        spent = milliseconds({"ours": layer, "peer": peer}, x, options.rounds)
        rows.append({"layer": str(layer), "against": "ART", **spent, "largest difference": difference})
    layer = ActivationPruning(1.0)
    spent = milliseconds({"ours": layer, "peer": one_by_one(layer)}, active, options.rounds)
    rows.append({"layer": str(layer), "against": "one by one", **spent, "largest difference": float("nan")})
    table = pd.DataFrame(rows).rename(columns={"ours": "ours (ms)", "peer": "peer (ms)"})
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
