#!/usr/bin/env python3
"""Draw the README's figure, book/_static/readme.webp, with the course's own code: digits, what an attack adds, the sums."""

from pathlib import Path

from tmlcourse import data, plot, pretrained
from tmlcourse.attacks import pgd
from tmlcourse.threat import Linf

test = data.load("mnist", n=200, fallback="digits")
model = pretrained.load(f"{test.name}-standard")
x_adv = pgd(model, test.x, test.y, Linf(0.15), steps=40, seed=0)
# One image of each class, among those that the network reads right and the attack turns.
read, misread = model(test.x).argmax(1), model(x_adv).argmax(1)
turned = (read == test.y) & (misread != test.y)
chosen = [int((turned & (test.y == k)).nonzero()[0]) for k in range(10) if (turned & (test.y == k)).any()]
figure = plot.perturbations(
    test.x[chosen], x_adv[chosen], labels=test.y[chosen], labels_adv=misread[chosen], data_name=f"{test.name}, ε = 0.15"
)
out = Path(__file__).resolve().parent.parent / "book" / "_static" / "readme.webp"
figure.savefig(out, dpi=200, facecolor="white", pil_kwargs={"quality": 85, "method": 6})
print(out)
