"""The defences' layers, side by side with the library that has them too: milliseconds and the largest difference.

    python3 course.py bench benchmarks/defenses.py [--images 100] [--rounds 7] [--threads 1]

Both contestants filter the same images in turn, round after round; medians are compared. Randomised pruning has no
counterpart there: it is compared with drawing one index after the other, as its paper writes it.
"""

from functools import partial

import timing
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


def main():
    options = timing.start(__doc__, images=100, rounds=7)
    test = data.load("mnist", n=options.images, fallback="digits")
    x, active = test.x, torch.rand(64, 4096, generator=torch.Generator().manual_seed(0))
    timing.headline(f"{len(x)} images of {test.name}, {options.rounds} rounds after one warm-up")
    for layer in (BitDepth(1), MedianFilter(2), MedianFilter(3), Thermometer(16)):
        race = timing.in_turn({"ours": partial(layer, x), "art": partial(art(layer), x)}, options.rounds)
        mine, theirs = race.answers["ours"], race.answers["art"]
        if isinstance(layer, Thermometer):  # their first lamp is always lit, our last one never
            mine, theirs = mine[:, :-1], theirs[:, 1:]
        print(f"\n{layer}, largest difference {(mine - theirs).abs().max().item():.2g}\n{race.table('ours')}")
    layer = ActivationPruning(1.0)
    race = timing.in_turn({"ours": partial(layer, active), "plain": partial(one_by_one(layer), active)}, options.rounds)
    print(f"\n{layer}\n{race.table('ours')}")


if __name__ == "__main__":
    main()
