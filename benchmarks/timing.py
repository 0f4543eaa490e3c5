"""What the benchmarks share: contestants that take turns, the libraries' names and versions, and the bars.

A benchmark reads its options with `start`, lets the contestants run with `in_turn`, prints its tables, and ends with
`sys.exit(verdict([...]))`: each bar is printed and handed on to `course.py bench` (a line of JSON in the file that
TMLCOURSE_BARS names), and the exit status is 1 where one is missed.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROJECTS = {"art": "adversarial-robustness-toolbox"}  # libraries that are imported by another name


def start(doc: str, *, threads: int = 1, **defaults) -> argparse.Namespace:
    """The options of the command line: one for each default, of its type (a list takes several, False is a flag)."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, default in {**defaults, "threads": threads}.items():
        if isinstance(default, bool):
            how = {"action": "store_true"}
        elif isinstance(default, list):
            how = {"nargs": "+", "type": type(default[0])}
        else:
            how = {"type": type(default)}
        parser.add_argument("--" + name.replace("_", "-"), default=default, **how)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    return options


def headline(text: str) -> None:
    """The machine, then `text`."""
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}; {text}", flush=True)


@dataclass(frozen=True)
class Race:
    """`seconds` of every round and the last answer, by contestant."""

    seconds: dict[str, list[float]]
    answers: dict

    def median(self, name: str) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of one contestant's time to another's."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))

    def fastest(self, names, to: str) -> tuple[str, float | None]:
        """(name, its time to that of `to`) of the fastest of some contestants; ("", None) of none."""
        return min(((name, self.ratio(name, to)) for name in names), key=lambda pair: pair[1], default=("", None))

    def table(self, to: str, **columns) -> pd.DataFrame:
        """Median seconds, and the ratio to one contestant; `columns` (dictionaries by contestant) stand beside them."""
        times = {
            "seconds": {n: self.median(n) for n in self.seconds},
            f"time / {to}": {n: self.ratio(n, to) for n in self.seconds},
        }
        return pd.DataFrame({**times, **columns}).round(3)


def clock() -> Callable[[], float]:
    """The processor's own time for one thread on a CPU, because others may be working, too; else the clock on the wall."""
    return time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def in_turn(contestants: dict[str, Callable], rounds: int, *, warm_up: int = 1, now: Callable | None = None) -> Race:
    """Every contestant once a round, round after round, after rounds that do not count."""
    now = now or clock()
    seconds, answers = {name: [] for name in contestants}, {}
    for number in range(warm_up + rounds):
        for name, contestant in contestants.items():
            began = now()
            answers[name] = contestant()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(now() - began)
    return Race(seconds, answers)


def together(races: list[Race]) -> Race:
    """Races of the same contestants as one, with the rounds of all; the answers are the last race's."""
    seconds = {name: [s for race in races for s in race.seconds[name]] for name in races[0].seconds}
    return Race(seconds, races[-1].answers)


def peak(call: Callable) -> float:
    """MiB that a call holds at its most, beyond what was there before; NaN where that cannot be asked."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _kilobytes("VmRSS")
    call()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(entry: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(entry))


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def version(name: str) -> str:
    """The library and its version behind a contestant's name, whose first word it is: "art_cw_l2" is "art 1.20.1"."""
    library = name.replace("_", " ").partition(" ")[0]
    return library and f"{library} {importlib.metadata.version(PROJECTS.get(library, library))}"


def present(*functions: Callable) -> dict[str, Callable]:
    """name -> function of those whose library, the first word of their name, can be imported."""
    return {f.__name__: f for f in functions if installed(f.__name__.partition("_")[0])}


def art_classifier(model: nn.Module, x: torch.Tensor, **options):
    """The wrapper through which ART sees a network of ten classes."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1),
        device_type="cpu" if x.device.type == "cpu" else "gpu", **options,
    )  # fmt: skip


class Counted(nn.Module):
    """A network whose rows are counted, for libraries that want a module."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, x):
        self.rows += len(x)
        return self.net(x.float())  # some libraries hand over doubles


@dataclass(frozen=True)
class Bar:
    """What an issue promises, and what was measured; None where that cannot be done here, and `note` says why.

    `sense` is "at most" or "at least". `peer`: what was measured beside ours, with its version.
    """

    issue: int
    says: str
    measured: float | None
    sense: str
    bar: float
    peer: str = ""
    note: str = "no peer installed"

    @property
    def met(self) -> bool | None:
        """None where nothing was measured; a NaN is no success."""
        if self.measured is None:
            return None
        return bool(self.measured <= self.bar if self.sense == "at most" else self.measured >= self.bar)

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: self.note}[self.met]


def at_most(issue: int, says: str, measured: float | None, bar: float, **about) -> Bar:
    """`Bar` from above."""
    return Bar(issue, says, measured, "at most", bar, **about)


def at_least(issue: int, says: str, measured: float | None, bar: float, **about) -> Bar:
    """`Bar` from below."""
    return Bar(issue, says, measured, "at least", bar, **about)


def strength(issue: int, says: str, race: Race, peers, loss: dict[str, float], *, slack: float) -> list[Bar]:
    """Two bars of an attack: what it leaves of its goal against the best peer, and its time against the peers as strong.

    `loss`: what is left, by contestant ("ours" and the peers), the less the better: a share of images, or a distance, inf for
    who broke fewer images. Up to `slack` more counts as equal. A faster peer that is weaker is no rival.
    """
    rivals = [name for name in peers if loss[name] < math.inf]
    best = min(rivals, key=loss.get, default="")
    fastest, ratio = race.fastest([name for name in rivals if loss[name] <= loss["ours"] + slack], "ours")
    note = dict(note="no peer is as strong" if peers else "no peer installed")
    return [
        at_most(issue, f"{says}: ours less the best peer's", loss["ours"] - loss[best] if best else None, slack,
                peer=version(best), **note),
        at_least(issue, f"{says}: time of the fastest peer as strong, to ours", ratio, 1.0, peer=version(fastest), **note),
    ]  # fmt: skip


def verdict(bars: list[Bar]) -> int:
    """Print the bars and hand them on; the exit status, 1 where one is missed."""
    for bar in bars:
        value = "" if bar.measured is None else f"{bar.measured:.3g}, "
        print(f"{bar.says}: {value}{bar.sense} {bar.bar:g}: {bar.verdict}")
    if path := os.environ.get("TMLCOURSE_BARS"):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(bar)) + "\n" for bar in bars)
    return int(any(bar.met is False for bar in bars))
