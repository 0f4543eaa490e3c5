"""GPU kernels (Triton), each beside the plain-PyTorch reference that it must equal.

    ascent_step             a whole step of projected gradient ascent in one pass over memory
    clip_and_sum            per-example norms, clipping and sum, without a second copy of the gradients
    interval_linear         centre and radius of an affine layer in one pass over its weights, |W| never stored
    relu_backsubstitution   the choice of a ReLU's line and the product with it, fused

`dispatch` holds the one rule that says who computes: tensors on a GPU take the kernel, all others the reference, and
`using("reference")` or the environment variable TMLCOURSE_KERNELS forces either. `graphs` records the loops around them.
"""

from .ascent import ascent_step
from .backsubstitution import relu_backsubstitution
from .clipping import clip_and_sum, squared_norms, weighted_sum
from .dispatch import ready, using
from .interval import interval_linear

__all__ = [
    "ascent_step",
    "clip_and_sum",
    "interval_linear",
    "ready",
    "relu_backsubstitution",
    "squared_norms",
    "using",
    "weighted_sum",
]
