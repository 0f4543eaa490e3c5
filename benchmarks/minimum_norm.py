"""Minimum-norm attacks side by side with the libraries a user would pick instead: success, mean distance, time.

    python3 course.py bench benchmarks/minimum_norm.py [--images 64] [--rounds 3] [--threads 1] [--only deepfool cw]

All contestants of a group attack the same images of the same network in turn, round after round, with the same budget; the
distance is averaged over the images that every contestant of the group broke. Times: the median, and the median of each
round's ratio to ours.
"""

import functools
import sys

import timing
import torch

from tmlcourse import data, pretrained
from tmlcourse.attacks import minimum_norm as ours
from tmlcourse.threat import L0, L1, L2, Linf


def _foolbox(attack, model, x, y):
    import foolbox as fb

    return attack(fb.PyTorchModel(model, bounds=(0, 1)), x, fb.criteria.Misclassification(y), epsilons=None)[0]


def foolbox_deepfool_l2(model, x, y):
    import foolbox as fb

    return _foolbox(fb.attacks.L2DeepFoolAttack(steps=50, overshoot=0.02), model, x, y)


def foolbox_deepfool_linf(model, x, y):
    import foolbox as fb

    return _foolbox(fb.attacks.LinfDeepFoolAttack(steps=50, overshoot=0.02), model, x, y)


def torchattacks_deepfool_l2(model, x, y):
    import torchattacks

    return torchattacks.DeepFool(model, steps=50, overshoot=0.02)(x, y)


def art_deepfool_l2(model, x, y):
    from art.attacks.evasion import DeepFool

    attack = DeepFool(
        timing.art_classifier(model, x), max_iter=50, epsilon=0.02, nb_grads=10, batch_size=64, verbose=False
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy())).to(x.device)


def foolbox_cw_l2(model, x, y):
    import foolbox as fb

    attack = fb.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=50, stepsize=0.1, initial_const=1.0)
    return _foolbox(attack, model, x, y)


def torchattacks_cw_l2(model, x, y):
    """It has no search for c; all of the 250 steps go into one run."""
    import torchattacks

    return torchattacks.CW(model, c=1, kappa=0, steps=250, lr=0.1)(x, y)


def art_cw_l2(model, x, y):
    from art.attacks.evasion import CarliniL2Method

    attack = CarliniL2Method(
        timing.art_classifier(model, x),
        binary_search_steps=5,
        max_iter=50,
        learning_rate=0.1,
        initial_const=1.0,
        batch_size=64,
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


def foolbox_ead(model, x, y):
    """Its threshold is not scaled by the step: .03 at step .03 is beta = 1 of ours."""
    import foolbox as fb

    attack = fb.attacks.EADAttack(
        binary_search_steps=5,
        steps=50,
        initial_stepsize=0.03,
        initial_const=1.0,
        regularization=0.03,
        decision_rule="L1",
    )
    return _foolbox(attack, model, x, y)


def torchattacks_fab(model, x, y):
    import torchattacks

    return torchattacks.FAB(model, norm="Linf", eps=1.0, steps=20, n_restarts=1, n_classes=10)(x, y)


def torchattacks_jsma(model, x, y):
    """Towards the label after the true one, its default; ours is given the same targets."""
    import torchattacks

    return torchattacks.JSMA(model, theta=1.0, gamma=0.25)(x, y)


GROUPS = {
    "deepfool": (L2(0.0), lambda m, x, y: ours.deepfool(m, x, y),
                 foolbox_deepfool_l2, torchattacks_deepfool_l2, art_deepfool_l2),
    "deepfool_linf": (Linf(0.0), lambda m, x, y: ours.deepfool(m, x, y, norm="linf"), foolbox_deepfool_linf),
    "cw": (L2(0.0), lambda m, x, y: ours.carlini_wagner(m, x, y), foolbox_cw_l2, torchattacks_cw_l2, art_cw_l2),
    "ead": (L1(0.0), lambda m, x, y: ours.elastic_net(m, x, y), foolbox_ead),
    "fab": (Linf(0.0), lambda m, x, y: ours.fab(m, x, y, steps=20), torchattacks_fab),
    "jsma": (L0(0), lambda m, x, y: ours.jsma(m, x, y, target=(y + 1) % 10), torchattacks_jsma),
}  # fmt: skip


def contest(name, model, x, y, rounds):
    """Print the table of one group; its bars."""
    ball, mine, *peers = GROUPS[name]
    contestants = {"ours": mine, **timing.present(*peers)}
    calls = {n: functools.partial(attack, model, x.clone(), y) for n, attack in contestants.items()}
    race = timing.in_turn(calls, rounds, warm_up=0)
    with torch.no_grad():
        goal = {n: model(x_adv.detach()).argmax(1) for n, x_adv in race.answers.items()}
    broken = {n: found == (y + 1) % 10 if name == "jsma" else found != y for n, found in goal.items()}
    common = torch.stack(list(broken.values())).all(0)
    mean = {n: ball.norm(x_adv.detach() - x)[common].double().mean().item() for n, x_adv in race.answers.items()}
    success = {n: b.double().mean().item() for n, b in broken.items()}
    print(f"\n{name}\n{race.table('ours', success=success, **{'mean distance': mean})}", flush=True)
    loss = {n: mean[n] if success[n] >= success["ours"] else torch.inf for n in contestants}
    return timing.strength(3, f"{name}, mean distance", race, list(contestants)[1:], loss, slack=0.01 * mean["ours"])


def main():
    options = timing.start(__doc__, images=64, rounds=3, only=list(GROUPS))
    test = data.load("mnist", n=options.images + 20, fallback="digits").to(timing.DEVICE)
    model = pretrained.load(f"{test.name}-standard", device=timing.DEVICE)
    with torch.no_grad():
        right = (model(test.x).argmax(1) == test.y).nonzero().squeeze(1)[: options.images]
    timing.headline(f"{len(right)} images of {test.name} that the standard net gets right, {options.rounds} rounds")
    sys.exit(timing.verdict([
        bar for name in options.only for bar in contest(name, model, test.x[right], test.y[right], options.rounds)
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
