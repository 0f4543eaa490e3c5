"""One meaning of `seed=` for every function: None takes torch's own generator, a number makes the call reproducible."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from . import checks


def generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator | None:
    """A generator of its own on `device`, or None (torch's own) without a seed.

    Raises TypeError or ValueError for a seed that is no whole number >= 0.
    Example: `torch.rand(3, generator=generator(0))`.
    """
    return None if seed is None else torch.Generator(device).manual_seed(checks.positive_int(seed, "seed", least=0))


def own_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own in any case: without a seed, one that torch's generator seeds.

    For functions that start the same random numbers again, or hand the generator on.
    Example: `own_generator(None).initial_seed() >= 0`.
    """
    return generator(int(torch.randint(2**62, ())) if seed is None else seed, device)


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu"):
    """Inside, torch's generators of the CPU and of `device` start from `seed`; afterwards they are as they were.

    With None nothing happens: inside and afterwards they simply go on. For code that cannot be handed a generator: layers
    drawing their first weights, dropout.

    Raises TypeError or ValueError for a seed that is no whole number >= 0.
    Example: `with seeded(0): layer = torch.nn.Linear(3, 2)`.
    """
    if seed is None:
        yield
        return
    checks.positive_int(seed, "seed", least=0)
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would start the generators of all GPUs as well
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
