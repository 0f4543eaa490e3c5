"""float32 with all its bits: where a proof depends on the digits, and in every chapter.

PyTorch computes float32 convolutions on recent GPUs in TF32, whose mantissa has 10 bits instead of 23. On request matrix
products have as few, or fewer, in bfloat16, on a CPU and under autocast, too. The rounding that certificates allow for is
that of float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def state() -> tuple:
    """With which precision float32 is computed now, part by part.

    Example: `state() == state()`.
    """
    return tuple(part.fp32_precision for part in _parts()) or _flags()


def always_full() -> None:
    """From now on float32 is float32 on every device.

    Example: `always_full()`.
    """
    _set_flags(False, "highest")
    if not set(state()) <= {"ieee", "none", False, "highest"}:  # a newer setting for all parts together is stronger
        _set_parts(["ieee"] * len(_parts()))


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Inside, float32 is float32 on every device, and autocast is off; afterwards all is as it was.

    Example: `with full(): z = model(x)`.
    """
    parts = [part.fp32_precision for part in _parts()]
    try:
        flags = _flags()
    except RuntimeError:  # whoever uses the newer settings cannot read the older ones
        flags = None
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        try:
            if flags:
                always_full()
            else:
                _set_parts(["ieee"] * len(parts))
            yield
        finally:
            if flags:
                _set_flags(*flags)
            _set_parts(parts)


def _flags() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def _set_flags(convolutions: bool, products: str) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


def _parts() -> list:
    """What has a setting of its own since torch 2.9; nothing before."""
    backends = torch.backends
    names = ((backends.cudnn, "conv"), (backends.cudnn, "rnn"), (backends.cuda, "matmul"), (backends.mkldnn, "conv"),
             (backends.mkldnn, "matmul"))  # fmt: skip
    found = [getattr(owner, name, None) for owner, name in names]
    return [part for part in found if hasattr(part, "fp32_precision")]


def _set_parts(wanted) -> None:
    for part, precision in zip(_parts(), wanted, strict=True):
        part.fp32_precision = precision
