#!/usr/bin/env python3
"""Started by `python3 course.py homework`."""

import sys

from grading.cli import main

if __name__ == "__main__":
    sys.exit(main())
