"""Poisoning: an attacker who writes a part of the training data."""

from .bounds import Bound, certified_bound
from .flips import flip_labels
from .gradient import gradient_attack
from .kkt import Fit, Poisoned, SingularKKT, fit, implicit_gradient, implicit_jacobian, kkt_attack, naive_attack
from .learners import Learner, logistic, ridge, scores, smooth_svm, svm
from .referee import best_flips, best_responses
from .sets import Sanitizer, sanitizer

__all__ = [
    "Bound",
    "Fit",
    "Learner",
    "Poisoned",
    "Sanitizer",
    "SingularKKT",
    "best_flips",
    "best_responses",
    "certified_bound",
    "fit",
    "flip_labels",
    "gradient_attack",
    "implicit_gradient",
    "implicit_jacobian",
    "kkt_attack",
    "logistic",
    "naive_attack",
    "ridge",
    "sanitizer",
    "scores",
    "smooth_svm",
    "svm",
]
