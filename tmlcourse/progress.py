"""One progress bar for all long work."""

from __future__ import annotations

from tqdm.auto import tqdm

from . import checks


def bar(iterable=None, **options) -> tqdm:
    """A `tqdm` bar that appears once the work has lasted two seconds and goes when it ends; none with $TQDM_DISABLE.

    tqdm's own reading of that variable does not reach its notebook bars, whose text would stay on a static page.
    """
    return tqdm(iterable, **{"delay": 2, "leave": False, "disable": checks.switch("TQDM_DISABLE"), **options})
