"""PGD against the libraries that people use: with equal budgets on one network, nobody leaves fewer images standing."""

import warnings

import pytest
import torch
from torch import nn

from tmlcourse import data, pretrained
from tmlcourse.attacks import fgsm, pgd
from tmlcourse.threat import L2, Linf

EPS, ALPHA, STEPS = 0.3, 0.01, 40


def foolbox(model, x, y):
    fb = pytest.importorskip("foolbox")
    attack = fb.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=ALPHA, steps=STEPS, random_start=True)
    return attack(fb.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=EPS)[1]


def art(model, x, y):
    estimators = pytest.importorskip("art.estimators.classification")
    evasion = pytest.importorskip("art.attacks.evasion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = estimators.PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=10,
            clip_values=(0, 1),
            device_type="cpu",
        )
        attack = evasion.ProjectedGradientDescentPyTorch(
            classifier,
            norm="inf",
            eps=EPS,
            eps_step=ALPHA,
            max_iter=STEPS,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def torchattacks(model, x, y):
    library = pytest.importorskip(
        "torchattacks", reason="torchattacks pins an old requests: `course.py bench` runs this"
    )
    return library.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=True)(x, y)


def standing(model, x_adv, y):
    with torch.no_grad():
        return int((model(x_adv).argmax(1) == y).sum())


@pytest.fixture(params=["digits-28x28", "mnist"])
def case(request):
    """A robust network and 100 of the images it was made for."""
    test = data.load("digits-28x28") if request.param == "digits-28x28" else request.getfixturevalue("mnist")
    return pretrained.load(f"{request.param}-robust"), test.x[:100], test.y[:100]


@pytest.mark.parametrize("peer", [foolbox, art, torchattacks])
def test_pgd_leaves_no_more_images_standing_than_its_peers(peer, case):
    model, x, y = case
    torch.manual_seed(0)
    theirs = standing(model, peer(model, x.clone(), y), y)
    model.eval()  # some of them change the mode
    ours = standing(model, pgd(model, x, y, Linf(EPS), steps=STEPS, alpha=ALPHA, seed=0), y)
    assert ours <= theirs
    assert 0 < theirs < 100, "an easy or hopeless network would compare nothing"


def test_fgsm_and_one_l2_step_equal_foolbox(case):
    fb = pytest.importorskip("foolbox")
    model, x, y = case
    wrapped = fb.PyTorchModel(model, bounds=(0, 1))
    for threat, attack in ((Linf(0.1), fb.attacks.LinfFastGradientAttack(random_start=False)),
                           (L2(0.5), fb.attacks.L2FastGradientAttack(random_start=False))):  # fmt: skip
        theirs = attack(wrapped, x, y, epsilons=threat.eps)[1]
        ours = fgsm(model, x, y, threat)
        stepped = (ours != x).flatten(1).any(1)
        assert stepped.float().mean() > 0.5  # the others keep the clean image, because the step lowered their loss
        loss = [nn.functional.cross_entropy(model(v[stepped]), y[stepped], reduction="none") for v in (ours, theirs)]
        if isinstance(threat, Linf):
            torch.testing.assert_close(ours[stepped], theirs[stepped], atol=1e-5, rtol=0)
        else:  # foolbox clips after the step; the exact projection on ball and box may only do better to first order
            assert (loss[0] - loss[1]).mean() > -1e-3
