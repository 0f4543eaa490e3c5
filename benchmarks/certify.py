"""Certificates, side by side with what a reader would write first: time of bounds, of exact programs, and what they decide.

    python3 course.py bench benchmarks/certify.py [--images 256] [--rounds 5] [--threads 1] [--programs 20] [--limit 60]

Bounds: CROWN against the dense reference (every row of every layer, all images at once), intervals against two matrix
products a layer, each as the median ratio over rounds taken in turn. Programs: `verify` against the textbook program
(interval bounds, every neuron a binary variable, one program a rival, PuLP's CBC) on the same images.
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import time

import numpy as np
import pulp
import torch

from tmlcourse import data, models, pretrained, training
from tmlcourse.certify import margins, verify
from tmlcourse.certify.bounds import ball
from tmlcourse.threat import Linf


def linears(model):
    return [m for m in model if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def dense_crown(model, x, y, eps):
    """CROWN written plainly for an MLP: batched matrices, all rows of all layers, nothing skipped."""
    box = ball(x.flatten(1), eps)
    c, r = box.centre[:, :, None], box.radius[:, :, None]
    layers, bounds = linears(model), []

    def lower(a, k):
        const = a @ layers[k].bias
        a = a @ layers[k].weight
        for (low, high), layer in zip(reversed(bounds[:k]), reversed(layers[:k]), strict=True):
            up, down = high.clamp_min(0), low.clamp_max(0)
            slope = up / (up - down).clamp_min(1e-30)
            below = (high > -low).to(a.dtype)
            plus, minus = a.clamp_min(0), a.clamp_max(0)
            const = const - (minus * (slope * down)[:, None]).sum(2)
            a = plus * below[:, None] + minus * slope[:, None]
            const = const + a @ layer.bias
            a = a @ layer.weight
        return (a @ c - a.abs() @ r).squeeze(2) + const

    for k, layer in enumerate(layers[:-1]):
        eye = torch.eye(layer.out_features).expand(len(x), -1, -1)
        bounds.append((lower(eye, k), -lower(-eye, k)))
    last = torch.eye(layers[-1].out_features)
    return lower(last[y][:, None] - last, len(layers) - 1)


@torch.no_grad()
def two_products(model, x):
    """The arithmetic that interval bounds cannot do without."""
    c = x.flatten(1)
    r = torch.full_like(c, 0.02)
    for layer in linears(model):
        c, r = (
            torch.nn.functional.linear(c, layer.weight, layer.bias),
            torch.nn.functional.linear(r, layer.weight.abs()),
        )
        c, r = c.relu(), r
    return c, r


def textbook(model, x, y, eps, limit):
    """The lecture's program as it stands on the slide; "robust", "vulnerable" or "unknown"."""
    began = time.perf_counter()
    low, high = ((x + s).clamp(0, 1).flatten().double().numpy() for s in (-eps, eps))
    layers = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in linears(model)]
    for rival in (j for j in range(layers[-1][0].shape[0]) if j != y):
        problem = pulp.LpProblem("margin", pulp.LpMinimize)
        z = [pulp.LpVariable(f"x{i}", a, b) for i, (a, b) in enumerate(zip(low, high, strict=True))]
        l_in, u_in = low, high
        for k, (w, b) in enumerate(layers[:-1]):
            plus, minus = np.maximum(w, 0), np.minimum(w, 0)
            below, above = plus @ l_in + minus @ u_in + b, plus @ u_in + minus @ l_in + b
            after = []
            for i in range(len(b)):
                value = pulp.lpSum(c * v for c, v in zip(w[i], z, strict=True)) + b[i]
                p, v = pulp.LpVariable(f"z{k}_{i}", 0), pulp.LpVariable(f"v{k}_{i}", cat="Binary")
                problem += p >= value
                problem += max(above[i], 0) * v >= p
                problem += value >= p + (1 - v) * min(below[i], 0)
                after.append(p)
            z, l_in, u_in = after, np.maximum(below, 0), np.maximum(above, 0)
        w, b = layers[-1]
        problem.setObjective(pulp.lpSum(c * v for c, v in zip(w[y] - w[rival], z, strict=True)) + b[y] - b[rival])
        left = limit - (time.perf_counter() - began)
        if left <= 0:
            return "unknown"
        problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=left))
        if problem.sol_status != pulp.LpSolutionOptimal:
            return "unknown"
        if pulp.value(problem.objective) < 0:
            return "vulnerable"
    return "robust"


