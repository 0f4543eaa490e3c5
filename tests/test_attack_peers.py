"""PGD against the libraries that people use: with equal budgets on one network, nobody leaves fewer images standing."""

import copy

import pgd as contest  # benchmarks/pgd.py: one place says how each library is called
import pytest
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import fgsm
from tmlcourse.threat import L2, Linf


@pytest.fixture(params=["digits-28x28", "mnist"])
def case(request):
    """A robust network and 160 of the images it was made for."""
    test = data.load("digits-28x28") if request.param == "digits-28x28" else request.getfixturevalue("mnist")
    return pretrained.load(f"{request.param}-robust"), test.x[:160], test.y[:160]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", ["foolbox", "art", "torchattacks"])
def test_pgd_leaves_no_more_images_standing_than_its_peers(peer, case):
    """From equal starts all walk the same path, and ours keeps the best point of it.

    From random starts that differ (as those of foolbox and ART must) the counts differ by luck, for every library alike.
    """
    pytest.importorskip(peer, reason=f"{peer} is not here; `course.py bench` has them all")
    model, x, y = case
    for seed in (None, 0, 1) if peer == "torchattacks" else (None,):
        theirs = contest.standing(model, getattr(contest, peer)(model, x.clone(), y, seed), y)
        assert contest.standing(model, contest.ours(model, x, y, seed), y) <= theirs
        assert 0 < theirs < 1, "an easy or hopeless network would compare nothing"


def test_fgsm_and_one_l2_step_equal_foolbox(case):
    """In double precision, because rounding decides the sign of a gradient that is nearly zero."""
    fb = pytest.importorskip("foolbox")
    model, x, y = copy.deepcopy(case[0]).double(), case[1].double(), case[2]
    wrapped = fb.PyTorchModel(model, bounds=(0, 1))
    for threat, attack in (
        (Linf(0.1), fb.attacks.LinfFastGradientAttack(random_start=False)),
        (L2(0.5), fb.attacks.L2FastGradientAttack(random_start=False)),
    ):
        theirs = attack(wrapped, x, y, epsilons=threat.eps)[1]
        ours = fgsm(model, x, y, threat)
        stepped = (ours != x).flatten(1).any(1)
        assert stepped.double().mean() > 0.5  # the others keep the clean image, because the step lowered their loss
        if isinstance(threat, Linf):
            assert ((ours - theirs)[stepped].abs() < 1e-9).double().mean() > 0.9999
        else:  # foolbox clips after the step, which leaves it inside the ball; ours is the projection on ball and box
            gain = [nn.functional.cross_entropy(model(v[stepped]), y[stepped]).item() for v in (ours, theirs)]
            assert gain[0] >= gain[1] * (1 - 1e-3)
