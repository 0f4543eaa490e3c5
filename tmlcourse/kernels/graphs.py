"""CUDA graphs for loops of many small launches: record a step once, then play it back with one call.

A small network's forward and backward pass is some fifty kernels of a few microseconds each, and Python needs longer to
launch one than the GPU to run it. A graph is the list of those launches, recorded once with all addresses; playing it back
costs one launch. What is recorded reads and writes fixed tensors: new data are copied into them first.

A recording is only right while everything that it does not read from memory stays the same: Python numbers, branches, the
parameters' places. So `climb` and `descent` play back only networks made of plain layers without hooks, and look again
before each use whether layers, modes, settings and addresses are still those of the recording. All others take the ordinary
loop, and so does a step whose first playback differs from the step itself.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import precision, randomness
from ..models import Normalize
from ..threat import L1, L2, Linf
from .ascent import LARGEST, ascent_step
from .dispatch import installed, mode

STEADY = (  # the same in training as in evaluation
    nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity,
    Normalize,
)  # fmt: skip
PLAIN = (*STEADY, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout)
WARM_UP = 3  # runs before recording, as PyTorch's documentation asks: libraries choose their algorithms in them
KEPT = 8  # recordings kept for one network; each holds the memory of one step
_SEEN = object()  # in the place of a recording: such a batch came once
_recorded: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def record(step: Callable[[], None]) -> Callable[[], None]:
    """A function that does what `step` does, in one launch. `step` runs on fixed CUDA tensors, without a wait for the GPU.

    Warm-up runs on a stream of their own, then capture: the pattern of PyTorch's notes on CUDA graphs.

    Raises: RuntimeError where the step cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def plain(model) -> bool:
    """Whether a network is made of layers that do the same each time, and has no hooks.

    In training mode batch norm keeps statistics and dropout draws numbers: there only the layers of `STEADY` will do.

    Example: `plain(model.eval())`.
    """
    if not isinstance(model, nn.Module) or torch.is_autocast_enabled():
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(
        type(m) in (STEADY if m.training else PLAIN) and not any(getattr(m, h) for h in hooks) for m in model.modules()
    )


def possible(x: Tensor) -> bool:
    """Whether steps on these images may be recorded at all: float32 on a GPU, with kernels, and not inside a recording.

    TMLCOURSE_GRAPHS=0 in the environment says never.

    Example: `possible(x) is False` on a CPU.
    """
    if not x.is_cuda or os.environ.get("TMLCOURSE_GRAPHS", "1") == "0" or not installed() or mode() == "reference":
        return False
    return x.dtype == torch.float32 and not torch.cuda.is_current_stream_capturing()


def playable(model, x: Tensor, threat, loss) -> bool:
    """Whether a gradient attack's step may be recorded: `possible`, a plain network, a loss by name, a one-kernel step.

    Example: `playable(model, x, Linf(0.1), "cross_entropy") is False` on a CPU.
    """
    one_kernel = type(threat) is Linf or (type(threat) in (L1, L2) and x[0].numel() <= LARGEST)
    return one_kernel and isinstance(loss, str) and possible(x) and plain(model)


def trainable(model, x: Tensor) -> bool:
    """Whether a training step's forward and backward pass may be recorded: `possible`, and a plain network on that GPU.

    Example: `trainable(model, x) is False` on a CPU.
    """
    return possible(x) and plain(model) and all(p.device == x.device for p in model.parameters())


class Climb:
    """One step of a gradient attack on fixed tensors: offer the point to the best so far, differentiate, move.

    `load` brings the images of a batch in; `step` is one step; `moved` and `best` are the results. Running `step` and playing
    back its recording do the same.
    """

    def __init__(
        self, model, x: Tensor, y: Tensor, target: Tensor | None, threat, objective: Callable, fools: Callable
    ):
        self.model = weakref.proxy(model)  # recordings are kept for as long as the network lives, and no longer
        self.threat, self.objective, self.fools = threat, objective, fools
        self.x, self.x_adv, self.y = x.clone(), x.clone(), y.clone()
        self.target = None if target is None else target.clone()
        self.alpha = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.best = x.clone()
        self.value = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    @torch.no_grad()
    def load(self, **tensors: Tensor) -> None:
        """Copy new values into the fixed tensors, by name."""
        for name, value in tensors.items():
            getattr(self, name).copy_(value)

    def step(self) -> None:
        """The step."""
        with torch.enable_grad():
            point = self.x_adv.detach().clone().requires_grad_()
            z = self.model(point)
            value = self.objective(z, self.y, self.target)
            (grad,) = torch.autograd.grad(value.sum(), point)
        with torch.no_grad():
            now, fooled = value.detach(), self.fools(z.detach(), self.y, self.target)
            better = torch.where(fooled == self.fooled, now > self.value, fooled)
            wide = better.reshape(-1, *[1] * (self.x.dim() - 1))
            self.best.copy_(torch.where(wide, self.x_adv, self.best))
            self.value.copy_(torch.where(better, now, self.value))
            self.fooled.copy_(torch.where(better, fooled, self.fooled))
            self.x_adv.copy_(ascent_step(self.x_adv, grad, self.x, self.threat, self.alpha))


