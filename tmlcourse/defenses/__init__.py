"""Defences that broke, and the attacks that broke them.

`preprocessing` and `randomised` are layers to put before (or into) a network, `detection` flags instead of answering.
`adaptive` attacks each of them with knowledge of what it does; `symptoms` looks for the signs that an attack has failed.
"""

from .adaptive import bpda, eot, evade, logit_space_ascent
from .detection import Detector, roc, squeezing_detector
from .preprocessing import BitDepth, MeanFilter, MedianFilter, Thermometer
from .randomised import (
    ActivationPruning,
    FeatureMask,
    RandomResizePad,
    deep_cloak,
    expected_accuracy,
    prune_activations,
)
from .symptoms import obfuscation_checks

__all__ = [
    "ActivationPruning",
    "BitDepth",
    "Detector",
    "FeatureMask",
    "MeanFilter",
    "MedianFilter",
    "RandomResizePad",
    "Thermometer",
    "bpda",
    "deep_cloak",
    "eot",
    "evade",
    "expected_accuracy",
    "logit_space_ascent",
    "obfuscation_checks",
    "prune_activations",
    "roc",
    "squeezing_detector",
]
