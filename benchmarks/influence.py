"""Influence of every training image on a few predictions: ours beside Captum's, and both beside training again.

    python3 course.py bench benchmarks/influence.py [--images 1000 13007] [--test 5] [--points 20] [--threads 1]

Logistic regression on MNIST, 1 against 7, 785 weights, lambda .01. Ours: the exact Hessian by Cholesky, conjugate gradients,
and LiSSA, on a model that has just been trained, so that nothing is prepared. Captum's: `NaiveInfluenceFunction` on the same
weights as a network of one layer. Each is timed once after a warm-up on a small problem. The bar: the exact solver is at
least 16 times as fast as Captum's, and its removals correlate with training again by .999; the exit status says so.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
import timing
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tmlcourse import data
from tmlcourse.interpret.influence import influence, regression, removal, retrain

BAR, LAM = 16.0, 0.01


def ones_and_sevens(split):
    full = data.load("mnist", split)
    two = full[(full.y == 1) | (full.y == 7)]
    return two.x.double(), two.y


def captum_influence(model, X, y, x_test, y_test):
    """Captum's naive influence function: the Hessian by autograd, its eigenvectors, all of them, and per-sample gradients."""
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.Flatten(0)).double()
    with torch.no_grad():
        net[1].weight.copy_(model.theta[:-1].T)
        net[1].bias.copy_(model.theta[-1])

    def load(module, file):
        module.load_state_dict(torch.load(file, weights_only=True))
        return 1.0

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "checkpoint.pt")
        torch.save(net.state_dict(), path)
        began = timing.clock()()
        theirs = NaiveInfluenceFunction(
            net, TensorDataset(X, (y == 7).double()), path, checkpoints_load_func=load, batch_size=500,
            loss_fn=nn.BCEWithLogitsLoss(reduction="sum"), sample_wise_grads_per_batch=True,
            projection_dim=model.theta.numel(), hessian_reg=LAM * len(X), show_progress=False,
        )  # fmt: skip
        score = theirs.influence((x_test, (y_test == 7).double()))
        return -score.detach(), timing.clock()() - began


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def timed(function, *arguments, rounds=3, **options):
    """The answer, and the median seconds of fresh calls: the factor that a model keeps is thrown away before each."""
    seconds = []
    for _ in range(rounds):
        arguments[0].__dict__.pop("_kept", None)
        began = timing.clock()()
        answer = function(*arguments, **options)
        seconds.append(timing.clock()() - began)
    return answer, statistics.median(seconds)


def main():
    options = timing.start(__doc__, images=[1000], test=5, points=20)
    timing.headline(f"{options.test} predictions")
    (X, y), (x_test, y_test) = ones_and_sevens("train"), ones_and_sevens("test")
    rows, bars = [], []
    for count in options.images:
        images, labels = X[:count], y[:count]
        began = timing.clock()()
        model = regression(images, labels, lam=LAM)
        rows.append((count, "training to the optimum", timing.clock()() - began, float("nan")))
        hard = model.losses(x_test, y_test).topk(options.test).indices
        test = model, x_test[hard], y_test[hard]
        exact, fast = timed(influence, *test)
        rows.append((count, "ours, exact", fast, 1.0))
        for solver in ("cg", "lissa"):
            other, seconds = timed(influence, *test, solver=solver, seed=0)
            rows.append((count, f"ours, {solver}", seconds, pearson(other, exact)))
        slower, about = None, dict(note="captum is not installed")
        if timing.installed("captum"):
            theirs, seconds = captum_influence(model, images, labels, x_test[hard], y_test[hard])
            rows.append((count, "Captum, naive", seconds, pearson(theirs, exact)))
            slower, about = seconds / fast, dict(peer=timing.version("captum"))
        bars.append(timing.at_least(9, f"influence of {count} images: Captum's time to ours", slower, BAR, **about))
        points = exact[0].abs().topk(options.points).indices
        before = model.losses(x_test[hard[:1]], y_test[hard[:1]])
        actual = torch.cat(
            [retrain(model, i[None]).losses(x_test[hard[:1]], y_test[hard[:1]]) - before for i in points]
        )
        found = [pearson(removal(*test, leverage=k)[0, points], actual) for k in (False, True)]
        print(f"{count} images: Pearson against training again {found[0]:.5f}, with leverage {found[1]:.5f}")
        bars.append(
            timing.at_least(9, f"influence of {count} images: correlation with training again", found[1], 0.999)
        )
    print(
        pd.DataFrame(rows, columns=["images", "method", "seconds", "Pearson with exact"])
        .round(4)
        .to_string(index=False)
    )
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
