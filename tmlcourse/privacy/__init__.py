"""Privacy: mechanisms, accounting, private learning and its audit."""

from ..intervals import clopper_pearson
from .accounting import (
    ORDERS,
    Accountant,
    advanced_composition,
    amplify,
    for_groups,
    noise_for,
    rdp_gaussian,
    rdp_to_eps,
)
from .audit import Audit, advantage_bound, audit, lower_bound
from .dp_sgd import PrivateRun, clipped_gradient, dp_sgd, per_example_gradients
from .mechanisms import (
    Estimate,
    estimate,
    exponential,
    gaussian,
    gaussian_delta,
    gaussian_eps,
    gaussian_sigma,
    histogram,
    laplace,
    mean,
    randomized_response,
    report_noisy_max,
    response_eps,
)
from .pate import Votes, tally, vote

__all__ = [
    "ORDERS",
    "Accountant",
    "Audit",
    "Estimate",
    "PrivateRun",
    "Votes",
    "advanced_composition",
    "advantage_bound",
    "amplify",
    "audit",
    "clipped_gradient",
    "clopper_pearson",
    "dp_sgd",
    "estimate",
    "exponential",
    "for_groups",
    "gaussian",
    "gaussian_delta",
    "gaussian_eps",
    "gaussian_sigma",
    "histogram",
    "laplace",
    "lower_bound",
    "mean",
    "noise_for",
    "per_example_gradients",
    "randomized_response",
    "rdp_gaussian",
    "rdp_to_eps",
    "report_noisy_max",
    "response_eps",
    "tally",
    "vote",
]
