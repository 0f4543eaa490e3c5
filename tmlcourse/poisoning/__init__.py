"""Poisoning: an attacker who writes a part of the training data."""

from .bounds import Bound, certified_bound
from .sets import Sanitizer, sanitizer

__all__ = ["Bound", "Sanitizer", "certified_bound", "sanitizer"]