def marabou(model, x, y, eps, limit):
    """Marabou's answer, one query a rival ("is z_rival >= z_y possible?"); "robust", "vulnerable" or "unknown"."""
    from maraboupy import Marabou, MarabouCore

    began, verdict = time.perf_counter(), "robust"
    layers = [(m.weight.detach().double().tolist(), m.bias.detach().double().tolist()) for m in linears(model)]
    for rival in (j for j in range(len(layers[-1][1])) if j != y):
        query = Marabou.InputQuery()
        query.setNumberOfVariables(x.numel() + 2 * sum(len(b) for _, b in layers))
        for i, (a, b) in enumerate(zip((x - eps).clamp(0, 1).flatten(), (x + eps).clamp(0, 1).flatten(), strict=True)):
            query.setLowerBound(i, float(a))
            query.setUpperBound(i, float(b))
            query.markInputVariable(i, i)
        z, free = list(range(x.numel())), x.numel()

        def equation(kind, terms, scalar, query=query):
            row = MarabouCore.Equation(kind)
            for c, v in terms:
                row.addAddend(c, v)
            row.setScalar(scalar)
            query.addEquation(row)

        for k, (weight, bias) in enumerate(layers):
            before = list(range(free, free + len(bias)))
            after, free = [v + len(bias) for v in before], free + 2 * len(bias)
            for w, b, v in zip(weight, bias, before, strict=True):
                equation(MarabouCore.Equation.EQ, [*zip(w, z, strict=True), (-1.0, v)], -b)
            if k < len(layers) - 1:
                for v, r in zip(before, after, strict=True):
                    MarabouCore.addReluConstraint(query, v, r)
            z = after if k < len(layers) - 1 else before
        equation(MarabouCore.Equation.GE, [(1.0, z[rival]), (-1.0, z[y])], 0.0)
        left = limit - (time.perf_counter() - began)
        if left < 1:
            return "unknown"
        exit_code, _, _ = MarabouCore.solve(query, Marabou.createOptions(timeoutInSeconds=int(left), verbosity=0), "")
        if exit_code == "sat":
            return "vulnerable"
        verdict = verdict if exit_code == "unsat" else "unknown"
    return verdict


def in_turn(contestants, rounds):
    """Median seconds and median ratio to the first contestant, over rounds in which each runs once."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            if number:
                seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"  {name:34} {1000 * statistics.median(own):9.1f} ms   {ratio:6.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--programs", type=int, default=20)
    parser.add_argument("--limit", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = (data.load("mnist", split, fallback="digits") for split in ("train", "test"))
    x, y = test.x[: options.images], test.y[: options.images]
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}; "
          f"{len(x)} images of {test.name}")  # fmt: skip

    def trained(hidden, eps):
        model = models.mlp(tuple(x.shape[1:]), hidden=hidden, seed=0)
        loss = training.adversarial(Linf(eps), training.single_step, alpha=1.25 * eps)
        training.fit(model, train, epochs=3, loss=loss, seed=0)
        return model

    model = trained((200, 200), 0.02)
    for kind, net in (("adversarially trained", model), ("untrained", models.mlp(tuple(x.shape[1:]), seed=0))):
        print(f"MLP 200-200, eps .02, {kind}")
        assert torch.allclose(margins(net, x[:8], y[:8], 0.02), dense_crown(net, x[:8], y[:8], 0.02), atol=1e-2)
        dense, ours = (functools.partial(f, net, x, y, 0.02) for f in (dense_crown, margins))
        in_turn({"dense CROWN": dense, "tmlcourse crown": ours}, options.rounds)
    floor, ours = functools.partial(two_products, model, x), functools.partial(margins, model, x, y, 0.02, method="ibp")
    in_turn({"two products a layer": floor, "tmlcourse ibp": ours}, options.rounds)
    for name, eps in (("fast-at-mnist-0.3", 0.02), ("wong-kolter-mnist-0.1", 0.1)):
        try:
            net = pretrained.load(name)
        except FileNotFoundError as error:
            print(f"{name}: not here ({error})")
            continue
        some = x[:64], y[:64]
        print(f"{name}, eps {eps}, {len(some[0])} images")
        in_turn({"tmlcourse crown": lambda n=net, e=eps, s=some: margins(n, *s, e)}, options.rounds)
    if options.programs:
        net = trained((100, 100), 0.1)
        some = x[: options.programs], y[: options.programs]
        print(
            f"exact, MLP 100-100 trained adversarially at eps .1, {options.programs} images, {options.limit:g} s each"
        )
        began = time.perf_counter()
        ours = [v.status for v in verify(net, *some, 0.1, time_limit=options.limit)]
        mine = time.perf_counter() - began
        print(f"  tmlcourse verify {mine:8.1f} s   " + ", ".join(f"{ours.count(s)} {s}" for s in sorted(set(ours))))
        began = time.perf_counter()
        book = [textbook(net, a, int(b), 0.1, options.limit) for a, b in zip(*some, strict=True)]
        theirs = time.perf_counter() - began
        print(f"  textbook, CBC    {theirs:8.1f} s   " + ", ".join(f"{book.count(s)} {s}" for s in sorted(set(book))))
        assert all(a == b for a, b in zip(ours, book, strict=True) if "unknown" not in (a, b)), (ours, book)
        print(f"  textbook / tmlcourse: {theirs / mine:.1f}")
        if importlib.util.find_spec("maraboupy"):
            few = [i for i in range(options.programs)][:5]
            began = time.perf_counter()
            peer = [marabou(net, x[i], int(y[i]), 0.1, options.limit) for i in few]
            theirs = time.perf_counter() - began
            print(
                f"  Marabou          {theirs:8.1f} s   " + ", ".join(f"{peer.count(s)} {s}" for s in sorted(set(peer)))
            )
            began = time.perf_counter()
            verify(net, x[few], y[few], 0.1, time_limit=options.limit)
            print(f"  the same {len(few)} images, tmlcourse: {time.perf_counter() - began:.1f} s")
            assert all(a == b for a, b in zip(ours, peer, strict=False) if "unknown" not in (a, b)), (ours, peer)


if __name__ == "__main__":
    main()
