"""A clean environment, as Colab or a reader has it: the package's base dependencies and Jupyter's kernel, no extras.

Made in seconds: what the environment that runs the tests has installed is linked into a new one, and not copied.
"""

import functools
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
KERNEL = ("ipykernel", "nbval", "nbclient", "pytest", "pip")


def project() -> dict:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def dependencies() -> list[str]:
    """The names of the package's base dependencies."""
    return [Requirement(line).name for line in project()["dependencies"]]


def closure(names, without=()) -> dict[str, Distribution]:
    """The installed distributions that `names` need, themselves included: canonical name -> distribution."""
    found, waiting = {}, [(name, frozenset()) for name in names]
    done = set()
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if (name, extras) in done or name in without:
            continue
        done.add((name, extras))
        found[name] = distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            contexts = [{"extra": extra} for extra in (extras or {""})]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def link(source: Path, target: Path):
    """A symbolic link, or a copy where the system allows no links."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def site_packages(python: Path) -> Path:
    """Where an environment keeps its packages."""
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


@functools.cache
def owners_of_folders() -> dict[str, set[str]]:
    """Which installed distributions have files in a folder of site-packages: several share one such as `nvidia`."""
    owners = {}
    for package in distributions():
        name = canonicalize_name(package.metadata["Name"])
        for top in {file.parts[0] for file in package.files or ()}:
            owners.setdefault(top, set()).add(name)
    return owners


def make(folder: Path, wanted: dict[str, Distribution]) -> Path:
    """The Python of a new environment in `folder` that holds the distributions `wanted` and nothing else."""
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = site_packages(python)
    owners = owners_of_folders()
    for package in wanted.values():
        parts = set()
        for file in package.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):  # scripts, and byte code that Python makes again
                parts.add(top if owners[top] <= wanted.keys() else str(file))
        for part in parts:
            link(Path(package.locate_file(part)).resolve(), site / part)
    return python


def pretend_colab(python: Path):
    """Make `google.colab` a loaded module from the start, as it is on Colab."""
    apart = python.parent.parent / "pretend"
    (apart / "google" / "colab").mkdir(parents=True)
    (apart / "google" / "colab" / "__init__.py").touch()
    (site_packages(python) / "pretend_colab.pth").write_text(f"{apart}\nimport google.colab\n", encoding="utf-8")


def source_tree(folder: Path) -> Path:
    """A copy of what the package is built from."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tmlcourse", folder / "tmlcourse", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def wheel(folder: Path) -> Path:
    """The package's wheel, built from the working tree."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    subprocess.run([*pip, source_tree(folder / "source")], check=True)
    (built,) = folder.glob("*.whl")
    return built
