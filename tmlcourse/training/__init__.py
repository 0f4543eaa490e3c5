"""Training: one readable loop, losses that make it robust, and what theory says about both.

What is trained for is the loss: a function (model, x, y) -> scalar, or (model, x, y, progress) for one that changes as
training goes on. Standard, adversarial, certified and private training are compositions of `fit` with a loss, not loops of
their own:

    fit(model, data)                                              # min E l(h(x), y)
    fit(model, data, loss=adversarial(Linf(0.3), steps=10))       # min E max_{x' in B(x)} l(h(x'), y)
    fit(model, data, loss=trades(Linf(0.3), beta=6.0))            # min E l(h(x), y) + beta max_{x'} KL(h(x) || h(x'))
"""

from .loop import accuracy, constant, crop_and_flip, fit, triangle
from .losses import (
    adversarial,
    ascent,
    cascade,
    cross_entropy,
    early_stopped,
    ensemble,
    friendly,
    growing,
    label_smoothing,
    mart,
    mixture,
    single_step,
    trades,
)
from .measure import boundary_thickness, scorecard, shipped_table

__all__ = [
    "accuracy",
    "adversarial",
    "ascent",
    "boundary_thickness",
    "cascade",
    "constant",
    "crop_and_flip",
    "cross_entropy",
    "early_stopped",
    "ensemble",
    "fit",
    "friendly",
    "growing",
    "label_smoothing",
    "mart",
    "mixture",
    "scorecard",
    "shipped_table",
    "single_step",
    "trades",
    "triangle",
]
