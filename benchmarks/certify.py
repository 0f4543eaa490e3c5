"""Certificates, side by side with what a reader would write first: time of bounds, of exact programs, and what they decide.

    python3 course.py bench benchmarks/certify.py [--images 256] [--rounds 5] [--threads 1] [--programs 20] [--limit 60]
        [--decide 1000] [--bounds-off]

Bounds: CROWN against the dense reference (every row of every layer, all images at once), intervals against two matrix
products a layer, each as the median ratio over rounds taken in turn. Programs: `verify` against the textbook program
(interval bounds, every neuron a binary variable, one program a rival, PuLP's CBC) on the same images. Ours has a minute an
image; where another one stops at `--limit` seconds, the ratio is a lower bound. `--decide N`: the exact error of the network
that ships with the course, on N images.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pulp
import timing
import torch

from tmlcourse import data, models, pretrained, training
from tmlcourse.certify import margins, verify
from tmlcourse.certify.bounds import ball
from tmlcourse.threat import Linf

LIRPA = 24.0  # ms an image that auto_LiRPA took for CROWN on such networks, if it is not asked anew (see auto_lirpa.py)
LIMIT = 60.0  # seconds an image that the exact program may take
CERTIFIED = "mnist-certified"


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


def beside_lirpa(net, x, y, eps, options):
    """(ours, auto_LiRPA's) milliseconds of CROWN an image, in turn, and its name; as measured once where it is not here."""
    call = functools.partial(margins, net, x, y, eps)
    python = os.environ.get("TMLCOURSE_LIRPA")
    if not python:
        race = timing.in_turn({"crown": call}, options.rounds)
        return 1000 * race.median("crown") / len(x), LIRPA, "auto_LiRPA as measured once"
    with tempfile.TemporaryDirectory() as folder:
        given = {name: v.numpy() for name, v in net.state_dict().items()}
        np.savez(f"{folder}/given.npz", x=x, y=y, eps=eps, threads=options.threads, **given)
        command = [python, str(Path(__file__).with_name("auto_lirpa.py")), f"{folder}/given.npz"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        expected = float(call().sum())
        with subprocess.Popen(command, text=True, **pipes) as peer:

            def ask():
                peer.stdin.write("\n")
                peer.stdin.flush()
                seconds, total = next(line for line in peer.stdout if line.startswith("answer")).split()[1:]
                assert abs(float(total) - expected) < 1e-2 * len(x), "the bounds are not the same"
                return float(seconds)

            now, seconds = timing.clock(), {"crown": [], "auto_LiRPA": []}
            for _ in range(1 + options.rounds):
                seconds["auto_LiRPA"].append(ask())
                began = now()
                call()
                seconds["crown"].append(now() - began)
            peer.stdin.close()
    race = timing.Race({name: values[1:] for name, values in seconds.items()}, {})
    ours = 1000 * race.median("crown") / len(x)
    return ours, ours * race.ratio("auto_LiRPA", "crown"), "auto_LiRPA 0.3"


def bounds(train, test, options):
    """The bars of CROWN, of intervals, and of memory."""
    x, y = test.x[: options.images], test.y[: options.images]
    model, bars = trained(train, (200, 200), 0.02), []
    for kind, net, bar in (
        ("adversarially trained", model, 0.5),
        ("untrained", models.mlp(test.shape, seed=0), 1.0),
    ):
        assert torch.allclose(margins(net, x[:8], y[:8], 0.02), dense_crown(net, x[:8], y[:8], 0.02), atol=1e-2)
        calls = {"dense CROWN": dense_crown, "crown": margins}
        race = timing.in_turn({n: functools.partial(f, net, x, y, 0.02) for n, f in calls.items()}, options.rounds)
        print(f"\nMLP 200-200, eps .02, {kind}\n{race.table('dense CROWN')}", flush=True)
        ratio = race.ratio("crown", "dense CROWN")
        bars.append(timing.at_most(4, f"CROWN to the dense one, {kind} MLP", ratio, bar, peer="plain PyTorch"))
    calls = {"two products": functools.partial(two_products, model, x),
             "ibp": functools.partial(margins, model, x, y, 0.02, method="ibp")}  # fmt: skip
    race = timing.in_turn(calls, 9 * options.rounds, warm_up=9)
    print(f"\nintervals\n{race.table('two products')}", flush=True)
    ratio = race.ratio("ibp", "two products")
    bars.append(timing.at_most(4, "intervals to two products a layer", ratio, 1.1, peer="plain PyTorch"))
    for name, eps in (("fast-at-mnist-0.3", 0.02), ("wong-kolter-mnist-0.1", 0.1)):
        try:
            net = pretrained.load(name)
        except FileNotFoundError as error:
            bars.append(
                timing.at_least(4, f"CROWN, {name}: auto_LiRPA's time to ours", None, 5.0, note=str(error)[:60])
            )
            continue
        mine, theirs, peer = beside_lirpa(net, x[:64], y[:64], eps, options)
        print(f"\n{name}, eps {eps}: {mine:.2f} ms an image; {peer} {theirs:.2f}", flush=True)
        bars.append(timing.at_least(4, f"CROWN, {name}: auto_LiRPA's time to ours", theirs / mine, 5.0, peer=peer))
    net, many = pretrained.load(CERTIFIED), data.load("mnist", n=1000, fallback="digits")
    held = timing.peak(lambda: margins(net, many.x, many.y, 0.1))
    bars.append(timing.at_most(4, f"MiB of CROWN for {len(many)} images, {CERTIFIED}", held, 2048.0, peer=""))
    return bars


def programs(train, test, options):
    """The bars of the exact program, on the wall: solvers have processes of their own."""
    net, some = trained(train, (100, 100), 0.1), test[: options.programs]
    print(
        f"\nexact, MLP 100-100 trained adversarially at eps .1, {len(some)} images, {LIMIT:g} s each for ours, "
        f"{options.limit:g} s for the others",
        flush=True,
    )
    began = time.perf_counter()
    ours = [v.status for v in verify(net, some.x, some.y, 0.1, time_limit=LIMIT)]
    mine = time.perf_counter() - began
    print(f"  ours     {mine:8.1f} s   {counts(ours)}", flush=True)
    bars = [timing.at_most(4, f"exact program: open of {len(some)} images", ours.count("unknown"), 0)]
    for name, solve, images, least in (("CBC", textbook, some, 20.0), ("maraboupy", marabou, some[:5], 1.0)):
        says, answers, began = f"exact program: {name}'s time to ours, at least", [], time.perf_counter()
        if name == "maraboupy" and not timing.installed(name):
            bars.append(timing.at_least(4, says, None, least))
            continue
        answers = [solve(net, a, int(b), 0.1, options.limit) for a, b in zip(images.x, images.y, strict=True)]
        theirs, same = time.perf_counter() - began, mine
        assert all(a == b for a, b in zip(ours, answers, strict=False) if "unknown" not in (a, b)), (ours, answers)
        if len(images) < len(some):
            began = time.perf_counter()
            verify(net, images.x, images.y, 0.1, time_limit=LIMIT)
            same = time.perf_counter() - began
        print(f"  {name:9}{theirs:8.1f} s   {counts(answers)} (ours for these {same:.1f} s)", flush=True)
        peer = f"CBC, PuLP {pulp.__version__}" if name == "CBC" else timing.version(name)
        bars.append(timing.at_least(4, says, theirs / same, least, peer=peer))
    return bars


def exact_error(options):
    """The first images all decided, in time in proportion to 15 minutes for 1,000, on the cores that are there."""
    test, began = data.load("mnist", n=options.decide), time.perf_counter()
    verdicts = verify(pretrained.load(CERTIFIED), test.x, test.y, 0.1, n_jobs=2)
    seconds, answers = time.perf_counter() - began, [v.status for v in verdicts]
    print(f"\n{CERTIFIED}, eps .1, {len(test)} images in {seconds:.0f} s: {counts(answers)}", flush=True)
    return [timing.at_most(4, f"exact error: open of {len(test)} images", answers.count("unknown"), 0),
            timing.at_most(4, f"exact error: minutes for {len(test)} images", seconds / 60, 0.015 * len(test))]  # fmt: skip


def counts(answers):
    return ", ".join(f"{answers.count(s)} {s}" for s in sorted(set(answers)))


def trained(train, hidden, eps):
    model = models.mlp(train.shape, hidden=hidden, seed=0)
    loss = training.adversarial(Linf(eps), training.single_step, alpha=1.25 * eps)
    training.fit(model, train, epochs=3, loss=loss, seed=0)
    return model


def main():
    options = timing.start(__doc__, images=256, rounds=5, programs=20, limit=60.0, decide=0, bounds_off=False)
    train, test = (data.load("mnist", split, fallback="digits") for split in ("train", "test"))
    timing.headline(f"{options.images} images of {test.name}")
    bars = [] if options.bounds_off else bounds(train, test, options)
    if options.programs:
        bars += programs(train, test, options)
    if options.decide:
        bars += exact_error(options)
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
