"""course.py and the tools behind its commands."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nb_clean
import nbformat
import pytest
import stamp
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def course(tmp_path, monkeypatch):
    """course.py as if it stood in an empty checkout; `installs` counts what pip was asked, `broken` makes pip stop."""
    spec = importlib.util.spec_from_file_location("course", ROOT / "course.py")
    course = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(course)
    course.ROOT, course.installs, course.broken = tmp_path, [], None
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def pip(command, **_):
        course.installs.append(command)
        if course.broken:
            raise course.broken
        return subprocess.CompletedProcess(command, 0)

    class Builder:
        def __init__(self, **_):
            pass

        def create(self, folder):
            python = Path(folder, "Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(course, "subprocess", types.SimpleNamespace(run=pip))
    monkeypatch.setattr(course, "venv", types.SimpleNamespace(EnvBuilder=Builder))
    return course


def test_alone_it_lists_its_commands_and_needs_no_environment():
    answer = subprocess.run([sys.executable, "-S", ROOT / "course.py"], capture_output=True, text=True)
    assert answer.returncode == 0
    for command in ("book", "test", "lab", "bench", "clean-notebooks", "stamp", "homework", "retrain"):
        assert f"\n  {command} " in answer.stdout
    assert subprocess.run([sys.executable, ROOT / "course.py", "bok"], capture_output=True).returncode == 2


def test_it_imports_the_standard_library_only_and_an_old_python_can_read_it():
    tree = ast.parse((ROOT / "course.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    names = {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_an_old_python_gets_one_clear_sentence(course, monkeypatch):
    monkeypatch.setattr(course.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"^The course needs Python 3\.10 or later, and this is Python 3\.9\.$"):
        course.main(["test"])


def test_set_up_happens_once(course):
    python = course.course_environment()
    assert python.exists()
    assert course.course_environment() == python
    assert len(course.installs) == 1
    assert course.installs[0][-1] == ".[book,homework,test]"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed_into_the_environment_that_is_there(course, tmp_path, name):
    course.course_environment()
    kept = tmp_path / ".venv" / "kept"
    kept.touch()
    with open(tmp_path / name, "a", encoding="utf-8") as file:
        file.write("# changed\n")
    course.course_environment()
    course.course_environment()
    assert len(course.installs) == 2
    assert kept.exists()


@pytest.mark.parametrize("first", [True, False], ids=["first install", "renewal"])
def test_an_interrupted_install_is_not_trusted_and_is_made_again(course, tmp_path, first):
    if not first:
        course.course_environment()
        (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n", encoding="utf-8")
    course.broken = KeyboardInterrupt()
    assert course.main(["test"]) == 130
    half = tmp_path / ".venv" / "half-written"
    half.touch()
    course.broken = None
    course.course_environment()
    assert not half.exists()
    before = len(course.installs)
    course.course_environment()
    assert len(course.installs) == before


def test_a_failed_install_is_tried_again(course, monkeypatch):
    monkeypatch.setattr(course.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(SystemExit, match="installation failed"):
        course.course_environment()
    with pytest.raises(SystemExit, match="installation failed"):
        course.course_environment()


def test_another_python_gets_a_new_environment(course, tmp_path):
    course.course_environment()
    (tmp_path / ".venv" / "old").touch()
    mark = tmp_path / ".venv" / "course-stamp"
    mark.write_text("3.9 " + mark.read_text(encoding="utf-8").split()[1], encoding="utf-8")
    course.course_environment()
    assert not (tmp_path / ".venv" / "old").exists()


def test_a_folder_that_somebody_else_made_is_left_alone(course, tmp_path):
    own = tmp_path / ".venv" / "own"
    own.parent.mkdir()
    own.touch()
    with pytest.raises(SystemExit, match="not made by course.py"):
        course.course_environment()
    assert own.exists()


def test_bench_pins_torch_only_and_has_its_own_environment(course, tmp_path):
    course.bench([])
    pins = (tmp_path / ".venv-bench" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {pin.split("==")[0] for pin in pins} == {"torch", "torchvision", "numpy"}


def test_homework_runs_where_the_command_was_given(course, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(course, "run", lambda python, *command, **given: asked.update(given, command=command) or 3)
    monkeypatch.chdir(tmp_path)
    assert course.homework(["grade", "downloads"]) == 3
    assert asked == {"command": (tmp_path / "homework" / "run.py", "grade", "downloads"), "cwd": os.getcwd()}


def test_outputs_are_forgotten_when_the_package_its_weights_or_the_data_change(course, tmp_path, monkeypatch):
    weights, cache = tmp_path / "tmlcourse" / "weights" / "a.safetensors", tmp_path / "_build" / ".jupyter_cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TMLCOURSE_DATA", raising=False)
    weights.parent.mkdir(parents=True)

    def forgotten_after(change):
        course.drop_stale_outputs()
        cache.mkdir(parents=True)
        change()
        course.drop_stale_outputs()
        gone = not cache.exists()
        shutil.rmtree(cache, ignore_errors=True)
        return gone

    assert forgotten_after(lambda: weights.write_bytes(b"1"))
    assert forgotten_after(lambda: weights.write_bytes(b"2"))
    assert forgotten_after(lambda: (tmp_path / "tmlcourse" / "new.py").touch())
    assert forgotten_after(lambda: monkeypatch.setenv("TMLCOURSE_DATA", str(tmp_path)))
    assert forgotten_after(lambda: (tmp_path / "constraints.txt").write_text("", encoding="utf-8"))
    assert not forgotten_after(lambda: (tmp_path / "tmlcourse" / "a.pyc").touch())


def colab_save(notebook):
    """What Colab makes of a notebook: no ids, its own metadata, another minor version, outputs of the last run."""
    saved = json.loads(nbformat.writes(notebook))
    saved["nbformat_minor"], saved["metadata"] = 0, {"colab": {"provenance": []}, "kernelspec": {"name": "python3"}}
    for cell in saved["cells"]:
        del cell["id"]
        cell["metadata"] |= {"id": "AbC", "colab": {"base_uri": "https://localhost"}}
        if cell["cell_type"] == "code":
            cell["execution_count"] = 7
    return nbformat.reads(json.dumps(saved, indent=2), as_version=4)


def small_notebook():
    true, noise = (v4.new_output("stream", name="stdout", text=text) for text in ("True\n", "noise\n"))
    checked = v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1 < 2)", outputs=[true])
    free = v4.new_code_cell("x = 1  \nx", outputs=[noise])
    return v4.new_notebook(cells=[v4.new_markdown_cell("# T"), free, checked])


def test_a_save_in_colab_and_a_save_at_home_have_one_normal_form():
    home, away = nb_clean.normal_text(small_notebook()), nb_clean.normal_text(colab_save(small_notebook()))
    assert home == away
    assert home == nb_clean.normal_text(nbformat.reads(home, as_version=4))
    assert "noise" not in home
    assert '"True\\n"' in home


def test_check_tells_and_changes_nothing(tmp_path, capsys):
    file = tmp_path / "a.ipynb"
    file.write_text(nbformat.writes(small_notebook()), encoding="utf-8")
    before = file.read_bytes()
    assert nb_clean.main(["--check", str(file)]) == 1
    assert file.read_bytes() == before
    assert nb_clean.main([str(file)]) == 0
    assert nb_clean.main(["--check", str(file)]) == 0


def test_a_marked_cell_without_output_is_a_defect(tmp_path, capsys):
    notebook = small_notebook()
    notebook.cells[2].outputs = []
    file = tmp_path / "a.ipynb"
    file.write_text(nb_clean.normal_text(notebook), encoding="utf-8")
    assert nb_clean.main(["--check", str(file)]) == 1
    assert "no stored text output" in capsys.readouterr().out


@pytest.fixture
def fork(tmp_path):
    """A copy of everything that holds the repository's address, and a chapter."""
    for name in ("_config.yml", *stamp.PAGES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# T"), v4.new_code_cell("1"), v4.new_code_cell("2")])
    (tmp_path / "book" / "01-chapter.ipynb").write_text(nb_clean.normal_text(notebook), encoding="utf-8")
    stamp.main([], tmp_path)
    return tmp_path


def read(fork, name):
    return (fork / name).read_text(encoding="utf-8")


def test_every_place_follows_from_the_one_setting(fork):
    assert stamp.main(["--check"], fork) == 0
    url, branch = stamp.repository(fork)
    config = read(fork, "_config.yml").replace(url, "https://github.com/Uni-X/trust.ml")
    (fork / "_config.yml").write_text(config.replace(f"branch: {branch}", "branch: autumn"), encoding="utf-8")
    assert stamp.main(["--check"], fork) == 1
    assert stamp.main([], fork) == 0
    assert stamp.main(["--check"], fork) == 0
    assert "git+https://github.com/Uni-X/trust.ml@autumn" in read(fork, "book/01-chapter.ipynb")
    assert "github/Uni-X/trust.ml/blob/autumn/book/" in read(fork, "README.md")
    assert "https://uni-x.github.io/trust.ml/" in read(fork, "README.md")
    assert all(url.removeprefix("https://github.com/") not in read(fork, name) for name in stamp.PAGES)


def test_publishing_writes_the_commit_into_the_setup_cells(fork):
    url, _ = stamp.repository(fork)
    stamp.main(["--ref", "0123abc", "--branch", "colab"], fork)
    assert f"git+{url}@0123abc" in read(fork, "book/01-chapter.ipynb")
    assert stamp.repository(fork)[1] == "colab"
    second = nbformat.reads(read(fork, "book/01-chapter.ipynb"), as_version=4).cells[2]
    assert second.source == "2"
