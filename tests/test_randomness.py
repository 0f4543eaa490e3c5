"""One meaning of `seed=`: what is drawn inside depends on it alone, what is drawn outside not at all."""

import numpy as np
import pytest
import torch

from tmlcourse import randomness


def test_a_seed_fixes_the_numbers_and_none_takes_torchs_own():
    a, b, c = (torch.rand(5, generator=randomness.generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert randomness.generator(None) is None
    assert randomness.generator(np.int64(3)).initial_seed() == 3


def test_an_own_generator_without_a_seed_follows_torchs():
    state = torch.get_rng_state()
    first = torch.rand(5, generator=randomness.own_generator(None))
    second = torch.rand(5, generator=randomness.own_generator(None))
    torch.set_rng_state(state)
    assert torch.equal(first, torch.rand(5, generator=randomness.own_generator(None)))
    assert not torch.equal(first, second)
    assert torch.equal(
        torch.rand(3, generator=randomness.own_generator(7)), torch.rand(3, generator=randomness.generator(7))
    )


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_draws_as_manual_seed_does_and_leaves_no_trace(fails):
    torch.manual_seed(5)
    expected = torch.rand(4)
    state = torch.get_rng_state()
    try:
        with randomness.seeded(5):
            inside = torch.rand(4)
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert torch.equal(inside, expected) and torch.equal(torch.get_rng_state(), state)


def test_seeded_without_a_seed_goes_on():
    torch.manual_seed(5)
    expected = torch.rand(8)
    torch.manual_seed(5)
    with randomness.seeded(None):
        inside = torch.rand(4)
    assert torch.equal(torch.cat([inside, torch.rand(4)]), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_seeded_leaves_the_gpu_as_it_was(device):
    state = torch.cuda.get_rng_state()
    with randomness.seeded(5, device):
        torch.rand(4, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), ("0", TypeError), (True, TypeError)])
def test_a_seed_that_is_none(seed, error):
    for call in (randomness.generator, randomness.own_generator):
        with pytest.raises(error, match="seed: got"):
            call(seed)
    with pytest.raises(error, match="seed: got"), randomness.seeded(seed):
        pass
