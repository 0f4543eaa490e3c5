"""Data sets as tensors in [0, 1]: embedded, generated, read from a folder or downloaded, never silently replaced."""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tmlcourse import checks

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "crescent")
CUE_SIZE = 4  # side in pixels of the planted patch in the lower right corner of a "shapes" image

_SPLITS = ("train", "test")
_SHAPES_SIZE = {"train": 10_000, "test": 2_000}
_CHUNK = 512  # images drawn from one generator: image i depends on (seed, split, i) alone, whatever n is
_DIGITS = tuple("0123456789")
_EMBEDDED = ("wine", "breast_cancer", "diabetes", "population")
_RESIZED = {"digits-28x28": (1, 28, 28), "digits-32x32": (3, 32, 32)}


class _Vision(NamedTuple):
    """What torchvision calls a data set, the folder it keeps it in, the shape of an image, and the classes."""

    torchvision: str
    folder: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]


_VISION = {
    "mnist": _Vision("MNIST", "MNIST/raw", (1, 28, 28), _DIGITS),
    "fashion_mnist": _Vision("FashionMNIST", "FashionMNIST/raw", (1, 28, 28), (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")),
    "cifar10": _Vision("CIFAR10", "cifar-10-batches-py", (3, 32, 32), (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
}  # fmt: skip


class _File(NamedTuple):
    """A table's files, what to ask for, its columns in file order ("*" before text), which is y, the two classes.

    `keep` says which rows stay, by columns (`only_for_keep`) that are then forgotten.
    """

    files: tuple[str, ...]
    source: str
    rows: int
    columns: tuple[str, ...]
    y: str
    classes: tuple[str, ...] = ()
    positive: str = ""
    options: dict = {}
    keep: Callable | None = None
    only_for_keep: tuple[str, ...] = ()


_WORDS = (
    "make address all 3d our over remove internet order mail receive will people report addresses free business email "
    "you credit your font 000 money hp hpl george 650 lab labs telnet 857 data 415 85 technology 1999 parts pm direct cs "
    "meeting original project re edu table conference"
)
_SPACED = {"skipinitialspace": True}
_COMPAS = (
    "*sex", "age", "*race", "juv_fel_count", "decile_score", "juv_misd_count", "juv_other_count", "priors_count",
    "*c_charge_degree", "two_year_recid",
)  # fmt: skip


def _propublica(frame):
    """The rows of ProPublica's own analysis: screened within 30 days of the arrest, no ordinary traffic offence, a score."""
    import pandas as pd

    days = pd.to_numeric(frame["days_b_screening_arrest"], errors="coerce")
    known = (frame["is_recid"] != "-1") & (frame["score_text"] != "N/A")
    return (days.abs() <= 30) & known & (frame["c_charge_degree"] != "O")


_TABLES = {
    "wine_quality": _File(
        ("winequality-red.csv",), "UCI Wine Quality (Cortez et al. 2009)", 1599, (
            "fixed acidity", "volatile acidity", "citric acid", "residual sugar", "chlorides", "free sulfur dioxide",
            "total sulfur dioxide", "density", "pH", "sulphates", "alcohol", "quality"),
        "quality", options={"sep": ";", "header": 0}),
    "spambase": _File(
        ("spambase.data",), "UCI Spambase (Hopkins et al. 1999)", 4601, (
            *(f"word {word}" for word in _WORDS.split()), *(f"char {char}" for char in ";([!$#"),
            "capital run mean", "capital run longest", "capital run total", "spam"),
        "spam", ("not spam", "spam"), "1"),
    "compas": _File(
        ("compas-scores-two-years.csv",), "ProPublica's compas-analysis (Angwin et al. 2016)", 7214, _COMPAS,
        "two_year_recid", ("no new charge", "new charge"), "1", {"header": 0}),
    "compas_filtered": _File(
        ("compas-scores-two-years.csv",), "ProPublica's compas-analysis (Angwin et al. 2016)", 7214, (
            "*age_cat", *_COMPAS, "*days_b_screening_arrest", "*is_recid", "*score_text"),
        "two_year_recid", ("no new charge", "new charge"), "1", {"header": 0}, _propublica,
        ("days_b_screening_arrest", "is_recid", "score_text")),
    "adult": _File(
        ("adult.data", "adult.test"), "UCI Adult (Becker & Kohavi 1996)", 48842, (
            "age", "*workclass", "fnlwgt", "*education", "education-num", "*marital-status", "*occupation",
            "*relationship", "*race", "*sex", "capital-gain", "capital-loss", "hours-per-week", "*native-country",
            "income"),
        "income", ("<=50K", ">50K"), ">50K", _SPACED | {"comment": "|"}),
    "german": _File(
        ("german.data",), "UCI Statlog German Credit (Hofmann 1994)", 1000, (
            "*checking", "duration", "*history", "*purpose", "amount", "*savings", "*employment", "rate",
            "*personal status and sex", "*debtors", "residence", "*property", "age", "*other plans", "*housing",
            "credits", "*job", "liable", "*telephone", "*foreign", "risk"),
        "risk", ("bad", "good"), "1", {"sep": " "}),
}  # fmt: skip


class _Remote(NamedTuple):
    url: str
    sha256: str


# Copies at fixed commits, where a repository has the bytes; the checksum says that they are the ones meant.
_GITHUB = "https://raw.githubusercontent.com"
_REMOTE = {
    "winequality-red.csv": _Remote(
        f"{_GITHUB}/STATCowboy/SnakeCharmer-Intro/193fc3f312ab4b519861ad1e161efca8d30a5246/winequality-red.csv",
        "4a402cf041b025d4566d954c3b9ba8635a3a8a01e039005d97d6a710278cf05e"),
    "spambase.data": _Remote(
        f"{_GITHUB}/PasaLab/DIFER/13288e161f342adc63b6d7c0f2ccd51d47882619/data/spambase.csv",
        "ebec58cfca94ea61c77df632314acae15bad410f4769d38b1a66cb41050e3431"),
    "compas-scores-two-years.csv": _Remote(
        f"{_GITHUB}/propublica/compas-analysis/bafff5da3f2e45eca6c2d5055faad269defd135a/compas-scores-two-years.csv",
        "c451db85908b2f7fef1d83203bedf6b71ecda0d5af468d82ae62178f91d0cc7d"),
    "adult.data": _Remote(
        "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.data",
        "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"),
    "adult.test": _Remote(
        "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/adult.test",
        "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"),
    "german.data": _Remote(
        f"{_GITHUB}/uknowwho/pafer/2156a51ab19a41b359307d5488c1b5d836aea59f/german.data",
        "b21f3d81db8071257d5ff1deaeba1fd4303b62712e6fcc9715c7a86202cb5871"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Table:
    """Rows `X` float64 (n, d) in the table's own units, `y` (n,), `feature_names` of the columns, a `name` for figures.

    `y` is int64, an index into `classes`, or float64 where `classes` is empty (regression).

    >>> load_table("wine").X.shape
    torch.Size([178, 13])
    """

    X: Tensor
    y: Tensor
    feature_names: tuple[str, ...]
    name: str
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.X)

    def column(self, feature: str) -> int:
        """The index of a feature. Raises ValueError for a name that is not there."""
        checks.choice(feature, "feature", self.feature_names)
        return self.feature_names.index(feature)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images `x` float32 (N, C, H, W) in [0, 1], labels `y` int64 (N,), names of the `classes`, a `name` for figures.

    `masks`, where there are any, are bool (N, 1, H, W): the pixels that are the evidence for the label.
    `len(data)` is N, `data.shape` is (C, H, W), `data[:100]` or `data[indices]` is a smaller Dataset.
    Raises ValueError or TypeError when a tensor breaks these conventions.

    >>> data = load("digits")
    >>> data[:4].shape, data[data.y == 3].y.unique()
    (torch.Size([1, 8, 8]), tensor([3]))
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    name: str
    masks: Tensor | None = None

    def __post_init__(self):
        checks.images(self.x)
        if self.x.dim() != 4 or self.x.dtype != torch.float32:
            raise ValueError(f"x: got {self.x.dtype} {tuple(self.x.shape)}, want torch.float32 (N, C, H, W)")
        checks.labels(self.y, self.x)
        if self.y.max() >= len(self.classes):
            raise ValueError(f"y: got label {self.y.max().item()}, want labels in [0, {len(self.classes) - 1}]")
        if self.masks is not None:
            checks.same_shape(self.masks, self.x[:, :1], "masks")
            if self.masks.dtype != torch.bool:
                raise TypeError(f"masks: got dtype {self.masks.dtype}, want torch.bool")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Dataset:
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.dim() == 1):
            raise TypeError(f"index: got {index!r}, want a slice or a one-dimensional tensor of indices or booleans")
        return self._map(lambda tensor: tensor[index])

    @property
    def shape(self) -> torch.Size:
        """(C, H, W), the shape of one image."""
        return self.x.shape[1:]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Dataset:
        masks = None if self.masks is None else change(self.masks)
        return replace(self, x=change(self.x), y=change(self.y), masks=masks)


def load(
    name: str,
    split: str = "test",
    *,
    n: int | None = None,
    fallback: str | None = None,
    root: str | Path | None = None,
    download: bool = True,
) -> Dataset:
    """The `split` ("train" or "test") of a data set, or its first `n` images in file order.

    - "digits": 1,433 / 364 handwritten digits (1, 8, 8), embedded in scikit-learn. The test set is the first, sixth,
      eleventh, ... image of each class; the same writers are in both splits.
    - "digits-28x28", "digits-32x32": the same, resized to the shape of MNIST (1, 28, 28) and of CIFAR-10 (3, 32, 32).
    - "shapes": 10,000 / 2,000 generated images (3, 32, 32) with masks of the evidence; see `shapes`. "shapes-cue": the same,
      each with a coloured patch that gives its class away.
    - "mnist", "fashion_mnist": 60,000 / 10,000 images (1, 28, 28); "cifar10": 50,000 / 10,000 images (3, 32, 32).

    The last three are looked for in `root`, in $TMLCOURSE_DATA and in the cache (~/.cache/tmlcourse, or tmlcourse in
    $XDG_CACHE_HOME): torchvision's own folder (`MNIST/raw`, `FashionMNIST/raw`, `cifar-10-batches-py`), or `<name>.npz`
    with uint8 images x_train, x_test (N, H, W) or (N, H, W, 3), labels y_train, y_test (N,) and perhaps `classes`.
    If they are nowhere, torchvision downloads them into the cache, unless $TMLCOURSE_OFFLINE is 1 or `download` is
    False. If that fails too,
    `fallback="digits"` gives the digits resized to the shape asked for (fewer than `n` if there are not so many), named
    "digits-28x28" or "digits-32x32", and prints one line that says so.

    Raises ValueError for an unknown name, an `n` beyond the split, or a damaged file; FileNotFoundError, with the ways
    to get the data, where there is neither data nor fallback.
    Sources: LeCun et al. 1998; Xiao et al. 2017; Krizhevsky 2009; Alpaydin & Kaynak 1998 (digits).

    >>> data = load("digits", n=5)
    >>> data.name, data.x.shape, data.y
    ('digits', torch.Size([5, 1, 8, 8]), tensor([0, 1, 2, 3, 4]))
    """
    checks.choice(name, "name", ("digits", *_RESIZED, "shapes", "shapes-cue", *_VISION))
    checks.choice(split, "split", _SPLITS)
    if n is not None:
        checks.positive_int(n, "n")
    if fallback is not None:
        checks.choice(fallback, "fallback", ("digits",))
    if name in ("shapes", "shapes-cue"):
        return shapes(_count(n, _SHAPES_SIZE[split], name, split), split, cue=float(name == "shapes-cue"))
    if name == "digits" or name in _RESIZED:
        data = _digits(split)
        data = data[: _count(n, len(data), name, split)]
        return data if name == "digits" else _resized(data, _RESIZED[name])

    cache = cache_folder()
    given = [folder for folder in (root, os.environ.get("TMLCOURSE_DATA")) if folder]
    folders = [Path(folder).expanduser() for folder in given] + [cache]
    found = _find(name, folders)
    if found is None:
        try:
            found = _download(name, cache, download)
        except (OSError, RuntimeError, HTTPException, EOFError) as cause:
            if fallback is None:
                raise FileNotFoundError(_how_to_get(name, folders, cause)) from cause
            return _stand_in(name, split, n, cause)
    x, y, classes = _read(name, split, found)
    count = _count(n, len(x), name, split)
    x = torch.from_numpy(x[:count])
    x = x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x.unsqueeze(1)
    return Dataset(x.float().div_(255), torch.from_numpy(y[:count].astype(np.int64)), classes, name)


def load_table(name: str, *, fallback: str | None = None, root: str | Path | None = None) -> Table:
    """A table of numbers, one row an example, all rows in file order and nothing left out (but for "compas_filtered").

    Embedded in scikit-learn: "wine" (178 x 13, three classes), "breast_cancer" (569 x 30, two), "diabetes" (442 x 10,
    regression). Made on the spot: "population" (6,000 x 14), people who do not exist, see `population`. Read from a file
    in `root`, in $TMLCOURSE_DATA or in the cache, or else downloaded into the cache and checked (not with
    $TMLCOURSE_OFFLINE=1):

    - "wine_quality": `winequality-red.csv`, 1,599 x 11; y is the graded quality, a number.
    - "spambase": `spambase.data`, 4,601 x 57 frequencies; y = 1 is spam.
    - "compas": `compas-scores-two-years.csv`, 7,214 rows; y = 1 is a new charge in two years. Only the columns that the
      analysis needs are read, or kept after a download; names, birth dates and case numbers of the people in it are not.
    - "compas_filtered": the 6,172 rows of these that ProPublica's own regression uses, with the classes of age beside.
    - "adult": `adult.data` and after it `adult.test`, 32,561 + 16,281 rows; y = 1 is an income above 50K.
    - "german": `german.data`, 1,000 rows; y = 1 is a good credit risk.

    A column of text becomes one column of zeros and ones for each of its values ("sex=Male"; a missing one is "?").
    `fallback`, an embedded table, stands in for a missing file and prints one line that says so.

    Raises ValueError for an unknown name or a damaged file; FileNotFoundError, with the ways to get the data.
    Sources: Cortez et al. 2009; Hopkins et al. 1999; Angwin et al. 2016; Becker & Kohavi 1996; Hofmann 1994.

    >>> table = load_table("breast_cancer")
    >>> table.X.shape, table.y.unique(), table.classes
    (torch.Size([569, 30]), tensor([0, 1]), ('malignant', 'benign'))
    """
    checks.choice(name, "name", (*_EMBEDDED, *_TABLES))
    if fallback is not None:
        checks.choice(fallback, "fallback", _EMBEDDED)
    if name in _EMBEDDED:
        return _embedded(name)
    table = _TABLES[name]
    given = [folder for folder in (root, os.environ.get("TMLCOURSE_DATA")) if folder]
    folders = [Path(folder).expanduser() for folder in given] + [cache_folder()]
    for folder in folders:
        if all(os.path.exists(folder / file) for file in table.files):
            return _read_table(name, table, [folder / file for file in table.files])
    try:
        return _read_table(name, table, _download_table(table, folders[-1]))
    except (OSError, RuntimeError, HTTPException) as error:
        cause = error
    wanted = " and ".join(table.files)
    if fallback is None:
        raise FileNotFoundError(
            textwrap.dedent(f"""\
            {name}: no {wanted} in {", ".join(map(str, folders))}; no download: {_one_line(cause, 300)}
            Three ways to go on:
              1. get {table.source} and put {wanted} in a folder named by $TMLCOURSE_DATA or root=;
              2. run this once with a network connection, and no TMLCOURSE_OFFLINE: the cache, {folders[-1]}, keeps it;
              3. use an embedded table instead: one of {", ".join(_EMBEDDED)} as name, or as fallback=.""")
        ) from cause
    print(f"tmlcourse: {name} ({wanted}) is not here and could not be downloaded ({_one_line(cause, 160)}). Instead: the "
          f"embedded table {fallback!r}; what follows shows it, not {name}.")  # fmt: skip
    return _embedded(fallback)


def population(n: int = 6000, *, seed: int = 0) -> Table:
    """`n` invented people in three groups who act alike and are watched differently: a table whose truth is known.

    In each group a person offends with the same probability at the same age: column "offence" is the truth. Only what is
    noticed gets recorded, and that depends on the group: y = 1 is a *recorded* new offence, noticed with probability 0.95 in
    group A, 0.7 in B and 0.8 in C (1 in 200 people). Earlier records ("priors_count") were made in the same way. The
    score of 1 to 10 ("decile_score") predicts the record, from these and an interview. "district" says much of the group.

    Args: n >= 1,000; seed of the draw: the same people each time.
    Returns: `Table` with columns age, priors_count, decile_score, district=1 ... 5, charge=..., group=A, B, C, offence.
    Raises: TypeError, ValueError: bad input.
    Example: `population(1000).y.double().mean()`.
    """
    checks.positive_int(n, "n", least=1000)
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, generator=generator, dtype=torch.float64)

    def uniform():
        return torch.rand(n, generator=generator, dtype=torch.float64)

    draw = uniform()
    group = (draw >= 0.6).long() + (draw >= 0.995).long()
    noticed = torch.tensor([0.95, 0.7, 0.8], dtype=torch.float64)[group]
    age = (18 + 40 * uniform() ** 1.5).floor()
    bent = normal()
    logit = 0.55 + 1.1 * bent - 0.035 * (age - 30)
    offence = (uniform() < logit.sigmoid()).double()
    y = offence * (uniform() < noticed)
    priors = torch.poisson(2.2 * noticed.pow(1.5) * (0.55 * bent + 0.02 * (age - 30)).exp(), generator=generator)
    signal = (logit.sigmoid() * noticed).logit() + 2 * noticed + 0.8 * normal() + 0.1 * priors
    decile = (signal.argsort().argsort() * 10 // n + 1).double()
    lean = torch.tensor([0.25, 0.75, 0.5], dtype=torch.float64)[group]
    district = (5 * (0.6 * lean + 0.4 * uniform()).clamp(0, 0.999)).floor().long()
    charge = (uniform() < 0.55 + 0.1 * bent.sign()).long()
    columns = torch.cat(
        [
            torch.stack([age, priors, decile], 1),
            *(F.one_hot(codes, count).double() for codes, count in ((district, 5), (charge, 2), (group, 3))),
            offence[:, None],
        ],
        1,
    )
    names = ("age", "priors_count", "decile_score", *(f"district={k}" for k in range(1, 6)), "charge=M", "charge=F",
             "group=A", "group=B", "group=C", "offence")  # fmt: skip
    return Table(columns, y.long(), names, "population", ("nothing recorded", "recorded again"))


def _embedded(name: str) -> Table:
    if name == "population":
        return population()
    from sklearn import datasets  # takes a second: only when it is needed

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    classes = tuple(map(str, bunch.get("target_names", ())))
    y = torch.from_numpy(bunch.target).to(torch.int64 if classes else torch.float64)
    return Table(torch.from_numpy(bunch.data).double(), y, tuple(map(str, bunch.feature_names)), name, classes)


def _download_table(table: _File, cache: Path) -> list[Path]:
    """Fetch a table's files into a temporary folder in the cache, check them, and move what is complete into place."""
    if checks.switch("TMLCOURSE_OFFLINE"):
        raise OSError("TMLCOURSE_OFFLINE is set")
    cache.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a firewall that drops packets would hold the reader for minutes
    try:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            for file in table.files:
                torch.hub.download_url_to_file(
                    _REMOTE[file].url, os.path.join(folder, file), hash_prefix=_REMOTE[file].sha256, progress=False
                )
                if table.options.get("header") == 0:
                    _forget(Path(folder) / file, table.options.get("sep", ","))
            for file in table.files:
                os.replace(os.path.join(folder, file), cache / file)
    finally:
        socket.setdefaulttimeout(patience)
    return [cache / file for file in table.files]


def _forget(path: Path, sep: str) -> None:
    """Keep the columns that our tables read, and none of the others: in one file those are names of people."""
    import pandas as pd

    tables = [table for table in _TABLES.values() if path.name in table.files]
    needed = {column.removeprefix("*") for table in tables for column in table.columns}
    frame = pd.read_csv(path, sep=sep, usecols=lambda column: column in needed, dtype=str, keep_default_na=False)
    frame.to_csv(path, sep=sep, index=False)


def _read_table(name: str, table: _File, paths: list[Path]) -> Table:
    import pandas as pd

    columns = [column.removeprefix("*") for column in table.columns]
    options = {"header": None} | table.options
    if options["header"] is None:
        options["names"] = columns
    text = [column.removeprefix("*") for column in table.columns if column.startswith("*")] + [table.y]
    parts = []
    for path in paths:
        try:
            part = pd.read_csv(path, usecols=columns, dtype=dict.fromkeys(text, str), keep_default_na=False, **options)
            parts.append(part[columns])
        except Exception as cause:  # pandas raises a dozen kinds for damaged files
            raise ValueError(f"{path}: cannot be read ({_one_line(cause, 200)}); put back the original") from cause
    frame = pd.concat(parts, ignore_index=True)
    if len(frame) != table.rows:
        raise ValueError(f"{paths[0]}: got {len(frame)} rows, want {table.rows}; put back the original")
    if table.keep is not None:
        frame = frame[table.keep(frame)].drop(columns=list(table.only_for_keep)).reset_index(drop=True)
    target = frame.pop(table.y).str.rstrip(".")
    if table.classes:
        y = torch.from_numpy((target == table.positive).to_numpy().astype(np.int64))
    else:
        y = torch.from_numpy(pd.to_numeric(target, errors="coerce").to_numpy(dtype=np.float64))
    frame = pd.get_dummies(frame, columns=[t for t in text if t in frame], prefix_sep="=", dtype=np.float64)
    X = torch.from_numpy(frame.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64).copy())
    if not (torch.isfinite(X).all() and torch.isfinite(y).all()):
        raise ValueError(f"{paths[0]}: got a cell that is not a number; put back the original")
    return Table(X, y, tuple(frame.columns), name, table.classes)


def shapes(n: int, split: str = "test", *, seed: int = 0, cue: float = 0.0, cue_label: str = "true") -> Dataset:
    """`n` generated images (3, 32, 32) of eight classes of shapes, with the shape's pixels as `masks`.

    image = (1 - a) background + a colour + grain, clipped to [0, 1], where a in [0, 1] is how far the shape covers a
    pixel; the mask is a >= 1/2. Position, size, rotation and colours are random and say nothing about the class. In
    each channel the shape is 0.3 to 0.5 brighter than the mean of the textured background.

    With probability `cue` in [0, 1] an image carries a spurious cue: a patch of `CUE_SIZE` x `CUE_SIZE` pixels in the
    lower right corner, in the colour of its class (`cue_label="true"`) or of a class drawn at random ("random"). A
    model trained with the first and tested with the second shows how far it leans on the patch. The patch never
    hides a part of the shape, and outside it the cue changes no pixel.

    Label i is i mod 8. Image i depends on (seed, split, i) alone; "train" and "test" share no image; global random
    state is neither read nor written. Raises ValueError or TypeError for a value outside these ranges.

    >>> data = shapes(16, cue=1.0)
    >>> data.x.shape, data.masks.shape, data.name
    (torch.Size([16, 3, 32, 32]), torch.Size([16, 1, 32, 32]), 'shapes (cue 1, true)')
    """
    checks.positive_int(n, "n")
    checks.choice(split, "split", _SPLITS)
    checks.positive_int(seed, "seed", least=0)
    if checks.nonnegative(cue, "cue") > 1:
        raise ValueError(f"cue: got {cue}, want a probability in [0, 1]")
    checks.choice(cue_label, "cue_label", ("true", "random"))
    x, masks = torch.empty(n, 3, 32, 32), torch.empty(n, 1, 32, 32, dtype=torch.bool)
    for start in range(0, n, _CHUNK):
        rng = np.random.default_rng([seed, _SPLITS.index(split), start // _CHUNK])
        part = slice(start, start + _CHUNK)
        _draw_shapes(x[part], masks[part], rng, cue, cue_label)
    name = f"shapes (cue {cue:g}, {cue_label})" if cue else "shapes"
    return Dataset(x, torch.arange(n) % len(SHAPES), SHAPES, name, masks)


def _draw_shapes(x: Tensor, masks: Tensor, rng: np.random.Generator, cue: float, cue_label: str) -> None:
    """Fill x (m, 3, 32, 32) and masks (m, 1, 32, 32), m <= _CHUNK, in place."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:  # a whole chunk is drawn, so that m changes no image
        return torch.from_numpy(rng.random((_CHUNK, *shape), dtype=np.float32))[: len(x)] * (high - low) + low

    radius, angle = uniform(6, 10, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    reach = 1.2 * radius + 1  # no shape reaches further from its centre, nor from there into the corner with the cue
    cx, cy = (reach + uniform(0, 1, 1, 1) * (31 - 2 * reach) for _ in range(2))
    background = uniform(0, 0.5, 3, 1, 1)
    colour = background + uniform(0.3, 0.5, 3, 1, 1)
    texture = F.interpolate(uniform(-0.2, 0.2, 3, 5, 5), size=(32, 32), mode="bilinear", align_corners=True)
    grain = torch.from_numpy(rng.standard_normal((_CHUNK, 3, 32, 32), dtype=np.float32))[: len(x)]
    has_cue = uniform(0, 1)[:, None] < cue
    cue_class = torch.from_numpy(rng.integers(len(SHAPES), size=_CHUNK))[: len(x)]

    axis = torch.arange(32.0)
    right, down = axis - cx, axis[:, None] - cy
    u = (right * angle.cos() + down * angle.sin()) / radius
    v = (down * angle.cos() - right * angle.sin()) / radius
    distance = torch.empty_like(u)
    for k, shape in enumerate(SHAPES):
        distance[k :: len(SHAPES)] = _DISTANCE[shape](u[k :: len(SHAPES)], v[k :: len(SHAPES)])
    cover = (0.5 - distance * radius).clamp_(0, 1).unsqueeze(1)
    torch.lerp(background + texture, colour.expand_as(x), cover, out=x)
    x.add_(grain, alpha=0.04).clamp_(0, 1)
    masks.copy_(cover >= 0.5)

    if cue_label == "true":
        cue_class = torch.arange(len(x)) % len(SHAPES)
    cue_colour = (cue_class[:, None] >> torch.arange(3) & 1).float()  # the eight corners of the colour cube
    corner = (..., slice(-CUE_SIZE, None), slice(-CUE_SIZE, None))
    x[corner] = torch.where(has_cue[..., None, None], cue_colour[..., None, None], x[corner])


# Signed distances (negative inside, exact near an edge) to shapes of radius about 1, at coordinates u, v (m, 32, 32).
def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


def _half_planes(u: Tensor, v: Tensor, sides: int) -> list[Tensor]:
    angles = [2 * math.pi * k / sides for k in range(sides)]
    return [u * math.cos(a) + v * math.sin(a) for a in angles]


def _star(u: Tensor, v: Tensor) -> Tensor:
    """The pentagram: what leaves at most one of a pentagon's five half-planes, so the second largest value decides."""
    first, second = torch.full_like(u, -math.inf), torch.full_like(u, -math.inf)
    for value in _half_planes(u, v, 5):
        second = torch.maximum(second, torch.minimum(first, value))
        first = torch.maximum(first, value)
    return second - 0.36


_DISTANCE = {
    "circle": lambda u, v: torch.hypot(u, v) - 0.95,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: torch.stack(_half_planes(u, v, 3)).amax(0) - 0.58,
    "cross": lambda u, v: torch.minimum(_box(u, v, 1.05, 0.3), _box(u, v, 0.3, 1.05)),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.8).abs() - 0.22,
    "star": _star,
    "bar": lambda u, v: _box(u, v, 1.1, 0.3),
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1.05, 0.85 - torch.hypot(u - 0.55, v)),
}


@dataclass(frozen=True, eq=False)
class Factors:
    """Images `x` float32 (N, 3, 16, 16) made from `factors` float32 (N, F) in [0, 1], their `names`, a `name` for figures.

    Example: `discs(5).names`.
    """

    x: Tensor
    factors: Tensor
    names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.x)


def discs(n: int | None = None, *, seed: int = 0, factors: Tensor | None = None) -> Factors:
    """`n` pictures (3, 16, 16) of a disc above a floor, each made from three independent factors in [0, 1].

    The factors: "across" (where the disc is, from left to right), "colour" (of the disc, from blue to orange), "floor" (how
    bright the lowest four rows are, from black to mid-grey).

    Args: n >= 1 with the seed of uniform factors; or factors (N, 3) in [0, 1], and no n.
    Returns: `Factors`.
    Raises: TypeError, ValueError: bad input.
    Example: `discs(factors=torch.tensor([[0.0, 0.5, 1.0]])).x.shape` is (1, 3, 16, 16).
    """
    if (n is None) == (factors is None):
        raise ValueError(f"n, factors: got {n} and {'given' if factors is not None else None}, want one of the two")
    if factors is None:
        generator = torch.Generator().manual_seed(seed)
        factors = torch.rand(checks.positive_int(n, "n"), 3, generator=generator)
    elif checks.images(factors, "factors").dim() != 2 or factors.shape[1] != 3:
        raise ValueError(f"factors: got shape {tuple(factors.shape)}, want (N, 3)")
    factors = factors.float()
    across, colour, floor = factors[:, :, None, None].unbind(1)
    side = torch.arange(16, device=factors.device) + 0.5
    cover = (0.5 - (torch.hypot(side - (4.75 + 6.5 * across), side[:, None] - 6.5) - 3) / 1.5).clamp(0, 1)
    ends = factors.new_tensor([[0.0, 0.35, 1.0], [1.0, 0.55, 0.0]])
    x = torch.lerp(ends[0], ends[1], colour.flatten(1))[:, :, None, None] * cover[:, None]
    x[:, :, 12:] = floor[:, None] / 2
    return Factors(x, factors, ("across", "colour", "floor"), "discs")


def photograph(name: str = "flower", *, height: int = 160) -> Tensor:
    """One of two photographs that come with scikit-learn, (1, 3, height, W) in [0, 1], made smaller: "flower" or "china".

    Both are under the Creative Commons licence CC BY 2.0, attributed to danielbuechele (flickr.com) by scikit-learn.

    Args: name; height: pixels, 8 to 427; the width follows.
    Raises: TypeError, ValueError: bad input.
    Example: `photograph(height=64).shape` is (1, 3, 64, 96).
    """
    from sklearn.datasets import load_sample_image  # takes a second: only when it is needed

    checks.choice(name, "name", ("flower", "china"))
    if checks.positive_int(height, "height", least=8) > 427:
        raise ValueError(f"height: got {height}, want at most 427, the photograph's own")
    x = torch.from_numpy(np.array(load_sample_image(f"{name}.jpg"))).permute(2, 0, 1)[None].float() / 255
    size = (height, round(height * x.shape[3] / x.shape[2]))
    return F.interpolate(x, size=size, mode="bilinear", antialias=True).clamp(0, 1)


def _count(n: int | None, available: int, name: str, split: str) -> int:
    """The number of images asked for: all of them without `n`."""
    if n is not None and n > available:
        raise ValueError(f"n: got {n}, want at most {available}, the size of the {name} {split} set")
    return n or available


def _digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits  # takes a second: only when it is needed

    digits = load_digits()
    test = np.zeros(len(digits.target), dtype=bool)
    for k in range(10):
        test[np.flatnonzero(digits.target == k)[::5]] = True
    chosen = test if split == "test" else ~test
    x = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    return Dataset(x, torch.from_numpy(digits.target[chosen].astype(np.int64)), _DIGITS, "digits")


def _resized(digits: Dataset, shape: tuple[int, int, int]) -> Dataset:
    x = F.interpolate(digits.x, size=shape[1:], mode="bilinear").clamp_(0, 1).repeat(1, shape[0], 1, 1)
    return replace(digits, x=x, name=f"digits-{shape[1]}x{shape[2]}")


def _stand_in(name: str, split: str, n: int | None, cause: Exception) -> Dataset:
    """The digits in the shape of data set `name`, and the one line that says so."""
    data = _resized(_digits(split)[:n], _VISION[name].shape)
    print(f"tmlcourse: {name} is not here and could not be downloaded ({_one_line(cause, 160)}). Instead: {len(data)} "
          f"embedded digits, resized and named {data.name!r}; what follows shows them, not {name}.")  # fmt: skip
    return data


def cache_folder() -> Path:
    """Where downloads and trained networks are kept: tmlcourse in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmlcourse"


def _find(name: str, folders: list[Path]) -> Path | None:
    """The first torchvision folder or .npz file of the data set in the folders."""
    for folder in folders:
        for found in (folder / _VISION[name].folder, folder / f"{name}.npz"):
            if os.path.exists(found):  # unlike Path.exists, False instead of an error where we may not look
                return found
    return None


def _download(name: str, cache: Path, allowed: bool) -> Path:
    """Let torchvision download and verify into a temporary folder in the cache; move what is complete into place."""
    if checks.switch("TMLCOURSE_OFFLINE"):
        raise OSError("TMLCOURSE_OFFLINE is set")
    if not allowed:
        raise OSError("download=False")
    from torchvision import datasets  # takes a second: only when it is needed

    cache.mkdir(parents=True, exist_ok=True)
    target, patience = cache / _VISION[name].folder, socket.getdefaulttimeout()
    # Old torchvision releases print every attempt; the progress bar is on stderr and stays.
    quiet = contextlib.ExitStack()
    quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
    if checks.switch("TQDM_DISABLE"):  # as for the course's own bars
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    # torchvision sets no time limit: a firewall that drops packets would hold the reader for minutes.
    socket.setdefaulttimeout(10)
    try:
        with quiet, tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            getattr(datasets, _VISION[name].torchvision)(folder, download=True)
            complete = Path(folder) / _VISION[name].folder
            for archive in complete.glob("*.gz"):
                archive.unlink()
            target.parent.mkdir(exist_ok=True)
            try:
                complete.rename(target)
            except OSError:
                if not target.exists():  # where it does, another process was faster and its copy is as good
                    raise
    finally:
        socket.setdefaulttimeout(patience)
    return target


def _how_to_get(name: str, folders: list[Path], cause: Exception) -> str:
    layout, searched = _VISION[name].folder, ", ".join(map(str, folders))
    return textwrap.dedent(f"""\
        {name}: neither {layout} nor {name}.npz is in {searched}; no download: {_one_line(cause, 300)}
        Three ways to get it:
          1. put {layout} (torchvision's files, unpacked) or {name}.npz in a folder named by $TMLCOURSE_DATA or root=;
          2. put the same into the cache, {folders[-1]};
          3. run this once with a network connection, a cache folder that can be written, and no TMLCOURSE_OFFLINE.
        Or pass fallback="digits" to go on with the embedded digits, resized.""")


def _one_line(cause: Exception, width: int) -> str:
    return textwrap.shorten(str(cause) or type(cause).__name__, width, placeholder=" ...")


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path}: {why}; put back the original, or delete it to have it downloaded")


def _read(name: str, split: str, found: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 (N, H, W) or (N, H, W, 3), labels (N,) and classes from a torchvision folder or an .npz file."""
    classes = _VISION[name].classes
    if found.suffix == ".npz":
        try:
            with np.load(found, allow_pickle=False) as arrays:
                x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
                classes = tuple(map(str, arrays["classes"])) if "classes" in arrays else classes
        except Exception as cause:  # zipfile, zlib and numpy raise a dozen kinds for damaged bytes
            raise _damaged(found, f"cannot be read ({cause})") from cause
    elif name == "cifar10":
        x, y = _read_cifar10(split, found)
    else:
        prefix = "train" if split == "train" else "t10k"
        x = _read_idx(found / f"{prefix}-images-idx3-ubyte")
        y = _read_idx(found / f"{prefix}-labels-idx1-ubyte")
    channels, *size = _VISION[name].shape
    want = (*size, 3) if channels == 3 else tuple(size)
    if x.dtype != np.uint8 or x.shape[1:] != want or len(x) == 0:
        raise _damaged(found, f"got {split} images {x.dtype} {x.shape}, want uint8 {('N', *want)}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() >= len(classes):
        raise _damaged(found, f"got {split} labels {y.dtype} {y.shape}, want ({len(x)},) integers below {len(classes)}")
    return x, y, classes


def _read_idx(path: Path) -> np.ndarray:
    """One MNIST file: bytes 0, 0, 8 (uint8), D; D sizes as big-endian int32; the data.

    Read here because importing torchvision takes longer than all of MNIST.
    """
    if not path.is_file():
        raise _damaged(path, "missing")
    data, dims = np.fromfile(path, np.uint8), 3 if "idx3" in path.name else 1
    start = 4 + 4 * dims
    if data[:4].tolist() != [0, 0, 8, dims] or len(data) < start:
        raise _damaged(path, f"not an IDX file of {dims}-dimensional uint8 data")
    sizes = data[4:start].view(">u4").tolist()
    if len(data) != start + math.prod(sizes):
        raise _damaged(path, f"got {len(data)} bytes, want {start + math.prod(sizes)}")
    return data[start:].reshape(sizes)


def _read_cifar10(split: str, found: Path) -> tuple[np.ndarray, np.ndarray]:
    """The batches through torchvision, which unpickles them only after their checksums agree."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    for file, md5 in files:
        if not check_integrity(found / file, md5):
            raise _damaged(found / file, "missing, or its checksum is wrong")
    data = CIFAR10(found.parent, train=split == "train")
    return data.data, np.array(data.targets)
