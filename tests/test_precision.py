"""Proofs are computed in the precision that their rounding allows for, whatever PyTorch is set to."""

import pytest
import torch
from torch import nn

import tmlcourse
from tmlcourse import certify, precision
from tmlcourse.certify import bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = {"ieee", "none", False, "highest"}


def older():
    torch.set_float32_matmul_precision("medium")


def newer():
    if not precision._parts():
        pytest.skip("this torch has the older settings only")
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"


def for_all():
    if not precision._parts():
        pytest.skip("this torch has the older settings only")
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


SETTINGS = {"as PyTorch comes": lambda: None, "older": older, "newer": newer, "for all parts": for_all}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def lax(request):
    """PyTorch as a user has set it; as it was, afterwards."""
    flags, whole = precision._flags(), getattr(torch.backends, "fp32_precision", None)
    parts = [part.fp32_precision for part in precision._parts()]
    request.param()
    yield
    if whole is not None:
        torch.backends.fp32_precision = whole
    precision._set_flags(*flags)
    precision._set_parts(parts)
    assert precision._flags() == flags and [part.fp32_precision for part in precision._parts()] == parts


def test_inside_all_bits_and_afterwards_what_was(lax):
    before = precision.state()
    with pytest.raises(ZeroDivisionError), precision.full():
        assert set(precision.state()) <= FULL
        raise ZeroDivisionError
    assert precision.state() == before


def test_a_chapter_begins_with_all_bits(lax, capsys):
    tmlcourse.setup(seed=0)
    assert set(precision.state()) <= FULL


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown", "dual"])
def test_certificates_do_not_hear_of_autocast_and_tf32(lax, method, monkeypatch):
    seen = []
    work = bounds.ball  # called in the middle of both
    monkeypatch.setattr(bounds, "ball", lambda *a: seen.append(precision.state()) or work(*a))
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 3)
    model = nn.Sequential(*layers).to(DEVICE).eval()
    x, y = (
        torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE),
        torch.tensor([0, 1, 2]).to(DEVICE),
    )

    def both():
        low = certify.margins(model, x, y, 0.01, method=method, steps=2)
        return [low, *(part for pair in certify.neuron_bounds(model, x, 0.01, method=method, steps=2) for part in pair)]

    found = both()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = both()
    with precision.full():
        wanted = both()
    assert len(seen) == 6 and all(set(state) <= FULL for state in seen)
    for part in (found, cast):
        assert all(torch.equal(a, b) for a, b in zip(part, wanted, strict=True))


def test_autocast_and_bits_are_looked_at_before_a_recording_is_used(lax):
    """What `kernels.graphs` compares is another state once somebody asks for fewer bits."""
    with precision.full():
        full = precision.state()
        torch.backends.cudnn.allow_tf32 = True
        assert precision.state() != full
