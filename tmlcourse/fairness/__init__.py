"""Fairness: criteria for groups and for individuals, why they exclude each other, and what repair costs."""

from .federated import Federation, hierarchical
from .rates import (
    Calibration,
    Criterion,
    calibration,
    confusion,
    demographic_parity,
    equal_opportunity,
    equalized_odds,
    group_report,
    groups,
    impossibility,
    predictive_parity,
    roc,
    without,
)
from .repair import debias, logistic_regression, proxies, reweigh
from .similar import Individual, divergence, individual
from .thresholds import Equalized, equalize

__all__ = [
    "Calibration",
    "Criterion",
    "Equalized",
    "Federation",
    "Individual",
    "calibration",
    "confusion",
    "debias",
    "demographic_parity",
    "divergence",
    "equal_opportunity",
    "equalize",
    "equalized_odds",
    "group_report",
    "groups",
    "hierarchical",
    "impossibility",
    "individual",
    "logistic_regression",
    "predictive_parity",
    "proxies",
    "reweigh",
    "roc",
    "without",
]
