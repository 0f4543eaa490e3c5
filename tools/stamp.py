#!/usr/bin/env python3
"""Write the repository's address, which `_config.yml` holds, into every place that must repeat it.

usage: stamp.py [--check] [--ref COMMIT] [--branch BRANCH]

The setup cell of every chapter and homework installs the package on Colab from that address; the README, the opening
page, the licence of the text and CITATION.cff link to it. A notebook cannot hold its own commit, so publishing stamps a copy:
`--ref` is what its setup cells install (the branch otherwise), `--branch` is where its Colab buttons point.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
import yaml
from nb_clean import normal_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "LICENSE-TEXT", "book/index.md", "CITATION.cff")
SETUP = """\
# On Colab this installs the course's package, and nothing that is there.
import sys
from importlib.util import find_spec

if "google.colab" in sys.modules and find_spec("tmlcourse") is None:
    %pip install -q "tmlcourse @ git+{url}@{ref}"

import tmlcourse

device = tmlcourse.setup(seed=0)"""


def repository(root=ROOT):
    """The repository's address and branch, as `_config.yml` has them."""
    settings = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    return settings["url"].rstrip("/"), settings["branch"]


def setup_cell(url, ref):
    """The first code cell of every notebook."""
    return SETUP.format(url=url, ref=ref)


def stamped_page(text, old, url, branch):
    """A page's text with the address `old` replaced by `url`: links into the repository, to the book, and to Colab."""
    (old_owner, old_name), (owner, name) = (address.split("/")[-2:] for address in (old, url))
    text = text.replace(old, url)
    pages = "https://{}.github.io/{}"
    text = text.replace(pages.format(old_owner.lower(), old_name), pages.format(owner.lower(), name))
    colab = "https://colab.research.google.com/github/"
    return re.sub(rf"{colab}{old_owner}/{old_name}/blob/[^/]+/", f"{colab}{owner}/{name}/blob/{branch}/", text)


def stamped_notebook(text, url, ref):
    """A notebook's text with the setup cell in the place of its first code cell."""
    notebook = nbformat.reads(text, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.source = setup_cell(url, ref)
    return normal_text(notebook)


def main(arguments, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where something differs")
    parser.add_argument("--ref", help="what the setup cells install (default: the branch)")
    parser.add_argument("--branch", help="write this branch into _config.yml first")
    options = parser.parse_args(arguments)
    if options.branch:
        config = root / "_config.yml"
        text = config.read_text(encoding="utf-8")
        config.write_bytes(re.sub(r"(?m)^(\s+branch: ).*$", rf"\g<1>{options.branch}", text).encode("utf-8"))
    url, branch = repository(root)
    old = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"]

    differ = False
    notebooks = sorted([*(root / "book").glob("*.ipynb"), *(root / "homework").glob("*/hw*/*.ipynb")])
    for file in [*(root / page for page in PAGES), *notebooks]:
        text = file.read_bytes().decode("utf-8")
        if file.suffix == ".ipynb":
            new = stamped_notebook(text, url, options.ref or branch)
        else:
            new = stamped_page(text, old, url, branch)
        if new != text:
            differ = True
            print(f"{file.relative_to(root)}: " + ("differs from _config.yml" if options.check else "stamped"))
            if not options.check:
                file.write_bytes(new.encode("utf-8"))
    return int(options.check and differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
