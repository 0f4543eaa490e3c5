"""Privacy attacks beside those of a peer (ART), and deep leakage beside the published loop with PyTorch's own L-BFGS.

    python3 course.py bench benchmarks/privacy_attacks.py [--images 4] [--shadows 32] [--threads 1]

The same network, the same data, the same gradient. Strength first (advantage, true-positive rate, mean squared error,
fidelity), then seconds. ART's membership attack gets what an attacker with labelled examples would have: half of the
members and of the others, in place of shadow models; it is judged, like ours, on the other half.
"""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import timing
import torch
import torch.nn.functional as F

from tmlcourse import data, models, privacy


def published_loop(net, g, shape, steps, seed):
    """DLG as its authors describe it: one image, one start, L-BFGS with unit steps over image and label logits."""
    torch.manual_seed(seed)
    x, y = torch.randn(1, *shape, requires_grad=True), torch.randn(1, 10, requires_grad=True)
    search = torch.optim.LBFGS([x, y])

    def closure():
        search.zero_grad()
        loss = -(y.softmax(1) * net(x).log_softmax(1)).sum()
        mine = torch.autograd.grad(loss, [*net.parameters()], create_graph=True)
        value = sum((a - b).square().sum() for a, b in zip(mine, g.values(), strict=True))
        x.grad, y.grad = torch.autograd.grad(value, [x, y])
        return value

    for _ in range(steps):
        search.step(closure)
    return x.detach()


def leakage(images):
    test = data.load("mnist", fallback="digits")[:images]
    net, rows = privacy.leaky_lenet(test.shape, seed=1), []
    g = privacy.per_example_gradients(net, test.x, test.y)
    for name, steps in (("ours, all at once", 300), ("published loop", 15), ("published loop", 50)):
        began = time.perf_counter()
        if name.startswith("ours"):
            found = privacy.gradient_leakage(net, g, shape=test.shape, steps=steps, seed=0).x
        else:
            found = torch.cat([published_loop(net, {k: v[i : i + 1] for k, v in g.items()}, test.shape, steps, i)
                               for i in range(len(test))])  # fmt: skip
        seconds = time.perf_counter() - began
        error = (found - test.x).square().flatten(1).mean(1)
        rows.append((f"{name}, {steps} steps", int((error < 1e-3).sum()), error.median().item(), seconds / len(test)))
    columns = ["gradient leakage", f"below 1e-3 of {len(test)}", "median error", "s an image"]
    share = rows[0][1] / len(test)
    return rows, columns, [timing.at_least(10, "gradient leakage: share of images below 1e-3", share, 0.6)]


def membership(shadows):
    train = data.load("mnist", "train", fallback="digits")
    x, y = F.avg_pool2d(train.x[:1400], 2), train.y[:1400]
    pool = SimpleNamespace(x=x, y=y)
    began = time.perf_counter()
    stack = privacy.train_shadows(lambda seed: models.mlp((1, 14, 14), hidden=(32,), seed=seed), pool, n=shadows + 4,
                                  epochs=30, batch_size=50, seed=0)  # fmt: skip
    training = time.perf_counter() - began
    victims, rows = stack[shadows:], []
    judged = torch.arange(len(y)) % 2 == 1
    theirs = ("ART: black box, nn", "ART: black box, gb", "ART: rule") if timing.installed("art") else ()
    for name in ("ours: loss", "ours: shadow", "ours: lira", *theirs):
        began, kind = time.perf_counter(), name.split(": ")[1]
        scores = torch.stack([
            privacy.membership_inference(victims.model(i), x, y, method=kind, shadows=stack[:shadows], seed=i)
            if name.startswith("ours") else art_scores(kind, victims.model(i), x, y, victims.members[i], judged)
            for i in range(4)
        ])[:, judged]  # fmt: skip
        seen = victims.members[:, judged]
        found = privacy.compare_scores(scores[seen], scores[~seen])
        rows.append((name, found.advantage, found.tpr, found.auc, time.perf_counter() - began))
    print(f"{shadows + 4} networks trained in {training:.1f} s")
    columns, (loss, _, lira, *theirs) = ["membership inference", "advantage", "TPR at 0.1 %", "AUC", "seconds"], rows
    gain = lira[1] - max(row[1] for row in theirs) if theirs else None
    peer = timing.version("art" if theirs else "")
    return (
        rows,
        columns,
        [
            timing.at_least(
                10, "LiRA: hits at .1 %, less the threshold's", lira[2] - loss[2], 0.0, peer="loss threshold"
            ),
            timing.at_least(10, "LiRA: advantage, less the peer's best", gain, 0.0, peer=peer),
        ],
    )


