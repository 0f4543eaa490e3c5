"""Certificates: what no attack in the ball can do, from cheap bounds to the exact answer."""

from .bounds import margins, neuron_bounds
from .verify import Verdict, verify

__all__ = ["Verdict", "margins", "neuron_bounds", "verify"]
