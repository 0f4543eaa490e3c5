"""What the package says of itself is true: docstrings are there, their examples run, arrows point downwards."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from functools import partial

import pytest
import torch

import tmlcourse
from tmlcourse import attacks, data, models, poisoning, pretrained, threat, training

MODULES = [importlib.import_module(m.name) for m in pkgutil.walk_packages(tmlcourse.__path__, "tmlcourse.")]


def public():
    for module in MODULES:
        for name, item in vars(module).items():
            ours = getattr(item, "__module__", "") == module.__name__
            if ours and not name.startswith("_") and (inspect.isfunction(item) or inspect.isclass(item)):
                yield pytest.param(item, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("item", list(public()))
def test_public_names_say_what_they_do_and_their_example_runs(item):
    text = inspect.getdoc(item) or ""
    assert len(text.splitlines()[0] if text else "") > 20
    names = example_names(item)
    for example, _, answer in re.findall(r"Example: `([^`]+)`( is ([^\n]+)\.)?", text):
        *before, last = ast.parse(" ".join(example.split())).body
        exec(compile(ast.Module(before, []), "example", "exec"), names)
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([last], []), "example", "exec"), names)
            continue
        got = eval(compile(ast.Expression(last.value), "example", "eval"), names)
        if re.fullmatch(r"[\d, ()]+", answer):
            assert str(got).removeprefix("torch.Size(").strip("()[]").replace(",", "") == answer.strip("()").replace(
                ",", ""
            )


def example_names(item):
    """What an example may use: the package's functions, eight digits, a linear model, and what the names below say."""
    test = data.load("digits-28x28", n=8)
    x, y, model = test.x, test.y, models.linear((1, 28, 28), seed=0)
    if "certify" in item.__module__ or "universal" in item.__module__:
        model = models.mlp((1, 28, 28), hidden=(8,), seed=0)
    if "poisoning" in item.__module__:
        whole = data.load("digits", n=200)
        x, y = whole.x, whole.y % 2
    names = {}
    for module in (attacks, models, threat, training, pretrained, poisoning, importlib.import_module(item.__module__)):
        names |= vars(module)
    names |= dict(data=test, test=test, train=test, zeros_and_ones=test[:2], models=models, training=training)
    names |= dict(x=x, y=y, x_new=x, x_few=x, x_own=data.load("digits-28x28", n=60).x, rows=torch.rand(8, 30))
    names |= dict(new_rows=torch.rand(2, 30), mask=torch.ones(1, 28, 28), v=torch.zeros(1, 28, 28), w=torch.ones(1, 5))
    names |= dict(model=model, oracle=attacks.Queries(model), f=lambda w, index=None: w.flatten(1).square().sum(1))
    names |= dict(torch=torch, partial=partial, tmlcourse=tmlcourse)
    names["load"] = pretrained.load if item is pretrained.load else data.load
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_say_what_they_are_and_their_doctests_pass(module):
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_setup_prints_one_line_and_seeds_all_three_generators(capsys):
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        device = tmlcourse.setup(seed=3)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    out = capsys.readouterr().out.splitlines()
    assert draws[0] == draws[1] and len(out) == 2
    assert torch.__version__ in out[0] and device.type in out[0] and "data:" in out[0]


def test_progress_bar_is_silent_when_asked(monkeypatch):
    from tmlcourse import progress

    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress.bar(range(3)).disable
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert not progress.bar(range(3)).disable


def test_arrows_point_downwards():
    """plot and widgets know results, not algorithms; threat, models and data import nothing of ours but input checks."""
    allowed = {"plot": {"checks"}, "widgets": {"plot", "progress"}, "threat": {"checks"},
               "models": {"checks", "randomness"},
               "data": {"checks"}, "checks": set(), "progress": {"checks"}}  # fmt: skip
    for name, may in allowed.items():
        source = inspect.getsource(importlib.import_module(f"tmlcourse.{name}"))
        found = re.findall(
            r"^\s*from (?:\.|tmlcourse) import (.+)$|^\s*from (?:\.|tmlcourse\.)(\w+) import", source, re.M
        )
        used = {part.strip() for names, single in found for part in (names or single).split(",")}
        assert used <= may, f"{name} imports {used - may}"
    for module in MODULES:
        if not module.__name__.startswith(("tmlcourse.plot", "tmlcourse.widgets", "tmlcourse.report")):
            assert "import plot" not in inspect.getsource(module), module.__name__
