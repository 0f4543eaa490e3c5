"""Privacy: mechanisms, accounting, private learning and its audit; and the attacks that make it necessary."""

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
from .extraction import extract_linear, extract_network, fidelity
from .inference import attribute_inference, neuron_features, property_inference
from .inversion import model_inversion, nearest
from .leakage import Leak, gradient_leakage, leaked_label, leaky_lenet, linear_leak, shared_gradient
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
from .membership import Membership, compare_scores, confidence, membership_inference
from .pate import Votes, tally, vote
from .shadows import Shadows, halves, train_shadows

__all__ = [
    "Accountant",
    "Audit",
    "Estimate",
    "Leak",
    "Membership",
    "ORDERS",
    "PrivateRun",
    "Shadows",
    "Votes",
    "advanced_composition",
    "advantage_bound",
    "amplify",
    "attribute_inference",
    "audit",
    "clipped_gradient",
    "clopper_pearson",
    "compare_scores",
    "confidence",
    "dp_sgd",
    "estimate",
    "exponential",
    "extract_linear",
    "extract_network",
    "fidelity",
    "for_groups",
    "gaussian",
    "gaussian_delta",
    "gaussian_eps",
    "gaussian_sigma",
    "gradient_leakage",
    "halves",
    "histogram",
    "laplace",
    "leaked_label",
    "leaky_lenet",
    "linear_leak",
    "lower_bound",
    "mean",
    "membership_inference",
    "model_inversion",
    "nearest",
    "neuron_features",
    "noise_for",
    "per_example_gradients",
    "property_inference",
    "randomized_response",
    "rdp_gaussian",
    "rdp_to_eps",
    "report_noisy_max",
    "response_eps",
    "shared_gradient",
    "tally",
    "train_shadows",
    "vote",
]
