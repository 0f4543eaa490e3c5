"""pyproject.toml, constraints.txt and environment.yml say the same thing, on every Python and system they name."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from clean_environment import ROOT, project
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN = Path(__file__).resolve()
PROJECT = project()
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
(CONDA_PIP,) = (part["pip"] for part in CONDA["dependencies"] if isinstance(part, dict))
COLAB_HAS = {
    *("ipywidgets", "matplotlib", "numpy", "pandas", "pillow", "safetensors"),
    *("joblib", "scikit-learn", "scipy", "torch", "torchvision", "tqdm"),
}
NAMED = ("jupyter-book", "jupyterlab", "torch", "torchvision", "matplotlib", "ipywidgets", "nbval", "pulp")


def requirements(lines):
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def pins(python, system="linux"):
    """What constraints.txt pins on one Python and system: name -> version."""
    machine = {"python_version": python, "python_full_version": python + ".1", "sys_platform": system}
    lines = map(Requirement, (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    here = [line for line in lines if line.marker is None or line.marker.evaluate(default_environment() | machine)]
    assert len({line.name for line in here}) == len(here), "a package is pinned twice"
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in here}


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_within_its_bounds(python, system):
    pinned = pins(python, system)
    wanted = PROJECT["dependencies"] + [line for extra in ("book", "homework", "test") for line in EXTRAS[extra]]
    for name, requirement in requirements(wanted).items():
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} against {pinned[name]}"


def test_torch_and_torchvision_are_a_tested_pair():
    pairs = {
        python: (pins(python)["torch"], pins(python)["torchvision"]) for python in ("3.10", "3.11", "3.12", "3.13")
    }
    assert pairs.pop("3.10") == ("2.12.1", "0.27.1")
    assert set(pairs.values()) == {("2.15.0", "0.29.2")}


def test_environment_yml_agrees_with_pyproject():
    conda = requirements(line for line in CONDA_PIP if not line.startswith("--"))
    project = requirements(PROJECT["dependencies"] + EXTRAS["book"] + EXTRAS["homework"] + EXTRAS["test"])
    assert set(NAMED) <= set(conda)
    for name, requirement in conda.items():
        assert str(requirement.specifier) == str(project[name].specifier), name
    assert "--constraint constraints.txt" in CONDA_PIP
    assert "--editable .[book,homework,test]" in CONDA_PIP
    (python,) = (part.removeprefix("python=") for part in CONDA["dependencies"] if str(part).startswith("python="))
    for name, requirement in conda.items():
        assert requirement.specifier.contains(pins(python)[name], prereleases=True), name


def test_book_stays_below_version_2():
    assert str(requirements(EXTRAS["book"])["jupyter-book"].specifier) in (">=1.0.4,<2", "<2,>=1.0.4")


def test_colab_lacks_the_solvers_only_and_keeps_its_versions_of_the_rest():
    for name, requirement in requirements(PROJECT["dependencies"]).items():
        assert name in COLAB_HAS or name in ("pulp", "highspy"), f"Colab would have to install {name}"
        upper = {part.operator for part in requirement.specifier} - {">="}
        assert not upper or name == "pulp", requirement  # PuLP 4 comes without a solver


def test_no_index_address_and_no_place_of_one_machine_in_any_file():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    # An address handed to an installer's option, and the folder in which somebody happens to work.
    here = "|" + re.escape(str(ROOT)) + r"(?![\w-])" if len(ROOT.parts) > 2 else ""
    forbidden = re.compile(r"--(extra-)?index-url[ =]+\S*://|--registry[ =]+\S*://" + here)
    for name in files.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and file != OWN and file.suffix not in (".gz", ".npz", ".png", ".safetensors", ".webp"):
            found = forbidden.search(file.read_text(encoding="utf-8"))
            assert not found, f"{name} names {found.group()}"
    for name in ("constraints.txt", "environment.yml", "pyproject.toml"):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name
