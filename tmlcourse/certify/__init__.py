"""Certificates: what no attack in the ball can do, from cheap bounds to the exact answer."""

from .bounds import least_margin, margins, neuron_bounds
from .distortion import Distortion, distortion
from .smoothing import Smoothed, certified_accuracy, predict_smoothed, smooth
from .summary import shipped_table, summary, tally
from .verify import Verdict, verify

__all__ = [
    "Distortion",
    "Smoothed",
    "Verdict",
    "certified_accuracy",
    "distortion",
    "least_margin",
    "margins",
    "neuron_bounds",
    "predict_smoothed",
    "shipped_table",
    "smooth",
    "summary",
    "tally",
    "verify",
]
