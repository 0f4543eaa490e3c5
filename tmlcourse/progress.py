"""One progress bar for all long work."""

from __future__ import annotations

import os

from tqdm.auto import tqdm


def bar(iterable=None, **options) -> tqdm:
    """A `tqdm` bar that appears once the work has lasted two seconds and goes when it ends; none with $TQDM_DISABLE.

    tqdm's own reading of that variable does not reach its notebook bars, whose text would stay on a static page.
    """
    quiet = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, **{"delay": 2, "leave": False, "disable": quiet, **options})
