"""The one rule that says who computes: the Triton kernel or the plain-PyTorch reference.

    auto        tensors on a GPU take the kernel, all others the reference
    reference   everything takes the reference
    triton      everything takes the kernel; tensors on the CPU by Triton's interpreter, far too slowly for work, for tests

What a kernel cannot take (another dtype, a sparse layout, images too large for its registers, a wanted gradient that it does
not have) falls back to the reference and says so once. Triton is imported by the first launch and never before: a machine
without it loses nothing but speed. A kernel's first answer on a device is compared with the reference's; one that differs
there, or does not compile, is not asked again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import checks

MODES = ("auto", "reference", "triton")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("kernels", default=None)
_said: set[str] = set()
_proved: dict[tuple, bool] = {}  # whether a kernel agreed with its reference on a device, by its first launch there


@contextlib.contextmanager
def using(mode: str) -> Iterator[None]:
    """Force who computes inside a `with` block: "reference", "triton" or "auto"; stronger than TMLCOURSE_KERNELS.

    Raises: ValueError for another word.
    Example: `with using("reference"): pgd(model, x, y, Linf(0.1), steps=2)`.
    """
    token = _forced.set(checks.choice(mode, "mode", MODES))
    try:
        yield
    finally:
        _forced.reset(token)


def mode() -> str:
    """The mode in force: that of the innermost `using`, else TMLCOURSE_KERNELS, else "auto".

    Raises: ValueError if the variable holds another word.
    Example: `mode() in ("auto", "reference", "triton")`.
    """
    return _forced.get() or checks.choice(os.environ.get("TMLCOURSE_KERNELS", "auto"), "TMLCOURSE_KERNELS", MODES)


def installed() -> bool:
    """Whether Triton can be imported.

    Example: `installed() or not ready()`.
    """
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU: TRITON_INTERPRET=1 was set before it was first imported.

    Example: `interpreting() in (True, False)`.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0") or not installed():
        return False
    import triton.language as tl

    return type(tl.sum).__name__ == "InterpretedFunction"


def ready() -> bool:
    """Whether kernels can run here at all: Triton is there, and a GPU or the interpreter.

    Example: `using("triton" if ready() else "reference")`.
    """
    return installed() and (torch.cuda.is_available() or interpreting())


def takes_kernel(
    name: str,
    tensors: tuple[Tensor, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    problem: str = "",
    backward: bool = False,
) -> bool:
    """Whether the kernel `name` computes this; where it should but cannot, the reason is said once.

    Args:
        name: of the kernel, for the message.
        tensors: everything that it would read; the first one's device counts.
        dtypes: those that the kernel takes; all tensors must share one.
        problem: a reason of the caller's own why it cannot, or "".
        backward: whether the kernel has a backward pass.
    Raises:
        RuntimeError: "triton" is forced, and Triton is missing or cannot run on this device.
    Example: `takes_kernel("demo", (x,), (torch.float32,)) is False` where x is on the CPU.
    """
    first, wish = tensors[0], mode()
    if wish == "reference" or (wish == "auto" and not (first.is_cuda and installed())):
        return False
    if wish == "triton" and not installed():
        raise RuntimeError("kernels: got mode 'triton', want Triton installed (it comes with torch on Linux)")
    if wish == "triton" and not (first.is_cuda or interpreting()):
        raise RuntimeError(f"kernels: got mode 'triton' and tensors on {first.device}, want a GPU, or TRITON_INTERPRET=1 in "
                           "the environment before Triton is first imported")  # fmt: skip
    if wish == "auto" and _proved.get((name, first.dtype, first.device)) is False:
        return False
    problem = problem or _problem(tensors, dtypes, backward)
    if problem and f"{name}: {problem}" not in _said:
        _said.add(f"{name}: {problem}")
        warnings.warn(f"kernels.{name}: {problem}; the reference computes it (said once)", RuntimeWarning, stacklevel=3)
    return not problem


def _problem(tensors: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...], backward: bool) -> str:
    """Why no kernel can take these tensors; empty if one can."""
    first = tensors[0]
    if first.dtype not in dtypes:
        return f"got {first.dtype}, the kernel takes {' and '.join(map(str, dtypes))}"
    for t in tensors:
        if t.dtype != first.dtype:
            return f"got {first.dtype} and {t.dtype} together, the kernel takes one dtype"
        if t.device != first.device:
            return f"got tensors on {first.device} and {t.device}, the kernel takes one device"
        if t.layout is not torch.strided:
            return f"got layout {t.layout}, the kernel takes strided tensors"
        if t.requires_grad and not backward and torch.is_grad_enabled():
            return "got a tensor whose gradient is wanted, the kernel has no backward pass"
    return ""


def checked(name: str, like: Tensor, kernel: Callable, reference: Callable):
    """kernel(), compared with reference() the first time that it runs on this device with this dtype.

    If it raises there, or is further from the reference than rounding explains, the reference's answer is returned, this
    once and from then on, and that is said. Where "triton" is forced nothing is compared, so that tests see the kernel.

    Args:
        name: as `takes_kernel` knows it.
        like: a tensor with the dtype and the device.
        kernel, reference: without arguments; a tensor, or several in a tuple or list.
    Example: `checked("demo", x, lambda: x + 1, lambda: 1 + x).shape == x.shape`.
    """
    key = (name, like.dtype, like.device)
    if mode() != "auto" or key in _proved or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return kernel()
    expected = reference()
    try:
        found, trouble = kernel(), "its first answer differs from the reference's"
        _proved[key] = _agree(found, expected)
    except Exception as error:  # Triton and CUDA raise a dozen types, and a chapter must go on
        _proved[key], trouble = False, f"{type(error).__name__} at the first launch"
    if _proved[key]:
        return found
    warnings.warn(f"kernels.{name}: {trouble} on {like.device}; the reference computes it (said once)", RuntimeWarning,
                  stacklevel=3)  # fmt: skip
    return expected


def _agree(found, expected) -> bool:
    """Whether two answers are the same up to rounding, relative to the largest entry."""
    if not isinstance(expected, Tensor):
        return all(map(_agree, found, expected))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    slack = (
        (1e-3 if expected.dtype == torch.float32 else 2e-2) * expected.nan_to_num(0, 0, 0).abs().amax().item()
        if expected.numel()
        else 0.0
    )
    return torch.allclose(found, expected, rtol=0.0, atol=slack + 1e-30, equal_nan=True)


class Lazy:
    """A kernel that Triton sees when it is first launched: `kernel[grid](arguments)`."""

    def __init__(self, function: Callable):
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self):
        """The kernel as Triton made it."""
        import triton
        import triton.language as tl

        self.function.__globals__["tl"] = tl
        return triton.jit(self.function)

    def __getitem__(self, grid):
        return self.compiled[grid]


def jit(function: Callable) -> Lazy:
    """`triton.jit`, put off until the first launch; the module's name `tl` is set to `triton.language` then.

    Example: `jit(lambda x: x).__getitem__ is not None`.
    """
    return Lazy(function)


def as_rows(t: Tensor) -> Tensor:
    """A batch (N, ...) as (N, d) whose rows lie dense in memory: a view wherever that is possible, else a copy.

    The rows may lie any distance apart, so a slice of a larger tensor is not copied.

    Example: `as_rows(torch.rand(4, 1, 2, 2)).shape` is (4, 4).
    """
    flat = t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1.

    Example: `power_of_two(784)` is 1024.
    """
    return 1 << max(0, n - 1).bit_length()


def on(t: Tensor):
    """A context in which kernels are launched on the device of `t`.

    Example: `with on(torch.zeros(1)): pass`.
    """
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
