"""Trustworthy machine learning: attacks, certificates, poisoning, explanations and privacy that can be trusted.

Import what you need: `from tmlcourse import attacks, data, models, pretrained, threat, training`.
"""

from __future__ import annotations

import os
import random
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from . import precision

try:
    __version__ = version("tmlcourse")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"


def setup(seed: int = 0) -> torch.device:
    """Begin a chapter: seed Python, NumPy and torch, choose the device, print one line that says with what it runs.

    float32 is computed with all its bits from here on, also by GPUs that would take TF32 for convolutions.

    Args:
        seed: of all three generators (0 <= seed < 2^32).
    Returns:
        The device for the chapter's tensors: "cuda" if there is one, else "cpu".
    Example: `device = tmlcourse.setup(seed=0)`.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    precision.always_full()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    folder = "$TMLCOURSE_DATA" if os.environ.get("TMLCOURSE_DATA") else "cache or download"
    print(f"tmlcourse {__version__} | torch {torch.__version__} | {name} | data: {folder}")
    return device
