"""Running the chapters before the build: each once, side by side, and the failed ones left to the build."""

import execute
import nbformat
import pytest
from jupyter_cache import get_cache
from nbformat import v4

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture
def course(tmp_path):
    """A course of two chapters that count their runs and one that fails."""
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text("execute: {timeout: 60}", encoding="utf-8")
    count = "with open('../runs', 'a') as file:\n    print('{0}', file=file)\nprint('{0}')"
    for name, source in {"a": count.format("a"), "b": count.format("b"), "c": "1 / 0"}.items():
        cells = [v4.new_markdown_cell("# Chapter"), v4.new_code_cell(source)]
        nbformat.write(v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "book" / f"{name}.ipynb")
    return tmp_path


def test_each_chapter_runs_once_and_its_outputs_are_kept_for_the_build(course, capsys):
    execute.main(course)
    assert sorted((course / "runs").read_text().split()) == ["a", "b"]
    told = capsys.readouterr().out
    assert "c: failed" in told and "a: failed" not in told
    cache = get_cache(str(course / "_build" / ".jupyter_cache"))
    nb = nbformat.read(course / "book" / "a.ipynb", as_version=4)
    assert cache.merge_match_into_notebook(nb)[1].cells[1].outputs[0].text == "a\n"
    with pytest.raises(KeyError):
        cache.match_cache_notebook(nbformat.read(course / "book" / "c.ipynb", as_version=4))

    nb.cells[1].source += "\nprint('more')"
    nb.cells[0].source = "# Another title"
    nbformat.write(nb, course / "book" / "a.ipynb")
    (course / "book" / "b.ipynb").unlink()
    execute.main(course)
    assert sorted((course / "runs").read_text().split()) == ["a", "a", "b"]
