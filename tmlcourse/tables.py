"""Tables that take too long for a chapter: computed once by a benchmark, shipped beside the module they are about."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def shipped(module: str, name: str, **options) -> pd.DataFrame:
    """The table `tables/<name>.csv` (or `.csv.gz`) beside the file `module`.

    Args:
        module: the `__file__` of the module.
        name: of the table.
        options: of `pandas.read_csv`.
    Raises:
        ValueError: no such table; the message lists those that there are.
    """
    found = {path.name.split(".csv")[0]: path for path in sorted(Path(module).with_name("tables").glob("*.csv*"))}
    if name not in found:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(found) or '(none is shipped)'}")
    return pd.read_csv(found[name], **options)
