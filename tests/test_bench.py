"""The machinery of `course.py bench`: turns, ratios, bars, and the one table. Nothing here measures anything."""

import json
import sys
import types
from pathlib import Path

import bars
import growth
import numpy as np
import pandas as pd
import pytest
import timing
import torch

ROOT = Path(__file__).resolve().parent.parent
# Scripts that make a table of the course and race against nobody.
TABLES = {"exact_error", "neural_cleanse", "defenses"}


def clock_of(*moments):
    """A clock that shows these moments, one at each look."""
    left = iter(moments)
    return lambda: next(left)


def test_contestants_take_turns_and_the_warm_up_does_not_count():
    order, now = [], clock_of(*range(100))
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    race = timing.in_turn(calls, 3, warm_up=2, now=now)
    assert order == list("ab" * 5)
    assert {name: len(s) for name, s in race.seconds.items()} == {"a": 3, "b": 3}
    assert race.answers == {"a": 9, "b": 10}


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians():
    race = timing.Race({"ours": [1.0, 4.0, 6.0], "peer": [2.0, 2.0, 18.0]}, {})
    assert race.ratio("peer", "ours") == 2.0  # of 2, .5 and 3; the medians' ratio is .5
    assert race.median("peer") == 2.0
    assert race.fastest(["peer"], "ours") == ("peer", 2.0) and race.fastest([], "ours") == ("", None)
    both = timing.together([race, timing.Race({"ours": [1.0], "peer": [9.0]}, {"ours": 7})])
    assert both.seconds["peer"] == [2.0, 2.0, 18.0, 9.0] and both.answers == {"ours": 7}


@pytest.mark.parametrize(
    "measured, most, least", [(0.9, True, False), (1.0, True, True), (np.float64(1.1), False, True)]
)
def test_a_bar_is_met_from_its_own_side(measured, most, least):
    assert timing.at_most(1, "x", measured, 1.0).met is most
    assert timing.at_least(1, "x", measured, 1.0).met is least


def test_what_was_not_measured_is_open_and_nan_is_a_miss():
    bar = timing.at_least(11, "x", None, 3.0, note="needs a GPU")
    assert bar.met is None and bar.verdict == "needs a GPU"
    for make in (timing.at_most, timing.at_least):
        assert make(1, "x", float("nan"), 1.0).verdict == "MISSED"


def test_the_verdict_is_printed_handed_on_and_an_exit_status(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bars.jsonl"
    monkeypatch.setenv("TMLCOURSE_BARS", str(path))
    good, open_, bad = (timing.at_most(2, says, value, 1.0) for says, value in (("a", 0.5), ("b", None), ("c", 2.0)))
    assert timing.verdict([good, open_]) == 0 and timing.verdict([bad]) == 1
    assert [timing.Bar(**json.loads(line)) for line in path.read_text().splitlines()] == [good, open_, bad]
    assert "c: 2, at most 1: MISSED" in capsys.readouterr().out


def test_a_faster_peer_counts_only_where_it_is_as_strong():
    race = timing.Race({"ours": [2.0], "art_weak": [1.0], "foolbox_strong": [3.0]}, {})

    def bars_of(**loss):
        return timing.strength(3, "x", race, [n for n in loss if n != "ours"], loss, slack=0.01)

    pytest.importorskip("art"), pytest.importorskip("foolbox")
    left, time = bars_of(ours=0.2, art_weak=0.4, foolbox_strong=0.205)
    assert (left.met, time.met, time.measured) == (True, True, 1.5) and time.peer.startswith("foolbox 3")
    left, time = bars_of(ours=0.2, art_weak=0.1, foolbox_strong=0.3)
    assert (left.met, time.met, time.measured) == (False, False, 0.5)
    left, time = bars_of(ours=0.2, art_weak=0.4, foolbox_strong=0.3)
    assert left.met and time.met is None and time.note == "no peer is as strong"
    left, time = bars_of(ours=0.2, art_weak=float("inf"), foolbox_strong=float("inf"))
    assert left.met is None and time.met is None
    assert {bar.note for bar in bars_of(ours=0.2)} == {"no peer installed"}


def test_options_follow_from_their_defaults(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["x", "--images", "3", "--batches", "5", "6", "--table", "--out", "a.csv"])
    options = timing.start("What it does.\n", images=1, batches=[2], table=False, out="", threads=before)
    assert (options.images, options.batches, options.table, options.out) == (3, [5, 6], True, "a.csv")


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="reads Linux's account of memory")
def test_peak_memory_sees_what_a_call_held():
    held = []
    assert timing.peak(lambda: held.append(torch.ones(2**23))) == pytest.approx(32, abs=8)
    assert timing.peak(lambda: None) < 8


