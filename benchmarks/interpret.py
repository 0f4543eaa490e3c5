"""Explanations beside Captum's, on the course's convolutional network for digits.

    python3 course.py bench benchmarks/interpret.py [--images 100] [--rounds 9] [--threads 1]

Integrated gradients (50 steps) are compared with the floor, the same forward and backward passes and nothing else, in
batches that fit the caches; relevance propagation and occlusion with Captum. The contestants take turns, round after round;
a ratio is the median over the rounds of two times of one round. Exit status 1 where a bar is missed.
"""

import sys

import timing
import torch
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.interpret.gradients import integrated_gradients
from tmlcourse.interpret.masks import occlusion
from tmlcourse.interpret.relevance import lrp

STEPS, BATCH, WINDOW, STRIDE = 50, 32, 5, 2


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
    import captum.attr as peer
    from captum.attr._utils.lrp_rules import EpsilonRule

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
    options = timing.start(__doc__, images=100, rounds=9)
    test = data.load("mnist", n=options.images, fallback="digits").to(timing.DEVICE)
    model = pretrained.load(f"{test.name}-standard", device=timing.DEVICE)
    timing.headline(f"{len(test)} images of {test.name}, {options.rounds} rounds after one warm-up")
    race = timing.in_turn(contestants(model, test.x, test.y), options.rounds)
    print(race.table("the passes alone"))
    over = race.ratio("integrated gradients", "the passes alone")
    bars = [timing.at_most(9, "integrated gradients to its passes alone", over, 1.03, peer="bare loop")]
    for name, bar in (("LRP", 2.0), ("occlusion", 2.5)):
        faster = race.ratio(f"captum {name}", name)
        bars.append(timing.at_least(9, f"{name}: Captum's time to ours", faster, bar, peer=timing.version("captum")))
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
