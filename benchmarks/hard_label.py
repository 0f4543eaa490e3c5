"""Attacks that see only the winning label, at one query budget, beside the libraries that have one: distance and time.

    python3 course.py bench benchmarks/hard_label.py [--images 10] [--queries 2000] [--rounds 1] [--threads 1]

ART has Sign-OPT, with a limit of queries; HopSkipJump (ART, foolbox) and the boundary attack (foolbox) look for the same
nearest image by other walks, and are given as many steps as the budget allows. Queries are counted at one door, distances
are taken over the images that everyone broke; times are medians over the rounds, in which the contestants take turns.
"""

import functools
import sys

import numpy as np
import timing
import torch
from timing import Counted

from tmlcourse import data, pretrained
from tmlcourse.attacks import opt_attack, sign_opt


def ours(attack):
    return lambda net, x, y, queries: attack(net, x, y, queries=queries, seed=0)


def art_sign_opt(net, x, y, queries):
    from art.attacks.evasion import SignOPTAttack

    attack = SignOPTAttack(
        timing.art_classifier(net, x), targeted=False, query_limit=queries, num_trial=20, k=50, verbose=False
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), np.eye(10)[y.cpu()])).to(x)


def art_hop_skip_jump(net, x, y, queries):
    """100 evaluations a step grow with the root of its number: so many steps as fit."""
    from art.attacks.evasion import HopSkipJump

    steps = max(1, int((queries / 150) ** 0.75))
    attack = HopSkipJump(
        timing.art_classifier(net, x), max_iter=steps, max_eval=1000, init_eval=100, init_size=20, verbose=False
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy())).to(x)


def _foolbox(attack, net, x, y):
    import foolbox as fb

    return attack(fb.PyTorchModel(net, bounds=(0, 1)), x, fb.criteria.Misclassification(y), epsilons=None)[0]


def foolbox_boundary(net, x, y, queries):
    """Two queries a step or a little more, and the search for a start."""
    import foolbox as fb

    start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=20)
    return _foolbox(fb.attacks.BoundaryAttack(init_attack=start, steps=int(queries / 2.2)), net, x, y)


def foolbox_hop_skip_jump(net, x, y, queries):
    import foolbox as fb

    start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(directions=20, steps=20)
    steps = max(1, int((queries / 150) ** 0.75))
    attack = fb.attacks.HopSkipJumpAttack(init_attack=start, steps=steps, initial_gradient_eval_steps=100)
    return _foolbox(attack, net, x, y)


def counted(attack, net, x, y, queries):
    """(what the attack made, queries that an image cost)."""
    torch.manual_seed(0)
    np.random.seed(0)
    door = Counted(net).eval()
    return attack(door, x.clone(), y, queries).detach(), door.rows / len(x)


def main():
    options = timing.start(__doc__, images=10, queries=2000, rounds=1)
    test = data.load("mnist", fallback="digits").to(timing.DEVICE)
    net = pretrained.load(f"{test.name}-standard", device=timing.DEVICE)
    with torch.no_grad():
        right = (net(test.x[:1000]).argmax(1) == test.y[:1000]).nonzero().flatten()[: options.images]
    x, y = test.x[right], test.y[right]
    timing.headline(f"{len(x)} images of {test.name}, {options.queries} queries each")
    peers = timing.present(art_sign_opt, art_hop_skip_jump, foolbox_boundary, foolbox_hop_skip_jump)
    contestants = {"ours": ours(sign_opt), "ours, q=20": ours(functools.partial(sign_opt, q=20)),
                   "ours, opt_attack": ours(opt_attack), **peers}  # fmt: skip
    calls = {n: functools.partial(counted, attack, net, x, y, options.queries) for n, attack in contestants.items()}
    race = timing.in_turn(calls, options.rounds, warm_up=0)
    spent = {name: queries for name, (_, queries) in race.answers.items()}
    with torch.no_grad():
        fell = {name: net(x_adv).argmax(1) != y for name, (x_adv, _) in race.answers.items()}
    length = {name: (x_adv - x).flatten(1).norm(dim=1).double() for name, (x_adv, _) in race.answers.items()}
    everyone = torch.stack(list(fell.values())).all(0)
    mean = {name: values[everyone].mean().item() for name, values in length.items()}
    fooled = {n: f.double().mean().item() for n, f in fell.items()}
    table = race.table(
        "ours",
        fooled=fooled,
        **{"mean L2": mean, "median L2": {n: v[everyone].median().item() for n, v in length.items()}},
        **{"queries an image": spent, "microseconds a query": {
            n: 1e6 * race.median(n) / (q * len(x)) for n, q in spent.items()}},
    )  # fmt: skip
    print(table.to_string())
    loss = {n: mean[n] if fooled[n] >= fooled["ours"] else torch.inf for n in contestants}
    bars = timing.strength(3, "Sign-OPT, mean L2", race, peers, loss, slack=0.02 * mean["ours"])
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
