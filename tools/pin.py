#!/usr/bin/env python3
"""Write constraints.txt: the newest versions that pyproject.toml allows, for every Python it names (needs uv).

usage: python tools/pin.py        then run all the tests, on every Python, before you commit the result
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# torch and torchvision belong together; torch 2.15 needs Python 3.11, and so does the theme that draws one header.
PAIRS = """\
torch==2.15.0; python_version >= "3.11"
torchvision==0.29.2; python_version >= "3.11"
torch==2.12.1; python_version < "3.11"
torchvision==0.27.1; python_version < "3.11"
sphinx-book-theme==1.2.0; python_version >= "3.11"
sphinx-book-theme==1.1.4; python_version < "3.11"
"""
EXTRAS = ("book", "homework", "test")
# torch itself names the exact versions of these, other ones for each of its builds.
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")

command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version", "3.10"]
command += ["--no-python-downloads", "--no-annotate", "--no-header", "--constraint", "-"]
command += [part for extra in EXTRAS for part in ("--extra", extra)]
lines = subprocess.run([*command, "pyproject.toml"], cwd=ROOT, input=PAIRS, text=True, capture_output=True)
if lines.returncode:
    sys.exit(lines.stderr)
pins = [line for line in lines.stdout.splitlines(keepends=True) if not line.startswith(LEFT_TO_TORCH)]
(ROOT / "constraints.txt").write_text("".join(pins), encoding="utf-8")
print(f"constraints.txt: {len(pins)} pins")
