"""Universal, patch, spatial and Wasserstein attacks, side by side with those of ART.

    python3 course.py bench benchmarks/physical.py [--images 60] [--threads 1]

Equal images, network, budget and number of steps. A success counts when the plain model is wrong on an image that it had
right. For Wasserstein the exact distance of the results is computed too, by linear programming on the first images.
"""

import sys

import numpy as np
import timing
import torch

from tmlcourse import data, pretrained
from tmlcourse.attacks.physical import Patch, Views, patch
from tmlcourse.attacks.spatial import spatial
from tmlcourse.attacks.universal import fooling_rate, universal
from tmlcourse.attacks.wasserstein import wasserstein, wasserstein_distance
from tmlcourse.threat import Linf


@torch.no_grad()
def fooled(model, x, y):
    return (model(x).argmax(1) != y).float().mean().item()


def universal_race(model, art, x, y):
    from art.attacks.evasion import UniversalPerturbation

    attack = UniversalPerturbation(art, attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
                                   eps=0.3, norm=np.inf, max_iter=2, delta=0.05, verbose=False)  # fmt: skip

    def theirs():
        attack.generate(x.numpy(), y.numpy())
        return torch.from_numpy(np.asarray(attack.noise, dtype=np.float32)).reshape(x.shape[1:])

    rate = lambda v: fooling_rate(model, x, v, y=y)  # noqa: E731

    def ours(**options):
        return lambda: universal(model, x, y, Linf(0.3), seed=0, **options)

    return {"ours": ours(), "ours, DeepFool": ours(method="deepfool", passes=2), "art": theirs}, rate


def patch_race(model, art, x, y):
    from art.attacks.evasion import AdversarialPatchPyTorch

    def theirs():
        attack = AdversarialPatchPyTorch(art, rotation_max=20, scale_min=13 / 28, scale_max=0.465, patch_type="square",
                                         learning_rate=0.1, max_iter=3, batch_size=64, patch_shape=(1, 28, 28),
                                         optimizer="Adam", targeted=True, verbose=False)  # fmt: skip
        pattern, _ = attack.generate(x.repeat(10, 1, 1, 1).numpy(), np.full(10 * len(x), 8))
        pattern = torch.from_numpy(np.asarray(pattern, dtype=np.float32)).reshape(1, 28, 28)
        return Patch(pattern, torch.ones(1, 28, 28), Views(20, (13 / 28, 13 / 28), 7.5))

    def hit(found):  # in the same poses, whoever made it
        many, labels = x.repeat(20, 1, 1, 1), y.repeat(20)
        return (model(found.apply(many, seed=1)).argmax(1) == 8)[labels != 8].float().mean().item()

    def ours():
        return patch(model, x, y, target=8, size=13, scale=(1, 1), steps=3 * -(-10 * len(x) // 64), seed=0)

    return {"ours": ours, "art": theirs}, hit


def spatial_race(model, art, x, y):
    from art.attacks.evasion import SpatialTransformation

    def theirs():
        attack = SpatialTransformation(art, max_translation=100 * 3 / 28, num_translations=3, max_rotation=30,
                                       num_rotations=7, verbose=False)  # fmt: skip
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    score = lambda x_adv: fooled(model, x_adv, y)  # noqa: E731
    return {"ours": lambda: spatial(model, x, y, grid=(7, 3, 3), stop_early=True), "art": theirs}, score


def wasserstein_race(model, art, x, y):
    from art.attacks.evasion import Wasserstein

    x, y = x[:10], y[:10]

    def theirs():
        attack = Wasserstein(art, eps=0.3, eps_step=0.1, eps_iter=100, norm="inf", ball="wasserstein", max_iter=20,
                             regularization=1000, p=1, kernel_size=5, conjugate_sinkhorn_max_iter=50,
                             projected_sinkhorn_max_iter=50, batch_size=10, verbose=False)  # fmt: skip
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    def score(z):
        scaled = z * (x.sum((1, 2, 3)) / z.sum((1, 2, 3)).clamp_min(1e-9)).view(-1, 1, 1, 1)
        far = wasserstein_distance(x[:3], scaled[:3].clamp(0, None)).amax().item()
        lost = (1 - z.sum((1, 2, 3)) / x.sum((1, 2, 3))).abs().amax().item()
        print(f"    exact distance at most {far:.3f} on 3 images, mass changed by at most {lost:.2%}")
        return fooled(model, z, y)

    return {"ours": lambda: wasserstein(model, x, y, 0.3, steps=20, stop_early=True), "art": theirs}, score


def main():
    options = timing.start(__doc__, images=60)
    if not timing.installed("art"):
        sys.exit(timing.verdict([timing.at_least(3, "patch, spatial and other attacks beside ART's", None, 1.0)]))
    test = data.load("mnist", n=options.images, fallback="digits")[: options.images]
    model = pretrained.load(f"{test.name}-standard")
    art, bars = timing.art_classifier(model, test.x), []
    one = torch.zeros(1, requires_grad=True)
    one.grad = one.detach().clone()
    torch.optim.Adam([one]).step()  # its first step imports for a second or two, whoever takes it
    timing.headline(f"{len(test)} images of {test.name}")
    for title, make in {"spatial, 7 x 3 x 3": spatial_race, "patch 13 x 13, target 8": patch_race,
                        "universal, Linf .3": universal_race, "Wasserstein .3": wasserstein_race}.items():  # fmt: skip
        contestants, score = make(model, art, test.x, test.y)
        race = timing.in_turn(contestants, 1, warm_up=0)
        model.eval()
        success = {name: score(answer) for name, answer in race.answers.items()}
        print(f"\n{title}\n{race.table('ours', success=success)}", flush=True)
        bars += timing.strength(3, title, race, ["art"], {n: 1 - s for n, s in success.items()}, slack=0.02)
    sys.exit(timing.verdict(bars))


if __name__ == "__main__":
    main()