def test_every_benchmark_is_in_the_table_or_makes_one():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"bars", "timing", "auto_lirpa"}
    assert {name.split(":")[0] for name in bars.RUNS} == files - TABLES


@pytest.mark.parametrize("name", sorted(bars.RUNS))
def test_the_options_of_a_run_are_those_of_its_benchmark(name, monkeypatch):
    source = (ROOT / "benchmarks" / f"{name.split(':')[0]}.py").read_text(encoding="utf-8")
    for options in bars.RUNS[name]:
        for word in options.split():
            if word.startswith("--") and word != "--threads":
                assert word[2:].replace("-", "_") + "=" in source


def test_one_table_of_all_bars_and_the_exit_status_by_them(monkeypatch, tmp_path, capsys):
    """Three stand-ins: one meets its bars, one misses, one breaks before it hands anything over."""
    answers = {
        "good.py": [timing.at_most(4, "memory", 1.0, 2.0, peer="art 1")],
        "bad.py": [timing.at_least(2, "speed", 1.0, 2.0)],
    }

    def run(command, env=None, **_):
        found = answers.get(Path(command[1]).name, [])
        if found:
            Path(env["TMLCOURSE_BARS"]).write_text("".join(json.dumps(vars(bar)) + "\n" for bar in found))
        return types.SimpleNamespace(returncode=0 if found and found[0].met else 1)

    monkeypatch.setattr(bars, "subprocess", types.SimpleNamespace(run=run))
    for runs, full, quick in (("good", 0, 0), ("good bad", 1, 0), ("good broken", 1, 1)):
        monkeypatch.setattr(bars, "RUNS", {name: ("", "") for name in runs.split()})
        out = tmp_path / "table.csv"
        only = ["--only", *runs.split(), "--out", str(out)]
        assert bars.main(only) == full and bars.main([*only, "--quick"]) == quick
        rows = out.read_text().splitlines()
        assert rows[0] == "issue,what,measured,bar,beside,verdict" and len(rows) == 1 + len(runs.split())
    assert "broken.py: exit status" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bars.main(["--only", "nobody"])


@pytest.mark.parametrize("name, warned", [("mnist", False), ("digits-28x28", True)])
def test_who_has_no_mnist_is_told(name, warned, monkeypatch, capsys):
    monkeypatch.setattr(bars, "RUNS", {})
    monkeypatch.setattr(bars, "peers", lambda: timing.at_most(2, "a", 0.0, 1.0))
    monkeypatch.setattr(bars.data, "load", lambda *_, **__: types.SimpleNamespace(name=name))
    assert bars.main([]) == 0
    assert ("MNIST is not here" in capsys.readouterr().out) is warned


def test_growth_fits_the_exponent_and_draws_time_and_memory(tmp_path):
    sizes = [2, 4, 8]
    assert growth.exponent(sizes, [3 * s**2 for s in sizes]) == pytest.approx(2)
    assert growth.exponent(sizes, [0, 1, 2]) != growth.exponent(sizes, [0, 1, 2])  # what cost nothing has no exponent
    row = dict(
        method="PGD", against="images", sizes=sizes, seconds=(1, 2, 4), seconds_p=1.0, MiB=(0, 0, 0), MiB_p=float("nan")
    )
    growth.draw(pd.DataFrame([row, row | dict(method="IBP", against="eps", MiB=(1, 2, 3))]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth-eps.svg", "growth-images.svg"]


def test_growth_has_every_size_of_every_method():
    found = {}
    for method, size in growth.cases():
        found.setdefault(method, set()).add(size)
    assert {"PGD", "IBP", "CROWN", "alpha-CROWN", "MIP", "DP-SGD"} == set(found)
    assert {"images", "eps", "width", "depth"} <= found["PGD"] & found["CROWN"] & found["MIP"]
    assert {"images", "width", "depth", "steps"} <= found["DP-SGD"] and "steps" in found["PGD"] & found["alpha-CROWN"]