def proved(climb: Climb, replay: Callable[[], None]) -> Callable[[], None]:
    """`replay`, once it has been seen to do what `climb.step` does, from one and the same point.

    Raises: RuntimeError where it does not.
    """
    names = ("x_adv", "best", "value", "fooled")
    before = {name: getattr(climb, name).clone() for name in names}
    climb.alpha.fill_(1e-3)
    climb.step()
    stepped = {name: getattr(climb, name).clone() for name in names}
    climb.load(**before)
    replay()
    # A library may add up in another order; where a gradient is nearly nought, its sign is then anybody's guess.
    close = (
        _close(climb.x_adv - before["x_adv"], stepped["x_adv"] - before["x_adv"], 0.2)
        and all(_close(getattr(climb, name), stepped[name]) for name in ("best", "value"))
        and (climb.fooled != stepped["fooled"]).float().mean() <= 0.01
    )
    if not close:
        raise RuntimeError("its playback differs from the step")
    return replay


def _close(found: Tensor, wanted: Tensor, slack: float = 1e-3) -> bool:
    """Whether ||found - wanted|| <= slack ||wanted||; NaN is not."""
    return bool((found - wanted).norm() <= slack * wanted.norm() + 1e-6)


def climb(model, x: Tensor, y: Tensor, target, threat, loss: str, objective: Callable, fools: Callable):
    """A `Climb` for such a batch and the function that plays back its step; None where it is not recorded (see `_kept`)."""

    def make():
        fresh = Climb(model, x, y, target, threat, objective, fools)
        fresh.load(x_adv=threat.random(x, randomness.generator(0, x.device)))  # at x itself a divergence has no slope
        return fresh, proved(fresh, record(fresh.step))

    aim = None if target is None else (target.shape, target.dtype)
    return _kept(model, ("climb", x.shape, x.device, aim, threat, loss), make)


def _kept(model, kind: tuple, make: Callable):
    """The recording of this kind for the network as it is now; `make` makes it at the second call.

    None at the first call, since a recording takes as long as many steps and a single attack is over before that pays; and
    where recording fails, which is said once.
    """
    places = tuple((t.data_ptr(), t.requires_grad) for t in (*model.parameters(), *model.buffers()))
    settings = (precision.state(), torch.backends.cudnn.enabled, torch.are_deterministic_algorithms_enabled(), mode())
    key = (*kind, repr(model), places, settings, threading.get_ident())
    kept = _recorded.setdefault(model, {})
    if key not in kept:
        kept[key] = _SEEN
        while len(kept) > KEPT:
            kept.pop(next(iter(kept)))
        return None
    if kept[key] is _SEEN:
        try:
            kept[key] = make()
        except RuntimeError as error:
            warnings.warn(
                f"kernels.graphs: the step was not recorded ({error}); PyTorch launches it", RuntimeWarning, 3
            )
            kept[key] = None
    kept[key] = kept.pop(key)  # the latest used stands last
    return kept[key]


def descent(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """`gradients` of the mean cross-entropy for such a batch; None where it is not recorded, as for `climb`.

    Example: `descent(model, x, y) is None` at the first call.
    """
    return _kept(model, ("descent", x.shape, x.device, y.dtype), lambda: gradients(model, F.cross_entropy, x, y))


def gradients(
    model: nn.Module, loss: Callable, x: Tensor, y: Tensor
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A training step's forward and backward pass, recorded: a function (x, y) -> (loss, logits) that sets every `p.grad`.

    The optimiser's own step stays with the caller, so that any optimiser and schedule will do.

    Args:
        model: on a GPU; no layer that draws random numbers or keeps statistics (dropout and batch norm in training mode).
        loss: (logits, y) -> scalar, without a wait for the GPU.
        x, y: a batch of the size that all later batches have.
    Returns:
        The function; what it returns and the gradients are overwritten by its next call.
    Raises: RuntimeError where the pass cannot be recorded, or its playback differs from it.
    """
    model = weakref.proxy(model)  # as in `Climb`
    places = [i for i, p in enumerate(model.parameters()) if p.requires_grad]

    def params() -> list[Tensor]:
        found = list(model.parameters())
        return [found[i] for i in places]

    grads = [torch.zeros_like(p) for p in params()]
    x, y = x.detach().clone(), y.clone()
    with torch.no_grad():
        z = model(x).clone()
    value = z.new_zeros(())

    def step() -> None:
        with torch.enable_grad():
            answer = model(x)
            result = loss(answer, y)
            found = torch.autograd.grad(result, params())
        with torch.no_grad():
            torch._foreach_copy_(grads, list(found))
            value.copy_(result)
            z.copy_(answer)

    replay = record(step)
    step()
    stepped = [t.clone() for t in (value, z, *grads)]
    for t in (value, z, *grads):
        t.zero_()
    replay()
    if not all(map(_close, (value, z, *grads), stepped)):
        raise RuntimeError("its playback differs from the step")

    @torch.no_grad()
    def play(new_x: Tensor, new_y: Tensor) -> tuple[Tensor, Tensor]:
        x.copy_(new_x)
        y.copy_(new_y)
        replay()
        for p, grad in zip(params(), grads, strict=True):
            p.grad = grad
        return value, z

    return play
