"""Evasion attacks: find an image near x that the model gets wrong.

White box: `gradient`, `auto`, `minimum_norm`, `feature`, `universal`, `physical`, `spatial`, `wasserstein`. Black box,
through the counting door of `queries`: `zeroth_order`, `square`, `hard_label`, `transfer`, `reprogram`. `evaluation` sums up.
"""

from .auto import apgd, apgd_targeted, autoattack, checkpoints
from .evaluation import RobustAccuracy, robust_accuracy
from .feature import feature_adversary, features
from .gradient import fgsm, pgd
from .hard_label import opt_attack, sign_opt
from .losses import cross_entropy, difference, dlr, margin, targeted_dlr
from .minimum_norm import carlini_wagner, deepfool, elastic_net, fab, fab_bounded, jsma, lbfgs, one_pixel
from .physical import Patch, Sticker, Views, non_printability, patch, sticker, total_variation
from .queries import BudgetExceeded, Queries
from .reprogram import Program, reprogram
from .spatial import affine, spatial
from .square import square
from .transfer import difference_of_means, substitute
from .universal import data_free, fooling_rate, universal
from .wasserstein import project_wasserstein, wasserstein, wasserstein_distance
from .zeroth_order import autozoom, finite_difference, nes, zo_adam, zo_admm, zo_ngd, zo_signsgd, zo_svrg, zoo

__all__ = [
    "BudgetExceeded",
    "Patch",
    "Program",
    "Queries",
    "RobustAccuracy",
    "Sticker",
    "Views",
    "affine",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "autozoom",
    "carlini_wagner",
    "checkpoints",
    "cross_entropy",
    "data_free",
    "deepfool",
    "difference",
    "difference_of_means",
    "dlr",
    "elastic_net",
    "fab",
    "fab_bounded",
    "feature_adversary",
    "features",
    "fgsm",
    "finite_difference",
    "fooling_rate",
    "jsma",
    "lbfgs",
    "margin",
    "nes",
    "non_printability",
    "one_pixel",
    "opt_attack",
    "patch",
    "pgd",
    "project_wasserstein",
    "reprogram",
    "robust_accuracy",
    "sign_opt",
    "spatial",
    "square",
    "sticker",
    "substitute",
    "targeted_dlr",
    "total_variation",
    "universal",
    "wasserstein",
    "wasserstein_distance",
    "zo_adam",
    "zo_admm",
    "zo_ngd",
    "zo_signsgd",
    "zo_svrg",
    "zoo",
]