def art_scores(kind, model, x, y, members, judged):
    """Probabilities of "member" by ART's attacks; those that learn do so on the half that is not judged."""
    from art.attacks.inference.membership_inference import (
        MembershipInferenceBlackBox,
        MembershipInferenceBlackBoxRuleBased,
    )

    classifier = art_classifier(model, x)
    a, b = x.numpy(), y.numpy()
    if kind == "rule":
        return torch.from_numpy(MembershipInferenceBlackBoxRuleBased(classifier).infer(a, b)).double()
    own, others = ((members & ~judged).numpy(), (~members & ~judged).numpy())
    attack = MembershipInferenceBlackBox(classifier, attack_model_type=kind.split(", ")[1])
    attack.fit(a[own], b[own], a[others], b[others])
    return torch.from_numpy(np.asarray(attack.infer(a, b, probabilities=True))).double().view(len(y), -1)[:, -1]


def art_classifier(model, x):
    return timing.art_classifier(model, x, optimizer=torch.optim.Adam(model.parameters(), lr=2e-3))


def extraction(queries=500, epochs=20):
    from art.attacks.extraction import CopycatCNN, KnockoffNets

    from tmlcourse import training

    train, test = data.load("mnist", "train", fallback="digits"), data.load("mnist", fallback="digits")[:1000]
    box = models.mlp(train.shape, hidden=(100,), seed=0)
    training.fit(box, train[:6000], epochs=5, seed=0)
    own, rows = train.x[-queries:], []
    fresh = lambda: models.mlp(train.shape, hidden=(64,), seed=3)  # noqa: E731
    for name, answers in (("ours", "probabilities"), ("ours", "labels"), ("ART: Copycat", ""), ("ART: Knockoff", "")):
        began = time.perf_counter()
        if name == "ours":
            copy = privacy.extract_network(
                lambda x: box(x).softmax(1), own, fresh(), answers=answers, epochs=epochs, seed=0
            )
        else:
            thief, victim = (art_classifier(m, own) for m in (fresh(), torch.nn.Sequential(box, torch.nn.Softmax(1))))
            options = dict(batch_size_fit=50, batch_size_query=500, nb_epochs=epochs, nb_stolen=queries)
            attack = CopycatCNN(victim, **options) if "Copycat" in name else KnockoffNets(
                victim, sampling_strategy="random", use_probability=True, verbose=False, **options)  # fmt: skip
            copy = attack.extract(own.numpy(), thieved_classifier=thief).model.eval()
        rows.append((f"{name} {answers}".strip(), privacy.fidelity(box, copy, test.x), time.perf_counter() - began))
    gain = rows[0][1] - max(row[1] for row in rows[2:])
    return rows, [f"extraction, {queries} questions", "fidelity", "seconds"], [
        timing.at_least(10, "extraction: fidelity, less the peer's best", gain, 0.0, peer=timing.version("art"))
    ]  # fmt: skip


def main():
    options = timing.start(__doc__, images=4, shadows=32)
    timing.headline("seconds on the wall")
    calls = [lambda: leakage(options.images), lambda: membership(options.shadows)]
    bars = []
    for call in calls + ([extraction] if timing.installed("art") else []):
        rows, columns, found = call()
        print(
            pd.DataFrame(rows, columns=columns).to_string(index=False, float_format="{:.4g}".format), "\n", flush=True
        )
        bars += found
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
