"""Evasion attacks: find an image near x that the model gets wrong."""

from .evaluation import RobustAccuracy, robust_accuracy
from .gradient import fgsm, pgd
from .losses import cross_entropy, difference, margin

__all__ = ["RobustAccuracy", "cross_entropy", "difference", "fgsm", "margin", "pgd", "robust_accuracy"]
