"""How fast could it be? Bytes that PyTorch moves, the bandwidth of this machine, and seconds, measured.

A processor that does P operations a second and moves B bytes a second does at most min(P, I B) operations a second on work
with I operations a byte: its arithmetic intensity. Most of this course's inner loops have few operations a byte.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import checks


@dataclass(frozen=True)
class Traffic:
    """What PyTorch did: bytes read and written by its operations, and how many there were (each a launch on a GPU)."""

    bytes: int
    launches: int


def moved(function: Callable[[], object]) -> Traffic:
    """Count what a call moves: every operation reads its inputs from memory and writes its output there.

    Views move nothing. What an operation does in between, and what a cache saves, is not seen.

    Example: `x = torch.zeros(10); moved(lambda: x + x).bytes` is 120.
    """
    counter = _Counter()
    with counter:
        function()
    return Traffic(counter.bytes, counter.launches)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        out = function(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        before = {t.untyped_storage().data_ptr() for t in inputs}
        view = all(t.untyped_storage().data_ptr() in before for t in outputs) and not function._schema.is_mutable
        if not view and function is not torch.ops.aten.empty.memory_format:
            self.bytes += sum(_size(t) for t in (*inputs, *outputs))
            self.launches += 1
        return out


def _size(t: Tensor) -> int:
    """Bytes of the numbers that a tensor holds; one that repeats itself in memory is read once."""
    return (
        t.element_size() * torch.tensor([n for n, s in zip(t.shape, t.stride(), strict=True) if s]).prod().long().item()
    )


def seconds(function: Callable[[], object], *, rounds: int = 7, device: str | torch.device = "cpu") -> float:
    """The median time of a call, after one that does not count; on a GPU, of calls that were waited for.

    Example: `seconds(lambda: torch.ones(10)) > 0`.
    """
    return statistics.median(_times(function, rounds, device))


def copy_bandwidth(device: str | torch.device = "cpu", *, megabytes: int = 64, rounds: int = 7) -> float:
    """Bytes a second of a large copy, read and written both counted: the roof of everything that only moves memory.

    A roof is what the machine can do, so the fastest round counts.

    Example: `copy_bandwidth(megabytes=1, rounds=1) > 0`.
    """
    source = torch.rand(checks.positive_int(megabytes, "megabytes") * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / min(_times(lambda: target.copy_(source), rounds, device))


def peak_arithmetic(device: str | torch.device = "cpu", *, size: int = 1024, rounds: int = 7) -> float:
    """Operations a second of a large float32 matrix product (2 n^3 of them), the fastest round: the other roof.

    Example: `peak_arithmetic(size=32, rounds=1) > 0`.
    """
    a = torch.rand(checks.positive_int(size, "size"), size, device=device)
    return 2 * size**3 / min(_times(lambda: a @ a, rounds, device))


def _times(function: Callable[[], object], rounds: int, device: str | torch.device) -> list[float]:
    """Seconds of each round but the first."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    taken = []
    for _ in range(checks.positive_int(rounds, "rounds") + 1):
        wait()
        began = time.perf_counter()
        function()
        wait()
        taken.append(time.perf_counter() - began)
    return taken[1:]
